"""Generate a symptom set with an LLM: elicit, refine, filter; ask again where too few symptoms are left.

Classes are taken in groups of those that are hard to tell apart, groups in blocks, so that memory does not grow with the
number of classes (but for the result). The set is a pure function of the plan, the recorded answers and the packages
that judge words (wordfreq, snowballstemmer): rebuilt from them offline, it is the same byte for byte.

    vipbench symptoms generate --task derm7pt --classes melanoma,nevus --modality dermoscopy --url http://127.0.0.1:8000
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from vipbench.harness.data.stateless_random import keyed_generator
from vipbench.harness.errors import UserError
from vipbench.harness.models.phrases import spoken
from vipbench.harness.symptoms.filters import FILTERS, Mention, Rules, Selection, select
from vipbench.harness.symptoms.llm.answers import parse, tidy
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Ask, Identity, Request, Response
from vipbench.harness.symptoms.prompting import Knowledge, Preset, Step, Templates, find_knowledge
from vipbench.harness.symptoms.sets import ClassSymptoms, SetProvenance, Symptom, SymptomSet, fold
from vipbench.harness.symptoms.verdict import with_verdict
from vipbench.harness.symptoms.verify import Belief, Claim, Verification, Verifier
from vipbench.harness.symptoms.words import LISTS, LISTS_FILE
from vipbench.harness.system.files import digest_file, digest_json
from vipbench.harness.system.progress import Progress

BLOCK_REQUESTS = 2048  # at a time, about: enough to keep servers busy
RANDOM_WORDS = 4  # in a phrase
CUT_OFF, NO_JSON, NO_ITEM = "answer cut off", "answer not parseable", "answer without a usable item"
MOST_JARGON = 50  # words in the provenance


@dataclass(frozen=True)
class Plan:
    """The settings that, with the answers, determine a set.

    Attributes:
        groups: the classes, in groups of similar ones.
        classes: all of them in the set's order.
        samples: k, answers per class and round.
        count: the symptoms wanted for each class.
        rounds: the most rounds of questions, for the classes that have too few.
        verify: have an LLM verify what is chosen; what fails makes place for the next.
        one_step: ask for symptoms at once, without the features first.
        backbone: name, pretrained and digest of the backbone whose text tower is in `rules`; None: there is none.
    """

    task: str
    classes: list[str]
    groups: list[list[str]]
    modality: str | None
    preset: Preset
    kind: str
    templates: Templates
    sampling: dict[str, float | int]
    rules: Rules
    samples: int = 4
    count: int = 4
    rounds: int = 3
    verify: bool = False
    one_step: bool = False
    backbone: dict[str, Any] | None = None

    @property
    def knowledge(self) -> Knowledge:
        return find_knowledge(self.kind, self.one_step)

    @property
    def most_items(self) -> int:
        """The most items in an answer."""
        return 2 * self.count

    def blocks(self) -> Iterator[list["Group"]]:
        """Yield the groups in blocks of about `BLOCK_REQUESTS` requests per step."""
        block: list[Group] = []
        for names in self.groups:
            block.append(Group(names))
            if sum(len(group.names) for group in block) * self.samples >= BLOCK_REQUESTS:
                yield block
                block = []
        if block:
            yield block

    def verification(self, verifier: Verifier) -> Verification | None:
        return Verification(verifier, self.templates, self.preset, self.sampling) if self.verify else None

    def question(
        self, group: "Group", name: str, step: Step, sample: int, features: list[str], model: str
    ) -> "Question":
        """Make the request of one step for one class."""
        variables = {
            "picture": self.preset.picture,
            "look_at": self.preset.look_at,
            "plainly": self.preset.plainly,
            "classes": group.names,
            "most": self.most_items,
            "name": name,
            "features": features,
        }
        turns = self.templates.turns(step, self.modality or "", self.preset.picture, self.most_items)
        messages = self.templates.messages(step.template, variables, turns)
        return Question(
            model, messages, step.schema(self.most_items, self.templates.version), self.sampling, sample, group, name
        )


@dataclass(eq=False)
class Group:
    """Similar classes, and the answers about them so far.

    Attributes:
        items: of the answers to the latest step, by class and sample.
        lost: unusable answers, by reason.
        pending: questions that were not answered (they wait for a batch).
        created: the time of the latest answer.
        tokens: prompt and completion tokens of all answers.
        beliefs: in phrases that were verified, by class and text.
    """

    names: list[str]
    items: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    pending: int = 0
    created: str = ""
    tokens: Counter[str] = field(default_factory=Counter)
    selection: Selection = field(default_factory=lambda: Selection({}))
    beliefs: dict[tuple[str, str], Belief] = field(default_factory=dict)

    def short_of(self, count: int) -> list[str]:
        """List the classes with fewer than `count` symptoms; none while answers are awaited."""
        found = self.selection.symptoms
        return [] if self.pending else [name for name in self.names if len(found.get(name, [])) < count]

    def take(self, name: str, sample: int, step: Step, response: Response, plan: Plan) -> None:
        """Keep the first items of an answer, in place of those of the step before."""
        self.answers += 1
        self.pending -= 1
        self.created = max(self.created, response.created)
        for key in ("prompt_tokens", "completion_tokens"):
            self.tokens[key] += response.usage.get(key, 0)
        items = parse(response.text, step.key)
        texts = [tidy(item) for item in items or ()]
        if plan.templates.version > 1:  # the record of version 1 was made with duplicates in the next step's questions
            texts = distinct(texts)
            if step is not plan.knowledge.steps[-1]:
                texts = [text for text in texts if fold(text) not in plan.rules.copied]
        texts = texts[: plan.most_items]
        usable = any(map(step.accepts, texts))
        if items is None:
            self.lost[CUT_OFF if response.finish_reason == "length" else NO_JSON] += 1
        elif not usable:
            self.lost[NO_ITEM] += 1
        self.items[name, sample] = texts if usable else []

    def claims(self) -> list[Claim]:
        """List what is chosen and not yet verified."""
        return [
            Claim(name, tuple(other for other in self.names if other != name), symptom.text)
            for name, chosen in self.selection.symptoms.items()
            for symptom in chosen
            if (name, symptom.text) not in self.beliefs
        ]

    def select(self, rules: Rules, count: int) -> None:
        """Filter and rank the items of all answers so far."""
        mentions: dict[str, list[Mention]] = {name: [] for name in self.names}
        for (name, sample), texts in self.items.items():
            mentions[name] += [Mention(sample, position, text) for position, text in enumerate(texts)]
        self.selection = select(mentions, rules, count, self.beliefs)

    def features(self, name: str, sample: int, step: Step, most: int) -> list[str]:
        """List at most `most` items of a step for the questions of the next one, all of the form that the schema demands."""
        return [text for text in self.items.get((name, sample), ()) if step.accepts(text)][:most]


@dataclass(frozen=True, eq=False)
class Question(Request):
    """A request, with its group and class."""

    group: Group
    name: str


def distinct(texts: Iterable[str]) -> list[str]:
    """Drop repetitions, whatever their case; the first of equal texts stays."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(fold(text), text)
    return list(first.values())


