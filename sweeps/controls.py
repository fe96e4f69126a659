"""Runs of a symptom set and of its controls: derived sets, a grid, and the finished runs of each line of the comparison.

Under OUT: sets/SET/ (the derived symptom sets), grid.yaml (the grid, a sweep's like any other), and what sweeps/runner.py writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from vipbench.harness.config.overrides import read_assignments
from vipbench.harness.data.info import DatasetInfo
from vipbench.harness.errors import UserError
from vipbench.harness.report.controls import CONTROL, KNOWLEDGE, PLACES, THE_SET, Line
from vipbench.harness.report.figures.data import Group
from vipbench.harness.report.rows import load_runs
from vipbench.harness.symptoms import controls
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.harness.system.files import output_errors, write_text
from vipbench.sweeps.executors.base import Executor
from vipbench.sweeps.executors.in_process import InProcessExecutor
from vipbench.sweeps.runner import run_sweep
from vipbench.sweeps.status import RunState

SETS, GRID = "sets", "grid.yaml"
NAMES, WORDS, SHUFFLED = "class names", "random words", "symptoms of another class"
OTHERS = ("description", "definition")  # other sets, which are compared where they are given or lie beside the set
DECIDED = ("seed", "symptoms", "data.path", "data.shots", "backbone", "method", "method.name", "run.out")
OF_VIP = ("train", "method", "recipe", "grid")  # sections whose overrides are for the runs of ViP


class Planned(NamedTuple):
    """A run of a line: the changes to the grid's base that make it, and the digest of its symptom set."""

    changes: dict[str, Any]
    digest: str | None


@dataclass(frozen=True)
class Arm:
    """A line before its runs are run: the method that reads texts (WaffleCLIP counts as zero-shot), and their name."""

    reader: str
    texts: str
    kind: str
    runs: Sequence[Planned]


class Compared(NamedTuple):
    """A set and its controls, run.

    Attributes:
        runs: the finished runs, as `load_runs` gives them. left_out: sentences on what is not compared.
    """

    lines: list[Line]
    runs: pd.DataFrame
    states: list[RunState]
    left_out: list[str]


@dataclass(frozen=True)
class Plan:
    """Settings of a comparison.

    Attributes:
        file: the set. data: a prepared dataset. out: the sweep's folder.
        knowledge: other sets by kind; None: the file of that name beside the set, if it is there.
        seeds: runs of ViP with each set. draws: of random words, of shuffled classes, and of WaffleCLIP without training.
    """

    file: Path
    data: str
    backbone: Mapping[str, Any]
    out: Path
    knowledge: Mapping[str, Path | None]
    shots: int | str = "all"
    seeds: int = 5
    draws: int = 7
    device: str = "auto"


def run_controls(plan: Plan, overrides: Sequence[str] = (), executor: Executor | None = None) -> Compared:
    """Run what is missing of a comparison; returns all of it.

    Args:
        overrides: `train`, `method`, `recipe` and `grid` for the runs of ViP, anything else for all.
        executor: None: in this process.

    Raises:
        UserError: the set does not fit the data, an override is of what the comparison decides, or no run finished.
    """
    for_vip, for_all = _overrides(overrides)
    arms, left_out = _arms(plan, for_vip)
    base = {
        "data": {"path": plan.data, "shots": plan.shots},
        "backbone": dict(plan.backbone),
        "run": {"device": plan.device},
    }
    grid = {"base": base, "include": [planned.changes for arm in arms for planned in arm.runs]}
    with output_errors(plan.out):
        write_text(plan.out / GRID, yaml.safe_dump(grid, sort_keys=False, allow_unicode=True))
    states = run_sweep(plan.out / GRID, plan.out, executor or InProcessExecutor(), for_all, pack=True)
    names = {state.name for state in states}
    runs = load_runs(plan.out)
    attrs, ours = runs.attrs, runs["run"].map(lambda run: Path(run).name in names)
    attrs["missing"] = [row for row in attrs["missing"] if Path(row["run"]).name in names]
    runs = runs[ours].reset_index(drop=True)
    runs.attrs = attrs
    found = runs.to_dict("records")
    return Compared([_line(arm, found) for arm in arms], runs, states, left_out)


