"""Build open_clip models and load their weights: by name and tag, hub repository, folder, or a model JSON and a file.

Repositories of transformers are converted by harness/models/hugging_face.py.

What a backbone's digest covers beside its weights is made here: the architecture as it was built, its activation function
included, and the content of the files that it came from, never where they lie.
"""

import copy
import difflib
import hashlib
import json
import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.models import hugging_face
from vipbench.harness.models.hub import PREFIX, Repository
from vipbench.harness.models.limits import check_numbers, mapping
from vipbench.harness.models.open_clip_internals import (
    CLIP,
    CustomTextCLIP,
    convert_to_custom_text_state_dict,
    get_pretrained_cfg,
)
from vipbench.harness.models.openai_file import is_torchscript, read_openai
from vipbench.harness.system.files import digest_file, digest_json, read_json

log = logging.getLogger(__name__)

CONFIG_FILE = "open_clip_config.json"
QUICK = "-quickgelu"  # at the end of open_clip's names of models with QuickGELU
TEXT_SOURCES = ("hf_model_name", "hf_tokenizer_name")  # in a model's text_cfg; hub ids or local paths
WEIGHTS_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
MOST_PARAMETERS = 2 * 10**10  # four times those of open_clip's largest
TOKENIZER_SUFFIXES = (".json", ".txt", ".model")


@dataclass
class Source:
    """A model in open_clip's terms.

    Attributes:
        name: open_clip's, or of a config that was registered with it.
        weights: a tag or a file; None for random weights, or those of `converted`.
        config: the model config: embed_dim, vision_cfg, text_cfg and perhaps quick_gelu.
        architecture: what the digest covers of it; `config` is the same object, or part of it, but for hub repositories.
        preprocessing: fields of open_clip's PreprocessCfg that are not the default.
        converted: a repository of transformers, with the files of its weights.
    """

    name: str
    weights: str | None
    config: dict[str, Any]
    architecture: Any
    preprocessing: dict[str, Any] = field(default_factory=dict)
    converted: tuple[hugging_face.Converted, list[Path]] | None = None


def create(config: BackboneConfig, repository: Repository | None = None) -> tuple[CLIP | CustomTextCLIP, Any, Any]:
    """Build a model and load its weights; returns model, tokenizer and architecture.

    See `vipbench.harness.models.backbone.load_backbone`.

    Args:
        repository: the hub repository that an "hf-hub:" name stands for.

    Raises:
        UserError: no such model, tag or file, a file that is damaged or does not fit the model, weights that are not finite,
            images that are not square, or a name that contradicts the activation function of the weights.
    """
    with ExitStack() as files:
        source = _source(config, repository, files)
        openai = _openai_weights(config.name, source.weights)
        quick = _quick_gelu(config, source.config.get("quick_gelu"), openai is not None)
        if quick:
            source.config["quick_gelu"] = True
        with torch.random.fork_rng(devices=[]):  # the CPU's generator alone: nothing starts CUDA for it
            torch.manual_seed(0)
            model = open_clip.create_model(
                source.name,
                source.weights,
                load_weights=openai is None,
                force_quick_gelu=quick,
                pretrained_image=False,
                pretrained_text=False,
                weights_only=True,
                force_preprocess_cfg=source.preprocessing,
            )
            tokenizer = source.converted[0].tokenizer if source.converted else open_clip.get_tokenizer(source.name)
    if source.converted:
        converted, weights = source.converted
        converted.load(model, weights)
    elif openai is not None:
        custom = isinstance(model, CustomTextCLIP)
        model.load_state_dict(convert_to_custom_text_state_dict(openai) if custom else openai)
    elif not source.weights:
        log.warning("backbone %s: no pretrained weights named, so its weights are random", config.name)
    _check(config.name, model)
    return model, tokenizer, source.architecture


