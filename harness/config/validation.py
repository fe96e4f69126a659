"""Validate plain values against typed sections; what is wrong becomes one line: where, what, and what would be right."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vipbench.harness.errors import UserError, did_you_mean, shortened


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
    """Validate a section of keys, which begin with `prefix` in messages.

    Raises:
        UserError: not a mapping, an unknown or misspelt key, or a wrong value.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: should be a mapping of keys; found {shortened(values)}")
    return parse(model, dict(values), where, [part for part in prefix.split(".") if part])


def parse(model: type[Model], content: Any, where: str, above: Sequence[str] = ()) -> Model:
    """Validate plain values, as read from a file.

    Args:
        where: begins the error message: the file, for example.
        above: the keys above `content` there.

    Raises:
        UserError: "where: place: reason", with the number of further problems.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {first_problem(error, model, above)}") from error


def first_problem(error: ValidationError, model: type[BaseModel] | None = None, above: Sequence[str] = ()) -> str:
    """Describe the first thing that is wrong in one line: "place: reason", with the number of further problems.

    Args:
        model: whose keys a misspelt one is compared with.
        above: the keys above what was validated.
    """
    # A misspelt key comes first, since it may be why another one is missing.
    first, *more = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    place = ".".join(above)
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part != "[key]" and not part.startswith(
            ("literal", "constrained")
        ):  # pydantic's names for members of a union
            place += f".{shortened(part)}"
    others = len({detail["loc"][:2] for detail in error.errors()}) > 1
    reason = " ".join(_explain(model, first).split())
    return f"{place.lstrip('.') or 'top level'}: {reason}" + (f" (and {len(more)} more)" if others else "")


def _explain(model: type[BaseModel] | None, detail: Any) -> str:
    if detail["type"] == "extra_forbidden" and model:
        *path, key = detail["loc"]
        return f"unknown key; {did_you_mean(str(key), _keys(model, path))}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":  # of a validator of ours, which is complete
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
