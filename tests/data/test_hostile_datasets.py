"""dataset.json and indexes that are damaged, edited or made to harm: one line each, before anything is read or written."""

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.drawn_images import source_of
from vipbench.harness.data import index
from vipbench.harness.data.describe import digest_tables
from vipbench.harness.data.digest import content_digest
from vipbench.harness.data.importers.base import Source
from vipbench.harness.data.index import SCHEMA, read_index
from vipbench.harness.data.info import DatasetInfo
from vipbench.harness.data.reader import Dataset, Samples, Shard
from vipbench.harness.data.shards import verify, write_dataset
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_json


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two splits, with patients."""
    folder = tmp_path_factory.mktemp("prepared")
    source = source_of(folder / "source", train=2, val=1, test=1)
    write_dataset(Source(source.classes, source.records), folder / "data", name="demo")
    return folder / "data"


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it that may be harmed."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def one_line(call: Callable[[], object], message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def put(content: dict[str, Any], place: str, value: Any) -> None:
    """Set a value at a place such as splits.train.shards.0.file; `...` removes it."""
    *path, last = place.split(".")
    part: Any = content
    for key in path:
        part = part[int(key)] if isinstance(part, list) else part[key]
    if value is ...:
        del part[last]
    else:
        part[int(last) if isinstance(part, list) else last] = value


SHARD = "splits.train.shards.0."
HOSTILE: list[tuple[str, Any]] = [
    ("name", ...),
    ("name", None),
    ("name", 7),
    ("name", ""),
    ("name", "../../../victim/a"),
    ("name", "/victim"),
    ("name", ".."),
    ("name", "x" * 5000),
    ("digest", "../../x"),
    ("digest", "A" * 64),
    ("digest", "0" * 64 + "\n"),
    ("format", "vipbench-dataset/9"),
    ("modality", 7),
    ("classes", []),
    ("classes", None),
    ("classes", "mel"),
    ("classes", ["mel", "mel"]),
    ("classes", ["mel", ""]),
    ("classes", ["mel", " nev"]),
    ("classes", ["mel", 1]),
    ("splits", {}),
    ("splits", []),
    ("splits.../x", {"counts": {}, "shards": []}),
    ("splits.train.counts", {"mel": 2}),
    ("splits.train.counts.mel", -1),
    ("splits.train.counts.mel", 10**30),
    ("splits.train.counts.mel", 2.0),
    ("splits.train.counts.mel", True),
    ("splits.train.counts.mel", 3),
    ("splits.train.shards", []),
    (SHARD + "file", "../../x.tar"),
    (SHARD + "file", "a\0b"),
    (SHARD + "file", "simplecache::file:///etc/passwd"),
    (SHARD + "file", ""),
    (SHARD + "file", "."),
    (SHARD + "index", "../../x"),
    (SHARD + "index", "/etc/passwd"),
    (SHARD + "index", ""),
    (SHARD + "sha256", "../../x"),
    (SHARD + "sha256", "0" * 63),
    (SHARD + "sha256", ...),
    (SHARD + "samples", 0),
    (SHARD + "samples", -4),
    (SHARD + "samples", 2**63),
    (SHARD + "samples", "4"),
    (SHARD + "samples", None),
    ("notes", "text"),
    ("leaks", {"policy": "keep"}),
]


@pytest.mark.parametrize(("place", "value"), HOSTILE, ids=lambda value: str(value)[:30])
def test_hostile_descriptions(folder: Path, place: str, value: Any) -> None:
    content = read_json(folder / "dataset.json")
    if place.startswith("splits.../"):
        content["splits"]["../x"] = value
    else:
        put(content, place, value)
    (folder / "dataset.json").write_text(json.dumps(content))
    one_line(lambda: DatasetInfo.load(folder), r"dataset.json: not a prepared dataset of this version")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{", b'{"name": ' + b"[" * 3000, b"\xff\xfe{}", b"NaN", b'{"name": 1e999}', b"\0" * 100],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_description(folder: Path, data: bytes) -> None:
    (folder / "dataset.json").write_bytes(data)
    one_line(lambda: Dataset(folder), "dataset.json: not a prepared dataset of this version")


def test_a_byte_order_mark_is_no_harm(folder: Path) -> None:
    (folder / "dataset.json").write_bytes(b"\xef\xbb\xbf" + (folder / "dataset.json").read_bytes())
    assert Dataset(folder).classes == ["mel", "nev"]


def test_a_description_elsewhere_names_no_local_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = read_json(folder / "dataset.json")
    content["splits"]["train"]["shards"][0] |= {"file": "/etc/passwd", "index": "train-000000.index.parquet"}
    monkeypatch.setattr("vipbench.harness.data.info.read_bytes", lambda path: json.dumps(content).encode())
    one_line(lambda: DatasetInfo.load("https://host/data"), "names the local file '/etc/passwd'")


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "classes renamed": lambda info: _rename(info, {"mel": "melanoma"}),
    "classes swapped": lambda info: info["classes"].reverse(),
    "another digest": lambda info: info.update(digest="0" * 64),
    "a split left out": lambda info: info["splits"].pop("val"),
    "splits renamed": lambda info: info["splits"].update(val=info["splits"]["test"], test=info["splits"]["val"]),
}


def _rename(info: dict[str, Any], names: dict[str, str]) -> None:
    info["classes"] = [names.get(name, name) for name in info["classes"]]
    for split in info["splits"].values():
        split["counts"] = {names.get(name, name): count for name, count in split["counts"].items()}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_description_that_was_edited_is_refused_on_load(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    info = read_json(folder / "dataset.json")
    edit(info)
    (folder / "dataset.json").write_text(json.dumps(info))
    one_line(lambda: Dataset(folder), "the digest is not that of its classes, labels and images")


def change(path: Path, **columns: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(path)
    for name, edit in columns.items():
        values = edit(table[name].to_pylist())
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, path)


INDEX_EDITS: dict[str, tuple[str, Callable[[list[Any]], list[Any]], str]] = {
    "labels shifted": ("label", lambda column: [1 - label for label in column], "the digest is not that"),
    "a key renamed": ("key", lambda column: ["other", *column[1:]], "the digest is not that"),
    "a key twice": ("key", lambda column: [column[1], *column[1:]], "two samples of train have one key"),
    "counts differ": ("label", lambda column: [0] * len(column), "counts of train are not those of its shards"),
    "negative label": ("label", lambda column: [-1, *column[1:]], "'label' holds -1; it should be 0 to 1"),
    "label of no class": ("label", lambda column: [2, *column[1:]], "'label' holds 2"),
    "huge label": ("label", lambda column: [2**40, *column[1:]], "not a Parquet file with an index"),
    "label as text": ("label", lambda column: ["x"] * len(column), "not a Parquet file with an index"),
    "label of NaN": ("label", lambda column: [float("nan")] * len(column), "not a Parquet file with an index"),
    "gap": ("label", lambda column: [None, *column[1:]], "'label' has gaps|not a Parquet file with an index"),
    "key gap": ("key", lambda column: [None, *column[1:]], "'key' has gaps|not a Parquet file with an index"),
    "empty key": ("key", lambda column: ["", *column[1:]], "'key' holds ''"),
    "negative offset": ("offset", lambda column: [-512, *column[1:]], "'offset' holds -512"),
    "huge size": ("size", lambda column: [2**62, *column[1:]], "'size' holds"),
    "no size": ("size", lambda column: [0, *column[1:]], "'size' holds 0"),
    "short checksum": ("sha256", lambda column: ["ab", *column[1:]], "'sha256' holds 'ab'"),
    "no hexadecimal": ("sha256", lambda column: ["g" * 64, *column[1:]], "'sha256' holds"),
    "another extension": ("extension", lambda column: ["exe", *column[1:]], "'extension' holds 'exe'"),
    "lists": ("key", lambda column: [[key] for key in column], "not a Parquet file with an index"),
}


@pytest.mark.parametrize(("column", "edit", "message"), INDEX_EDITS.values(), ids=INDEX_EDITS.keys())
def test_hostile_indexes(folder: Path, column: str, edit: Callable[[list[Any]], list[Any]], message: str) -> None:
    change(folder / "train-000000.index.parquet", **{column: edit})
    one_line(lambda: Dataset(folder), message)


def test_indexes_of_no_or_too_many_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "train-000000.index.parquet"
    table = pq.read_table(path)
    pq.write_table(table[:2], path)
    one_line(lambda: Dataset(folder), "train-000000.index.parquet: the index lists 2 samples, not 4")
    pq.write_table(table[:0], path)
    one_line(lambda: Dataset(folder), "lists 0 samples, not 4")
    pq.write_table(table, path)
    monkeypatch.setattr(index, "MAX_ROWS", 3)
    one_line(lambda: Dataset(folder), "has 4 rows; the index of a shard has at most 3")
    monkeypatch.undo()
    pq.write_table(table.append_column("more", pa.array([1] * 4)), path)
    one_line(lambda: Dataset(folder), "its columns are")
    path.unlink()
    path.mkdir()
    one_line(lambda: Dataset(folder), "cannot be read: it is not a file")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_shard_that_is_no_file_is_not_waited_for(folder: Path, kind: str) -> None:
    shard = folder / "train-000000.tar"
    shard.unlink()
    shard.mkdir() if kind == "folder" else os.mkfifo(shard)
    one_line(lambda: Dataset(folder).split("train").image_bytes(0), "train-000000.tar: cannot be read: ")
    one_line(lambda: verify(folder), "train-000000.tar: cannot be read: it is not a file")


INSPECTED: dict[str, tuple[dict[str, Callable[[list[Any]], list[Any]]], str]] = {
    "size": ({"size": lambda column: [column[0] + 1, *column[1:]]}, r"has size \d+, but the shard has \d+"),
    "extension": (
        {"extension": lambda column: ["png", *column[1:]]},
        r"has extension 'png', but its file is '.*\.jpg'",
    ),
    "patient": ({"patient": lambda column: ["p0009", *column[1:]]}, "has patient 'p0009', but the shard has None"),
    "label": ({"label": lambda column: [1 - label for label in column]}, r"has label \d, but the shard has \d"),
    "key": ({"key": lambda column: ["other", *column[1:]]}, "sample 'other' is no sample there"),
    "place": ({"offset": lambda column: [column[0] + 512, *column[1:]]}, "the index beside it describes other content"),
}


@pytest.mark.parametrize(("edits", "message"), INSPECTED.values(), ids=INSPECTED.keys())
def test_inspect_compares_the_index_with_the_shard(
    folder: Path, edits: dict[str, Callable[[list[Any]], list[Any]]], message: str
) -> None:
    change(folder / "train-000000.index.parquet", **edits)
    one_line(lambda: verify(folder), message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'{"label": 0', b'{"label":[]', "train-000000.tar: "),  # of as many bytes
        (b"mel/train000.json", b"mol/train000.json", r"train-000000.tar: sample 'm.l/train000' has no (image|label)"),
    ],
)
def test_inspect_tells_of_members_that_prepare_does_not_write(
    folder: Path, old: bytes, new: bytes, message: str
) -> None:
    """With checksums that are right."""
    shard = folder / "train-000000.tar"
    shard.chmod(0o644)
    content = bytearray(shard.read_bytes())
    place = content.index(old)
    content[place : place + len(new)] = new
    header = place // 512 * 512 if old.startswith(b"mel") else None
    if header is not None:  # the header's own checksum
        content[header + 148 : header + 156] = b" " * 8
        content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    shard.write_bytes(content)
    info = read_json(folder / "dataset.json")
    info["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(info))
    one_line(lambda: verify(folder), message)


def reference_digest(classes: list[str], rows: list[tuple[str, str, int, str]]) -> str:
    """The rule in its plainest form, by which datasets had their digests from the start."""
    lines = [json.dumps(classes), *(json.dumps(list(row)) for row in sorted(rows))]
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def test_the_digest_is_that_of_the_plain_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipbench.harness.data.digest.ROWS", 3)
    keys = ["b", "a", 'quote"', "back\\slash", "größe", "tab\t", "del\x7f", "z/1", "Z", "emoji \U0001f600"]
    rows = [("train", key, place % 3, f"{place:064x}") for place, key in enumerate(keys)]
    rows += [("test", "a", 0, "f" * 64)]
    tables = {
        split: [
            pa.Table.from_pylist(
                [
                    {
                        "key": key,
                        "label": label,
                        "patient": None,
                        "extension": "png",
                        "offset": 512,
                        "size": 1,
                        "sha256": sha,
                    }
                    for part, key, label, sha in rows
                    if part == split
                ],
                SCHEMA,
            )
        ]
        for split in ("train", "test")
    }
    assert digest_tables(["é", 'x"'], tables) == reference_digest(["é", 'x"'], rows)


def test_a_million_samples_are_digested_in_parts() -> None:
    count = 1_000_000
    numbers = np.arange(count)
    samples = Samples(
        names=pa.array([f"train/{number:07d}" for number in numbers], pa.large_string()),
        labels=numbers % 7,
        rows=numbers,
        patient_codes=np.full(count, -1, np.int32),
        shards=np.zeros(count, np.int32),
        offsets=numbers,
        sizes=numbers,
        digests=np.zeros((count, 32), np.uint8),
        files=(Shard("x", "0" * 64),),
        patient_names=(),
        split_size=count,
    )
    tracemalloc.start()
    content_digest(["x"], {"train": samples})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20


def test_an_index_is_read_from_its_schema_alone(folder: Path) -> None:
    assert read_index(folder / "train-000000.index.parquet").schema == SCHEMA
