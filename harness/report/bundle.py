"""Bundles: the results of runs as one zip file that others can check, without images, paths and names of machines.

vipbench bundle DIR --out results.zip

    bundle.json         {"format": "vipbench-bundle/1", "files": {name: SHA-256}}
    leaderboard.jsonl   a line per run, see docs/report.md
    runs/<name>/        config.yaml, provenance.json, metrics.json, intervals.json, predictions.parquet, files.json

A bundle unpacked is a directory of runs. Of predictions it has ids as digests, labels and logits, and patients as numbers.
"""

import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import yaml

from vipbench.harness.errors import UserError
from vipbench.harness.report.leaderboard import leaderboard_line
from vipbench.harness.report.rows import planned, run_folder
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
from vipbench.harness.system.files import atomic_path, disk_errors, parse_json, read_json

FORMAT, MANIFEST, LEADERBOARD = "vipbench-bundle/1", "bundle.json", "leaderboard.jsonl"
MEMBERS = (CONFIG, PROVENANCE, METRICS, INTERVALS, PREDICTIONS, FILES)
NAME = re.compile(rf"runs/[A-Za-z0-9_][A-Za-z0-9._+-]{{0,200}}/({'|'.join(map(re.escape, MEMBERS))})")
MOST_MEMBERS, MOST_BYTES, MOST_MEMBER_BYTES = 200_000, 8 << 30, 256 << 20
# Facts of provenance.json that go into a bundle; others, as of plugins or skipped images, name files.
FACTS = (
    *("dataset", "classes", "ordinal", "digests", "seeds", "training_samples", "kept_epoch", "validation_accuracy"),
    *("validation_loss", "selection", "tuning", "cost", "backbone", "packed", "approximations", "result_version"),
    *("versions", "git", "hardware", "started", "finished", "seconds"),
)
LEFT_OUT = ("run",)  # sections of a config: how and where it ran
FILE_ENDINGS = (".json", ".yaml", ".yml", ".txt", ".csv", ".py", ".pt", ".safetensors", ".parquet", ".npz", ".bin")
IN_TEXT = re.compile(r"(?<![\w.{}/:])(?:~|[A-Za-z]:)?(?:/[^\s/:,;'\"]+){2,}|\b[a-z][a-z0-9+]*://\S+")


@dataclass(frozen=True)
class Source:
    """Runs to read: `folder` holds them, `given` is its name, or that of the bundle that was unpacked there."""

    given: Path
    folder: Path
    bundle: bool = False

    @property
    def name(self) -> str:
        """The name of the group."""
        return self.given.stem if self.bundle else str(self.given)

    def shown(self, text: object) -> str:
        """A path, or text with paths, in which the bundle stands where it was unpacked."""
        return str(text).replace(str(self.folder), str(self.given)) if self.bundle else str(text)


@contextmanager
def open_sources(places: Sequence[Path]) -> Iterator[list[Source]]:
    """Directories of runs as they are, and bundles unpacked into a temporary directory for the length of the block.

    Raises:
        UserError: a file is no bundle, or is damaged; or two bundles have one name.
    """
    with tempfile.TemporaryDirectory(prefix="vipbench-") as temporary:
        sources = []
        for place in places:
            if place.suffix == ".zip" and place.is_file():
                folder = Path(temporary) / str(len(sources))
                unpack(place, folder)
                sources.append(Source(place, folder, bundle=True))
            else:
                sources.append(Source(place, place))
        names = [source.name for source in sources]
        for source in sources:
            if names.count(source.name) > 1:
                raise UserError(f"{source.given}: given twice, or two groups are called {source.name!r}; rename a bundle")
        yield sources


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
        runs = [directory] if is_finished(directory) else [run for run in folder.iterdir() if is_finished(run)]
        runs.sort(key=lambda run: (order.get(run.name, len(order)), run.name))
    if not runs:
        raise UserError(f"{directory}: no finished run here")
    digests: dict[str, str] = {}
    lines = []
    with disk_errors(out), atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:

        def add(name: str, content: bytes) -> None:
            digests[name] = hashlib.sha256(content).hexdigest()
            file.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # 1980: the same runs give the same bytes

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
    if "\n" in text or "/" not in text and "\\" not in text:
        return False
    path = text.strip()
    outright = path.startswith(("/", "~", "./", "../", "\\\\")) or re.match(r"[A-Za-z]:[\\/]|[a-z][a-z0-9+]*://", path)
    return bool(outright) or path.endswith(FILE_ENDINGS) or (len(path) < 4096 and " " not in path and Path(path).exists())


def missing_places(row: Mapping[str, Any]) -> list[str]:
    """The options of a bundled run's config that lost their place: who runs it again names them anew."""
    names = ["data.path"]
    if row.get("symptoms"):
        names.append("symptoms")
    backbone = str(row.get("backbone.name", ""))
    return names + (["backbone.name"] if not row.get("backbone.pretrained") and ":" not in backbone else [])


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


def unpack(bundle: Path, folder: Path) -> None:
    """Unpack a bundle. Names, sizes and digests are checked before anything of it is read as a run.

    Raises:
        UserError: it is no bundle, or damaged.
    """
    try:
        with zipfile.ZipFile(bundle) as file:
            _unpack(bundle, file, folder)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{bundle}: no bundle, or damaged: {' '.join(str(error).split())[:200]}") from error
    except OSError as error:
        raise UserError(f"{bundle}: cannot be unpacked: {error.strerror or error}") from error


def _unpack(bundle: Path, file: zipfile.ZipFile, folder: Path) -> None:
    members = file.infolist()
    names = [member.filename for member in members]
    if MANIFEST not in names:
        raise UserError(f"{bundle}: no bundle: it holds no {MANIFEST}; `vipbench bundle DIR` writes one")
    if len(members) > MOST_MEMBERS or sum(member.file_size for member in members) > MOST_BYTES:
        raise UserError(f"{bundle}: more than {MOST_MEMBERS:,} files or {MOST_BYTES >> 30} GiB unpacked")
    for name in names:
        if name not in (MANIFEST, LEADERBOARD) and (not NAME.fullmatch(name) or ".." in name):
            raise UserError(f"{bundle}: holds {name[:80]!r}, which no bundle has")
    if len(set(names)) < len(names):
        raise UserError(f"{bundle}: damaged: a name stands in it twice")
    manifest = parse_json(_member(bundle, file, MANIFEST), unique_keys=True)
    digests = manifest.get("files") if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
    if not isinstance(digests, dict) or set(digests) != set(names) - {MANIFEST}:
        raise UserError(f"{bundle}: damaged: {MANIFEST} is not of format {FORMAT} with a digest of each file")
    for name in digests:
        content = _member(bundle, file, name)
        if hashlib.sha256(content).hexdigest() != digests[name]:
            raise UserError(f"{bundle}: damaged: {name} is not what the bundle was written with")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _member(bundle: Path, file: zipfile.ZipFile, name: str) -> bytes:
    """The content of a member, read no further than its largest size, whatever the header of the zip claims."""
    with file.open(name) as opened:
        content = opened.read(MOST_MEMBER_BYTES + 1)
    if len(content) > MOST_MEMBER_BYTES:
        raise UserError(f"{bundle}: {name} is larger than {MOST_MEMBER_BYTES >> 20} MiB")
    return content


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
