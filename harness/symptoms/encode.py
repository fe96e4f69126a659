"""Encode symptoms and images: the one module of this package that uses a device; its results are on the CPU."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vipbench.harness.data.reader import Samples
from vipbench.harness.errors import UserError
from vipbench.harness.features.encode import encode_samples
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.models.text_tower import TextTower
from vipbench.harness.system.devices import to_host


def text_features(tower: TextTower, texts: Sequence[str], *names: Sequence[str]) -> Tensor:
    """Encode P texts to L2-normalised features [P, d] (float32, CPU); `names`, if any, are `TextTower.encode_texts`'s."""
    return _finite(F.normalize(to_host(tower.encode_texts(texts, *names)), dim=-1))


def image_features(backbone: Backbone, samples: Samples, batch_size: int, workers: int, description: str) -> Tensor:
    """Encode samples in their order to L2-normalised features [N, d] (float32, CPU)."""
    features = encode_samples(backbone, samples, batch_size=batch_size, workers=workers, description=description)
    return _finite(features)


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise UserError(
            "the backbone gives features that are not finite: its weights hold NaN or infinity, or are damaged"
        )
    return features
