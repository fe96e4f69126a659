"""GDA, CLAP and SS-Text against plain second implementations, and against what defines them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import plain
from tests.baselines.test_zoo_against_plain import CLASSES, build, support_of
from tests.conftest import Towers
from vipbench.baselines.gda import ALPHAS, shrunk_precision
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Support, Task
from vipbench.harness.training.loop import WeightedLoss

TEMPLATES = ("a photo of a {}.", "a picture of {}.", "{}, close by.")
SEVERAL = Task(CLASSES, templates=TEMPLATES)


def raw_texts(towers: Towers) -> list[Tensor]:
    return [plain.raw_template_feature(towers.model, towers.tokenizer, name, TEMPLATES) for name in CLASSES]


def mean_units(towers: Towers) -> list[Tensor]:
    """Mean over templates of normalised text features, class by class."""
    each = [
        [plain.unit(plain.raw_template_feature(towers.model, towers.tokenizer, name, (one,))) for one in TEMPLATES]
        for name in CLASSES
    ]
    return [torch.stack(own).mean(dim=0) for own in each]


def of_classes(support: Support, labels: list[int]) -> Support:
    return Support(support.features, support.norms, torch.tensor(labels), support.logits)


def images(dim: int) -> Tensor:
    return support_of(dim, 1, 6, 4).features[0]


def logits(method: Method, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return method.eval()(inputs).logits


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("alpha", [0.001, 1.0])
def test_gda(towers: dict[str, Towers], kind: str, alpha: float) -> None:
    """With fewer samples than dimensions and with more, and classes of unequal numbers."""
    method = build(towers, kind, "gda", SEVERAL, alpha=alpha)
    dim = method.backbone.dim
    support = of_classes(support_of(dim, 10, 5, 2), [0, 0, 1, 2, 0])
    method.prepare(support, None)
    text = [plain.unit(feature) for feature in mean_units(towers[kind])]
    samples, labels = support.features.flatten(0, 1), support.labels.repeat(10)
    inputs = images(dim)
    expected = torch.stack([plain.gda_logits(image, text, samples, labels, alpha) for image in inputs])
    found, expected = (rows - rows.mean(dim=1, keepdim=True) for rows in (logits(method, inputs).double(), expected))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_gda_chooses_alpha_on_validation_alone(towers: dict[str, Towers]) -> None:
    support, validation = support_of(32, 10, 6, 2), support_of(32, 1, 60, 3)

    def chosen(held_out: Support | None, **options: Any) -> float:
        method = build(towers, "vit", "gda", **options)
        method.prepare(support, held_out)
        return float(method.learned()["alpha"])

    correct = []
    for alpha in ALPHAS:
        method = build(towers, "vit", "gda", alpha=alpha)
        method.prepare(support, None)
        correct.append(int((logits(method, validation.features[0]).argmax(dim=1) == validation.labels).sum()))
    assert chosen(validation) == pytest.approx(ALPHAS[correct.index(max(correct))])
    assert correct.index(max(correct)) > 0, "the search went further than its first candidate"
    assert chosen(None) == pytest.approx(0.1)
    assert chosen(validation, alpha=3.0) == chosen(None, alpha=3.0) == 3.0


def test_gda_of_samples_on_their_class_means(towers: dict[str, Towers]) -> None:
    """The covariance is 0, and its pseudoinverse too: zero-shot classification is left."""
    assert not shrunk_precision(torch.zeros(4, 3).double()).any()
    assert not shrunk_precision(torch.zeros(1, 3).double()).any()
    method = build(towers, "vit", "gda")
    one = support_of(32, 1, 3, 2)
    method.prepare(Support(one.features.expand(10, -1, -1), one.norms, one.labels, one.logits), None)
    zero_shot = build(towers, "vit", "zero_shot")
    inputs = images(32)
    assert torch.equal(logits(method, inputs).argmax(dim=1), logits(zero_shot, inputs).argmax(dim=1))


def test_gda_wants_an_image_of_each_class(towers: dict[str, Towers]) -> None:
    with pytest.raises(UserError, match="gda: no training image of class 'nevus'"):
        build(towers, "vit", "gda").prepare(of_classes(support_of(32, 10, 4, 2), [0, 1, 1, 0]), None)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_clap(towers: dict[str, Towers], kind: str) -> None:
    method = build(towers, kind, "clap", SEVERAL)
    dim, scale = method.backbone.dim, float(method.backbone.logit_scale)
    support = support_of(dim, 20, 7, 2)
    method.prepare(support, None)
    text = raw_texts(towers[kind])
    penalties = plain.clap_penalties(scale, support.features, support.labels, text)
    assert (method.get_buffer("penalties") - torch.tensor(penalties)).abs().max() <= 1e-5
    weights, inputs, labels = torch.stack(text), support.features[0], support.labels
    (parameter,) = method.trainable().values()
    loss, own = WeightedLoss(method.train()), torch.optim.SGD([parameter], 0.1, momentum=0.9)
    velocity = torch.zeros_like(weights)
    sample_weights = torch.full((len(inputs),), 1 / len(inputs))
    for _ in range(5):
        weights.requires_grad_()
        value = plain.clap(scale, inputs, labels, text, weights, penalties)
        (gradient,) = torch.autograd.grad(value, weights)
        total = loss(inputs, labels, sample_weights, torch.arange(len(inputs)), torch.tensor(0))
        assert total.item() == pytest.approx(value.item(), rel=1e-5)
        own.zero_grad()
        total.backward()
        own.step()
        velocity = 0.9 * velocity + gradient
        weights = weights.detach() - 0.1 * velocity
    assert (weights - torch.stack(text)).abs().max() > 0.01, "it learned"
    assert (parameter - weights).abs().max() <= 1e-4
    expected = torch.stack([torch.stack([scale * image @ plain.unit(w) for w in weights]) for image in images(dim)])
    assert (logits(method, images(dim)) - expected).abs().max() <= 1e-5 * scale


def test_clap_starts_at_zero_shot(towers: dict[str, Towers]) -> None:
    inputs = images(32)
    start, zero_shot = build(towers, "vit", "clap"), build(towers, "vit", "zero_shot")
    assert (logits(start, inputs) - logits(zero_shot, inputs)).abs().max() <= 1e-4


def test_clap_holds_a_class_without_images_as_the_others(towers: dict[str, Towers]) -> None:
    method = build(towers, "vit", "clap")
    method.prepare(of_classes(support_of(32, 20, 4, 2), [0, 1, 1, 0]), None)
    penalties = method.get_buffer("penalties")
    assert penalties[2] == pytest.approx(float(penalties[:2].mean()))


@pytest.mark.parametrize("name", ["ss_text", "ss_text_plus"])
@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 0, 1, 0]], ids=["all", "one absent"])
def test_ss_text(towers: dict[str, Towers], kind: str, name: str, labels: list[int]) -> None:
    method = build(towers, kind, name, SEVERAL)
    dim, scale = method.backbone.dim, float(method.backbone.logit_scale)
    support = of_classes(support_of(dim, 1, 7, 2), labels)
    method.prepare(support, None)
    text = mean_units(towers[kind])
    weights = plain.ss_text(scale, support.features[0], support.labels, text, plus=name == "ss_text_plus")
    found = method.learned()["weight"]
    assert (found - torch.stack(weights)).abs().max() <= 1e-5 * float(found.abs().max())
    inputs = images(dim)
    expected = torch.stack([torch.stack([scale * image @ plain.unit(w) for w in weights]) for image in inputs])
    assert (logits(method, inputs) - expected).abs().max() <= 1e-5 * scale


def test_ss_text_is_the_minimum_of_its_objective(towers: dict[str, Towers]) -> None:
    """Of -(1 / N) sum <f, w_label> / tau + lambda / 2 |w - t|^2 with lambda = 1 / N."""
    method, support = build(towers, "vit", "ss_text"), support_of(32, 1, 7, 2)
    text = method.learned()["weight"].clone()
    method.prepare(support, None)
    weights = method.learned()["weight"].double().requires_grad_()
    fit = (support.features[0] * weights[support.labels]).sum() * method.backbone.logit_scale / 7
    (slope,) = torch.autograd.grad((weights - text).square().sum() / 2 / 7 - fit, weights)
    assert slope.abs().max() <= 1e-5


def test_equal_numbers_of_images_tell_ss_text_plus_by_its_repulsion_alone(towers: dict[str, Towers]) -> None:
    support = support_of(32, 1, 9, 2)
    plus = build(towers, "vit", "ss_text_plus")
    text = plus.learned()["weight"].clone()
    plus.prepare(support, None)
    sums = F.one_hot(support.labels).float().T @ support.features[0] * plus.backbone.logit_scale
    weights = text + sums / 3
    assert (
        plus.learned()["weight"] - weights + F.normalize(2 * weights - weights.mean(dim=0), dim=-1)
    ).abs().max() < 1e-5