def digest(model: CLIP | CustomTextCLIP, architecture: Any) -> str:
    """SHA-256 over architecture, preprocessing and every weight."""
    settings = json.dumps([architecture, model.visual.preprocess_cfg], sort_keys=True, default=str)
    result = hashlib.sha256(settings.encode())
    for name, tensor in sorted(model.state_dict().items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def _source(config: BackboneConfig, repository: Repository | None, files: ExitStack) -> Source:
    path, name = Path(config.name), config.name
    if config.pretrained and (name.startswith(PREFIX) or path.is_dir()):
        raise UserError(f"backbone.pretrained: {name} brings its weights; leave pretrained out")
    if repository:
        return _hub_source(repository, files)
    if path.is_dir():
        if not (path / CONFIG_FILE).is_file() and hugging_face.is_repository(path):
            return _converted(path, hugging_face.weights_in(path), files)
        return _described(path / CONFIG_FILE, str(_weights_file(path)), tokenizer=path)
    if path.suffix == ".json":
        return _described(path, config.pretrained)
    model_config = open_clip.get_model_config(name.replace("/", "-"))
    if model_config is None:
        raise UserError(
            f"backbone.name: {name!r} is no open_clip model, hf-hub: id, folder or model JSON; {_nearest(name)}"
        )
    _refuse_coca(name, model_config)
    return Source(name, config.pretrained, model_config, model_config)


def _hub_source(repository: Repository, files: ExitStack) -> Source:
    """A repository of the hub, which open_clip or transformers wrote; where both did, open_clip's files are read."""
    folder, name = repository.folder, PREFIX + repository.name
    if (folder / CONFIG_FILE).is_file():
        weights = repository.first_of(WEIGHTS_FILES)
        source = _described(folder / CONFIG_FILE, str(weights), repository=repository)
        # Not the content, so that the digest of a hub model is what it always was; its weights are covered anyway.
        source.architecture = [name, {"quick_gelu": True}] if source.config.get("quick_gelu") else name
        return source
    if hugging_face.is_repository(folder):
        return _converted(folder, hugging_face.weights_in(folder, repository), files)
    raise UserError(
        f"backbone {name!r} cannot be loaded: Failed to download file ({CONFIG_FILE}), and there is no "
        f"{hugging_face.CONFIG_FILE} of transformers either, at commit {repository.commit}"
    )


def _converted(folder: Path, weights: list[Path], files: ExitStack) -> Source:
    """A repository of transformers. What timm must find on the disk for it lies in `files` while the model is built."""
    converted = hugging_face.describe(folder)
    built = copy.deepcopy(converted.config)
    if converted.trunk:
        place = Path(files.enter_context(tempfile.TemporaryDirectory()))
        trunk = {"architecture": hugging_face.TRUNK, "model_args": converted.trunk, "pretrained_cfg": {}}
        (place / "config.json").write_text(json.dumps(trunk))
        built["vision_cfg"]["timm_model_name"] = f"local-dir:{place}"
    name = _registered(folder / hugging_face.CONFIG_FILE, built)
    architecture, preprocessing = converted.architecture, converted.preprocessing
    return Source(name, None, converted.config, architecture, preprocessing, (converted, weights))


def _described(
    path: Path, weights: str | None, tokenizer: Path | None = None, repository: Repository | None = None
) -> Source:
    """A model that a JSON file describes, registered with open_clip under a name that does not depend on the file's place.

    Args:
        tokenizer: the folder that holds the model's own tokenizer, where it has one.
        repository: that the file is of; those that its text tower names are pinned too.
    """
    content = read_json(path)
    model_config = _model_config(path, content)
    built = copy.deepcopy(model_config)
    text = model_config["text_cfg"]
    if tokenizer and text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(tokenizer.resolve())
    _local_text(path.parent, text, built["text_cfg"])
    if repository:
        _pin_text(repository, built["text_cfg"])
    # The size is the image tower's.
    preprocessing = {key: value for key, value in content.get("preprocess_cfg", {}).items() if key != "size"}
    return Source(_registered(path, built), weights, model_config, content, preprocessing)


def _registered(path: Path, built: dict[str, Any]) -> str:
    """Register a model config with open_clip; returns its name there."""
    _refuse_coca(str(path), built)
    name = f"vipbench-{digest_json(built)[:12]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.json"
        file.write_text(json.dumps(built))
        open_clip.add_model_config(file)
    _check_size(path, name)
    return name


def _weights_file(folder: Path) -> Path:
    """The weights in a folder of the hub's layout, as open_clip chooses among several."""
    found = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth")]
    if not (folder / CONFIG_FILE).is_file() or not found:
        raise UserError(f"{folder}: no model: {CONFIG_FILE} and weights such as {WEIGHTS_FILES[0]} are expected in it")
    known = [folder / name for name in WEIGHTS_FILES if (folder / name) in found]
    return known[0] if known else min(found, key=lambda file: (file.suffix != ".safetensors", file.name))


def _local_text(folder: Path, described: dict[str, Any], built: dict[str, Any]) -> None:
    """Local paths of a text tower: in `built` they become absolute, in `described` the content that lies there.

    Paths are relative to the folder of the file that names them.
    """
    for key in TEXT_SOURCES:
        given = described.get(key)
        if isinstance(given, str) and given and (folder / given).exists():
            path = (folder / given).resolve()
            _check_text(path)
            built[key] = str(path)
            described[key] = _content(path)


def _pin_text(repository: Repository, built: dict[str, Any]) -> None:
    """Make folders of the hub ids of a text tower's config and tokenizer, each at one commit."""
    for key in TEXT_SOURCES:
        given = built.get(key)
        if isinstance(given, str) and given and not Path(given).is_dir():
            folder = repository.pin_named(given).folder
            _check_text(folder)
            built[key] = str(folder)


def _check_text(folder: Path) -> None:
    """Refuse a text tower's repository whose numbers no model has, or that needs code of its own, for which transformers asks."""
    from transformers import CONFIG_MAPPING

    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        content = mapping(file, read_json(file), "config of transformers") if file.is_file() else {}
        if name == "config.json":
            check_numbers(file, "", content)
        if "auto_map" in content and content.get("model_type") not in CONFIG_MAPPING:
            raise UserError(
                f"{file}: auto_map: code of a repository is never run, and transformers has no class of its own"
            )


def _content(path: Path) -> str:
    """Digest of a local Hugging Face config and tokenizer: their small text files alone."""
    files = [path]
    if path.is_dir():
        found = (file for file in path.iterdir() if file.suffix in TOKENIZER_SUFFIXES)
        files = [file for file in found if file.name != CONFIG_FILE and not file.name.endswith(".index.json")]
    return "sha256:" + digest_json({file.name: digest_file(file) for file in files})


def _model_config(path: Path, content: Any) -> dict[str, Any]:
    """The model config in a JSON file, which is all of it or under model_cfg. Raises UserError where it is none."""
    model_config = mapping(path, mapping(path, content).get("model_cfg", content))
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model_config]
    if missing:
        raise UserError(f"{path}: no open_clip model config: {', '.join(missing)} missing")
    for key in ("vision_cfg", "text_cfg"):
        check_numbers(path, key, mapping(path, model_config[key]))
    check_numbers(path, "embed_dim", model_config["embed_dim"])
    return model_config


