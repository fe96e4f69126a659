"""Shards that others wrote: indexed where they are, read like our own, refused with one clear line."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from tests.data.drawn_images import drawn
from tests.data.external_shards import index, inspect, picture, png, samples, write
from vipbench.harness.data.reader import Dataset
from vipbench.harness.errors import UserError


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
    inspected = inspect(tmp_path / "shards")
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


def test_labels_of_keys_that_shards_share_are_all_classes(tmp_path: Path) -> None:
    """The last shard's labels are not the only ones."""
    for split, names in (("train", ["melanoma", "nevus", "keratosis"]), ("test", ["nevus", "nevus", "melanoma"])):
        parts = {f"{n}": {"jpg": picture(f"{split}{n}"), "cls": name.encode()} for n, name in enumerate(names)}
        write(tmp_path / f"in/{split}.tar", parts)
    result = index(
        "--train", f"{tmp_path}/in/train.tar", "--test", f"{tmp_path}/in/test.tar", "--out", str(tmp_path / "out")
    )
    assert result.exit_code == 0, result.exception
    dataset = Dataset(tmp_path / "out")
    assert dataset.classes == ["keratosis", "melanoma", "nevus"]
    assert [dataset.classes[label] for label in dataset.split("train").labels] == ["melanoma", "nevus", "keratosis"]


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


LABELS: dict[str, tuple[dict[str, bytes], list[str], list[str], list[int]]] = {
    # members beside the image, options, classes, labels
    "captions beside .cls": (
        {"cls": b"1", "txt": b"a photo of a lesion"},
        ["--classes", "nevus,melanoma"],
        ["nevus", "melanoma"],
        [1, 1],
    ),
    ".json beside .cls": ({"json": b'{"label": "x"}', "cls": b"mel"}, [], ["mel"], [0, 0]),
    "an unfit .json beside .cls": ({"json": b'{"label": [1]}', "cls": b"mel"}, [], ["mel"], [0, 0]),
    ".json without label beside .cls": ({"json": b'{"dx": 3}', "cls": b"mel"}, [], ["mel"], [0, 0]),
    "captions beside .json": ({"txt": b"a caption", "json": b'{"label": "mel"}'}, [], ["mel"], [0, 0]),
    "an empty caption": ({"txt": b"", "cls": b"mel"}, [], ["mel"], [0, 0]),
    "names that are numbers": ({"cls": b"2"}, ["--classes", "1,2,3"], ["1", "2", "3"], [1, 1]),
    "numbers as .json": ({"json": b'{"label": 2}'}, ["--classes", "1,2,3"], ["1", "2", "3"], [1, 1]),
    "positions": ({"cls": b"2"}, ["--classes", "a,b,c"], ["a", "b", "c"], [2, 2]),
    "a byte order mark": ({"cls": b"\xef\xbb\xbfmel\r\n"}, [], ["mel"], [0, 0]),
    "a byte order mark in .json": ({"json": b'\xef\xbb\xbf{"label": "mel"}'}, [], ["mel"], [0, 0]),
    "one spelling of a name": ({"cls": "Me\u0301l  x".encode()}, ["--classes", "M\u00e9l x"], ["M\u00e9l x"], [0, 0]),
    "a name with a comma": ({"cls": b"nevus, x"}, ["--classes", '"nevus, x",b'], ["nevus, x", "b"], [0, 0]),
}


@pytest.mark.parametrize(("members", "options", "classes", "labels"), LABELS.values(), ids=LABELS.keys())
def test_one_rule_for_labels(
    tmp_path: Path, members: dict[str, bytes], options: list[str], classes: list[str], labels: list[int]
) -> None:
    write(tmp_path / "test.tar", {key: {"png": png(key), **members} for key in "ab"})
    result = index("--test", f"{tmp_path}/test.tar", *options)
    assert result.exit_code == 0, result.exception
    dataset = Dataset(tmp_path)
    assert dataset.classes == classes
    assert dataset.split("test").labels.tolist() == labels


WRONG_LABELS: dict[str, tuple[dict[str, bytes], dict[str, bytes], str]] = {
    "mixed kinds": ({"cls": b"mel"}, {"txt": b"a caption"}, "sample 'a' has its label in .cls, sample 'b' in .txt"),
    "two names of a number": (
        {"json": b'{"label": 0, "class": "x"}'},
        {"json": b'{"label": 0, "class": "y"}'},
        "label 0 is class 'y' here and 'x' elsewhere",
    ),
    "a list": ({"json": b'{"label": [0]}'}, {"cls": b"0"}, "label is '\\[0\\]'; a label is a whole number or"),
    "NaN": ({"json": b'{"label": NaN}'}, {"cls": b"0"}, "label is 'nan'; a label is"),
    "true": ({"json": b'{"label": true}'}, {"cls": b"0"}, "label is 'True'; a label is"),
    "an infinite number": ({"json": b'{"label": 1e999}'}, {"cls": b"0"}, "label is 'inf'; a label is"),
    "no name": ({"cls": b"a\x00b"}, {"cls": b"b"}, "printable characters"),
    "long text": ({"txt": b"x" * 300}, {"txt": b"b"}, "printable characters"),
    "no Unicode": ({"cls": b"\xff"}, {"cls": b"b"}, "a.cls: 'utf-8' codec"),
    "deep brackets": ({"json": b"[" * 3000 + b"]" * 3000}, {"cls": b"b"}, "a.json: not JSON"),
    "a huge number": ({"cls": b"9" * 5000}, {"cls": b"b"}, "printable characters"),
    "a negative number": ({"cls": b"-1"}, {"cls": b"0"}, "name them in order with --classes"),
    "a patient of another kind": ({"json": b'{"label": "x", "patient": {}}'}, {"cls": b"b"}, "patient is '{}'; it"),
}


