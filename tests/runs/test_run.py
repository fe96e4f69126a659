"""One run, in this process: what it leaves behind, that it is not run twice, and how its prompts serve elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.conftest import CLASSES, COUNTS, write_images
from vipbench.harness.cli import app
from vipbench.harness.config.identity import Digests
from vipbench.harness.config.overrides import override
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.metrics import compute_metrics
from vipbench.harness.methods.base import template_features
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.directory import is_finished, new_run, read_prompts
from vipbench.harness.runs.execute import execute, fill_banks
from vipbench.harness.runs.resolve import load_config, resolve_config
from vipbench.harness.runs.transfer import evaluate_run

FILES = {
    "config.yaml",
    "provenance.json",
    "steps.jsonl",
    "predictions.parquet",
    "metrics.json",
    "intervals.json",
    "prompts.safetensors",
    "files.json",
    "logs",
}


def run(base: dict[str, Any], out: Path, *overrides: str, force: bool = False) -> Path:
    return execute(resolve_config(override(base, [f"run.out={out}", *overrides])), force)


@pytest.fixture(scope="module")
def vip_run(base_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base_config, tmp_path_factory.mktemp("runs"))


def test_a_run_directory_holds_the_whole_record(vip_run: Path) -> None:
    assert {path.name for path in vip_run.iterdir()} == FILES
    predictions = pd.read_parquet(vip_run / "predictions.parquet")
    assert len(predictions) == predictions["id"].nunique() == COUNTS["test"] * len(CLASSES)
    assert predictions["label"].value_counts().to_dict() == dict.fromkeys(range(3), COUNTS["test"])
    logits = np.stack(predictions["logits"].to_list())
    metrics = json.loads((vip_run / "metrics.json").read_text())
    assert metrics == compute_metrics(predictions["label"].to_numpy(), logits, CLASSES), (
        "metrics derive from predictions"
    )
    assert set(load_file(vip_run / "prompts.safetensors")) == {
        "context",
        "merge.queries",
        "merge.to_query.weight",
        "merge.to_key.weight",
    }
    steps = [json.loads(line) for line in (vip_run / "steps.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in steps if "validation_accuracy" in row] == [1, 2, 3]
    assert steps[0]["lr"] == 1e-5
    provenance = json.loads((vip_run / "provenance.json").read_text())
    assert provenance["classes"] == CLASSES
    assert provenance["training_samples"] == 18
    assert provenance["seeds"] == {"run": 1, "split": None, "augmentation": 1}, "nothing is drawn from all shots"
    assert provenance["hardware"]["processes"] == 1
    assert all(len(digest) == 64 for digest in provenance["digests"].values())
    assert provenance["versions"]["torch"]
    assert load_config(vip_run / "config.yaml").method.name == "vip"


def test_the_same_config_gives_the_same_bits(base_config: dict[str, Any], vip_run: Path, tmp_path: Path) -> None:
    again = run(base_config, tmp_path, "run.workers=2", "run.eval_batch_size=64")
    assert again.name == vip_run.name, "how it is executed is not part of its identity"
    first, second = (load_file(path / "prompts.safetensors") for path in (vip_run, again))
    assert all((first[name] - second[name]).abs().max() == 0 for name in first)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler, and there is no g++")
@pytest.mark.slow
def test_a_compiled_image_tower_gives_the_same_prompts(
    base_config: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    base = {**base_config, "backbone": {"name": str(model_folder / "vit.json")}}
    path, eager = run(base, tmp_path, "run.compile=true"), run(base, tmp_path)
    assert path != eager, "it rounds differently, so that it is another run, with stored features of its own"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"], "nothing was compiled"
    prompts, expected = (load_file(folder / "prompts.safetensors") for folder in (path, eager))
    assert all((prompts[name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())


def test_a_finished_run_is_not_run_again_unless_forced(base_config: dict[str, Any], tmp_path: Path) -> None:
    first = run(base_config, tmp_path, "method=coop", "train.epochs=2")
    stamp = (first / "metrics.json").stat().st_mtime_ns
    assert run(base_config, tmp_path, "method=coop", "train.epochs=2") == first
    assert (first / "metrics.json").stat().st_mtime_ns == stamp
    run(base_config, tmp_path, "method=coop", "train.epochs=2", force=True)
    assert (first / "metrics.json").stat().st_mtime_ns > stamp
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [first.name]


def test_a_failed_run_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    def fail() -> None:
        with new_run(tmp_path / "run") as directory:
            (directory.path / "metrics.json").write_text("{}")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert not is_finished(tmp_path / "run")
    assert not is_finished(tmp_path / "run.partial")
    assert read_runs(tmp_path).empty
    with (
        new_run(tmp_path / "run"),
        pytest.raises(UserError, match="another process is working"),
        new_run(tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("method", ["zero_shot", "coop", "cocoop", "vip"])
@pytest.mark.parametrize("backbone", ["vit", "bert"])
@pytest.mark.slow
def test_every_method_runs_on_other_backbones(
    base_config: dict[str, Any], model_folder: Path, tmp_path: Path, method: str, backbone: str
) -> None:
    path = run(
        base_config,
        tmp_path,
        f"method={method}",
        f"backbone={model_folder / backbone}.json",
        "train.epochs=2",
        "data.shots=2",
        "precision=bf16",
    )
    row = read_runs(tmp_path).iloc[0]
    assert row["method.name"] == method
    assert row["metrics.samples"] == 21
    if method != "zero_shot":
        assert json.loads((path / "provenance.json").read_text())["training_samples"] == 6


@pytest.mark.slow
def test_a_draw_of_fewer_than_asked_for_is_recorded(base_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 6 images, fewer than the 9 shots asked for"):
        run(base_config, tmp_path, "method=coop", "data.shots=9")
    path = run(base_config, tmp_path, "method=coop", "data.shots=9", "data.fewer=take")
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["fewer_than_shots"] == dict.fromkeys(CLASSES, 6)
    assert provenance["training_samples"] == 18


@pytest.mark.slow
def test_a_selection_to_be_doubted_is_recorded(
    base_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate at which nothing changes: the first of ties is the warm-up's epoch."""
    settings = ["train.lr=1e-12", "train.warmup_lr=1e-12", "train.select=best", "train.select_ties=first"]
    path = run(base_config, tmp_path, *settings)
    provenance = json.loads((path / "provenance.json").read_text())
    assert provenance["kept_epoch"] == 1 and provenance["validation_loss"] > 0
    assert len(provenance["selection"]) == 2
    assert "selection: epoch 1 is kept, which is of the warm-up" in caplog.text


