"""Methods beyond their equations: memory, caching, class order, what fits, what is refused."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class, method_names
from vipbench.harness.models.backbone import Backbone
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
