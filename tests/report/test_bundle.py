"""Bundles: what goes in, what must not, what a damaged or hostile one does, and tables of several groups."""

import json
import re
import shutil
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.report.written_runs import share, write_run
from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.report import sources
from vipbench.harness.report.bundle import sample_digest, scrub, write_bundle
from vipbench.harness.report.leaderboard import LeaderboardLine
from vipbench.harness.report.page.build import Options, build_page
from vipbench.harness.report.sources import open_sources
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.directory import write_digests
from vipbench.harness.runs.predictions import read_predicted

ROOT = Path(__file__).parents[2]
SECRETS = ("/data/hospital", "secretbox", "/home/jane", "jane.doe", "bucket.example")


def private_run(folder: Path, method: str = "vip", seed: int = 1, right: int = 70) -> Path:
    """A run whose config, provenance and log name paths, a machine and a user."""
    facts = {
        "hardware": {"cpu": "AMD EPYC", "devices": ["cpu"], "host": "secretbox"},
        "plugins": ["/home/jane/plugin.py"],
        "skipped": {"test": ["jane.doe/scan 1"]},
        "selection": ["kept /home/jane/runs/best epoch 3"],
        "seconds": 1.5,
    }
    run = write_run(
        folder, method, 16, seed, share(right), provenance=facts, method__words="s3://bucket.example/words.txt"
    )
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["path"], config["backbone"]["name"] = "/data/hospital/2026", "/home/jane/models/ViT-B-16.pt"
    config["symptoms"], config["run"] = ["/home/jane/a.json", "/home/jane/b.json"], {"out": "/home/jane/runs"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.log").write_text("rank 0 of 1 on secretbox\n")
    write_digests(run)
    return run


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    runs = tmp_path / "ours" / "runs"
    for seed in (1, 2):
        private_run(runs, seed=seed, right=70 + seed).rename(runs / f"vip_16shot_seed{seed}_0123")
    assert write_bundle(tmp_path / "ours", tmp_path / "ours.zip") == 2
    return tmp_path / "ours.zip"


def test_nothing_private_is_in_a_bundle(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as file:
        assert file.testzip() is None
        for name in file.namelist():
            content = file.read(name)
            for secret in (*SECRETS, "data 0001"):
                assert secret.encode() not in content, (name, secret)
        config = yaml.safe_load(file.read("runs/vip_16shot_seed1_0123/config.yaml"))
    assert config["data"]["path"] == "data" and config["backbone"]["name"] == "ViT-B-16.pt"
    assert config["symptoms"] == ["a.json", "b.json"] and "run" not in config
    assert config["method"] == {"name": "vip", "words": "words.txt"}


def test_same_runs_give_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "ours", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()


def test_predictions_and_metrics_are_those_of_the_runs(bundle: Path, tmp_path: Path) -> None:
    original = tmp_path / "ours" / "runs" / "vip_16shot_seed1_0123"
    of, stored = read_predicted(original)
    with open_sources([bundle]) as (source,):
        copy = Run.load(source.folder / "runs" / original.name)
        found, bundled = read_predicted(copy.path)
        assert copy.metrics == Run.load(original).metrics
    places = {sample_digest("digest of data", str(sample)): place for place, sample in enumerate(stored.ids)}
    order = [places[sample] for sample in bundled.ids]
    assert sorted(order) == list(range(100)) and list(bundled.ids) == sorted(bundled.ids)
    assert np.array_equal(found.logits, of.logits[order]) and np.array_equal(found.labels, of.labels[order])


def test_paths_in_texts() -> None:
    kept = ["hf-hub:laion/CLIP-ViT", "a photo of a {}.", "and/or", "1/2", "ViT-B/16", "either / or", "16/18 images"]
    assert scrub(kept) == kept
    assert scrub("kept /home/jane/runs/best at step 3") == "kept best at step 3"
    texts = [
        "read cfg:/home/jane/x",
        "see C:\\Users\\jane\\x now",
        "from HTTPS://host.example/a/x",
        "file:/home/jane/x",
    ]
    assert scrub(texts) == ["read cfg:x", "see x now", "from x", "file:x"]
    assert scrub("a" * 300 + "/b") == "a" * 300 + "/b", "longer than a file's name may be"
    assert scrub(["~/x/y.json", "C:\\data\\x.csv", "https://host.example/a/b.tar?key=1", "/only"]) == [
        "y.json",
        "x.csv",
        "b.tar",
        "only",
    ]


def test_leaderboard_lines(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as file:
        lines = [LeaderboardLine.model_validate_json(line) for line in file.read("leaderboard.jsonl").splitlines()]
        predictions = file.read("runs/vip_16shot_seed1_0123/predictions.parquet")
    assert [line.metrics["accuracy"] for line in lines] == [0.71, 0.72]
    assert lines[0].predictions == sha256(predictions).hexdigest()
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "report.md").read_text(), re.MULTILINE)
    assert documented == list(LeaderboardLine.model_fields)


def test_groups_stand_side_by_side(bundle: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "theirs", "coop", 16, 1, share(60))
    write_run(tmp_path / "theirs", "vip", 16, 1, share(65))
    write_bundle(tmp_path / "theirs", tmp_path / "theirs.zip")
    done = CliRunner().invoke(
        app, ["table", str(bundle), str(tmp_path / "theirs.zip"), "--show-runs", "--format", "csv"]
    )
    assert done.exit_code == 0, done.output
    assert "theirs,coop,16,accuracy,1" in done.output and "ours,vip" in done.output
    assert f"{bundle}/runs/vip_16shot_seed1_0123" in done.output and "vipbench-" not in done.output
    page = build_page([bundle, tmp_path / "theirs.zip"], Options())
    assert "theirs" in page and "vipbench-" not in page.replace("vipbench-bundle", "")
    assert "unzip -o" in page and "data.path=PLACE symptoms=PLACE" in page


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("runs/../../evil/config.yaml", b"x", "which no bundle has"),
        ("/etc/passwd", b"x", "which no bundle has"),
        ("runs/.hidden/config.yaml", b"x", "which no bundle has"),
        ("runs/vip/prompts.safetensors", b"x", "which no bundle has"),
        ("runs/vip/config.yaml", b"x", "not of format"),  # it has no digest
        ("runs/vip_16shot_seed1_0123/config.yaml", b"x", "twice"),
    ],
)
def test_hostile_members_are_refused(bundle: Path, tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    with zipfile.ZipFile(bundle, "a") as file:
        file.writestr(name, content)
    with pytest.raises(UserError, match=problem), open_sources([bundle]):
        pass
    assert not (tmp_path / "evil").exists()


def test_changed_members_are_refused(bundle: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(bundle) as file, zipfile.ZipFile(changed, "w") as other:
        for name in file.namelist():
            content = file.read(name)
            other.writestr(name, content.replace(b"0.71", b"0.99") if name.endswith("metrics.json") else content)
    with (
        pytest.raises(UserError, match=r"metrics.json is not what the bundle was written with"),
        open_sources([changed]),
    ):
        pass


def test_damaged_streams_are_refused(bundle: Path, tmp_path: Path) -> None:
    content = bytearray(bundle.read_bytes())
    with zipfile.ZipFile(bundle) as file:
        start = file.getinfo("leaderboard.jsonl").header_offset + 30 + len("leaderboard.jsonl")
    content[start : start + 3] = b"\xff\xff\xff"
    (tmp_path / "damaged.zip").write_bytes(content)
    with pytest.raises(UserError, match="no bundle, or damaged"), open_sources([tmp_path / "damaged.zip"]):
        pass


def test_many_bundles_keep_their_names(bundle: Path, tmp_path: Path) -> None:
    places = [tmp_path / f"group{number}.zip" for number in range(11)]
    for place in places:
        shutil.copy(bundle, place)
    with open_sources(places) as opened:
        assert sources.shown(opened, f"{opened[10].folder}/runs") == f"{places[10]}/runs"


def test_a_run_is_bundled_from_within(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "ours" / "runs" / "vip_16shot_seed1_0123"
    monkeypatch.chdir(run)
    assert write_bundle(Path(), tmp_path / "one.zip") == 1
    with open_sources([tmp_path / "one.zip"]) as (source,):
        assert (source.folder / "runs" / run.name / "metrics.json").is_file()
    monkeypatch.chdir(tmp_path)
    run.rename(run.with_name("vip of Jane"))
    with pytest.raises(UserError, match="vip of Jane: a bundle takes runs whose names"):
        write_bundle(tmp_path / "ours", tmp_path / "named.zip")


def test_bounds_of_size(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_MEMBER_BYTES", 100)
    with pytest.raises(UserError, match="larger than"), open_sources([bundle]):
        pass
    monkeypatch.setattr(sources, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="unpacked"), open_sources([bundle]):
        pass


def test_files_that_are_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("x", json.dumps({}))
    for name, problem in (("a.zip", "no bundle, or damaged"), ("b.zip", "holds no bundle.json")):
        with pytest.raises(UserError, match=problem), open_sources([tmp_path / name]):
            pass
    with pytest.raises(UserError, match="no finished run"):
        write_bundle(tmp_path, tmp_path / "out.zip")


def test_verb_writes_a_bundle(tmp_path: Path) -> None:
    private_run(tmp_path / "runs").rename(tmp_path / "runs" / "vip_16shot_seed1_0123")
    done = CliRunner().invoke(app, ["bundle", str(tmp_path / "runs"), "--out", str(tmp_path / "out.zip")])
    assert done.exit_code == 0, done.output
    assert "(1 run," in done.output
