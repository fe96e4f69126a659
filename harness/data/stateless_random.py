"""Randomness that depends on a key alone: never on what was drawn before, on how many, or by which process."""

import hashlib
import json

import numpy as np


def keyed_generator(*key: int | str) -> np.random.Generator:
    """Random numbers for a key such as (seed, epoch, sample id)."""
    return np.random.default_rng(int.from_bytes(keyed_digest(*key), "little"))


def keyed_digest(*key: int | str) -> bytes:
    """16 bytes of BLAKE2b of a key; sorting by them puts things in a random order that is always the same."""
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()


def keyed_number(*key: int | str) -> int:
    """A number between 0 and 2**63 - 1 that depends on a key alone."""
    return int.from_bytes(keyed_digest(*key)[:8], "little") >> 1
