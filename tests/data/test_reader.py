"""Reading samples: order, selection, damage, and the same bytes from threads, forked and spawned processes."""

import io
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.drawn_images import source_of
from vipbench.harness.data import reader
from vipbench.harness.data.importers.base import Source
from vipbench.harness.data.reader import Dataset, Samples
from vipbench.harness.data.shards import write_dataset
from vipbench.harness.data.splits import HoldOut
from vipbench.harness.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """12 training images in several shards, and 4 test images; every second one has a patient."""
    source = source_of(tmp_path / "source", train=6, test=2)
    records = [replace(record, patient=record.key if n % 2 else None) for n, record in enumerate(source.records)]
    source = Source(source.classes, records)
    write_dataset(source, tmp_path / "data", name="demo", shard_bytes=3000, hold_out=HoldOut(0, 0))
    return tmp_path / "data"


def test_samples_are_in_key_order_with_their_labels_and_bytes(path: Path) -> None:
    dataset = Dataset(str(path))
    samples = dataset.split("train")
    assert len(dataset.info.splits["train"].shards) > 2
    assert samples.keys.tolist() == [f"{name}/train{number:03d}" for name in ("mel", "nev") for number in range(6)]
    assert samples.labels.tolist() == [0] * 6 + [1] * 6
    assert samples.labels.dtype == np.int64
    assert [patient is None for patient in samples.patients] == [n % 2 == 0 for n in range(12)]
    for position, key in enumerate(samples.keys):
        original = Image.open(path.parent / "source" / f"{key}.jpg")
        np.testing.assert_array_equal(np.asarray(samples.image(position)), np.asarray(original))


def test_image_is_rgb(tmp_path: Path) -> None:
    source = source_of(tmp_path / "source", train=1)
    for record in source.records:
        Image.open(record.path).convert("L").save(record.path)
    write_dataset(source, tmp_path / "data", name="demo", hold_out=HoldOut(0, 0))
    assert Dataset(tmp_path / "data").split("train").image(0).mode == "RGB"


def test_split_that_is_not_there(path: Path) -> None:
    dataset = Dataset(path)
    assert dataset.has("test")
    assert not dataset.has("val")
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        dataset.split("val")
    with pytest.raises(UserError, match="not a prepared dataset"):
        Dataset(path.parent)


def test_select(path: Path) -> None:
    samples = Dataset(path).split("train")
    chosen = samples.select([7, 2, 2])
    assert chosen.keys.tolist() == samples.keys[[7, 2, 2]].tolist()
    assert [chosen.image_bytes(n) for n in range(3)] == [samples.image_bytes(n) for n in (7, 2, 2)]
    assert chosen.rows.tolist() == [7, 2, 2]
    assert chosen.select([2, 0]).rows.tolist() == [2, 7]
    assert chosen.split_size == 12
    assert len(samples.select([])) == 0
    assert samples.select(samples.labels == 1).labels.tolist() == [1] * 6
    assert samples.select(np.arange(12)[::5]).keys.tolist() == samples.keys[::5].tolist()


def test_damage_and_missing_shard_are_named(path: Path) -> None:
    samples = Dataset(path).split("test")
    shard = path / "test-000000.tar"
    position = int(np.flatnonzero(samples.shards == 0)[0])
    data = bytearray(shard.read_bytes())
    data[samples.offsets[position] + 100] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"test-000000.tar: sample '{samples.keys[position]}' at byte .* is damaged"):
        samples.image_bytes(position)
    reader._open.cache_clear()
    shard.unlink()
    with pytest.raises(UserError, match=r"test-000000.tar: cannot be read: No such file"):
        samples.image_bytes(position)


def test_overwritten_dataset_is_not_read_through_old_handles(path: Path) -> None:
    before = Dataset(path).split("test")
    [before.image_bytes(n) for n in range(len(before))]
    source = source_of(path.parent / "other", train=1, test=3)
    write_dataset(source, path, name="demo", overwrite=True, hold_out=HoldOut(0, 0))
    after = Dataset(path).split("test")
    assert [Image.open(io.BytesIO(after.image_bytes(n))).size for n in range(6)] == [(40, 30)] * 6


def all_bytes(samples: Samples) -> list[bytes]:
    return [samples.image_bytes(n) for n in range(len(samples))]


def shard_handles() -> list[str]:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(link) for link in links if os.path.exists(link) and ".tar" in os.readlink(link))


def test_threads_read_the_same_bytes_with_few_files_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Dataset(path).split("train")
    expected = all_bytes(samples)
    opens_one = lru_cache(maxsize=1)(reader._open.__wrapped__)
    reader._open.cache_clear()
    monkeypatch.setattr(reader, "_open", opens_one)
    with ThreadPoolExecutor(8) as pool:
        positions = [n % len(samples) for n in range(400)]
        assert list(pool.map(samples.image_bytes, positions)) == [expected[n] for n in positions]
    assert len({link for link in shard_handles() if str(path) in link}) == 1


def child(samples: Samples, connection: Connection) -> None:
    connection.send((shard_handles(), all_bytes(samples)))


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")])
def test_processes_open_their_own_files(path: Path, context: Any) -> None:
    samples = Dataset(path).split("train")
    expected = all_bytes(samples)
    assert shard_handles()
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(samples, theirs))
    process.start()
    handles, data = ours.recv()
    process.join()
    assert handles == []  # none came over from the parent
    assert data == expected
    assert all_bytes(samples) == expected
