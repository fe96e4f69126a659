"""Colours: readers with any kind of colour blindness can tell them apart, and a method keeps its look."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from vipbench.harness.methods.registry import method_names
from vipbench.harness.report.figures.style import PALETTE, SETTLED, look, looks

# Machado, Oliveira and Fernandes (2009): what is seen of linear RGB, at full severity.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
TOLD_APART = 12.0  # in CIELAB; 2.3 is just noticeable side by side


def lab(color: str, blindness: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(BLINDNESS[blindness]) @ linear, 0, 1)
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ seen / (TO_XYZ @ np.ones(3)), 1e-4))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colors: tuple[str, ...], blindness: str) -> float:
    seen = [lab(color, blindness) for color in colors]
    return float(min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)))


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_differ_for_every_reader(blindness: str) -> None:
    assert nearest(PALETTE, blindness) > TOLD_APART


def test_the_measure_finds_what_readers_confuse() -> None:
    assert nearest(("#D62728", "#2CA02C"), "none") > 50 > TOLD_APART
    assert nearest(("#8C6D31", "#5D8C31"), "deuteranopia") < TOLD_APART


def test_each_method_has_a_look_of_its_own_in_every_chart() -> None:
    assert len({look(name) for name in SETTLED}) == len(SETTLED)
    assert {look(name).color for name in method_names()} <= set(PALETTE)
    assert looks(["coop", "vip"])[1] == looks(["vip", "zero_shot", "coop"])[0] == look("vip (merge=mean)")
    first, second = looks(["vip (merge=mean)", "vip (merge=attention)"])
    assert first.color == second.color and first != second
    assert look("a_plugin_of_yours") == look("a_plugin_of_yours")
