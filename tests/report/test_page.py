"""The page: what it holds, what it escapes, what damage does to it, and its size for many runs."""

import gzip
import json
import re
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.report.written_runs import share, write_run
from vipbench.harness.cli import app
from vipbench.harness.errors import UserError
from vipbench.harness.report.page.build import DETAILED, Options, build_page
from vipbench.harness.report.page.entries import parse_config
from vipbench.harness.runs.directory import write_digests
from vipbench.harness.system.files import read_yaml

HOSTILE = '</script><script>alert("x")</script>'


class Document(HTMLParser):
    """Tags with their attributes, and texts, of a page; no attribute may name another place or hold code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        for name, value in attrs:
            assert not name.startswith("on") and name != "style", f"{tag} {name}"
            if name in ("href", "src"):
                assert value and value.startswith(("#", "data:image/webp")), value

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three seeds of two methods, one run that failed, one that is damaged."""
    runs = tmp_path / "sweep" / "runs"
    for seed in (1, 2, 3):
        for method, right in (("coop", 60), ("vip", 70)):
            write_run(runs, method, 16, seed, share(right + seed), provenance={"cost": {"train_seconds": 1.0}})
    failed = runs / "vip_1shot_seed1_0123456789ab.partial"
    (failed / "logs").mkdir(parents=True)
    (failed / "failed.json").write_text(json.dumps({"error": f"CUDA out of memory {HOSTILE}"}))
    (failed / "logs" / "rank-0.log").write_text("first line\nlast line before the end\n")
    config = yaml.safe_load(next(runs.glob("vip_16*/config.yaml")).read_text())
    (failed / "config.yaml").write_text(yaml.safe_dump(config | {"data": {**config["data"], "shots": 1}}))
    damaged = write_run(runs, "kgcoop", 16, 1, share(50))
    (damaged / "metrics.json").write_text("{}")
    return tmp_path / "sweep"


def test_page_is_whole_in_itself(sweep: Path) -> None:
    page = build_page([sweep], Options(cards=0))
    document = Document(page)
    policy = next(attrs["content"] for attrs in document.all("meta") if "http-equiv" in attrs)
    assert policy and policy.startswith("default-src 'none'") and "unsafe" not in policy
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    style = page.partition("<style>")[2].partition("</style>")[0]
    for content in (script, style):
        assert f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'" in policy
    assert "http:" not in page and "https:" not in page


def test_numbers_lead_to_their_runs(sweep: Path) -> None:
    document = Document(build_page([sweep], Options(cards=0)))
    text = "".join(document.texts)
    links = [attrs for attrs in document.all("a") if "data-r" in attrs]
    assert "72.00 ± 1.00" in text
    assert text.count("n = 100 test images, 3 runs (seeds) each.") == len(document.all("svg", role="img")) == 2
    ids = {attrs["id"] for _, attrs in document.tags if attrs.get("id")}
    assert len(ids) == sum(1 for _, attrs in document.tags if attrs.get("id")), "no id twice"
    for attrs in document.all("a"):
        assert str(attrs["href"])[1:] in ids, attrs
    assert any(len(str(attrs["data-r"]).split()) == 3 for attrs in links)
    assert f"vipbench run {sweep}/runs/vip_16shot_seed1_data" in text and "config.yaml run.out=reproduced" in text


def test_failed_and_damaged_runs_are_shown(sweep: Path) -> None:
    page = build_page([sweep], Options(cards=0))
    text = "".join(Document(page).texts)
    assert "6 done" in text and "1 failed" in text and "1 damaged" in text
    assert f"CUDA out of memory {HOSTILE}" in text and HOSTILE not in page
    assert "last line before the end" in text
    assert "it is not what the run wrote" in text


def test_samples_of_runs(sweep: Path) -> None:
    page = build_page([sweep], Options(cards=0))
    packed = re.search(r'id="packed-samples">([^<]*)<', page)
    assert packed
    samples = json.loads(gzip.decompress(b64decode(packed[1])))
    assert len(samples["sets"]) == 1 and len(samples["runs"]) == 6
    (shared,) = samples["sets"]
    for run in samples["runs"].values():
        wrong = sum(one != label for one, label in zip(run["p"], shared["labels"], strict=True))
        assert wrong in range(27, 40)
    text = "".join(Document(page).texts)
    assert "6 of 6" in text and "data 0099" in text, "a sample that all runs mistake"


