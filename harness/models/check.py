"""Describe a loaded backbone, with the features of a drawn image and a text, and compare it with what is known of its family."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.known import Expected, expected_of
from vipbench.harness.system.devices import to_device

TEXT = "a photo of a melanoma"
# By the names of modules in open_clip, timm and transformers; torch's GELU has its approximation as an attribute.
ACTIVATIONS = {
    "QuickGELU": "QuickGELU",
    "QuickGELUActivation": "QuickGELU",
    "GELU": "GELU",
    "GELUActivation": "GELU",
    "GELUTanh": "tanh GELU",
    "NewGELUActivation": "tanh GELU",
    "ReLU": "ReLU",
}


def activations(tower: nn.Module) -> list[str]:
    """Names of a tower's activation functions, sorted."""
    found = set()
    for module in tower.modules():
        name = ACTIVATIONS.get(type(module).__name__)
        if name:
            found.add("tanh GELU" if getattr(module, "approximate", "none") == "tanh" else name)
    return sorted(found)


def drawn_image() -> Image.Image:
    """A brown disc on skin colour, 256 x 192 pixels, from whole numbers alone, so that it is the same everywhere."""
    y, x = np.mgrid[:192, :256]
    inside = ((x - 120) ** 2 + (y - 100) ** 2 < 60**2)[..., None]
    skin = np.stack([225 - x // 16, 180 - y // 16, 160 + (x + y) // 32], axis=-1)
    return Image.fromarray(np.where(inside, [96, 60, 40], skin).astype(np.uint8))


def describe(config: BackboneConfig, backbone: Backbone) -> dict[str, str]:
    """Facts of a backbone by their label, and the known answers: norms and first values of an image's and a text's feature."""
    family, _ = expected_of(config, backbone)
    text, preprocessing = backbone.text, backbone.preprocessing
    how = {
        "shortest": "shortest side to {0}, centre crop {0} x {0}",
        "squash": "to {0} x {0}",
        "longest": "longest side to {0}",
    }
    resize = how[preprocessing.resize_mode].format(backbone.image_size)
    with torch.inference_mode():
        pixels = to_device(backbone.eval_transform(drawn_image())[None], backbone.logit_scale.device)
        image = backbone.image(pixels)[0].float()
        words = text.encode_texts([TEXT])[0]
    cosine = float(nn.functional.cosine_similarity(image, words, dim=0))
    inner = getattr(text.tokenizer, "tokenizer", text.tokenizer)
    source = backbone.source
    return {
        "backbone": config.name + (f", pretrained {config.pretrained}" if config.pretrained else ""),
        "revision": f"{source['revision']}, commit {source['commit']}" if source else "none: not from the hub",
        "family": family or "not known",
        "image tower": f"{type(backbone.image).__name__}, {backbone.image_size} x {backbone.image_size} pixels",
        "text tower": f"{type(text).__name__}, {text.layers} layers of width {text.width}, {text.context_length} tokens",
        "joint size": str(backbone.dim),
        "activation": f"image {_joined(activations(backbone.image))}; text {_joined(activations(text))}",
        "preprocessing": f"resize {resize} ({preprocessing.interpolation}), mean {_list(backbone.mean)}, "
        f"std {_list(backbone.std)}",
        "tokenizer": f"{type(inner).__name__} of {inner.vocab_size} tokens, "
        f"start {text.start}, end {text.end}, padding {text.pad}"
        + (" up to the context length" if text.pads_to_context_length else ""),
        "logits": f"scale {float(backbone.logit_scale):.4f}, bias {float(backbone.logit_bias):.4f}",
        "digest": backbone.digest,
        "drawn image": _feature(image),
        f'"{TEXT}"': _feature(words),
        "cosine": f"{cosine:.4f}",
    }


def warnings(config: BackboneConfig, backbone: Backbone) -> list[str]:
    """Values of a backbone that differ from those known of its family."""
    family, expected = expected_of(config, backbone)
    found = []
    for tower, module in (("image", backbone.image), ("text", backbone.text)):
        wrong = [
            name for name in activations(module) if "GELU" in name and name not in (expected.activation or (name,))
        ]
        if wrong:
            found.append(f"{tower} tower: {_joined(wrong)}, but {_joined(expected.activation)} is known of {family}")
    for name in ("mean", "std"):
        known, has = getattr(expected, name), getattr(backbone, name)
        if known and not np.allclose(known, has, atol=1e-4):
            found.append(f"{name}: {_list(has)}, but {_list(known)} is known of {family}")
    sizes = {"image_size": backbone.image_size, "context_length": backbone.text.context_length}
    for name, size in sizes.items():
        allowed = getattr(expected, name)
        if allowed and size not in allowed:
            found.append(f"{name}: {size}, but {_joined(map(str, allowed))} is known of {family}")
    if expected == Expected():
        found.append("nothing is known of this backbone's family, so nothing was compared")
    return found


def _joined(names: Any) -> str:
    return " or ".join(names) or "none"


def _list(values: Iterable[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"


def _feature(feature: Tensor) -> str:
    unit = nn.functional.normalize(feature, dim=0)
    return (
        f"norm {float(feature.norm()):.4f}, normalised {', '.join(f'{value:+.4f}' for value in unit[:4].tolist())} ..."
    )
