"""ViP: visual symptom-guided prompt learning, the method this project is named after.

Paper: "Aligning Medical Images with General Knowledge from Large Language Models", MICCAI 2024, arXiv 2409.00341.
Protocol: 4 context vectors N(0, 0.02); SGD, rate and batch size by backbone; 50 epochs on all training images, the best by
validation accuracy is kept. With a number of shots, which the paper does not have, 200 epochs, of which the last is kept.
Command: `python harness/run.py CONFIG.yaml method=vip symptoms=symptoms_cache/derm7pt/clinical.json`
Expected figure: none is quoted here; the paper's tables were not at hand when this was written.

    prompt of a symptom:   [SOS] v_1 .. v_M <symptom> "." [EOS]                       context prompt v (shared or per class)
    features of a class:   V [S, d], un-normalised text features of its S symptoms
    merge prompt:          g_c = t_c + softmax(Wq t_c (Wk V)^T / sqrt(d)) V             then L2-normalised
    logits:                exp(logit_scale) * <image feature, g_c>
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vipbench.harness.config.schema import ContextLength, MethodConfig
from vipbench.harness.methods.base import Task, TextClassifier, symptom_names
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import without_full_stop
from vipbench.harness.models.prompts import PromptBatch, context_prompt, context_vectors

FIXED_CONTEXT = "a photo of a"
QUERY_STD = 0.02
# Learning rate and batch size of the paper, by backbone (with or without -quickgelu, OpenAI's weights have it anyhow); ViT-B-16's
# where the backbone is another.
PAPER_RATES = {"ViT-B-16": (0.002, 32), "ViT-L-14-336": (0.002, 16), "RN50x64": (0.001, 8)}
# The paper trains on whole datasets. A few-shot epoch is one step or two, and its few validation images tell epochs apart by
# chance: docs/few_shot.md has the measurements behind this default of ours.
FULL: dict[str, Any] = {"epochs": 50, "select": "best"}
FEW_SHOT: dict[str, Any] = {"epochs": 200, "select": "last"}


class ViPConfig(MethodConfig):
    """Options of ViP; `context: fixed` and `merge: mean` are the ablations of its two prompts."""

    context: Literal["learned", "fixed"] = "learned"
    context_length: ContextLength | None = None  # 4 by default; a fixed context has the tokens of its words
    class_specific_context: bool = False
    position: Literal["end", "middle", "front"] = "end"  # of the symptom among the context vectors
    merge: Literal["attention", "mean"] = "attention"

    @model_validator(mode="after")
    def _settle_options(self) -> "ViPConfig":
        fixed = f"the context is fixed to {FIXED_CONTEXT!r}"
        self.settle("context_length", self.context == "learned", 4, fixed)
        if self.context == "fixed" and self.class_specific_context:
            raise ValueError(f"class_specific_context has no effect, since {fixed}; leave it out")
        if self.context == "fixed" and self.merge == "mean":
            raise ValueError(
                "fixed context and mean merge leave nothing to train; use method zero_shot with text: symptoms"
            )
        return self


class MergePrompt(nn.Module):
    """Attention that merges the symptom features of each class into one feature, guided by a learned query per class.

    Wq and Wk are d x d (the published code sizes them by the text width, which fits only where that equals d).
    """

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(classes, dim) * QUERY_STD)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False)
        nn.init.xavier_normal_(self.to_query.weight)
        nn.init.xavier_normal_(self.to_key.weight)

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """Merge [C, S, d] features, of which [C, S] bool `present` says which exist, into [C, d] (un-normalised)."""
        query, key = self.to_query(self.queries), self.to_key(features)
        scores = torch.einsum("cd,csd->cs", query, key) / math.sqrt(features.shape[-1])
        weights = scores.masked_fill(~present, -torch.inf).softmax(dim=-1)
        return self.queries + torch.einsum("cs,csd->cd", weights, features)


@register("vip")
class ViP(TextClassifier):
    """Context prompt and merge prompt over the symptoms of each class."""

    Config = ViPConfig
    learns_prompts = True
    row_class: Tensor  # [P] int64, the class of each symptom
    place: Tensor  # [C, S] int64, which of the P symptoms stands where; padded with 0
    present: Tensor  # [C, S] bool

    def __init__(self, config: ViPConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        assert task.symptoms is not None
        tower, counts = backbone.text, [len(texts) for texts in task.symptoms]
        copies = len(task.classes) if config.class_specific_context else 1
        words = FIXED_CONTEXT if config.context == "fixed" else None
        self.context = context_vectors(tower, words, config.context_length, copies)
        self.context.requires_grad_(config.context == "learned")
        texts = [without_full_stop(text) for texts in task.symptoms for text in texts]
        prompts = [context_prompt(tower, text, self.context.shape[1], config.position) for text in texts]
        self.prompts = PromptBatch(tower, prompts, symptom_names(task.classes, task.symptoms))
        self.merge = MergePrompt(len(task.classes), backbone.dim) if config.merge == "attention" else None
        rows = torch.arange(len(texts)).split(counts)
        place = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("present", torch.arange(place.shape[1]) < torch.tensor(counts)[:, None], persistent=False)
        self.register_buffer(
            "row_class", torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), persistent=False
        )

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        lr, batch_size = PAPER_RATES.get(backbone.replace("/", "-").removesuffix("-quickgelu"), PAPER_RATES["ViT-B-16"])
        return {"lr": lr, "batch_size": batch_size, **(FULL if shots == "all" else FEW_SHOT)}

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return True

    @property
    def per_class(self) -> bool:
        return self.merge is not None or self.config.class_specific_context

    def class_features(self) -> Tensor:
        context = self.context[self.row_class] if self.config.class_specific_context else self.context
        features = self.backbone.text(self.prompts.fill(context))[self.place]
        if self.merge is not None:
            merged = self.merge(features, self.present)
        else:
            merged = (features * self.present[..., None]).sum(1) / self.present.sum(1, keepdim=True)
        return F.normalize(merged.float(), dim=-1)
