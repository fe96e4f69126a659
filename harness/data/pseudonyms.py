"""Pseudonyms: codes in the place of ids, the same for the same id and key, and no way back to the id without the key."""

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import output_errors, read_whole

KEY_BYTES = 32
DIGITS = 16  # hexadecimal ones of a pseudonym: 64 bits
KEY = re.compile(rb"[0-9a-f]{64}")


def pseudonym(key: bytes, kind: str, identity: str) -> str:
    """The pseudonym of an id: HMAC-SHA256 (RFC 2104) of what it is of, such as "patient", and the id."""
    return hmac.new(key, f"{kind}\0{identity}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:DIGITS]


def load_key(path: Path) -> bytes:
    """Read a key, 64 hexadecimal digits. Raises UserError where the file holds none."""
    try:
        text = read_whole(path, 1 << 10).strip()
    except OSError as error:
        raise UserError(f"{path}: the key of the pseudonyms cannot be read: {error.strerror}") from error
    if not KEY.fullmatch(text):
        raise UserError(f"{path}: not a key of pseudonyms, which is {2 * KEY_BYTES} hexadecimal digits, lower case")
    return bytes.fromhex(text.decode())


def make_key(path: Path) -> bytes:
    """Read a key, or make one that only its owner may read. Raises UserError where it cannot be written, or as `load_key`."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as temporary:  # of mode 0600
            temporary.write(f"{secrets.token_hex(KEY_BYTES)}\n")
            temporary.flush()
            os.fsync(temporary.fileno())
            with suppress(FileExistsError):  # whole or not there, and never in the place of another
                os.link(temporary.name, path)
    return load_key(path)
