"""KgCoOp: CoOp whose class features are held near those of the class names in a template.

Paper: "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", CVPR 2023, arXiv 2303.13283.
Protocol: cross-entropy + w (1 - mean over classes of the cosine between learned and template feature), w = 8, as the
published code has it; the paper writes the squared Euclidean distance, which is twice that, so that its w is half of this
one. 4 vectors from "a photo of a"; SGD 0.002, batch 128, 100 epochs; the last epoch is kept. The BiomedCoOp repository sets w
(method.weight) by dataset, 1 to 10.
Command: `python harness/run.py CONFIG.yaml method=kgcoop data.shots=16`
Expected figure: accuracy 62.84 at 16 shots, 50.85 at 1 (BiomedCLIP, mean of 11 medical datasets and 3 seeds, as reported by
the BiomedCoOp repository). Not reproduced here: neither those weights nor the data could be had.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vipbench.baselines.coop import CoOp, CoOpConfig
from vipbench.harness.config.schema import NonNegative, Words
from vipbench.harness.methods.base import Output, Task, class_name_features
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone


class KgCoOpConfig(CoOpConfig):
    """Options of KgCoOp, beside CoOp's."""

    init_words: Words | None = "a photo of a"
    weight: NonNegative = 8.0  # w


@register("kgcoop")
class KgCoOp(CoOp):
    """CoOp with a second loss on its class features."""

    Config = KgCoOpConfig
    uses_templates = True
    anchors: Tensor  # [C, d], of the class names in the task's templates

    def __init__(self, config: KgCoOpConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        self.register_buffer("anchors", class_name_features(task, backbone), persistent=False)

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {"lr": 0.002, "batch_size": 128, "epochs": 100, "select": "last"}

    def losses(self, output: Output, labels: Tensor) -> dict[str, Tensor]:
        cosines = (output.extras["class_features"] * self.anchors).sum(dim=-1)
        return {**super().losses(output, labels), "guidance": self.config.weight * (1 - cosines.mean())}
