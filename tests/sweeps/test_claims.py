"""Claims: processes that share a sweep through its folder run each unit once, and take over from one that dies."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from vipbench.harness.runs.directory import METRICS, PARTIAL
from vipbench.sweeps.executors import claims, torchrun
from vipbench.sweeps.executors.claims import at_work, claimed, failure_times, work_through
from vipbench.sweeps.executors.processes import stop_signals_interrupt
from vipbench.sweeps.executors.torchrun import work
from vipbench.sweeps.units import CLAIMS, CONFIGS, FAILED, LOGS, PACK_COMMAND, RUN_COMMAND, RUNS, Unit, record_end

HOLDER = """
import sys, time
from pathlib import Path
from vipbench.sweeps.executors.claims import claimed
with claimed(Path(sys.argv[1]), ["a"]) as mine:
    print(mine, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(claims, "SECONDS_BETWEEN_LOOKS", 0.02)
    for folder in (RUNS, FAILED, CLAIMS, LOGS):
        (tmp_path / folder).mkdir()
    return tmp_path


def units(out: Path, *groups: str) -> list[Unit]:
    """Units of runs with names of one letter."""
    return [Unit(tuple(names), (), out / LOGS / f"{names[0]}.log") for names in groups]


def finish(out: Path, name: str) -> None:
    (out / RUNS / name).mkdir()
    (out / RUNS / name / METRICS).write_text("{}")


def finishing(out: Path, ran: list[str], status: int = 0) -> Callable[[Unit], int]:
    """A run of a unit that takes a moment, and fails without a run directory where `status` is not 0."""

    def run(unit: Unit) -> int:
        ran.extend(unit.names)
        time.sleep(0.05)
        for name in unit.names if status == 0 else ():
            finish(out, name)
        return status

    return run


def in_background(*arguments: object) -> threading.Thread:
    thread = threading.Thread(target=work_through, args=arguments, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("status", [0, 1])
def test_each_unit_is_run_once_by_one_of_several(out: Path, status: int) -> None:
    """Also one that fails. Locks belong to open files, so threads stand for processes here."""
    planned = units(out, *"abcdefg", "hi")
    ran: list[list[str]] = [[], [], []]
    workers = [in_background(out, planned, finishing(out, ran[rank], status), 3 * rank) for rank in range(3)]
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()
    assert sorted(name for own in ran for name in own) == sorted("abcdefghi")
    assert all(ran), "one of them had nothing to do"
    assert (sorted(path.stem for path in (out / FAILED).iterdir()) == sorted("abcdefghi")) == bool(status)


def test_a_unit_of_a_process_that_is_killed_is_taken_over(out: Path) -> None:
    planned, ran = units(out, "a", "b"), list[str]()
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "True\n"
            assert at_work(out, "a") and not at_work(out, "b")
            worker = in_background(out, planned, finishing(out, ran))
            time.sleep(0.5)
            assert ran == ["b"] and worker.is_alive(), "it waits for the run of the other process"
        finally:
            holder.kill()
    worker.join(10)
    assert ran == ["b", "a"] and not at_work(out, "a")


def test_a_unit_that_another_process_ends_is_not_run_again(out: Path) -> None:
    planned, ran = units(out, "a", "b"), list[str]()
    with claimed(out, ["a"]) as first, claimed(out, ["b"]) as second:
        assert first and second
        worker = in_background(out, planned, finishing(out, ran))
        time.sleep(0.1)
        finish(out, "a")
        assert record_end(out, planned[1], 1) == 1
    worker.join(10)
    assert not worker.is_alive() and ran == []


def test_a_unit_that_ends_just_before_it_is_claimed_is_not_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    @contextmanager
    def after_its_end(out: Path, names: tuple[str, ...]) -> Iterator[bool]:
        finish(out, names[0])
        with claimed(out, names) as mine:
            yield mine

    monkeypatch.setattr(claims, "claimed", after_its_end)
    work_through(out, units(out, "a"), finishing(out, ran))
    assert ran == []


def test_a_run_that_an_orphan_writes_is_waited_for(out: Path) -> None:
    """Its claim is free, but the lock of its directory is not: it is at its last checkpoint."""
    ran: list[str] = []
    (out / RUNS / f"a{PARTIAL}").mkdir()
    with FileLock(out / RUNS / ".a.lock"):
        worker = in_background(out, units(out, "a"), finishing(out, ran))
        time.sleep(0.2)
        assert ran == [] and worker.is_alive()
    worker.join(10)
    assert ran == ["a"]


def test_older_failures_are_tried_again_once(out: Path) -> None:
    planned, ran = units(out, "a", "b"), list[str]()
    for unit in planned:
        record_end(out, unit, 1)
    before = failure_times(out, "ab")
    time.sleep(0.02)
    record_end(out, planned[1], 1)  # by another process that began with this one
    for _ in range(2):
        work_through(out, planned, finishing(out, ran, status=1), 0, before)
    assert ran == ["a"]


def test_a_run_that_stops_as_it_was_asked_to_is_left(out: Path) -> None:
    ran: list[str] = []
    work_through(out, units(out, "a", "b"), finishing(out, ran, status=143))
    assert ran == ["a", "b"] and not list((out / FAILED).iterdir())


def test_claims_on_a_group_are_all_or_none(out: Path) -> None:
    with claimed(out, "b") as mine, claimed(out, "abc") as others:
        assert mine and not others
        assert at_work(out, "b") and not at_work(out, "a") and not at_work(out, "c")


def test_processes_that_look_at_a_claim_do_not_see_each_other(out: Path) -> None:
    with claimed(out, "a"):
        assert at_work(out, "a")
    with (out / CLAIMS / "a.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not at_work(out, "a")


def test_a_unit_ends_with_the_process_that_is_asked_to_end(out: Path) -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(120)"
    unit = Unit(("a",), (sys.executable, "-c", code), out / LOGS / "a.log")

    def ask() -> None:
        while not (unit.log.is_file() and unit.log.read_text().endswith("\n")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), stop_signals_interrupt():
        torchrun._run(unit, os.environ)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int(unit.log.read_text()), 0)


@pytest.mark.parametrize(("given", "gpus"), [("4,7", ["4", "7", "4"]), ("", [None] * 3)])
def test_a_process_starts_its_units_on_its_own_gpu(
    out: Path, monkeypatch: pytest.MonkeyPatch, given: str, gpus: list[str | None]
) -> None:
    task = out / "task.json"
    task.write_text(json.dumps({"units": [["a"], ["b", "c"]], "failures": {}}))
    started: list[tuple[Unit, str | None]] = []

    def run(unit: Unit, environment: dict[str, str]) -> int:
        assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(environment), "it is a run alone"
        started.append((unit, environment.get("CUDA_VISIBLE_DEVICES") or None))
        return 143

    monkeypatch.setattr(torchrun, "_run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    configs = {name: str(out / CONFIGS / f"{name}.yaml") for name in "abc"}
    planned = [
        Unit(("a",), (*RUN_COMMAND, configs["a"]), out / LOGS / "a.log"),
        Unit(("b", "c"), (*PACK_COMMAND, configs["b"], configs["c"]), out / LOGS / "b.log"),
    ]
    for rank, gpu in enumerate(gpus):
        torchruns = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "x"}
        for name, value in torchruns.items():
            monkeypatch.setenv(name, str(value))
        started.clear()
        work(out, task)
        begun_at = rank * 2 // 3
        assert started == [(unit, gpu) for unit in planned[begun_at:] + planned[:begun_at]]
