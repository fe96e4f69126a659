"""Settings, run directories, sweeps and stored features."""

import contextlib
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from filelock import FileLock

from tests.fuzz.kind import Kind, Sound, each, quick_config, verb
from vipbench.harness.errors import UserError
from vipbench.harness.features.cache import FeatureBank
from vipbench.harness.runs.directory import write_digests
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.resolve import load_config
from vipbench.harness.system.files import digest_file, digest_json, read_json, write_json
from vipbench.harness.training.checkpoint import FORMAT
from vipbench.sweeps.executors.profile import Profile
from vipbench.sweeps.grid import read_grid


def _make_config(sound: Sound, folder: Path) -> None:
    (folder / "config.yaml").write_text(quick_config(sound, Path("runs")).to_yaml())
    overrides = ["seed=2", "data.shots=4", "method.context_length=3", "train.lr=0.1", "run.tracking=[mlflow]"]
    (folder / "overrides.jsonl").write_text("\n".join(json.dumps(word) for word in overrides))


def _use_config(sound: Sound, folder: Path, rng: Random) -> None:
    file = folder / "overrides.jsonl"  # stands for words of the command line
    words = file.open("rb").read(1 << 17).splitlines() if file.is_file() else []
    overrides = [word.decode("utf-8", "surrogateescape").strip('"') for word in words]
    each(lambda: verb("config", folder / "config.yaml"), lambda: load_config(folder / "config.yaml", overrides))


def _make_grid(sound: Sound, folder: Path) -> None:
    base = {key: value for key, value in sound.config.items() if key != "train"}
    base |= {"vars": {"out": "elsewhere"}, "run": {"out": "runs/$out"}}
    rules = {"adjust": [{"where": {"seed": 2}, "set": {"data.shots": 4}}], "exclude": [{"method": "coop", "seed": 1}]}
    grid = {"base": base, "axes": {"method": ["coop", "zero_shot"], "seed": [1, 2]}, **rules, "include": [{"seed": 9}]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    profile = {"partition": "gpu", "time": "4:00:00", "gpus_per_run": 8, "nodes_per_run": 2, "setup": ["true"]}
    (folder / "profile.yaml").write_text(yaml.safe_dump({**profile, "options": {"exclude": "n1"}, "mem": "32G"}))


def _use_grid(sound: Sound, folder: Path, rng: Random) -> None:
    each(lambda: read_grid(folder / "grid.yaml"), lambda: Profile.load(folder / "profile.yaml", {}).sbatch())


def _make_run(sound: Sound, folder: Path) -> None:
    execute(quick_config(sound, folder / "runs"))
    execute(quick_config(sound, folder / "runs", "seed=2"))
    shutil.rmtree(folder / "runs" / ".bank")
    names = [path.name for path in sorted((folder / "runs").glob("vip_*"))]
    write_json(folder / "sweep.json", {"plans": [{"grid": "g.yaml", "runs": names}]})


def _seal_run(folder: Path) -> None:
    for run in (folder / "runs").glob("vip_*"):
        write_digests(run)


def _use_table(sound: Sound, folder: Path, rng: Random) -> None:
    verb("table", folder, "--rows", "seed", "--columns", "shots", "--format", rng.choice(["md", "csv", "latex"]))


def _use_evaluate(sound: Sound, folder: Path, rng: Random) -> None:
    run = sorted((folder / "runs").glob("vip_*"))[0]
    verb("evaluate", run, "--data", sound.dataset, "--device", "cpu")


def _make_partial(sound: Sound, folder: Path) -> None:
    """A run that ended after its training, before its test; and a sweep of it."""

    def stop(*_: object) -> None:
        raise UserError("stopped")

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(UserError):
        patch.setattr(Job, "test", stop)
        execute(quick_config(sound, folder / "runs"))
    name = next((folder / "runs").glob("vip_*.partial")).name.removesuffix(".partial")
    write_json(folder / "sweep.json", {"plans": [{"grid": "g.yaml", "runs": [name, "a_failed", "a_job"]}]})
    for part in ("failed", "logs", "jobs"):
        (folder / part).mkdir()
    write_json(folder / "failed" / "a_failed.json", {"error": "no luck", "exit_status": 1, "log": "logs/a_failed.log"})
    (folder / "logs" / "a_job.log").write_text("a line\nan error\n")
    job = {"name": "vipbench-1", "time": 1.0, "units": [["a_job"]], "job": "7", "cancelled": False}
    write_json(folder / "jobs" / "vipbench-1.json", job)


def _seal_partial(folder: Path) -> None:
    for path in (folder / "runs").glob("vip_*/checkpoints/*.json"):
        content = read_json(path)
        content.pop("sha256")
        content |= {"format": FORMAT, "tensors": digest_file(path.with_suffix(".safetensors"))}
        write_json(path, {**content, "sha256": digest_json(content)})


def _use_status(sound: Sound, folder: Path, rng: Random) -> None:
    name = next((folder / "runs").glob("vip_*.partial")).name.removesuffix(".partial")
    with FileLock(folder / "runs" / f".{name}.lock") if rng.random() < 0.6 else contextlib.nullcontext():
        verb("sweep", "status", folder)


def _use_resume(sound: Sound, folder: Path, rng: Random) -> None:
    execute(quick_config(sound, folder / "runs"))


def _make_bank(sound: Sound, folder: Path) -> None:
    execute(quick_config(sound, folder))
    for path in folder.glob("vip_*"):
        shutil.rmtree(path)
    (folder / ".bank").rename(folder / "bank")
    facts = [read_json(path) for path in sorted((folder / "bank").glob("*/facts.json"))]
    write_json(folder / "kept.json", facts)


def _use_bank(sound: Sound, folder: Path, rng: Random) -> None:
    facts = rng.choice(read_json(folder / "kept.json"))
    count, dim = facts["samples"], facts["dim"]

    def read() -> None:
        bank = FeatureBank(folder / "bank", facts, count, dim)
        bank.read(0, torch.arange(count).numpy())
        bank.write(0, torch.arange(1).numpy(), torch.zeros(1, dim))

    bank = folder / "bank"
    each(*(lambda word=word: verb("bank", word, bank) for word in ("ls", "verify")), read)
    verb("bank", "prune", bank, "--keep-gib", "0")


RUN_FILES = ("runs/vip_*/*", "sweep.json")
KINDS = {
    "config": Kind(_make_config, ("*",), _use_config),
    "grid": Kind(_make_grid, ("*",), _use_grid),
    "table": Kind(_make_run, RUN_FILES, _use_table, _seal_run),
    "evaluate": Kind(_make_run, RUN_FILES[:1], _use_evaluate, _seal_run),
    "status": Kind(_make_partial, ("runs/vip_*/*", "*.json", "failed/*", "logs/*", "jobs/*"), _use_status),
    "resume": Kind(_make_partial, ("runs/vip_*/*", "runs/vip_*/checkpoints/*"), _use_resume, _seal_partial),
    "bank": Kind(_make_bank, ("bank/*/*",), _use_bank),
}
