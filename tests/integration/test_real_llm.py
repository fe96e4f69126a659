"""A real open LLM (SmolLM2-135M-Instruct, see open_llm.py) writes symptoms: version 2 of the templates against version 1.

One server of vLLM's CPU build; its answers vary from run to run, so bounds are wide, and the figures are printed (`pytest -s`).
The figures of one run are in docs/symptoms.md.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.vllm_server import ROOT, served, vllm_interpreter
from vipbench.harness.demo.benchmark import CLASSES
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.generate import generate
from vipbench.harness.symptoms.llm.answers import parse, tidy
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.client import Client
from vipbench.harness.symptoms.llm.record import Request, Response
from vipbench.harness.symptoms.llm.server import _free_port
from vipbench.harness.symptoms.plans import Classes, make_plan, penalties
from vipbench.harness.symptoms.sets import SymptomSet
from vipbench.harness.symptoms.verdict import Verdict, judge
from vipbench.harness.symptoms.words import Names, is_visual

pytestmark = pytest.mark.integration

MODEL = ROOT / ".venv-serve" / "models" / "SmolLM2-135M-Instruct"
TASKS = {
    "derm7pt": (["melanoma", "nevus"], "dermoscopy"),
    "pneumonia": (["normal lung", "pneumonia"], "chest X-ray"),
    "demo": (list(CLASSES), "dermoscopy"),
}
SAMPLES, COUNT = 4, 4


def visual_share(phrases: list[str]) -> float:
    return sum(map(is_visual, phrases)) / max(len(phrases), 1)


class Outcome(NamedTuple):
    """All phrases of a version's answers about a task, before any filter; and the set that was made of them, if any."""

    names: list[str]
    phrases: list[str]
    symptoms: SymptomSet | None

    @property
    def verdict(self) -> Verdict | None:
        return judge(self.symptoms) if self.symptoms else None

    @property
    def visual(self) -> float:
        return visual_share(self.phrases)

    @property
    def names_no_class(self) -> float:
        names = Names(self.names)
        return sum(not names.found_in(text) for text in self.phrases) / max(len(self.phrases), 1)

    def describe(self) -> str:
        chosen = {entry.name: entry.texts for entry in self.symptoms.classes} if self.symptoms else {}
        figures = f"{len(self.phrases)} phrases, visual {self.visual:.0%}, naming no class {self.names_no_class:.0%}"
        return f"{figures}; {self.verdict or 'no class got a symptom'}; {json.dumps(chosen)}"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    vllm_interpreter()  # skips
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"no model at {MODEL.relative_to(ROOT)}; `make serve-env-cpu` fetches it")
    port = _free_port()
    with served(MODEL, port), ResponseCache(tmp_path_factory.mktemp("real") / "answers.sqlite") as cache:
        yield Client([f"http://127.0.0.1:{port}"], None, cache, concurrency=16)


def write_set(client: Client, task: str, version: int, **options: Any) -> Outcome:
    """Ask for a set; version 2 in one step, as suits a small model, and version 1 in its two."""
    names, modality = TASKS[task]
    sampling = {"temperature": 0.3, "top_p": 0.95, "max_tokens": 120, "seed": 0}
    plan = make_plan(
        Classes(task, modality, [(name, "") for name in names]),
        kind="symptoms",
        sampling={**sampling, **penalties(version, None, None, None)},
        samples=SAMPLES,
        count=COUNT,
        rounds=1,
        version=version,
        one_step=version > 1,
        **options,
    )
    phrases: list[str] = []

    def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        for request, response in client.complete(requests):
            if request.schema and request.schema["required"] == ["symptoms"]:
                phrases.extend(filter(None, map(tidy, parse(response.text, "symptoms") or ())))
            yield request, response

    try:
        symptoms = generate(plan, client.identity, ask)
    except UserError as error:
        if "got a symptom" not in str(error):
            raise
        symptoms = None
    return Outcome(names, phrases, symptoms)


def test_worked_examples_make_a_small_model_describe_what_is_seen(client: Client, tmp_path: Path) -> None:
    """Compare versions on all tasks; version 1 gets the benefit of a consensus of one, and its sets are still not usable."""
    first = {task: write_set(client, task, 1, consensus=1) for task in TASKS}
    second = {task: write_set(client, task, 2, verify=task == "derm7pt") for task in TASKS}
    for version, outcomes in (("v1", first), ("v2", second)):
        for task, outcome in outcomes.items():
            print(f"{version} {task}: {outcome.describe()}")
    for task, outcome in first.items():
        assert outcome.verdict is None or not outcome.verdict.usable, f"{task}: {outcome.describe()}"
    before, after = (
        visual_share([text for one in found.values() for text in one.phrases]) for found in (first, second)
    )
    assert after > max(0.6, before + 0.2), (before, after)
    assert second["derm7pt"].symptoms, "some phrases are in several answers"
    for outcome in second.values():
        if outcome.symptoms:
            assert outcome.verdict and outcome.verdict.visual and outcome.verdict.visual > 0.5
            assert outcome.verdict.consensus == 1.0
    # The verifier is the same small model. It has log-probabilities, and no idea: it is not believed.
    described = second["derm7pt"].symptoms.provenance.model_dump()["verification"]
    print(f"control questions answered right: {described['controls']:.0%}")
    assert described["used"] == (described["controls"] >= 0.75) and described["answers"] >= 16
    verified = [one for one in client.cache.answers() if "logprobs" in one.request.sampling]
    assert verified and all(one.response.logprobs for one in verified)
