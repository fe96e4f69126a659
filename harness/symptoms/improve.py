"""Improve a symptom set, round by round: what it confuses, an LLM's new phrases for that, those that help kept.

A round classifies the training images with the set, asks for each of the most confused pairs of classes what tells them apart,
shows what worked and what failed, and chooses among all phrases so far (harness/symptoms/worth.py). Validation images, where
there are any, decide when to stop and which rounds may give the result; test images are never read. The outcome is a pure
function of the plan, the set, the features and the recorded answers.

    vipbench symptoms improve SET --data DIR --backbone ViT-B-16 --pretrained openai --url http://127.0.0.1:8000
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vipbench.harness.symptoms.filters import Mention, select
from vipbench.harness.symptoms.generate import CUT_OFF, NO_ITEM, NO_JSON, Plan, asked_with
from vipbench.harness.symptoms.llm.answers import parse, tidy
from vipbench.harness.symptoms.llm.record import Ask, Identity, Request
from vipbench.harness.symptoms.pool import Images, Measured, Pool, rounded
from vipbench.harness.symptoms.prompting import PHRASE, SEVEN_WORDS
from vipbench.harness.symptoms.prompting import Step as Question
from vipbench.harness.symptoms.sets import ClassSymptoms, SetProvenance, SymptomSet, fold
from vipbench.harness.symptoms.verdict import with_verdict
from vipbench.harness.symptoms.verify import Belief, Claim
from vipbench.harness.symptoms.words import same_words
from vipbench.harness.symptoms.worth import (
    Choice,
    aurocs,
    choose,
    class_scores,
    confused_pairs,
    fold_numbers,
)
from vipbench.harness.system.files import digest_json
from vipbench.harness.system.progress import Progress

QUESTION = Question("improve", "symptoms", PHRASE, SEVEN_WORDS)
PATIENCE = 2  # rounds without a higher validation accuracy
WORKED = 0.6  # AUROC of a phrase, images of its class against those of the other
MOST_SHOWN = 8  # phrases that worked, and as many that failed, in a question
TRIED, NOT_VERIFIED = "tried before", "not verified"


Verify = Callable[[Sequence[Claim]], list[Belief] | None]


@dataclass(frozen=True, eq=False)
class _Asked(Request):
    """A request, with the label of its class and its number among those of the round."""

    label: int
    number: int


def improve(
    plan: Plan,
    start: SymptomSet,
    measured: Measured,
    identity: Identity,
    ask: Ask,
    *,
    pairs: int = 4,
    verify: Verify | None = None,
    note: Callable[[], str] = str,
    answered_by: Callable[[], Identity] | None = None,
) -> SymptomSet:
    """Improve a set. `plan` gives samples (answers to each question), count (the most symptoms of a class) and rounds.

    Args:
        ask: answers requests (a client's `complete`).
        pairs: the pairs of classes that a round asks about.
        verify: gives beliefs in phrases, or None where it is not reliable (a `Verification`'s `beliefs`); those of `start` are
            put to it as well.
        note: makes the end of the progress line.
        answered_by: returns after the work the recorded identity of the server, where it may have changed.

    Raises:
        UserError: a class is not in the set or has too few training images, or from `ask`.
    """
    train = measured.train
    texts = [list(dict.fromkeys(own)) for own in start.texts(measured.classes)]
    folds = fold_numbers(train.labels, train.patients, measured.classes)
    agreed = {
        (fold(entry.name), symptom.text): symptom.agreement for entry in start.classes for symptom in entry.symptoms
    }
    names = [fold(name) for name in measured.classes]
    answers = {(label, text): agreed[names[label], text] for label, own in enumerate(texts) for text in own}
    pool = Pool(measured, texts, [list(range(len(own))) for own in texts], answers)
    refused = _refused(pool, dict(enumerate(texts)), verify)
    before = pool.figures()
    pool.remove(refused)
    total = _Total(created=start.provenance.created)
    rounds: list[dict[str, Any]] = [
        {"round": 0, **before, "refused": _listed(measured, refused), "worth": pool.worth()}
    ]
    found, figures = [pool.current()], [pool.figures()]
    with Progress(f"improve {plan.task}", plan.rounds, "rounds") as progress:
        for number in range(1, plan.rounds + 1):
            rounds.append(_round(plan, pool, folds, number, identity.model, ask, pairs, verify, refused, total))
            found.append(pool.current())
            figures.append(rounds[-1])
            progress.advance(1, note())
            if _is_over(figures) or not rounds[-1]["confused"]:
                break
    number = _best(figures, measured.validation)
    chosen = found[number]
    classes = [
        ClassSymptoms(name=name, symptoms=[pool.symptom(label, text) for text in own])
        for label, (name, own) in enumerate(zip(measured.classes, chosen, strict=True))
    ]
    details = {"parents": [parent_of(start)], "result_of_round": number, "rounds": rounds, "pairs": pairs}
    provenance = _provenance(plan, answered_by() if answered_by else identity, measured, total, details)
    improved = SymptomSet(task=start.task, modality=start.modality, classes=classes, provenance=provenance)
    return with_verdict(improved)


def parent_of(symptoms: SymptomSet) -> dict[str, Any]:
    """Name a set in the provenance of one that is made of it."""
    origin = symptoms.provenance
    return {"digest": symptoms.digest(), "kind": origin.kind, "author": origin.author, "created": origin.created}


@dataclass
class _Total:
    created: str
    answers: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)


def _is_over(figures: list[dict[str, Any]]) -> bool:
    """Return True after `PATIENCE` rounds without a higher validation accuracy; never without validation images."""
    accuracies = [entry.get("validation_accuracy", 0.0) for entry in figures]
    return "validation_accuracy" in figures[0] and len(figures) - 1 - int(np.argmax(accuracies)) >= PATIENCE


def _best(figures: list[dict[str, Any]], validation: Images | None) -> int:
    """Choose the round of the lowest loss on training images, of those that validation does not tell from the best one.

    These are within one standard error of the highest validation accuracy (the rule of Breiman et al., CART, 1984, for choices
    by a noisy estimate).
    """
    allowed = list(range(len(figures)))
    if validation is not None:
        accuracies = np.array([entry["validation_accuracy"] for entry in figures])
        top = accuracies.max()
        allowed = np.flatnonzero(accuracies >= top - np.sqrt(top * (1 - top) / len(validation.labels))).tolist()
    return min(allowed, key=lambda number: figures[number]["train_loss"])


def _round(
    plan: Plan,
    pool: Pool,
    folds: np.ndarray,
    number: int,
    model: str,
    ask: Ask,
    pairs: int,
    verify: Verify | None,
    doubted: set[tuple[int, str]],
    total: _Total,
) -> dict[str, Any]:
    """Ask about the most confused pairs, choose among all phrases, and return the record of it.

    `doubted`: phrases of the first set that verification refused; they go as soon as their class has others.
    """
    measured, train = pool.measured, pool.measured.train
    confused = confused_pairs(class_scores(pool.cosines(), pool.kept), train.labels, pairs)
    mentions: dict[int, list[Mention]] = {}
    removed: Counter[str] = Counter()
    answers = 0
    for asked, response in ask(_questions(plan, pool, confused, number, model)):
        assert isinstance(asked, _Asked), "an answer comes with the request it was made from"
        answers += 1
        total.created = max(total.created, response.created)
        total.tokens.update({key: response.usage.get(key, 0) for key in ("prompt_tokens", "completion_tokens")})
        items = parse(response.text, QUESTION.key)
        if items is None:
            removed[CUT_OFF if response.finish_reason == "length" else NO_JSON] += 1
            continue
        found = [tidy(item) for item in items[: plan.count]]
        removed[NO_ITEM] += not any(found)
        mentions.setdefault(asked.label, []).extend(
            Mention(asked.number, place, text) for place, text in enumerate(found) if text
        )
    total.answers += answers
    new = _admit(plan, pool, mentions, removed)
    refused = _refused(pool, new, verify)
    removed[NOT_VERIFIED] += len(refused)
    total.removed += removed
    before = pool.current()
    for label, own in new.items():
        pool.texts[label] += [text for text in own if (label, text) not in refused]
    pool.remove(doubted)
    choice = choose(pool.cosines(), pool.kept, train.labels, folds, measured.scale, plan.count)
    searched_from = "current symptoms" if choice.start == pool.kept else "symptoms of the highest AUROC"
    pool.kept = [list(columns) for columns in choice.kept]
    after = pool.current()
    names = measured.classes
    return {
        "round": number,
        "confused": [[names[left], names[right], images] for left, right, images in confused],
        "answers": answers,
        "removed": {reason: count for reason, count in sorted(removed.items()) if count},
        "refused": _listed(measured, refused),
        "tried": _listed(measured, {(label, text) for label, own in new.items() for text in own} - refused),
        "added": _listed(measured, _pairs(after) - _pairs(before)),
        "dropped": _listed(measured, _pairs(before) - _pairs(after)),
        "steps_from": searched_from,
        "steps": _steps(pool, choice),
        **pool.figures(),
        "worth": pool.worth(),
    }


def _questions(
    plan: Plan, pool: Pool, confused: list[tuple[int, int, int]], number: int, model: str
) -> Iterator[_Asked]:
    """Yield the questions of a round: for each pair, what is true of either class and not of the other."""
    names, cosines, count = pool.measured.classes, pool.cosines(), 0
    for left, right, _ in confused:
        for label, other in ((left, right), (right, left)):
            worked, failed = _evidence(pool, cosines[label], label, other)
            variables = {
                "picture": plan.preset.picture,
                "look_at": plan.preset.look_at,
                "plainly": plan.preset.plainly,
                "classes": [names[label], names[other]],
                "most": plan.count,
                "name": names[label],
                "other": names[other],
                "worked": worked,
                "failed": failed,
            }
            turns = plan.templates.turns(QUESTION, plan.modality or "", plan.preset.picture, plan.count)
            messages = plan.templates.messages(QUESTION.template, variables, turns)
            schema = QUESTION.schema(plan.count, plan.templates.version)
            for sample in range(plan.samples):
                drawn = (number - 1) * plan.samples + sample
                yield _Asked(model, messages, schema, plan.sampling, drawn, label, count)
                count += 1


def _evidence(pool: Pool, cosines: np.ndarray, label: int, other: int) -> tuple[list[str], list[str]]:
    """List phrases of a class that worked on training images of it and the other class, the best first, and some that failed.

    Args:
        cosines: [N, P] of the training images with all phrases of the class.
    """
    labels = pool.measured.train.labels
    both = (labels == label) | (labels == other)
    values = aurocs(cosines[both], labels[both] == label)
    values = values.round(3)  # the same question where cosines differ in their last digits
    ranked = sorted(zip(-values, pool.texts[label], strict=True))
    worked = [text for value, text in ranked if -value >= WORKED]
    failed = [text for value, text in ranked if not -value >= WORKED]
    return worked[:MOST_SHOWN], failed[::-1][:MOST_SHOWN]


def _admit(plan: Plan, pool: Pool, mentions: dict[int, list[Mention]], removed: Counter[str]) -> dict[int, list[str]]:
    """Filter the phrases of a round's answers: new ones by class.

    Each class is filtered by itself, and no consensus is needed: images show what a phrase is worth. Near-duplicates are
    found by their words alone, since each text is encoded once.
    """
    rules, new = replace(plan.rules, tower=None, consensus=1), dict[int, list[str]]()
    for label in sorted(mentions):
        name, found = pool.measured.classes[label], mentions[label]
        fitting = [mention for mention in found if plan.rules.fits(mention.text)]
        removed["too long"] += len(found) - len(fitting)
        selection = select({name: fitting}, rules, len(fitting))
        removed.update(selection.removed)
        new[label] = []
        for symptom in selection.symptoms[name]:
            if any(same_words(symptom.text, text) for text in pool.texts[label]):
                removed[TRIED] += 1
            else:
                new[label].append(symptom.text)
                pool.answers[label, symptom.text] = symptom.agreement
    return new


def _refused(pool: Pool, texts: dict[int, list[str]], verify: Verify | None) -> set[tuple[int, str]]:
    """Verify phrases, keep what is believed of them, and collect those, with their class, that are not believed."""
    names = pool.measured.classes
    asked = [(label, text) for label, own in texts.items() for text in own]
    if verify is None or not asked:
        return set()
    others = [tuple(name for name in names if name != own) for own in names]
    found = verify([Claim(names[label], others[label], text) for label, text in asked])
    if found is None:  # the verifier is not reliable
        return set()
    pool.beliefs.update(zip(asked, found, strict=True))
    return {pair for pair, belief in zip(asked, found, strict=True) if not belief.verified}


def _pairs(texts: list[list[str]]) -> set[tuple[int, str]]:
    return {(label, text) for label, own in enumerate(texts) for text in own}


def _listed(measured: Measured, pairs: set[tuple[int, str]]) -> list[list[str]]:
    return [[measured.classes[label], text] for label, text in sorted(pairs)]


def _steps(pool: Pool, choice: Choice) -> list[dict[str, Any]]:
    """List the steps of a choice: what each added and dropped, and its cross-validated gain."""
    kept, listed = list(choice.start), list[dict[str, Any]]()
    for step in choice.steps:
        before, after = kept[step.label], step.kept
        own = pool.texts[step.label]
        listed.append(
            {
                "class": pool.measured.classes[step.label],
                "add": [own[column] for column in after if column not in before],
                "drop": [own[column] for column in before if column not in after],
                "gain": rounded(step.gain),
            }
        )
        kept[step.label] = after
    return listed


def _provenance(
    plan: Plan, identity: Identity, measured: Measured, total: _Total, details: dict[str, Any]
) -> SetProvenance:
    return SetProvenance.model_validate(
        {
            "kind": "generated",
            "author": identity.model,
            "created": total.created,
            "how": "vipbench symptoms improve",
            **asked_with(plan, identity, [QUESTION]),
            "synonyms": digest_json(dict(plan.rules.synonyms)) if plan.rules.synonyms else None,
            "keep_jargon": plan.rules.keep_jargon,
            "answers_to_each": plan.samples,
            "most_symptoms": plan.count,
            "most_rounds": plan.rounds,
            **measured.identity,
            "answers": total.answers,
            "tokens": dict(sorted(total.tokens.items())),
            "removed": dict(sorted(total.removed.items())),
            **details,
        }
    )
