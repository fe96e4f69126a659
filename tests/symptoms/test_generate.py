"""Elicit, refine, filter against a fake server: what is asked, rounds, what is missing, rebuilding from the record, batches."""

import asyncio
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from tests.symptoms.fake_endpoint import FakeEndpoint, completion
from vipbench.harness.commands.symptoms import app
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.generate import Plan, generate, pending
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Ask, Identity, Request, Response
from vipbench.harness.symptoms.plans import Classes, groups_of, make_plan
from vipbench.harness.symptoms.prompting import KNOWLEDGE
from vipbench.harness.symptoms.sets import SymptomSet

WHO = Identity("fake", "r1", "1.0")
SAMPLING: dict[str, float | int] = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 64, "seed": 3}
SEEN = {
    "melanoma": ["jagged dark border", "many colours", "blue veil", "lopsided shape", "scattered black dots"],
    "nevus": ["smooth clear edge", "one brown colour", "round shape", "regular fine net", "small even dots"],
}


def plan_for(names: Iterable[str] = SEEN, **options: Any) -> Plan:
    classes = Classes("skin", "dermoscopy", [(name, "") for name in names])
    return make_plan(
        classes, **{"kind": "symptoms", "sampling": SAMPLING, "samples": 3, "count": 2, "rounds": 2, **options}
    )


