"""From what an LLM said of the classes of a group to their symptoms: filters, each with the count of what it removed.

A pure function of the answers, whatever order they came in. Filters look at different phrases of a class (the same words
from several answers are one phrase with an agreement of several), in the order of `FILTERS`; the first that objects counts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from harness.symptoms.sets import Symptom, fold, room
from harness.symptoms.words import NO, content, is_common, is_jargon, is_unseen, names_class, same_content, words

if TYPE_CHECKING:
    from harness.models.text_tower import TextTower

MOST_WORDS = 12  # in a symptom, where no text tower says how long it may be
SAME_COSINE = 0.9  # of centred text features, from here on two phrases say the same
FILTERS = (
    "malformed",  # not what the schema asked for, repeats itself, or holds no common word
    "names the class",
    "not visual",
    "jargon",
    "too long",
    "near-duplicate",
    "said of several classes",
)


@dataclass(frozen=True)
class Said:
    """An item of an answer: its sample number, its place in the answer, its text."""

    sample: int
    place: int
    text: str


@dataclass
class Phrase:
    """A phrase of a class, and the samples that say it in these or other words."""

    text: str
    samples: set[int]
    first: tuple[int, int]  # sample and place
    sense: frozenset[str] = frozenset()  # its content words

    @property
    def rank(self) -> tuple[int, tuple[int, int]]:
        return -len(self.samples), self.first


@dataclass(frozen=True)
class Rules:
    """What is removed.

    Attributes:
        accepts: whether an item is of the form that was asked for.
        visual: whether phrases must be visible, plain, silent about the class, and of one class only.
        synonyms: other names of classes, by the folded class name.
        keep_jargon: count jargon, but keep it (for backbones that were trained on medical text).
        tower: bounds the length by its tokenizer, and tells near-duplicates by its features; None: by words alone.
    """

    accepts: Callable[[object], bool]
    visual: bool = True
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    keep_jargon: bool = False
    tower: "TextTower | None" = None

    def objection(self, name: str, text: str) -> str | None:
        """The filter that removes a phrase of class `name` for what it is by itself."""
        if not self.accepts(text) or repeats(text):
            return "malformed"
        if self.visual:
            if names_class(text, [name, *self.synonyms.get(fold(name), ())]):
                return "names the class"
            if is_unseen(text):
                return "not visual"
            if not self.keep_jargon and jargon(text):
                return "jargon"
        if not self.keep_jargon and not any(map(is_common, words(text))):
            return "malformed"
        return None if self.fits(text) else "too long"

    def fits(self, text: str) -> bool:
        if self.tower is None:
            return not self.visual or len(words(text)) <= MOST_WORDS
        return len(self.tower.tokenize(f"{text.rstrip('. ')}.")) <= room(self.tower)


@dataclass
class Selection:
    """Symptoms of each class, best first; how many phrases each filter removed; how often each word of jargon was met."""

    symptoms: dict[str, list[Symptom]]
    removed: Counter[str] = field(default_factory=Counter)
    jargon: Counter[str] = field(default_factory=Counter)


def select(said: Mapping[str, Iterable[Said]], rules: Rules, count: int) -> Selection:
    """At most `count` symptoms for each class of a group, ranked by how many samples agree, then by who said it first."""
    chosen = Selection({})
    phrases = {name: _admit(name, items, rules, chosen) for name, items in said.items()}
    same = _Sameness([phrase.text for found in phrases.values() for phrase in found], rules.tower)
    phrases = {name: _merge(found, same, chosen.removed) for name, found in phrases.items()}
    if rules.visual:
        phrases = _apart(phrases, same, chosen.removed)
    for name, found in phrases.items():
        ranked = sorted(found, key=lambda phrase: phrase.rank)[:count]
        chosen.symptoms[name] = [Symptom(text=phrase.text, agreement=len(phrase.samples)) for phrase in ranked]
    chosen.removed = +chosen.removed  # without those that removed nothing
    return chosen


def jargon(text: str) -> list[str]:
    """The words of a text that need medical training."""
    return [word for word in words(text) if is_jargon(word)]


def repeats(text: str) -> bool:
    """Whether at least half of the words of a text (of three or more) occurred before in it."""
    found = words(text)
    return len(found) >= 3 and len(set(found)) * 2 <= len(found)


def _admit(name: str, items: Iterable[Said], rules: Rules, chosen: Selection) -> list[Phrase]:
    """The phrases of a class to which no filter objects by themselves, those that most samples say first."""
    phrases: dict[str, Phrase] = {}
    for item in sorted(items, key=lambda item: (item.sample, item.place)):
        phrase = phrases.setdefault(fold(item.text), Phrase(item.text, set(), (item.sample, item.place)))
        phrase.samples.add(item.sample)
    admitted = []
    for phrase in phrases.values():
        objection = rules.objection(name, phrase.text)
        if rules.visual and objection in (None, "jargon", "too long"):
            chosen.jargon.update(jargon(phrase.text))
        if objection:
            chosen.removed[objection] += 1
        else:
            phrase.sense = content(phrase.text)
            admitted.append(phrase)
    return sorted(admitted, key=lambda phrase: phrase.rank)


def _merge(phrases: list[Phrase], same: "_Sameness", removed: Counter[str]) -> list[Phrase]:
    """Each near-duplicate gives its samples to the better ranked phrase that says the same."""
    kept: list[Phrase] = []
    for phrase in phrases:
        better = next((earlier for earlier in kept if same(earlier, phrase)), None)
        if better is None:
            kept.append(phrase)
        else:
            better.samples |= phrase.samples
            removed["near-duplicate"] += 1
    return kept


def _apart(phrases: dict[str, list[Phrase]], same: "_Sameness", removed: Counter[str]) -> dict[str, list[Phrase]]:
    """Only what is said of one class: it does not tell apart the others."""
    apart: dict[str, list[Phrase]] = {}
    for name, found in phrases.items():
        others = [phrase for other, theirs in phrases.items() if other != name for phrase in theirs]
        apart[name] = [phrase for phrase in found if not any(same(phrase, other) for other in others)]
        removed["said of several classes"] += len(found) - len(apart[name])
    return apart


class _Sameness:
    """Whether two phrases say the same: by their words, or by the cosine of their text features.

    A text tower places all short texts in a narrow cone, so features are centred on the mean of all `texts` first.
    Negation is told by words alone, since text towers hardly notice it.
    """

    def __init__(self, texts: Sequence[str], tower: "TextTower | None") -> None:
        self.place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        self.cosines = _centred_cosines([f"{text}." for text in self.place], tower) if tower and self.place else None

    def __call__(self, left: Phrase, right: Phrase) -> bool:
        if same_content(left.sense, right.sense):
            return True
        if self.cosines is None or (NO in left.sense) != (NO in right.sense):
            return False
        return bool(self.cosines[self.place[left.text], self.place[right.text]] >= SAME_COSINE)


def _centred_cosines(texts: list[str], tower: "TextTower") -> np.ndarray:
    """[n, n] float64."""
    from harness.symptoms.encode import text_features

    features = text_features(tower, texts).double().numpy()
    features -= features.mean(axis=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    return features @ features.T
