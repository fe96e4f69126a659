"""Convert `CLIPModel` and `SiglipModel` repositories of transformers to open_clip's modules.

A repository is a folder with config.json, weights, preprocessor_config.json and a tokenizer. Nothing of it is run: the config is
read as data, weights as safetensors (or with torch's weights-only reader), and the model is open_clip's own, with the same
numbers. Query, key and value projections are joined; SigLIP's image tower becomes timm's vision transformer with its
attention-pool head, as open_clip has it for SigLIP.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipbench.harness.errors import UserError, shortened
from vipbench.harness.models.hub import Repository
from vipbench.harness.models.limits import check_numbers, mapping
from vipbench.harness.models.processor import (
    ARGMAX_EOS,
    RepositoryTokenizer,
    check_tokenizer,
    digest_tokenizer,
    read_preprocessing,
)
from vipbench.harness.system.files import read_json

CONFIG_FILE = "config.json"
FAMILIES = ("clip", "siglip")  # model_type of the configs; SigLIP 2 of fixed resolution has SigLIP's
WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
TRUNK = "vit_base_patch16_siglip_224"  # timm's vision transformer with an attention-pool head; its sizes are replaced
# By `hidden_act`: open_clip's settings of a text or image tower, and timm's name.
ACTIVATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "quick_gelu": ({}, "quick_gelu"),
    "gelu": ({}, "gelu"),
    "gelu_pytorch_tanh": ({"act_kwargs": {"approximate": "tanh"}}, "gelu_tanh"),
}

# Names of weights, rewritten by these patterns one after the other.
CLIP_NAMES = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
)
SIGLIP_NAMES = (
    (r"^text_model\.embeddings\.token_embedding\.", "text.token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "text.positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "text.transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "text.ln_final."),
    (r"^text_model\.head\.", "text.text_projection."),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.trunk.pos_embed"),
    (r"^vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.head\.probe$", "visual.trunk.attn_pool.latent"),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
)
BLOCK_NAMES = (
    (r"(\.resblocks\.\d+)\.self_attn\.qkv\.", r"\1.attn.in_proj_"),
    (r"(\.resblocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.out_proj."),
    (r"(\.resblocks\.\d+)\.layer_norm([12])\.", r"\1.ln_\2."),
    (r"(\.resblocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(\.resblocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"(\.blocks\.\d+)\.self_attn\.qkv\.", r"\1.attn.qkv."),
    (r"(\.blocks\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
    (r"(\.blocks\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
)
TRANSPOSED = ("text_projection", "visual.proj")  # CLIP's projections; open_clip multiplies from the other side
POOLED_QUERY = "vision_model.head.attention.in_proj_"


@dataclass
class Converted:
    """A repository in open_clip's terms.

    Attributes:
        config: open_clip's model config; for SigLIP without the image tower's timm model, which `trunk` describes.
        trunk: timm's arguments of SigLIP's image tower; None for CLIP.
        image_eps: epsilon of the layer norms in that trunk.
        preprocessing: fields of open_clip's PreprocessCfg.
        tokenizer: the repository's own.
        tokenizer_digest: of the content of its files.
    """

    config: dict[str, Any]
    trunk: dict[str, Any] | None
    image_eps: float
    preprocessing: dict[str, Any]
    tokenizer: RepositoryTokenizer
    tokenizer_digest: str

    @property
    def architecture(self) -> dict[str, Any]:
        """The facts that the backbone's digest covers beside weights and preprocessing, without a path."""
        return {
            "model_cfg": self.config,
            "trunk": self.trunk,
            "image_eps": self.image_eps,
            "tokenizer": self.tokenizer_digest,
        }

    def load(self, model: Any, files: Iterable[Path]) -> None:
        """Load converted weights into the open_clip model that was built from `config`; every one must fit.

        Raises:
            RuntimeError: a weight is missing, is of another shape or has no place in the model.
        """
        if self.trunk:
            for module in model.visual.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = self.image_eps
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= _read(file)
        model.load_state_dict(convert(weights, SIGLIP_NAMES if self.trunk else CLIP_NAMES))


def is_repository(folder: Path) -> bool:
    """Return True for a folder with a config of transformers that names its model type."""
    file = folder / CONFIG_FILE
    content = read_json(file) if file.is_file() else None
    return isinstance(content, dict) and "model_type" in content


def describe(folder: Path) -> Converted:
    """Read a repository's config, preprocessing and tokenizer.

    Raises:
        UserError: it is of another family, has a part that open_clip's modules lack, or lacks a file.
    """
    file = folder / CONFIG_FILE
    content = mapping(file, read_json(file), "config of transformers")
    family = content.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type is {shortened(family)}; only {' and '.join(FAMILIES)} can be converted")
    check_numbers(file, "config", content)
    config, trunk, eps = _clip(file, content) if family == "clip" else _siglip(file, content)
    text = config["text_cfg"]
    tokenizer = RepositoryTokenizer(folder, family, text["context_length"])
    check_tokenizer(folder, tokenizer, text)
    preprocessing = read_preprocessing(folder, config["vision_cfg"]["image_size"])
    return Converted(config, trunk, eps, preprocessing, tokenizer, digest_tokenizer(folder))


def weights_in(folder: Path, repository: Repository | None = None) -> list[Path]:
    """The files that hold a repository's weights: all parts that an index names, or the one file.

    Args:
        repository: where they are fetched from; None for a folder that is no snapshot of the hub's.

    Raises:
        UserError: there are none.
    """
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        parts = mapping(index, mapping(index, read_json(index), "index").get("weight_map"), "index of weights")
        names = sorted({str(name) for name in parts.values()})
        if strange := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: {shortened(strange[0])} is no name of a file beside it")
        return [repository.first_of([name]) for name in names] if repository else [folder / name for name in names]
    if repository:
        return [repository.first_of(WEIGHTS_FILES)]
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: no weights: one of {', '.join(WEIGHTS_FILES)} is expected beside {CONFIG_FILE}")


