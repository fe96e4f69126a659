"""CLIP-Adapter, TaskRes and LP++ against plain second implementations, and their recipes as published."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import plain, plain_features
from tests.baselines.test_methods_against_plain import CLASSES, compare
from tests.conftest import Towers
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import DEFAULT_TEMPLATES, Method, Support, SupportViews, Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.runs.resolve import resolve_config

TEMPLATES = ("a photo of a {}.", "this is {}, clearly.")
KINDS = ["vit", "resnet", pytest.param("bert", marks=pytest.mark.slow)]
LABELS = torch.tensor([0, 2, 1, 2])


def build(entry: Towers, name: str, templates: tuple[str, ...] = DEFAULT_TEMPLATES, **options: Any) -> Method:
    torch.manual_seed(7)
    cls = method_class(name)
    return cls(cls.Config(name=name, **options), Task(CLASSES, templates=templates), entry.backbone).train()


def features_of(entry: Towers, *norms: float) -> Tensor:
    """Image features [4, d] of these norms, 1 by default."""
    features = torch.randn(4, entry.backbone.dim, generator=torch.Generator().manual_seed(2))
    return F.normalize(features, dim=-1) * torch.tensor(norms or [1.0] * 4)[:, None]


def text_features(entry: Towers, templates: tuple[str, ...]) -> list[list[Tensor]]:
    """Un-normalised text features of each class in each template."""
    model, tokenizer = entry.model, entry.tokenizer
    with torch.no_grad():
        return [
            [plain_features.text_feature(model, tokenizer, name, template) for template in templates]
            for name in CLASSES
        ]


def ensembled(entry: Towers, templates: tuple[str, ...]) -> list[Tensor]:
    """The normalised means of normalised text features, of each class."""
    features = [[plain.unit(feature) for feature in own] for own in text_features(entry, templates)]
    return [plain.unit(sum(own[1:], start=own[0]) / len(own)) for own in features]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("templates", [DEFAULT_TEMPLATES, TEMPLATES], ids=["one template", "two templates"])
@pytest.mark.parametrize(("variant", "ratio"), [("original", 0.2), ("normalised", 0.5), ("normalised", 0.8)])
def test_clip_adapter(
    towers: dict[str, Towers], kind: str, templates: tuple[str, ...], variant: str, ratio: float
) -> None:
    entry, text = towers[kind], ensembled(towers[kind], templates)
    options = {} if ratio != 0.8 else {"ratio": ratio}
    function = plain_features.clip_adapter if variant == "original" else plain_features.clip_adapter_normalised

    def logits(image: Tensor, values: dict[str, Tensor]) -> Tensor:
        down, up = values["adapter.0.weight"], values["adapter.2.weight"]
        return function(image, text, down, up, entry.model.logit_scale.exp(), ratio)

    method = build(entry, "clip_adapter", templates, variant=variant, **options)
    dim = entry.backbone.dim
    assert {name: tuple(value.shape) for name, value in method.trainable().items()} == {
        "adapter.0.weight": (dim // 4, dim),
        "adapter.2.weight": (dim, dim // 4),
    }
    compare(method, features_of(entry, 2.0, 3.0, 4.0, 5.0), LABELS, logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("templates", [DEFAULT_TEMPLATES, TEMPLATES], ids=["one template", "two templates"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_taskres(towers: dict[str, Towers], kind: str, templates: tuple[str, ...], alpha: float) -> None:
    entry, text = towers[kind], text_features(towers[kind], templates)

    def logits(image: Tensor, values: dict[str, Tensor]) -> Tensor:
        return plain_features.taskres(image, text, values["residual"], entry.model.logit_scale.exp(), alpha)

    method = build(entry, "taskres", templates, **({} if alpha == 0.5 else {"alpha": alpha}))
    assert not method.trainable()["residual"].any()
    compare(method, features_of(entry), LABELS, logits)


def clusters(views: int, count: int, seed: int, noise: float = 1.0) -> Support:
    """Samples around a centre per class, of unequal numbers per class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2, 2])[torch.arange(count) % 4]
    centres = torch.randn(len(CLASSES), 32, generator=torch.Generator().manual_seed(1))
    raw = centres[labels] + 0.7 + noise * torch.randn(views, count, 32, generator=generator)
    norms = raw.norm(dim=-1)
    return Support(raw / norms[..., None], norms, labels, torch.zeros(views, count, len(CLASSES)))


def expected_fits(
    entry: Towers, method: Method, support: Support, epochs: int, reset: bool = False
) -> tuple[list[plain_features.Fitted], Tensor]:
    """The parameters of LP++ after each epoch, in float64, and its text features."""
    text = torch.stack(ensembled(entry, DEFAULT_TEMPLATES)).double()
    bias = method.learned()["bias"].double()
    features = support.features[0].double()
    return plain_features.lp_plus_plus(features, support.labels, text, bias, epochs, reset), text