def asked_class(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"].rsplit("Class: ", 1)[1]


def key_of(schema: dict[str, Any] | None) -> str:
    assert schema
    return str(schema["required"][0])


class Model:
    """A scripted LLM: what each class gets in the refining step, by sample; it keeps what it was asked."""

    def __init__(self, texts: dict[str, list[str]] | None = None) -> None:
        self.texts = texts or {name: [json.dumps({"symptoms": seen})] for name, seen in SEEN.items()}
        self.asked: list[Request] = []

    def answer(self, request: Request) -> Response:
        self.asked.append(request)
        text = json.dumps({"features": [f"Feature {request.sample} of the image.", "\x00bad"]})
        if key_of(request.schema) != "features":
            texts = self.texts[asked_class(request.messages)]
            text = texts[request.sample % len(texts)]
        created = f"2026-01-{len(self.asked) % 28 + 1:02}T00:00:00+00:00"
        return Response(text, "stop", {"prompt_tokens": 10, "completion_tokens": 5}, created)

    def ask(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        answers = [(request, self.answer(request)) for request in requests]
        yield from reversed(answers)  # in another order


def test_a_set_is_written_with_its_provenance() -> None:
    model = Model()
    symptoms = generate(plan_for(), WHO, model.ask)
    assert symptoms.texts(["melanoma", "nevus"]) == [SEEN["melanoma"][:2], SEEN["nevus"][:2]]
    assert [symptom.agreement for symptom in symptoms.classes[0].symptoms] == [3, 3]
    provenance = symptoms.provenance.model_dump()
    assert len(model.asked) == 2 * 3 * 2 == provenance["answers"]  # classes, samples, steps
    assert provenance["tokens"] == {"prompt_tokens": 120, "completion_tokens": 60}
    assert (provenance["model"], provenance["revision"], provenance["server_version"]) == WHO
    assert set(provenance["templates"]) == {"elicit", "refine"} and provenance["missing"] == {}
    assert provenance["created"] == "2026-01-13T00:00:00+00:00"  # the last answer's, never now
    assert provenance["packages"] == {name: version(name) for name in ("snowballstemmer", "wordfreq")}


def test_what_is_asked() -> None:
    model = Model()
    generate(plan_for(version=1), WHO, model.ask)
    by_step: dict[str, list[Request]] = {}
    for request in model.asked:
        by_step.setdefault(key_of(request.schema), []).append(request)
        assert request.messages[-1]["content"].endswith(asked_class(request.messages)) and request.sampling == SAMPLING
    for requests in by_step.values():
        assert len({request.messages[0]["content"] for request in requests}) == 1  # one instruction for all classes
        assert sorted({request.sample for request in requests}) == [0, 1, 2]
    instruction = by_step["symptoms"][0].messages[0]["content"]
    assert "melanoma; nevus" in instruction and "skin" in instruction and "at most 4" in instruction
    refined = next(request for request in by_step["symptoms"] if request.sample == 2)
    assert (
        "- Feature 2 of the image\n" in refined.messages[1]["content"] and "bad" not in refined.messages[1]["content"]
    )
    items = refined.schema["properties"]["symptoms"] if refined.schema else {}
    assert (items["minItems"], items["maxItems"]) == (1, 4) and "pattern" in items["items"]


def test_schemas_stay_within_what_vllms_grammars_take() -> None:
    for knowledge in KNOWLEDGE.values():
        for step in knowledge.steps:
            schema = json.dumps(step.schema(most=100))
            assert all(int(most) <= 128 for most in re.findall(r",(\d+)}", schema)) and step.accepts("A dark spot")
            assert not step.accepts("x" * 203) and not step.accepts("dark\n") and not step.accepts(3)


def test_it_asks_again_only_where_too_little_is_left_and_then_says_so() -> None:
    texts = {name: [json.dumps({"symptoms": seen})] for name, seen in SEEN.items()}
    texts["nevus"] = [
        '{"symptoms": ["benign naevus"]}',
        "no JSON",
        '{"symptoms": ["fever"]}',
        '{"symptoms": ["round shape"]}',
    ]
    model = Model(texts)
    symptoms = generate(plan_for(rounds=3), WHO, model.ask)
    assert [asked_class(request.messages) for request in model.asked].count("melanoma") == 6
    assert sorted(request.sample for request in model.asked if asked_class(request.messages) == "nevus") == sorted(
        [*range(9), *range(9)]
    )
    assert symptoms.texts(["nevus"]) == [["round shape"]]
    details = symptoms.provenance.model_dump()
    assert details["missing"] == {"nevus": 1}
    assert details["removed"]["answer not parseable"] == 2  # samples 1 and 5
    assert (details["removed"]["names the class"], details["removed"]["not visual"]) == (1, 1)


@pytest.mark.parametrize(
    ("samples", "given", "consensus"), [(1, None, 1), (3, None, 1), (4, None, 2), (4, 1, 1), (9, 5, 5)]
)
def test_a_third_of_the_samples_has_to_agree(samples: int, given: int | None, consensus: int) -> None:
    assert plan_for(samples=samples, consensus=given).rules.consensus == consensus
    assert plan_for(samples=samples, kind="description", consensus=given).rules.consensus == (given or 1)
    texts = {name: [json.dumps({"symptoms": seen[n : n + 1]}) for n in range(5)] for name, seen in SEEN.items()}
    once = f"no class of skin got a symptom; .*no consensus {2 * min(samples, 5)}"
    if consensus > 1 and samples <= 5:
        with pytest.raises(UserError, match=once):
            generate(plan_for(samples=samples, consensus=given, rounds=1), WHO, Model(texts).ask)
    else:
        made = generate(plan_for(samples=samples, consensus=given, rounds=1), WHO, Model().ask)
        assert made.provenance.model_dump()["consensus"] == consensus


def test_nothing_at_all_is_an_error_that_says_why() -> None:
    with pytest.raises(UserError, match=r"no class of skin got a symptom; .*answer not parseable 12"):
        generate(plan_for(), WHO, Model({name: ["nothing"] for name in SEEN}).ask)


def test_answers_that_were_cut_off_are_counted_as_such() -> None:
    def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        for request in requests:
            yield request, Response('{"features": ["dark', "length", {}, "2026-01-01T00:00:00+00:00")

    with pytest.raises(UserError, match="answer cut off 12"):
        generate(plan_for(), WHO, ask)


def test_groups_are_neighbours_of_about_equal_size() -> None:
    groups = groups_of([(f"c{number}", "x" if number < 41 else "y") for number in range(50)])
    assert [len(group) for group in groups] == [13, 14, 14, 9]
    assert groups[0] == [f"c{number}" for number in range(13)]


def test_many_classes_name_only_their_neighbours() -> None:
    names = [f"disease {number}" for number in range(60)]
    model = Model(
        {
            name: [json.dumps({"symptoms": [f"{word} spot", f"{word} edge"]})]
            for name, word in zip(names, WORDS, strict=False)
        }
    )
    symptoms = generate(plan_for(names, samples=1, version=1), WHO, model.ask)
    assert [entry.name for entry in symptoms.classes] == names
    first = next(request for request in model.asked if asked_class(request.messages) == "disease 0")
    assert "disease 19" in first.messages[0]["content"] and "disease 20" not in first.messages[0]["content"]


WORDS = [
    f"{shade} {colour}"
    for shade in ("dark", "light", "pale", "bright", "dull", "shiny", "dirty", "clean", "deep", "soft")
    for colour in ("brown", "red", "black", "white", "green", "yellow")
]


def write_cache(path: Path, requests: Iterable[Request], model: Model) -> ResponseCache:
    cache = ResponseCache(path)
    for request in requests:
        cache.put(request.key(*WHO[1:]), request, *WHO[1:], model.answer(request))
    return cache


def test_pending_goes_step_by_step_until_all_is_on_record(tmp_path: Path) -> None:
    plan, model = plan_for(), Model()
    cache = ResponseCache(tmp_path / "answers.sqlite")
    rounds = []
    while waiting := list(pending(plan, WHO, cache)):
        rounds.append({key_of(request.schema) for request in waiting})
        write_cache(cache.path, waiting[1:] if len(rounds) == 1 else waiting, model)  # one gets lost
    # the lost one is asked again, together with what can be refined by then
    assert rounds == [{"features"}, {"features", "symptoms"}, {"symptoms"}]
    assert len(cache) == 12


def hostile(draw: random.Random) -> str:
    signs = 'ab{}[]",:\\ \x00\x1b\ud800漢字é\U0001f9a0'
    noise = "".join(draw.choices(signs, k=draw.randrange(200)))
    key = draw.choice(["features", "symptoms"])
    return draw.choice(
        [
            noise,
            json.dumps({key: [noise, "a dark spot", 1, None, [noise]]}),
            json.dumps({key: ["dark spot " * draw.randrange(9)] * 50}),
            f'{{"{key}": ["{noise}',
            "[" * 10_000,
            json.dumps({key: {"a": noise}}),
            json.dumps({key: [f"{draw.choice(WORDS)} {draw.choice(['edge', 'spot', 'shape'])}" for _ in range(4)]}),
        ]
    )


def attempt(ask: Ask) -> SymptomSet | str:
    try:
        return generate(plan_for(count=4), WHO, ask)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(10))
def test_a_hostile_model_ends_in_a_sound_set_or_a_clear_line(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)

    def ask(requests: Iterable[Request]) -> Iterator[tuple[Request, Response]]:
        for request in requests:
            yield request, Response(hostile(draw), draw.choice(["stop", "length"]), {}, "2026-01-01T00:00:00+00:00")

    symptoms = attempt(ask)
    if isinstance(symptoms, str):
        assert "no class of skin got a symptom" in symptoms
        return
    symptoms.save(tmp_path / "set.json")
    loaded = SymptomSet.load(tmp_path / "set.json")
    missing = loaded.provenance.model_dump()["missing"]
    assert all(len(entry.symptoms) + missing.get(entry.name, 0) == 4 for entry in loaded.classes)


def command(tmp_path: Path, *options: str) -> list[str]:
    base = ["generate", "--task", "skin", "--classes", "melanoma,nevus", "--modality", "Dermoscopy", "--samples", "2"]
    return [*base, "--cache", str(tmp_path / "answers.sqlite"), "--out", str(tmp_path / "sets"), *options]


def invoke(arguments: list[str]) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    model = Model()
    with FakeEndpoint() as endpoint:

        async def reply(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
            await asyncio.sleep(random.random() / 100)  # so that answers come in any order
            schema = body["response_format"]["json_schema"]["schema"]
            request = Request(body["model"], body["messages"], schema, {}, body["seed"])
            return 200, completion(model.answer(request).text)

        endpoint.reply = reply
        yield endpoint


def test_a_set_is_rebuilt_from_the_exported_record_byte_for_byte(tmp_path: Path, server: FakeEndpoint) -> None:
    made = invoke(command(tmp_path, "--url", server.url, "--name", "llm"))
    assert made.exit_code == 0 and "2 classes, 8 symptoms" in made.output
    first = (tmp_path / "sets" / "skin" / "llm.json").read_bytes()
    asked = len(server.asked)
    assert asked == 8
    again = invoke(command(tmp_path, "--url", server.url, "--name", "llm", "--overwrite"))
    assert again.exit_code == 0 and len(server.asked) == asked  # all on record

    elsewhere, record = tmp_path / "elsewhere", tmp_path / "record.jsonl"
    assert invoke(["cache", "export", str(tmp_path / "answers.sqlite"), str(record)]).exit_code == 0
    assert invoke(["cache", "import", str(elsewhere / "answers.sqlite"), str(record)]).exit_code == 0
    assert invoke(command(elsewhere, "--offline", "--name", "llm")).exit_code == 0
    assert (
        (elsewhere / "sets" / "skin" / "llm.json").read_bytes()
        == first
        == (tmp_path / "sets" / "skin" / "llm.json").read_bytes()
    )
    short = invoke(command(elsewhere, "--offline", "--name", "more", "--samples", "3"))
    assert isinstance(short.exception, UserError) and "holds no answer" in str(short.exception)
    assert not (elsewhere / "sets" / "skin" / "more.json").exists()


def test_a_set_of_a_server_that_refuses_fields_is_rebuilt_byte_for_byte(tmp_path: Path, server: FakeEndpoint) -> None:
    reply = server.reply

    async def picky(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any] | bytes]:
        if "max_tokens" in body:
            return 400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}}
        return await reply(body, number)

    server.reply, server.models, server.version = picky, [], None
    words = ["--model", "fake", "--name", "llm", "--overwrite"]
    sets = []
    for source in (["--url", server.url], ["--url", server.url], ["--offline"]):
        made = invoke(command(tmp_path, *words, *source))
        assert made.exit_code == 0, made.exception
        sets.append((tmp_path / "sets" / "skin" / "llm.json").read_bytes())
    assert sets[0] == sets[1] == sets[2]
    assert sum("max_completion_tokens" in body for body in server.asked) == 8
    provenance = json.loads(sets[0])["provenance"]
    assert provenance["server_version"] == f"unknown at {server.url}/v1 without max_tokens"


