"""A small CLIP of transformers with random weights, and the same weights as OpenAI published theirs: a TorchScript archive."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.conftest import TEXT, VIT


def transformers_clip(activation: str = "quick_gelu") -> Any:
    """A CLIPModel of the sizes of `tests.conftest.MODELS["vit"]`; its weights are large, so that activations matter."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": TEXT["vocab_size"],
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    vision = {"image_size": VIT["image_size"], "patch_size": VIT["patch_size"]}
    config = CLIPConfig(
        text_config={**sizes, **text, "hidden_act": activation},
        vision_config={**sizes, **vision, "hidden_act": activation},
        projection_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
            elif parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def features(model: Any, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Un-normalised image and text features, by transformers."""
    images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return images, model.text_projection(model.text_model(input_ids=tokens).pooler_output)


def openai_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a CLIPModel under OpenAI's names."""
    weights: dict[str, Tensor] = {}
    given = model.state_dict()

    def block(source: str, target: str) -> None:
        for kind in ("weight", "bias"):
            parts = [given[f"{source}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            weights[f"{target}.attn.in_proj_{kind}"] = torch.cat(parts)
            pairs = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
            for theirs, ours in (pairs | {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}).items():
                weights[f"{target}.{ours}.{kind}"] = given[f"{source}.{theirs}.{kind}"]

    for layer in range(2):
        block(f"vision_model.encoder.layers.{layer}", f"visual.transformer.resblocks.{layer}")
        block(f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}")
    for kind in ("weight", "bias"):
        weights[f"visual.ln_pre.{kind}"] = given[f"vision_model.pre_layrnorm.{kind}"]
        weights[f"visual.ln_post.{kind}"] = given[f"vision_model.post_layernorm.{kind}"]
        weights[f"ln_final.{kind}"] = given[f"text_model.final_layer_norm.{kind}"]
    weights["visual.class_embedding"] = given["vision_model.embeddings.class_embedding"]
    weights["visual.conv1.weight"] = given["vision_model.embeddings.patch_embedding.weight"]
    weights["visual.positional_embedding"] = given["vision_model.embeddings.position_embedding.weight"]
    weights["visual.proj"] = given["visual_projection.weight"].T
    weights["token_embedding.weight"] = given["text_model.embeddings.token_embedding.weight"]
    weights["positional_embedding"] = given["text_model.embeddings.position_embedding.weight"]
    weights["text_projection"] = given["text_projection.weight"].T
    weights["logit_scale"] = given["logit_scale"]
    return {name: value.clone().contiguous() for name, value in weights.items()}


def write_archive(weights: Mapping[str, Tensor], path: Path, openai: bool = True) -> Path:
    """Write weights as a real TorchScript archive of nested modules.

    As in OpenAI's the model has numbers about itself as buffers (unless not `openai`), and the blocks of its text tower have
    their causal mask.
    """
    root = _Module()
    for name, value in weights.items():
        module: Any = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, _Module())
            module = getattr(module, parent)
        module.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
    for block in root.transformer.resblocks.children():  # type: ignore[union-attr]
        block.attn_mask = torch.full((77, 77), -torch.inf).triu(1)
        block.sizes = [1, 2]
    for name, number in {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}.items():
        if openai:
            root.register_buffer(name, torch.tensor(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch means to give TorchScript up; files of it stay
        torch.jit.trace(root, torch.ones(1)).save(str(path))
    return path


class _Module(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x
