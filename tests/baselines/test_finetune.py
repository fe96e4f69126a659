"""Fine-tuning against a plain second implementation, towers of timm, and what of a run they are."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests import plain_towers
from tests.conftest import TEXT, Towers
from tests.zoo import small_config
from vipbench.harness.config.identity import Digests, run_name
from vipbench.harness.config.schema import BackboneConfig, TrainConfig
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class, method_digest
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.open_clip import create
from vipbench.harness.models.timm_tower import TimmTower
from vipbench.harness.models.trained_tower import trained_view
from vipbench.harness.runs.api import Run
from vipbench.harness.runs.execute import execute
from vipbench.harness.runs.resolve import resolve_config
from vipbench.harness.runs.transfer import evaluate_run
from vipbench.harness.training.loop import WeightedLoss
from vipbench.harness.training.optimizer import make_optimizer

CLASSES = ["melanoma", "basal cell carcinoma", "nevus"]
LABELS = torch.tensor([0, 2, 1, 2])
LAST = {  # how the names begin of the weights of a tower's last block, and of what follows it
    "vit": ("transformer.resblocks.1.", "ln_post.", "proj"),
    "resnet": ("layer4.0.", "attnpool."),
    "timm": ("trunk.blocks.5.", "trunk.norm.", "head."),
}


@pytest.fixture(scope="module")
def tunable(towers: dict[str, Towers], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Towers]:
    path = tmp_path_factory.mktemp("timm") / "timm.json"
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 40, "vision_cfg": vision, "text_cfg": TEXT}}))
    model, tokenizer, architecture = create(BackboneConfig(name=str(path)))
    return {**towers, "timm": Towers(Backbone(model, tokenizer, architecture), model, tokenizer)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small ResNet of timm, as timm writes it; its batch norms have statistics."""
    torch.manual_seed(4)
    model = timm.create_model("test_resnet")
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0, 0.1)
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(model.state_dict(), path)
    return path


def start(backbone: Backbone, **options: Any) -> Method:
    cls = method_class("finetune")
    return cls(cls.Config(name="finetune", **options), Task(CLASSES), backbone)