@pytest.mark.parametrize("bank", [True, False])
def test_features_that_are_not_finite_end_a_run_in_one_line(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bank: bool
) -> None:
    from vipbench.harness.models.backbone import Backbone

    encode = Backbone.encode_with_norms
    monkeypatch.setattr(Backbone, "encode_with_norms", lambda backbone, pixels: encode(backbone, pixels) * float("nan"))
    for method in ("zero_shot", "coop"):
        with pytest.raises(UserError, match=r"images: .* not finite .*weights|the loss is nan at epoch 1") as caught:
            run(base_config, tmp_path, f"method={method}", f"run.bank={bank}")
        assert "\n" not in str(caught.value)


def test_best_without_a_validation_split_is_an_error(base_config: dict[str, Any], tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    manifest = tmp_path / "images.csv"
    rows = [
        f"images/{path.relative_to(tmp_path / 'images')},{path.parent.name},{path.parts[-3]}"
        for path in sorted((tmp_path / "images").rglob("*.png"))
        if path.parts[-3] != "val"
    ]
    manifest.write_text("path,label,split\n" + "\n".join(rows))
    command = ["prepare", str(manifest), "--format", "csv", "--out", str(tmp_path / "data"), "--val-fraction", "0"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    with pytest.raises(UserError, match="'best' needs a validation split"):
        run(base_config, tmp_path / "runs", f"data.path={tmp_path / 'data'}")
    assert run(base_config, tmp_path / "runs", f"data.path={tmp_path / 'data'}", "train.select=last").is_dir()


def prepare(folder: Path, classes: list[str], seed: int = 5) -> Path:
    write_images(folder / "images", seed)
    command = ["prepare", str(folder / "images"), "--format", "folder", "--out", str(folder / "data")]
    result = CliRunner().invoke(app, [*command, "--classes", ",".join(classes)])
    assert result.exit_code == 0, result.output
    return folder / "data"


def test_prompts_serve_another_dataset_whatever_its_class_order(vip_run: Path, dataset: Path, tmp_path: Path) -> None:
    metrics = json.loads((vip_run / "metrics.json").read_text())
    same = evaluate_run(vip_run, dataset, "test", None, "cpu")
    assert json.loads((same / "metrics.json").read_text()) == metrics
    write_images(tmp_path / "images", seed=0)
    command = ["prepare", str(tmp_path / "images"), "--format", "folder", "--out", str(tmp_path / "data")]
    assert CliRunner().invoke(app, [*command, "--classes", ",".join(reversed(CLASSES))]).exit_code == 0
    other_order = evaluate_run(vip_run, tmp_path / "data", "test", None, "cpu")
    assert json.loads((other_order / "metrics.json").read_text())["sensitivity"] == metrics["sensitivity"]


def test_prompts_of_other_classes_are_refused_where_they_belong_to_a_class(
    base_config: dict[str, Any], vip_run: Path, tmp_path: Path
) -> None:
    write_images(tmp_path / "images")
    for split in COUNTS:
        (tmp_path / "images" / split / "nevus").rename(tmp_path / "images" / split / "wart")
    command = ["prepare", str(tmp_path / "images"), "--format", "folder", "--out", str(tmp_path / "data")]
    assert CliRunner().invoke(app, command).exit_code == 0
    with pytest.raises(UserError, match="symptom"):
        evaluate_run(vip_run, tmp_path / "data", "test", None, "cpu")
    coop = run(base_config, tmp_path / "runs", "method=coop", "train.epochs=2")
    assert (evaluate_run(coop, tmp_path / "data", "test", None, "cpu") / "metrics.json").is_file()
    own = run(
        base_config, tmp_path / "runs", "method.name=coop", "method.class_specific_context=true", "train.epochs=2"
    )
    with pytest.raises(UserError, match="other classes"):
        evaluate_run(own, tmp_path / "data", "test", None, "cpu")


def test_the_command_line_prints_one_line_for_a_mistake(base_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base_config))
    shown = CliRunner().invoke(app, ["config", str(tmp_path / "config.yaml"), "data.shots=3"])
    assert yaml.safe_load(shown.stdout)["data"]["shots"] == 3
    wrong = CliRunner().invoke(app, ["config", str(tmp_path / "config.yaml"), "data.shotz=3"])
    assert isinstance(wrong.exception, UserError)


def test_several_symptom_sets_are_read_together(
    base_config: dict[str, Any], symptoms: Path, tmp_path: Path, dataset: Path
) -> None:
    """Their texts are a class's symptoms, one set after the other; both contents are in the identity."""
    content = json.loads(symptoms.read_text())
    for entry in content["classes"]:
        entry["symptoms"] = [{"text": f"{entry['symptoms'][0]['text']} again"}]
    second = tmp_path / "second.json"
    second.write_text(json.dumps(content))
    one = run(base_config, tmp_path / "runs")
    both = run(base_config, tmp_path / "runs", f"symptoms=[{symptoms}, {second}]")
    swapped = run(base_config, tmp_path / "runs", f"symptoms=[{second}, {symptoms}]")
    assert len({one.name, both.name, swapped.name}) == 3
    config = load_config(both / "config.yaml")
    assert config.symptoms == (symptoms, second)
    assert json.loads((evaluate_run(both, dataset, "test", None, "cpu") / "metrics.json").read_text()) == json.loads(
        (both / "metrics.json").read_text()
    )
    ensemble = run(base_config, tmp_path / "runs", f"symptoms=[{symptoms}, {second}]", "method.sets=ensemble")
    assert ensemble.name != both.name
    own, of_one = (evaluate_run(ensemble, dataset, "test", named, "cpu") for named in (None, second))
    assert (own / "metrics.json").read_bytes() == (ensemble / "metrics.json").read_bytes()
    tables = [pd.read_parquet(path / "predictions.parquet")["logits"].to_list() for path in (own, of_one)]
    assert np.abs(np.stack(tables[0]) - np.stack(tables[1])).max() > 1e-4, "one set alone is another classifier"
    second.write_text(json.dumps({**content, "classes": content["classes"][1:]}))
    with pytest.raises(UserError, match="no class"):
        run(base_config, tmp_path / "runs", f"symptoms=[{symptoms}, {second}]")


def test_templates_are_of_the_task(base_config: dict[str, Any], tmp_path: Path, dataset: Path) -> None:
    """They are in the identity of a method that reads them, and refused for one that does not."""
    plain = run(base_config, tmp_path, "method=kgcoop")
    own = run(base_config, tmp_path, "method=kgcoop", 'templates=["a dermoscopy picture of {}.", "{} on skin."]')
    assert plain.name != own.name
    learned = [read_prompts(path)["context"] for path in (plain, own)]
    assert not torch.equal(*learned), "the guiding texts are others"
    scored = evaluate_run(own, dataset, "test", None, "cpu")
    assert (scored / "metrics.json").read_bytes() == (own / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="templates: method 'vip' reads none of them"):
        run(base_config, tmp_path, 'templates=["a {}."]')
    with pytest.raises(UserError, match=r"templates\[0\]: template 'a photo' must hold \{\} once"):
        run(base_config, tmp_path, "method=kgcoop", "templates=[a photo]")


def test_processes_that_read_other_content_are_refused(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refuse it, as where a branch of a hub moves on while they load."""

    def of_first_rank(self: Topology, value: Any) -> Any:
        return value._replace(backbone="0" * 64) if isinstance(value, Digests) else value

    monkeypatch.setattr(Topology, "broadcast", of_first_rank)
    config = resolve_config(override(base_config, [f"run.out={tmp_path}"]))
    for start in (lambda: execute(config), lambda: fill_banks([config])):
        with pytest.raises(UserError, match=r"^backbone: differs between the processes of this run; .*@COMMIT$"):
            start()
    assert not list(tmp_path.iterdir())


def test_texts_of_the_support_set_are_encoded_once(
    base_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count the calls for the training samples and the validation samples together."""
    calls: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return template_features(*arguments)

    monkeypatch.setattr("vipbench.harness.runs.data.template_features", counted)
    path = run(base_config, tmp_path, "method=linear_probe", "train=null")
    assert is_finished(path) and calls == [1]