def generate(
    plan: Plan,
    identity: Identity,
    ask: Ask,
    note: Callable[[], str] = str,
    answered_by: Callable[[], Identity] | None = None,
    verifier: Verifier | None = None,
) -> SymptomSet:
    """Generate a set.

    Args:
        ask: answers requests (a client's `complete`).
        note: makes the end of the progress line.
        answered_by: returns after the work the recorded identity of the server, where it may have changed (a client's
            `identity`).
        verifier: the LLM that verifies, where it is another one.

    Classes with fewer symptoms than wanted are named in the set's provenance as `missing`.

    Raises:
        UserError: no class got any symptom (counts what was removed), or from `ask`.
    """
    symptoms: dict[str, list[Symptom]] = {}
    total = Group([])
    who = answered_by or (lambda: identity)
    with Progress(f"{plan.kind} of {plan.task}", len(plan.classes), "classes") as progress:

        def watched(requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
            for answer in ask(requests):
                progress.advance(0, note())
                yield answer

        verification = plan.verification(verifier or Verifier(watched, who))
        for block in plan.blocks():
            _ask_block(plan, block, identity.model, watched, verification)
            for group in block:
                symptoms.update(group.selection.symptoms)
                _add(total, group)
                progress.advance(len(group.names))
    if not any(symptoms.values()):
        raise UserError(f"no class of {plan.task} got a symptom; {_removal(total)}")
    return with_verdict(_set(plan, symptoms, _provenance(plan, who(), symptoms, total, verification)))


def pending(plan: Plan, identity: Identity, cache: ResponseCache) -> Iterator[Request]:
    """Yield the requests that can be made now and are not on record: of one step for all classes, then of the next.

    Nothing is yielded when all answers for the set are on record.
    """
    for block in plan.blocks():
        missing: list[Request] = []

        def recorded(
            requests: Iterable[Request], missing: list[Request] = missing
        ) -> Iterator[tuple[Request, Response]]:
            for request in requests:
                response = cache.get(request.key(identity.revision, identity.server_version))
                if response is None:
                    missing.append(request)
                else:
                    yield request, response

        verification = plan.verification(Verifier(recorded, lambda: identity))
        _ask_block(plan, block, identity.model, recorded, verification)
        yield from missing


def without_llm(plan: Plan, seed: int) -> SymptomSet:
    """Make the sets that need no LLM: class names, and random words (keyed by seed and class)."""
    if plan.kind == "class-name":
        symptoms = {name: [Symptom(text=spoken(name))] for name in plan.classes}
    else:
        symptoms = {name: _random(name, seed, plan.count) for name in plan.classes}
    how = f"vipbench symptoms generate --knowledge {plan.kind}"
    provenance = SetProvenance(
        kind="generated", author="vipbench", created=datetime.now(UTC).date().isoformat(), how=how
    )
    if plan.kind == "random-words":
        provenance = provenance.model_copy(update={"seed": seed, "words": digest_file(LISTS_FILE)})
    return _set(plan, symptoms, provenance)


def _random(name: str, seed: int, count: int) -> list[Symptom]:
    numbers, pool = keyed_generator(seed, fold(name)), sorted(LISTS["random"])
    phrases = [numbers.choice(len(pool), RANDOM_WORDS, replace=False) for _ in range(count)]
    return [Symptom(text=" ".join(pool[number] for number in phrase)) for phrase in phrases]


def _ask_block(plan: Plan, block: list[Group], model: str, ask: Ask, verification: Verification | None) -> None:
    """Ask about the groups of a block, round after round, until their classes have enough symptoms or the rounds are over."""
    for number in range(plan.rounds):
        short = [(group, name) for group in block for name in group.short_of(plan.count)]
        samples = range(number * plan.samples, (number + 1) * plan.samples)
        for step in plan.knowledge.steps:
            for question, response in ask(_questions(plan, short, step, samples, model)):
                assert isinstance(question, Question), "an answer comes with the request it was made from"
                question.group.take(question.name, question.sample, step, response, plan)
        answered = [group for group in dict.fromkeys(group for group, _ in short) if not group.pending]
        for group in answered:
            group.select(plan.rules, plan.count)
        if verification:
            _verify(plan, answered, verification)


def _verify(plan: Plan, groups: list[Group], verification: Verification) -> None:
    """Verify what is chosen, and choose again without what failed, until all that is chosen is verified."""
    while claims := [(group, claim) for group in groups for claim in group.claims()]:
        found = verification.beliefs([claim for _, claim in claims])
        if verification.awaited:
            for group in groups:
                group.pending += 1
        if found is None:
            return
        for (group, claim), belief in zip(claims, found, strict=True):
            group.beliefs[claim.name, claim.text] = belief
        for group in dict.fromkeys(group for group, _ in claims):
            group.select(plan.rules, plan.count)


def _questions(
    plan: Plan, short: list[tuple[Group, str]], step: Step, samples: range, model: str
) -> Iterator[Question]:
    """Yield one step's questions about classes; a later step asks only where the one before gave items."""
    steps = plan.knowledge.steps
    before = dict(zip(steps[1:], steps, strict=False)).get(step)
    for group, name in short:
        for sample in samples:
            features = group.features(name, sample, before, plan.most_items) if before else []
            if features or not before:
                group.pending += 1
                yield plan.question(group, name, step, sample, features, model)


def _add(total: Group, group: Group) -> None:
    total.lost += group.lost
    total.answers += group.answers
    total.tokens += group.tokens
    total.created = max(total.created, group.created)
    total.selection.removed += group.selection.removed
    total.selection.jargon += group.selection.jargon


def _removal(total: Group) -> str:
    removed = {**total.lost, **total.selection.removed}
    counts = ", ".join(f"{reason} {count}" for reason, count in removed.items() if count)
    return f"{total.answers} answers; removed: {counts or 'nothing'}"


def asked_with(plan: Plan, identity: Identity, steps: Sequence[Step]) -> dict[str, Any]:
    """Describe for a set's provenance who answered, to which questions, and what judges the words of the answers."""
    return {
        **identity._asdict(),
        "templates": plan.templates.digests(steps),
        **plan.templates.digest_of_examples(),
        "preset": {"name": plan.modality, "sha256": digest_json(plan.preset.model_dump())},
        "words": digest_file(LISTS_FILE),
        "packages": {name: version(name) for name in ("snowballstemmer", "wordfreq")},
        "sampling": plan.sampling,
    }


def _provenance(
    plan: Plan,
    identity: Identity,
    symptoms: dict[str, list[Symptom]],
    total: Group,
    verification: Verification | None,
) -> SetProvenance:
    missing = {name: plan.count - len(symptoms[name]) for name in plan.classes if len(symptoms[name]) < plan.count}
    removed, rules = {**total.lost, **total.selection.removed}, plan.rules
    met = sorted(total.selection.jargon.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_JARGON]
    return SetProvenance.model_validate(
        {
            "kind": "generated",
            "author": identity.model,
            "created": max(total.created, verification.created if verification else ""),
            "how": f"vipbench symptoms generate --knowledge {plan.kind}",
            **asked_with(plan, identity, plan.knowledge.steps),
            "samples": plan.samples,
            "count": plan.count,
            "rounds": plan.rounds,
            "consensus": rules.consensus,
            **({"verification": verification.describe()} if verification else {}),
            "synonyms": digest_json(dict(rules.synonyms)) if rules.synonyms else None,
            "keep_jargon": rules.keep_jargon,
            "backbone": plan.backbone,
            "answers": total.answers,
            "tokens": dict(sorted(total.tokens.items())),
            "removed": {reason: removed.get(reason, 0) for reason in (CUT_OFF, NO_JSON, NO_ITEM, *FILTERS)},
            "jargon": dict(met),
            "missing": missing,
        }
    )


def _set(plan: Plan, symptoms: dict[str, list[Symptom]], provenance: SetProvenance) -> SymptomSet:
    classes = [ClassSymptoms(name=name, symptoms=symptoms[name]) for name in plan.classes]
    return SymptomSet(task=plan.task, modality=plan.modality, classes=classes, provenance=provenance)