def test_thoughts_and_talk_are_no_hindrance() -> None:
    texts = {}
    for name, seen in SEEN.items():
        listed = json.dumps([{"text": f"{number}. {text}"} for number, text in enumerate(seen, start=1)])
        texts[name] = [f'<think>Or {{"symptoms": ["no"]}}?</think>Here:\n```json\n{listed}\n```']
    assert generate(plan_for(), WHO, Model(texts).ask).texts(list(SEEN)) == [seen[:2] for seen in SEEN.values()]


def test_items_beyond_those_asked_for_are_left_alone() -> None:
    """Limit the items of an answer: thousands of phrases would all be compared with each other."""
    seen = SEEN["melanoma"]
    many = json.dumps([*seen, *(f"{left} {right} spot" for left in WORDS for right in WORDS)])
    symptoms = generate(plan_for(rounds=1), WHO, Model({"melanoma": [many], "nevus": ["[]"]}).ask)
    removed = symptoms.provenance.model_dump()["removed"]
    assert symptoms.texts(["melanoma"]) == [seen[:2]] and removed["near-duplicate"] == removed["malformed"] == 0


def test_batch_files_lead_to_the_same_set(tmp_path: Path) -> None:
    batch, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    options = ["--model", "fake", "--batch-file", str(batch)]
    model = Model()
    outputs = [invoke(command(tmp_path, *options)).output]
    for _ in range(2):
        lines = [json.loads(line) for line in batch.read_text().splitlines()]
        with answers.open("w") as file:
            for line in lines:
                schema = line["body"]["response_format"]["json_schema"]["schema"]
                text = model.answer(Request("fake", line["body"]["messages"], schema, {}, 0)).text
                body = {**completion(text), "created": 1_700_000_000}
                file.write(
                    json.dumps({"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}}) + "\n"
                )
        outputs.append(invoke(command(tmp_path, *options, "--from-batch", str(answers))).output)
    assert "4 requests" in outputs[0] and "4 answers recorded, 0 failed" in outputs[1] and "4 requests" in outputs[1]
    assert "all answers are on record" in outputs[2]
    made = invoke(command(tmp_path, "--offline", "--model", "fake"))
    assert made.exit_code == 0, made.output
    assert SymptomSet.load(tmp_path / "sets" / "skin" / "fake.json").texts(["nevus"]) == [SEEN["nevus"][:4]]


def test_a_dry_run_asks_nobody(tmp_path: Path) -> None:
    output = invoke(command(tmp_path, "--dry-run")).output
    assert (
        "8 requests" in output and "answer tokens/s" in output and "Class: melanoma" in output and '"pattern"' in output
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["description", "definition"])
def test_other_kinds_of_knowledge_take_one_step(tmp_path: Path, kind: str) -> None:
    model = Model({name: [json.dumps({f"{kind}s": [f"A {name} is a pigmented lesion."]})] for name in SEEN})
    answer = model.answer

    def by_term(request: Request) -> Response:
        content = request.messages[-1]["content"].replace("Term: ", "Class: ")
        return answer(
            Request(request.model, [{"role": "user", "content": content}], request.schema, {}, request.sample)
        )

    model.answer = by_term  # type: ignore[method-assign]
    symptoms = generate(plan_for(kind=kind, count=1), WHO, model.ask)
    assert symptoms.texts(["nevus"]) == [["A nevus is a pigmented lesion"]]
    assert len(model.asked) == 6


def test_kinds_of_knowledge_without_an_llm(tmp_path: Path) -> None:
    named = ["--classes", "basal_cell_carcinoma,nevus", "--overwrite"]
    assert invoke(command(tmp_path, *named, "--knowledge", "class-name")).exit_code == 0
    assert SymptomSet.load(tmp_path / "sets" / "skin" / "class-name.json").classes[0].texts == ["basal cell carcinoma"]
    drawn = []
    for seed in ("1", "1", "2"):
        assert invoke(command(tmp_path, "--knowledge", "random-words", "--seed", seed, "--overwrite")).exit_code == 0
        drawn.append(SymptomSet.load(tmp_path / "sets" / "skin" / "random-words.json").texts(["nevus", "melanoma"]))
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0][0] != drawn[0][1]
    assert [len(texts) for texts in drawn[0]] == [4, 4]


def test_own_templates_and_synonyms(tmp_path: Path, server: FakeEndpoint) -> None:
    (tmp_path / "templates").mkdir()
    own = tmp_path / "templates" / "refine.jinja2"
    own.write_text("{% block instruction %}Mine.{% endblock %}{% block question %}Class: {{ name }}{% endblock %}")
    (tmp_path / "synonyms.json").write_text('{"Melanoma": ["blue veil", "many colours"]}')
    options = [
        "--url",
        server.url,
        "--templates",
        str(own.parent),
        "--synonyms",
        str(tmp_path / "synonyms.json"),
        "--name",
        "own",
    ]
    assert invoke(command(tmp_path, *options)).exit_code == 0
    assert {body["messages"][0]["content"] for body in server.asked if "symptoms" in str(body["response_format"])} == {
        "Mine."
    }
    symptoms = SymptomSet.load(tmp_path / "sets" / "skin" / "own.json")
    assert symptoms.texts(["melanoma"]) == [["jagged dark border", "lopsided shape", "scattered black dots"]]
    assert symptoms.provenance.model_dump()["missing"] == {"melanoma": 1}
    for text, words in (
        ("{{ name }}", "block"),
        ("{% block instruction %}{{ nome }}{% endblock %}{% block question %}{% endblock %}", "nome"),
        ("{% x", "refine"),
    ):
        own.write_text(text)
        failed = invoke(command(tmp_path, *options, "--overwrite"))
        assert isinstance(failed.exception, UserError) and words in str(failed.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--url", "http://127.0.0.1:1", "--offline"], "say who answers"),
        ([], "say who answers"),
        (["--offline"], "no such response cache"),
        (["--dry-run", "--modality", "dermascopy"], "did you mean 'dermoscopy'"),
        (["--dry-run", "--modality", "DERMOSCOPI"], "did you mean 'dermoscopy'"),
        (["--dry-run", "--modality", "CXRs"], "did you mean 'cxr'"),
        (["--executor", "slurm", "--serve", "m", "--tensor-parallel", "2"], "--gpus: give the number of GPUs"),
        (["--dry-run", "--classes", "a,A"], "occurs twice"),
        (["--dry-run", "--classes", "a,,b"], "1 to 200 printable"),
        (["--dry-run", "--classes-file", "x.txt"], "say which classes"),
        (["--batch-file", "x.jsonl"], "--model"),
        (["--task", "../x", "--knowledge", "class-name"], "file name"),
        (["--dry-run", "--templates", "/nowhere"], "no template there"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: list[str], words: str) -> None:
    failed = invoke(command(tmp_path, *options))
    assert isinstance(failed.exception, UserError), failed.output
    assert words in str(failed.exception) and "\n" not in str(failed.exception)


def test_classes_from_a_file_and_from_a_dataset(tmp_path: Path, dataset: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("A00.0 Cholera, classical\tA00\n\nA01.0 Typhoid fever\tA01\r\n", encoding="utf-8-sig")
    base = ["generate", "--out", str(tmp_path), "--knowledge", "class-name"]
    assert invoke([*base, "--task", "icd", "--classes-file", str(listed)]).exit_code == 0
    made = SymptomSet.load(tmp_path / "icd" / "class-name.json")
    assert [entry.name for entry in made.classes] == ["A00.0 Cholera, classical", "A01.0 Typhoid fever"]
    assert invoke([*base, "--data", str(dataset), "--task", "own"]).exit_code == 0
    assert SymptomSet.load(tmp_path / "own" / "class-name.json").texts(["nevus"]) == [["nevus"]]


def test_the_kinds_on_the_command_line_are_those_of_the_code() -> None:
    """The command has a list of its own, since the code takes longer to import."""
    from vipbench.harness.commands.generate import Kind
    from vipbench.harness.symptoms.prompting import KNOWLEDGE

    assert [kind.value for kind in Kind] == list(KNOWLEDGE)


def test_a_served_model_has_the_revision_and_the_key_that_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vipbench.harness.symptoms.llm import server

    given: dict[str, Any] = {}

    def start(model: str, **options: Any) -> None:
        given.update(options, model=model)
        raise UserError("as far as this test goes")

    monkeypatch.setattr(server, "Server", start)
    (tmp_path / "key").write_text("secret")
    options = ["--serve", "org/m", "--revision", "v2", "--api-key-file", str(tmp_path / "key"), "--gpus", "2"]
    failed = invoke(command(tmp_path, *options))
    assert "as far as this test goes" in str(failed.exception)
    assert given == {"model": "org/m", "revision": "v2", "api_key": "secret", "gpus": 2, "tensor_parallel": 1}