def test_cells_that_would_mix_settings_become_rows(tmp_path: Path) -> None:
    write_run(tmp_path, "vip", 16, 1, share(60))
    write_run(tmp_path, "vip", 16, 1, share(70), lr=0.5)
    text = "".join(Document(build_page([tmp_path], Options(cards=0))).texts)
    assert "train.lr" in text or "lr" in text
    assert "60.00" in text and "70.00" in text and "would mix" not in text


def test_symptom_sets_become_rows_where_cells_would_mix_them(tmp_path: Path) -> None:
    for kind, right in (("description", 60), ("definition", 70)):
        run = write_run(tmp_path / kind, "vip", 16, 1, share(right), digests={"symptoms": f"digest of {kind}"})
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"symptoms": f"sets/{kind}.json"}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        write_digests(run)
    text = "".join(Document(build_page([tmp_path / "description", tmp_path / "definition"], Options(cards=0))).texts)
    assert "No table" not in text and "60.00" in text and "70.00" in text and "symptom_set" in text


def test_prediction_sets_name_their_calibration(sweep: Path) -> None:
    text = "".join(Document(build_page([sweep], Options(cards=0))).texts)
    assert text.count("Calibrated on a random half of the test samples (n = 50 samples)") == 6
    assert "Means over 100 such halves" in text and text.count("RAPS") == 6


@pytest.mark.parametrize("recorded", [{"low": 0.111, "high": 0.222, "method": "Wilson"}, None, [1]])
def test_more_runs_than_are_read_in_full_have_the_intervals_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: Any
) -> None:
    monkeypatch.setattr("vipbench.harness.report.page.build.DETAILED", 2)
    for method, seeds in (("coop", 1), ("vip", 2)):
        for seed in range(1, seeds + 1):
            run = write_run(tmp_path, method, 16, seed, share(60 + seed))
            (run / "intervals.json").write_text(json.dumps({"accuracy": recorded}))
            write_digests(run)
    text = "".join(Document(build_page([tmp_path], Options(cards=0))).texts)
    if recorded == [1]:
        assert "No table: " in text and "it holds no intervals" in text
    else:
        assert text.count("61.00 [11.10, 22.20] (1)") == (1 if recorded else 0)
        assert "61.50 ± 0.71 (2)" in text, "two seeds have none without their predictions"


def test_mixed_content_is_told_and_runs_are_listed(tmp_path: Path) -> None:
    write_run(tmp_path, "vip", 16, 1, share(60))
    write_run(tmp_path, "vip", 16, 2, share(70), digests={"dataset": "another"})
    text = "".join(Document(build_page([tmp_path], Options(cards=0))).texts)
    assert "No table:" in text and "vip_16shot_seed2_data" in text


def _no_name(run: dict[str, Any]) -> None:
    run["config.yaml"]["method"] = {}


def _nested(run: dict[str, Any]) -> None:
    run["config.yaml"]["data"]["shots"] = [[1], {"a": 1}]


def _no_samples(run: dict[str, Any]) -> None:
    del run["metrics.json"]["samples"]


def _huge(run: dict[str, Any]) -> None:
    run["metrics.json"]["sensitivity"] = {"nevus": 10**400}


def _no_ends(run: dict[str, Any]) -> None:
    run["intervals.json"] = {"accuracy": {"low": "a", "high": 10**400, "method": [1]}}


