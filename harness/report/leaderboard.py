"""Lines of a leaderboard: what a run was, what it reached, and the digest of the predictions that show it."""

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vipbench.harness.runs.directory import CONFIG, INTERVALS, METRICS, PREDICTIONS, PROVENANCE
from vipbench.harness.system.files import parse_json, parse_yaml


class End(BaseModel):
    """A 95% interval and its method."""

    model_config = ConfigDict(extra="forbid")

    low: float
    high: float
    method: str


class LeaderboardLine(BaseModel):
    """A run on a leaderboard.

    Attributes:
        run: its name, which holds a digest of all that determines its result.
        method, options: the method's name, and its options.
        backbone, dataset: their names; `digests` are SHA-256 of what they held (dataset, backbone, symptoms, method).
        shots: training images per class, a number or "all".
        seed, split_seed: of training, and of the draw of training images.
        samples: of the test split.
        metrics: overall metrics as fractions; null where one is undefined.
        intervals: 95% intervals of metrics, with their methods; those that have none are left out.
        predictions: SHA-256 of predictions.parquet in the bundle, from which the metrics derive.
        versions, git: of the packages, and the commit; null where there was none.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal["vipbench-leaderboard/1"] = "vipbench-leaderboard/1"
    run: str
    method: str
    options: dict[str, Any]
    backbone: str
    dataset: str
    digests: dict[str, str | None]
    shots: int | str
    seed: int
    split_seed: int | None
    samples: int
    metrics: dict[str, float | None]
    intervals: dict[str, End]
    predictions: str
    result_version: int | None
    versions: dict[str, str]
    git: str | None


def leaderboard_line(run: str, files: Mapping[str, bytes]) -> str:
    """The line of a run in JSON, from the contents of its files by name."""
    config, provenance = parse_yaml(files[CONFIG].decode(), CONFIG), parse_json(files[PROVENANCE])
    metrics = parse_json(files[METRICS])
    intervals = parse_json(files[INTERVALS]) if INTERVALS in files else {}
    method = dict(config["method"])
    line = LeaderboardLine(
        run=run,
        method=method.pop("name"),
        options=method,
        backbone=config["backbone"]["name"],
        dataset=provenance["dataset"],
        digests=provenance["digests"],
        shots=config["data"]["shots"],
        seed=config["seed"],
        split_seed=config["data"].get("split_seed"),
        samples=metrics["samples"],
        metrics={name: value for name, value in metrics.items() if name != "samples" and not isinstance(value, dict)},
        intervals={name: value for name, value in intervals.items() if "method" in value},
        predictions=hashlib.sha256(files[PREDICTIONS]).hexdigest(),
        result_version=provenance.get("result_version"),
        versions=provenance.get("versions", {}),
        git=provenance.get("git"),
    )
    return line.model_dump_json()
