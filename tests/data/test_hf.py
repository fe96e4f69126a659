"""Datasets of the library `datasets` on disk: Parquet and Arrow with its features, written here with pyarrow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.data.drawn_images import drawn
from tests.data.external_shards import png
from vipbench.harness.cli import app
from vipbench.harness.data.importers import hf
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError

FEATURES: dict[str, Any] = {
    "image": {"_type": "Image"},
    "label": {"names": ["nevus", "melanoma"], "_type": "ClassLabel"},
    "sex": {"dtype": "string", "_type": "Value"},
}


def table(names: list[str], labels: list[Any], features: dict[str, Any] | None = None, **columns: Any) -> pa.Table:
    """Rows of drawn images as the library writes them, with its features in the schema."""
    images = [{"bytes": png(name), "path": f"{name}.png"} for name in names]
    made = pa.table({"image": images, "label": labels, **columns})
    info = json.dumps({"info": {"features": FEATURES if features is None else features}})
    return made.replace_schema_metadata({"huggingface": info})


def write_arrow(path: Path, rows: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)


def write_parquet(path: Path, rows: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path)


@pytest.mark.parametrize("layout", ["hub", "converted", "saved"])
def test_the_three_layouts_give_images_classes_and_splits(layout: str, tmp_path: Path) -> None:
    names = {"train": ["a", "b", "c", "d"], "test": ["e", "f"]}
    for split, own in names.items():
        rows = table(own, [number % 2 for number in range(len(own))], sex=["f", None] * (len(own) // 2))
        if layout == "hub":
            write_parquet(tmp_path / "in" / "data" / f"{split}-00000-of-00001-abc.parquet", rows)
        elif layout == "converted":
            write_parquet(tmp_path / "in" / "default" / split / "0000.parquet", rows)
        else:
            write_arrow(tmp_path / "in" / split / "data-00000-of-00001.arrow", rows)
            write_arrow(tmp_path / "in" / split / "cache-123.arrow", rows)
    command = ["prepare", str(tmp_path / "in"), "--format", "hf", "--out", str(tmp_path / "data"), "--metadata", "sex"]
    result = CliRunner().invoke(app, [*command, "--val-fraction", "0", "--workers", "1"])
    assert result.exit_code == 0, result.exception
    dataset = Dataset(tmp_path / "data")
    assert dataset.classes == ["nevus", "melanoma"]
    samples = dataset.split("train")
    assert samples.labels.tolist() == [0, 1, 0, 1]
    assert samples.groups["sex"] == ["f", None, "f", None]
    np.testing.assert_array_equal(samples.pixels(2), np.asarray(drawn("c").convert("RGB")))
    assert len(dataset.split("test")) == 2


def test_names_as_labels_and_a_label_column_of_another_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", table(["a", "b"], ["x", " y "], features={}))
    source = hf.read(tmp_path)
    assert source.classes == ["x", "y"] and [record.split for record in source.records] == ["train", "train"]
    rows = table(["a", "b"], [0, 1]).rename_columns(["picture", "dx"])
    kinds = {"picture": {"_type": "Image"}, "dx": FEATURES["label"], "site": {"names": ["arm"], "_type": "ClassLabel"}}
    info = {"huggingface": json.dumps({"info": {"features": kinds}})}
    write_parquet(
        tmp_path / "train.parquet", rows.append_column("site", pa.array([0, 0])).replace_schema_metadata(info)
    )
    with pytest.raises(UserError, match="several columns of labels among dx, site; name one with --label-column"):
        hf.read(tmp_path)
    assert hf.read(tmp_path, label_column="dx").classes == ["nevus", "melanoma"]
    assert hf.read(tmp_path, ["melanoma", "nevus"], label_column="dx").records[0].label == 1


def test_what_is_no_single_label_classification_of_embedded_images(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"

    def refused(rows: pa.Table, message: str, **options: Any) -> None:
        write_parquet(file, rows)
        with pytest.raises(UserError, match=message):
            list(hf.read(tmp_path, **options).read_images())

    refused(table(["a"], [[0, 1]]), r"'label' is a list: several labels of one image \(multi-label\)")
    refused(table(["a", "b"], [0, -1]), r"row 2: label is -1, which is none of 2 classes \(-1: unlabelled\)")
    refused(table(["a"], [None]), r"row 1: label is 'None'; it should be a class's name or number")
    refused(table(["a", "b"], ["x", "x|y"], features={}), r"row 2: 'x\|y' names 2 classes")
    refused(table(["a"], [0]).drop_columns(["image"]), "no column of images among label")
    refused(table(["a"], [0]), "no column 'age'", metadata=["age"])
    refused(table(["a"], ["x"], features={}), "'x' is no class", classes=["y", "z"])
    away = pa.table({"image": [{"bytes": None, "path": "a.png"}], "label": ["x"]})
    refused(
        away.cast(pa.schema([("image", table(["a"], ["x"]).schema.field("image").type), ("label", pa.string())])),
        "holds no image's bytes",
    )
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"train\.parquet: cannot be read"):
        hf.read(tmp_path)
    write_arrow(tmp_path / "other" / "train.arrow", table(["a"], [0]))
    (tmp_path / "other" / "train.arrow").write_bytes((tmp_path / "other" / "train.arrow").read_bytes()[:90])
    with pytest.raises(UserError, match=r"train\.arrow: cannot be read"):
        hf.read(tmp_path / "other")


def test_unclear_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.parquet or \.arrow files"):
        hf.read(tmp_path)
    for place in ("one/train-0.parquet", "two/train-0.parquet"):
        write_parquet(tmp_path / place, table(["a"], [0]))
    with pytest.raises(UserError, match="train is in several folders"):
        hf.read(tmp_path)
    write_parquet(tmp_path / "one" / "extra.parquet", table(["b"], [0]))
    with pytest.raises(UserError, match=r"extra\.parquet: of no split, but other files are"):
        hf.read(tmp_path / "one")
