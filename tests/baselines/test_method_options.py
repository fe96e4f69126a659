"""Methods beyond their equations: memory, caching, class order, what fits, what is refused."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import MODELS
from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.methods.vip import ViP
from vipbench.harness.models.backbone import Backbone, load_backbone
from vipbench.harness.models.prompts import PromptBatch

CLASSES = ["melanoma", "nevus"]
TASK = Task(CLASSES, [["jagged border"], ["round", "small"]])


def build(backbone: Backbone, name: str, task: Task = TASK, **options: object) -> Method:
    torch.manual_seed(0)
    cls = method_class(name)
    return cls(cls.Config(name=name, **options), task, backbone)


@contextmanager
def count_saved() -> Iterator[dict[int, int]]:
    """Bytes that autograd keeps for the backward pass, by storage."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def test_cocoop_keeps_no_activations_beyond_its_bound(vit_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 32 with 100 classes is 3200 prompts; what is kept for the backward pass is far less than their activations."""
    task = Task([f"finding number {index}" for index in range(100)])
    method = build(vit_backbone, "cocoop", task)
    inputs = F.normalize(torch.randn(32, vit_backbone.dim), dim=-1)
    held, gradients = [], []
    for memory in (2**40, 2**20):
        monkeypatch.setattr(vit_backbone.text, "memory_bytes", memory)
        method.zero_grad()
        with count_saved() as kept:
            loss = method.losses(method(inputs), torch.zeros(32, dtype=torch.long))["cross_entropy"].sum()
        held.append(sum(kept.values()))
        loss.backward()
        gradients.append([parameter.grad for parameter in method.trainable().values()])
    assert held[1] < 0.5 * held[0], "nothing would have been saved"
    assert all((first - second).abs().max() < 1e-4 for first, second in zip(*gradients, strict=True))


