"""A directory that appears whole, replaces another one without a moment of loss, and tidies up after calls that were killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vipbench.harness.errors import UserError
from vipbench.harness.system.files import atomic_directory


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, content: str, overwrite: bool = False) -> None:
    with atomic_directory(path, overwrite) as folder:
        (folder / "content").write_text(content)


KILLED = """
import os, signal, sys
from pathlib import Path
from vipbench.harness.system import files

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

renames = []
rename = Path.rename
def dying_rename(path, target):
    renames.append(path)
    if len(renames) > int(sys.argv[2]):
        die()
    return rename(path, target)

Path.rename = dying_rename
with files.atomic_directory(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "content").write_text("new")
    if int(sys.argv[2]) < 0:
        die()
"""


@pytest.mark.parametrize("renames", [-1, 0, 1])
def test_a_call_that_was_killed_costs_nothing_and_is_tidied_up(tmp_path: Path, renames: int) -> None:
    out = tmp_path / "out"
    write(out, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), str(renames)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 + (renames < 1), "a temporary directory is left"
    with pytest.raises(UserError, match="exists; give --overwrite"):
        write(out, "third")
    assert (out / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_directory_that_somebody_is_writing_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_directory(out) as folder:
        (folder / "content").write_text("first")
        write(out, "second")
        assert (folder / "content").read_text() == "first"
        (tmp_path / ".out.abcdefgh.tmp").mkdir()  # of a call that has not locked it yet
        write(out, "third", overwrite=True)
        assert ".out.abcdefgh.tmp" in names(tmp_path)
        old = time.time() - 3600
        os.utime(tmp_path / ".out.abcdefgh.tmp", (old, old))
        write(out, "fourth", overwrite=True)
        assert ".out.abcdefgh.tmp" not in names(tmp_path)
        (tmp_path / ".out.x.abcdefgh.tmp").mkdir()  # of a target of another name
        os.utime(tmp_path / ".out.x.abcdefgh.tmp", (old, old))
        write(out, "fifth", overwrite=True)
        assert ".out.x.abcdefgh.tmp" in names(tmp_path)


def test_what_fails_keeps_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(ZeroDivisionError), atomic_directory(out, overwrite=True):
        raise ZeroDivisionError
    assert (out / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "old")
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "real")
    write(link, "new", overwrite=True)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real" / "content").read_text() == "new"
    assert names(tmp_path / "disk") == ["real"]
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "other")
    write(tmp_path / "dangling", "there now")
    assert (tmp_path / "disk" / "other" / "content").read_text() == "there now"


@pytest.mark.parametrize("place", ["file/out", "/proc/out", "file/a/b"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out: cannot be written: \w+|b: cannot be written: \w+") as caught:
        write(tmp_path / place, "x")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"), atomic_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []
