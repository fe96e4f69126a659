"""ProGrad: CoOp that takes out of its gradient what goes against the zero-shot prediction.

Paper: "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023, arXiv 2205.14865.
Protocol: 16 vectors, of which the last 4 begin as "a photo of a" and those in front as zeros; g is the gradient of the
cross-entropy and b that of the soft cross-entropy with the zero-shot prediction, times T^2. Where g and b oppose each other,
g - lambda (g . b^) b^ is the gradient, else g. lambda 1, T 1; SGD 0.002, batch 32; epochs as CoOp's; the last epoch is kept.
Both gradients are those of the whole global batch. The BiomedCoOp repository uses batch 128, 4 vectors, and T
(method.temperature) from 0.25 to 4 by dataset.
Command: `python harness/run.py CONFIG.yaml method=prograd data.shots=16`
Expected figure: accuracy 67.13 at 16 shots, 51.88 at 1 (BiomedCLIP, mean of 11 medical datasets and 3 seeds, as reported by
the BiomedCoOp repository). Not reproduced here: neither those weights nor the data could be had.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from vipbench.baselines.coop import CoOp, CoOpConfig, epochs_for
from vipbench.harness.config.schema import ContextLength, NonNegative, Rate, Words
from vipbench.harness.methods.base import Output, Task, class_name_features, cosine_logits
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone

# A difference of equal gradients may be so many times the relative rounding; up to 6 was measured, in fp32 and bf16.
NOISE = 16


class ProGradConfig(CoOpConfig):
    """Options of ProGrad, beside CoOp's. `init_words` (null: none) fill the last of `context_length` vectors, 16 by default."""

    context_length: ContextLength | None = None
    init_words: Words | None = "a photo of a"
    projection: NonNegative = 1.0  # lambda
    temperature: Rate = 1.0  # T

    @model_validator(mode="after")
    def _settle_options(self) -> Self:
        self.settle("context_length", True, 16, "")  # unlike CoOp's, it goes with words too
        return self


@register("prograd")
class ProGrad(CoOp):
    """CoOp with a projected gradient."""

    Config = ProGradConfig
    uses_templates = True
    zero_shot: Tensor  # [C, d], text features of the class names in the task's templates
    rounding: float = torch.finfo(torch.float32).eps  # of the numbers that the last loss was computed in

    def __init__(self, config: ProGradConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.register_buffer("zero_shot", class_name_features(task, backbone), persistent=False)

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {"lr": 0.002, "batch_size": 32, "epochs": epochs_for(shots), "select": "last"}

    def forward(self, inputs: Tensor) -> Output:
        output = super().forward(inputs)
        return Output(output.logits, {"zero_shot": cosine_logits(self.backbone.logit_scale, inputs, self.zero_shot)})

    def losses(self, output: Output, labels: Tensor) -> dict[str, Tensor]:
        kind, temperature = output.logits.device.type, self.config.temperature
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        self.rounding = torch.finfo(computed).eps
        teacher = F.softmax(output.extras["zero_shot"] / temperature, dim=-1)
        student = F.log_softmax(output.logits / temperature, dim=-1)
        general = -(teacher * student).sum(dim=-1) * temperature**2
        return {**super().losses(output, labels), "general": general}

    def combine(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        general = gradients["general"]
        return {name: self._project(own, general[name]) for name, own in gradients["cross_entropy"].items()}

    def _project(self, own: Tensor, general: Tensor) -> Tensor:
        """g without lambda times its part along b, where that part goes against b.

        Where student and teacher agree, as they do at the start with 4 vectors, b is a difference of equal numbers: rounding
        noise whose direction means nothing. Both gradients go through the same towers, so that this noise is a few times the
        rounding of g; a b of no more than that is left alone.
        """
        length = general.norm()
        direction = general / length.clamp(min=torch.finfo(general.dtype).tiny)
        along = (own * direction).sum()
        opposed = (along < 0) & (length > NOISE * self.rounding * own.norm())
        return own - self.config.projection * torch.where(opposed, along, 0.0) * direction
