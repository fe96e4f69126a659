"""The paper's experiments: their grids on the embedded benchmark, and the commands of docs/reproducing.md on made archives."""

import re
import shlex
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from vipbench.harness.cli import app
from vipbench.harness.data.reader import Dataset
from vipbench.harness.demo.benchmark import make_dataset
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import load_config
from vipbench.sweeps.executors.local import LocalExecutor
from vipbench.sweeps.units import Unit, record_end

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ["seed=1", "train.epochs=1", "train.warmup_epochs=0", "run.device=cpu", "run.workers=0"]
PAPER = {"zero_shot", "coop", "cocoop", "vip"}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded benchmark's dataset."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    make_dataset(folder)
    return folder


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the clone's folders; sweeps run here, in this process."""

    def run(self: LocalExecutor, out: Path, units: Sequence[Unit]) -> None:
        for unit in units:
            for config in unit.command[-len(unit.names) :]:
                execute(load_config(Path(config)))
            record_end(out, unit, 0)

    monkeypatch.setattr(LocalExecutor, "run", run)
    for name in ("harness", "sweeps", "symptoms_cache"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def vipbench(line: str, *more: str) -> str:
    """The output of a documented command, with more arguments after it."""
    name, *arguments = shlex.split(line)
    assert name == "vipbench"
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


@pytest.mark.parametrize(
    ("name", "runs", "methods"),
    [
        ("vip_paper", 4, PAPER),
        ("ablation", 4, {"zero_shot", "vip"}),
        ("knowledge", 12, {"zero_shot", "vip"}),
        ("zero_shot", 7, {"zero_shot", "cupl", "dclip", "xplainer", "waffle"}),
        ("few_shot", 5, PAPER),
    ],
)
def test_a_small_form_of_each_grid_runs_on_the_embedded_benchmark(
    name: str, runs: int, methods: set[str], clone: Path, drawn: Path
) -> None:
    """The commands in its head: one seed, one shot, one epoch."""
    (clone / "demo_out").mkdir()
    (clone / "demo_out" / "data").symlink_to(drawn)
    head = Path("sweeps", f"{name}.yaml").read_text()
    (command,) = re.findall(r"# On the embedded benchmark: (.*)", head)
    (table,) = re.findall(rf"#   (vipbench table out/{name} .*)", head)
    vipbench(command, *SMALL, "data.shots=1", "train.select=best")
    found = read_runs(clone / "out" / "small" / "runs")
    assert len(found) == runs
    assert set(found["method.name"]) == methods
    assert set(found["backbone.name"]) == {"harness/demo/model"}
    shown = vipbench(table.replace(f"out/{name}", "out/small"))
    assert all(method in shown for method in methods)


def made(numbers: np.random.Generator, mode: str, format: str) -> bytes:
    """A small noisy image file."""
    shape = (40, 48) if mode == "L" else (40, 48, 3)
    file = BytesIO()
    Image.fromarray(numbers.integers(0, 255, shape, dtype=np.uint8), mode).save(file, format)
    return file.getvalue()


MELANOMA = ["melanoma", "melanoma (in situ)", "melanoma (less than 0.76 mm)", "melanoma (0.76 to 1.5 mm)"]
MELANOMA += ["melanoma (more than 1.5 mm)", "melanoma metastasis"]
NEVUS = [
    f"{kind} nevus" for kind in ("blue", "clark", "combined", "congenital", "dermal", "recurrent", "reed or spitz")
]
OTHERS = ["basal cell carcinoma", "melanosis", "lentigo"]


def make_derm7pt(path: Path) -> None:
    """Write an archive as Derm7pt's: each diagnosis once in each split, rows of the splits mixed."""
    numbers = np.random.default_rng(0)
    diagnoses = [one for one in (*MELANOMA, *NEVUS, *OTHERS) for _ in range(3)]
    splits = {name: list(range(place, len(diagnoses), 3)) for place, name in enumerate(("train", "valid", "test"))}
    images = [f"NEL/Nel{row:03d}.jpg" for row in range(len(diagnoses))]
    clinic = [f"NEL/NEL{row:03d}.jpg" for row in range(len(diagnoses))]
    columns = {"case_num": range(1, len(images) + 1), "diagnosis": diagnoses, "clinic": clinic, "derm": images}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("release_v0/meta/meta.csv", pd.DataFrame(columns).to_csv(index=False))
        for name, rows in splits.items():
            archive.writestr(f"release_v0/meta/{name}_indexes.csv", pd.DataFrame({"indexes": rows}).to_csv(index=False))
        for image in images:
            archive.writestr(f"release_v0/images/{image}", made(numbers, "RGB", "JPEG"))


def make_pneumonia(path: Path) -> None:
    """Write an archive as version 3 of rscbjbr9sj: two datasets, of the X-rays train and test by class."""
    numbers = np.random.default_rng(1)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("CellData/OCT/train/NORMAL/NORMAL-1-1.jpeg", made(numbers, "L", "JPEG"))
        for split, counts in {"train": (20, 40), "test": (3, 5)}.items():
            for folder, kinds, count in zip(
                ("NORMAL", "PNEUMONIA"), (["NORMAL"], ["BACTERIA", "VIRUS"]), counts, strict=True
            ):
                for row in range(count):
                    file = f"{kinds[row % len(kinds)]}-{1000 + row}-0001.jpeg"
                    archive.writestr(f"CellData/chest_xray/{split}/{folder}/{file}", made(numbers, "L", "JPEG"))


def counts(path: str) -> dict[str, dict[str, int]]:
    """The number of images by split and class."""
    data = Dataset(Path(path))
    return {
        split: dict(Counter(data.classes[label] for label in data.split(split).labels))
        for split in ("train", "val", "test")
    }


def documented(text: str) -> list[str]:
    """The commands (indented) and the Python blocks of a document, in its order."""
    steps, block = [], list[str]()
    inside = False
    for line in text.splitlines():
        if line.startswith("```"):
            if inside:
                steps.append("\n".join(block))
            inside, block = not inside, []
        elif inside:
            block.append(line)
        elif line.startswith("    "):
            steps.append(line.strip())
    return steps


def test_every_command_from_the_archives_to_the_table_works(clone: Path) -> None:
    """Run docs/reproducing.md from top to bottom; of the sweep one seed, one epoch, the small backbone."""
    make_derm7pt(clone / "release_v0.zip")
    make_pneumonia(clone / "ZhangLabData.zip")
    small = [*SMALL, "backbone=harness/demo/model"]
    output = dict[str, str]()
    for step in documented((ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")):
        if step.startswith("import "):
            exec(step, {})
        elif step.startswith("vipbench"):
            output[step] = vipbench(step, *(small if step.startswith("vipbench sweep run") else []))
        else:
            subprocess.run(step.replace("python3", sys.executable), shell=True, check=True)
    verbs = Counter(step.split()[1] for step in output)
    assert verbs == {"prepare": 2, "inspect": 2, "symptoms": 2, "sweep": 2, "table": 1}
    skin = {"melanoma": len(MELANOMA), "nevus": len(NEVUS)}
    assert counts("data/derm7pt") == {"train": skin, "val": skin, "test": skin}
    assert counts("data/pneumonia") == {
        "train": {"normal lung": 18, "pneumonia": 36},
        "val": {"normal lung": 2, "pneumonia": 4},
        "test": {"normal lung": 3, "pneumonia": 5},
    }
    found = read_runs(clone / "out" / "vip_paper" / "runs")
    done = {(dataset, method) for dataset in ("derm7pt", "pneumonia") for method in PAPER}
    assert set(zip(found["dataset"], found["method.name"], strict=True)) == done
    table = list(output.values())[-1]
    assert all(name in table for name in ("derm7pt", "pneumonia", *PAPER))


def test_the_head_of_each_grid_tells_what_it_reproduces() -> None:
    for name in ("vip_paper", "ablation", "knowledge", "zero_shot", "few_shot"):
        head = [line for line in (ROOT / "sweeps" / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
        text = "\n".join(head)
        for part in (
            "# Data: ",
            "vipbench sweep run sweeps/",
            "# Expected time on one H100: ",
            "# Expected figures: not",
        ):
            assert part in text, (name, part)
        assert "stimated" in text, f"{name}: a time that was not measured is marked so"
