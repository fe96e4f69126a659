"""Verify phrases: an LLM answers yes or no. Can it be seen in such a picture, and is it truer of its class than of others?

The probability of yes comes from the log-probabilities of the two answers, where the server gives them; else it is the share
of yes in `VOTES` answers. Worked examples from other fields come first, as chat turns. A verifier that cannot answer `CONTROLS`,
whose answers are known, is not believed.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vipbench.harness.symptoms.llm.answers import without_thoughts
from vipbench.harness.symptoms.llm.record import Ask, Identity, Request, Response
from vipbench.harness.symptoms.prompting import Preset, Step, Templates

THRESHOLD = 0.5  # a phrase is believed from this probability of yes on
RELIABLE = 0.75  # of the control questions; from here on a verifier is believed
VOTES = 3  # answers to a question, where there are no log-probabilities
TOP = 20  # log-probabilities at each token; the most that servers give
SAMPLING = (
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
)  # of the plan's; penalties would disfavour the more frequent answer
VERIFY = Step("verify", "answer", "yes|no")
SCHEMA = {
    "type": "object",
    "properties": {VERIFY.key: {"type": "string", "enum": ["yes", "no"]}},
    "required": [VERIFY.key],
    "additionalProperties": False,
}
DIGITS = 3  # of a probability in a set


class Claim(NamedTuple):
    """A phrase of a class, and the names of the classes that it is told apart from."""

    name: str
    others: tuple[str, ...]
    text: str


class Belief(NamedTuple):
    """Probabilities of yes: it can be seen; it is truer of its class than of the others. None: no usable answer, or no others."""

    seen: float | None = None
    truer: float | None = None

    @property
    def verified(self) -> bool:
        """Return True where there is an answer, and none against the phrase."""
        given = [probability for probability in self if probability is not None]
        return bool(given) and min(given) >= THRESHOLD


class Verifier(NamedTuple):
    """An LLM that verifies: `ask` answers its requests, `identity` returns it as it is recorded."""

    ask: Ask
    identity: Callable[[], Identity]


class Question(NamedTuple):
    """The variables of the template. Without `others` it asks for what can be seen, with them for what is truer."""

    picture: str
    text: str
    name: str = ""
    others: tuple[str, ...] = ()


FRUIT, CAR, BIRD, HOUSE = "a photo of one fruit", "a photo of a car", "a photo of a bird", "a photo of a house"
EXAMPLES = {
    Question(FRUIT, "bright red smooth skin"): True,
    Question(FRUIT, "the moon is far away"): False,
    Question(CAR, "two round lights at the front"): True,
    Question(CAR, "bought by a young family"): False,
    Question(FRUIT, "long curved yellow shape", "banana", ("cherry", "orange")): True,
    Question(FRUIT, "small round and dark red", "banana", ("cherry", "orange")): False,
    Question(CAR, "one long row of windows", "bus", ("racing car",)): True,
    Question(CAR, "low and flat shape", "bus", ("racing car",)): False,
}
CONTROLS = {
    Question(BIRD, "long thin legs"): True,
    Question(BIRD, "black and white feathers"): True,
    Question(HOUSE, "a sloping red roof"): True,
    Question(HOUSE, "small square windows"): True,
    Question(BIRD, "sings early in the morning"): False,
    Question(BIRD, "the price of oil"): False,
    Question(HOUSE, "sold last summer"): False,
    Question(HOUSE, "a happy childhood"): False,
    Question(BIRD, "tall with a long neck and long legs", "flamingo", ("penguin", "crow")): True,
    Question(BIRD, "black all over", "crow", ("flamingo", "penguin")): True,
    Question(HOUSE, "many floors and hundreds of windows", "skyscraper", ("hut",)): True,
    Question(HOUSE, "low, with a roof of straw", "hut", ("skyscraper",)): True,
    Question(BIRD, "pink feathers", "crow", ("flamingo", "penguin")): False,
    Question(BIRD, "black back and white belly", "flamingo", ("penguin", "crow")): False,
    Question(HOUSE, "walls of mud and a roof of straw", "skyscraper", ("hut",)): False,
    Question(HOUSE, "very tall, of glass and steel", "hut", ("skyscraper",)): False,
}


def verify(
    claims: Sequence[Claim],
    ask: Ask,
    templates: Templates,
    preset: Preset,
    model: str,
    sampling: Mapping[str, float | int],
) -> list[Belief]:
    """Ask about claims; returns a belief for each, in their order.

    Args:
        ask: answers requests (a client's `complete`).
        preset: the kind of picture.
        model: its name on the server.
        sampling: of the answers, of which temperature, top_p, max_tokens and seed count; log-probabilities are asked for too.
    """
    seen = [Question(preset.picture, claim.text) for claim in claims]
    truer = [Question(preset.picture, claim.text, claim.name, claim.others) for claim in claims]
    wanted = [*seen, *(question for question in truer if question.others)]
    found = _probabilities(wanted, ask, templates, model, sampling)
    return [
        Belief(found.get(left), found.get(right) if right.others else None)
        for left, right in zip(seen, truer, strict=True)
    ]


class Verification:
    """The verification of a set's phrases by an LLM, which first has to answer the control questions.

    Attributes:
        controls: the share of these that it answers right; None before they are answered.
        awaited: the number of requests without an answer (they wait for a batch).
        created, tokens, answers: of its answers, as in a set's provenance.
    """

    def __init__(
        self, verifier: Verifier, templates: Templates, preset: Preset, sampling: Mapping[str, float | int]
    ) -> None:
        self.verifier, self.templates, self.preset, self.sampling = verifier, templates, preset, sampling
        self.controls: float | None = None
        self.awaited = self.answers = 0
        self.created = ""
        self.tokens: Counter[str] = Counter()

    @property
    def reliable(self) -> bool:
        return self.controls is not None and self.controls >= RELIABLE

    def beliefs(self, claims: Sequence[Claim]) -> list[Belief] | None:
        """Verify claims; None where the LLM is not reliable, or answers are awaited."""
        model = self.verifier.identity().model
        if self.controls is None:
            share = control_share(self._ask, self.templates, model, self.sampling)
            self.controls = None if self.awaited else share
        if not self.reliable:
            return None
        found = verify(claims, self._ask, self.templates, self.preset, model, self.sampling)
        return None if self.awaited else found

    def describe(self) -> dict[str, Any]:
        """Return what a set's provenance holds of it."""
        counts = {"answers": self.answers, "tokens": dict(sorted(self.tokens.items()))}
        settings = {"template": self.templates.digests([VERIFY])[VERIFY.template], "threshold": THRESHOLD}
        return {
            **self.verifier.identity()._asdict(),
            **settings,
            "controls": self.controls,
            "used": self.reliable,
            **counts,
        }

    def _ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        """Pass on requests and answers, and count both."""

        def counted() -> Iterator[Request]:
            for request in requests:
                self.awaited += 1
                yield request

        for request, response in self.verifier.ask(counted()):
            self.awaited -= 1
            self.answers += 1
            self.created = max(self.created, response.created)
            self.tokens.update({name: response.usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")})
            yield request, response


def control_share(ask: Ask, templates: Templates, model: str, sampling: Mapping[str, float | int]) -> float:
    """Compute the share of the control questions that an LLM answers right; by chance half of them."""
    found = _probabilities(list(CONTROLS), ask, templates, model, sampling)
    right = [
        found.get(question) is not None and (found[question] >= THRESHOLD) == answer
        for question, answer in CONTROLS.items()
    ]
    return sum(right) / len(right)


def probability_of_yes(response: Response) -> float | None:
    """Read the probability of yes, against no: from log-probabilities, else 1 or 0 by the answer; None where it is neither."""
    answer = _answer(response.text)
    if answer is None:
        return None
    for likeliest in reversed(response.logprobs or []):
        if likeliest and _bare(likeliest[0][0]) == answer:
            found = [(_bare(token), log) for token, log in likeliest if _bare(token) in ("yes", "no")]
            most = max(log for _, log in found)  # taken off, since servers report -9999 as well
            yes, no = (sum(math.exp(log - most) for said, log in found if said == word) for word in ("yes", "no"))
            return yes / (yes + no)
    return float(answer == "yes")


def _probabilities(
    questions: Sequence[Question], ask: Ask, templates: Templates, model: str, sampling: Mapping[str, float | int]
) -> dict[Question, float]:
    """Ask each question once, and again where there are no log-probabilities; one without a usable answer is left out."""
    fields = {name: sampling[name] for name in SAMPLING if name in sampling} | {"logprobs": True, "top_logprobs": TOP}
    examples = {compared: _turns(templates, compared) for compared in {bool(question.others) for question in questions}}
    votes: dict[Question, list[float]] = {question: [] for question in questions}
    waiting = list(votes)
    for samples in (range(1), range(1, VOTES)):
        requests = [
            (question, Request(model, messages, SCHEMA, fields, sample))
            for question in waiting
            for messages in [templates.messages(VERIFY.template, question._asdict(), examples[bool(question.others)])]
            for sample in samples
        ]
        asked = {id(request): question for question, request in requests}
        bare = set()
        for request, response in ask(request for _, request in requests):
            question = asked[id(request)]
            if (probability := probability_of_yes(response)) is not None:
                votes[question].append(probability)
            if not response.logprobs:
                bare.add(question)
        waiting = [question for question in waiting if question in bare]
    return {question: round(sum(found) / len(found), DIGITS) for question, found in votes.items() if found}


def _turns(templates: Templates, compared: bool) -> list[dict[str, str]]:
    """Render the worked examples for questions that compare classes, or for those that do not."""
    turns = []
    for example, answer in EXAMPLES.items():
        if bool(example.others) == compared:
            said = json.dumps({VERIFY.key: "yes" if answer else "no"})
            turns += [templates.messages(VERIFY.template, example._asdict())[1], {"role": "assistant", "content": said}]
    return turns


def _answer(text: str) -> str | None:
    """Find the answer in a text: under its key in JSON, else the first yes or no after the thoughts."""
    said = without_thoughts(text)
    in_json = re.search(rf'"{VERIFY.key}"\s*:\s*"?\s*(yes|no)\b', said, re.IGNORECASE)
    found = in_json or re.search(r"\b(yes|no)\b", said, re.IGNORECASE)
    return found[1].lower() if found else None


def _bare(token: str) -> str:
    return "".join(filter(str.isalpha, token)).lower()
