"""Listing images and labels: three formats, and one clear line for what is wrong in each."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.data.drawn_images import image_folder, save
from vipbench.harness.data import importers
from vipbench.harness.data.importers import coop_split, csv, folder
from vipbench.harness.data.importers.base import Record, Source, sample_key
from vipbench.harness.data.names import renames
from vipbench.harness.errors import UserError


def listed(source: Source) -> set[tuple[str, str, str | None]]:
    return {(record.key, source.classes[record.label], record.split) for record in source.records}


def test_folder_with_splits_and_nested_folders(tmp_path: Path) -> None:
    image_folder(tmp_path, {"train/nev": 1, "train/mel/clinic a": 1, "validation/nev": 1, "test/mel": 1})
    source = folder.read(tmp_path)
    assert source.classes == ["mel", "nev"]
    assert listed(source) == {
        ("train/nev/000", "nev", "train"),
        ("train/mel/clinic a/000", "mel", "train"),
        ("validation/nev/000", "nev", "val"),
        ("test/mel/000", "mel", "test"),
    }


def test_folder_without_splits_and_classes_in_a_given_order(tmp_path: Path) -> None:
    source = folder.read(image_folder(tmp_path, {"mel": 1, "nev": 2}), ["nev", "mel"])
    assert [record.split for record in source.records] == [None] * 3
    assert listed(source) == {("mel/000", "mel", None), ("nev/000", "nev", None), ("nev/001", "nev", None)}
    assert {source.classes[record.label] for record in source.records if record.label == 0} == {"nev"}


def test_hidden_files_and_others_are_ignored_and_counted(tmp_path: Path) -> None:
    image_folder(tmp_path, {"mel": 1, "nev": 1, "nev/.cache": 1, ".git/mel": 1})
    (tmp_path / "mel" / ".DS_Store").touch()
    (tmp_path / "mel" / "notes.txt").touch()
    (tmp_path / "README.txt").touch()
    source = folder.read(tmp_path)
    assert len(source.records) == 2
    assert source.notes == ["2 hidden files or files that are no images were ignored: 1 .txt, 1 hidden"]


def test_folder_of_an_unknown_class_is_named_with_the_nearest(tmp_path: Path) -> None:
    image_folder(tmp_path, {"melanoma": 1, "nevos": 1})
    with pytest.raises(UserError, match=r"nevos/000.jpg: 'nevos' is no class; did you mean 'nevus'"):
        folder.read(tmp_path, ["melanoma", "nevus"])


def test_zero_images(tmp_path: Path) -> None:
    (tmp_path / "mel").mkdir()
    with pytest.raises(UserError, match="no images found"):
        folder.read(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        folder.read(tmp_path / "nowhere")


def test_folders_that_cannot_be_understood(tmp_path: Path) -> None:
    image_folder(tmp_path / "mixed", {"train/mel": 1, "nev": 1})
    with pytest.raises(UserError, match=r"splits and also \['nev'\]"):
        folder.read(tmp_path / "mixed")
    image_folder(tmp_path / "twice", {"val/mel": 1, "valid/mel": 1})
    with pytest.raises(UserError, match="one split twice"):
        folder.read(tmp_path / "twice")
    image_folder(tmp_path / "inside", {"mel/train": 1, "mel/test": 1})
    with pytest.raises(UserError, match="a split inside mel/"):
        folder.read(tmp_path / "inside")
    image_folder(tmp_path / "loose", {"mel": 1})
    save(tmp_path / "loose" / "x.png")
    with pytest.raises(UserError, match=r"x\.png: an image outside the class folders"):
        folder.read(tmp_path / "loose")


@pytest.mark.parametrize("names", [("a.jpg", "a.png"), ("a.b.jpg", "a_b.jpg")])
def test_duplicate_names_are_both_named(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        save(tmp_path / "mel" / name)
    with pytest.raises(UserError) as caught:
        folder.read(tmp_path)
    assert all(name in str(caught.value) for name in names)


def test_classes_given_twice_or_empty(tmp_path: Path) -> None:
    image_folder(tmp_path, {"mel": 1})
    for classes in (["mel", "mel"], ["mel", " "]):
        with pytest.raises(UserError, match="distinct"):
            folder.read(tmp_path, classes)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_manifest(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame(
        {
            "path": ["x/a.v1.jpg", "b.jpg", "c.jpg"],
            "label": ["nev", "mel", "mel"],
            "split": ["train", "Valid", "test"],
            "patient": [12, None, 7],
            "age": [1, 2, 3],
        }
    ).astype({"patient": "Int64"})
    file = tmp_path / f"all{suffix}"
    table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
    source = csv.read(file, image_root=tmp_path / "images")
    assert source.classes == ["mel", "nev"]
    assert source.records == [
        Record("x/a_v1", tmp_path / "images/x/a.v1.jpg", 1, "train", "12"),
        Record("b", tmp_path / "images/b.jpg", 0, "val", None),
        Record("c", tmp_path / "images/c.jpg", 0, "test", "7"),
    ]
    assert csv.read(file).records[1].path == tmp_path / "b.jpg"


MANIFEST_ERRORS = {
    "no label column": ("path,class\na.jpg,mel\n", "no column 'label'"),
    "unknown split": ("path,label,split\na.jpg,mel,holdout\n", "row 2: 'holdout' is no split"),
    "some without split": ("path,label,split\na.jpg,mel,train\nb.jpg,mel,\n", "row 3: no split"),
    "empty label": ("path,label\na.jpg,mel\nb.jpg,\n", "row 3: the label is empty"),
    "empty path": ("path,label\n,mel\n", "row 2: the path is empty"),
    "outside": ("path,label\n../a.jpg,mel\n", "row 2: '../a.jpg' must be a path relative to the image root"),
    "absolute": ("path,label\n/a.jpg,mel\n", "relative to the image root"),
    "listed twice": ("path,label,split\na.jpg,mel,train\na.jpg,mel,test\n", "'a'.*listed once"),
    "no rows": ("path,label\n", "no images"),
    "nothing": ("", "cannot be read as a table"),
    "more cells": ("path,label\na.jpg,mel,train\n", "row 2: 3 cells under 2 columns"),
    "a comma in a name": ("path,label\na.jpg,mel\nb.jpg,nevus, atypical\n", "row 3: 3 cells under 2 columns"),
    "a column twice": ("path,label,label\na.jpg,mel,nev\n", "the column 'label' is there twice"),
    "no label": ("path,label\na.jpg\n", "row 2: the label is empty"),
    "a missing number": ("path,label\na.jpg,nan\n", "row 2: the label is 'nan', as a missing number is written"),
    "infinite": ("path,label\na.jpg,-Inf\n", "row 2: the label is '-Inf'"),
    "open quotes": ('path,label\n"a.jpg,mel\n', "cannot be read as a table"),
    "NUL": ("path,label\na\0.jpg,mel\nb.jpg,m\0el\n", "printable characters|cannot be read"),
    "several labels": (
        "path,label\na.jpg,mel\nb.jpg,edema|effusion\n",
        "row 3: 'edema|effusion' names 2 .*by '|'.*multi-label",
    ),
    "labels that are classes": (
        "path,label\na.jpg,x\nb.jpg,y\nc.jpg,x; y\n",
        "row 4: 'x; y' names 2 classes, separated by ';'",
    ),
    "a column per class": (
        "path,edema,effusion,age\na.jpg,1,0,40\nb.jpg,,1,50\n",
        r"no column 'label', but 2 columns of 0 and 1 \(edema, effusion\): several labels of one image \(multi-label\)",
    ),
    "a huge cell": ("path,label\na.jpg," + "x" * 200_000 + "\n", "cannot be read as a table: field larger"),
}


@pytest.mark.parametrize(("text", "message"), MANIFEST_ERRORS.values(), ids=MANIFEST_ERRORS.keys())
def test_manifest_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        csv.read(tmp_path / "all.csv")


def test_manifest_of_a_spreadsheet(tmp_path: Path) -> None:
    text = '\ufeffpath,label,split,patient\r\n"a.jpg"," nevus,  atypical ",train,7\r\n\r\nb.jpg,mel,test\r\n'
    (tmp_path / "all.csv").write_bytes(text.encode())
    source = csv.read(tmp_path / "all.csv")
    assert source.classes == ["mel", "nevus, atypical"]
    assert [(record.split, record.patient) for record in source.records] == [("train", "7"), ("test", None)]
    (tmp_path / "all.csv").write_text("path,label,patient\na.jpg,mel,1\n\nb.jpg,,2\n")
    with pytest.raises(UserError, match="row 4: the label is empty"):
        csv.read(tmp_path / "all.csv")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0], ["0", "1"]),
        ([1.0, 0.0], ["0", "1"]),
        (["a", "b"], ["a", "b"]),
        ([1.0, float("inf")], "row 2: label is inf; it should be text or a finite number"),
        ([1.0, float("nan")], "row 2: the label is empty"),
        ([["a"], ["b"]], "row 1: label is a list; it should be text or a number"),
        ([b"a", b"b"], "row 1: label is a bytes"),
        ([pd.Timestamp(0), pd.Timestamp(1)], "row 1: label is a Timestamp|row 1: label is a datetime"),
    ],
)
def test_manifest_cells_of_other_types(tmp_path: Path, labels: list[Any], expected: list[str] | str) -> None:
    pd.DataFrame({"path": ["a.jpg", "b.jpg"], "label": labels}).to_parquet(tmp_path / "all.parquet")
    if isinstance(expected, list):
        assert csv.read(tmp_path / "all.parquet").classes == expected
    else:
        with pytest.raises(UserError, match=expected):
            csv.read(tmp_path / "all.parquet")


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    rows = [f"{number}.jpg,{label}" for number, label in enumerate([10, 2, 0, 1, -1, 0.5])]
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]))
    assert csv.read(tmp_path / "all.csv").classes == ["-1", "0", "0.5", "1", "2", "10"]
    assert folder.read(image_folder(tmp_path / "in", {"10": 1, "2": 1})).classes == ["2", "10"]
    assert folder.read(image_folder(tmp_path / "text", {"10": 1, "2": 1, "other": 1})).classes == ["10", "2", "other"]


def test_columns_of_0_and_1_in_parquet_are_several_labels(tmp_path: Path) -> None:
    table = pd.DataFrame({"path": ["a.jpg", "b.jpg"], "edema": [1, 0], "mass": [0.0, 1.0], "age": [0, 50]})
    table.to_parquet(tmp_path / "all.parquet")
    with pytest.raises(UserError, match=r"2 columns of 0 and 1 \(edema, mass\).*multi-label"):
        csv.read(tmp_path / "all.parquet")


def test_a_name_with_a_separator_may_be_a_class_where_it_is_listed_or_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("path,label\na.jpg,x\nb.jpg,y\nc.jpg,x|y\nd.jpg,n/a\n")
    assert csv.read(tmp_path / "all.csv", ["x", "y", "x|y", "n/a"]).classes[2] == "x|y"
    (tmp_path / "all.csv").write_text('path,label\na.jpg,"nevus, atypical"\nb.jpg,nevus\n')
    assert csv.read(tmp_path / "all.csv").classes == ["nevus", "nevus, atypical"]


def test_files_that_are_left_out_are_named_by_suffix(tmp_path: Path) -> None:
    image_folder(tmp_path / "some", {"mel": 1})
    for name in ("a.dcm", "b.DCM", "1.2.840.1", "c.txt"):
        (tmp_path / "some" / "mel" / name).write_bytes(b"")
    (note,) = folder.read(tmp_path / "some").notes
    assert note == "4 hidden files or files that are no images were ignored: 2 .dcm, 1 .txt, 1 without suffix"
    (tmp_path / "none" / "mel").mkdir(parents=True)
    (tmp_path / "none" / "mel" / "a.dcm").write_bytes(b"")
    with pytest.raises(UserError, match=r"no images found among its files: 1 \.dcm \(--format dicom reads"):
        folder.read(tmp_path / "none")


def test_classes_get_other_names_and_may_become_one(tmp_path: Path) -> None:
    source = folder.read(image_folder(tmp_path, {"bacterial": 2, "normal lung": 1, "viral": 1}))
    renamed = source.rename({"normal lung": "normal", "viral": "pneumonia", "bacterial": "pneumonia"})
    assert renamed.classes == ["pneumonia", "normal"]
    assert {(record.key, renamed.classes[record.label]) for record in renamed.records} == {
        ("bacterial/000", "pneumonia"),
        ("bacterial/001", "pneumonia"),
        ("viral/000", "pneumonia"),
        ("normal lung/000", "normal"),
    }
    assert "class 'viral' of the source is called 'pneumonia'" in renamed.notes
    with pytest.raises(UserError, match="the source has no class 'viral lung'; did you mean"):
        source.rename({"viral lung": "x"})


@pytest.mark.parametrize("option", ["a", "a=", "=b", "a=b=c"])
def test_renaming_needs_an_old_and_a_new_name(option: str) -> None:
    with pytest.raises(UserError, match="--rename"):
        renames([option])


def test_patients_are_the_same_with_and_without_gaps(tmp_path: Path) -> None:
    pd.DataFrame({"path": ["a.jpg", "b.jpg"], "label": ["x", "y"], "patient": [12.0, None]}).to_parquet(
        tmp_path / "all.parquet"
    )
    assert [record.patient for record in csv.read(tmp_path / "all.parquet").records] == ["12", None]


def test_links_in_folders_are_followed_once_and_never_in_a_circle(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "root", {"a": 6, "b": 6})
    image_folder(tmp_path / "store", {"more": 2, "more/deep": 1})
    image_folder(root / ".hidden", {"x": 1})
    (root / "a" / "all").symlink_to(".")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "b too").symlink_to("../b")
    (root / "a" / "copy.jpg").symlink_to("000.jpg")
    (root / "a" / "0.jpg").symlink_to("001.jpg")
    (root / "a" / "loop").symlink_to("loop")
    (root / "a" / "store").symlink_to(tmp_path / "store")
    (root / "a" / "store again").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "more" / "back").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "more" / "root").symlink_to(root)
    (root / "b" / "annexed.jpg").symlink_to("../.hidden/x/000.jpg")
    (root / "b" / "hidden").symlink_to("../.hidden")
    source = folder.read(root)
    keys = sorted(record.key for record in source.records)
    assert [key for key in keys if "/store" not in key] == [f"{name}/00{n}" for name in "ab" for n in range(6)] + [
        "b/hidden/x/000"
    ]
    stored = [key.partition("/store")[2].removeprefix(" again") for key in keys if "/store" in key]
    assert stored == ["/more/000", "/more/001", "/more/deep/000"]
    assert any("links to files or folders that are listed elsewhere were left out" in note for note in source.notes)


def test_folders_that_file_managers_leave_are_no_classes(tmp_path: Path) -> None:
    image_folder(tmp_path, {"mel": 1, "__MACOSX/mel": 1, "@eaDir": 1})
    (tmp_path / "mel" / "._000.jpg").write_bytes(b"AppleDouble")
    (tmp_path / "mel" / "Thumbs.db").touch()
    source = folder.read(tmp_path)
    assert source.classes == ["mel"]
    assert len(source.records) == 1
    assert source.notes == ["2 hidden files or files that are no images were ignored: 2 hidden"]


def test_class_names_follow_one_rule_in_every_format(tmp_path: Path) -> None:
    save(tmp_path / "images" / "Me\u0301l  x" / "a.jpg")
    (tmp_path / "all.csv").write_text("path,label\na.jpg,Me\u0301l  x\n")
    split = write_split(tmp_path, train=[["a.jpg", 0, " Me\u0301l  x"]])
    pd.DataFrame({"path": ["a.jpg"], "label": ["Me\u0301l\u00a0x"]}).to_parquet(tmp_path / "all.parquet")
    for source in (
        folder.read(tmp_path / "images"),
        csv.read(tmp_path / "all.csv"),
        csv.read(tmp_path / "all.parquet"),
        coop_split.read(split),
    ):
        assert source.classes == ["M\u00e9l x"]
    for bad in ("a\u200bb", "x" * 300):
        with pytest.raises(UserError, match="printable"):
            coop_split.read(write_split(tmp_path, train=[["a.jpg", 0, bad]]))


def test_manifest_label_that_is_no_class_and_broken_parquet(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("path,label\na.jpg,mel\nb.jpg,nvus\n")
    with pytest.raises(UserError, match=r"all\.csv, row 3: 'nvus' is no class; did you mean 'nevus'"):
        csv.read(tmp_path / "all.csv", classes=["mel", "nevus"])
    (tmp_path / "all.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read as a table"):
        csv.read(tmp_path / "all.parquet")


def write_split(tmp_path: Path, **splits: object) -> Path:
    file = tmp_path / "split.json"
    file.write_text(json.dumps(splits))
    return file


def test_coop_split(tmp_path: Path) -> None:
    file = write_split(
        tmp_path, train=[["b/1.jpg", 1, "nev"], ["a/1.jpg", 0, "zos"]], val=[], test=[["b/2.jpg", 1, "nev"]]
    )
    source = coop_split.read(file, image_root=tmp_path / "images")
    assert source.classes == ["zos", "nev"]  # by label, not by name
    assert source.records[0] == Record("b/1", tmp_path / "images/b/1.jpg", 1, "train")
    assert listed(source) == {("b/1", "nev", "train"), ("a/1", "zos", "train"), ("b/2", "nev", "test")}
    assert [record.label for record in coop_split.read(file, classes=["nev", "zos"]).records] == [0, 1, 0]


COOP_ERRORS = {
    "two names": ([["1.jpg", 0, "a"], ["2.jpg", 0, "b"]], "entry 1: label 0 is 'b' here and 'a' elsewhere"),
    "one name twice": ([["1.jpg", 0, "a"], ["2.jpg", 1, "a"]], "distinct"),
    "gap": ([["1.jpg", 0, "a"], ["2.jpg", 2, "b"]], r"labels are \[0, 2\]"),
    "negative": ([["1.jpg", -1, "a"], ["2.jpg", 0, "b"]], r"labels are \[-1, 0\]"),
    "short entry": ([["1.jpg", 0]], r"not a CoOp split: train\[0\]"),
    "label is no number": ([["1.jpg", "x", "a"]], r"train\[0\]\[1\]"),
    "label is a decimal": ([["1.jpg", 0.0, "a"]], r"train\[0\]\[1\]"),
    "label is true": ([["1.jpg", True, "a"], ["2.jpg", 0, "b"]], r"train\[0\]\[1\]"),
    "huge label": ([["1.jpg", 10**300, "a"]], "must count 0, 1, ..."),
    "empty name": ([["1.jpg", 0, " "]], "printable"),
}


@pytest.mark.parametrize(("entries", "message"), COOP_ERRORS.values(), ids=COOP_ERRORS.keys())
def test_coop_split_errors(tmp_path: Path, entries: list[list[object]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        coop_split.read(write_split(tmp_path, train=entries))


def test_a_coop_split_of_several_labels_is_refused(tmp_path: Path) -> None:
    file = write_split(tmp_path, train=[["1.jpg", 0, "x"], ["2.jpg", 1, "x|y"]])
    with pytest.raises(UserError, match=r"label 1: 'x\|y' names 2 classes, separated by '\|'.*multi-label"):
        coop_split.read(file)
    assert coop_split.read(file, ["x", "x|y"]).classes == ["x", "x|y"]


def test_coop_split_that_is_no_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a CoOp split"):
        coop_split.read(write_split(tmp_path, training=[]))
    with pytest.raises(UserError, match="no such file"):
        coop_split.read(tmp_path / "none.json")
    with pytest.raises(UserError, match="'b' is no class"):
        coop_split.read(write_split(tmp_path, train=[["1.jpg", 0, "b"]]), classes=["aaaa"])


def test_sample_key() -> None:
    assert sample_key("./a.b/c.d.jpg", "here") == "a_b/c_d"
    with pytest.raises(UserError, match=r"here: .* is not valid UTF-8"):
        sample_key(os.fsdecode(b"caf\xe9.jpg"), "here")


def test_importers_are_found_by_their_files(tmp_path: Path) -> None:
    files = {path.stem for path in Path(importers.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert {format.replace("-", "_") for format in importers.formats()} == files
    assert importers.importer("coop-split") is coop_split.read
    with pytest.raises(UserError, match="--format: there is no importer 'coop_splits'; did you mean 'coop-split'"):
        importers.importer("coop_splits")
    for wrong in ("base", "../secret", ""):
        with pytest.raises(UserError, match="--format"):
            importers.importer(wrong)


def test_a_folder_has_its_images_inside(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--image-root: a folder source has its images inside"):
        folder.read(image_folder(tmp_path, {"mel": 1}), image_root=tmp_path)
