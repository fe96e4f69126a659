"""The runner's bookkeeping, with a stand-in for a run: what ran, what failed and why, what is left."""

import json
import logging
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.runs.directory import ALWAYS, METRICS, check_run, write_digests
from vipbench.sweeps import runner
from vipbench.sweeps.executors.local import LocalExecutor, run_locally
from vipbench.sweeps.executors.submissions import cancel
from vipbench.sweeps.plan import plan_units
from vipbench.sweeps.runner import LAUNCH, LaunchRecord, retry, run_sweep
from vipbench.sweeps.status import sweep_status
from vipbench.sweeps.units import CLAIMS, DAMAGED, FAILED, JOBS, PLAN, RUNS, Unit, failure_reason, record_end

# Counts its calls, fails for seed 2 while a file "broken" lies beside it, and leaves a finished run directory otherwise.
STAND_IN = """
import pathlib, sys, yaml
config = pathlib.Path(sys.argv[1])
content = yaml.safe_load(config.read_text())
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(f"{content['seed']}\\n")
if content["seed"] == 2 and (here / "broken").exists():
    print("a traceback")
    sys.exit("no luck today")
run = pathlib.Path(content["run"]["out"]) / config.stem
run.mkdir(parents=True)
for name in ("config.yaml", "provenance.json", "predictions.parquet", "metrics.json"):
    (run / name).write_text("{}")
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> tuple[str, str]:
    script = tmp_path / "run.py"
    script.write_text(STAND_IN)
    return sys.executable, str(script)


@pytest.fixture
def grid(base_config: dict[str, Any], tmp_path: Path) -> Path:
    """Three seeds of a method that trains and of one that does not: six combinations, four runs."""
    base = {key: value for key, value in base_config.items() if key != "train"}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"base": base, "axes": {"method": ["zero_shot", "coop"], "seed": [1, 2, 3]}}))
    return path


def test_only_what_is_missing_runs(
    grid: Path, stand_in: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, broken, calls = tmp_path / "out #1: é", tmp_path / "broken", tmp_path / "calls"
    broken.touch()
    with caplog.at_level(logging.INFO, "vipbench.sweeps"):
        states = run_sweep(grid, out, LocalExecutor(jobs=2), command=stand_in)
    assert "6 combinations are 4 different runs" in caplog.text
    assert [state.state for state in states] == ["done", "done", "failed", "done"]
    assert states[2].reason == "no luck today"
    record = json.loads((out / FAILED / f"{states[2].name}.json").read_text())
    assert (record["error"], record["exit_status"]) == ("no luck today", 1)
    assert Path(record["log"]).read_text() == "a traceback\nno luck today\n"
    assert sorted(calls.read_text().split()) == ["0", "1", "2", "3"]

    broken.unlink()
    calls.unlink()
    states = run_sweep(grid, out, LocalExecutor(jobs=2), command=stand_in)
    assert [state.state for state in states] == ["done"] * 4
    assert calls.read_text().split() == ["2"]
    assert not list((out / FAILED).iterdir())


def test_an_executor_is_not_started_for_nothing(
    grid: Path, stand_in: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else torchrun would start its processes, and Slurm be asked for the size of its arrays."""
    given: list[int] = []
    work = LocalExecutor.run

    def run(self: LocalExecutor, out: Path, units: list[Unit]) -> None:
        given.append(len(units))
        work(self, out, units)

    monkeypatch.setattr(LocalExecutor, "run", run)
    for _ in range(2):
        states = run_sweep(grid, tmp_path / "out", command=stand_in)
        assert [state.state for state in states] == ["done"] * 4
    assert given == [4]


