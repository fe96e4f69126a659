"""Zero-shot CLIP: nothing is trained; the text is class names in a template, in several templates, or symptoms.

Papers: CLIP, arXiv 2103.00020 (one template; several: mean of the normalised features, normalised again); ViP, arXiv 2409.00341,
Figure 3 (I) (score of a class = mean over its symptoms of the cosine).
Command: `python harness/run.py CONFIG.yaml method=zero_shot method.text=symptoms`
Expected figure: none; it depends on the backbone and the task alone.
"""

from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from vipbench.harness.config.schema import MethodConfig, one_place
from vipbench.harness.methods.base import Task, TextClassifier, symptom_names
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import without_full_stop

DEFAULT_TEMPLATES = {
    "class_names": ["a photo of a {}."],
    "templates": [
        "a photo of a {}.",
        "a medical image of {}.",
        "a clinical photograph showing {}.",
        "an image of a patient with {}.",
        "a close-up picture of {}.",
        "this is {}.",
    ],
    "symptoms": ["{}."],
}


class ZeroShotConfig(MethodConfig):
    """Options of zero-shot classification; `templates` replaces the default ones and each holds {} once."""

    text: Literal["class_names", "templates", "symptoms"] = "class_names"
    templates: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> Self:
        for template in self.templates or []:
            one_place(template)
        if self.text == "class_names" and self.templates and len(self.templates) > 1:
            raise ValueError("text: class_names takes one template; use text: templates for several")
        return self


@register("zero_shot")
class ZeroShot(TextClassifier):
    """Class features from fixed texts."""

    Config = ZeroShotConfig
    trains = False
    fixed_features: Tensor  # [C, d]

    def __init__(self, config: ZeroShotConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        if config.text == "symptoms":
            assert task.symptoms is not None
            words = task.symptoms
        else:
            words = [[name.replace("_", " ")] for name in task.classes]
        templates = config.templates or DEFAULT_TEMPLATES[config.text]
        texts = [
            template.replace("{}", without_full_stop(word))
            for entry in words
            for word in entry
            for template in templates
        ]
        names = [name for name in symptom_names(task.classes, words) for _ in templates]
        features = F.normalize(backbone.text.encode_texts(texts, names), dim=-1)
        parts = features.split([len(entry) * len(templates) for entry in words])
        self.register_buffer("fixed_features", self._merge(list(parts)), persistent=False)

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return bool(config.text == "symptoms")

    def _merge(self, parts: list[Tensor]) -> Tensor:
        """Mean of each class's normalised features [S, d]; for symptoms un-normalised, so that the score is the mean cosine."""
        mean = torch.stack([part.mean(dim=0) for part in parts])
        return mean if self.config.text == "symptoms" else F.normalize(mean, dim=-1)

    def class_features(self) -> Tensor:
        return self.fixed_features
