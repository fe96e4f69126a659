"""The verbs `prepare` and `inspect`, as a user calls them."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from harness.data.cli import inspect, prepare
from harness.data.reader import Dataset
from harness.errors import UserError
from tests.data.drawn_images import drawn, image_folder, save

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
    ],
)
def test_what_a_user_gets_wrong(tmp_path: Path, options: list[str], message: str) -> None:
    image_folder(tmp_path / "source", {"mel": 2, "nev": 2})
    result = call("prepare", tmp_path / "source", "--out", tmp_path / "data", *options)
    assert message in error_of(result)
    assert not (tmp_path / "data").exists()


def test_skip_and_overwrite(tmp_path: Path) -> None:
    image_folder(tmp_path / "source", {"mel": 4, "nev": 4})
    (tmp_path / "source" / "mel" / "000.jpg").write_bytes(b"nothing")
    command = ["prepare", tmp_path / "source", "--out", tmp_path / "data", "--workers", "1"]
    assert "mel/000.jpg: is not an image" in error_of(call(*command))
    result = call(*command, "--on-error", "skip")
    assert "skipped mel/000" in result.output
    assert "exists" in error_of(call(*command, "--on-error", "skip"))
    assert call(*command, "--on-error", "skip", "--overwrite").exit_code == 0
