"""Select the symptoms of a group of classes from an LLM's answers: filters, each with the number of phrases it removed.

A pure function of the answers, in whatever order they came. Filters judge the distinct phrases of a class (the same words
in several answers are one phrase with an agreement of several), in the order of `FILTERS`; the first that rejects counts.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vipbench.harness.models.phrases import as_sentence
from vipbench.harness.symptoms.sets import Symptom, fold, most_tokens
from vipbench.harness.symptoms.verify import Belief
from vipbench.harness.symptoms.words import (
    NO,
    SMALL_WORDS,
    Names,
    content,
    contradicts_itself,
    is_common,
    is_jargon,
    is_phrase,
    is_unseen,
    names_class,
    same_content,
    words,
)

if TYPE_CHECKING:
    from vipbench.harness.models.text_tower import TextTower

MOST_WORDS = 12  # in a symptom, where no text tower sets the limit
SAME_COSINE = 0.9  # of centred text features; from here on two phrases mean the same
FILTERS = (
    "malformed",  # not as the schema demands, repetitive, or without a common word
    "copied from an example",
    "names the class",
    "names another class",
    "not visual",
    "jargon",
    "contradicts itself",
    "not a phrase",
    "too long",
    "near-duplicate",
    "no consensus",  # in too few of the samples
    "said of several classes",
    "not verified",  # an LLM does not believe it; see harness/symptoms/verify.py
)


@dataclass(frozen=True)
class Mention:
    """An item of an answer: its sample number, its position in the answer, its text."""

    sample: int
    position: int
    text: str


@dataclass
class Phrase:
    """A phrase of a class, and the samples that contain it in these or other words.

    Attributes:
        first: sample and position of its first mention.
        content: its content words.
    """

    text: str
    samples: set[int]
    first: tuple[int, int]
    content: frozenset[str] = frozenset()

    @property
    def rank(self) -> tuple[int, tuple[int, int]]:
        return -len(self.samples), self.first


@dataclass(frozen=True)
class Rules:
    """The settings of the filters.

    Attributes:
        accepts: tests an item against the form that the schema demands.
        visual: phrases must be visible, plain, without the name of a class, and of one class only.
        classes: all names of the task's classes.
        synonyms: other names of classes, by the folded class name.
        consensus: the least number of samples that must contain a phrase, in these or other words.
        keep_jargon: count jargon, but keep it (for backbones that were trained on medical text).
        tower: bounds the length by its tokenizer, and finds near-duplicates by its features; None: by words alone.
        copied: folded phrases of the worked examples in the prompt, which are no answers.
    """

    accepts: Callable[[object], bool]
    visual: bool = True
    classes: Sequence[str] = ()
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict)
    consensus: int = 1
    keep_jargon: bool = False
    tower: "TextTower | None" = None
    copied: Collection[str] = frozenset()

    def rejection_reason(self, name: str, text: str) -> str | None:
        """Name the filter that removes a phrase of class `name` by itself, without a look at others; None: it passes."""
        if not self.accepts(text) or repeats(text):
            return "malformed"
        if fold(text) in self.copied:
            return "copied from an example"
        if self.visual:
            if names_class(text, [name, *self.synonyms.get(fold(name), ())]):
                return "names the class"
            if self._names.found_in(text):
                return "names another class"
            if is_unseen(text):
                return "not visual"
            if not self.keep_jargon and jargon(text):
                return "jargon"
        if not self.keep_jargon and not any(map(is_common, words(text))):
            return "malformed"
        if self.visual and contradicts_itself(text):
            return "contradicts itself"
        if self.visual and not is_phrase(text):
            return "not a phrase"
        return None if self.fits(text) else "too long"

    @cached_property
    def _names(self) -> Names:
        """All names of all classes."""
        return Names([*self.classes, *(name for others in self.synonyms.values() for name in others)])

    def fits(self, text: str) -> bool:
        if self.tower is None:
            return not self.visual or len(words(text)) <= MOST_WORDS
        return len(self.tower.tokenize(as_sentence(text))) <= most_tokens(self.tower)


@dataclass
class Selection:
    """Symptoms of each class, best first; phrases that each filter removed; occurrences of each word of jargon."""

    symptoms: dict[str, list[Symptom]]
    removed: Counter[str] = field(default_factory=Counter)
    jargon: Counter[str] = field(default_factory=Counter)


def select(
    mentions: Mapping[str, Iterable[Mention]],
    rules: Rules,
    count: int,
    beliefs: Mapping[tuple[str, str], Belief] | None = None,
) -> Selection:
    """Select at most `count` symptoms for each class of a group, ranked by agreement, then by the first mention.

    Args:
        beliefs: in phrases that were verified, by class and text.
    """
    chosen = Selection({})
    phrases = {name: _admit(name, items, rules, chosen) for name, items in mentions.items()}
    same = _SameMeaning([phrase.text for found in phrases.values() for phrase in found], rules.tower)
    phrases = {name: _merge(found, same, chosen.removed) for name, found in phrases.items()}
    for name, found in phrases.items():
        phrases[name] = [phrase for phrase in found if len(phrase.samples) >= rules.consensus]
        chosen.removed["no consensus"] += len(found) - len(phrases[name])
    if rules.visual:
        phrases = _apart(phrases, same, chosen.removed)
    for name, found in phrases.items():
        ranked = sorted(found, key=lambda phrase: phrase.rank)
        chosen.symptoms[name] = list(_believed(name, ranked, beliefs or {}, chosen.removed))[:count]
    chosen.removed = +chosen.removed  # without those that removed nothing
    return chosen


def jargon(text: str) -> list[str]:
    """List the words of a text that need medical training."""
    return [word for word in words(text) if is_jargon(word)]


def repeats(text: str) -> bool:
    """Find repetition in a text of three words or more: a word twice in a row, the same two again, or half of all words."""
    found = words(text)
    if len(found) < 3:
        return False
    pairs = [pair for pair in pairwise(found) if not SMALL_WORDS.issuperset(pair)]
    twice = any(left == right and left not in SMALL_WORDS for left, right in pairs)
    return twice or len(set(pairs)) < len(pairs) or len(set(found)) * 2 <= len(found)


def _admit(name: str, items: Iterable[Mention], rules: Rules, chosen: Selection) -> list[Phrase]:
    """Collect the phrases of a class that pass by themselves, those with the highest agreement first."""
    phrases: dict[str, Phrase] = {}
    for item in sorted(items, key=lambda item: (item.sample, item.position)):
        phrase = phrases.setdefault(fold(item.text), Phrase(item.text, set(), (item.sample, item.position)))
        phrase.samples.add(item.sample)
    admitted = []
    for phrase in phrases.values():
        reason = rules.rejection_reason(name, phrase.text)
        if rules.visual and reason in (None, "jargon", "too long"):
            chosen.jargon.update(jargon(phrase.text))
        if reason:
            chosen.removed[reason] += 1
        else:
            phrase.content = content(phrase.text)
            admitted.append(phrase)
    return sorted(admitted, key=lambda phrase: phrase.rank)


def _merge(phrases: list[Phrase], same: "_SameMeaning", removed: Counter[str]) -> list[Phrase]:
    """Drop near-duplicates; each adds its samples to the better ranked phrase of the same meaning."""
    kept: list[Phrase] = []
    for phrase in phrases:
        better = next((earlier for earlier in kept if same(earlier, phrase)), None)
        if better is None:
            kept.append(phrase)
        else:
            better.samples |= phrase.samples
            removed["near-duplicate"] += 1
    return kept


def _apart(phrases: dict[str, list[Phrase]], same: "_SameMeaning", removed: Counter[str]) -> dict[str, list[Phrase]]:
    """Drop phrases of several classes, since they tell none of them apart."""
    apart: dict[str, list[Phrase]] = {}
    for name, found in phrases.items():
        others = [phrase for other, theirs in phrases.items() if other != name for phrase in theirs]
        apart[name] = [phrase for phrase in found if not any(same(phrase, other) for other in others)]
        removed["said of several classes"] += len(found) - len(apart[name])
    return apart


def _believed(
    name: str, phrases: list[Phrase], beliefs: Mapping[tuple[str, str], Belief], removed: Counter[str]
) -> Iterator[Symptom]:
    """Make symptoms of phrases, without those that were verified in vain."""
    for phrase in phrases:
        belief = beliefs.get((name, phrase.text))
        if belief and not belief.verified:
            removed["not verified"] += 1
        else:
            seen, truer = belief or Belief()
            yield Symptom(text=phrase.text, agreement=len(phrase.samples), seen=seen, truer=truer)


class _SameMeaning:
    """Decides whether two phrases mean the same: by their words, or by the cosine of their text features.

    A text tower places all short texts in a narrow cone, so features are centred on the mean of all `texts` first.
    Negation is read from the words alone, since text towers hardly encode it.
    """

    def __init__(self, texts: Sequence[str], tower: "TextTower | None") -> None:
        self.row = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        self.cosines = _centred_cosines([as_sentence(text) for text in self.row], tower) if tower and self.row else None

    def __call__(self, left: Phrase, right: Phrase) -> bool:
        if same_content(left.content, right.content):
            return True
        if self.cosines is None or (NO in left.content) != (NO in right.content):
            return False
        return bool(self.cosines[self.row[left.text], self.row[right.text]] >= SAME_COSINE)


def _centred_cosines(texts: list[str], tower: "TextTower") -> np.ndarray:
    """Compute the cosines [n, n] float64 of n texts."""
    from vipbench.harness.symptoms.encode import text_features

    features = text_features(tower, texts).double().numpy()
    features -= features.mean(axis=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    return features @ features.T
