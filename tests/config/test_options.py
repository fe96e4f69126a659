"""Keys of a config are explained from its schema: values, default and meaning, as docs/config.md has them."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vipbench.harness.commands.explain_config import SECTIONS, WIDTH, explain
from vipbench.harness.config.options import describe_options
from vipbench.harness.config.schema import Config
from vipbench.harness.config.validation import Section

DOCS = Path(__file__).parents[2] / "docs"


class Example(Section):
    """A section for the test."""

    # The first line,
    # and the second.
    kind: Literal["a", "b"] = "a"
    share: Annotated[float, Field(ge=0, lt=1)] | None = None  # of all
    count: Annotated[int, Field(ge=1, lt=2**31)]
    pair: tuple[int, float] = (1, 2.0)


def test_values_defaults_and_comments() -> None:
    found = {option.name: (option.values, option.default, option.comment) for option in describe_options(Example)}
    assert found == {
        "kind": ("a or b", "a", "The first line, and the second."),
        "share": ("number >= 0, < 1 or null", None, "of all"),
        "count": ("whole number >= 1", None, ""),
        "pair": ("2 of whole number, number", [1, 2.0], ""),
    }


@pytest.mark.parametrize("section", [Config, *SECTIONS.values()])
def test_every_key_has_a_sentence(section: type[Section]) -> None:
    silent = [option.name for option in describe_options(section) if not option.comment and option.name not in SECTIONS]
    assert not silent


def test_the_documentation_is_the_schema() -> None:
    text = explain()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert (DOCS / "config.md").read_text() == text, "write it again: vipbench config --explain > docs/config.md"
