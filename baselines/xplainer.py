"""Xplainer: zero-shot diagnosis from the presence of observations, each against its absence.

Paper: "Xplainer: From X-Ray Observations to Explainable Zero-Shot Diagnosis", MICCAI 2023, arXiv 2303.13391; code
github.com/ChantalMP/Xplainer.
Protocol: an observation is present with p = softmax(cosines / 0.5) of "There are {observation} indicating {class}" against
"There are no {observation} indicating {class}". The probability of a class is the geometric mean of those of its observations:

    log p_c = mean over observations of log sigmoid((cos(image, present) - cos(image, absent)) / 0.5)

There each finding is a question of its own (multi-label, AUROC); here log p_c are the logits, so that the most likely class is
predicted and its probability is p_c / sum of p. `no_finding` names a class of images without any: as there, its own observations
are not asked for, and its probability is 1 - max p_c of the others.
Command: `python harness/run.py CONFIG.yaml method=xplainer symptoms=symptoms_cache/pneumonia/clinical.json`
Published figure: none is quoted here; the repository holds none, and the paper's tables were not at hand when this was written.

Formula and texts are those of the published code. Its texts have no full stop, and neither have these. The logit scale has no
part in it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vipbench.harness.config.schema import MethodConfig, Rate
from vipbench.harness.errors import UserError, did_you_mean
from vipbench.harness.methods.base import Method, Output, Task
from vipbench.harness.methods.fixed_texts import unit_features
from vipbench.harness.methods.registry import register
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.phrases import spoken, without_full_stop


class XplainerConfig(MethodConfig):
    """Options of Xplainer."""

    temperature: Rate = 0.5  # of the softmax over presence and absence
    no_finding: str | None = None  # a class, of images in which nothing is found


@register("xplainer")
class Xplainer(Method):
    """Logits from observations, present or absent."""

    Config = XplainerConfig
    trains = False
    contrasts: Tensor  # [P, d], unit feature of each observation's presence minus that of its absence

    def __init__(self, config: XplainerConfig, task: Task, backbone: Backbone) -> None:
        super().__init__(config, task, backbone)
        assert task.symptoms is not None
        if config.no_finding is not None and config.no_finding not in task.classes:
            hint = did_you_mean(config.no_finding, task.classes)
            raise UserError(f"method.no_finding: there is no class {config.no_finding!r}; {hint}")
        observed = [
            [f"{without_full_stop(text)} indicating {spoken(name)}" for text in own]
            for name, own in zip(task.classes, task.symptoms, strict=True)
        ]
        self.counts = [len(own) for own in observed]
        present, absent = (
            torch.cat(unit_features(backbone, task.classes, [[f"{front} {text}" for text in own] for own in observed]))
            for front in ("There are", "There are no")
        )
        self.register_buffer("contrasts", present - absent, persistent=False)

    @classmethod
    def uses_symptoms(cls, config: Any) -> bool:
        return True

    def forward(self, inputs: Tensor) -> Output:
        with torch.autocast(inputs.device.type, enabled=False):
            found = F.logsigmoid(inputs.float() @ self.contrasts.T / self.config.temperature).split(self.counts, dim=1)
            logits = torch.stack([own.mean(dim=1) for own in found], dim=1)
            if self.config.no_finding is not None:
                healthy = torch.arange(len(found), device=logits.device) == self.task.classes.index(
                    self.config.no_finding
                )
                most = logits.masked_fill(healthy, -torch.inf).amax(dim=1, keepdim=True)
                logits = torch.where(healthy, (-most.expm1()).log(), logits)
        return Output(logits)
