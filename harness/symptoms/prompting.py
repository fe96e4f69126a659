"""Questions to the LLM: kinds of pictures (presets.yaml), kinds of knowledge, prompt templates and JSON schemas.

A template is a Jinja2 file with two blocks: `instruction`, the system message, is the same for all classes of a group;
`question`, the user's message, ends with the class. The templates' own comments list their variables.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import BaseModel, ConfigDict

from vipbench.harness.config.validation import parse
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.symptoms.sets import fold
from vipbench.harness.system.files import read_yaml

FOLDER = Path(__file__).with_name("templates")
PRESETS_FILE = Path(__file__).with_name("presets.yaml")
PHRASE = r"[A-Za-z][A-Za-z0-9 ,'\-]{3,59}"
# In two halves, since xgrammar (vLLM's grammar engine; seen in 0.2.8) fails on a repetition of more than 128 (its #647).
SENTENCE = r"[A-Za-z][A-Za-z0-9 .,;:'()/%\-]{3,100}[A-Za-z0-9 .,;:'()/%\-]{0,100}"


class Preset(BaseModel):
    """A kind of picture, as prompts describe it."""

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
        pattern: a regular expression for an item, which bounds alphabet and length.
    """

    template: str
    key: str
    pattern: str

    def schema(self, most: int) -> dict[str, Any]:
        """Make the JSON schema of the answer: 1 to `most` items that match the pattern."""
        items = {"type": "string", "pattern": f"^{self.pattern}$"}
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
    "symptoms": Knowledge((Step("elicit", "features", SENTENCE), Step("refine", "symptoms", PHRASE)), visual=True),
    "description": Knowledge((Step("describe", "descriptions", SENTENCE),)),
    "definition": Knowledge((Step("define", "definitions", SENTENCE),)),
    "class-name": Knowledge(()),
    "random-words": Knowledge(()),
}


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
        """Render the system's and the user's message."""
        try:
            loaded = self.environment.get_template(f"{template}.jinja2")
            context = loaded.new_context(dict(variables))
            instruction, question = (
                "".join(loaded.blocks[name](context)).strip() for name in ("instruction", "question")
            )
        except KeyError as error:
            raise UserError(f"template {template}.jinja2: no block {error}") from error
        except (TemplateError, ArithmeticError, AttributeError, TypeError, ValueError, RecursionError) as error:
            # the last ones come from an expression in braces: of values that do not go together, or too large
            raise UserError(f"template {template}.jinja2: {' '.join(str(error).split())[:300]}") from error
        return [{"role": "system", "content": instruction}, {"role": "user", "content": question}]

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


def _presets(path: Path) -> dict[str, Preset]:
    return {str(name): parse(Preset, value, f"{path}: {name}") for name, value in read_yaml(path).items()}
