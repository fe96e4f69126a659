"""Every key of a config with its values, default and meaning: `vipbench config --explain`, which writes docs/config.md, too."""

import inspect
import json
import textwrap

from vipbench.harness.config.options import Option, describe_options
from vipbench.harness.config.schema import BackboneConfig, Config, DataConfig, RunConfig, TrainConfig
from vipbench.harness.config.validation import Section

WIDTH = 80
SECTIONS: dict[str, type[Section]] = {
    "data": DataConfig,
    "backbone": BackboneConfig,
    "train": TrainConfig,
    "run": RunConfig,
}
INTRODUCTION = (
    "A config is a YAML file; `key=value` on the command line changes one of its keys, such as `data.shots=4`. "
    "`vipbench config FILE` prints a config with every default filled in. `data.path` and `method` must be given. `train` begins "
    "with the recipe of the method's paper, which `vipbench methods NAME` prints with the method's own options "
    "(`method.NAME=VALUE`); the defaults of `train` below are those of a method that declares nothing else."
)


def explain() -> str:
    """Write all keys as Markdown, in lines that fit a terminal."""
    parts = ["# Config keys", textwrap.fill(INTRODUCTION, WIDTH)]
    own = [option for option in describe_options(Config) if option.name not in SECTIONS]
    parts.append(_list("The run as a whole", "", own))
    for name, section in SECTIONS.items():
        heading = f"`{name}`\n\n{textwrap.fill(' '.join(inspect.cleandoc(section.__doc__ or '').split()), WIDTH)}"
        parts.append(_list(heading, f"{name}.", describe_options(section)))
    return "\n\n".join(parts) + "\n"


def _list(heading: str, prefix: str, options: list[Option]) -> str:
    return f"## {heading}\n\n" + "\n".join(_entry(prefix, option) for option in options)


def _entry(prefix: str, option: Option) -> str:
    default = "" if option.default is None else f", default {json.dumps(option.default)}"
    text = f"- `{prefix}{option.name}`: {option.values}{default}. {_sentence(option.comment)}"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _sentence(comment: str) -> str:
    return comment[:1].upper() + comment[1:].rstrip(".") + "."
