"""Each method against its plain second implementation: logits within 1e-5, parameters within 1e-4 after 5 SGD steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import plain
from tests.conftest import Towers
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class

CLASSES = ["melanoma", "basal cell carcinoma", "nevus"]
SYMPTOMS = [
    ["jagged uneven border", "many colours"],
    ["shiny bump"],
    ["round", "one even brown colour", "small", "flat"],
]
SETS = (
    [["jagged uneven border"], ["shiny bump"], ["round", "one even brown colour", "small"]],
    [["many colours", "dark"], ["pearly edge"], ["flat"]],
)
TASK = Task(CLASSES, SYMPTOMS, SETS)
KINDS = ["vit", "resnet", pytest.param("bert", marks=pytest.mark.slow), "bidirectional"]
STEPS, LR, MOMENTUM, DECAY = 5, 0.01, 0.9, 5e-4


def build(towers: dict[str, Towers], kind: str, name: str, **options: Any) -> tuple[Method, Tensor, Tensor]:
    torch.manual_seed(7)
    cls = method_class(name)
    method = cls(cls.Config(name=name, **options), TASK, towers[kind].backbone)
    features = F.normalize(torch.randn(4, towers[kind].backbone.dim), dim=-1)
    return method.train(), features, torch.tensor([0, 2, 1, 2])


def compare(
    method: Method, features: Tensor, labels: Tensor, logits: Callable[[Tensor, dict[str, Tensor]], Tensor]
) -> None:
    """Train the method with torch's SGD and the plain function with SGD written out; compare logits and parameters."""
    copies = {name: value.detach().clone().requires_grad_() for name, value in method.trainable().items()}
    velocity = {name: torch.zeros_like(value) for name, value in copies.items()}
    optimizer = torch.optim.SGD(method.trainable().values(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    for _ in range(STEPS):
        with torch.no_grad():
            expected = torch.stack([logits(feature, dict(method.trainable())) for feature in features])
        assert (method(features).logits - expected).abs().max() <= 1e-5
        optimizer.zero_grad()
        method.losses(method(features), labels)["cross_entropy"].mean().backward()
        optimizer.step()
        plain_logits = torch.stack([logits(feature, copies) for feature in features])
        log_probabilities = plain_logits - plain_logits.exp().sum(1, keepdim=True).log()
        loss = -torch.stack([log_probabilities[row, label] for row, label in enumerate(labels)]).sum() / len(labels)
        for (name, value), gradient in zip(
            copies.items(), torch.autograd.grad(loss, list(copies.values())), strict=True
        ):
            velocity[name] = MOMENTUM * velocity[name] + gradient + DECAY * value.detach()
            copies[name] = (value.detach() - LR * velocity[name]).requires_grad_()
    for name, value in method.trainable().items():
        assert (value - copies[name]).abs().max() <= 1e-4, name


def spread(context: Tensor) -> list[Tensor]:
    """One context per class, from a shared [1, M, w] or class-specific [C, M, w] parameter."""
    return list(context) if len(context) > 1 else [context[0]] * len(CLASSES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"position": "middle", "class_specific_context": True}])
def test_coop(towers: dict[str, Towers], kind: str, options: dict[str, Any]) -> None:
    options = {"context_length": 5, **options}
    model, tokenizer = towers[kind].model, towers[kind].tokenizer

    def logits(image: Tensor, values: dict[str, Tensor]) -> Tensor:
        contexts, position = spread(values["context"]), options.get("position", "end")
        return plain.coop(model, tokenizer, image, CLASSES, contexts, position)

    compare(*build(towers, kind, "coop", **options), logits)


def test_coop_front_with_worded_start(towers: dict[str, Towers]) -> None:
    model, tokenizer = towers["vit"].model, towers["vit"].tokenizer
    method, features, labels = build(towers, "vit", "coop", position="front", init_words="a photo of a")
    expected = plain.words(model, tokenizer, "a photo of a")
    assert torch.equal(method.trainable()["context"][0], expected)

    def logits(image: Tensor, values: dict[str, Tensor]) -> Tensor:
        return plain.coop(model, tokenizer, image, CLASSES, spread(values["context"]), "front")

    compare(method, features, labels, logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [2**12, 2**30])
def test_cocoop(towers: dict[str, Towers], kind: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer

    def logits(image: Tensor, values: dict[str, Tensor]) -> Tensor:
        names = {"w1": "meta_net.0.weight", "b1": "meta_net.0.bias", "w2": "meta_net.2.weight", "b2": "meta_net.2.bias"}
        net = {short: values[name] for short, name in names.items()}
        return plain.cocoop(model, tokenizer, image, CLASSES, values["context"][0], net)

    monkeypatch.setattr(towers[kind].backbone.text, "memory_bytes", memory)
    compare(*build(towers, kind, "cocoop"), logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge": "mean"},
        {"context": "fixed"},
        {"class_specific_context": True, "position": "front", "context_length": 3},
        {"attention_sink": True},
        {"sets": "ensemble", "class_specific_context": True},
        {"sets": "ensemble", "merge": "mean"},
    ],
    ids=["full", "no merge", "no context", "class-specific front", "sink", "ensemble", "ensemble of means"],
)
def test_vip(towers: dict[str, Towers], kind: str, options: dict[str, Any]) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer
    fixed = plain.words(model, tokenizer, "a photo of a")[None]

    def logits(image: Tensor, values: dict[str, Tensor]) -> Tensor:
        merge = None
        if options.get("merge") != "mean":
            names = {"t": "merge.queries", "wq": "merge.to_query.weight", "wk": "merge.to_key.weight"}
            merge = {short: values[name] for short, name in names.items()}
        contexts, position = spread(values.get("context", fixed)), options.get("position", "end")
        sets, sink = SETS if "sets" in options else [SYMPTOMS], "attention_sink" in options
        every = [plain.vip(model, tokenizer, image, own, contexts, merge, position, sink) for own in sets]
        return sum(every[1:], start=every[0]) / len(every)

    compare(*build(towers, kind, "vip", **options), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_shot(towers: dict[str, Towers], kind: str) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer

    def feature(text: str) -> Tensor:
        return plain.unit(plain.encode(model, tokenizer, plain.words(model, tokenizer, text)))

    def mean(features: list[Tensor]) -> Tensor:
        return torch.stack(features).sum(0) / len(features)

    def check(expected: list[Tensor], **options: Any) -> None:
        method, images, _ = build(towers, kind, "zero_shot", **options)
        plain_logits = model.logit_scale.exp() * images @ torch.stack(expected).T
        assert (method.eval()(images).logits - plain_logits).abs().max() <= 1e-5

    templates = ["a photo of a {}.", "this is {}, clearly."]
    check([feature(templates[0].format(name)) for name in CLASSES])
    means = [mean([feature(template.format(name)) for template in templates]) for name in CLASSES]
    check([plain.unit(merged) for merged in means], text="templates", templates=templates)
    check([mean([feature(f"{text}.") for text in texts]) for texts in SYMPTOMS], text="symptoms")