def convert(weights: Mapping[str, Tensor], names: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Weights of transformers under the names and in the shapes of open_clip's modules."""
    joined = _joined({name: value for name, value in weights.items() if not name.endswith("position_ids")})
    converted = {}
    for name, value in joined.items():
        for pattern, replacement in (*names, *BLOCK_NAMES):
            name = re.sub(pattern, replacement, name)
        if name in TRANSPOSED:
            value = value.T
        elif name in ("logit_scale", "logit_bias"):
            value = value.reshape(())
        elif name == "visual.trunk.pos_embed":
            value = value[None]
        converted[name] = value
    return converted


def _joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value projections as one tensor each; those of SigLIP's pooling head as a query and a key-value one."""
    result: dict[str, Tensor] = {}
    for name, value in weights.items():
        if match := re.search(r"\.self_attn\.([qkv])_proj\.(weight|bias)$", name):
            front, part, kind = name[: match.start()], *match.groups()
            if part != "q":  # joined where the query is met
                continue
            parts = [weights[key] for letter in "qkv" if (key := f"{front}.self_attn.{letter}_proj.{kind}") in weights]
            result[f"{front}.self_attn.qkv.{kind}"] = torch.cat(parts)
        elif name.startswith(POOLED_QUERY):
            width, kind = len(value) // 3, name.removeprefix(POOLED_QUERY)
            result[f"visual.trunk.attn_pool.q.{kind}"] = value[:width]
            result[f"visual.trunk.attn_pool.kv.{kind}"] = value[width:]
        else:
            result[name] = value
    return result


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    weights = torch.load(file, map_location="cpu", weights_only=True)
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def _clip(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], None, float]:
    from transformers import CLIPConfig

    config: Any = CLIPConfig.from_dict(content)
    text, image = config.text_config, config.vision_config
    if not isinstance(text.eos_token_id, int):
        raise UserError(
            f"{file}: text_config.eos_token_id: one number is expected; found {shortened(text.eos_token_id)}"
        )
    eot = "argmax" if text.eos_token_id == ARGMAX_EOS else "eos"
    model = {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {
            **_tower(file, image),
            **_image(file, image),
            "head_width": image.hidden_size // image.num_attention_heads,
        },
        "text_cfg": {**_tower(file, text), **_text(text), "pool_type": eot, "eos_id": text.eos_token_id},
    }
    if (text.hidden_act == "quick_gelu") != (image.hidden_act == "quick_gelu"):
        acts = f"{shortened(text.hidden_act)} and {shortened(image.hidden_act)}"
        raise UserError(f"{file}: hidden_act of the text and the image tower are {acts}; open_clip has one for both")
    return model, None, image.layer_norm_eps


def _siglip(file: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], float]:
    from transformers import SiglipConfig

    kind = "config of transformers"
    # Nothing here reads these two, whose defaults (CLIP's) lie outside SigLIP's vocabulary and would be warned about.
    unused = {"bos_token_id": None, "eos_token_id": None}
    config: Any = SiglipConfig.from_dict(
        content | {"text_config": unused | mapping(file, content.get("text_config", {}), kind)}
    )
    text, image = config.text_config, config.vision_config
    if not image.vision_use_head:
        raise UserError(
            f"{file}: vision_config.vision_use_head is false; a SigLIP without its pooling head has no features"
        )
    if text.projection_size != image.hidden_size:
        raise UserError(
            f"{file}: text features have {text.projection_size} numbers, image features {image.hidden_size}; they must be equal"
        )
    size, tower = _image(file, image), _tower(file, image)
    trunk = {
        "img_size": size["image_size"],
        "patch_size": size["patch_size"],
        "embed_dim": tower["width"],
        "depth": tower["layers"],
        "num_heads": image.num_attention_heads,
        "mlp_ratio": tower["mlp_ratio"],
        "act_layer": ACTIVATIONS[image.hidden_act][1],
    }
    model = {
        "embed_dim": text.projection_size,
        "quick_gelu": text.hidden_act == "quick_gelu",  # of the text tower; timm's trunk has its own
        "custom_text": True,
        "init_logit_bias": 0.0,
        "vision_cfg": {"image_size": size["image_size"], "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **_tower(file, text),
            **_text(text),
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
        },
    }
    return model, trunk, image.layer_norm_eps


def _tower(file: Path, config: Any) -> dict[str, Any]:
    """Settings that open_clip's text and image transformers share."""
    if config.hidden_act not in ACTIVATIONS:
        act = shortened(config.hidden_act)
        raise UserError(f"{file}: hidden_act {act} is not known; only {', '.join(ACTIVATIONS)} can be converted")
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        # Half a unit more than the true ratio, since open_clip and timm round width times ratio down.
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        "norm_kwargs": {"eps": config.layer_norm_eps},
        **ACTIVATIONS[config.hidden_act][0],
    }


def _image(file: Path, config: Any) -> dict[str, Any]:
    """Settings of an image tower's input. Raises UserError for images or patches that are not square, and other channels."""
    if config.num_channels != 3 or not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
        raise UserError(f"{file}: vision_config: square images and patches of 3 channels are expected")
    return {"image_size": config.image_size, "patch_size": config.patch_size}


def _text(config: Any) -> dict[str, Any]:
    return {
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "heads": config.num_attention_heads,
    }
