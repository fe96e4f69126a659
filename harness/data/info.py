"""dataset.json, the description of a dataset. Everything in it is checked before use, since it may come from anybody."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vipbench.harness.config.validation import first_problem
from vipbench.harness.data.names import MAX_NAME, SHA256, check_class_names, is_plain_url, is_safe_name
from vipbench.harness.data.remote import is_url, join, read_bytes
from vipbench.harness.errors import UserError

INFO = "dataset.json"
SPLITS = ("train", "val", "test")
MAX_SAMPLES = 2**31 - 1

Sha256 = Annotated[str, Field(pattern=SHA256)]
Count = Annotated[int, Field(ge=0, le=MAX_SAMPLES)]


def _class_names(names: list[str]) -> list[str]:
    check_class_names(names, "classes")
    return names


ClassNames = Annotated[list[str], AfterValidator(_class_names)]


class _Described(BaseModel):
    model_config = ConfigDict(strict=True)


class ShardInfo(_Described):
    """One shard: its file, its checksum, and how many samples it holds.

    Attributes:
        file: a name in the dataset's folder, or, for a shard that others wrote, an absolute path or a URL.
        index: the index's file in the dataset's folder; None: beside the shard, by its name.
    """

    file: str
    sha256: Sha256
    samples: Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
    index: str | None = None

    @field_validator("file")
    @classmethod
    def _file(cls, file: str) -> str:
        absolute = file.startswith("/") and "\0" not in file
        if not (absolute or is_safe_name(file) or is_plain_url(file)):
            raise ValueError("should be a file's name in this folder, an absolute path or a URL")
        return file

    @model_validator(mode="after")
    def _index(self) -> Self:
        if not is_safe_name(self.index_file):
            raise ValueError("index: should be a file's name in the dataset's folder")
        return self

    @property
    def index_file(self) -> str:
        """The name of the index's file in the dataset's folder."""
        return self.index if self.index is not None else self.file.removesuffix(".tar") + ".index.parquet"


class SplitInfo(_Described):
    """The number of samples of each class in a split, and its shards."""

    counts: dict[str, Count]
    shards: Annotated[list[ShardInfo], Field(min_length=1)]


class LeakInfo(_Described):
    """Images and patients that are there several times, and the treatment of them; leaks.csv lists them.

    Attributes:
        policy: refuse, keep or drop-train, as `--leaks` names them.
        identical: groups of identical images. across: those in several splits. contradictory: those of several classes.
        patients: patients in several splits. dropped: samples that were left out.
    """

    policy: str
    identical: Count
    across: Count
    contradictory: Count
    patients: Count
    dropped: Count


class DatasetInfo(_Described):
    """The content of dataset.json.

    Attributes:
        classes: names in the order of their labels.
        ordinal: their order is one of degree, such as grades of a disease; results then have metrics of distance.
        notes: decisions made when it was prepared: splits that were made, images that were skipped or changed.
        digest: SHA-256 (hex) of classes and samples; see `vipbench.harness.data.digest`. The reader checks it.
    """

    format: Literal["vipbench-dataset/1"] = "vipbench-dataset/1"
    name: str
    modality: str | None
    classes: ClassNames
    splits: Annotated[dict[str, SplitInfo], Field(min_length=1)]
    notes: list[str]
    leaks: LeakInfo | None = None
    ordinal: bool = False
    digest: Sha256

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        check_dataset_name(name, "the dataset's name")
        return name

    @model_validator(mode="after")
    def _counts(self) -> Self:
        for split, info in self.splits.items():
            if split not in SPLITS:
                raise ValueError(f"splits: {split[:50]!r} is none of {', '.join(SPLITS)}")
            if set(info.counts) != set(self.classes):
                raise ValueError(f"counts of {split} are not of the classes")
            if sum(info.counts.values()) != sum(shard.samples for shard in info.shards):
                raise ValueError(f"counts of {split} are not those of its shards")
        return self

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a dataset's description from its folder or URL. Raises UserError where it is none."""
        path = join(folder, INFO)
        if not is_url(path) and not os.path.isfile(path):
            raise UserError(f"{folder}: not a prepared dataset (it has no {INFO}); make one with `vipbench prepare`")
        try:
            info = cls.model_validate_json(read_bytes(path).removeprefix(b"\xef\xbb\xbf"))
        except ValidationError as error:
            raise UserError(
                f"{path}: not a prepared dataset of this version: {first_problem(error)}; "
                "`vipbench prepare` or `vipbench index` writes it anew"
            ) from error
        if is_url(path) and not path.startswith("file://"):
            for shard in (shard for split in info.splits.values() for shard in split.shards):
                if shard.file.startswith(("/", "file:")):
                    raise UserError(
                        f"{path}: names the local file {shard.file[:100]!r}, which a dataset elsewhere may not"
                    )
        return info


def check_dataset_name(name: str, where: str) -> None:
    """Raise UserError unless a name can be part of a folder's name."""
    if not is_safe_name(name) or len(name) > MAX_NAME or not name.isprintable():
        raise UserError(
            f"{where} is {name[:50]!r}; it should be 1 to {MAX_NAME} printable characters without / and \\, "
            "not starting with a dot (--name gives another)"
        )
