"""Recipes: the paper's, one for a family of methods, or the best of a grid on validation, which never looks at the test split."""

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.conftest import CLASSES, write_images
from tests.dying import Death, at_step, die
from tests.zoo import SMALL
from vipbench.harness.cli import app
from vipbench.harness.config.identity import Digests, run_name
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.data.reader import Dataset
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.evaluation.predict import EvaluationSet, Predictions
from vipbench.harness.methods.base import Method
from vipbench.harness.methods.recipes import family_recipe
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.report.tables import make_table
from vipbench.harness.runs import tuning
from vipbench.harness.runs.collect import read_runs
from vipbench.harness.runs.directory import RunDirectory, read_prompts
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.job import Job
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import load_config, resolve_config
from vipbench.harness.runs.tuning import Candidate, check_validation, choose
from vipbench.harness.system.files import read_json
from vipbench.harness.training.loop import Training
from vipbench.sweeps.grid import read_grid
from vipbench.sweeps.packing import group
from vipbench.sweeps.status import progress

DIGESTS = Digests("d" * 64, "b" * 64, None)
COOP: dict[str, Any] = {"method": "coop", "data": {"path": "x", "shots": 4}}
RATES = [2.0, 1e-6, 0.2]


def resolved(**more: Any) -> Config:
    return resolve_config({**COOP, **more})


def name(config: Config) -> str:
    return run_name(config, DIGESTS)


@pytest.fixture(scope="module")
def small(base_config: dict[str, Any]) -> dict[str, Any]:
    """A run of nine steps of CoOp, without a rate."""
    train = {"epochs": 3, "batch_size": 5, "warmup_epochs": 0}
    return {
        **base_config,
        "method": {"name": "coop", "context_length": 2, "class_specific_context": True},
        "train": train,
    }


def tuned(base: dict[str, Any], out: Path, *overrides: str) -> Config:
    every = [f"run.out={out}", "recipe=tuned", f"grid.lr={RATES}", "run.log_every=1", "run.checkpoint_steps=2"]
    return resolve_config(override(base, [*every, *overrides]))


@pytest.fixture(scope="module")
def tuned_run(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return execute(tuned(small, tmp_path_factory.mktemp("tuned")))


def test_the_published_recipe_is_the_default_and_the_others_are_other_runs() -> None:
    assert resolved() == resolved(recipe="published")
    names = [name(resolved(**more)) for more in ({}, {"recipe": "fixed"}, {"recipe": "tuned"})]
    names += [name(resolved(recipe="tuned", grid={"lr": rates})) for rates in ([0.1, 0.2], [0.2, 0.1])]
    assert len(set(names)) == 5


def test_a_fixed_recipe_is_one_for_all_methods_of_a_family() -> None:
    """Every method that is registered has a family, whose setting it gets whatever its paper says."""
    recipes: dict[str, set[Any]] = {}
    for method in method_names():
        given = {"method": method, "data": {"path": "x", "shots": 4}, "symptoms": "s.json", "recipe": "fixed"}
        config, cls = resolve_config(given), method_class(method)
        if cls.trains:
            recipes.setdefault(cls.family(), set()).add(config.train)
            assert config.recipe == "fixed"
        else:
            assert config.recipe == "published" and cls.family() == "untrained"
            assert (
                config
                == resolve_config({**given, "recipe": "tuned"})
                == resolve_config({**given, "recipe": "published"})
            )
    assert {family: len(found) for family, found in recipes.items()} == {"prompts": 1, "adapters": 1, "image_tower": 1}
    assert (
        method_class("vip").family() == method_class("kgcoop").family() == method_class("cocoop").family() == "prompts"
    )
    assert method_class("tip_adapter_f").family() == "adapters"
    assert method_class("maple").family() == "image_tower"


def test_what_is_given_wins_over_a_fixed_recipe() -> None:
    config = resolved(recipe="fixed", train={"lr": 0.03})
    assert config.train and config.train.lr == 0.03 and config.to_mapping()["train"]["lr"] == 0.03
    assert config.train.epochs == family_recipe("prompts").fixed["epochs"]
    published = resolved(train={"lr": 0.03})
    assert published.train and published.train.epochs == 100, "the paper's for four shots"


def test_a_tuned_config_leaves_open_what_the_grid_decides(tmp_path: Path) -> None:
    config = resolved(recipe="tuned", grid={"lr": ["1e-3", 0.01, 0.01], "epochs": [50, 10]}, train={"batch_size": 7})
    assert config.grid == {"lr": (0.001, 0.01), "epochs": (50, 10)}
    mapping = config.to_mapping()
    assert not {"lr", "epochs"} & mapping["train"].keys() and mapping["train"]["batch_size"] == 7
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "config.yaml") == config
    points = [(one.train.lr, one.train.epochs) for one in config.candidates() if one.train]
    assert points == [(0.001, 50), (0.001, 10), (0.01, 50), (0.01, 10)]
    assert {one.train.batch_size for one in config.candidates() if one.train} == {7}


