"""Prepared datasets: what is written, that it is the same each time, whole or not at all, and that damage is found."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from tests.data.drawn_images import drawn, save, source_of
from vipbench.harness.data.choices import Leaks
from vipbench.harness.data.importers.base import Record, Source
from vipbench.harness.data.index import SCHEMA, index_path, index_shard, read_index
from vipbench.harness.data.info import DatasetInfo
from vipbench.harness.data.shards import verify, write_dataset
from vipbench.harness.data.splits import HoldOut
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_json, write_json


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A dataset with three splits, several shards of train, and patients."""
    source = source_of(tmp_path / "source", train=6, val=2, test=3)
    records = [replace(record, patient=f"{record.split} ann") for record in source.records]
    write_dataset(Source(source.classes, records), tmp_path / "out", name="demo", modality="drawn", shard_bytes=4000)
    return tmp_path / "out"


def test_dataset_json(written: Path) -> None:
    info = DatasetInfo.load(written)
    assert (info.name, info.modality, info.classes) == ("demo", "drawn", ["mel", "nev"])
    assert {split: part.counts for split, part in info.splits.items()} == {
        "train": {"mel": 6, "nev": 6},
        "val": {"mel": 2, "nev": 2},
        "test": {"mel": 3, "nev": 3},
    }
    assert len(info.splits["train"].shards) > 1
    assert len(info.splits["val"].shards) == 1
    listed = [shard.file for split in info.splits.values() for shard in split.shards]
    assert sorted(path.name for path in written.glob("*.tar")) == sorted(listed)
    verify(written)


def test_webdataset_reads_the_shards_and_the_index_finds_the_images(written: Path) -> None:
    found: dict[str, object] = {}
    for shard in sorted(written.glob("train-*.tar")):
        samples = {sample["__key__"]: sample for sample in wds.WebDataset(str(shard), shardshuffle=False)}
        table = read_index(index_path(shard))
        assert table.schema == SCHEMA
        assert table["key"].to_pylist() == list(samples)
        data = shard.read_bytes()
        for row in table.to_pylist():
            sample = samples[row["key"]]
            image = data[row["offset"] : row["offset"] + row["size"]]
            assert image == sample[row["extension"]]
            assert hashlib.sha256(image).hexdigest() == row["sha256"]
            meta = json.loads(sample["json"])
            name = row["key"].split("/")[0]
            assert meta == {"label": ["mel", "nev"].index(name), "class": name, "patient": row["patient"]}
            assert row["label"] == meta["label"]
        found |= samples
    assert sorted(found) == [f"{name}/train{number:03d}" for name in ("mel", "nev") for number in range(6)]


def test_patients_are_pseudonyms_and_nothing_tells_their_ids(written: Path) -> None:
    patients = {
        path.name.split("-")[0]: set(pq.read_table(path)["patient"].to_pylist()) for path in written.glob("*.parquet")
    }
    assert patients == {"test": {"p0001"}, "train": {"p0002"}, "val": {"p0003"}}  # in the order of the sorted ids
    assert not any(b" ann" in path.read_bytes() for path in written.iterdir())


