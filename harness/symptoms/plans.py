"""Turn a user's options into the classes and the plan of a symptom set."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vipbench.harness.data.names import MAX_NAME, listed_classes
from vipbench.harness.errors import UserError
from vipbench.harness.symptoms.filters import Rules
from vipbench.harness.symptoms.generate import Plan
from vipbench.harness.symptoms.prompting import GUARDS, VERSIONS, Preset, Templates, find_knowledge, find_preset
from vipbench.harness.symptoms.sets import fold, refuse_twins
from vipbench.harness.system.files import read_json, read_whole

if TYPE_CHECKING:
    from vipbench.harness.models.backbone import Backbone


MOST_IN_GROUP = 20  # classes that are named in a prompt, and compared with each other
CONSENSUS = 3  # a third of the samples have to contain a symptom, unless another number is given


class Classes(NamedTuple):
    """A task's (class, label of its group) pairs, in the set's order."""

    task: str
    modality: str | None
    pairs: list[tuple[str, str]]


def read_classes(
    task: str | None, names: str | None, file: Path | None, data: str | None, modality: str | None
) -> Classes:
    """Read the classes from a list with commas, a file (a class per line; a tab and its group may follow) or a dataset.

    Raises:
        UserError: none or several of these are given, no task is named, there is no class, a name is unfit or occurs twice.
    """
    if sum(given is not None for given in (names, file, data)) != 1:
        raise UserError("say which classes: one of --classes A,B,C, --classes-file FILE and --data DIR")
    if data is not None:
        from vipbench.harness.data.info import DatasetInfo

        info = DatasetInfo.load(data)
        task, modality = task or info.name, modality or info.modality
        pairs = [(name, "") for name in info.classes]
    elif file is not None:
        pairs = _read_lines(file)
    else:
        pairs = [(name, "") for name in listed_classes(names, None) or []]
    if not task:
        raise UserError("--task: name the task that the classes belong to")
    _check_names([name for name, _ in pairs])
    return Classes(task, modality, pairs)


def penalties(
    version: int, presence: float | None, frequency: float | None, repetition: float | None
) -> dict[str, float]:
    """Collect the sampling's penalties: those given, else the ones that go with a version of the templates."""
    given = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition}
    return {**GUARDS[version], **{name: value for name, value in given.items() if value is not None}}


def make_plan(
    classes: Classes,
    *,
    kind: str,
    sampling: dict[str, float | int],
    samples: int = 4,
    count: int = 4,
    rounds: int = 3,
    consensus: int | None = None,
    verify: bool = False,
    synonyms: Path | None = None,
    templates: Path | None = None,
    version: int = VERSIONS[-1],
    one_step: bool = False,
    presets: Path | None = None,
    keep_jargon: bool = False,
    backbone: "tuple[str, str | None, Backbone] | None" = None,
) -> Plan:
    """Make the plan for a set.

    Args:
        consensus: the least number of samples that must contain a phrase; None: a third, for symptoms; 1 for other kinds.
        verify: have an LLM verify the phrases.
        templates: a folder with templates or examples in place of ours.
        version: of our templates.
        one_step: ask for symptoms at once, without the features first (for small models).
        backbone: its name, its pretrained tag, and the model itself.

    Raises:
        UserError: no preset for the modality, no such form of the knowledge, faulty templates, presets or synonyms.
    """
    knowledge = find_knowledge(kind, one_step)
    steps = knowledge.steps
    if one_step and version == 1:
        raise UserError("--steps 1 needs templates of version 2 or later; version 1 asks in two steps")
    names = [name for name, _ in classes.pairs]
    if not classes.modality and steps:
        raise UserError("--modality: say what kind of picture it is, such as dermoscopy or chest X-ray")
    modality, preset = (
        find_preset(classes.modality, presets) if steps and classes.modality else ("", Preset(picture="", look_at=[]))
    )
    if verify and not knowledge.visual:
        raise UserError(f"--verify is for symptoms; what is written as {kind} is not seen in a picture")
    if (consensus or 1) > samples:
        raise UserError(
            f"--consensus {consensus} of {samples} samples; give more --samples, or ask fewer of them to agree"
        )
    asked = Templates(templates, version)
    rules = Rules(
        accepts=steps[-1].accepts if steps else bool,
        visual=knowledge.visual,
        classes=names,
        consensus=consensus or (-(-samples // CONSENSUS) if knowledge.visual else 1),
        synonyms=_read_synonyms(synonyms, names) if synonyms else {},
        keep_jargon=keep_jargon,
        tower=backbone[2].text if backbone else None,
        copied=asked.example_phrases(modality, preset.picture),
    )
    described = {"name": backbone[0], "pretrained": backbone[1], "digest": backbone[2].digest} if backbone else None
    return Plan(
        task=classes.task,
        classes=names,
        groups=groups_of(classes.pairs),
        modality=modality or classes.modality,
        preset=preset,
        kind=kind,
        templates=asked,
        one_step=one_step,
        sampling=sampling,
        rules=rules,
        samples=samples,
        count=count,
        rounds=rounds,
        verify=verify,
        backbone=described,
    )


def groups_of(classes: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Divide (class, label of its group) pairs into groups of at most `MOST_IN_GROUP` neighbours, of about equal size."""
    by_label: dict[str, list[str]] = {}
    for name, label in classes:
        by_label.setdefault(label, []).append(name)
    groups = []
    for names in by_label.values():
        parts = -(-len(names) // MOST_IN_GROUP)
        bounds = [len(names) * part // parts for part in range(parts + 1)]
        groups += [names[begin:end] for begin, end in pairwise(bounds)]
    return groups


def _read_lines(file: Path) -> list[tuple[str, str]]:
    try:
        lines = read_whole(file).decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text: {error}") from error
    parts = [line.rstrip("\r").split("\t", 1) for line in lines if line.strip()]
    return [(part[0].strip(), part[1].strip() if len(part) > 1 else "") for part in parts]


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise UserError("no class is given")
    for name in names:
        if not name or not name.isprintable() or len(name) > MAX_NAME:
            raise UserError(f"class {name[:50]!r}: a name has 1 to {MAX_NAME} printable characters")
    refuse_twins(names, "classes")


def _read_synonyms(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    content = read_json(path)
    known = {fold(name) for name in names}
    if not isinstance(content, dict):
        raise UserError(f'{path}: not of the form {{"class": ["other name", ...]}}')
    for name, others in content.items():
        if fold(name) not in known:
            raise UserError(f"{path}: {name!r} is none of the classes")
        if not isinstance(others, list) or not all(isinstance(other, str) and other.strip() for other in others):
            raise UserError(f"{path}: class {name!r}: its value must be a list of names")
    return {fold(name): others for name, others in content.items()}