def _overrides(given: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Overrides for the runs of ViP, as changes, and those for all runs, as assignments."""
    for_vip: dict[str, Any] = {}
    for_all = []
    for one in given:
        keys = dict(read_assignments([one]))
        for key in keys:
            if key in DECIDED:
                raise UserError(f"{one}: {key} is not overridden here: the comparison, or an option of it, decides it")
        own = {key: value for key, value in keys.items() if key.partition(".")[0] in OF_VIP}
        if own and len(own) < len(keys):
            raise UserError(f"{one}: holds keys of ViP's runs ({', '.join(own)}) and of all; give two files")
        for_vip |= own
        for_all += [] if own else [one]
    return for_vip, for_all


def _arms(plan: Plan, for_vip: Mapping[str, Any]) -> tuple[list[Arm], list[str]]:
    """The lines of the comparison, and sentences on those that are left out."""
    symptoms, classes = SymptomSet.load(plan.file), DatasetInfo.load(plan.data).classes
    symptoms.texts(classes)  # before the work begins: every class has its symptoms
    sets = plan.out / SETS / f"{plan.file.stem}-{symptoms.digest()[:8]}"  # several sets may be compared in one folder
    most = range(1, max(plan.seeds, plan.draws) + 1)
    words = [_kept(controls.random_words(symptoms, classes, draw), sets / f"random-words-{draw}.json") for draw in most]
    texts = {
        f"the set ({plan.file.stem})": (THE_SET, [(plan.file, symptoms.digest())]),
        NAMES: (CONTROL, [_kept(controls.class_names(symptoms, classes), sets / "class-names.json")]),
        WORDS: (CONTROL, words),
    }
    left_out = []
    if len(classes) > 1:
        others = [_kept(controls.shuffled(symptoms, classes, draw), sets / f"shuffled-{draw}.json") for draw in most]
        texts[SHUFFLED] = (CONTROL, others)
    else:
        left_out.append(f"{SHUFFLED}: there is one class only")
    for kind in OTHERS:
        found = _other_set(plan, kind, symptoms, classes)
        if isinstance(found, str):
            left_out.append(f"{kind}: {found}")
        else:
            texts[kind] = (KNOWLEDGE, [found])
    zero_shot = {name: own for name, own in texts.items() if name != NAMES}
    arms = [Arm("zero_shot", name, kind, _zero_shot(files[: plan.draws])) for name, (kind, files) in zero_shot.items()]
    named = [
        Arm("zero_shot", name, CONTROL, [Planned({"method": {"name": "zero_shot", "text": text}}, None)])
        for name, text in ((NAMES, "class_names"), ("class names in templates", "templates"))
    ]
    waffle = [Planned({"method": {"name": "waffle"}, "seed": draw}, None) for draw in range(1, plan.draws + 1)]
    arms[1:1] = [*named, Arm("zero_shot", "WaffleCLIP", CONTROL, waffle)]
    vip = [Arm("vip", name, kind, _vip(files, plan.seeds, for_vip)) for name, (kind, files) in texts.items()]
    return arms + vip, left_out


def _zero_shot(files: Sequence[tuple[Path, str]]) -> list[Planned]:
    method = {"name": "zero_shot", "text": "symptoms"}
    return [Planned({"method": method, "symptoms": str(file)}, digest) for file, digest in files]


def _vip(files: Sequence[tuple[Path, str]], seeds: int, changes: Mapping[str, Any]) -> list[Planned]:
    """A run for each seed; where a set is drawn, each has a draw of its own."""
    chosen = [files[seed % len(files)] for seed in range(seeds)]
    return [
        Planned({"method": {"name": "vip"}, **changes, "symptoms": str(file), "seed": seed}, digest)
        for seed, (file, digest) in enumerate(chosen, start=1)
    ]


def _other_set(plan: Plan, kind: str, symptoms: SymptomSet, classes: Sequence[str]) -> tuple[Path, str] | str:
    """The set of another kind of knowledge and its digest, or why there is none."""
    given = plan.knowledge.get(kind)
    path = given or plan.file.with_name(f"{kind}.json")
    if not given and not path.is_file():
        return f"there is no {path} (--{kind} FILE)"
    try:
        other = SymptomSet.load(path)
        other.texts(classes)
    except UserError as error:
        if given:
            raise
        return f"{path} does not fit: {error}"
    return f"{path} is the set itself" if other.digest() == symptoms.digest() else (path, other.digest())


def _kept(symptoms: SymptomSet, path: Path) -> tuple[Path, str]:
    """Write a derived set, unless the file holds it already, whatever the day on which it was made."""
    digest = symptoms.digest()
    with output_errors(path):
        if not (path.is_file() and SymptomSet.load(path).digest() == digest):
            symptoms.save(path)
    return path, digest


def _line(arm: Arm, rows: Sequence[Mapping[Any, Any]]) -> Line:
    """The finished runs of a line, each once: draws may come to the same set."""
    found: dict[str, tuple[int | None, dict[Any, Any]]] = {}
    for number, planned in enumerate(arm.runs, start=1):
        row = next((row for row in rows if _is(row, planned)), None)
        if row is not None:
            found.setdefault(row["run"], (number if len(arm.runs) > 1 else None, dict(row)))
    runs = [row for _, row in found.values()]
    place = tuple(runs[0][name] for name in PLACES.values()) if runs else ()
    return Line(arm.kind, Group((arm.reader, arm.texts), place, runs), [key for key, _ in found.values()])


def _is(row: Mapping[Any, Any], planned: Planned) -> bool:
    """Check that a run is the one that was planned, by its method and what it read."""
    method, digest = planned.changes["method"], row.get("digests.symptoms")
    return bool(
        row["method.name"] == method["name"]
        and ("text" not in method or row["method.text"] == method["text"])
        and ("seed" not in planned.changes or row["seed"] == planned.changes["seed"])
        and (digest if isinstance(digest, str) else None) == planned.digest
    )
