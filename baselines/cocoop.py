"""CoCoOp: context vectors that shift with the image.

Paper: "Conditional Prompt Learning for Vision-Language Models", CVPR 2022, arXiv 2203.05557.
Protocol: 4 vectors from "a photo of a"; a meta-net Linear(d, d/16) - ReLU - Linear(d/16, w) on the L2-normalised image feature is
added to each of them, so that each image has its own C prompts; SGD 0.002, batch 1, 10 epochs; the last epoch is kept.
Command: `python harness/run.py CONFIG.yaml method=cocoop data.shots=16`
Expected figure: accuracy 65.09 at 16 shots, 48.49 at 1 (BiomedCLIP, mean of 11 medical datasets and 3 seeds, as reported by the
BiomedCoOp repository). Not reproduced here: neither those weights nor the data could be had.

Memory: where the B x C prompts of a batch take more than `run.text_memory_gib`, the text tower takes them in parts.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from vipbench.harness.config.schema import ContextLength, MethodConfig, Words
from vipbench.harness.methods.base import Method, Output, Task, cosine_logits
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.prompts import PromptBatch, context_prompt, context_vectors

REDUCTION = 16  # of the meta-net's hidden layer


class CoCoOpConfig(MethodConfig):
    """Options of CoCoOp. There are as many context vectors as `init_words` has tokens; with `init_words: null` there are
    `context_length` random ones, 4 by default.
    """

    init_words: Words | None = "a photo of a"
    context_length: ContextLength | None = None

    @model_validator(mode="after")
    def _settle_options(self) -> Self:
        why = "init_words gives the context vectors (init_words: null draws random ones)"
        self.settle("context_length", self.init_words is None, 4, why)
        return self


@register("cocoop")
class CoCoOp(Method):
    """Prompts of image x and class c: [SOS] v_1 + m(x) .. v_M + m(x) <class name> "." [EOS]."""

    Config = CoCoOpConfig
    learns_prompts = True

    def __init__(self, config: CoCoOpConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        tower, dim = backbone.text, backbone.dim
        self.context = context_vectors(tower, config.init_words, config.context_length)
        hidden = max(dim // REDUCTION, 1)
        self.meta_net = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, tower.width))
        prompts = [context_prompt(tower, name, self.context.shape[1]) for name in task.classes]
        self.prompts = PromptBatch(tower, prompts, [f"class {name!r}" for name in task.classes])

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {"lr": 0.002, "batch_size": 1, "epochs": 10, "select": "last"}

    def forward(self, inputs: Tensor) -> Output:
        context = self.context + self.meta_net(inputs)[:, None]  # [B, M, w]
        features = F.normalize(self.backbone.text(self.prompts.fill_each(context)).float(), dim=-1)
        per_image = features.view(len(inputs), len(self.task.classes), -1)
        return Output(cosine_logits(self.backbone.logit_scale, inputs, per_image))
