"""Questions to the LLM: kinds of pictures (presets.yaml), kinds of knowledge, prompt templates and JSON schemas.

A template is a Jinja2 file with two blocks: `instruction`, the system message, is the same for all classes of a group;
`question`, the user's message, ends with the class. The templates' own comments list their variables. From version 2 on,
worked examples (examples.yaml) stand between the two as turns of the chat: a question about something of another field, and
its answer. Version 1 asks as it always did, so that its answers on record stay usable.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field

from vipbench.harness.config.validation import parse
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.symptoms.llm.answers import tidy
from vipbench.harness.symptoms.sets import fold
from vipbench.harness.symptoms.words import words
from vipbench.harness.system.files import digest_json, read_yaml

FOLDER = Path(__file__).with_name("templates")
VERSIONS = (1, 2)  # of the templates; a later one takes from an earlier one what it does not change
EXAMPLES = "examples.yaml"
# Against answers that go round in circles. Not repetition_penalty, which counts the question's words and JSON's signs as well.
GUARDS: dict[int, dict[str, float]] = {1: {}, 2: {"presence_penalty": 0.3, "frequency_penalty": 0.3}}
PRESETS_FILE = Path(__file__).with_name("presets.yaml")
PHRASE = r"[A-Za-z][A-Za-z0-9 ,'\-]{3,59}"
# What answers to templates of version 2 are held to: 2 to 7 words. A phrase of another make is taken where a server does not.
SEVEN_WORDS = r"[A-Za-z][A-Za-z'\-]{1,14}( [A-Za-z0-9][A-Za-z0-9'\-]{0,14}){1,6}"
# In two halves, since xgrammar (vLLM's grammar engine; seen in 0.2.8) fails on a repetition of more than 128 (its #647).
SENTENCE = r"[A-Za-z][A-Za-z0-9 .,;:'()/%\-]{3,100}[A-Za-z0-9 .,;:'()/%\-]{0,100}"


class Preset(BaseModel):
    """A kind of picture, as prompts describe it."""

    model_config = ConfigDict(extra="forbid")

    aliases: list[str] = []
    picture: str
    look_at: list[str]
    plainly: dict[str, str] = {}


Answer = Annotated[dict[Literal["colour", "shape", "texture", "border", "size", "place"], str], Field(min_length=1)]


class Example(BaseModel):
    """A worked example: a question about something of another field, and its answers by kind of feature."""

    model_config = ConfigDict(extra="forbid")

    field: list[str]
    picture: str
    look_at: list[str]
    classes: list[str]
    name: str
    features: Answer
    symptoms: Answer

    @property
    def answers(self) -> dict[str, list[str]]:
        """The items of the answers, by the key of the step that asks for them."""
        return {"features": list(self.features.values()), "symptoms": list(self.symptoms.values())}

    def question(self) -> dict[str, Any]:
        """Make the variables of its question."""
        own = self.model_dump(include={"picture", "look_at", "classes", "name"})
        return {**own, "features": self.answers["features"]}


class Step(NamedTuple):
    """One request for a class.

    Attributes:
        template: name of the template, without its suffix.
        key: of the list in the JSON answer.
        pattern: a regular expression for an item, which bounds alphabet and length.
        wanted: the narrower one that the schema demands from version 2 of the templates on, if any.
    """

    template: str
    key: str
    pattern: str
    wanted: str | None = None

    def schema(self, most: int, version: int = VERSIONS[-1]) -> dict[str, Any]:
        """Make the JSON schema of the answer: 1 to `most` items that match the pattern."""
        pattern = self.wanted if self.wanted and version > 1 else self.pattern
        items = {"type": "string", "pattern": f"^{pattern}$"}
        return {
            "type": "object",
            "properties": {self.key: {"type": "array", "items": items, "minItems": 1, "maxItems": most}},
            "required": [self.key],
            "additionalProperties": False,
        }

    def accepts(self, item: object) -> bool:
        """Check an item against the pattern, since not every server enforces the schema."""
        return isinstance(item, str) and re.fullmatch(self.pattern, item) is not None


class Knowledge(NamedTuple):
    """A kind of knowledge about classes (Figure 5 of the ViP paper), with the steps that obtain it.

    Attributes:
        steps: each refines the answers to the one before; empty where no LLM is needed.
        visual: its phrases must be visible, in plain words and without the class's name; other kinds are not filtered so.
    """

    steps: tuple[Step, ...]
    visual: bool = False


KNOWLEDGE = {
    "symptoms": Knowledge(
        (Step("elicit", "features", SENTENCE), Step("refine", "symptoms", PHRASE, SEVEN_WORDS)), visual=True
    ),
    "description": Knowledge((Step("describe", "descriptions", SENTENCE),)),
    "definition": Knowledge((Step("define", "definitions", SENTENCE),)),
    "class-name": Knowledge(()),
    "random-words": Knowledge(()),
}
IN_ONE_STEP = {"symptoms": Knowledge((Step("observe", "symptoms", PHRASE, SEVEN_WORDS),), visual=True)}


def find_knowledge(kind: str, one_step: bool) -> Knowledge:
    """Look up a kind of knowledge, with the steps that obtain it, or one step in their place.

    Raises:
        UserError: this kind has no such form.
    """
    if not one_step:
        return KNOWLEDGE[kind]
    if kind not in IN_ONE_STEP:
        raise UserError(f"--steps 1 is for {', '.join(IN_ONE_STEP)}, not for {kind}")
    return IN_ONE_STEP[kind]


def find_preset(modality: str, extra: Path | None = None) -> tuple[str, Preset]:
    """Look up the preset of a modality or of one of its aliases, in presets.yaml or in a file of the same form.

    Raises:
        UserError: there is none (lists those there are), or `extra` is not of that form.
    """
    presets = {**_presets(PRESETS_FILE), **(_presets(extra) if extra else {})}
    names = {_key(alias): name for name, preset in presets.items() for alias in (name, *preset.aliases)}
    if _key(modality) in names:
        name = names[_key(modality)]
        return name, presets[name]
    word, aliases = modality.replace("-", " "), [alias for preset in presets.values() for alias in preset.aliases]
    advice = did_you_mean(word, presets, otherwise=did_you_mean(word, aliases, otherwise=""))
    raise UserError(
        f"modality {modality!r}: no preset; {advice}{' ' if advice else ''}there are {', '.join(presets)}; "
        "--presets FILE adds your own"
    )


class Templates:
    """The prompt templates and worked examples; files in `folder` take the place of our own of the same name.

    Attributes:
        version: of our own templates, one of `VERSIONS`.
        examples: all worked examples; none in version 1.

    Raises:
        UserError: `folder` holds no template, the examples are faulty, or (when rendered) a template is.
    """

    def __init__(self, folder: Path | None = None, version: int = VERSIONS[-1]) -> None:
        self.version = version
        ours = [FOLDER / f"v{number}" for number in range(version, 0, -1)]
        known = sorted({path.name for place in ours for path in place.iterdir()})
        if folder and not any((folder / name).is_file() for name in known):
            raise UserError(f"{folder}: no template there; it may hold {', '.join(known)}")
        places = [*([folder] if folder else []), *ours]
        self.environment = SandboxedEnvironment(
            loader=FileSystemLoader(places), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        file = next((place / EXAMPLES for place in places if (place / EXAMPLES).is_file()), None)
        self.examples = _examples(file) if file and version > 1 else []
        self._turns: dict[tuple[str, int, str, str], list[dict[str, str]]] = {}

    def messages(
        self, template: str, variables: Mapping[str, Any], turns: Sequence[dict[str, str]] = ()
    ) -> list[dict[str, str]]:
        """Render the system's and the user's message, with the turns of the chat between them."""
        instruction, question = (self._render(template, block, variables) for block in ("instruction", "question"))
        return [{"role": "system", "content": instruction}, *turns, {"role": "user", "content": question}]

    def turns(self, step: Step, modality: str, picture: str, most: int) -> list[dict[str, str]]:
        """Render the worked examples for a kind of picture: the question of `step` and its answer in JSON, as turns of the chat.

        They are the same for all classes, so that servers hold them in their prefix cache. Steps whose answers no example
        has get none.
        """
        key = step.template, most, modality, picture
        if key not in self._turns:
            self._turns[key] = turns = []
            for example in self._from_elsewhere(modality, picture):
                if step.key in example.answers:
                    question = self._render(
                        step.template, "question", {**example.question(), "most": most, "plainly": {}}
                    )
                    answer = json.dumps({step.key: example.answers[step.key]})
                    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self._turns[key]

    def digest_of_examples(self) -> dict[str, str]:
        """Hash the worked examples for the provenance: {"examples": SHA-256 (hex)}; nothing where there are none."""
        return {"examples": digest_json([example.model_dump() for example in self.examples])} if self.examples else {}

    def example_phrases(self, modality: str, picture: str) -> frozenset[str]:
        """Collect what the worked examples for a kind of picture answer, folded: a model that repeats it has seen nothing."""
        shown = self._from_elsewhere(modality, picture)
        return frozenset(fold(tidy(text)) for example in shown for texts in example.answers.values() for text in texts)

    def _from_elsewhere(self, modality: str, picture: str) -> list[Example]:
        """List the examples that are not of the field that is asked about."""
        asked = set(words(f"{modality} {picture}"))
        return [example for example in self.examples if not asked.intersection(map(str.casefold, example.field))]

    def _render(self, template: str, block: str, variables: Mapping[str, Any]) -> str:
        try:
            loaded = self.environment.get_template(f"{template}.jinja2")
            return "".join(loaded.blocks[block](loaded.new_context(dict(variables)))).strip()
        except KeyError as error:
            raise UserError(f"template {template}.jinja2: no block {error}") from error
        except (TemplateError, ArithmeticError, AttributeError, TypeError, ValueError, RecursionError) as error:
            # the last ones come from an expression in braces: of values that do not go together, or too large
            raise UserError(f"template {template}.jinja2: {' '.join(str(error).split())[:300]}") from error

    def digests(self, steps: Sequence[Step]) -> dict[str, str]:
        """Hash the templates' text: SHA-256 (hex) by name."""
        assert self.environment.loader
        sources = {
            step.template: self.environment.loader.get_source(self.environment, f"{step.template}.jinja2")[0]
            for step in steps
        }
        return {name: hashlib.sha256(source.encode()).hexdigest() for name, source in sources.items()}


def _key(modality: str) -> str:
    return fold(modality.replace("-", " "))


def _examples(path: Path) -> list[Example]:
    examples = []
    for name, value in read_yaml(path).items():
        example = {**value, "name": str(name)} if isinstance(value, dict) else value
        examples.append(parse(Example, example, f"{path}: {name}"))
    return examples


def _presets(path: Path) -> dict[str, Preset]:
    return {str(name): parse(Preset, value, f"{path}: {name}") for name, value in read_yaml(path).items()}
