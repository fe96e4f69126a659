"""The API key of an LLM server: from a file or the environment, never from a command line."""

import os
from pathlib import Path

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import read_whole

MOST_KEY_BYTES = 1 << 20
KEY_VARIABLE = "VIPBENCH_API_KEY"
KEY_ADVICE = f"give --api-key-file FILE, or set {KEY_VARIABLE}"


def read_key(file: Path | None) -> str | None:
    """Read the API key from a file or the environment; None where there is none.

    Raises:
        UserError: the file cannot be read, or holds no key (its content is not shown).
    """
    try:
        key = (
            read_whole(file, MOST_KEY_BYTES).decode("utf-8-sig").strip()
            if file
            else os.environ.get(KEY_VARIABLE, "").strip()
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file: {file}: cannot be read as text: {error}") from None
    if (file and not key) or not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{file or KEY_VARIABLE}: holds no API key, which is one line without spaces")
    return key or None
