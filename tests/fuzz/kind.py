"""Each kind of file, or of answer, that the program reads: sound originals, and what reads them.

An original is a folder that is made once; a case damages one file of a copy of it (`files`), perhaps renews the checksums over
it (`seal`), so that what comes after their check is reached too, and reads it (`use`) in the folder of the copy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.errors import UserError
from vipbench.harness.runs.resolve import resolve_config

MOST_CHARACTERS = 1500  # of a line


@dataclass(frozen=True)
class Sound:
    """The parts that originals are made of."""

    dataset: Path
    symptoms: Path
    models: Path
    config: dict[str, Any]


class Kind(NamedTuple):
    """A kind of input: see the module's docstring. `files` are patterns of `Path.glob`."""

    make: Callable[[Sound, Path], None]
    files: tuple[str, ...]
    use: Callable[[Sound, Path, Random], None]
    seal: Callable[[Path], None] = lambda folder: None


def verb(*words: object) -> None:
    """Give a command of `vipbench`. Raises what ends it, but for exit status 1 (something is missing or damaged)."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1), result.output


def check_line(error: UserError) -> None:
    """Fail where an error is not one line."""
    text = str(error)
    assert text.isprintable() and 0 < len(text) <= MOST_CHARACTERS, f"no line: {text[:3000]}"


def each(*uses: Callable[[], object]) -> None:
    """Do one after the other, whether or not those before ended in an error of the user's. Raises the last one."""
    last: UserError | None = None
    for use in uses:
        try:
            use()
        except UserError as error:
            check_line(error)
            last = error
    if last:
        raise last


def quick_config(sound: Sound, folder: Path, *overrides: str) -> Config:
    every = ["run.log_every=1", "run.checkpoint_steps=2", "train.epochs=2", f"run.out={folder}", *overrides]
    return resolve_config(override(sound.config, [f"backbone={sound.models / 'vit.json'}", *every]))
