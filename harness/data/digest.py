"""The digest of a dataset's content, which is part of the identity of every run on it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 1 << 16  # at a time, which bounds memory
PLAIN = r"^[ !#-\[\]-~]*$"  # what JSON writes as it is: printable ASCII without " and \


class Listed(Protocol):
    """The samples of a split: keys, labels [N] int64, and SHA-256 of each image's bytes [N, 32] uint8."""

    @property
    def names(self) -> pa.Array: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def digests(self) -> np.ndarray: ...
    def __len__(self) -> int: ...


def content_digest(classes: Sequence[str], splits: Mapping[str, Listed]) -> str:
    """SHA-256 (hex) of classes and sorted (split, key, label, SHA-256 of the stored image), one JSON line each.

    Args:
        splits: all samples of each split, in the order of their keys.
    """
    digest = hashlib.sha256(json.dumps(list(classes)).encode() + b"\n")
    for split in sorted(splits):
        samples = splits[split]
        for first in range(0, len(samples), ROWS):
            rows = slice(first, first + ROWS)
            digest.update(_lines(split, samples.names[rows], samples.labels[rows], samples.digests[rows]))
    return digest.hexdigest()


def _lines(split: str, keys: pa.Array, labels: np.ndarray, digests: np.ndarray) -> memoryview:
    """json.dumps([split, key, label, digest]) and a newline for each row, made by Arrow: a million take about a second."""
    text = pa.large_string()
    if not pc.all(pc.match_substring_regex(keys, PLAIN)).as_py():
        keys = pa.array([json.dumps(key)[1:-1] for key in keys.to_pylist()], text)
    hexadecimal = pa.array(np.frombuffer(digests.tobytes().hex().encode(), "S64"), pa.binary()).cast(text)
    columns = (f'[{json.dumps(split)}, "', keys, '", ', pa.array(labels).cast(text), ', "', hexadecimal, '"]\n', "")
    joined = pc.binary_join_element_wise(
        *(pa.scalar(part, text) if isinstance(part, str) else part for part in columns)
    )
    offsets = np.frombuffer(joined.buffers()[1], np.int64)[joined.offset : joined.offset + len(joined) + 1]
    return memoryview(joined.buffers()[2])[offsets[0] : offsets[-1]]
