"""Filters: what each removes and counts, agreement, ranking, and that order of arrival makes no difference."""

import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vipbench.harness.models.backbone import Backbone
from vipbench.harness.symptoms.filters import FILTERS, MOST_WORDS, Mention, Rules, repeats, select
from vipbench.harness.symptoms.prompting import KNOWLEDGE
from vipbench.harness.symptoms.sets import most_tokens

SYMPTOMS, DESCRIPTION = (KNOWLEDGE[kind].steps[-1] for kind in ("symptoms", "description"))
RULES = Rules(SYMPTOMS.accepts)


def mentions(*samples: Sequence[str]) -> list[Mention]:
    """List the mentions in the samples of a class."""
    return [Mention(sample, place, text) for sample, texts in enumerate(samples) for place, text in enumerate(texts)]


def texts(chosen: Any, name: str = "melanoma") -> list[tuple[str, int | None]]:
    return [(symptom.text, symptom.agreement) for symptom in chosen.symptoms[name]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("jagged dark border", None),
        ("dark\x07border", "malformed"),
        ("темный край", "malformed"),
        ("", "malformed"),
        ("x" * 61, "malformed"),
        ("dark dark dark dark", "malformed"),
        ("xqz vbnq zzkj", "jargon"),  # so does CLIP's vocabulary see it
        ("ab cd ef", "malformed"),
        ("erythema", "jargon"),
        ("typical melanoma border", "names the class"),
        ("looks like skin cancer", "names the class"),
        ("fever and tiredness", "not visual"),
        ("erythematous edge", "jargon"),
        ("a b c d e f g h i j k dark skin", "too long"),
        ("more like nevi", "names another class"),
        ("like a birthmark", "names another class"),
        ("large small spot", "contradicts itself"),
        ("The sun is a star", "not a phrase"),
        ("dark spot and dark spot", "malformed"),
        ("dark dark brown spot", "malformed"),
    ],
)
def test_each_filter_removes_and_counts(text: str, reason: str | None) -> None:
    synonyms = {"melanoma": ["skin cancer"], "nevus": ["birthmark"]}
    rules = Rules(SYMPTOMS.accepts, classes=["melanoma", "nevus"], synonyms=synonyms)
    chosen = select({"melanoma": mentions([text])}, rules, 4)
    assert chosen.removed == ({reason: 1} if reason else {})
    assert bool(texts(chosen)) is (reason is None)
    assert reason is None or reason in FILTERS


def test_jargon_is_reported_and_may_be_kept() -> None:
    answers = {"melanoma": mentions(["erythematous edge", "small erythematous papules", "dark border"])}
    dropped = select(answers, RULES, 4)
    assert texts(dropped) == [("dark border", 1)]
    assert dropped.jargon == {"erythematous": 2, "papules": 1}
    kept = select(answers, Rules(SYMPTOMS.accepts, keep_jargon=True), 4)
    assert len(texts(kept)) == 3 and kept.removed == {} and kept.jargon == dropped.jargon


def test_agreement_counts_samples_and_ranks() -> None:
    samples = [
        ["many colours", "jagged border"],
        ["jagged borders", "jagged border", "dark dots"],
        ["a jagged border"],
        ["dark dots"],
    ]
    chosen = select({"melanoma": mentions(*samples)}, RULES, 4)
    # the wording that two samples use stands for all; a sample that contains it twice counts once
    assert texts(chosen) == [("jagged border", 3), ("dark dots", 2), ("many colours", 1)]
    assert chosen.removed == {"near-duplicate": 2}
    assert texts(select({"melanoma": mentions(*samples)}, RULES, 1)) == [("jagged border", 3)]


def test_what_too_few_samples_contain_does_not_count() -> None:
    samples = [["jagged border", "dark dots"], ["a jagged border", "blue veil"], ["lopsided shape"]]
    answers = {"melanoma": mentions(*samples), "nevus": mentions(["dark dots"], ["dark dots"])}
    chosen = select(answers, Rules(SYMPTOMS.accepts, consensus=2), 4)
    assert texts(chosen) == [("jagged border", 2)], "in these or other words"
    assert texts(chosen, "nevus") == [("dark dots", 2)], "one mention elsewhere does not count against it"
    assert chosen.removed == {"near-duplicate": 1, "no consensus": 3}
    assert select(answers, Rules(SYMPTOMS.accepts, consensus=3), 4).symptoms == {"melanoma": [], "nevus": []}


