"""Columns of metadata and grades: from a manifest or a shard's JSON to the index, and to whoever reads the samples."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.data.drawn_images import drawn, save
from tests.data.external_shards import png, write
from vipbench.harness.cli import app
from vipbench.harness.data.external import index_shards
from vipbench.harness.data.index import SCHEMA, index_shard
from vipbench.harness.data.members import Reading
from vipbench.harness.data.names import MAX_METADATA, RESERVED
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.shards import verify
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.predict import COLUMNS, PATIENT


def prepare(folder: Path, *options: str) -> str:
    """Run `vipbench prepare` on a manifest of six images, some of sex or age unknown; returns its error, or ""."""
    lines = ["path,label,patient,sex,age,note"]
    for number in range(6):
        save(folder / f"{number}.png", drawn(f"{number}"))
        sex, age = ("", "m", "f")[number % 3], "" if number == 1 else 40 + number
        lines.append(f"{number}.png,{'mild' if number % 2 else 'none'},x{number},{sex},{age},secret")
    (folder / "all.csv").write_text("\n".join(lines))
    command = ["prepare", str(folder / "all.csv"), "--format", "csv", "--out", str(folder / "data")]
    result = CliRunner().invoke(app, [*command, "--val-fraction", "0", "--test-fraction", "0", *options])
    return str(result.exception or "")


def test_columns_that_are_named_travel_and_others_do_not(tmp_path: Path) -> None:
    assert not prepare(tmp_path, "--metadata", "sex,age")
    samples = Dataset(tmp_path / "data").split("train")
    order = [int(key) for key in samples.keys]
    assert samples.groups["sex"] == [(None, "m", "f")[number % 3] for number in order]
    assert samples.groups["age"] == [None if number == 1 else str(40 + number) for number in order]
    assert list(samples.groups) == ["patient", "sex", "age"]
    part = samples.select([3, 0])
    assert part.groups["age"] == [samples.groups["age"][3], samples.groups["age"][0]]
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "data").iterdir())
    verify(tmp_path / "data")


def test_metadata_is_no_part_of_the_content(tmp_path: Path) -> None:
    for name, options in (("with", ["--metadata", "sex"]), ("without", [])):
        (tmp_path / name).mkdir()
        assert not prepare(tmp_path / name, *options)
    infos = [json.loads((tmp_path / name / "data" / "dataset.json").read_text()) for name in ("with", "without")]
    assert infos[0]["digest"] == infos[1]["digest"] and "ordinal" not in infos[0]
    table = pq.read_table(tmp_path / "without" / "data" / "train-000000.index.parquet")
    assert table.schema.names == SCHEMA.names


def test_an_index_that_gives_other_metadata_than_its_shard_is_refused(tmp_path: Path) -> None:
    assert not prepare(tmp_path, "--metadata", "sex")
    path = tmp_path / "data" / "train-000000.index.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(7, "sex", pa.array(["f"] * 6)), path)
    with pytest.raises(UserError, match="has sex 'f', but the shard has"):
        verify(tmp_path / "data")
    for name in ("logits", "a b", "x" * 65, "1"):
        pq.write_table(table.rename_columns([*SCHEMA.names, name]), path)
        with pytest.raises(UserError, match="cannot be a metadata column"):
            Dataset(tmp_path / "data")
    for number in range(MAX_METADATA):
        table = table.append_column(f"more{number}", pa.array(["f"] * 6))
    pq.write_table(table, path)
    with pytest.raises(UserError, match=r"index\.parquet: 101 metadata columns; there may be 100"):
        Dataset(tmp_path / "data")


@pytest.mark.parametrize("metadata", [{"offset": "1"}, {"sex": 3}, ["sex"], "sex"])
def test_a_shard_with_metadata_that_cannot_be_is_refused(metadata: object, tmp_path: Path) -> None:
    member = json.dumps({"label": 0, "class": "x", "metadata": metadata}).encode()
    shard = write(tmp_path / "train-000000.tar", {"a": {"png": png("a"), "json": member}})
    with pytest.raises(
        UserError, match=r"train-000000\.tar: (metadata of .* cannot be a metadata column|not a whole shard)"
    ):
        index_shard(shard)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metadata", "sexx"], "no column 'sexx'; did you mean"),
        (["--metadata", "sex,sex"], "'sex' cannot be a metadata column"),
        (
            ["--metadata", ",".join(f"a{number}" for number in range(101))],
            "--metadata: 101 metadata columns; there may be",
        ),
        (["--metadata", "patient"], "'patient' cannot be a metadata column"),
        (["--ordinal"], "--ordinal: give the grades"),
    ],
)
def test_wrong_columns_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in prepare(tmp_path, *options)


def test_a_folder_of_images_has_no_columns(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a" / "1.png")
    command = ["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--metadata", "sex"]
    result = CliRunner().invoke(app, command)
    assert "--format folder has no columns" in str(result.exception)


def test_grades_are_declared_in_the_description(tmp_path: Path) -> None:
    assert not prepare(tmp_path, "--ordinal", "--classes", "none,mild")
    dataset = Dataset(tmp_path / "data")
    assert dataset.info.ordinal and dataset.classes == ["none", "mild"]


def test_keys_of_a_json_become_columns(tmp_path: Path) -> None:
    metas: list[dict[str, object]] = [
        {"label": "x", "meta": {"sex": "f", "age": 40}},
        {"label": "y", "meta": {"sex": None}},
        {"label": "y"},
    ]
    members = {f"{n}": {"png": png(f"{n}"), "json": json.dumps(meta).encode()} for n, meta in enumerate(metas)}
    write(tmp_path / "test.tar", members)
    index_shards({"test": [str(tmp_path / "test.tar")]}, tmp_path, Reading(metadata=("meta.sex", "meta.age")))
    samples = Dataset(tmp_path).split("test")
    assert samples.groups == {"meta.sex": ["f", None, None], "meta.age": ["40", None, None]}
    with pytest.raises(UserError, match=r"meta is .*; metadata is text or a number"):
        index_shards({"test": [str(tmp_path / "test.tar")]}, tmp_path / "out", Reading(metadata=("meta",)))


def test_no_column_of_ours_may_be_metadata() -> None:
    assert {*SCHEMA.names, *COLUMNS, PATIENT} == set(RESERVED)