def pixels(backbone: Backbone) -> Tensor:
    return torch.randn(4, *backbone.pixels_shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("blocks", ["last", "all"])
@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_it_learns_what_plain_steps_learn(tunable: dict[str, Towers], kind: str, blocks: str) -> None:
    """Logits and weights after five steps, of a plain copy of open_clip's own tower; the backbone keeps its bits."""
    backbone, inputs = tunable[kind].backbone, pixels(tunable[kind].backbone)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    method = start(backbone, blocks=blocks, tower_rate=0.1).train()
    assert not method(inputs).logits.any(), "all classes are equally likely at first"
    recipe = TrainConfig(**{**method.recipe(None, 16, ""), "lr": 0.01, "eps": 1e-5})
    optimizer, loss = make_optimizer(method.parameter_groups(), recipe), WeightedLoss(method)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("lr_factor", 1.0)

    tower = copy.deepcopy(tunable[kind].model.visual).eval()
    own = {name: value for name, value in tower.named_parameters() if blocks == "all" or name.startswith(LAST[kind])}
    head = [torch.zeros(len(CLASSES), backbone.dim, requires_grad=True), torch.zeros(len(CLASSES), requires_grad=True)]
    assert set(method.trainable()) == {"head.weight", "head.bias"} | {f"tower.{name}" for name in own}
    for value in own.values():
        value.requires_grad_()
    states: list[dict[int, tuple[Tensor, Tensor]]] = [{}, {}]
    for step in range(1, 6):
        optimizer.zero_grad()
        loss(inputs, LABELS, torch.full((4,), 0.25), torch.arange(4), torch.tensor(0)).backward()
        optimizer.step()
        loss_of_copy = F.cross_entropy(tower(inputs) @ head[0].T + head[1], LABELS)
        gradients = torch.autograd.grad(loss_of_copy, [*own.values(), *head])
        settings = {"decay": 0.01, "eps": 1e-5}
        plain_towers.adamw(list(own.values()), gradients[: len(own)], states[0], step, lr=0.001, **settings)
        plain_towers.adamw(head, gradients[len(own) :], states[1], step, lr=0.01, **settings)
    learned = method.trainable()
    for name, value in [*own.items(), ("head.weight", head[0]), ("head.bias", head[1])]:
        found = learned[name if name in learned else f"tower.{name}"]
        assert (found - value).abs().max() <= 1e-4, name
    with torch.no_grad():
        expected = tower(inputs) @ head[0].T + head[1]
        assert (method(inputs).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    state = backbone.state_dict()
    assert state.keys() == before.keys() and all(torch.equal(state[name], value) for name, value in before.items())
    assert not any(value.requires_grad for value in backbone.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_what_is_frozen_is_the_backbones_own(tunable: dict[str, Towers], kind: str) -> None:
    backbone = tunable[kind].backbone
    method = start(backbone)
    tower = method.get_submodule("tower")
    assert not any(module.training for module in method.train().get_submodule("tower").modules())
    frozen = {id(tensor) for tensor in [*backbone.parameters(), *backbone.buffers()]}
    held = {id(tensor) for tensor in [*tower.parameters(), *tower.buffers()]}
    assert held - frozen == {id(value) for name, value in method.trainable().items() if name.startswith("tower.")}
    assert set(method.learned()) == set(method.trainable())


def test_the_last_block_of_timms_models() -> None:
    """The one that timm counts last, and what it counts to none: pooling, norms and convolutions behind it."""
    for name, block in {
        "test_vit3": "blocks.8.",
        "test_convnext": "stages.3.blocks.1.",
        "test_resnet": "layer4.0.",
    }.items():
        tower = trained_view(timm.create_model(name, num_classes=0).requires_grad_(False), "last")
        learned = {key for key, value in tower.named_parameters() if value.requires_grad}
        assert learned and all(
            key.startswith((block, "attn_pool.", "head.norm.", "fc_norm.", "norm.")) for key in learned
        )
        assert {
            key for key, _ in tower.named_parameters() if key.startswith((block, "attn_pool.", "head.norm."))
        } <= learned
    with pytest.raises(
        UserError, match=r"method\.blocks: the last block of a Linear is not known; use method.blocks=all"
    ):
        trained_view(torch.nn.Linear(2, 2), "last")


def test_a_tower_of_timm_sees_pixels_normalised_its_way(vit_backbone: Backbone, weights: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    tower: Any = TimmTower("test_resnet.r160_in1k", weights, vit_backbone)
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    assert vit_backbone.mean != mean and tower.model.pretrained_cfg["mean"] == mean
    plain: Any = timm.create_model("test_resnet", checkpoint_path=str(weights)).eval()
    values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    normalised = (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(normalised[None]), pre_logits=True)
        found = tower(vit_backbone.eval_transform(picture)[None])
    assert found.shape == (1, tower.dim) and expected.abs().max() > 0
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_towers_of_timm_that_cannot_be_used(
    vit_backbone: Backbone, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each: what, where, and what would be right."""

    def refusal(name: str, path: Path | None) -> str:
        with pytest.raises(UserError) as refused:
            TimmTower(name, path, vit_backbone)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert (
        "method.tower: timm offers no weights 'resnet50.a1', and method.weights names no file; did you mean 'resnet50."
        in refusal("resnet50.a1", None)
    )
    assert "timm has no model 'test_resnt'; did you mean 'test_resnet'" in refusal("test_resnt", weights)
    whole = timm.create_model("test_resnet").state_dict()
    partial = {name: value for name, value in whole.items() if not name.startswith("layer3")}
    save_file(partial, tmp_path / "partial.safetensors")
    assert "Missing key(s)" in refusal("test_resnet", tmp_path / "partial.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    assert f"method.weights: {tmp_path}/cut.safetensors: test_resnet cannot be loaded" in refusal(
        "test_resnet", tmp_path / "cut.safetensors"
    )
    assert "cannot be loaded" in refusal("test_resnet", tmp_path / "none.safetensors")
    torch.save({"model": Path("x")}, tmp_path / "pickled.pth")
    assert "No automatic unsafe pickle fallback" in refusal("test_resnet", tmp_path / "pickled.pth")
    save_file(
        {**whole, "layer1.0.conv1.weight": whole["layer1.0.conv1.weight"] * torch.nan}, tmp_path / "nan.safetensors"
    )
    assert "not finite (layer1.0.conv1.weight)" in refusal("test_resnet", tmp_path / "nan.safetensors")
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "vit.safetensors")
    assert "deit_tiny_patch16_224 takes images of 224 x 224 pixels, but those of the backbone have 32 x 32" in refusal(
        "deit_tiny_patch16_224", tmp_path / "vit.safetensors"
    )
    monkeypatch.setattr(
        timm, "create_model", lambda *_, **__: (_ for _ in ()).throw(OSError("the hub\ncannot be reached"))
    )
    assert "method.tower: resnet50.a1_in1k cannot be loaded: OSError: the hub cannot be reached" in refusal(
        "resnet50.a1_in1k", None
    )
    with pytest.raises(UserError, match="weights has no effect without a tower of timm"):
        resolve_config({"method": {"name": "finetune", "weights": "x"}, "data": {"path": "x"}})


def test_weights_count_by_what_they_hold(weights: Path, tmp_path: Path) -> None:
    def name(path: Path) -> str:
        method = {"name": "finetune", "tower": "test_resnet", "weights": str(path)}
        config = resolve_config({"method": method, "data": {"path": "x"}})
        digest = method_digest("finetune", config.method.files())
        return run_name(config, Digests("d" * 64, "b" * 64, None, digest))

    same, other = tmp_path / "same.safetensors", tmp_path / "other.safetensors"
    same.write_bytes(weights.read_bytes())
    other.write_bytes(weights.read_bytes() + b" ")
    assert name(same) == name(weights) != name(other)
    assert method_digest("finetune") is None
    with pytest.raises(UserError, match=r"method\.weights: .*none: cannot be read: No such file"):
        name(tmp_path / "none")


def test_a_run_from_timms_weights(base_config: dict[str, Any], dataset: Path, weights: Path, tmp_path: Path) -> None:
    """Trained, saved and scored again; other classes, and weights that changed since, are refused."""
    own = tmp_path / "own.safetensors"
    own.write_bytes(weights.read_bytes())
    options = {"name": "finetune", "tower": "test_resnet.r160_in1k", "weights": str(own), "blocks": "all"}
    base = small_config(base_config, "finetune", tmp_path / "runs").to_mapping()
    run = execute(resolve_config({**base, "method": {**base["method"], **options}}))

    def logits(path: Path) -> np.ndarray:
        return np.stack(pd.read_parquet(path / "predictions.parquet")["logits"].to_list())

    assert np.abs(logits(evaluate_run(run, dataset, "test", None, "cpu")) - logits(run)).max() <= 1e-4
    files = [path for path in run.rglob("*") if path.stat().st_size > own.stat().st_size / 2]
    assert [path.name for path in files] == ["prompts.safetensors"], "what was learned is saved once"
    with pytest.raises(UserError, match=r"finetune learned for .* are other classes"):
        Run(run).restore(torch.device("cpu"), ["a", "b", "c"], [])
    own.write_bytes(own.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"the code and method\.weights of method 'finetune' is not what it was"):
        evaluate_run(run, dataset, "test", None, "cpu")
