"""The optimizers that recipes name."""

from collections.abc import Sequence
from typing import Any

import torch

from vipbench.harness.config.schema import TrainConfig

FACTOR = "lr_factor"  # of a parameter group: its learning rate over that of the recipe


def make_optimizer(groups: Sequence[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum, Adam or AdamW; weight decay on every parameter, prompts too."""
    if train.optimizer == "sgd":
        assert train.momentum is not None
        return torch.optim.SGD(list(groups), train.lr, momentum=train.momentum, weight_decay=train.weight_decay)
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    given: dict[str, Any] = {name: getattr(train, name) for name in ("betas", "eps")}
    settings = {name: value for name, value in given.items() if value is not None}
    return kind(list(groups), train.lr, weight_decay=train.weight_decay, **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step, of each group with its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(FACTOR, 1.0)
