"""A repository's processor, in transformers' term: its tokenizer, and the preprocessing of images."""

from pathlib import Path
from typing import Any

from vipbench.harness.errors import UserError, shortened
from vipbench.harness.models.limits import check_numbers, mapping
from vipbench.harness.models.open_clip_internals import HFTokenizer, canonicalize_text
from vipbench.harness.system.files import digest_file, digest_json, read_json

PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
ARGMAX_EOS = 2  # eos_token_id of old CLIP configs: transformers reads the feature at a text's highest token then


class RepositoryTokenizer(HFTokenizer):
    """The tokenizer of a repository, called as open_clip's are: texts -> [P, L] int64, padded on the right.

    SigLIP and SigLIP 2 were trained on lower-case texts, SigLIP without punctuation (arXiv 2303.15343, 2502.14786);
    transformers does so only in its slow tokenizer or leaves it to the caller, so it is done here.
    """

    def __init__(self, folder: Path, family: str, context_length: int) -> None:
        self.tokenizer = _load_tokenizer(folder)
        self.tokenizer.padding_side = "right"
        self.context_length, self.strip_sep_token, self.tokenizer_mode = context_length, False, ""
        kind = _tokenizer_settings(folder).get("tokenizer_class", "")
        plain = family == "siglip" and str(kind).startswith("SiglipTokenizer")
        self.clean_fn = canonicalize_text if plain else str.lower if family == "siglip" else str


def digest_tokenizer(folder: Path) -> str:
    """Digest of the content of a repository's tokenizer files."""
    files = {name: digest_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    return "sha256:" + digest_json(files)


def read_preprocessing(folder: Path, image_size: int) -> dict[str, Any]:
    """Resizing, cropping, mean and standard deviation as fields of open_clip's PreprocessCfg.

    Raises:
        UserError: there is no such file, or it has a step that PreprocessCfg lacks.
    """
    file = next((folder / name for name in PREPROCESSOR_FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: how images are prepared is not known: {PREPROCESSOR_FILES[0]} is missing")
    content = mapping(file, read_json(file), "preprocessor config")
    content = mapping(file, content.get("image_processor", content), "preprocessor config")
    check_numbers(file, "preprocessor", content)

    def refuse(what: str, expected: str) -> UserError:
        return UserError(f"{file}: {what}; {expected} is expected")

    size = content.get("size", image_size)
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = (size.get("height"), size.get("width")) if isinstance(size, dict) else (None, None)
    crop = content.get("crop_size", image_size) if content.get("do_center_crop") else image_size
    crops = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
    if not content.get("do_resize", True) or (shortest != image_size and sides != (image_size, image_size)):
        raise refuse(f"images are resized to {shortened(size)}", f"the model's {image_size} pixels")
    if crops != (image_size, image_size):
        raise refuse(f"images are cropped to {shortened(crop)}", f"the model's {image_size} pixels")
    if abs(content.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9 or not content.get("do_rescale", True):
        raise refuse("values are not rescaled by 1/255", "rescaling to [0, 1]")
    if (resample := content.get("resample", 3)) not in RESAMPLING:
        raise refuse(f"resample is {shortened(resample)}", "2 (bilinear) or 3 (bicubic)")
    normalized = content.get("do_normalize", True)
    if normalized and not (content.get("image_mean") and content.get("image_std")):
        raise refuse("image_mean or image_std is missing", "one number per channel")
    return {
        "mean": content["image_mean"] if normalized else [0.0] * 3,
        "std": content["image_std"] if normalized else [1.0] * 3,
        "interpolation": RESAMPLING[resample],
        "resize_mode": "shortest" if shortest == image_size else "squash",
    }


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return mapping(file, read_json(file), "tokenizer config") if file.is_file() else {}


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer that a repository's tokenizer.json describes; without one, the class that transformers has for it."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    ):
        raise UserError(f"{folder}: no tokenizer: tokenizer.json is expected beside config.json")
    if (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def check_tokenizer(folder: Path, tokenizer: RepositoryTokenizer, text: dict[str, Any]) -> None:
    """Refuse a tokenizer whose tokens or end token are not the model's."""
    tokens = tokenizer.tokenizer.get_vocab().values()
    if max(tokens) >= text["vocab_size"]:
        raise UserError(
            f"{folder}: the tokenizer has tokens up to {max(tokens)}, the text tower only {text['vocab_size']} tokens"
        )
    if tokenizer.tokenizer.pad_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no padding token; tokenizer_config.json should name a pad_token")
    if text["pool_type"] == "last":
        if _tokenizer_settings(folder).get("padding_side") == "left":
            raise UserError(
                f"{folder}: the tokenizer pads on the left, but SigLIP was trained with padding on the right"
            )
        return
    end = tokenizer.tokenizer("a").input_ids[-1]
    if text["pool_type"] == "eos" and end != text["eos_id"]:
        raise UserError(
            f"{folder}: texts end with token {end}, but features are read at eos_token_id {text['eos_id']} (config.json)"
        )
    if text["pool_type"] == "argmax" and end != max(tokens):
        raise UserError(
            f"{folder}: under eos_token_id {ARGMAX_EOS} features are read at a text's highest token, but the end token {end} "
            f"is not the highest ({max(tokens)}); set text_config.eos_token_id to {end}"
        )
