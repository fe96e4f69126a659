"""MedMNIST's published files: grey and RGB, any size, streamed; multi-label sets, volumes and damage refused in a line."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.data.importers import medmnist
from vipbench.harness.data.info import SPLITS
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError


def published(path: Path, shape: tuple[int, ...] = (28, 28), classes: int = 2, labels: int = 1) -> dict[str, Any]:
    """Write a file as MedMNIST publishes them, with six images in each split; returns its arrays."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        arrays[f"{split}_images"] = rng.integers(0, 256, (6, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(6 * labels, dtype=np.uint8).reshape(6, labels) % classes
    np.savez_compressed(path, **arrays)
    return arrays


def prepare(*arguments: object) -> str:
    """Run `vipbench prepare --format medmnist`; returns its output, or its error."""
    command = ["prepare", *map(str, arguments), "--format", "medmnist", "--workers", "1"]
    result = CliRunner().invoke(app, command)
    return str(result.exception) if result.exception else result.output


@pytest.mark.parametrize(("name", "shape"), [("pneumoniamnist", (28, 28)), ("bloodmnist_64", (64, 64, 3))])
def test_pixels_labels_and_splits_are_those_of_the_file(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    arrays = published(tmp_path / f"{name}.npz", shape)
    prepare(tmp_path / f"{name}.npz", "--out", tmp_path / "data", "--classes", "b,a")
    dataset = Dataset(tmp_path / "data")
    assert dataset.classes == ["b", "a"]
    for split in SPLITS:
        samples = dataset.split(split)
        assert samples.labels.tolist() == arrays[f"{split}_labels"][:, 0].tolist()
        for position in range(len(samples)):
            expected = arrays[f"{split}_images"][int(samples.key(position).removeprefix(f"{split}/"))]
            pixels = samples.pixels(position)
            np.testing.assert_array_equal(pixels, expected if len(shape) == 3 else np.stack([expected] * 3, axis=-1))


def test_class_names_are_those_of_the_card_and_grades_are_declared(tmp_path: Path) -> None:
    published(tmp_path / "pneumoniamnist_128.npz")
    assert medmnist.read(tmp_path / "pneumoniamnist_128.npz").classes == ["normal", "pneumonia"]
    published(tmp_path / "retinamnist.npz", (28, 28, 3), classes=5)
    output = prepare(tmp_path / "retinamnist.npz", "--out", tmp_path / "data")
    assert "RetinaMNIST's classes are grades: results have quadratic kappa" in output
    assert Dataset(tmp_path / "data").info.ordinal
    published(tmp_path / "mine.npz")
    with pytest.raises(UserError, match=r"its name is that of no set .*pneumoniamnist.*--classes"):
        medmnist.read(tmp_path / "mine.npz")


def test_another_order_of_processes_gives_the_same_dataset(tmp_path: Path) -> None:
    published(tmp_path / "pneumoniamnist.npz")
    for workers in (1, 2):
        prepare(tmp_path / "pneumoniamnist.npz", "--out", tmp_path / f"{workers}", "--workers", workers)
    digests = {Dataset(tmp_path / f"{workers}").info.digest for workers in (1, 2)}
    assert len(digests) == 1


def test_sets_that_are_no_classification_of_images_are_named(tmp_path: Path) -> None:
    published(tmp_path / "chestmnist.npz")
    with pytest.raises(UserError, match=r"ChestMNIST has several labels \(multi-label\)"):
        medmnist.read(tmp_path / "chestmnist.npz")
    published(tmp_path / "own.npz", labels=3)
    with pytest.raises(UserError, match=r"train_labels are \[6, 3\]: several labels of one image \(multi-label\)"):
        medmnist.read(tmp_path / "own.npz", ["a", "b"])
    published(tmp_path / "organmnist3d.npz", (28, 28, 28))
    with pytest.raises(UserError, match=r"train_images are volumes, \[6, 28, 28, 28\]"):
        medmnist.read(tmp_path / "organmnist3d.npz", ["a", "b"])


def test_damaged_and_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pneumoniamnist.npz"
    arrays = published(file)

    def refused(message: str, **changes: Any) -> None:
        if changes:
            np.savez_compressed(file, **{**arrays, **changes})
        with pytest.raises(UserError, match=message):
            list(medmnist.read(file).read_images())

    refused(r"6 images and 5 labels", val_labels=arrays["val_labels"][:5])
    refused(r"test_labels go from 0 to 9; 2 classes", test_labels=arrays["test_labels"] * 9)
    refused(r"of float64; they should be", train_images=arrays["train_images"].astype(float))
    refused(r"\[6, 0, 28\] of uint8; they should be", train_images=arrays["train_images"][:, :0])
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                if name == "train_images":  # a size of less than nothing would be read to the end
                    header["shape"] = (6, -28, 28)
                npy.write_array_header_1_0(member, header)
                member.write(array.tobytes())
    refused(r"\[6, -28, 28\] of uint8; they should be")
    refused(r"of object; they should be", train_labels=np.array([[0], ["x"]] * 3, dtype=object))
    published(file)
    file.write_bytes(file.read_bytes()[:-200])
    refused(r"not a whole \.npz file")
    np.savez_compressed(file, x=np.zeros(2))
    refused("holds no train_images")
    with pytest.raises(UserError, match=r"not a whole .npz file: .*No such file"):
        medmnist.read(tmp_path / "none_28.npz", ["a", "b"])
    published(file)
    monkeypatch.setenv("VIPBENCH_MAX_PIXELS", "100")
    refused("has 28 x 28 pixels, more than the 100")
