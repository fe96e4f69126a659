"""Samples of a webdataset tar that others wrote: members of one name, read in one pass from start to end.

A sample's key is its members' path without the extension. The extension is one of those below at the end of the name, so that
names with dots in them, such as DICOM UIDs, are whole: 1.2.840.113.png and 1.2.840.113.cls are sample 1.2.840.113. A member such
as a.mask.png beside the whole sample a is another member of a, as webdataset has it, and is passed over.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vipbench.harness.data.decode import Picture
from vipbench.harness.data.images import BadImage
from vipbench.harness.data.index import IMAGE_EXTENSIONS, HashedFile, read_members
from vipbench.harness.data.names import class_name, is_clutter
from vipbench.harness.data.remote import open_binary
from vipbench.harness.errors import UserError

LABELS = ("cls", "json", "txt")  # the first that gives a label is the label; a .txt beside another may be a caption
MAX_TEXT_BYTES = 1 << 24
NUMBER = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True)
class Reading:
    """Settings for reading shards.

    Attributes:
        classes: names in order; None takes the names that labels give, sorted.
        label_key, patient_key: where a JSON member holds them; dots go into nested objects.
        image: the extension of the image, where samples hold several.
        metadata: keys of a JSON member that become columns of the index; dots as above.
    """

    classes: Sequence[str] | None = None
    label_key: str = "label"
    patient_key: str = "patient"
    image: str | None = None
    metadata: Sequence[str] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """Extensions of members that are images."""
        return IMAGE_EXTENSIONS if self.image is None else (self.image,)

    @property
    def extensions(self) -> list[str]:
        """All that end a key, longer ones first."""
        return sorted({*IMAGE_EXTENSIONS, *LABELS, *self.images}, key=len, reverse=True)


@dataclass
class ShardSample:
    """A sample of a shard, as its members describe it.

    Attributes:
        labels: by extension, a class's name or a position as text.
        unfit: why the JSON's label is none.
        name: of the class, where the JSON gives one beside a number.
        images: place and digest, by extension.
    """

    shard: str
    offset: int
    labels: dict[str, str] = field(default_factory=dict)
    unfit: str | None = None
    name: str | None = None
    patient: str | None = None
    metadata: dict[str, str | None] = field(default_factory=dict)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    members: set[str] = field(default_factory=set)

    @property
    def is_whole(self) -> bool:
        """Return True for a sample that has an image and a label."""
        return bool(self.images and self.labels)

    @property
    def kind(self) -> str:
        """The extension that gives the label."""
        return next(extension for extension in LABELS if extension in self.labels)

    @property
    def label(self) -> str:
        """The label, as text."""
        return self.labels[self.kind]

    @property
    def number(self) -> int | None:
        """The label as a position among the classes, None where it is a name."""
        return int(self.label) if NUMBER.fullmatch(self.label) else None


@dataclass(frozen=True)
class ShardContent:
    """The samples of a shard by key, in its order; its SHA-256 (hex); how many files in it are no sample's."""

    samples: dict[str, ShardSample]
    sha256: str
    passed_over: int


def read_shard(shard: str, reading: Reading) -> ShardContent:
    """Read a shard. Raises UserError where it is cut off, or a sample lacks an image or a label or is there twice."""
    samples: dict[str, ShardSample] = {}
    closed, last, passed_over = set(), "", 0
    with open_binary(shard) as file:
        hashed = HashedFile(file)
        try:
            for member, data in read_members(hashed, lambda member: _split(member.name, reading) is not None):
                split = _split(member.name, reading)
                if split is None:
                    passed_over += 1
                    continue
                key, extension = split
                key.encode()  # a name that is no Unicode is an error here
                if key != last and key in closed and not last.startswith(f"{key}."):
                    raise ValueError(f"sample {key!r} at byte {member.offset} is there twice")
                closed.add(last)
                last = key
                sample = samples.setdefault(key, ShardSample(shard, member.offset))
                if extension in sample.members:
                    raise ValueError(f"{member.name} at byte {member.offset} is there twice")
                sample.members.add(extension)
                if extension in reading.images:
                    sample.images[extension] = _image(data, member.name) | {"offset": member.offset_data}
                elif extension in LABELS:
                    _read_label(sample, extension, data, member.name, reading)
            passed_over += _drop_parts(samples)
            for key, sample in samples.items():
                _check(key, sample)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{shard}: {' '.join(str(error).split())[:400]}") from error
    if not samples:
        raise UserError(f"{shard}: holds no sample; webdataset's are an image and a label of one name")
    return ShardContent(samples, hashed.digest.hexdigest(), passed_over)


