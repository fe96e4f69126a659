"""Images that look alike are found however they were changed, and others are not."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from typer.testing import CliRunner

from tests.data.drawn_images import image_folder, save
from vipbench.harness.cli import app
from vipbench.harness.data import near_duplicates
from vipbench.harness.data.near_duplicates import BITS, DISTANCE, Pair, alike, perceptual_hash


def photograph(seed: int) -> Image.Image:
    """Smooth random shapes, as of a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


def compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    return Image.open(buffer)


def difference(one: Image.Image, other: Image.Image) -> int:
    first, second = (perceptual_hash(np.asarray(image.convert("RGB"))) for image in (one, other))
    return int(np.bitwise_count(first ^ second).sum())


@pytest.mark.parametrize("seed", range(5))
def test_changed_copies_are_near_and_others_far(seed: int) -> None:
    image = photograph(seed)
    for copy in (
        compressed(image),
        image.resize((60, 60)),
        ImageEnhance.Brightness(image).enhance(0.8),
        image.convert("L"),
    ):
        assert difference(image, copy) <= DISTANCE
    assert difference(image, photograph(seed + 100)) > 2 * DISTANCE


@pytest.mark.parametrize("compared", [1, 600 * 7, 1 << 20])
def test_pairs_are_those_of_a_comparison_one_by_one(compared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "COMPARED", compared)
    hashes = np.random.default_rng(0).integers(0, 256, (600, BITS // 8), dtype=np.uint8)
    hashes[599] = hashes[3]
    hashes[300] = hashes[3]
    hashes[300, 0] ^= 0b101
    assert sorted(alike(hashes, 5)) == [Pair(3, 300, 2), Pair(3, 599, 0), Pair(300, 599, 2)]
    assert sorted(alike(hashes, 1)) == [Pair(3, 599, 0)]


def test_inspect_lists_them(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "in", {"train/mel": 3, "train/nev": 3, "test/nev": 2, "test/mel": 2})
    save(root / "train" / "mel" / "one.png", photograph(1))
    save(root / "test" / "nev" / "copy.png", photograph(1).resize((80, 80)))
    command = ["prepare", str(root), "--out", str(tmp_path / "data"), "--workers", "1", "--val-fraction", "0"]
    assert CliRunner().invoke(app, command).exit_code == 0
    result = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "data"), "--near-duplicates", str(tmp_path / "near.csv")]
    )
    assert result.exit_code == 0, result.exception
    rows = list(csv.DictReader((tmp_path / "near.csv").open()))
    (found,) = [row for row in rows if "one" in row["sample"]]
    assert (found["split"], found["other split"], found["other sample"]) == ("train", "test", "test/nev/copy")
    assert (found["class"], found["other class"]) == ("mel", "nev")
    across = sum(row["split"] != row["other split"] for row in rows)
    assert (
        f"{len(rows)} pairs of images that look alike" in result.output and f"{across} across splits" in result.output
    )
    none = CliRunner().invoke(app, ["inspect", str(tmp_path / "data")])
    assert "look alike" not in none.output
    idle = CliRunner().invoke(app, ["inspect", str(tmp_path / "data"), "--distance", "3"])
    assert "--distance: has no effect without --near-duplicates" in str(idle.exception)