def test_a_method_may_have_a_grid_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved(recipe="tuned").grid == family_recipe("prompts").grid
    monkeypatch.setattr(method_class("coop"), "grid", classmethod(lambda cls, config: {"epochs": [5, 6]}))
    assert resolved(recipe="tuned").grid == {"epochs": (5, 6)}
    assert resolved(recipe="tuned", grid={"lr": [1.0]}).grid == {"lr": (1.0,)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"recipe": "tunned"}, "recipe: input should be 'published', 'fixed' or 'tuned'"),
        ({"grid": {"lr": [0.1]}}, "grid: has no effect with recipe: published; leave it out, or give recipe: tuned"),
        ({"recipe": "fixed", "grid": {"lr": [0.1]}}, "grid: has no effect with recipe: fixed"),
        ({"recipe": "tuned", "grid": {"lrr": [0.1]}}, "grid.lrr: unknown key; did you mean 'lr'"),
        ({"recipe": "tuned", "grid": {"lr": 0.1}}, "grid.lr: input should be a valid tuple; found 0.1"),
        ({"recipe": "tuned", "grid": {"lr": []}}, "grid.lr: tuple should have at least 1 item"),
        ({"recipe": "tuned", "grid": {"lr": [0.1, -1]}}, "train.lr: input should be greater than 0; found -1"),
        ({"recipe": "tuned", "grid": {"epochs": [1, 2]}}, "train: warmup_epochs=1 leaves none of 1 epochs"),
        ({"recipe": "tuned", "train": {"lr": 0.1}}, "train.lr: recipe: tuned chooses it among 0.0005, 0.002, 0.01"),
        (
            {"recipe": "tuned", "grid": {"lr": [0.1] * 11, "momentum": [0.5] * 10}},
            "grid: 110 candidates, each of which is trained; a grid may have 100",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        resolved(**more)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_untrained_method_ignores_a_grid_as_it_does_train(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vipbench"):
        config = resolve_config(
            {**COOP, "method": "zero_shot", "recipe": "tuned", "grid": {"lr": [1]}, "train": {"lr": 1}}
        )
    assert config.recipe == "published" and config.grid is None
    assert caplog.messages == [
        f"{part}: ignored, method 'zero_shot' has no training loop" for part in ("train", "grid")
    ]


def test_the_best_candidate_is_chosen_by_the_rule() -> None:
    def best(*scores: tuple[float | None, float | None]) -> int:
        return choose([Candidate({"lr": 1}, 1, *score, None if score[0] else "no luck") for score in scores])

    assert best((0.5, 1.0), (0.7, 9.0), (0.6, 0.1)) == 1, "accuracy first"
    assert best((0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8)) == 2, "then the loss, then the first"
    assert best((None, None), (0.1, 1.0)) == 1
    with pytest.raises(UserError, match="every candidate failed; the first one: no luck"):
        best((None, None), (None, None))


def test_the_chosen_candidate_ends_as_it_would_alone(small: dict[str, Any], tuned_run: Path, tmp_path: Path) -> None:
    record, provenance = read_json(tuned_run / "tuning.json"), read_json(tuned_run / "provenance.json")
    assert record["grid"] == {"lr": RATES} and "lowest validation loss" in record["rule"]
    assert [one["settings"] for one in record["candidates"]] == [{"lr": rate} for rate in RATES]
    scores = [(one["accuracy"], -one["loss"]) for one in record["candidates"]]
    assert len(set(scores)) == 3 and scores[record["chosen"]] == max(scores) and record["chosen"] == 1
    rate = RATES[record["chosen"]]
    assert provenance["tuning"] == {"chosen": {"lr": rate}, "candidates": 3, "rule": record["rule"]}
    alone = execute(resolve_config(override(small, [f"run.out={tmp_path}", f"train.lr={rate}", "run.log_every=1"])))
    for file in ("steps.jsonl", "predictions.parquet", "metrics.json", "prompts.safetensors"):
        assert (tuned_run / file).read_bytes() == (alone / file).read_bytes(), file
    assert {path.name for path in tuned_run.iterdir()} - {path.name for path in alone.iterdir()} == {"tuning.json"}
    assert "tuning.json" in read_json(tuned_run / "files.json")
    config = yaml.safe_load((tuned_run / "config.yaml").read_text())
    assert config["recipe"] == "tuned" and config["grid"] == {"lr": RATES} and "lr" not in config["train"]


def test_only_the_chosen_candidate_sees_the_test_split(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits, predict = [], EvaluationSet.predict

    def noted(self: EvaluationSet, method: Method) -> Predictions:
        splits.append(self.source.name)
        return predict(self, method)

    monkeypatch.setattr(EvaluationSet, "predict", noted)
    execute(tuned(small, tmp_path, "train.select=best"))
    assert splits[-1] == "test" and set(splits[:-1]) == {"val"}
    assert len(splits[:-1]) == 3 * (3 + 1), "each epoch of each candidate, and its end"


def test_a_candidate_that_diverges_is_recorded_and_not_chosen(small: dict[str, Any], tmp_path: Path) -> None:
    run = execute(tuned(small, tmp_path, "grid.lr=[1e30,0.05]"))
    failed, good = read_json(run / "tuning.json")["candidates"]
    assert failed["accuracy"] is None and failed["error"].startswith("training: the loss is ")
    assert good["error"] is None and read_json(run / "tuning.json")["chosen"] == 1


@pytest.mark.parametrize("step", [1, 4, 9])
def test_what_was_trained_is_not_trained_again(
    small: dict[str, Any], tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """It dies in the second candidate, and then as it tests the chosen one."""
    config, steps, advance = tuned(small, tmp_path), [0], Training.advance

    def counted(training: Training, loss: Any) -> None:
        steps[0] += 1
        advance(training, loss)
        if steps[0] == 9 + step:
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", counted)
        with pytest.raises(Death):
            execute(config)
        (partial,) = tmp_path.glob("*.partial")
        assert progress(partial) == "candidate 2 of its grid"
        patch.setattr(Job, "test", die)
        with pytest.raises(Death):
            execute(config)
    assert steps[0] == 9 + step + (9 - (step - 1) // 2 * 2) + 9, "what a checkpoint holds is not trained again"
    monkeypatch.setattr(Training, "advance", die)
    run = execute(config)
    for file in ("tuning.json", "steps.jsonl", "predictions.parquet", "prompts.safetensors", "config.yaml"):
        assert (run / file).read_bytes().replace(bytes(tmp_path), b"") == (tuned_run / file).read_bytes().replace(
            bytes(tuned_run.parent), b""
        ), file
    assert not (run / "checkpoints").exists()


def prepare(images: Path, out: Path, *options: str) -> Path:
    command = ["prepare", str(images), "--format", "folder", "--out", str(out), "--classes", ",".join(CLASSES)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
def test_validation_that_is_missing_or_shared_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_images(images)
    copied = images / "train" / "nevus" / "nev0.png"
    shutil.copy(copied, images / "test" / "nevus" / "copy.png")
    data = prepare(images, tmp_path / "other", "--leaks", "keep")
    execute(
        tuned(small, tmp_path / "runs", f"data.path={data}")
    )  # train and test share an image, which is not chosen by
    for split in ("train", "test"):
        copy = images / "val" / "nevus" / "copy.png"
        shutil.copy(images / split / "nevus" / "nev1.png", copy)
        data = prepare(images, tmp_path / f"val and {split}", "--leaks", "keep")
        with pytest.raises(
            UserError, match=r"1 groups of identical images or patients are in val and in another split"
        ) as told:
            execute(tuned(small, tmp_path / "runs", f"data.path={json.dumps(str(data))}"))
        assert "--leaks drop-train" in str(told.value) and "\n" not in str(told.value)
    (data / "leaks.csv").write_text("nothing")
    with pytest.raises(UserError, match=r"leaks\.csv: damaged: it has no findings by split; prepare the data again$"):
        check_validation(Dataset(str(data)), str(data))
    data = prepare(images, tmp_path / "dropped", "--leaks", "drop-train")
    assert execute(tuned(small, tmp_path / "runs", f"data.path={data}")).is_dir()
    shutil.rmtree(images / "val")
    data = prepare(images, tmp_path / "none", "--leaks", "keep", "--val-fraction", "0")
    with pytest.raises(UserError, match=r"recipe: tuned needs a validation split, and .*none has none"):
        execute(tuned(small, tmp_path / "runs", f"data.path={data}"))


def test_tuned_runs_are_not_packed(small: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [tuned(small, tmp_path, f"seed={seed}") for seed in (1, 2)]
    with caplog.at_level(logging.INFO, "vipbench.sweeps"):
        assert group({"1": runs[0], "2": runs[1]}) == [["1"], ["2"]]
    reason = "its recipe is tuned, by training one candidate after the other"
    assert caplog.messages == [f"--pack: coop runs alone: {reason}"]
    with pytest.raises(UserError, match=f"coop: {reason}; run these without --pack"):
        execute_together(runs)


@pytest.mark.slow
def test_a_recipe_is_an_axis_and_a_row(small: dict[str, Any], tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    axes = {"method": ["zero_shot", "coop"], "recipe": ["published", "fixed", "tuned"], "seed": [1, 2]}
    train = {key: value for key, value in small["train"].items() if key != "lr"}
    tuning = [{"where": {"recipe": "tuned"}, "set": {"grid.lr": [0.01, 0.05]}}]
    grid.write_text(yaml.safe_dump({"base": {**small, "train": train}, "axes": axes, "adjust": tuning}))
    configs = read_grid(grid, [f"run.out={tmp_path / 'runs'}"])
    for config in configs:
        execute(config)
    runs = read_runs(tmp_path / "runs")
    assert len(runs) == 1 + 2 * 3
    table = make_table(runs, ["method"], ["shots"], ["accuracy"])
    kinds = ("fixed", "published", "tuned")
    assert {row[0] for row in table.rows} == {"zero_shot", *(f"coop (recipe={kind})" for kind in kinds)}
    rows = make_table(runs, ["method", "recipe"], ["shots"], ["accuracy"]).rows
    assert set(rows) == {("zero_shot", "–"), *(("coop", kind) for kind in kinds)}
    alike = runs[runs["recipe"] != "tuned"]
    assert ("coop",) in make_table(alike[alike["recipe"] != "fixed"], ["method"], ["shots"], ["accuracy"]).rows


@pytest.mark.slow
def test_every_method_can_be_tuned(base_config: dict[str, Any], model_folder: Path, tmp_path: Path) -> None:
    """Whatever is registered, over the grid of its family."""
    base = {**base_config, "backbone": {"name": str(model_folder / "vit.json")}}
    for method in method_names():
        if method_class(method).trains:
            train = {"epochs": 1, "steps": None, "warmup_epochs": 0, "batch_size": 9}
            given = {**base, "method": {"name": method, **SMALL.get(method, {})}, "train": train, "recipe": "tuned"}
            config = resolve_config(override(given, [f"run.out={tmp_path}"]))
            run = execute(config)
            assert len(read_json(run / "tuning.json")["candidates"]) == len(config.candidates()) > 1
            assert all(np.isfinite(tensor.numpy()).all() for tensor in read_prompts(run).values())


def test_a_death_while_a_candidate_is_adopted_loses_nothing(
    small: dict[str, Any], tuned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, copied = tuned(small, tmp_path), shutil.copy

    def copy_and_die(source: Path, to: Path) -> None:
        copied(source, to)
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr("vipbench.harness.runs.directory.shutil.copy", copy_and_die)
        with pytest.raises(Death):
            execute(config)
    at_step(1, die, monkeypatch)
    assert (execute(config) / "prompts.safetensors").read_bytes() == (tuned_run / "prompts.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("content", "place"), [("[]", "top level"), ('{"candidate": {}, "cost": {}}', "candidate.settings"),
                           ('{"candidate": {"settings": {}}, "cost": {"seconds": "much"}}', "cost.seconds")],
)  # fmt: skip
def test_a_damaged_result_of_a_candidate_is_one_line(tmp_path: Path, content: str, place: str) -> None:
    (tmp_path / "result.json").write_text(content)
    one_process: Any = SimpleNamespace(broadcast=lambda value: value)
    with pytest.raises(UserError, match=rf"^{tmp_path}/result.json: damaged: {re.escape(place)}: .*$"):
        tuning._read(RunDirectory(tmp_path), one_process)


def test_deepspeed_is_refused(small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero(Topology):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.zero_stage = 2

    monkeypatch.setattr("vipbench.harness.runs.execute.Topology", Zero)
    with pytest.raises(UserError, match=r"recipe: tuned trains several times .* which DeepSpeed does not take"):
        execute(tuned(small, tmp_path))
