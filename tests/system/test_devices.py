"""Whole runs on a GPU that is not there: no tensor meets one of another device, and predictions are those of the CPU."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from tests.pretended_gpu import pretended_gpu
from tests.zoo import SMALL, backbone_of
from vipbench.harness.config.overrides import override
from vipbench.harness.config.schema import Config
from vipbench.harness.data.reader import Dataset
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.runs.execute import execute, fill_banks
from vipbench.harness.runs.packed import execute_together
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.training.loop import Training

METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {"name": "zero_shot", "text": "symptoms"},
    "coop": {"name": "coop", "context_length": 2, "class_specific_context": True},
    "coop_words": {"name": "coop", "init_words": "a photo of a", "position": "middle"},
    "cocoop": {"name": "cocoop"},
    "vip": {"name": "vip", "context_length": 2},
    "vip_merge_mean": {"name": "vip", "context_length": 2, "merge": "mean"},
}
METHODS |= {name: {"name": name, **SMALL.get(name, {})} for name in method_names() if name not in METHODS}


def configured(base: dict[str, Any], out: Path, method: str, device: str, *overrides: str) -> Config:
    tower = backbone_of(base, METHODS[method]["name"])
    own = [f"backbone={tower}", f"run.out={out / device}", f"run.device={device}", "run.eval_batch_size=5"]
    content = override(base, [*own, *overrides])
    if method_class(METHODS[method]["name"]).trains:
        content["train"]["steps"] = None
    else:
        content.pop("train")
    return resolve_config({**content, "method": METHODS[method]})


def logits(run: Path) -> np.ndarray:
    return np.stack(pd.read_parquet(run / "predictions.parquet")["logits"].to_list())


@pytest.fixture(scope="module")
def cpu_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs on the CPU, which are done once for all tests that compare with them."""
    return tmp_path_factory.mktemp("runs")


def on_both(base: dict[str, Any], cpu_runs: Path, out: Path, method: str, *overrides: str) -> Path:
    """Run on the CPU and on the pretended GPU; returns the latter's directory."""
    cpu = execute(configured(base, cpu_runs, method, "cpu", *overrides))
    with pretended_gpu():
        gpu = execute(configured(base, out, method, "cuda", *overrides))
    np.testing.assert_allclose(logits(gpu), logits(cpu), atol=1e-4)
    return gpu


def test_two_devices_raise_where_they_meet() -> None:
    with pretended_gpu():
        there, here = torch.ones(3, 3).to("cuda"), torch.ones(3, 3)
        assert (
            there.device.type == (there @ there.T)[0].device.type == torch.zeros(2, device="cuda").device.type == "cuda"
        )
        assert there.cpu().device.type == here.device.type == "cpu"
        assert (there * torch.tensor(2.0)).is_cuda, "a CPU scalar is a number"
        assert there[torch.tensor([0, 1])].is_cuda, "CPU indices may index"
        meetings: list[Callable[[], Any]] = [
            lambda: there + here,
            lambda: F.linear(here, there),
            lambda: torch.cat([there, here]),
            lambda: here[there.argmax(dim=1)],
            lambda: there.index_select(0, torch.tensor(1)),
        ]
        for meeting in meetings:
            with pytest.raises(RuntimeError, match="found at least two devices"):
                meeting()
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
        with pytest.raises(TypeError, match="can't convert cuda"):
            np.asarray(there)
        weight = torch.nn.Parameter(there)
        (weight * there).sum().backward()
        assert weight.grad is not None and weight.grad.is_cuda, "backward passes are seen"


