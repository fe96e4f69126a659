"""Provenance: the commit on record is that of vipbench, and of no other repository around it."""

import subprocess
from pathlib import Path

from vipbench.harness.runs.provenance import git_commit


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_repository_which_tracks_the_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    tracked, installed = tmp_path / "real" / "tracked.py", tmp_path / "real" / "installed.py"
    assert git_commit(tracked) is None, "no repository"
    git(tmp_path, "init", "--quiet")
    for file in (tracked, installed):
        file.touch()
    (tmp_path / ".gitignore").write_text("installed.py")
    git(tmp_path, "add", ".")
    assert git_commit(tracked) is None, "no commit yet"
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(tracked) == commit
    assert git_commit(installed) is None, "as a package in the virtual environment of another project"
    (tmp_path / "link").symlink_to("real")
    assert git_commit(tmp_path / "link" / "tracked.py") == f"{commit}+changes"