def test_what_is_said_of_several_classes_is_removed_from_all() -> None:
    answers = {
        "melanoma": mentions(["dark brown spot", "jagged border"]),
        "nevus": mentions(["spot of dark brown", "smooth border"]),
    }
    chosen = select(answers, RULES, 4)
    assert texts(chosen) == [("jagged border", 1)] and texts(chosen, "nevus") == [("smooth border", 1)]
    assert chosen.removed == {"said of several classes": 2}


def test_other_kinds_of_knowledge_are_taken_as_they_come() -> None:
    rules = Rules(DESCRIPTION.accepts, visual=False)
    sentence = (
        "Melanoma is a malignant tumor of melanocytes, often painful; it is seen by dermoscopy as an atypical network"
    )
    chosen = select({"melanoma": mentions([sentence]), "nevus": mentions([sentence])}, rules, 4)
    assert texts(chosen) == [(sentence, 1)] and chosen.removed == {} and chosen.jargon == {}


def test_the_order_of_arrival_makes_no_difference() -> None:
    pool = [
        "dark dots",
        "many dots of dark",
        "jagged border",
        "no border",
        "blue veil",
        "papules",
        "waxy",
        "round spot",
    ]
    draw = random.Random(0)
    answers = {
        name: mentions(*([draw.choice(pool) for _ in range(5)] for _ in range(6)))
        for name in ("melanoma", "nevus", "wart")
    }
    first = select(answers, RULES, 3)
    for _ in range(10):
        shuffled = {name: draw.sample(items, len(items)) for name, items in answers.items()}
        again = select(shuffled, RULES, 3)
        assert again == first


class AxisTower:
    """A text tower by hand: phrases with a word in common lie close together; a token per word."""

    context_length, special_tokens = 14, 2

    def tokenize(self, text: str) -> list[int]:
        return list(range(len(text.replace(".", " .").split())))

    def encode_texts(self, phrases: list[str]) -> torch.Tensor:
        topics = ["ink", "sky", "sand", "snow"]
        rows = [[float(topic in phrase) for topic in topics] for phrase in phrases]
        return torch.tensor(rows) * 0.2 + 1.0  # a narrow cone, as real towers have


def test_a_text_tower_tells_near_duplicates_and_length() -> None:
    rules = Rules(SYMPTOMS.accepts, tower=AxisTower())  # type: ignore[arg-type]
    answers = {
        "melanoma": mentions(
            ["colour of ink", "black like ink spilled", "white as snow", "not like ink"], ["word " * 8]
        ),
        "nevus": mentions(["yellow sand", "blue sky above"], ["sandy beach of sand"]),
    }
    chosen = select(answers, rules, 4)
    assert texts(chosen) == [("colour of ink", 1), ("white as snow", 1), ("not like ink", 1)]
    assert texts(chosen, "nevus") == [("yellow sand", 2), ("blue sky above", 1)]
    assert chosen.removed == {"malformed": 1, "near-duplicate": 2}
    fits = " ".join(["word"] * 7)  # with the full stop 8 = 14 - 2 - 4
    assert rules.fits(fits) and not rules.fits(f"{fits} more")


def test_a_real_text_tower(vit_backbone: Backbone) -> None:
    rules = Rules(SYMPTOMS.accepts, tower=vit_backbone.text)
    chosen = select({"melanoma": mentions(["dark border"], ["a dark border"]), "nevus": mentions(["round"])}, rules, 2)
    assert texts(chosen) == [("dark border", 2)] and texts(chosen, "nevus") == [("round", 1)]
    assert select({"a": []}, rules, 2).symptoms == {"a": []}  # nothing to encode
    assert rules.fits("dark " * (most_tokens(vit_backbone.text) - 1)) and most_tokens(vit_backbone.text) > MOST_WORDS


def test_repeats() -> None:
    assert repeats("dark spot and dark spot") and not repeats("edge of the spot or of the rim")
    assert repeats("dot dot dot") and repeats("a b a b") and not repeats("dark and dark") and not repeats("so so")


def test_whatever_is_said_ends_in_sound_symptoms(tmp_path: Path) -> None:
    draw = random.Random(1)
    signs = "ab \x00\x1b\"\\{}[],:éß漢字\ud800\u202e\U0001f9a0-.;'0%"
    noise = [["".join(draw.choices(signs, k=draw.randrange(80))) for _ in range(20)] for _ in range(20)]
    chosen = select({"a": mentions(*noise), "b": mentions(*noise[::-1])}, RULES, 4)
    kept = SimpleNamespace(texts=[symptom.text for symptoms in chosen.symptoms.values() for symptom in symptoms])
    assert all(SYMPTOMS.accepts(text) for text in kept.texts)
    assert chosen.removed["malformed"] > 300
