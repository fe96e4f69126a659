"""CoOp: learned context vectors in front of (around, behind) the class name.

Paper: "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134.
Protocol: 16 vectors N(0, 0.02) or the words "a photo of a"; SGD 0.002, batch 32; 50 epochs for 1 shot, 100 for 2 and 4,
200 for 8, 16 and more; the last epoch is kept.
Command: `python harness/run.py CONFIG.yaml method=coop data.shots=16`
Expected figure: accuracy 69.62 at 16 shots, 50.16 at 1 (BiomedCLIP, mean of 11 medical datasets and 3 seeds, as reported by the
BiomedCoOp repository). Not reproduced here: neither those weights nor the data could be had.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from vipbench.harness.config.schema import ContextLength, MethodConfig, Words
from vipbench.harness.methods.base import Task, TextClassifier
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.prompts import PromptBatch, context_prompt, context_vectors


class CoOpConfig(MethodConfig):
    """Options of CoOp. With `init_words` there are as many context vectors as the words have tokens, else 16 by default."""

    context_length: ContextLength | None = None
    init_words: Words | None = None
    class_specific_context: bool = False
    position: Literal["end", "middle", "front"] = "end"  # of the class name among the context vectors

    @model_validator(mode="after")
    def _settle_options(self) -> Self:
        self.settle("context_length", self.init_words is None, 16, "init_words gives the context vectors")
        return self


def epochs_for(shots: int | str) -> int:
    """Epochs by training images per class, as in the paper's protocol."""
    if shots == "all" or int(shots) > 4:
        return 200
    return 50 if int(shots) == 1 else 100


@register("coop")
class CoOp(TextClassifier):
    """One prompt per class: [SOS] v_1 .. v_M <class name> "." [EOS]."""

    Config = CoOpConfig
    learns_prompts = True

    def __init__(self, config: CoOpConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        copies = len(task.classes) if config.class_specific_context else 1
        self.context = context_vectors(backbone.text, config.init_words, config.context_length, copies)
        length = self.context.shape[1]
        prompts = [context_prompt(backbone.text, name, length, config.position) for name in task.classes]
        self.prompts = PromptBatch(backbone.text, prompts, [f"class {name!r}" for name in task.classes])

    @classmethod
    def recipe(cls, config: Any, shots: int | str, backbone: str) -> Mapping[str, Any]:
        return {"lr": 0.002, "batch_size": 32, "epochs": epochs_for(shots), "select": "last"}

    @property
    def per_class(self) -> bool:
        return bool(self.config.class_specific_context)

    def class_features(self) -> Tensor:
        features = self.backbone.text(self.prompts.fill(self.context))
        return F.normalize(features.float(), dim=-1)
