"""Zero-shot methods with fixed texts, against plain second implementations: logits within 1e-5."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import plain_texts
from tests.conftest import Towers
from vipbench.baselines.dclip import described
from vipbench.baselines.waffle import Waffle, descriptors, frequent_words
from vipbench.harness.errors import UserError
from vipbench.harness.methods.base import Method, Task
from vipbench.harness.methods.registry import method_class

CLASSES = ["melanoma", "basal cell carcinoma", "nevus"]
SYMPTOMS = [
    ["an uneven border.", "many colours", "Often dark"],
    ["antennae of vessels"],
    ["round shape", "asymmetric at times"],
]
TASK = Task(["melanoma", "basal_cell_carcinoma", "nevus"], SYMPTOMS)
PINNED = ["green sick", "Ki6XV, RG6mX", "forum blast", "'NasP, 04INn"]
KINDS = ["vit", "bidirectional", pytest.param("bert", marks=pytest.mark.slow)]


def build(towers: dict[str, Towers], kind: str, name: str, seed: int = 7, **options: Any) -> Method:
    torch.manual_seed(seed)
    cls = method_class(name)
    return cls(cls.Config(name=name, **options), TASK, towers[kind].backbone)


def compare(method: Method, expected: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(1)
    inputs = F.normalize(torch.randn(4, method.backbone.dim), dim=-1)
    with torch.no_grad():
        rows = torch.stack([expected(image) for image in inputs])
        logits = method.eval()(inputs).logits
    assert (logits - rows).abs().max() <= 1e-5
    assert (rows - rows.mean(dim=0)).abs().max() > 1e-4, "images differ"


@pytest.mark.parametrize("kind", KINDS)
def test_cupl(towers: dict[str, Towers], kind: str) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer
    sentences = [[f"{text.rstrip('.')}." for text in own] for own in SYMPTOMS]
    compare(build(towers, kind, "cupl"), lambda image: plain_texts.cupl(model, tokenizer, image, sentences))
    both = [[f"a {name}.", *own, f"see {name}?"] for name, own in zip(CLASSES, sentences, strict=True)]
    method = build(towers, kind, "cupl", templates=["a {}.", "see {}?"])
    compare(method, lambda image: plain_texts.cupl(model, tokenizer, image, both))


@pytest.mark.parametrize("kind", KINDS)
def test_dclip(towers: dict[str, Towers], kind: str) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer
    clauses = [
        ["which is an uneven border", "which has many colours", "which Often dark"],
        ["which has antennae of vessels"],
        ["which has round shape", "which has asymmetric at times"],
    ]

    def check(method: Method, front: str) -> None:
        texts = [[f"{front}{name}, {one}." for one in own] for name, own in zip(CLASSES, clauses, strict=True)]
        compare(method, lambda image: plain_texts.mean_cosine(model, tokenizer, image, texts))

    check(build(towers, kind, "dclip"), "")
    check(build(towers, kind, "dclip", template="a photo of a {}."), "a photo of a ")


@pytest.mark.parametrize("name", ["cupl", "dclip", "xplainer"])
def test_a_text_that_is_too_long_is_named(towers: dict[str, Towers], name: str) -> None:
    cls = method_class(name)
    with pytest.raises(UserError, match=r"class 'nevus', text '.*very .* takes 77; shorten it"):
        cls(cls.Config(name=name), Task(["nevus", "mole"], [["very " * 90], ["round"]]), towers["vit"].backbone)


def test_the_first_word_of_a_descriptor_decides() -> None:
    """The published code looks at the first letters, and so takes "antennae" and "cannons" for an article and a verb."""
    given = {
        "a bump": "is a bump",
        "antennae": "has antennae",
        "used to cut": "is used to cut",
        "can bleed": "can bleed",
        "cannons": "has cannons",
        "often, a lid.": "often, a lid",
        "may be flat": "may be flat",
        "A-shaped": "has A-shaped",
    }
    assert {text: described("x_y", text) for text in given} == {
        text: f"x y, which {clause}" for text, clause in given.items()
    }


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(("options", "front"), [({}, ""), ({"concept": "skin lesion", "pairs": 3}, "skin lesion: a ")])
def test_waffle(towers: dict[str, Towers], kind: str, options: dict[str, Any], front: str) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer
    method = build(towers, kind, "waffle", **options)
    pairs = options.get("pairs", 15)
    random = plain_texts.waffle_descriptors(int(method.learned()["key"]), pairs, CLASSES, frequent_words())
    assert len(random) == len(set(random)) == 2 * pairs
    texts = [[f"a photo of a {front}{described(name, one)}." for one in random] for name in CLASSES]
    compare(method, lambda image: plain_texts.mean_cosine(model, tokenizer, image, texts))


@pytest.mark.parametrize(
    "classes",
    [CLASSES, ["nevus"], ["a b", "ccc dddd"], ["skin cancer of the foot", "mole"], ["一", "二"]],
)
def test_random_descriptors_have_the_shape_of_class_names(classes: list[str]) -> None:
    found = descriptors(5, 4, classes)
    assert found == plain_texts.waffle_descriptors(5, 4, classes, frequent_words())
    assert found != descriptors(6, 4, classes)


def test_random_descriptors_are_the_same_everywhere() -> None:
    """Pinned, since a run's identity does not hold them: raise RESULT_VERSION where they change."""
    assert len(frequent_words()) == len(set(frequent_words())) == 4329
    assert descriptors(1, 2, CLASSES) == PINNED


def test_a_seed_decides_what_is_drawn(towers: dict[str, Towers]) -> None:
    first, again, other = (build(towers, "vit", "waffle", seed=seed) for seed in (1, 1, 2))
    assert isinstance(other, Waffle) and isinstance(first, Waffle) and isinstance(again, Waffle)
    assert torch.equal(first.fixed_features, again.fixed_features)
    assert not torch.equal(first.fixed_features, other.fixed_features)
    other.load_learned(first.learned())
    assert torch.equal(first.fixed_features, other.fixed_features), "the key is all that is saved"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("no_finding", [None, 2])
def test_xplainer(towers: dict[str, Towers], kind: str, no_finding: int | None) -> None:
    model, tokenizer = towers[kind].model, towers[kind].tokenizer
    observations = [[text.rstrip(".") for text in own] for own in SYMPTOMS]
    method = build(
        towers,
        kind,
        "xplainer",
        temperature=0.2,
        no_finding=None if no_finding is None else CLASSES[no_finding],
    )
    compare(
        method,
        lambda image: plain_texts.xplainer(model, tokenizer, image, CLASSES, observations, no_finding, 0.2),
    )


def test_xplainer_names_a_class_that_is_none(towers: dict[str, Towers]) -> None:
    with pytest.raises(UserError, match=r"method.no_finding: there is no class 'nevis'; did you mean 'nevus'"):
        build(towers, "vit", "xplainer", no_finding="nevis")
