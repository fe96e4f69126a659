"""The wheel, in an environment of its own outside of the clone: all that the demo needs is in it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
PACKAGES = ("harness", "baselines", "sweeps", "symptoms_cache")
NOT_READ = ("__pycache__", "*.pyc", "*.sqlite*")


def run(*command: str | Path, folder: Path) -> str:
    """Return what a command prints that must succeed, with none of this clone's folders to import from."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves files beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*PACKAGES, "vipbench"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns(*NOT_READ))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(*pip, "--wheel-dir", out, ".", folder=source)
    (built,) = out.glob("vipbench-*.whl")
    return built


def test_the_wheel_holds_what_the_folders_hold(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip(f"no git repository here: {tracked.stderr.strip()}")
    assert {f"vipbench/{name}" for name in tracked.stdout.splitlines()} - inside == set()
    assert {name.partition("/")[0] for name in inside} == {"vipbench"}, "one name in site-packages"


def test_the_demo_runs_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """One run of it, on the drawn benchmark, with the symptom set that came along."""
    home = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", home, folder=tmp_path)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    run(*pip, wheel, folder=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    # What vipbench depends on comes from the environment of the tests; its editable vipbench, in a .pth of its own, does not.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = (
        f"from vipbench import {', '.join(PACKAGES[:3])}; print(harness.__file__, baselines.__file__, sweeps.__file__)"
    )
    files = run(python, "-c", code, folder=tmp_path).split()
    assert [Path(file).parent for file in files] == [site / "vipbench" / name for name in PACKAGES[:3]]
    code = "from importlib.util import find_spec; print([name for name in ('harness', 'baselines') if find_spec(name)])"
    assert run(python, "-c", code, folder=tmp_path) == "[]\n", "these names are free for others"

    one_run = "method={name: zero_shot, text: symptoms}"
    said = run(home / "bin" / "vipbench", "demo", "--out", "out", "--jobs", "1", one_run, folder=tmp_path)
    assert "| zero_shot | " in said and "page: out/report.html\n" in said
    assert (tmp_path / "out" / "report.html").read_text().count('class="cards"') == 1
    (config,) = (tmp_path / "out" / "sweep" / "configs").iterdir()
    assert f"symptoms: {site / 'vipbench' / 'symptoms_cache'}" in config.read_text()
    (log,) = (tmp_path / "out" / "sweep" / "logs").iterdir()
    assert "test: accuracy" in log.read_text()