def _split(name: str, reading: Reading) -> tuple[str, str] | None:
    """A member's key and extension; None where it belongs to no sample."""
    if is_clutter(name):
        return None
    lower = name.lower()
    for extension in reading.extensions:
        if lower.endswith(f".{extension}") and not lower.endswith(f"/.{extension}"):
            return name[: -len(extension) - 1], extension
    return None


def _drop_parts(samples: dict[str, ShardSample]) -> int:
    """Remove members such as a.mask.png of a whole sample a, which stand there as samples without label; returns how many."""
    parts = []
    for key, sample in samples.items():
        stem, dot, rest = key.rpartition(".")
        while dot and "/" not in rest and not rest.isdigit() and not sample.is_whole:
            if stem in samples and samples[stem].is_whole:
                parts.append(key)
                break
            stem, dot, rest = stem.rpartition(".")
    for key in parts:
        del samples[key]
    return len(parts)


def _image(data: bytes, member: str) -> dict[str, Any]:
    try:
        Picture(data)
    except BadImage as error:
        raise ValueError(f"{member}: {error}") from error
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read_label(sample: ShardSample, extension: str, data: bytes, member: str, reading: Reading) -> None:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{member}: {len(data)} bytes are more than a label's {MAX_TEXT_BYTES}")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{member}: {error}") from error
    if extension != "json":
        if text:
            sample.labels[extension] = class_name(text)
        return
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{member}: not JSON: {error}") from error
    label = _dotted(content, reading.label_key) if isinstance(content, dict) else content
    if isinstance(label, int | str) and not isinstance(label, bool):
        sample.labels[extension] = class_name(str(label))
    elif label is not None:
        sample.unfit = (
            f"{member}: {reading.label_key} is {str(label)[:80]!r}; a label is a whole number or a class's name"
        )
    if isinstance(content, dict):
        name, patient = content.get("class"), _dotted(content, reading.patient_key)
        sample.name = class_name(name) if isinstance(name, str) else None
        if patient is not None and patient == patient:
            if isinstance(patient, bool) or not isinstance(patient, int | str):
                raise ValueError(
                    f"{member}: {reading.patient_key} is {str(patient)[:80]!r}; it should be text or a whole number"
                )
            sample.patient = str(patient).strip() or None
        sample.metadata = {key: _metadata_value(_dotted(content, key), f"{member}: {key}") for key in reading.metadata}


def _metadata_value(value: Any, where: str) -> str | None:
    if value is None or value != value:
        return None
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where} is {str(value)[:80]!r}; metadata is text or a number")
    return str(value).strip() or None


def _dotted(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _check(key: str, sample: ShardSample) -> None:
    where = f"sample {key!r} at byte {sample.offset}"
    if len(sample.images) > 1:
        raise ValueError(f"{where} has several images ({', '.join(sorted(sample.images))}); say which with --image EXT")
    if not sample.images:
        raise ValueError(f"{where} has no image ({', '.join(IMAGE_EXTENSIONS)})")
    if sample.unfit and "cls" not in sample.labels:
        raise ValueError(sample.unfit)
    if not sample.labels:
        raise ValueError(f"{where} has no label (.cls, .json with the key that --label-key names, or .txt)")
