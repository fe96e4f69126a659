"""Sources of runs: directories, and bundles (harness/report/bundle.py), which are checked as they are unpacked."""

import hashlib
import lzma
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vipbench.harness.errors import UserError
from vipbench.harness.runs.directory import CONFIG, FILES, INTERVALS, METRICS, PREDICTIONS, PROVENANCE
from vipbench.harness.system.files import parse_json

FORMAT, MANIFEST, LEADERBOARD = "vipbench-bundle/1", "bundle.json", "leaderboard.jsonl"
MEMBERS = (CONFIG, PROVENANCE, METRICS, INTERVALS, PREDICTIONS, FILES)
RUN = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._+-]{0,200}")  # the name of a run's directory
NAME = re.compile(rf"runs/{RUN.pattern}/({'|'.join(map(re.escape, MEMBERS))})")
MOST_MEMBERS, MOST_BYTES, MOST_MEMBER_BYTES = 200_000, 8 << 30, 256 << 20
GROUP = "group"  # a column of runs, where they are of several groups


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
        sources: list[Source] = []
        for place in places:
            if place.suffix == ".zip" and place.is_file():
                folder = Path(temporary) / f"{len(sources):06}"  # none begins the name of another; see `shown`
                unpack(place, folder)
                sources.append(Source(place, folder, bundle=True))
            else:
                sources.append(Source(place, place))
        names = [source.name for source in sources]
        for source in sources:
            if names.count(source.name) > 1:
                raise UserError(
                    f"{source.given}: given twice, or two groups are called {source.name!r}; rename a bundle"
                )
        try:
            yield sources
        except UserError as error:
            raise UserError(shown(sources, str(error))) from error


def shown(sources: Sequence[Source], text: str) -> str:
    """A text in which bundles stand where they were unpacked."""
    for source in sources:
        text = source.shown(text)
    return text


def missing_places(row: Mapping[str, Any]) -> list[str]:
    """The options of a bundled run's config that lost their place: who runs it again names them anew."""
    names = ["data.path"]
    if row.get("symptoms"):
        names.append("symptoms")
    backbone = str(row.get("backbone.name", ""))
    return names + (["backbone.name"] if not row.get("backbone.pretrained") and ":" not in backbone else [])


def add_groups(runs: pd.DataFrame, sources: Sequence[Source]) -> pd.DataFrame:
    """Runs with the column "group", the name of their source, where there are several sources, one of them a bundle."""
    if len(sources) < 2 or not any(source.bundle for source in sources):
        return runs
    names = {str(source.folder): source.name for source in sources}
    grouped = runs.assign(**{GROUP: runs["directory"].map(names)})
    missing = [row | {GROUP: names[row["directory"]]} for row in runs.attrs["missing"]]
    grouped.attrs = runs.attrs | {"missing": missing}
    return grouped


def unpack(bundle: Path, folder: Path) -> None:
    """Unpack a bundle. Names, sizes and digests are checked before anything of it is read as a run.

    Raises:
        UserError: it is no bundle, or damaged.
    """
    try:
        with zipfile.ZipFile(bundle) as file:
            _unpack(bundle, file, folder)
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        EOFError,
    ) as error:
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
        if name not in (MANIFEST, LEADERBOARD) and not NAME.fullmatch(name):
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