def _check_size(path: Path, name: str) -> None:
    """Refuse a model that would fill the memory. To count its weights it is built without their values."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = open_clip.create_model(
            name, load_weights=False, device="meta", pretrained_image=False, pretrained_text=False
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise UserError(f"{path}: the model would have {count:,} parameters; at most {MOST_PARAMETERS:,} are expected")


def _refuse_coca(name: str, config: dict[str, Any]) -> None:
    if "multimodal_cfg" in config:
        raise UserError(
            f"backbone.name: {name!r} is a CoCa; only CLIP and CustomTextCLIP are supported, since CoCa reads its text feature "
            "at an embedding of its own behind the padding, for which prompts have no place"
        )


def _openai_weights(name: str, weights: str | None) -> dict[str, Tensor] | None:
    """Weights of a local file that OpenAI published; None where they come from elsewhere."""
    path = Path(weights or "")
    if get_pretrained_cfg(name.replace("/", "-"), weights or "") or not path.is_file() or not is_torchscript(path):
        return None
    return read_openai(path)


def _quick_gelu(config: BackboneConfig, stated: bool | None, openai: bool) -> bool:
    """Decide if a model is built with QuickGELU, x * sigmoid(1.702 x), in the place of GELU: as its weights were trained.

    open_clip's tags have a flag, and the files that OpenAI published are known by their form; for other weights the model's
    name or config decides.

    Args:
        stated: the flag in the model's config, None where it has none.
        openai: whether the weights are a file of OpenAI's.

    Raises:
        UserError: name or config contradict the weights.
    """
    name, weights = config.name.replace("/", "-"), config.pretrained or ""
    if openai and stated is False:
        raise UserError(f"{name}: quick_gelu is false, but OpenAI trained {weights} with QuickGELU; set it to true")
    plain, tag = name.removesuffix(QUICK), get_pretrained_cfg(name, weights)
    trained = True if openai else tag.get("quick_gelu")
    if (stated and trained is False) or (plain != name and not tag and get_pretrained_cfg(plain, weights)):
        raise UserError(f"backbone.name: the weights {weights!r} were trained with GELU; use name: {plain}")
    return bool(stated if trained is None else trained)


def _check(name: str, model: Any) -> None:
    """Refuse a kind of model that no tower of ours reads, weights that are not finite, and images that are not square."""
    if not isinstance(model, CLIP | CustomTextCLIP):
        raise UserError(
            f"backbone.name: {name!r} is a {type(model).__name__}; only CLIP and CustomTextCLIP are supported"
        )
    size = model.visual.preprocess_cfg["size"]
    if not isinstance(size, int) and len(set(size)) > 1:
        height, width = size
        raise UserError(f"backbone {name!r}: reads images of {height} x {width} pixels; only square ones are supported")
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise UserError(
                f"backbone {name!r}: {bad} of {tensor.numel()} weights in {key} are NaN or infinite; download its file again"
            )


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    return f"did you mean {' or '.join(close)}?" if close else "`open_clip.list_models()` lists the names"
