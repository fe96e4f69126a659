"""The visual attributes of a lesion of the embedded benchmark, and distributions to sample them from.

A distribution gives, for each attribute, the weight of each level. It has two extra entries for the patches of further
colours: `patch_count` and `patch_colours`. `BROAD` is without classes; the benchmark's classes are other weights for the
same attributes (harness/demo/benchmark.py).
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Level = TypeVar("Level", bound=Hashable)
Distribution = Mapping[str, Mapping[str | int, float]]


@dataclass(frozen=True)
class Lesion:
    """The visual attributes of one lesion; the levels each field may take are the keys of `BROAD`."""

    symmetry: str
    border: str  # the course of the outline
    edge: str  # how sharply it ends
    size: str
    colour: str  # the main colour
    patches: tuple[str, ...]  # up to three further colours, the largest patch first
    dots: str
    dot_colour: str  # means nothing when there are no dots
    streaks: str
    veil: str
    network: str
    surface: str
    vessels: str
    centre: str


def even(*levels: str | int) -> dict[str | int, float]:
    """Equal weights."""
    return dict.fromkeys(levels, 1.0)


BROAD: Distribution = {
    "symmetry": even("symmetric", "slightly asymmetric", "asymmetric"),
    "border": even("smooth", "uneven", "jagged"),
    "edge": even("sharp", "soft", "blurry"),
    "size": even("small", "medium", "large"),
    "colour": even("light brown", "dark brown", "black", "red", "pink", "yellow", "white"),
    "patch_count": {0: 0.3, 1: 0.3, 2: 0.25, 3: 0.15},
    "patch_colours": even("light brown", "dark brown", "black", "red", "pink", "yellow", "white", "blue-grey"),
    "dots": {"none": 0.4, "few": 0.3, "many": 0.3},
    "dot_colour": even("brown", "black", "white", "blue-grey"),
    "streaks": {"none": 0.5, "few": 0.25, "many": 0.25},
    "veil": {"none": 0.7, "present": 0.3},
    "network": {"none": 0.6, "present": 0.4},
    "surface": even("smooth", "rough", "shiny"),
    "vessels": {"none": 0.5, "few": 0.25, "many": 0.25},
    "centre": {"plain": 0.55, "sore": 0.15, "crust": 0.15, "scar": 0.15},
}


def sample(distribution: Distribution, rng: np.random.Generator) -> Lesion:
    """Draw one lesion's attributes, each independent of the others."""
    uniforms = iter(rng.random(len(distribution) + 3))
    count = pick(distribution["patch_count"], next(uniforms))
    levels = {
        name: str(pick(weights, next(uniforms)))
        for name, weights in distribution.items()
        if not name.startswith("patch_")
    }
    patches = _patches(int(count), distribution["patch_colours"], levels["colour"], uniforms)
    return Lesion(patches=patches, **levels)


def pick(weights: Mapping[Level, float], uniform: float) -> Level:
    """The level at `uniform` (in [0, 1)) of the cumulated weights, which need not sum to one."""
    left = uniform * sum(weights.values())
    for level, weight in weights.items():
        left -= weight
        if left < 0:
            return level
    return level


def _patches(count: int, weights: Mapping[str | int, float], main: str, uniforms: Iterator[float]) -> tuple[str, ...]:
    remaining = {colour: weight for colour, weight in weights.items() if colour != main}
    chosen = []
    for _ in range(count):
        chosen.append(str(pick(remaining, next(uniforms))))
        del remaining[chosen[-1]]
    return tuple(chosen)