@contextmanager
def count_kept() -> Iterator[dict[int, int]]:
    """Bytes by storage of all that a forward pass leaves behind: saved by autograd, or held to compute from once more."""
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), Tensor)}
    with count_saved() as kept:
        yield kept
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor) and id(thing) not in before:
                kept[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()


@pytest.mark.slow
@pytest.mark.parametrize("class_specific", [False, True])
def test_vip_trains_5000_classes_within_its_bound(
    vit_backbone: Backbone, monkeypatch: pytest.MonkeyPatch, class_specific: bool
) -> None:
    """Beside the features of the 10,000 symptoms, a step keeps less than the bound, and computes the same as without one."""
    classes, bound = 5000, 2**22
    symptoms = [[f"sign {index}", f"a mark of kind {index % 7}"] for index in range(classes)]
    task = Task([f"finding {index}" for index in range(classes)], symptoms)
    method = build(vit_backbone, "vip", task, class_specific_context=class_specific).train()
    parameters = sum(value.nbytes for value in method.trainable().values())
    features, contexts = 2 * classes * 32 * 4, (2 * classes * 4 * 32 * 4 if class_specific else 0)
    inputs, labels = F.normalize(torch.randn(4, vit_backbone.dim), dim=-1), torch.tensor([0, 17, 4998, 4999])
    found = []
    for memory in (2**40, bound):
        monkeypatch.setattr(vit_backbone.text, "memory_bytes", memory)
        method.zero_grad()
        with count_kept() as kept:
            output = method(inputs)
            loss = method.losses(output, labels)["cross_entropy"].sum()
        loss.backward()
        gradients = [value.grad.clone() for value in method.trainable().values() if value.grad is not None]
        found.append((sum(kept.values()), output.logits.detach(), gradients))
        del output, loss, gradients, kept
    (free, logits, gradients), (held, bounded_logits, bounded_gradients) = found
    # of the features: as they are, as they were in parts, by class, their keys, and what is merged and normalised of them
    rest = parameters + contexts + 6 * features
    assert held <= bound + rest < free / 10
    assert (logits - bounded_logits).abs().max() < 1e-5
    assert len(gradients) == 4
    assert all((one - other).abs().max() < 1e-5 for one, other in zip(gradients, bounded_gradients, strict=True))


def gradients_of(method: Method, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the summed cross-entropy, by parameter."""
    loss = method.losses(method(inputs), labels)["cross_entropy"].sum()
    learned = method.trainable()
    return dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))


def test_attention_over_one_symptom_is_learned_with_a_sink_only(vit_backbone: Backbone) -> None:
    """A softmax over one score is 1: without a sink no gradient reaches Wq and Wk, with it the weight is sigmoid(score)."""
    task = Task(CLASSES, [["jagged border"], ["round"]])
    inputs = F.normalize(torch.randn(3, vit_backbone.dim), dim=-1)
    for sink in (False, True):
        method = build(vit_backbone, "vip", task, attention_sink=sink)
        assert isinstance(method, ViP) and method.merge is not None
        learned, gradients = method.trainable(), gradients_of(method, inputs, torch.tensor([0, 1, 0]))
        for name in ("merge.to_query.weight", "merge.to_key.weight"):
            assert bool(gradients[name].abs().max() > 1e-6) == sink
        features = torch.randn(1, 2, 1, vit_backbone.dim)
        query = learned["merge.queries"] @ learned["merge.to_query.weight"].T
        score = (query * (features[0, :, 0] @ learned["merge.to_key.weight"].T)).sum(dim=-1) / vit_backbone.dim**0.5
        weight = score.sigmoid() if sink else torch.ones(2)
        merged = method.merge(features, torch.ones(1, 2, 1, dtype=torch.bool))
        assert torch.allclose(merged[0], learned["merge.queries"] + weight[:, None] * features[0, :, 0], atol=1e-6)


def test_the_logit_bias_moves_logits_and_nothing_else(vit_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method.logit_bias: the backbone's logits have no bias"):
        build(vit_backbone, "vip", logit_bias=True)
    (tmp_path / "biased.json").write_text(json.dumps({"model_cfg": {**MODELS["vit"], "init_logit_bias": -10.0}}))
    backbone = load_backbone(BackboneConfig(name=str(tmp_path / "biased.json")))
    inputs, labels = F.normalize(torch.randn(3, backbone.dim), dim=-1), torch.tensor([0, 1, 0])
    without, biased = (build(backbone, "vip", logit_bias=given).train() for given in (None, True))
    logits = [method(inputs).logits for method in (without, biased)]
    assert torch.allclose(logits[1], logits[0] - 10.0, atol=1e-5)
    # the probability by which SigLIP is trained, of an image and a text, by its equation
    assert isinstance(without, ViP)
    cosines = inputs @ without.class_features().T
    expected = 1 / (1 + torch.exp(10.0 - backbone.logit_scale * cosines))
    assert torch.allclose(logits[1].sigmoid(), expected, rtol=1e-4, atol=0)
    gradients = [gradients_of(method, inputs, labels) for method in (without, biased)]
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5) for name in gradients[0])


def test_class_features_are_computed_once_in_evaluation(vit_backbone: Backbone) -> None:
    method, inputs = build(vit_backbone, "vip"), torch.randn(3, vit_backbone.dim)
    method.eval()
    first = method(inputs).logits
    with torch.no_grad():
        method.trainable()["context"].add_(1.0)
    assert torch.equal(method(inputs).logits, first), "nothing is computed again within evaluation"
    method.eval()
    assert not torch.equal(method(inputs).logits, first), "what was learned since is seen at the next call of eval"


def test_symptom_order_of_classes_is_the_datasets(vit_backbone: Backbone) -> None:
    inputs = F.normalize(torch.randn(5, vit_backbone.dim), dim=-1)
    forth = build(vit_backbone, "zero_shot", text="symptoms").eval()(inputs).logits
    assert TASK.symptoms is not None
    back = Task(CLASSES[::-1], TASK.symptoms[::-1])
    assert torch.allclose(
        build(vit_backbone, "zero_shot", back, text="symptoms").eval()(inputs).logits.flip(1), forth, atol=1e-6
    )


@pytest.mark.parametrize(
    "name",
    [
        *("coop", "cocoop", "kgcoop", "prograd", "biomedcoop", "tip_adapter", "vip", "zero_shot"),
        *("clip_adapter", "taskres", "lp_plus_plus"),
    ],
)
def test_a_text_that_is_too_long_is_named(vit_backbone: Backbone, name: str) -> None:
    long = "very " * 90
    task = Task(["nevus", long], [["round"], [long]])
    options = {"text": "symptoms"} if name == "zero_shot" else {}
    with pytest.raises(UserError, match=r"class .*very .* takes 77; shorten it"):
        build(vit_backbone, name, task, **options)


def test_all_methods_are_found_by_name() -> None:
    prompts = {"coop", "cocoop", "vip", "kgcoop", "prograd", "biomedcoop"}
    assert prompts | {"zero_shot", "linear_probe", "tip_adapter", "tip_adapter_f"} <= set(method_names())


@pytest.mark.parametrize("name", ["coop", "cocoop", "vip", "kgcoop", "prograd", "biomedcoop"])
def test_only_prompts_are_trainable(vit_backbone: Backbone, name: str) -> None:
    method = build(vit_backbone, name)
    assert not any(key.startswith("backbone") for key in method.trainable())
    assert sum(value.numel() for value in method.trainable().values()) < 20_000


def test_names_with_underscores_read_as_words(vit_backbone: Backbone) -> None:
    spaced, under = (build(vit_backbone, "coop", Task([name, "nevus"])) for name in ("basal cell", "basal_cell"))
    assert isinstance(spaced.prompts, PromptBatch) and isinstance(under.prompts, PromptBatch)
    assert torch.equal(spaced.prompts.embeddings, under.prompts.embeddings)
