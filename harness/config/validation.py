"""Validate plain values against typed sections; what is wrong becomes one line that says where and what would be right."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError, did_you_mean, shortened


class Section(BaseModel):
    """A part of a config: unknown keys and numbers that are not finite are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def settle(self, name: str, applies: bool, default: Any, why: str) -> None:
        """Fill in an option that depends on others, from a validator: its default where it applies, else None.

        So equal runs have equal configs.

        Raises:
            ValueError: the option is given, as another value than the default, where it has no effect.
        """
        value = getattr(self, name)
        if not applies and value not in (None, default):
            raise ValueError(f"{name} has no effect, since {why}; leave it out")
        object.__setattr__(self, name, (default if value is None else value) if applies else None)


Model = TypeVar("Model", bound=BaseModel)
LONG = 80  # characters of a text in a message, which is shown shortened, without quotes


def validate(model: type[Model], values: Any, prefix: str = "", where: str = "config") -> Model:
    """A section from plain values.

    Args:
        prefix: of keys in messages, with the dot.
        where: what holds the values, in messages.

    Raises:
        UserError: not a mapping, an unknown or misspelt key, or a wrong value.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: should be a mapping of keys; found {shortened(values)}")
    try:
        return model(**values)
    except ValidationError as error:
        # A misspelt key comes first, since it may be why another one is missing.
        first, *more = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        parts = [str(part) for part in first["loc"] if not str(part).startswith(("literal", "constrained"))]
        key = ".".join([*filter(None, [prefix.rstrip(".")]), *parts])
        text = f"{where}: {key}: {_explain(model, first)}"
        raise UserError(text + (f" (and {len(more)} more)" if _distinct(error) > 1 else "")) from error


def _distinct(error: ValidationError) -> int:
    return len({detail["loc"][:2] for detail in error.errors()})


def _explain(model: type[BaseModel], detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        *path, key = detail["loc"]
        return f"unknown key; {did_you_mean(str(key), _keys(model, path))}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":  # of a validator of ours, which says it all
        return str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "credentials":
        return message
    found = detail["input"]
    quoted = isinstance(found, str) and len(found) < LONG
    return f"{message}; found {repr(found) if quoted else shortened(found)}"


def _keys(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The keys of the section at a place within a model; of all sections that may stand there."""
    sections = [model]
    for part in path:  # places in lists and names of variants stand between the keys
        fields = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = [inner for field in fields for inner in _sections(field.annotation)] or sections
    return [key for section in sections for key in section.model_fields]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]
