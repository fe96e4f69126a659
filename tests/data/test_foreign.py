"""Shards that others wrote: indexed where they are, read like our own, refused with one clear line."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from typer.testing import CliRunner

from harness.cli import app
from harness.data.reader import Dataset
from harness.errors import UserError
from tests.data.drawn_images import drawn


def picture(key: str, format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    drawn(key).save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar of members KEY.EXTENSION, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def samples(name: str, count: int = 4, label: str = "cls") -> dict[str, dict[str, bytes]]:
    text = {"cls": lambda n: str(n % 2).encode(), "txt": lambda n: [b"nevus", b"melanoma\n"][n % 2]}
    text["json"] = lambda n: json.dumps(
        {"label": n % 2, "class": ["nevus", "melanoma"][n % 2], "patient": f"{name}{n}"}
    ).encode()
    return {f"{name}{n:03d}": {"jpg": picture(f"{name}{n}"), label: text[label](n)} for n in range(count)}


def index(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["index", *arguments])


@pytest.mark.parametrize("label", ["cls", "txt", "json"])
def test_the_samples_are_those_that_webdataset_reads(tmp_path: Path, label: str) -> None:
    for number in range(2):
        write(tmp_path / f"shards/train-{number}.tar", samples(f"a{number}", label=label))
    write(tmp_path / "shards/test-0.tar", samples("b", label=label))
    classes = ["--classes", "nevus,melanoma"] if label == "cls" else []
    result = index(
        "--train", f"{tmp_path}/shards/train-{{0..1}}.tar", "--test", f"{tmp_path}/shards/test-*.tar", *classes
    )
    assert result.exit_code == 0, result.output
    dataset = Dataset(tmp_path / "shards")
    assert sorted(dataset.classes) == ["melanoma", "nevus"]
    assert {path.name for path in (tmp_path / "shards").glob("*.parquet")} == {
        "train-0.index.parquet",
        "train-1.index.parquet",
        "test-0.index.parquet",
    }, "an index beside each shard"
    train = dataset.split("train")
    theirs = {
        sample["__key__"]: sample
        for shard in sorted((tmp_path / "shards").glob("train-*.tar"))
        for sample in wds.WebDataset(str(shard), shardshuffle=False)
    }
    assert train.keys.tolist() == sorted(theirs)
    for place, key in enumerate(train.keys.tolist()):
        assert train.image_bytes(place) == theirs[key]["jpg"]
        assert dataset.classes[train.labels[place]] == ["nevus", "melanoma"][int(key[-3:]) % 2]
    assert train.patients == ([f"p{number + 1:04d}" for number in range(8)] if label == "json" else [None] * 8)
    inspected = CliRunner().invoke(app, ["inspect", str(tmp_path / "shards")])
    assert "all checksums are right" in inspected.output


def test_other_images_are_read_as_pillow_reads_them(tmp_path: Path) -> None:
    grey, palette = drawn("g", mode="L"), drawn("p").convert("P")
    members = {}
    for name, image, format in (
        ("a", grey, "JPEG"),
        ("b", palette, "PNG"),
        ("c", drawn("w"), "WEBP"),
        ("d", drawn("c", mode="CMYK"), "JPEG"),
    ):
        buffer = io.BytesIO()
        image.save(buffer, format)
        members[name] = {"webp" if format == "WEBP" else format.lower(): buffer.getvalue(), "cls": b"0"}
    write(tmp_path / "train.tar", members)
    assert index("--train", f"{tmp_path}/train.tar", "--classes", "x").exit_code == 0
    train = Dataset(tmp_path).split("train")
    for place, content in enumerate(members.values()):
        expected = Image.open(io.BytesIO(next(iter(content.values())))).convert("RGB")
        np.testing.assert_array_equal(train.pixels(place), np.asarray(expected))


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{0..1}.tar"])
def test_shards_at_a_url(tmp_path: Path, pattern: str) -> None:
    for number in range(2):
        write(tmp_path / f"in/train-{number}.tar", samples(f"a{number}", label="txt"))
    result = index("--train", f"file://{tmp_path}/in/{pattern}", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "--out: these shards are not in one local folder" in str(
        index("--train", f"file://{tmp_path}/in/{pattern}").exception
    )
    train = Dataset(tmp_path / "out").split("train")
    assert [file.path for file in train.files] == [f"file://{tmp_path}/in/train-{number}.tar" for number in range(2)]
    assert "its braces do not match" in str(index("--train", f"{tmp_path}/{{0..").exception)


def test_keys_that_shards_share_get_the_shards_name(tmp_path: Path) -> None:
    for number in range(2):
        parts = {f"{n}": {"jpg": picture(f"{number}{n}"), "cls": b"0"} for n in range(2)}
        write(tmp_path / f"in/train-{number}.tar", parts)
    result = index("--train", f"{tmp_path}/in/*.tar", "--out", str(tmp_path / "out"), "--classes", "x")
    assert "note: 2 keys are in several shards" in result.output
    dataset = Dataset(tmp_path / "out")
    assert dataset.split("train").keys.tolist() == ["train-0/0", "train-0/1", "train-1/0", "train-1/1"]
    assert dataset.split("train").pixels(3).shape == (30, 40, 3)
    assert not list((tmp_path / "in").glob("*.parquet")), "shards elsewhere are left as they are"


def test_nested_keys_and_one_of_several_images(tmp_path: Path) -> None:
    meta = json.dumps({"meta": {"dx": "nevus", "id": 7}}).encode()
    write(
        tmp_path / "train.tar",
        {"a": {"jpg": picture("a"), "mask.png": picture("m", "PNG"), "png": picture("b", "PNG"), "json": meta}},
    )
    common = ["--train", f"{tmp_path}/train.tar", "--label-key", "meta.dx", "--patient-key", "meta.id"]
    assert "has several images (jpg, png); say which with --image EXT" in str(index(*common).exception)
    assert index(*common, "--image", "png").exit_code == 0
    train = Dataset(tmp_path).split("train")
    assert train.image_bytes(0) == picture("b", "PNG")
    assert train.patients == ["p0001"]


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"a": {"jpg": picture("a")}}, [], r"sample 'a' at byte 0 has no label"),
        ({"a": {"cls": b"0"}}, [], r"sample 'a' at byte 0 has no image"),
        (
            {"a": {"jpg": picture("a"), "cls": b"5"}},
            ["--classes", "x,y"],
            r"sample 'a' has label 5, which is none of \['x', 'y'\]",
        ),
        ({"a": {"jpg": picture("a"), "txt": b"z"}}, ["--classes", "x,y"], r"has label 'z', which is none of"),
        (
            {"a": {"jpg": picture("a"), "cls": b"0"}},
            [],
            r"labels are numbers \(\[0\] ...\): name them in order with --classes",
        ),
        ({"a": {"jpg": b"no image", "cls": b"0"}}, [], r"a.jpg: is not an image of a known format \(JPEG, PNG, WEBP\)"),
        ({"a": {"jpg": picture("a"), "json": b"{broken"}}, [], r"train.tar: .*"),
        ({"a": {"jpg": picture("a"), "cls": b"0"}}, ["--classes", "x,y"], r"class 'y' has no training image"),
        ({}, [], r"holds no sample"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, content: dict[str, dict[str, bytes]], options: list[str], message: str
) -> None:
    write(tmp_path / "train.tar", content)
    result = index("--train", f"{tmp_path}/train.tar", *options)
    assert isinstance(result.exception, UserError), result.output
    with pytest.raises(UserError, match=message):
        raise result.exception
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"], "nothing is left"


def test_leaks_and_repeated_keys_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.tar", {"a": {"jpg": picture("a"), "cls": b"0"}})
    write(tmp_path / "test.tar", {"b": {"jpg": picture("a"), "cls": b"0"}})
    both = ["--train", f"{tmp_path}/train.tar", "--test", f"{tmp_path}/test.tar", "--classes", "x"]
    assert "1 groups of identical images (1 across splits" in str(index(*both).exception)
    assert (tmp_path / "leaks.csv").read_text().splitlines()[1:] == [
        "1,identical images,train,x,a,",
        "1,identical images,test,x,b,",
    ]
    apart = {"a": {"jpg": picture("a"), "cls": b"0"}, "b": {"jpg": picture("b"), "cls": b"0"}}
    shard = write(tmp_path / "train.tar", apart)
    with tarfile.open(shard, "a") as tar:
        info = tarfile.TarInfo("a.txt")
        tar.addfile(info, io.BytesIO(b""))
    assert "sample 'a' at byte" in (text := str(index(*both).exception))
    assert "is there twice" in text
    assert not list(tmp_path.glob("*.parquet"))
    assert "names" in str(index("--train", str(shard), "--train", str(shard), "--classes", "x").exception)
    assert "no shard of this name" in str(index("--train", f"{tmp_path}/*.none").exception)


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
