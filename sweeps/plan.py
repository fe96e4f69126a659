"""Plan a sweep: from a grid to sweep.json, which lists its runs, the config of each, and the units in which they are run."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import read_json, write_json, write_text
from vipbench.sweeps.units import CONFIGS, FAILED, LOCK, PLAN, RUN_COMMAND, RUNS, Name, Unit, unit

log = logging.getLogger(__name__)


class Plan(Section):
    """The runs, each once, that a grid came to."""

    grid: str = ""
    runs: tuple[Name, ...]


def write_plan(grid: Path, out: Path, overrides: Sequence[str] = (), plugins: Sequence[Path] = ()) -> list[str]:
    """Write a grid's plan and configs under `out`; returns the names of its runs, each once. Loads each backbone once."""
    from vipbench.harness.config.identity import Digests, run_name
    from vipbench.harness.config.schema import Config
    from vipbench.harness.data.info import DatasetInfo
    from vipbench.harness.methods.registry import method_digest
    from vipbench.harness.models.backbone import backbone_digest
    from vipbench.harness.symptoms.sets import load_sets, sets_digest
    from vipbench.harness.symptoms.verdict import refuse_unusable
    from vipbench.sweeps.grid import read_grid

    runs_at = f"run.out={json.dumps(str(out / RUNS), ensure_ascii=False)}"  # quoted: overrides are YAML
    configs = read_grid(grid, [*overrides, runs_at], plugins)
    datasets = {path: DatasetInfo.load(path).digest for path in {config.data.path for config in configs}}
    sets = {files: load_sets(files) for files in {config.symptoms for config in configs}}
    for files in {config.symptoms for config in configs if config.run.unusable_symptoms == "refuse"}:
        refuse_unusable(sets[files], files)
    symptoms = {files: sets_digest(loaded) for files, loaded in sets.items()}
    backbones = {backbone: backbone_digest(backbone) for backbone in dict.fromkeys(c.backbone for c in configs)}
    runs: dict[str, Config] = {}
    for config in configs:
        content = datasets[config.data.path], backbones[config.backbone], symptoms[config.symptoms]
        digests = Digests(*content, method_digest(config.method.name, config.method.files()))
        runs.setdefault(run_name(config, digests), config)
    for name, config in runs.items():
        write_text(out / CONFIGS / f"{name}.yaml", config.to_yaml())
    log.info("%d combinations are %d different runs", len(configs), len(runs))
    _add_plan(out, Plan(grid=str(grid), runs=tuple(runs)))
    return list(runs)


def _add_plan(out: Path, new: Plan) -> None:
    """Put a plan beside those that the sweep has; one whose runs are all in the new one is replaced."""
    others = [plan for plan in plans(out) if not set(plan.runs) <= set(new.runs)]
    for other in others:
        log.warning(
            "%s: planned here before, from %s: %d runs, which stay; status and table show both, this command works on the new",
            out,
            other.grid,
            len(other.runs),
        )
    everything = dict.fromkeys(name for plan in (*others, new) for name in plan.runs)
    written = [plan.model_dump(mode="json") for plan in (*others, new)]
    write_json(out / PLAN, {"runs": list(everything), "plans": written})


def planned(out: Path) -> list[str]:
    """The names of all runs that were ever planned for a sweep; none where its planning was interrupted.

    Raises:
        UserError: there is no sweep, or its plan is damaged.
    """
    if not (out / PLAN).is_file() and not (out / LOCK).is_file():
        raise UserError(
            f"{out}: no sweep here (it has no {PLAN}); start one with `vipbench sweep run GRID --out {out}`"
        )
    return list(dict.fromkeys(name for plan in plans(out) for name in plan.runs))


def plans(out: Path) -> list[Plan]:
    """The plans of a sweep, the oldest first. Raises UserError where their file is damaged."""
    path = out / PLAN
    if not path.is_file():
        return []
    content = read_json(path)
    found = content.get("plans", [content]) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(plan, dict) for plan in found):
        raise UserError(f"{path}: should hold plans; found {shortened(content)}")
    return [validate(Plan, plan, where=str(path)) for plan in found]


def plan_units(out: Path, names: Sequence[str], command: Sequence[str] = RUN_COMMAND, pack: bool = False) -> list[Unit]:
    """The units of planned runs. With `pack` those train together that can; one that failed runs alone, so that neither it nor
    the others fail again because of each other.
    """
    failed = {name for name in names if (out / FAILED / f"{name}.json").is_file()}
    together = [name for name in names if pack and name not in failed]
    groups = [[name] for name in names if name not in together]
    if together:
        from vipbench.harness.runs.resolve import load_config
        from vipbench.sweeps.packing import group

        groups = group({name: load_config(out / CONFIGS / f"{name}.yaml") for name in together}) + groups
    return [unit(out, members, command) for members in groups]
