"""Validate plain values against typed sections; what is wrong becomes one line: where, what, and what would be right."""

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


def validate(model: type[Model], values: Mapping[str, Any], prefix: str = "") -> Model:
    """Validate a part of a config, whose keys begin with `prefix`. Raises UserError."""
    return parse(model, dict(values), "config", [part for part in prefix.split(".") if part])


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
        raise UserError(f"{where}: {_first_problem(model, error, above)}") from error


def _first_problem(model: type[BaseModel], error: ValidationError, above: Sequence[str]) -> str:
    # A misspelt key comes first, since it may be why another one is missing.
    first, *more = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    place = ".".join(above)
    for part in first["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif not part.startswith(("literal", "constrained")):  # pydantic's names for members of a union
            place += f".{shortened(part)}"
    others = len({detail["loc"][:2] for detail in error.errors()}) > 1
    return f"{place.lstrip('.') or 'top level'}: {_explain(model, first)}" + (
        f" (and {len(more)} more)" if others else ""
    )


def _explain(model: type[BaseModel], detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        *sections, key = detail["loc"]
        for part in sections:
            model = model if isinstance(part, int) else _section(model, part)
        return f"unknown key; {did_you_mean(str(key), list(model.model_fields))}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":  # of a validator of ours, which is complete
        return str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "credentials":
        return message
    found = detail["input"]
    return f"{message}; found {shortened(found if isinstance(found, int) else repr(found))}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel]:
    """The section that a key of `model` holds: alone, in a list, or as a member of a union."""
    annotation = model.model_fields[name].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
