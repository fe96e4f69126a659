"""Image towers of timm with the weights that timm offers for them, such as ImageNet's, or a file of one's own."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.models.backbone import Backbone

log = logging.getLogger(__name__)


class TimmTower(nn.Module):
    """A model of timm without its classifier, which takes the pixels of a backbone: they are normalised again, as it expects.

    The image size and what is cropped stay the backbone's.

    Args:
        name: of timm, with the tag of its weights where there is no file ("resnet50.a1_in1k").
        weights: a file of the whole model, its classifier included, as timm publishes them; safetensors, or read weights-only.

    Attributes:
        dim: size of a feature.

    Raises:
        UserError: no such model or tag, weights that cannot be had or do not fit, or a model for another image size.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str, weights: Path | None, backbone: Backbone) -> None:
        super().__init__()
        model = _load(name, weights)
        own_mean, own_std, mean, std = (
            torch.tensor(values, device="cpu")
            for values in (backbone.mean, backbone.std, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        )
        self.register_buffer("scale", (own_std / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((own_mean - mean) / std)[:, None, None], persistent=False)
        self.model = model.requires_grad_(False).eval()
        size = backbone.image_size
        try:
            with torch.no_grad():
                self.dim = self(torch.zeros(1, *backbone.pixels_shape, device="cpu")).shape[1]
        except (AssertionError, RuntimeError) as error:
            sizes = model.pretrained_cfg["input_size"][1:]
            raise UserError(
                f"method.tower: {name} takes images of {sizes[0]} x {sizes[1]} pixels, but those of the backbone have "
                f"{size} x {size}; choose a tower or a backbone of the other's size"
            ) from error

    def forward(self, pixels: Tensor) -> Tensor:
        """Features [B, dim] of a backbone's pixels [B, 3, H, W]."""
        return self.model(pixels * self.scale + self.shift)


def _load(name: str, weights: Path | None) -> Any:
    """A model without classifier. It is loaded as a whole first, since timm passes over missing weights otherwise."""
    offered = timm.list_pretrained()
    if weights is None and name not in offered:
        raise UserError(
            f"method.tower: timm offers no weights {name!r}, and method.weights names no file; {did_you_mean(name, offered)}"
        )
    if not timm.is_model(name):
        raise UserError(f"method.tower: timm has no model {name!r}; {did_you_mean(name, timm.list_models())}")
    try:
        overlay = {"file": str(weights)} if weights else None
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        model.reset_classifier(0)
    except Exception as error:  # timm, the hub's client and torch have no common kind of error for files
        log.debug("timm", exc_info=True)
        reason, source = " ".join(str(error).split())[:300], f"method.weights: {weights}" if weights else "method.tower"
        raise UserError(f"{source}: {name} cannot be loaded: {type(error).__name__}: {reason}") from error
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"method.tower: the weights of {name} are not finite ({key})")
    return model
