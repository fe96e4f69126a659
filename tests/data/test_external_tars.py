"""Damaged and hostile tars are refused with one clear line; what follows or lies between samples is bounded."""

import tarfile
from pathlib import Path

import pytest

from tests.data.external_shards import index, inspect, png, samples, write
from vipbench.harness.data import index as module
from vipbench.harness.errors import UserError


def block(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar's header of a member that claims a size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**records: str) -> bytes:
    info = tarfile.TarInfo("a.png")
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT)


HOSTILE_TARS: dict[str, tuple[bytes, str]] = {
    "endless image": (block("a.png", 2**60), "bytes; a member is whole, of at most"),
    "endless other member": (block("a.mp4", 2**60), "a member goes on after its end"),
    "sparse": (block("a.png", 0, tarfile.GNUTYPE_SPARSE), "a member is sparse"),
    "sparse by pax": (
        pax(
            **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**60)}
        ),
        "is sparse",
    ),
    "a name without end": (block("x", 2**40, tarfile.GNUTYPE_LONGNAME), "a header of 1099511627776 bytes"),
    "a pax header without end": (block("x", 2**40, tarfile.XHDTYPE), "a header of 1099511627776 bytes"),
    "negative size": (pax(size="-512"), "not a whole tar|bytes; a member is whole"),
    "size that is none": (pax(size="x"), "not a whole tar|is not an image"),
    "nested names": (b"".join([block("x", 512, tarfile.GNUTYPE_LONGNAME) + bytes(512)] * 4000), "not a whole tar"),
    "the same member twice": (
        (block("a.png", len(png("a"))) + png("a") + bytes(-len(png("a")) % 512)) * 2,
        "there twice",
    ),
    "no Unicode": (block("a.cls", 0).replace(b"a.cls", b"\xff.cls", 1), "not a whole tar|utf-8|cut off"),
    "noise": (bytes(range(256)) * 40, "not a whole tar"),
    "nothing": (b"", "not a whole tar|cut off|no sample"),
    "gzip": (b"\x1f\x8b\x08" + bytes(600), "not a whole tar"),
}


@pytest.mark.parametrize(("data", "message"), HOSTILE_TARS.values(), ids=HOSTILE_TARS.keys())
def test_hostile_tars(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "test.tar").write_bytes(data)
    result = index("--test", f"{tmp_path}/test.tar")
    with pytest.raises(UserError, match=message) as caught:
        raise result.exception or AssertionError(result.output)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("damage", [0, 130, 150])  # of the name, the size, the checksum
def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path, damage: int) -> None:
    shard = write(tmp_path / "test.tar", {key: {"png": png(key), "cls": b"x"} for key in "abc"})
    with tarfile.open(shard) as tar:
        place = tar.getmembers()[2].offset
    data = bytearray(shard.read_bytes())
    data[place + damage] ^= 0x55
    shard.write_bytes(data)
    assert "not a whole tar: a damaged header" in str(index("--test", str(shard)).exception)


def test_what_is_no_sample_may_be_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 5000)
    write(tmp_path / "test.tar", {"a": {"mp4": bytes(9000), "png": png("a"), "cls": b"x"}})
    assert index("--test", f"{tmp_path}/test.tar").exit_code == 0
    assert inspect(tmp_path).exit_code == 0
    monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 500)
    (tmp_path / "dataset.json").unlink()
    assert "a member is whole, of at most 500 bytes" in str(index("--test", f"{tmp_path}/test.tar").exception)


def test_what_follows_a_tar_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path / "test.tar", {"a": {"png": png("a"), "cls": b"x"}})
    with shard.open("r+b") as file:
        file.truncate(2**40)  # a terabyte of hole
    assert "bytes after the tar's end at byte" in str(index("--test", str(shard)).exception)
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 1000)
    assert "it has over 1000 bytes" in str(index("--test", str(shard)).exception)


@pytest.mark.parametrize("keep", ["header", "image", "between members"])
def test_a_shard_that_was_cut_off_is_told(tmp_path: Path, keep: str) -> None:
    shard = write(tmp_path / "train.tar", samples("a"))
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-2]
    size = {"header": last.offset + 100, "image": last.offset_data + 100, "between members": last.offset}[keep]
    shard.write_bytes(shard.read_bytes()[:size])
    result = index("--train", str(shard), "--classes", "x,y")
    assert isinstance(result.exception, UserError), result.output
    assert f"at byte {size}" in str(result.exception) or f"byte {size}" in str(result.exception)