def test_two_runners_do_not_share_a_sweep(grid: Path, stand_in: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(UserError, match="another process is working on this sweep"):
        run_sweep(grid, out, command=stand_in)


def test_the_reason_says_how_a_run_ended_where_its_log_does_not(tmp_path: Path) -> None:
    codes = {"killed": "import os; print('step 3', flush=True); os.kill(os.getpid(), 9)", "well": "print('bye')"}
    tasks = [Unit((name,), (sys.executable, "-c", code), tmp_path / name) for name, code in codes.items()]
    reasons = {task.names[0]: failure_reason(status, task.log) for task, status in run_locally(tasks, jobs=1)}
    assert reasons["killed"] == "killed by SIGKILL; it said last: step 3"
    assert reasons["well"].startswith("it ended without an error but left no run directory")


def test_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    task = Unit(("show",), (sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])"), tmp_path / "log")
    for given, jobs, shown in ((None, 4, "8"), ("3", 1, "3")):  # one task alone has all cores, whatever --jobs says
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert [status for _, status in run_locally([task], jobs)] == [0]
        assert task.log.read_text().strip() == shown


def test_each_run_gets_a_gpu_that_no_other_uses(tmp_path: Path) -> None:
    code = (
        "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], time.time()); time.sleep(0.4); print(time.time())"
    )
    units = [Unit((name,), (sys.executable, "-c", code), tmp_path / name) for name in "abcd"]
    for gpus, jobs in ((("3", "5"), 2), (("3", "5"), 4)):
        assert [status for _, status in run_locally(units, jobs, gpus)] == [0] * 4
        times: dict[str, list[tuple[float, float]]] = {}
        for unit in units:
            gpu, began, ended = unit.log.read_text().split()
            times.setdefault(gpu, []).append((float(began), float(ended)))
        assert {gpu: len(spans) for gpu, spans in times.items()} == {"3": 2, "5": 2}
        together = any(first[1] > second[0] for spans in times.values() for first, second in pairwise(sorted(spans)))
        assert together == (jobs == 4), "more jobs than GPUs share them evenly, as many do not share"


def test_status_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / RUNS).mkdir()
    (tmp_path / FAILED).mkdir()
    (tmp_path / PLAN).write_text(json.dumps({"runs": ["a", "b"]}))
    (tmp_path / FAILED / "b.json").write_text(json.dumps({"error": "out of luck", "exit_status": 1, "log": "b.log"}))
    assert [tuple(state) for state in sweep_status(tmp_path)] == [
        ("a", "pending", "", False),
        ("b", "failed", "out of luck", False),
    ]
    code = (
        "import sys; from vipbench.harness.cli import app\n"
        f"app(['sweep', 'status', {str(tmp_path)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'open_clip', 'pandas'} & set(sys.modules); sys.exit(f'loads {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "failed   b  out of luck" in result.stdout
    assert "0 done, 0 running, 1 pending, 1 failed" in result.stdout


def test_another_plan_in_a_folder_leaves_the_first_one_readable(
    grid: Path, stand_in: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, other = tmp_path / "out", tmp_path / "other.yaml"
    first = run_sweep(grid, out, command=stand_in)
    content = yaml.safe_load(grid.read_text())
    other.write_text(yaml.safe_dump({**content, "axes": {"method": ["coop"], "seed": [3, 4]}}))
    with caplog.at_level(logging.WARNING, "vipbench.sweeps"):
        second = run_sweep(other, out, command=stand_in)
    assert f"{out}: planned here before, from {grid}: 4 runs, which stay" in caplog.text
    assert [state.state for state in second] == ["done"] * 2, "what this grid plans, and no more"
    names = [state.name for state in sweep_status(out)]
    assert names == [*(state.name for state in first), second[1].name]
    assert json.loads((out / PLAN).read_text())["runs"] == names, "the order of a table"
    assert "5 done" in CliRunner().invoke(app, ["sweep", "status", str(out)]).output

    caplog.clear()
    run_sweep(other, out, command=stand_in)
    other.write_text(yaml.safe_dump({**content, "axes": {"method": ["zero_shot", "coop"], "seed": [1, 2, 3, 4]}}))
    run_sweep(other, out, command=stand_in)
    assert len(sweep_status(out)) == 5
    assert len(json.loads((out / PLAN).read_text())["plans"]) == 1, "a plan that holds the others takes their place"


@pytest.mark.parametrize(
    "place", ["a file", "beneath a file", "a folder that cannot be", "runs is a file", "a plan is a folder"]
)
def test_an_impossible_output_is_one_line(grid: Path, stand_in: tuple[str, str], tmp_path: Path, place: str) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    (folder / PLAN).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / RUNS).touch()
    places = {
        "a file": file,
        "beneath a file": file / "out",
        "a folder that cannot be": Path("/proc/vipbench"),
        "runs is a file": tmp_path / "other",
        "a plan is a folder": folder,
    }
    with pytest.raises(UserError, match=str(places[place])) as caught:
        run_sweep(grid, places[place], command=stand_in)
    assert "\n" not in str(caught.value)
    assert file.read_text() == "mine"


def test_a_sweep_that_was_interrupted_while_it_planned(
    grid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(runner, "write_plan", interrupted)
    result = CliRunner().invoke(app, ["sweep", "run", str(grid), "--out", str(out)])
    assert result.exit_code == 130
    assert result.output.splitlines() == [
        "interrupted: what was running has been stopped; the same command runs what is missing"
    ]
    result = CliRunner().invoke(app, ["sweep", "status", str(out)])
    assert result.exit_code == 0
    assert "nothing was planned here yet; the same `vipbench sweep run` goes on" in result.output
    with pytest.raises(UserError, match="nothing was planned here yet"):
        retry(out, only_failed=False)


@pytest.mark.parametrize(
    ("status", "failures"),
    [(143, 0), (138, 0), (130, 0), (-signal.SIGTERM, 0), (-signal.SIGINT, 0), (-signal.SIGKILL, 1), (2, 1), (1, 1)],
)
def test_interrupted_is_not_failed(tmp_path: Path, status: int, failures: int) -> None:
    unit = Unit(("a",), (), tmp_path / "log")
    assert record_end(tmp_path, unit, status) == failures
    assert (tmp_path / FAILED / "a.json").exists() == bool(failures)


def test_a_run_at_work_elsewhere_is_neither_started_nor_failed(
    grid: Path, stand_in: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meet a run that a killed runner left behind; where it ends soon it is waited for."""
    out = tmp_path / "out"
    (tmp_path / "broken").touch()
    name = run_sweep(grid, out, command=stand_in)[2].name
    (tmp_path / "calls").unlink()
    monkeypatch.setattr(runner, "SECONDS_TO_END", 0.5)
    with FileLock(out / CLAIMS / f"{name}.lock"):  # it is being started
        run_sweep(grid, out, command=stand_in)
    assert not (tmp_path / "calls").exists()
    with FileLock(out / RUNS / f".{name}.lock"):
        assert [state.state for state in run_sweep(grid, out, command=stand_in)][2] == "running"
        assert record_end(out, Unit((name,), (), tmp_path / "log"), 2) == 0
    assert not (tmp_path / "calls").exists()
    (tmp_path / "broken").unlink()
    assert [state.state for state in run_sweep(grid, out, command=stand_in)] == ["done"] * 4


def test_what_failed_is_not_packed_again(grid: Path, stand_in: tuple[str, str], tmp_path: Path) -> None:
    """Else a run that takes its process with it would take the others with it for ever."""
    out = tmp_path / "out"
    run_sweep(grid, out, command=stand_in, overrides=["run.device=cpu"])
    names = [state.name for state in sweep_status(out)]
    units = plan_units(out, names, stand_in, pack=True)
    assert [unit.names for unit in units] == [(names[0],), tuple(names[1:])]
    (out / FAILED / f"{names[2]}.json").write_text("{}")
    units = plan_units(out, names, stand_in, pack=True)
    assert [unit.names for unit in units] == [(names[0],), (names[1], names[3]), (names[2],)]


@pytest.mark.parametrize("content", ["{", "[]", '{"eror": 1}', "\0", "7"])
@pytest.mark.parametrize("place", ["record", "own words"])
def test_a_damaged_run_is_named_and_the_others_are_shown(tmp_path: Path, content: str, place: str) -> None:
    (tmp_path / PLAN).write_text(json.dumps({"runs": ["a", "b", "c"]}))
    damaged = tmp_path / FAILED / "b.json" if place == "record" else tmp_path / RUNS / "b.partial" / "failed.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text(content)
    (tmp_path / RUNS / "c").mkdir(parents=True)
    for name in ALWAYS:
        (tmp_path / RUNS / "c" / name).write_text("{}")
    states = sweep_status(tmp_path)
    assert [state.state for state in states] == ["pending", "failed", "done"]
    assert "damaged" in states[1].reason and str(damaged) in states[1].reason
    assert record_end(tmp_path, Unit(("b",), (), tmp_path / "log"), 1) == 1, "it can be recorded anew"


@pytest.mark.parametrize("content", ["[]", "{}", '{"runs": 3}', '{"plans": [3]}', '{"plans": {}}', '{"runs": [["a"]]}'])
def test_a_damaged_plan_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / PLAN).write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / PLAN)):
        sweep_status(tmp_path)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder beside that of a sweep, `tmp_path / "out"`; it looks like a finished run that was damaged."""
    folder = tmp_path / "victim"
    folder.mkdir()
    for name in ALWAYS:
        (folder / name).write_text("{}")
    write_digests(folder)
    (folder / METRICS).write_text("mine")
    for name in (RUNS, DAMAGED, FAILED, JOBS):
        (tmp_path / "out" / name).mkdir(parents=True)
    return folder


PATHS = pytest.mark.parametrize("path", ["../../victim", "{victim}", "..", ".hidden", "a/b", "", "a" * 201, "a\n"])


@PATHS
def test_the_name_of_a_run_is_no_path(tmp_path: Path, victim: Path, path: str) -> None:
    out = tmp_path / "out"
    (out / PLAN).write_text(json.dumps({"runs": ["a", path.format(victim=victim)]}))
    (out / LAUNCH).write_text(json.dumps({"executor": {"kind": "local"}, "pack": False}))
    with pytest.raises(UserError) as caught:
        retry(out, only_failed=False, command=(sys.executable, "-c", "pass"))
    assert str(caught.value).startswith(f"{out / PLAN}: runs[1]: string should match pattern")
    assert "\n" not in str(caught.value)
    assert (victim / METRICS).read_text() == "mine"


@PATHS
@pytest.mark.parametrize("place", ["name", "units"])
def test_the_names_of_a_submission_are_no_paths(tmp_path: Path, victim: Path, path: str, place: str) -> None:
    record: dict[str, Any] = {"name": "vipbench-1", "time": 1.0, "units": [["a"]]}
    named = path.format(victim=victim)
    record[place] = named if place == "name" else [[named]]
    (tmp_path / "out" / JOBS / "x.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"x\.json: (name|units\[0\]\[0\]): string should match pattern"):
        cancel(tmp_path / "out" / JOBS)


def test_a_damaged_record_of_a_submission_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / PLAN).write_text(json.dumps({"runs": ["a"]}))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "x.json").write_text('{"name": 5}')
    assert [state.state for state in sweep_status(tmp_path)] == ["pending"]
    assert f"{tmp_path / 'jobs' / 'x.json'}: " in caplog.text


@pytest.mark.parametrize(
    ("damage", "command"), [("changed", "run"), ("missing", "retry"), ("no list", "retry --failed")]
)
def test_a_finished_run_that_is_damaged_is_shown_and_run_again(
    grid: Path, stand_in: tuple[str, str], tmp_path: Path, damage: str, command: str
) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    name = run_sweep(grid, out, command=stand_in)[1].name
    run = out / RUNS / name
    write_digests(run)
    assert [state.state for state in sweep_status(out)] == ["done"] * 4
    if damage == "missing":
        (run / "provenance.json").unlink()
    else:
        (run / {"changed": "predictions.parquet", "no list": "files.json"}[damage]).write_text("[]")
    state = sweep_status(out)[1]
    file = {
        "changed": "predictions.parquet: damaged",
        "missing": "provenance.json: missing",
        "no list": "files.json: dam",
    }
    assert state.state == "damaged" and state.reason.startswith(f"{run}/{file[damage]}"), state
    assert state.reason.endswith("; `vipbench sweep retry` runs it again")
    result = CliRunner().invoke(app, ["sweep", "status", str(out)])
    assert f"damaged  {name}  {run}" in result.output
    assert result.output.splitlines()[-1] == "3 done, 0 running, 0 pending, 0 failed, 1 damaged"

    calls.unlink()
    if command == "run":
        run_sweep(grid, out, command=stand_in)
    else:
        retry(out, only_failed=command == "retry --failed", command=stand_in)
    assert calls.read_text().split() == ["1"], "no other run is run again"
    assert [state.state for state in sweep_status(out)] == ["done"] * 4
    assert (out / "damaged" / name / "metrics.json").is_file(), "the damaged one is kept"


def test_large_files_are_not_read_for_a_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of runs are shown in seconds; `vipbench table` reads every byte."""
    run = tmp_path / RUNS / "a"
    run.mkdir(parents=True)
    for name in ALWAYS:
        (run / name).write_text(name)
    write_digests(run)
    (tmp_path / PLAN).write_text(json.dumps({"runs": ["a"]}))
    (run / "predictions.parquet").write_text("x" * len("predictions.parquet"))
    assert sweep_status(tmp_path)[0].state == "damaged"
    monkeypatch.setattr("vipbench.sweeps.status.SMALL_FILE", len("predictions.parquet") - 1)
    assert sweep_status(tmp_path)[0].state == "done"
    with pytest.raises(UserError, match=r"predictions\.parquet: damaged"):
        check_run(run)


def test_a_sweep_of_an_earlier_version_is_retried(grid: Path, stand_in: tuple[str, str], tmp_path: Path) -> None:
    """Its record of the launch has another name."""
    out = tmp_path / "out"
    (tmp_path / "broken").touch()
    run_sweep(grid, out, LocalExecutor(jobs=2), command=stand_in)
    (out / LAUNCH).rename(out / "how.json")
    assert LaunchRecord.read(out).executor == LocalExecutor(jobs=2)
    (tmp_path / "broken").unlink()
    assert [state.state for state in retry(out, only_failed=True, command=stand_in)] == ["done"] * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"executor": {"kind": "torchrun", "nproc_per_nod": 2}, "pack": False},
            "unknown key; did you mean 'nproc_per_node'",
        ),
        ({"executor": {"kind": "cloud"}, "pack": False}, "executor: .*'local', 'in_process', 'torchrun', 'slurm'"),
        ({"executor": {"kind": "local"}}, "pack: is missing"),
        ([], "should be a mapping of keys"),
    ],
)
def test_a_damaged_record_of_a_launch_is_one_line(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / LAUNCH).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^{tmp_path / LAUNCH}: .*{message}"):
        LaunchRecord.read(tmp_path)
