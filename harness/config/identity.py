"""The identity of a run: a name that holds a digest of everything which determines its result."""

from typing import Any, NamedTuple

from vipbench.harness.config.schema import Config
from vipbench.harness.system.files import digest_json

# Raise it when a change of the code changes what a run computes, so that old runs are not taken for new ones.
RESULT_VERSION = 3
# Options of training that came later, as `templates` did: where not given, a run's identity is what it was before they came.
LATER = ("steps", "schedule", "final_lr", "betas", "eps")


class Digests(NamedTuple):
    """SHA-256 of the content that a run reads.

    Attributes:
        symptoms: None for a method that reads none.
        method: of the file that defines the method, and of files that its options name; None for vipbench's own code and none.
    """

    dataset: str
    backbone: str
    symptoms: str | None
    method: str | None = None

    def to_mapping(self) -> dict[str, str | None]:
        """Digests by name; that of the method only where there is one, so that other runs are what they were before."""
        return {name: digest for name, digest in self._asdict().items() if name != "method" or digest}


def run_name(config: Config, digests: Digests) -> str:
    """The run's identity as a directory name: readable front, then 12 hex digits of everything that determines the result.

    Where the inputs lie and how the run is executed (`run`) do not count; what they hold does, and `run.compile`, which
    rounds differently. The device is left out on purpose: a run has one identity on all machines, and its provenance names
    the device. So is `data.fewer`, which decides whether there is a result, and not which.
    """
    places: dict[str, Any] = {"run": True, "data": {"path", "fewer"}, "backbone": True, "symptoms": True}
    if files := config.method.files():
        places["method"] = set(files)
    settings = config.model_dump(mode="json", exclude=places)
    if settings["templates"] is None:
        del settings["templates"]
    if settings["recipe"] == "published":
        del settings["recipe"]
    if settings["grid"] is None:
        del settings["grid"]
    for section, later in (("train", LATER), ("method", config.method.LATER)):
        for name in later if settings[section] else ():
            if settings[section][name] is None:
                del settings[section][name]
    facts = {"version": RESULT_VERSION, "settings": settings, "digests": digests.to_mapping()}
    identity = digest_json(facts | ({"compile": True} if config.run.compile else {}))
    return f"{config.method.name}_{config.shots_label}_seed{config.seed}_{identity[:12]}"
