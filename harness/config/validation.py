"""Validate plain values against typed sections; what is wrong becomes one line that says where and what would be right."""

from collections.abc import Mapping
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
    try:
        return model(**values)
    except ValidationError as error:
        # A misspelt key comes first, since it may be why another one is missing.
        first, *more = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        parts = [str(part) for part in first["loc"] if not str(part).startswith(("literal", "constrained"))]
        key = ".".join([*filter(None, [prefix.rstrip(".")]), *parts])
        text = f"config: {key}: {_explain(model, first)}"
        raise UserError(text + (f" (and {len(more)} more)" if _distinct(error) > 1 else "")) from error


def first_problem(error: ValidationError, joint: str = ".") -> str:
    """Describe the first thing that is wrong in one line: its place, the reason, and what was found where that is short."""
    first = error.errors()[0]
    place = joint.join(str(part)[:50] for part in first["loc"] if part != "[key]")
    found = f" (found {shortened(first['input'], 50)!r})" if isinstance(first["input"], str | int | float) else ""
    reason = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{place}: {reason}{found}" if place else f"{reason}{found}"


def _distinct(error: ValidationError) -> int:
    return len({detail["loc"][:2] for detail in error.errors()})


def _explain(model: type[BaseModel], detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        for part in detail["loc"][:-1]:
            model = _section(model, str(part))
        return f"unknown key; {did_you_mean(str(detail['loc'][-1]), list(model.model_fields))}"
    if detail["type"] == "missing":
        return "is missing"
    if detail["type"] == "value_error":  # of a validator of ours, which says it all
        return str(detail["ctx"]["error"])
    message = detail["msg"][0].lower() + detail["msg"][1:]
    if detail["type"] == "credentials":
        return message
    found = detail["input"]
    return f"{message}; found {shortened(found if isinstance(found, int) else repr(found))}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    candidates = [annotation, *get_args(annotation)]
    return next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
