"""A backbone: a frozen CLIP-like model seen as an image tower and a text tower that accepts embeddings.

harness/models/open_clip.py builds and loads the open_clip model; the text side is harness/models/text_tower.py. Sizes: d is the
joint embedding size, w the text tower's width; they differ in several models.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vipbench.harness.config.schema import BackboneConfig
from vipbench.harness.errors import UserError
from vipbench.harness.models.hub import PREFIX, pin
from vipbench.harness.models.open_clip import create, digest
from vipbench.harness.models.open_clip_internals import (
    CLIP,
    AttentionPool2d,
    CustomTextCLIP,
    PreprocessCfg,
    image_transform_v2,
)
from vipbench.harness.models.text_tower import TextTower, text_tower
from vipbench.harness.models.tower_view import ImageTowerView

log = logging.getLogger(__name__)


class Backbone(nn.Module):
    """A frozen CLIP-like model.

    Attributes:
        image: the image tower, pixels [B, 3, H, W] -> un-normalised features [B, d].
        text: the text tower.
        logit_scale: float32 scalar tensor, already exponentiated.
        logit_bias: float32 scalar tensor that SigLIP adds to every logit, 0 elsewhere; a softmax over classes, and so every
            method here, is the same without it.
        dim: d. image_size: pixels per side. mean, std: of the three channels.
        eval_transform: the model's own preprocessing, PIL image -> float32 [3, H, W].
        preprocessing: the settings of that.
        digest: SHA-256 over architecture, preprocessing and every weight.
        source: repository, revision and commit of a hub model; empty elsewhere.
    """

    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        tokenizer: Any,
        architecture: Any,
        source: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.digest, self.source = digest(model, architecture), source or {}
        self.image = model.visual
        self.text = text_tower(model, tokenizer)
        self.register_buffer("logit_scale", model.logit_scale.detach().exp().float().reshape(()))
        bias = torch.zeros(()) if model.logit_bias is None else model.logit_bias.detach().float().reshape(())
        self.register_buffer("logit_bias", bias, persistent=False)
        preprocess = self.preprocessing = PreprocessCfg(**model.visual.preprocess_cfg)
        size = preprocess.size if isinstance(preprocess.size, int) else preprocess.size[0]
        self.image_size, self.mean, self.std = size, tuple(preprocess.mean), tuple(preprocess.std)
        self.eval_transform = image_transform_v2(preprocess, is_train=False)
        self.eval_transform(Image.new("RGB", (size, size)))  # settings that cannot be used are found now
        self.requires_grad_(False)
        self.eval()
        with torch.no_grad():
            self.dim = self.text.encode_texts(["a"]).shape[-1]

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: a frozen tower keeps its batch statistics and has no dropout."""
        return super().train(False) if self.training else self  # hundreds of modules, in each step of a training

    @property
    def pixels_shape(self) -> tuple[int, int, int]:
        return (3, self.image_size, self.image_size)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """L2-normalised image features: [B, 3, H, W] -> [B, d] float32."""
        return F.normalize(self.image(pixels).float(), dim=-1)

    def encode_with_norms(self, pixels: Tensor) -> Tensor:
        """L2-normalised image features, and the norm that they had, last: [B, 3, H, W] -> [B, d + 1] float32."""
        features = self.image(pixels).float()
        return torch.cat([F.normalize(features, dim=-1), features.norm(dim=-1, keepdim=True)], dim=-1)


# Modules whose weights are read without calling the modules that hold them, so that an engine which shards weights must gather
# such a module as one. The same holds under activation checkpointing.
READ_IN_PIECES = (TextTower, ImageTowerView, nn.MultiheadAttention, AttentionPool2d)


def load_backbone(config: BackboneConfig, device: str | torch.device = "cpu") -> Backbone:
    """Build a backbone and load its weights.

    `config.name` is an open_clip name ("ViT-B-16"; `pretrained` is a tag or a checkpoint file, OpenAI's own .pt files among
    them), an "hf-hub:" id, "@revision" behind it or not, a folder in the hub's layout (of open_clip, or of transformers' CLIP
    and SigLIP), or a model JSON of one's own (`pretrained` is its weights file). Without `pretrained` a named or JSON model
    gets random weights, the same ones each time. Whether it has QuickGELU follows from the tag, or OpenAI's file; otherwise
    from its name or config. Files are read as safetensors, with torch's weights-only reader, or by
    harness/models/openai_file.py; nothing is unpickled.

    Raises:
        UserError: no such model, tag or file, or one that is damaged, does not fit, or is of a kind that is not supported.
    """
    try:
        repository = pin(config.name) if config.name.startswith(PREFIX) and not config.pretrained else None
        backbone = Backbone(*create(config, repository), repository.source if repository else None)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # open_clip and what it calls have no common kind of error for files that they cannot use
        log.debug("backbone", exc_info=True)
        reason = " ".join(str(error).split())[:400]
        kind = "" if isinstance(error, RuntimeError | OSError) else f"{type(error).__name__}: "
        what = f"{config.name!r} (pretrained {config.pretrained!r})"
        raise UserError(f"backbone {what} cannot be loaded: {kind}{reason}") from error
    return backbone.to(device)


def backbone_digest(config: BackboneConfig) -> str:
    """The digest of the backbone that a config names (loads it)."""
    return load_backbone(config).digest