def assert_fitted(method: Method, expected: plain_features.Fitted, within: float) -> None:
    """Compare what was learned, each tensor relative to its largest number where that is above 1."""
    for name, value in expected._asdict().items():
        assert (method.learned()[name] - value).abs().max() <= within * max(1, float(value.abs().max())), name


def test_lp_plus_plus(towers: dict[str, Towers]) -> None:
    """Without validation the last epoch: parameters after 5 epochs, and logits."""
    support, images = clusters(1, 16, 2), clusters(1, 6, 3).features[0]
    method = build(towers["vit"], "lp_plus_plus", epochs=5)
    assert method.support(method.config) == SupportViews(1, (0.5, 1.0))
    assert 0.01 < method.learned()["bias"].abs().max() <= 32**-0.5, "as torch's Linear begins"
    (*_, last), text = expected_fits(towers["vit"], method, support, 5)
    method.prepare(support, None)
    assert_fitted(method, last, within=1e-5)
    logits, expected = method(images).logits, last.logits(images.double(), text)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not method.trainable() and set(method.learned()) == set(last._fields)


def test_lp_plus_plus_adds_up_the_gradients_of_alpha(towers: dict[str, Towers]) -> None:
    """After 300 epochs it is where the published code is, and far from where a gradient set to zero leads."""
    support = clusters(1, 16, 2)
    method = build(towers["vit"], "lp_plus_plus")
    (*_, added), _ = expected_fits(towers["vit"], method, support, 300)
    (*_, reset), _ = expected_fits(towers["vit"], method, support, 300, reset=True)
    method.prepare(support, None)
    assert_fitted(method, added, within=1e-4)
    assert (method.learned()["alpha"] - reset.alpha).abs().max() > 1


def test_lp_plus_plus_keeps_the_last_of_the_best_epochs(towers: dict[str, Towers]) -> None:
    support, validation = clusters(1, 16, 2), clusters(1, 24, 11, noise=3.0)
    method = build(towers["vit"], "lp_plus_plus")
    fits, text = expected_fits(towers["vit"], method, support, 300)
    images = validation.features[0].double()
    predicted = [(images @ fit.weight.T + fit.bias + fit.alpha * (images @ text.T)).argmax(dim=1) for fit in fits]
    correct = [int((own == validation.labels).sum()) for own in predicted]
    best = [epoch for epoch, count in enumerate(correct) if count == max(correct)]
    assert len(best) > 1 and best[-1] < 299, "some are tied, and training goes on after them"
    method.prepare(support, validation)
    assert_fitted(method, fits[best[-1]], within=1e-4)
    first = fits[best[0]].weight
    assert (method.learned()["weight"] - first).abs().max() > 1e-2 * first.abs().max()


def test_lp_plus_plus_wants_an_image_of_each_class(towers: dict[str, Towers]) -> None:
    support = clusters(1, 16, 2)
    one_missing = Support(support.features, support.norms, support.labels.clamp(max=1), support.logits)
    with pytest.raises(UserError, match="lp_plus_plus: no training image of class 'nevus'"):
        build(towers["vit"], "lp_plus_plus").prepare(one_missing, None)


def test_recipes_are_those_that_were_published(base_config: dict[str, Any], model_folder: Path) -> None:
    def recipe(shots: int | str, **method: Any) -> dict[str, Any]:
        data = {**base_config["data"], "shots": shots}
        train = resolve_config({**base_config, "data": data, "method": method, "train": {}}).train
        assert train is not None and (train.select, train.steps) == ("last", None)
        return train.model_dump()

    for shots, of_coop, of_taskres in ((1, 50, 100), (4, 100, 100), (8, 200, 200), (16, 200, 200), ("all", 200, 200)):
        original = {"optimizer": "sgd", "lr": 0.002, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 32}
        original |= {"epochs": of_coop, "warmup_epochs": 1, "crop_scale": (0.08, 1.0)}
        assert original.items() <= recipe(shots, name="clip_adapter").items()
        other = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 32}
        other |= {"epochs": 20, "warmup_epochs": 1, "crop_scale": (0.5, 1.0)}
        assert other.items() <= recipe(shots, name="clip_adapter", variant="normalised").items()
        residual = {"optimizer": "adam", "lr": 0.002, "weight_decay": 5e-4, "batch_size": 256, "betas": None}
        residual |= {"epochs": of_taskres, "warmup_epochs": 1}
        assert residual.items() <= recipe(shots, name="taskres").items()