@pytest.mark.parametrize("bank", [True, False], ids=["bank", "images"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_runs(
    base_config: dict[str, Any], cpu_runs: Path, tmp_path: Path, method: str, bank: bool
) -> None:
    on_both(base_config, cpu_runs, tmp_path, method, f"run.bank={bank}")


@pytest.mark.parametrize("tower", ["vit", "bert", "bidirectional"])
@pytest.mark.parametrize("method", ["vip", "cocoop", "clip_lora", "clip_svd", "finetune", "maple"])
@pytest.mark.slow
def test_every_kind_of_tower_runs(
    base_config: dict[str, Any], model_folder: Path, cpu_runs: Path, tmp_path: Path, method: str, tower: str
) -> None:
    on_both(base_config, cpu_runs, tmp_path, method, f"backbone={model_folder / tower}.json")


@pytest.mark.parametrize(
    "settings",
    [
        ["train.optimizer=adamw", "train.lr=0.001", "train.max_grad_norm=0.1", "run.micro_batch=3"],
        ["run.text_memory_gib=0.0005"],
        ["train.select=last", "run.bank=false", "run.workers=2"],
    ],
    ids=["adamw", "text in parts", "loader processes"],
)
@pytest.mark.parametrize("method", ["vip", "cocoop"])
@pytest.mark.slow
def test_every_way_to_train_runs(
    base_config: dict[str, Any], cpu_runs: Path, tmp_path: Path, method: str, settings: list[str]
) -> None:
    on_both(base_config, cpu_runs, tmp_path, method, *settings)


@pytest.mark.parametrize("method", [name for name in method_names() if method_class(name).trains])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_half_precision_runs(base_config: dict[str, Any], tmp_path: Path, method: str, precision: str) -> None:
    """Autocast itself needs CUDA; what is stored, scaled and restored in half precision does not."""
    with pretended_gpu():
        run = execute(configured(base_config, tmp_path, method, "cuda", f"precision={precision}", "run.micro_batch=3"))
    assert np.isfinite(logits(run)).all()


@pytest.mark.parametrize("bank", [True, False], ids=["bank", "images"])
@pytest.mark.slow
def test_a_damaged_image_is_left_out(
    base_config: dict[str, Any], tmp_path: Path, one_damaged_image: None, bank: bool
) -> None:
    run = on_both(base_config, tmp_path, tmp_path, "coop", "data.on_error=skip", f"run.bank={bank}")
    assert len(logits(run)) == 20


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        *product(["vip", "cocoop"], ["sgd", "adamw"]),
        ("clip_lora", "adamw"),
        ("clip_svd", "adamw"),
        ("finetune", "adamw"),
        ("maple", "sgd"),
    ],
)
@pytest.mark.slow
def test_a_run_goes_on(
    base_config: dict[str, Any],
    cpu_runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    optimizer: str,
) -> None:
    settings = [f"train.optimizer={optimizer}", "train.lr=0.001", "run.checkpoint_steps=2"]
    whole = execute(configured(base_config, cpu_runs, method, "cpu", *settings))
    config = configured(base_config, tmp_path, method, "cuda", *settings)
    advance = Training.advance

    def dying(training: Training, loss: torch.Tensor) -> None:
        if training.step == 5:
            raise KeyboardInterrupt
        advance(training, loss)

    with pretended_gpu():
        monkeypatch.setattr(Training, "advance", dying)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
        monkeypatch.setattr(Training, "advance", advance)
        resumed = execute(config)
    assert '"resumed_after_step": 4' in (resumed / "provenance.json").read_text()
    np.testing.assert_allclose(logits(resumed), logits(whole), atol=1e-4)


@pytest.mark.parametrize("method", ["vip", "coop"])
@pytest.mark.slow
def test_packed_runs(base_config: dict[str, Any], tmp_path: Path, method: str) -> None:
    def configs(device: str) -> list[Config]:
        return [configured(base_config, tmp_path, method, device, f"seed={seed}") for seed in (1, 2, 3)]

    assert execute_together(configs("cpu")) == {}
    with pretended_gpu():
        assert execute_together(configs("cuda")) == {}
    for gpu in sorted((tmp_path / "cuda").glob(f"{METHODS[method]['name']}_*")):
        np.testing.assert_allclose(logits(gpu), logits(tmp_path / "cpu" / gpu.name), atol=1e-4)


def test_a_bank_is_built(base_config: dict[str, Any], tmp_path: Path) -> None:
    with pretended_gpu():
        fill_banks([configured(base_config, tmp_path, method, "cuda") for method in ("vip", "cocoop")])
    assert len(list((tmp_path / "cuda" / ".bank").glob("*/view-*.bin"))) > 3


@pytest.mark.parametrize(
    "method",
    ["coop_words", "cocoop", "vip", "linear_probe", "tip_adapter", "clip_lora", "clip_svd", "finetune", "maple"],
)
@pytest.mark.slow
def test_saved_prompts_are_scored(base_config: dict[str, Any], dataset: Path, cpu_runs: Path, method: str) -> None:
    from vipbench.harness.runs.transfer import evaluate_run

    run = execute(configured(base_config, cpu_runs, method, "cpu"))
    with pretended_gpu():
        scored = evaluate_run(run, dataset, "test", None, "cuda")
    np.testing.assert_allclose(logits(scored), logits(run), atol=1e-4)


@pytest.mark.slow
def test_symptoms_are_scored_and_filtered(model_folder: Path, dataset: Path, symptoms: Path) -> None:
    from vipbench.harness.commands.options import load
    from vipbench.harness.symptoms import filters, sets
    from vipbench.harness.symptoms.score import score_set

    name, symptom_set = str(model_folder / "vit.json"), sets.SymptomSet.load(symptoms)
    expected = score_set(symptom_set, Dataset(dataset), load(name, None, "cpu"))
    with pretended_gpu():
        backbone = load(name, None, "cuda")
        scored = score_set(symptom_set, Dataset(dataset), backbone)
        filters._centred_cosines(["a round mole.", "a jagged border.", "many colours."], backbone.text)
        sets.check(symptom_set, None, backbone.text)
    assert scored.accuracy == expected.accuracy


def test_copies_between_devices_are_made_in_one_place() -> None:
    """Towers, engines and the script that made the demo's CLIP move what they hold themselves."""
    allowed = {"devices.py", "backbone.py", "optimizer_state.py", "zero.py", "clip_training.py", "train_clip.py"}
    root = Path(__file__).parents[2]
    paths = [*root.glob("harness/**/*.py"), *root.glob("baselines/*.py")]
    assert len(paths) > 100
    for path in paths:
        if path.name not in allowed:
            moves = re.findall(
                r"^.*\.(?:cpu\(|cuda\(|to\((?:self\.)?(?:\w+\.)*device\b).*$", path.read_text("utf-8"), re.MULTILINE
            )
            assert not moves, f"{path}: {moves}"