@pytest.mark.parametrize(("first", "second", "message"), WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_wrong_labels_are_one_line(
    tmp_path: Path, first: dict[str, bytes], second: dict[str, bytes], message: str
) -> None:
    write(tmp_path / "test.tar", {"a": {"png": png("a"), **first}, "b": {"png": png("b"), **second}})
    result = index("--test", f"{tmp_path}/test.tar")
    with pytest.raises(UserError, match=message) as caught:
        raise result.exception or AssertionError(result.output)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert [path.name for path in tmp_path.iterdir()] == ["test.tar"]


def test_a_gap_for_a_patient_is_none(tmp_path: Path) -> None:
    metas = {"a": b'{"label": "x", "patient": NaN}', "b": b'{"label": "x", "patient": null}', "c": b'{"label": "x"}'}
    write(tmp_path / "test.tar", {key: {"png": png(key), "json": meta} for key, meta in metas.items()})
    assert index("--test", f"{tmp_path}/test.tar").exit_code == 0
    assert Dataset(tmp_path).split("test").patients == [None] * 3


def test_names_with_dots_and_what_is_no_sample(tmp_path: Path) -> None:
    write(
        tmp_path / "test.tar",
        {
            "1.2.840.113": {"png": png("u"), "cls": b"x"},
            "1.2.840.114": {"PNG": png("v"), "cls": b"x"},
            "./dr.smith": {"png": png("w"), "cls": b"x"},
            "a": {"png": png("a"), "mask.png": png("m"), "seg.txt": b"12", "cls": b"x", "npy": b"\x93"},
            "._a": {"png": b"AppleDouble"},
            "__MACOSX/a": {"png": b"AppleDouble"},
            "README": {"md": b"about", "txt": b"about"},
            "x/Thumbs": {"db": b""},
        },
    )
    result = index("--test", f"{tmp_path}/test.tar")
    assert result.exit_code == 0, result.exception
    assert "note: 8 files in the shards are no image or label of a sample and were passed over" in " ".join(
        result.output.split()
    )
    samples = Dataset(tmp_path).split("test")
    assert samples.keys.tolist() == ["./dr.smith", "1.2.840.113", "1.2.840.114", "a"]
    assert samples.image_bytes(3) == png("a")
    inspected = inspect(tmp_path)
    assert inspected.exit_code == 0, inspected.exception


def test_an_unlabelled_image_with_a_longer_uid_is_no_part_of_another(tmp_path: Path) -> None:
    write(tmp_path / "test.tar", {"1.2": {"png": png("a"), "cls": b"x"}, "1.2.3": {"png": png("b")}})
    assert "sample '1.2.3' at byte" in (text := str(index("--test", f"{tmp_path}/test.tar").exception))
    assert "has no label" in text


def test_a_pattern_is_one_argument_even_with_spaces(tmp_path: Path) -> None:
    drive = tmp_path / "My Drive"
    write(drive / "t [1].tar", {"a": {"png": png("a"), "cls": b"x"}})
    write(drive / "u.tar", {"b": {"png": png("b"), "cls": b"x"}})
    write(drive / "v-0.tar", {"c": {"png": png("c"), "cls": b"x"}})
    patterns = [f"{drive}/t [1].tar", f"{drive}/u.tar", f"{drive}/v-{{0..0}}.tar"]
    result = index(*(part for pattern in patterns for part in ("--test", pattern)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.exception
    assert Dataset(tmp_path / "out").split("test").keys.tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/out"])
def test_an_output_that_cannot_be_is_told_before_shards_are_read(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "test.tar", {"a": {"png": png("a"), "cls": b"x"}})
    (tmp_path / "file").touch()
    monkeypatch.setattr("vipbench.harness.data.external.read_shard", None)
    error = str(index("--test", f"{tmp_path}/test.tar", "--out", str(tmp_path / place)).exception)
    assert f"{place.rpartition('/')[2]}: cannot be written" in error
    assert "\n" not in error


@pytest.mark.parametrize("leaks", ["keep", "drop-train"])
def test_leaks_are_dealt_with_as_prepare_does(tmp_path: Path, leaks: str) -> None:
    write(tmp_path / "train.tar", {key: {"png": png(key), "cls": b"x"} for key in "abc"})
    write(tmp_path / "test.tar", {"d": {"png": png("a"), "cls": b"x"}})
    both = ["--train", f"{tmp_path}/train.tar", "--test", f"{tmp_path}/test.tar", "--leaks", leaks]
    result = index(*both)
    assert result.exit_code == 0, result.exception
    dataset = Dataset(tmp_path)
    assert dataset.split("train").keys.tolist() == (["a", "b", "c"] if leaks == "keep" else ["b", "c"])
    assert dataset.split("test").keys.tolist() == ["d"]
    assert dataset.info.leaks is not None and dataset.info.leaks.policy == leaks
    assert len((tmp_path / "leaks.csv").read_text().splitlines()) == 3
    assert inspect(tmp_path).exit_code == 0
