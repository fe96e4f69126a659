"""The verbs `prepare` and `inspect`, as a user calls them."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.data.drawn_images import drawn, image_folder, save
from vipbench.harness.commands.data import inspect, prepare
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError

app = typer.Typer()
app.command()(prepare)
app.command()(inspect)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    assert isinstance(result.exception, UserError)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_prepare_a_folder_and_inspect_it(tmp_path: Path) -> None:
    image_folder(tmp_path / "source", {"mel": 10, "nev": 20})
    out = tmp_path / "data"
    result = call("prepare", tmp_path / "source", "--out", out, "--modality", "dermoscopy", "--classes", "nev, mel")
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    dataset = Dataset(out)
    assert dataset.classes == ["nev", "mel"]
    assert (dataset.info.name, dataset.info.modality) == ("data", "dermoscopy")
    assert dataset.info.splits["test"].counts == {"nev": 4, "mel": 2}
    shown = call("inspect", out)
    assert shown.exit_code == 0
    assert all(text in shown.output for text in ("dermoscopy", "nev", dataset.info.digest, "checksums are right"))
    assert next(line for line in shown.output.splitlines() if "nev" in line).split()[-2:] != []


def test_inspect_names_damage(tmp_path: Path) -> None:
    image_folder(tmp_path / "source", {"mel": 4, "nev": 4})
    call("prepare", tmp_path / "source", "--out", tmp_path / "data")
    shard = tmp_path / "data" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    result = call("inspect", tmp_path / "data")
    assert result.exit_code != 0
    assert "train-000000.tar: sample " in error_of(result)


def test_prepare_a_manifest(tmp_path: Path) -> None:
    for patient in "abc":
        for number in range(2):
            save(tmp_path / "images" / f"{patient}{number}.png")
    rows = [f"{patient}{number}.png,{'mel' if number else 'nev'},{patient}" for patient in "abc" for number in range(2)]
    (tmp_path / "all.csv").write_text("\n".join(["path,label,patient", *rows]))
    options = ["--image-root", tmp_path / "images", "--val-fraction", 0, "--test-fraction", 0.34]
    result = call("prepare", tmp_path / "all.csv", "--format", "csv", "--out", tmp_path / "data", *options)
    assert result.exit_code == 0, result.output
    test = Dataset(tmp_path / "data").split("test")
    assert len(test) == 2
    assert len(set(test.patients)) == 1


def test_prepare_a_coop_split_of_mixed_modes_and_sizes(tmp_path: Path) -> None:
    modes = ["RGB", "L", "CMYK", "RGB"]
    split: dict[str, list[list[object]]] = {}
    for name, count in {"train": 16, "val": 4, "test": 8}.items():
        split[name] = []
        for number in range(count):
            file = save(
                tmp_path / "images" / name / f"{number}.jpg",
                drawn(f"{name}{number}", (40 + number, 50), modes[number % 4]),
            )
            label = number % 2
            split[name].append([f"{name}/{file.name}", label, ["normal lung", "pneumonia"][label]])
    (tmp_path / "split.json").write_text(json.dumps(split))
    options = [
        "--format",
        "coop-split",
        "--image-root",
        tmp_path / "images",
        "--out",
        tmp_path / "data",
        "--workers",
        1,
    ]
    result = call("prepare", tmp_path / "split.json", *options)
    assert result.exit_code == 0, result.output
    dataset = Dataset(tmp_path / "data")
    assert dataset.classes == ["normal lung", "pneumonia"]
    assert [len(dataset.split(name)) for name in ("train", "val", "test")] == [16, 4, 8]
    assert dataset.split("train").image(0).mode == "RGB"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "mel"], "'nev' is no class"),
        (["--classes", "mel,nev,bcc"], "class 'bcc' has no training image"),
        (["--test-fraction", "1.5"], "fractions"),
        (["--image-root", "x"], "--image-root"),
        (["--classes", "mel,mel"], "'mel' is there twice"),
        (["--classes", ""], "no class"),
        (["--classes", "mel", "--classes-file", "x"], "give one of them"),
        (["--classes-file", "/nowhere"], "/nowhere: cannot be read"),
        (["--test-fraction", "nan"], "fractions"),
        (["--val-fraction", "inf"], "fractions"),
        (["--name", "../x"], "the dataset's name is '../x'"),
        (["--name", ""], "the dataset's name is ''"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path: Path, options: list[str], message: str) -> None:
    image_folder(tmp_path / "source", {"mel": 2, "nev": 2})
    result = call("prepare", tmp_path / "source", "--out", tmp_path / "data", *options)
    assert message in error_of(result)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("options", [["--workers", "100000"], ["--shard-size", str(2**63)], ["--shard-size", "0"]])
def test_absurd_numbers_are_refused(tmp_path: Path, options: list[str]) -> None:
    result = call("prepare", tmp_path, "--out", tmp_path / "data", *options)
    assert result.exit_code == 2
    assert options[0] in result.output


@pytest.mark.parametrize("place", ["file/data", "/proc/data"])
def test_an_output_that_cannot_be_is_one_line(tmp_path: Path, place: str) -> None:
    image_folder(tmp_path / "source", {"mel": 2, "nev": 2})
    (tmp_path / "file").touch()
    assert "data: cannot be written" in error_of(call("prepare", tmp_path / "source", "--out", tmp_path / place))
    assert "exists; give --overwrite" in error_of(call("prepare", tmp_path / "source", "--out", tmp_path / "file"))
    overwriting = call("prepare", tmp_path / "source", "--out", tmp_path / "file", "--overwrite")
    assert "not a prepared dataset" in error_of(overwriting)


def test_a_link_to_a_dataset_is_kept_when_it_is_overwritten(tmp_path: Path) -> None:
    image_folder(tmp_path / "source", {"mel": 4, "nev": 4})
    command = ["prepare", tmp_path / "source", "--workers", "1"]
    assert call(*command, "--out", tmp_path / "disk" / "real").exit_code == 0
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "real")
    before = (tmp_path / "disk" / "real" / "dataset.json").stat().st_ino
    assert call(*command, "--out", tmp_path / "data", "--overwrite").exit_code == 0
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "disk" / "real" / "dataset.json").stat().st_ino != before


def test_a_dataset_as_published_with_leaks(tmp_path: Path) -> None:
    """Byte-identical images within a split and across train and val, as benchmarks have them."""
    root = image_folder(
        tmp_path / "source", {"train/mel": 6, "train/nev": 6, "val/mel": 2, "val/nev": 2, "test/mel": 2}
    )
    for number, place in enumerate(("train/mel/copy.jpg", "val/mel/copy.jpg", "val/nev/copy.jpg")):
        (root / place).write_bytes((root / f"train/mel/00{number}.jpg").read_bytes())
    command = ["prepare", root, "--out", tmp_path / "data", "--workers", "1"]
    text = error_of(call(*command))
    assert "3 groups of identical images (2 across splits, 1 under several classes) and 0 patients" in text
    assert f"{tmp_path}/data.leaks.csv lists them all" in text
    assert (tmp_path / "data.leaks.csv").read_text().count("identical images") == 6
    assert not (tmp_path / "data").exists()
    kept = call(*command, "--leaks", "keep")
    assert kept.exit_code == 0, kept.exception
    assert "note: 3 groups of identical images" in kept.output
    digest = Dataset(tmp_path / "data").info.digest
    assert call(*command, "--leaks", "drop-train", "--overwrite").exit_code == 0
    dataset = Dataset(tmp_path / "data")
    assert dataset.info.digest != digest
    assert [len(dataset.split(split)) for split in ("train", "val", "test")] == [11, 6, 2]
    assert "drop-train" in (tmp_path / "data" / "dataset.json").read_text()
    assert call("inspect", tmp_path / "data").exit_code == 0


def test_classes_with_commas(tmp_path: Path) -> None:
    image_folder(tmp_path / "source", {"nevus, atypical": 4, "melanoma": 4})
    command = ["prepare", tmp_path / "source", "--workers", "1"]
    assert call(*command, "--out", tmp_path / "a", "--classes", 'melanoma,"nevus, atypical"').exit_code == 0
    (tmp_path / "classes.txt").write_text("melanoma\nnevus, atypical\n", encoding="utf-8-sig")
    assert call(*command, "--out", tmp_path / "b", "--classes-file", tmp_path / "classes.txt").exit_code == 0
    first, second = (Dataset(tmp_path / name).info for name in "ab")
    assert first.classes == ["melanoma", "nevus, atypical"]
    assert first.digest == second.digest


def test_skip_and_overwrite(tmp_path: Path) -> None:
    image_folder(tmp_path / "source", {"mel": 4, "nev": 4})
    (tmp_path / "source" / "mel" / "000.jpg").write_bytes(b"nothing")
    command = ["prepare", tmp_path / "source", "--out", tmp_path / "data", "--workers", "1"]
    assert "mel/000.jpg: is not an image" in error_of(call(*command))
    result = call(*command, "--on-error", "skip")
    assert "skipped mel/000" in result.output
    assert "exists" in error_of(call(*command, "--on-error", "skip"))
    assert call(*command, "--on-error", "skip", "--overwrite").exit_code == 0