def _no_cost(run: dict[str, Any]) -> None:
    run["provenance.json"]["cost"] = {"runs_together": "x"}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (_no_name, "it is not the config of a run"),
        (_nested, "16shot"),
        (_no_samples, "it does not count the samples"),
        (_huge, "sensitivity"),
        (_no_ends, "it holds no intervals"),
        (_no_cost, "it does not tell what the run cost"),
    ],
)
def test_files_of_any_form_give_a_page(tmp_path: Path, change: Callable[[dict[str, Any]], None], shown: str) -> None:
    run = write_run(tmp_path, "vip", 16, 1, share(60))
    files = {name: read_yaml(run / name) for name in ("config.yaml", "provenance.json", "metrics.json")}
    change(files)
    for name, content in files.items():
        (run / name).write_text(json.dumps(content))
    write_digests(run)
    page = build_page([tmp_path], Options(cards=0))
    assert shown in "".join(Document(page).texts)


def test_directory_without_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run here"):
        build_page([tmp_path], Options())
    with pytest.raises(UserError, match="no such directory"):
        build_page([tmp_path / "nowhere"], Options())


def test_verb_writes_the_page(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(
        app, ["report", str(sweep), "--out", str(out), "--cards", "0", "--no-images", "--title", "A & B"]
    )
    assert done.exit_code == 0, done.output
    assert f"page: {out}" in done.output
    assert "<title>A &amp; B</title>" in out.read_text()


def test_config_is_parsed_as_yaml_is() -> None:
    plain = {
        "seed": 1,
        "data": {"path": "a: b", "shots": 4},
        "templates": ["x", "y"],
        "text": "many\nlines: 2\n",
        "none": None,
    }
    for config in (plain, {**plain, "nested": {"a": {"b": [1, {"c": "d"}]}}}):
        assert parse_config(yaml.safe_dump(config, sort_keys=False), "here") == config
    shared = "base: &base {lr: 1}\ntrain: *base\n"
    assert parse_config(shared, "here") == {"base": {"lr": 1}, "train": {"lr": 1}}
    for text in ("seed: 1\nseed: 2\n", "- a\n- b\n", "a: [\n"):
        with pytest.raises(UserError, match="here"):
            parse_config(text, "here")


@pytest.mark.slow
def test_ten_thousand_runs(tmp_path: Path) -> None:
    runs, total = tmp_path / "runs", 10_000
    first = write_run(tmp_path / "one", "vip", 16, 1, share(70), provenance={"cost": {"train_seconds": 1.0}})
    write_digests(first)
    files = {path.name: path.read_text() for path in first.iterdir() if path.suffix in (".json", ".yaml")}
    config = yaml.safe_load(files["config.yaml"])
    for number in range(total):
        method, dataset, shots, seed = number // 504, number // 18 % 28, 2 ** (number // 3 % 6), number % 3 + 1
        _write_copy(runs / f"vip_{number:05d}", files, config, f"method{method}", f"data{dataset}", shots, seed)
    assert total > DETAILED
    started = time.process_time()
    page = build_page([tmp_path], Options())
    assert time.process_time() - started < 10
    assert len(page.encode()) < 5_000_000
    assert page.count("<tr id=r") == total
    packed = re.findall(r'class="packed" data-first="(\d+)">([^<]*)<', page)
    last = json.loads(gzip.decompress(b64decode(packed[-1][1])))
    assert int(packed[-1][0]) + len(last) == total and "vip_09999" in last[-1] and "run.out=reproduced" in last[-1]


def _write_copy(
    run: Path, files: dict[str, str], config: dict[str, Any], method: str, dataset: str, shots: int, seed: int
) -> None:
    run.mkdir(parents=True)
    own = {
        **config,
        "seed": seed,
        "method": {"name": method},
        "data": {"path": dataset, "shots": shots, "split_seed": seed},
    }
    own["train"] = {**config["train"], "augmentation_seed": seed}
    written = {**files, "predictions.parquet": ""}
    written["config.yaml"] = "".join(f"{name}: {json.dumps(value)}\n" for name, value in own.items())
    written["provenance.json"] = files["provenance.json"].replace('"dataset": "data"', f'"dataset": "{dataset}"')
    written["provenance.json"] = written["provenance.json"].replace("digest of data", f"digest of {dataset}")
    written["files.json"] = json.dumps(
        {name: sha256(text.encode()).hexdigest() for name, text in written.items() if name != "files.json"}
    )
    for name, text in written.items():
        (run / name).write_text(text)
