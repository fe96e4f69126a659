"""A damaged file, or answer, ends well or in one line, within 20 s and 4 GiB, and nothing outside of its folder changes.

Each case is one damage, known by its kind, seed and number:

    pytest tests/fuzz --count 300 [--seed 7] [-k images]        pytest tests/fuzz -k images --seed 7 --case 123
"""

import faulthandler
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pyarrow as pa
import pytest

from tests.fuzz import data, models, runs, symptoms
from tests.fuzz.kind import Kind, Sound, each
from tests.fuzz.mutations import SENTINEL, damage
from vipbench.harness.data import reader
from vipbench.harness.errors import UserError
from vipbench.harness.system.files import digest_file

SECONDS, BYTES = 20, 4 << 30
KINDS = runs.KINDS | data.KINDS | models.KINDS | symptoms.KINDS
# What checksums cannot be made of any more.
NO_SEAL = (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException)


class TooSlow(BaseException):
    """A case took longer than it may; no `except Exception` hides it."""


class Calm(Random):
    """Numbers with which nothing unusual is chosen."""

    def random(self) -> float:
        return 0.99


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    numbers = range(option("--count")) if option("--case") is None else [option("--case")]
    metafunc.parametrize(("name", "case"), [(name, case) for name in KINDS for case in numbers], scope="session")


@pytest.fixture(scope="session")
def sound(dataset: Path, symptoms: Path, model_folder: Path, base_config: dict[str, Any]) -> Sound:
    return Sound(dataset, symptoms, model_folder, base_config)


@pytest.fixture(scope="session")
def originals(sound: Sound, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    """The folder of a kind's original, made when it is first asked for."""
    made: dict[Any, Path] = {}

    def original(kind: Kind) -> Path:
        if kind.make not in made:
            made[kind.make] = tmp_path_factory.mktemp("original")
            kind.make(sound, made[kind.make])
        return made[kind.make]

    return original


@contextmanager
def bounded() -> Iterator[None]:
    """Raise what ends a block that takes more than 20 s, or more than 4 GiB of memory of its own beyond what is in use."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    size = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (size + BYTES, limits[1]))
    faulthandler.dump_traceback_later(5 * SECONDS, exit=True, file=2)  # for what no signal interrupts
    signal.alarm(SECONDS)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < SECONDS


def snapshot(folder: Path, without: Path) -> dict[str, str]:
    """List a folder: digests and names of all files and folders, but for those in `without`."""
    found: dict[str, str] = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) != without]
        found |= dict.fromkeys((str(Path(parent, name)) for name in folders), "folder")
        found |= {str(Path(parent, name)): digest_file(Path(parent, name)) for name in files}
    return found


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_what_is_not_damaged_ends_well(
    kind: Kind, sound: Sound, originals: Callable[[Kind], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(originals(kind), tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    kind.seal(tmp_path / "work")
    kind.use(sound, tmp_path / "work", Calm())


@pytest.mark.slow
def test_damage(
    name: str,
    case: int,
    sound: Sound,
    originals: Callable[[Kind], Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, seed = KINDS[name], request.config.getoption("--seed")
    rng = Random(f"{seed}/{name}/{case}")
    work, sentinel = tmp_path / "work", tmp_path / SENTINEL
    shutil.copytree(originals(kind), work)
    for place in ("kept", "kept.txt", "a.jpg"):
        (sentinel / place).parent.mkdir(exist_ok=True)
        (sentinel / place).write_text("of somebody else")
    kept = snapshot(tmp_path, without=work)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    reader._open.cache_clear()
    found = sorted(path for pattern in kind.files for path in work.glob(pattern) if path.is_file())
    file = rng.choice(found)
    form = damage(file, rng)
    sealed = rng.random() < 0.5
    if sealed:
        try:
            kind.seal(work)
        except NO_SEAL:
            sealed = False
    where = f"{file.relative_to(work)}: {form}{', sealed' if sealed else ''}; -k {name} --seed {seed} --case {case}"
    try:
        with bounded():
            each(lambda: kind.use(sound, work, rng))
    except UserError:
        pass  # in one line, as `each` saw
    except BaseException as error:
        error.add_note(where)
        raise
    assert snapshot(tmp_path, without=work) == kept, f"{where}: changed something outside of its folder"
    shutil.rmtree(work)
