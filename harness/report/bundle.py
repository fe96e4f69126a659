"""Bundles: the results of runs as one zip file that others can check, without images, paths and names of machines.

vipbench bundle DIR --out results.zip

    bundle.json         {"format": "vipbench-bundle/1", "files": {name: SHA-256}}
    leaderboard.jsonl   a line per run, see docs/report.md
    runs/<name>/        config.yaml, provenance.json, metrics.json, intervals.json, predictions.parquet, files.json

A bundle unpacked is a directory of runs. Of predictions it has ids as digests, labels and logits, and patients as numbers.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import yaml

from vipbench.harness.errors import UserError
from vipbench.harness.report.leaderboard import leaderboard_line
from vipbench.harness.report.rows import planned, run_folder
from vipbench.harness.report.sources import FORMAT, LEADERBOARD, MANIFEST, RUN
from vipbench.harness.runs.directory import (
    CONFIG,
    FILES,
    INTERVALS,
    METRICS,
    PREDICTIONS,
    PROVENANCE,
    check_run,
    is_finished,
    read_config,
    read_metrics,
    read_provenance,
)
from vipbench.harness.runs.predictions import read_predicted
from vipbench.harness.system.files import atomic_path, disk_errors, read_json

# Facts of provenance.json that go into a bundle; others, as of plugins or skipped images, name files.
FACTS = (
    *("dataset", "classes", "ordinal", "digests", "seeds", "training_samples", "kept_epoch", "validation_accuracy"),
    *("validation_loss", "selection", "tuning", "cost", "backbone", "packed", "approximations", "result_version"),
    *("versions", "git", "hardware", "started", "finished", "seconds"),
)
HARDWARE = ("launcher", "engine", "processes", "devices", "cpu", "cores")  # of its facts
LEFT_OUT = ("run",)  # sections of a config: how and where it ran
FILE_ENDINGS = (".json", ".yaml", ".yml", ".txt", ".csv", ".py", ".pt", ".safetensors", ".parquet", ".npz", ".bin")
URL = r"[A-Za-z][A-Za-z0-9+.-]{0,20}://"
IN_TEXT = re.compile(rf"\b{URL}\S+|\b[A-Za-z]:\\[^\s,;'\"]+|(?<![\w.{{}}/])(?:~|[A-Za-z]:)?(?:/[^\s/:,;'\"]+){{2,}}")


def write_bundle(directory: Path, out: Path) -> int:
    """Write the finished runs of a directory as a bundle; their count.

    Raises:
        UserError: there is none, or one is damaged.
    """
    with disk_errors(directory):
        folder = run_folder(directory)
        if not folder.is_dir():
            raise UserError(f"{directory}: no such directory of runs")
        order = {name: place for place, name in enumerate(planned(directory))}
        runs = (
            [directory.resolve()] if is_finished(directory) else [run for run in folder.iterdir() if is_finished(run)]
        )
        for run in runs:
            if not RUN.fullmatch(run.name):
                raise UserError(f"{run}: a bundle takes runs whose names have letters, digits and ._+- only; rename it")
        runs.sort(key=lambda run: (order.get(run.name, len(order)), run.name))
    if not runs:
        raise UserError(f"{directory}: no finished run here")
    digests: dict[str, str] = {}
    lines = []
    with disk_errors(out), atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:

        def add(name: str, content: bytes) -> None:
            digests[name] = hashlib.sha256(content).hexdigest()
            member = zipfile.ZipInfo(name)  # of 1980: the same runs give the same bytes
            file.writestr(member, content, zipfile.ZIP_DEFLATED)

        for run in runs:
            check_run(run)
            members = bundled_run(run)
            for name, content in members.items():
                add(f"runs/{run.name}/{name}", content)
            lines.append(leaderboard_line(run.name, {name: members[name] for name in members if name != FILES}))
        add(LEADERBOARD, "".join(f"{line}\n" for line in lines).encode())
        add(MANIFEST, _json({"format": FORMAT, "files": digests}))
    return len(runs)


def bundled_run(run: Path) -> dict[str, bytes]:
    """The files of a run as a bundle has them, by name."""
    config, provenance = read_config(run), read_provenance(run)
    dataset = provenance["dataset"]
    kept = {name: value for name, value in config.items() if name not in LEFT_OUT}
    kept["data"] = {**config["data"], "path": dataset}
    facts = {name: provenance[name] for name in FACTS if name in provenance}
    if isinstance(hardware := facts.get("hardware"), dict):
        facts["hardware"] = {name: hardware[name] for name in HARDWARE if name in hardware}
    members = {
        CONFIG: yaml.safe_dump(scrub(kept), sort_keys=False, allow_unicode=True).encode(),
        PROVENANCE: _json(scrub(facts)),
        METRICS: _json(read_metrics(run)),
        PREDICTIONS: _predictions(run, provenance["digests"]["dataset"]),
    }
    if (run / INTERVALS).is_file():
        members[INTERVALS] = _json(read_json(run / INTERVALS))
    members[FILES] = _json({name: hashlib.sha256(content).hexdigest() for name, content in sorted(members.items())})
    return members


def scrub(value: Any) -> Any:
    """A value of JSON in which a path, or a URL, is only its last name, in texts too."""
    if isinstance(value, Mapping):
        return {str(name): scrub(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if is_place(value):
        return _last_name(value)
    return IN_TEXT.sub(lambda found: _last_name(found[0]), value)


def is_place(text: str) -> bool:
    """Check that a text names a file, a folder or a URL, and no model of a hub such as hf-hub:name/model."""
    if "\n" in text or ("/" not in text and "\\" not in text):
        return False
    path = text.strip()
    outright = path.startswith(("/", "~", "./", "../", "\\\\")) or re.match(rf"[A-Za-z]:[\\/]|{URL}", path)
    return bool(outright) or path.endswith(FILE_ENDINGS) or (" " not in path and os.path.exists(path))


def _last_name(place: str) -> str:
    return PurePosixPath(place.strip().replace("\\", "/").partition("?")[0]).name or "place"


def sample_digest(dataset: str, sample: str) -> str:
    """The id of a sample in bundles, the same in all of one dataset; ids may be made of file names.

    Args:
        dataset: the digest of the dataset.
    """
    return hashlib.sha256(f"{dataset}\n{sample}".encode()).hexdigest()[:24]


def _predictions(run: Path, dataset: str) -> bytes:
    """Parquet with a row per sample in the order of the new ids: id, label, logits, and patient where patients are known."""
    _, found = read_predicted(run)
    columns: dict[str, Any] = {
        "id": [sample_digest(dataset, str(sample)) for sample in found.ids],
        "label": found.labels,
        "logits": list(found.logits),
    }
    frame = pd.DataFrame(columns)
    if found.clusters is not None:
        frame["patient"] = [str(code) for code in found.clusters]
    frame = frame.sort_values("id", ignore_index=True)
    if "patient" in frame:
        frame["patient"] = [str(code) for code in pd.factorize(frame["patient"])[0]]  # numbered in the order of the ids
    file = BytesIO()
    frame.to_parquet(file, index=False)
    return file.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
