"""What the LLM is asked: kinds of pictures (presets.yaml), kinds of knowledge, prompt templates and JSON schemas.

A template is a Jinja2 file with two blocks: `instruction`, the system message, is the same for all classes of a group;
`question`, the user's message, ends with the class. The templates' own comments list their variables.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError
from harness.symptoms.sets import first_problem, fold
from harness.system.files import read_yaml

FOLDER = Path(__file__).with_name("templates")
PRESETS_FILE = Path(__file__).with_name("presets.yaml")
PHRASE = r"[A-Za-z][A-Za-z0-9 ,'\-]{3,59}"
# In two halves, since xgrammar (vLLM's grammar engine; seen in 0.2.8) fails on a repetition of more than 128 (its #647).
SENTENCE = r"[A-Za-z][A-Za-z0-9 .,;:'()/%\-]{3,100}[A-Za-z0-9 .,;:'()/%\-]{0,100}"


class Preset(BaseModel):
    """A kind of picture, as the LLM is told about it."""

    model_config = ConfigDict(extra="forbid")

    aliases: list[str] = []
    picture: str
    look_at: list[str]
    plainly: dict[str, str] = {}


class Step(NamedTuple):
    """One request for a class.

    Attributes:
        template: name of the template, without its suffix.
        key: of the list in the JSON answer.
        pattern: what an item must be, as a regular expression: it bounds alphabet and length.
    """

    template: str
    key: str
    pattern: str

    def schema(self, most: int) -> dict[str, Any]:
        """JSON schema of the answer: 1 to `most` items that match the pattern."""
        items = {"type": "string", "pattern": f"^{self.pattern}$"}
        return {
            "type": "object",
            "properties": {self.key: {"type": "array", "items": items, "minItems": 1, "maxItems": most}},
            "required": [self.key],
            "additionalProperties": False,
        }

    def accepts(self, item: object) -> bool:
        """Whether an item is what the schema asked for; not every server holds to it."""
        return isinstance(item, str) and re.fullmatch(self.pattern, item) is not None


class Knowledge(NamedTuple):
    """A kind of knowledge about classes (Figure 5 of the ViP paper): how it is asked for.

    Attributes:
        steps: each reads what the one before answered; none at all: no LLM is asked.
        visual: whether it must be visible, plain, and silent about the class's name; other kinds are taken as they come.
    """

    steps: tuple[Step, ...]
    visual: bool = False


KNOWLEDGE = {
    "symptoms": Knowledge((Step("elicit", "features", SENTENCE), Step("refine", "symptoms", PHRASE)), visual=True),
    "description": Knowledge((Step("describe", "descriptions", SENTENCE),)),
    "definition": Knowledge((Step("define", "definitions", SENTENCE),)),
    "class-name": Knowledge(()),
    "random-words": Knowledge(()),
}


def find_preset(modality: str, extra: Path | None = None) -> tuple[str, Preset]:
    """The preset of a modality or of one of its aliases, from presets.yaml or from a file of the same form.

    Raises:
        UserError: there is none (names those there are), or `extra` is not of that form.
    """
    presets = {**_presets(PRESETS_FILE), **(_presets(extra) if extra else {})}
    names = {_key(alias): name for name, preset in presets.items() for alias in (name, *preset.aliases)}
    if _key(modality) in names:
        name = names[_key(modality)]
        return name, presets[name]
    close = difflib.get_close_matches(_key(modality), names, n=1)
    advice = f"did you mean {names[close[0]]!r}? " if close else ""
    raise UserError(
        f"modality {modality!r}: no preset; {advice}there are {', '.join(presets)}; --presets FILE adds your own"
    )


class Templates:
    """The prompt templates; files in `folder` take the place of our own of the same name.

    Raises:
        UserError: `folder` holds no template, or (when rendered) one is faulty.
    """

    def __init__(self, folder: Path | None = None) -> None:
        known = sorted(path.name for path in FOLDER.glob("*.jinja2"))
        if folder and not any((folder / name).is_file() for name in known):
            raise UserError(f"{folder}: no template there; it may hold {', '.join(known)}")
        loader = FileSystemLoader([*([folder] if folder else []), FOLDER])
        self.environment = SandboxedEnvironment(
            loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )

    def messages(self, template: str, variables: Mapping[str, Any]) -> list[dict[str, str]]:
        """The system's and the user's message."""
        try:
            loaded = self.environment.get_template(f"{template}.jinja2")
            context = loaded.new_context(dict(variables))
            instruction, question = (
                "".join(loaded.blocks[name](context)).strip() for name in ("instruction", "question")
            )
        except KeyError as error:
            raise UserError(f"template {template}.jinja2: no block {error}") from error
        except (TemplateError, ArithmeticError, AttributeError, TypeError, ValueError, RecursionError) as error:
            # the last ones are an expression's in braces: of values that do not go together, or too large
            raise UserError(f"template {template}.jinja2: {' '.join(str(error).split())[:300]}") from error
        return [{"role": "system", "content": instruction}, {"role": "user", "content": question}]

    def digests(self, steps: Sequence[Step]) -> dict[str, str]:
        """SHA-256 (hex) of the templates' text."""
        assert self.environment.loader
        sources = {
            step.template: self.environment.loader.get_source(self.environment, f"{step.template}.jinja2")[0]
            for step in steps
        }
        return {name: hashlib.sha256(source.encode()).hexdigest() for name, source in sources.items()}


def _key(modality: str) -> str:
    return fold(modality.replace("-", " "))


def _presets(path: Path) -> dict[str, Preset]:
    try:
        return {str(name): Preset.model_validate(value) for name, value in read_yaml(path).items()}
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from error