def test_patient_id_in_file_names_is_noted(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", train=1)
    records = [replace(record, patient=record.key[-4:]) for record in source.records[:1]] + source.records[1:]
    info = write_dataset(Source(source.classes, records), tmp_path / "out", name="demo", hold_out=HoldOut(0, 0))
    assert info.notes == ["1 file names hold their patient's id, and so do the sample ids made of them"]


def test_same_bytes_again_in_any_order_with_any_number_of_processes(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source")
    write_dataset(source, tmp_path / "a", name="demo")
    for path in (tmp_path / "source").rglob("*.jpg"):
        os.utime(path, (1, 1))
    write_dataset(Source(source.classes, source.records[::-1]), tmp_path / "b", name="demo", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_tar_says_nothing_of_the_machine(written: Path) -> None:
    with tarfile.open(next(written.glob("*.tar"))) as tar:
        facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert facts == {(0, 0, 0, "vipbench", "vipbench", 0o444)}


def test_digest_depends_on_content_not_on_the_size_of_shards(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", train=4, test=2)

    def digest(name: str, source: Source, **options: Any) -> str:
        return write_dataset(source, tmp_path / name, name=name, hold_out=HoldOut(0, 0), **options).digest

    small, large = digest("small", source, shard_bytes=1), digest("large", source)
    assert len(list((tmp_path / "small").glob("train-*.tar"))) == 8
    assert small == large
    first, *others = source.records
    assert digest("split", Source(source.classes, [replace(first, split="test"), *others])) != large
    assert digest("label", Source(source.classes, [replace(first, label=1), *others])) != large
    assert digest("key", Source(source.classes, [replace(first, key="other"), *others])) != large
    assert digest("order", Source(source.classes[::-1], source.records)) != large
    save(first.path, drawn("other pixels"))
    assert digest("pixels", source) != large


def test_long_and_non_ascii_names(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", train=1)
    key = "größe/" + "x" * 200 + "/" + "é" * 100
    records = [replace(source.records[0], key=key), source.records[1]]
    write_dataset(Source(source.classes, records), tmp_path / "out", name="demo", hold_out=HoldOut(0, 0))
    verify(tmp_path / "out")
    assert key in [row["__key__"] for row in wds.WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False)]


def spoiled(tmp_path: Path) -> Source:
    """A source whose second image is cut short and whose third is missing."""
    source = source_of(tmp_path / "source")
    cut, missing = source.records[1].path, source.records[2].path
    cut.write_bytes(cut.read_bytes()[:300])
    missing.unlink()
    return source


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_image_is_named_and_nothing_is_left(tmp_path: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"mel/001.jpg: .*[Tt]runcated.*--on-error skip"):
        write_dataset(spoiled(tmp_path), tmp_path / "out", name="demo", workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_skipped_images_are_listed(tmp_path: Path) -> None:
    info = write_dataset(spoiled(tmp_path), tmp_path / "out", name="demo", on_error="skip")
    skipped = [note for note in info.notes if note.startswith("skipped")]
    assert len(skipped) == 2
    assert skipped[0].startswith("skipped mel/001 (001.jpg): cannot be decoded")
    assert skipped[1] == "skipped mel/002 (002.jpg): cannot be read: No such file or directory"
    assert sum(sum(part.counts.values()) for part in info.splits.values()) == 10


def test_changes_are_counted(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source")
    for record in source.records[:3]:
        drawn(record.key, mode="CMYK").save(record.path, "JPEG")
    info = write_dataset(source, tmp_path / "out", name="demo")
    assert "3 images were converted from CMYK to RGB" in info.notes


def test_no_image_and_no_class_left_after_skipping(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", per_class=2)
    for record in source.records[:2]:
        record.path.write_bytes(b"no image")
    with pytest.raises(UserError, match="class 'mel' has no training image"):
        write_dataset(source, tmp_path / "out", name="demo", on_error="skip")
    for record in source.records:
        record.path.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 4 images can be used"):
        write_dataset(source, tmp_path / "out", name="demo", on_error="skip")
    assert not (tmp_path / "out").exists()


def test_same_image_in_two_splits_is_refused_although_the_files_differ(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", train=2, test=1)
    copy = save(tmp_path / "source" / "copy.png", drawn("x"))
    other = save(tmp_path / "source" / "other.bmp", drawn("x"))
    records = [*source.records, Record("copy", copy, 0, "train"), Record("other", other, 0, "test")]
    with pytest.raises(
        UserError, match=r"1 groups of identical images \(1 across splits.*out.leaks.csv lists them all"
    ):
        write_dataset(Source(source.classes, records), tmp_path / "out", name="demo")
    report = (tmp_path / "out.leaks.csv").read_text()
    assert "1,identical images,train,mel,copy,\n1,identical images,test,mel,other,\n" in report
    assert not (tmp_path / "out").exists()
    kept = write_dataset(Source(source.classes, records), tmp_path / "kept", name="demo", leaks=Leaks.keep)
    less = write_dataset(Source(source.classes, records), tmp_path / "out", name="demo", leaks=Leaks.drop_train)
    assert (tmp_path / "out" / "leaks.csv").read_text() == report.replace("copy,", "copy,yes")
    assert not (tmp_path / "out.leaks.csv").exists()
    assert kept.digest != less.digest
    recorded = DatasetInfo.load(tmp_path / "out").leaks
    assert recorded is not None
    assert (recorded.policy, recorded.across, recorded.dropped) == ("drop-train", 1, 1)


def test_existing_target_is_refused_unless_overwritten(tmp_path: Path) -> None:
    source, out = source_of(tmp_path / "source"), tmp_path / "out"
    first = write_dataset(source, out, name="demo")
    with pytest.raises(UserError, match="exists"):
        write_dataset(source, out, name="demo")
    source.records.pop()
    assert write_dataset(source, out, name="demo", overwrite=True).digest != first.digest
    verify(out)


def test_only_a_dataset_is_overwritten(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source")
    with pytest.raises(UserError, match="not a prepared dataset"):
        write_dataset(source, tmp_path / "source", name="demo", overwrite=True)
    assert source.records[0].path.exists()


def test_failed_overwrite_keeps_the_old_dataset(tmp_path: Path) -> None:
    source, out = source_of(tmp_path / "source"), tmp_path / "out"
    write_dataset(source, out, name="demo")
    before = contents(out)
    source.records[0].path.unlink()
    with pytest.raises(UserError, match=r"000\.jpg"):
        write_dataset(source, out, name="demo", overwrite=True)
    assert contents(out) == before


def test_crash_midway_leaves_nothing_taken_as_whole(tmp_path: Path) -> None:
    source_of(tmp_path / "source")
    script = f"""
import os, signal
from pathlib import Path
from vipbench.harness.data import shards
from vipbench.harness.data.importers import folder

def die(shard):
    os.kill(os.getpid(), signal.SIGKILL)

shards.index_shard = die
shards.write_dataset(folder.read(Path({str(tmp_path / "source")!r})), Path({str(tmp_path / "out")!r}), name="demo")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name != "source"]
    assert all(path.name.startswith(".") for path in left)
    assert any(list(path.rglob("*.tar")) for path in left), "it died in the middle, so a part is there"
    for path in left:
        with pytest.raises(UserError, match="not a prepared dataset"):
            DatasetInfo.load(path)
    write_dataset(Source(["a"], [Record("x", save(tmp_path / "x.jpg"), 0)]), tmp_path / "out", name="demo")


def change_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_damaged_image_is_named(written: Path) -> None:
    shard = written / "test-000000.tar"
    row = read_index(index_path(shard)).to_pylist()[2]
    change_byte(shard, row["offset"] + row["size"] // 2)
    with pytest.raises(UserError, match=rf"test-000000.tar: sample '{row['key']}' at byte {row['offset']} is damaged"):
        verify(written)


def test_cut_shard_and_changed_label_and_missing_files(written: Path) -> None:
    shard = written / "test-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"test-000000.tar: sample '.*' at byte .* is damaged"):
        verify(written)
    change = whole.replace(b'"label": 0', b'"label": 1', 1)
    shard.write_bytes(change)
    with pytest.raises(UserError, match=r"test-000000.tar: its checksum differs"):
        verify(written)
    shard.unlink()
    with pytest.raises(UserError, match=r"test-000000.tar: no such file"):
        verify(written)
    shard.write_bytes(whole)
    verify(written)
    index_path(shard).unlink()
    with pytest.raises(UserError, match=r"test-000000.index.parquet: cannot be read: No such file"):
        verify(written)
    index_path(shard).write_bytes(b"x")
    with pytest.raises(UserError, match=r"test-000000.index.parquet: not a Parquet file"):
        verify(written)


def test_index_of_another_shard_is_found(written: Path) -> None:
    first, second = written / "train-000000.tar", written / "train-000001.tar"
    index_path(first).write_bytes(index_path(second).read_bytes())
    with pytest.raises(UserError, match=r"train-000000.tar: the index beside it describes other content"):
        verify(written)


def test_changed_description_is_found(written: Path) -> None:
    described = read_json(written / "dataset.json")
    write_json(written / "dataset.json", {**described, "classes": ["nev", "mel"]})
    with pytest.raises(UserError, match="digest"):
        verify(written)
    described["splits"]["test"]["counts"]["mel"] = 4
    write_json(written / "dataset.json", described)
    with pytest.raises(UserError, match="counts of test"):
        verify(written)
    write_json(written / "dataset.json", {**described, "format": "vipbench-dataset/9"})
    with pytest.raises(UserError, match="not a prepared dataset of this version: format"):
        DatasetInfo.load(written)


def test_sample_without_label_or_image_is_named(tmp_path: Path) -> None:
    for extension, lack in (("jpg", "label"), ("json", "image")):
        shard = tmp_path / f"{extension}.tar"
        with wds.TarWriter(str(shard)) as tar:
            tar.write({"__key__": "a/b", extension: b'{"label": 0}'})
        with pytest.raises(UserError, match=f"{extension}.tar: .*: sample 'a/b' has no {lack}"):
            index_shard(shard)
