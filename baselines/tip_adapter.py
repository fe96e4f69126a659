"""Tip-Adapter and Tip-Adapter-F: zero-shot CLIP and a cache of the training features, whose keys -F learns.

Paper: "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022, arXiv 2207.09519.
Protocol: a key is the mean over 10 augmented views (crop scale 0.5 to 1, flip) of the un-normalised features of a training
image, then normalised. alpha and beta are those of a grid, both from 0.1, with the best validation accuracy (of equal ones
the first: beta in the outer loop, alpha in the inner one); without a validation split the published start. -F learns the keys
with alpha and beta at that start: AdamW 1e-3, eps 1e-4, weight decay 0.01, batch 256, 20 epochs, cosine per step; then it
searches. The published -F keeps the epoch that is best on the *test* set; here the last one is kept, or with
train.select=best the best on validation. The ends of the grid (search_scale) and the start (alpha, beta) are set by dataset
there; the defaults here are those for ImageNet. As in all trainings here, a last batch that is not full is dropped.
Command: `python harness/run.py CONFIG.yaml method=tip_adapter_f data.shots=16`
Expected figure: accuracy 67.15 (Tip-Adapter) and 70.91 (-F) at 16 shots, 49.19 and 51.17 at 1 (BiomedCLIP, mean of 11 medical
datasets and 3 seeds, as reported by the BiomedCoOp repository). Not reproduced here: neither those weights nor the data could
be had.

    logits = 100 f W + alpha exp(-beta (1 - f K)) V         W zero-shot text features, K keys, V labels of the keys (one-hot)
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vipbench.harness.config.schema import MethodConfig, Rate
from vipbench.harness.methods.base import Method, Output, Support, SupportViews, Task, class_name_features
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone

log = logging.getLogger(__name__)

SCALE = 100.0  # of zero-shot logits, whatever the model's own scale is
CROP_SCALE = (0.5, 1.0)
GRID_START = 0.1
GridSteps = Annotated[int, Field(ge=1, le=10_000)]


class TipAdapterConfig(MethodConfig):
    """Options of Tip-Adapter. The grid holds `search_steps` values each of (beta, alpha), below `search_scale`."""

    alpha: Rate = 1.17
    beta: Rate = 1.0
    search_scale: tuple[Rate, Rate] = (7.0, 3.0)
    search_steps: tuple[GridSteps, GridSteps] = (200, 20)
    views: Annotated[int, Field(ge=1, le=1000)] = 10  # augmented ones of each training image


@register("tip_adapter")
class TipAdapter(Method):
    """A cache of training features beside zero-shot classification."""

    Config = TipAdapterConfig
    trains = False
    uses_templates = True
    keys: Tensor  # K [N, d] L2-normalised at the start
    values: Tensor  # V [N, C] float32
    alpha: Tensor  # scalar
    beta: Tensor  # scalar
    text: Tensor  # W [C, d]

    def __init__(self, config: TipAdapterConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        keys = torch.empty(0, backbone.dim)
        if self.trains:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        self.register_buffer("values", torch.empty(0, len(task.classes)))
        self.register_buffer("alpha", torch.tensor(config.alpha))
        self.register_buffer("beta", torch.tensor(config.beta))
        self.register_buffer("text", class_name_features(task, backbone), persistent=False)

    @classmethod
    def support(cls, config: Any) -> SupportViews:
        return SupportViews(config.views, CROP_SCALE)

    @property
    def per_class(self) -> bool:
        return True

    def prepare(self, support: Support, validation: Support | None) -> None:
        self.keys.data = F.normalize((support.features * support.norms[..., None]).mean(dim=0), dim=-1)
        self.values.data = torch.eye(len(self.task.classes), device=support.labels.device)[support.labels]

    @torch.no_grad()
    def finish(self, validation: Support | None) -> None:
        """Search alpha and beta on the validation samples."""
        if validation is None:
            return
        features, labels, best = validation.features[0], validation.labels, 0
        zero_shot, affinity = SCALE * features @ self.text.T, features @ self.keys.T
        betas, alphas = (
            [GRID_START + step * (end - GRID_START) / steps for step in range(steps)]
            for end, steps in zip(self.config.search_scale, self.config.search_steps, strict=True)
        )
        for beta in betas:
            cached = self._cached(affinity, beta)
            for alpha in alphas:
                correct = int(((zero_shot + alpha * cached).argmax(dim=1) == labels).sum())
                if correct > best:
                    best = correct
                    self.alpha.fill_(alpha)
                    self.beta.fill_(beta)
        log.info("%s: alpha %.3g, beta %.3g by validation", self.config.name, float(self.alpha), float(self.beta))

    def forward(self, inputs: Tensor) -> Output:
        with torch.autocast(inputs.device.type, enabled=False):
            features = inputs.float()
            cached = self._cached(features @ self.keys.T, self.beta)
            return Output(SCALE * features @ self.text.T + self.alpha * cached)

    def _cached(self, affinity: Tensor, beta: Tensor | float) -> Tensor:
        """exp(-beta (1 - f K)) V: [B, C] from f K [B, N]."""
        return torch.exp(-beta * (1 - affinity)) @ self.values


@register("tip_adapter_f")
class TipAdapterF(TipAdapter):
    """Tip-Adapter with learned keys."""

    trains = True

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        optimizer = {"optimizer": "adamw", "lr": 1e-3, "eps": 1e-4, "weight_decay": 0.01, "schedule": "step"}
        return {**optimizer, "batch_size": 256, "epochs": 20, "warmup_epochs": 0, "crop_scale": CROP_SCALE}
