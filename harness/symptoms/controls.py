"""Control sets: texts of the same form as a symptom set's, without what it states about the classes.

The texts of each are a pure function of the set, the classes and the number of the draw.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from vipbench.harness.data.stateless_random import keyed_generator
from vipbench.harness.models.phrases import spoken
from vipbench.harness.symptoms.sets import ClassSymptoms, SetProvenance, Symptom, SymptomSet, fold
from vipbench.harness.symptoms.words import LISTS, words

COMMAND = "vipbench symptoms controls"
MOST_WORDS = 20  # of a phrase of random words, so that it fits into any text tower


def shuffled(symptoms: SymptomSet, classes: Sequence[str], draw: int) -> SymptomSet:
    """Give each class all symptoms of another one, by a random permutation that leaves no class its own; needs two classes."""
    texts, order = symptoms.texts(classes), derangement(len(classes), draw)
    how = f"{COMMAND}: each class has the symptoms of another one"
    given = {name: classes[place] for name, place in zip(classes, order, strict=True)}
    return _control(symptoms, classes, [texts[place] for place in order], how, draw=draw, symptoms_of=given)


def random_words(symptoms: SymptomSet, classes: Sequence[str], draw: int) -> SymptomSet:
    """Replace each symptom by as many random everyday words, at most `MOST_WORDS`, none twice in a phrase."""
    pool, texts = sorted(LISTS["random"]), []
    for name, own in zip(classes, symptoms.texts(classes), strict=True):
        numbers = keyed_generator("random words", draw, fold(name))
        counts = [min(max(len(words(text)), 1), MOST_WORDS) for text in own]
        texts.append([" ".join(numbers.choice(pool, count, replace=False).tolist()) for count in counts])
    return _control(symptoms, classes, texts, f"{COMMAND}: random words in the place of those of the set", draw=draw)


def class_names(symptoms: SymptomSet, classes: Sequence[str]) -> SymptomSet:
    """Give each class its name as the only text."""
    return _control(symptoms, classes, [[spoken(name)] for name in classes], f"{COMMAND}: class names as symptoms")


def derangement(count: int, draw: int) -> list[int]:
    """A random permutation of `count` (two or more) places without a fixed one, the same for the same draw."""
    assert count > 1, "one place stays where it is"
    numbers = keyed_generator("shuffled classes", draw)
    while True:  # about e tries
        order = numbers.permutation(count)
        if (order != np.arange(count)).all():
            return [int(place) for place in order]


def _control(
    parent: SymptomSet, classes: Sequence[str], texts: Sequence[Sequence[str]], how: str, **facts: Any
) -> SymptomSet:
    provenance = {
        "kind": "generated",
        "author": "vipbench",
        "created": datetime.now(UTC).date().isoformat(),
        "how": how,
        "parent": parent.digest(),
        **facts,
    }
    return SymptomSet(
        task=parent.task,
        modality=parent.modality,
        classes=[
            ClassSymptoms(name=name, symptoms=[Symptom(text=text) for text in own])
            for name, own in zip(classes, texts, strict=True)
        ],
        provenance=SetProvenance.model_validate(provenance),
    )
