"""Methods with losses of their own, and methods that are fitted, against plain second implementations."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import plain
from tests.conftest import Towers
from vipbench.baselines.biomedcoop import BiomedCoOp
from vipbench.baselines.linear_probe import choose_c
from vipbench.baselines.prograd import NOISE
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Support, Task
from vipbench.harness.methods.registry import method_class
from vipbench.harness.training.loop import WeightedLoss

CLASSES = ["melanoma", "basal cell carcinoma", "nevus"]
SYMPTOMS = [
    ["jagged uneven border", "many colours", "large", "dark", "it grows"],
    ["shiny bump", "pearly edge", "pink", "small vessels", "an ulcer in the middle"],
    ["round", "one even brown colour", "small", "flat", "smooth"],
]
TASK = Task(CLASSES, SYMPTOMS, (SYMPTOMS,))
KINDS = ["vit", "bert"]
STEPS, LR = 5, 0.01
LABELS = torch.tensor([0, 2, 1, 2])

Loss = Callable[[Tensor, Tensor], Sequence[Tensor]]  # of features [B, d] and a context [M, w]


def build(towers: dict[str, Towers], kind: str, name: str, task: Task = TASK, **options: Any) -> Method:
    torch.manual_seed(7)
    cls = method_class(name)
    return cls(cls.Config(name=name, **options), task, towers[kind].backbone)


def own_gradient(method: Method, features: Tensor) -> Tensor:
    """The gradient of the context as the training loop takes it, from the mean over a batch."""
    loss = WeightedLoss(method.train())
    seen = None if type(method).statistics is Method.statistics else method.statistics(features)
    weights, key = torch.full((len(features),), 1 / len(features)), torch.tensor(0)
    total = loss(features, LABELS, weights, torch.arange(len(features)), key, seen)
    parameters = loss.trainable()
    if not loss.combines:
        total = total[None]
    found = [
        dict(zip(parameters, torch.autograd.grad(own, list(parameters.values()), retain_graph=True), strict=True))
        for own in total
    ]
    combined = loss.combine(found) if loss.combines else found[0]
    return combined["method.context"]


def compare(
    method: Method, losses: Loss, combine: Callable[[Sequence[Tensor]], Tensor] = lambda found: found[0], seed: int = 7
) -> None:
    """Train the method and the plain losses by plain gradient descent; compare gradients at each step, and where they end."""
    torch.manual_seed(seed)
    features = F.normalize(torch.randn(4, method.backbone.dim), dim=-1)
    context = method.trainable()["context"]
    copy = context.detach().clone()[0]
    for _ in range(STEPS):
        copy.requires_grad_()
        found = [torch.autograd.grad(loss, copy, retain_graph=True)[0] for loss in losses(features, copy)]
        expected, gradient = combine(found), own_gradient(method, features)
        assert (gradient[0] - expected).norm() <= 1e-4 * expected.norm()
        copy = copy.detach() - LR * expected
        with torch.no_grad():
            context.sub_(LR * gradient)
    assert (context[0] - copy).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_kgcoop(towers: dict[str, Towers], kind: str) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer

    def losses(features: Tensor, context: Tensor) -> list[Tensor]:
        return [plain.kgcoop(model, tokenizer, features, LABELS, CLASSES, context, weight=5.0)]

    compare(build(towers, kind, "kgcoop", weight=5.0), losses)


@pytest.mark.parametrize(("kind", "length", "seeds"), [("vit", 9, 6), ("bert", 40, 1)])
def test_prograd(towers: dict[str, Towers], kind: str, length: int, seeds: int) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer
    method = build(towers, kind, "prograd", context_length=length, temperature=2.0, projection=0.7)
    opposed = set()

    def losses(features: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return plain.prograd(model, tokenizer, features, LABELS, CLASSES, context, temperature=2.0)

    def combine(found: Sequence[Tensor]) -> Tensor:
        opposed.add(bool((found[0] * found[1]).sum() < 0))
        return plain.projected(found[0], found[1], factor=0.7)

    for seed in range(seeds):
        compare(method, losses, combine, seed)
    assert opposed == {True, False} or seeds == 1, "gradients that oppose each other, and some that do not"


def test_prograd_starts_with_words_behind_zeros(towers: dict[str, Towers]) -> None:
    expected = plain.words(towers["vit"].model, towers["vit"].tokenizer, "a photo of a")
    (context,) = build(towers, "vit", "prograd").trainable()["context"]
    assert context.shape[0] == 16 and torch.equal(context[-4:], expected) and not context[:-4].any()
    with pytest.raises(UserError, match=r"method.context_length: 3 vectors are fewer than the 4 tokens"):
        build(towers, "vit", "prograd", context_length=3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet", "bidirectional"])
def test_prograd_does_not_project_on_rounding_noise(towers: dict[str, Towers], kind: str, half: bool) -> None:
    """With 4 vectors student and teacher agree at the start; what their gradients differ in is rounding."""
    method = build(towers, kind, "prograd", context_length=4)
    features, flip = F.normalize(torch.randn(4, method.backbone.dim), dim=-1), torch.tensor(-1.0)
    loss = WeightedLoss(method.train())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        first, second = loss(features, LABELS, torch.full((4,), 0.25), torch.arange(4), torch.tensor(0))
    name, parameter = next(iter(loss.trainable().items()))
    own, noise = (torch.autograd.grad(part, parameter, retain_graph=True)[0] for part in (first, second))
    assert 0 < noise.norm() < NOISE / 2 * torch.finfo(torch.bfloat16 if half else torch.float32).eps * own.norm()
    for general in (noise, flip * noise, torch.zeros_like(noise)):
        assert torch.equal(loss.combine([{name: own}, {name: general}])[name], own)
    for general in (own, flip * own):  # what is no noise does count
        combined = loss.combine([{name: own}, {name: general}])[name]
        assert (combined.norm() < 1e-5 * own.norm()) == (general is not own)


@pytest.mark.parametrize("kind", KINDS)
def test_biomedcoop(towers: dict[str, Towers], kind: str) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer

    def losses(features: Tensor, context: Tensor) -> list[Tensor]:
        weights = (30.0, 2.0)
        return [plain.biomedcoop(model, tokenizer, features, LABELS, CLASSES, SYMPTOMS, context, weights, tau=1.0)]

    compare(build(towers, kind, "biomedcoop", text_weight=30.0, teacher_weight=2.0, tau=1.0), losses)


def kept(towers: dict[str, Towers], counts: Sequence[int], scores: Sequence[float], tau: float) -> list[list[bool]]:
    """The texts that teach where the prompts have these scores and the classes so many texts."""
    task = Task(CLASSES, [[f"text {place}" for place in range(count)] for count in counts])
    method = build(towers, "vit", "biomedcoop", task, tau=tau)
    assert isinstance(method, BiomedCoOp)
    found: list[list[bool]] = method.kept(torch.tensor([scores, scores])).tolist()
    return found


def test_biomedcoop_keeps_what_is_near_the_mean_score(towers: dict[str, Towers]) -> None:
    scores = [20.0, 21.0, 19.5, 30.0, 20.5, 12.0]
    for tau in (0.5, 1.0, 1.5):
        expected = plain.kept_prompts(scores, tau)
        assert 0 < len(expected) < len(scores)
        for row in kept(towers, [6, 6, 6], scores, tau):
            assert [place for place, taken in enumerate(row) if taken] == expected


def test_biomedcoop_where_the_published_code_ends_in_nan(towers: dict[str, Towers]) -> None:
    """More than half of the scores are equal, so that the MAD is 0; all are; or there is one prompt only."""
    assert kept(towers, [4, 4, 4], [20.0, 20.0, 20.0, 25.0], 1.25) == [[True, True, True, False]] * 3
    assert kept(towers, [2, 2, 2], [20.0, 20.0], 0.1) == [[True, True]] * 3
    assert kept(towers, [1, 1, 1], [20.0], 0.1) == [[True]] * 3


def test_biomedcoop_with_classes_of_different_numbers_of_texts(towers: dict[str, Towers]) -> None:
    rows = kept(towers, [1, 2, 4], [30.0, 20.0, 20.0, 20.0], 1.25)
    assert rows == [[True, False, False, False], [False, True, False, False], [False, True, True, True]], (
        "the class whose only text is not kept is taught by it all the same"
    )
    method = build(towers, "vit", "biomedcoop", Task(CLASSES, [["a"], ["b", "c"], ["d", "e", "f"]]))
    assert torch.isfinite(method.statistics(F.normalize(torch.randn(3, 32), dim=-1))).all()


def support_of(dim: int, views: int, count: int, seed: int) -> Support:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(CLASSES)
    centres = torch.randn(len(CLASSES), dim, generator=torch.Generator().manual_seed(1))
    raw = centres[labels] + 2 * torch.randn(views, count, dim, generator=generator)
    norms = raw.norm(dim=-1)
    return Support(raw / norms[..., None], norms, labels, torch.zeros(views, count, len(CLASSES)))


@pytest.mark.parametrize("name", ["tip_adapter", "tip_adapter_f"])
@pytest.mark.parametrize("validated", [True, False])
def test_tip_adapter(towers: dict[str, Towers], name: str, validated: bool) -> None:
    model, tokenizer = towers["vit"].model, towers["vit"].tokenizer
    support, validation = support_of(32, 3, 9, 2), support_of(32, 1, 12, 3)
    ends, steps = (20.0, 60.0), 5
    method = build(towers, "vit", name, search_scale=ends, search_steps=(steps, steps), alpha=2.5, beta=1.5)
    held_out = validation if validated else None
    method.prepare(support, held_out)
    method.finish(held_out)
    raw = support.features * support.norms[..., None]
    keys = torch.stack([unit / 3 for unit in raw.sum(dim=0)])
    keys = torch.stack([plain.unit(key) for key in keys])
    text = [plain.template_feature(model, tokenizer, name) for name in CLASSES]
    beta, alpha = 1.5, 2.5
    if validated:
        beta, alpha = plain.tip_search(
            validation.features[0], validation.labels, text, keys, support.labels, ends, steps
        )
        assert (beta, alpha) != (0.1, 0.1), "the search went further than its first candidate"
    images = support_of(32, 1, 5, 4).features[0]
    expected = torch.stack([plain.tip_logits(image, text, keys, support.labels, alpha, beta) for image in images])
    assert (method.eval()(images).logits - expected).abs().max() < 1e-4
    trained = {"keys"} if name == "tip_adapter_f" else set()
    assert set(method.trainable()) == trained


def test_what_is_loaded_has_the_sizes_that_are_fixed(towers: dict[str, Towers]) -> None:
    method = build(towers, "vit", "tip_adapter")
    method.prepare(support_of(32, 3, 9, 2), None)
    learned = dict(method.learned())
    build(towers, "vit", "tip_adapter").load_learned(learned)
    for keys in (torch.zeros(9, 31), torch.zeros(9), torch.zeros(9, 32, 1)):
        with pytest.raises(UserError, match="they must agree"):
            build(towers, "vit", "tip_adapter").load_learned({**learned, "keys": keys})
    del learned["alpha"]
    with pytest.raises(UserError, match="they must agree"):
        build(towers, "vit", "tip_adapter").load_learned(learned)


def test_tip_adapter_f_searches_after_the_training(towers: dict[str, Towers]) -> None:
    """On its learned keys, and from the validation samples alone."""
    method = build(towers, "vit", "tip_adapter_f", search_scale=(20.0, 60.0), search_steps=(5, 5))
    validation = support_of(32, 1, 12, 3)
    method.prepare(support_of(32, 3, 9, 2), validation)
    assert (float(method.learned()["alpha"]), float(method.learned()["beta"])) == (pytest.approx(1.17), 1.0)
    with torch.no_grad():
        method.trainable()["keys"].copy_(F.normalize(torch.randn(9, 32), dim=-1))
    method.finish(validation)
    labels = torch.arange(9) % 3
    model, tokenizer = towers["vit"].model, towers["vit"].tokenizer
    text = [plain.template_feature(model, tokenizer, name) for name in CLASSES]
    keys = method.trainable()["keys"].detach()
    chosen = plain.tip_search(validation.features[0], validation.labels, text, keys, labels, (20.0, 60.0), 5)
    assert (float(method.learned()["beta"]), float(method.learned()["alpha"])) == pytest.approx(chosen)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("c", [0.05, 3.0])
def test_linear_probe_is_the_minimum_of_its_objective(towers: dict[str, Towers], classes: int, c: float) -> None:
    task, support = Task(CLASSES[:classes]), support_of(32, 1, 12, 2)
    support = Support(support.features, support.norms, torch.arange(12) % classes, support.logits)
    method = build(towers, "vit", "linear_probe", task, c=c)
    method.prepare(support, None)
    fitted = method.learned()
    if classes == 2:  # one vector: penalised as such, and the other class's logit is its negative
        weight, bias = fitted["weight"][1] * 2, fitted["bias"][1] * 2
        assert torch.equal(fitted["weight"][0], -fitted["weight"][1]) and torch.equal(
            fitted["bias"][0], -fitted["bias"][1]
        )
    else:
        weight, bias = fitted["weight"], fitted["bias"]
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    rows = (torch.stack([0 * weight, weight]), torch.stack([0 * bias, bias])) if classes == 2 else (weight, bias)
    penalty = weight.square().sum() / 2 - rows[0].square().sum() / 2
    objective = plain.penalised_loss(*rows, support.features[0].double(), support.labels, c) + penalty
    slopes = torch.autograd.grad(objective, [weight, bias])
    assert all(slope.abs().max() < 2e-3 * max(1, c) for slope in slopes)
    inputs = support_of(32, 1, 4, 5).features[0]
    expected = torch.stack([fitted["weight"] @ row + fitted["bias"] for row in inputs])
    assert torch.allclose(method(inputs).logits, expected, atol=1e-6)


def test_linear_probe_wants_an_image_of_each_class(towers: dict[str, Towers]) -> None:
    support = support_of(32, 1, 12, 2)
    one_missing = Support(support.features, support.norms, support.labels.clamp(max=1), support.logits)
    with pytest.raises(UserError, match="no training image of class 'nevus'"):
        build(towers, "vit", "linear_probe").prepare(one_missing, None)


def test_c_is_the_peak_of_validation_accuracy() -> None:
    asked: list[float] = []

    def peaked(at: float) -> Callable[[float], float]:
        def accuracy(c: float) -> float:
            asked.append(c)
            return -abs(torch.tensor(c).log10().item() - at)

        return accuracy

    for at in (-3.2, 0.7, 2.45):
        assert torch.tensor(choose_c(peaked(at))).log10().item() == pytest.approx(at, abs=2 / 2**7)
    assert max(asked) == 1e6 and min(asked) == 1e-6
    assert choose_c(lambda c: 0.5) == pytest.approx(1e5), "of equal ones the largest of the powers, then the lower end"
    assert choose_c(lambda c: float(c > 2e6)) == pytest.approx(10**6.5), "the lower end, as soon as it is as good"


def test_linear_probe_takes_the_c_that_validation_prefers(towers: dict[str, Towers]) -> None:
    support, validation = support_of(32, 1, 12, 2), support_of(32, 1, 60, 3)
    found = build(towers, "vit", "linear_probe")
    found.prepare(support, validation)

    def correct(c: float | None) -> int:
        method = build(towers, "vit", "linear_probe", c=c)
        method.prepare(support, validation)
        return int((method(validation.features[0]).logits.argmax(dim=1) == validation.labels).sum())

    chosen = choose_c(lambda c: correct(c) / 60)
    alike = build(towers, "vit", "linear_probe", c=chosen)
    alike.prepare(support, None)
    assert torch.equal(found.learned()["weight"], alike.learned()["weight"])
    plain_c = build(towers, "vit", "linear_probe")
    plain_c.prepare(support, None)
    one = build(towers, "vit", "linear_probe", c=1.0)
    one.prepare(support, validation)
    assert torch.equal(plain_c.learned()["weight"], one.learned()["weight"]), "without validation C is 1"
