"""The parts of open_clip that are not its documented interface, imported here and nowhere else.

Towers are read from the inside (token embeddings, blocks, pooling), which open_clip does not promise to keep: pyproject.toml
pins it below 4, and tests/models/test_open_clip_internals.py names what a new version changed and which file reads it.
"""

from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.pretrained import get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer, canonicalize_text
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import (
    ResidualAttentionBlock,
    TextTransformer,
    VisionTransformer,
)

__all__ = [
    "CLIP",
    "AttentionPool2d",
    "CustomTextCLIP",
    "HFTextEncoder",
    "HFTokenizer",
    "ModifiedResNet",
    "PreprocessCfg",
    "ResidualAttentionBlock",
    "TextTransformer",
    "TimmModel",
    "VisionTransformer",
    "canonicalize_text",
    "convert_to_custom_text_state_dict",
    "get_pretrained_cfg",
    "image_transform_v2",
]
