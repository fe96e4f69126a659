"""Steps, epochs and learning rates of a training recipe."""

import math

from vipbench.harness.config.schema import TrainConfig


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """Optimiser steps of an epoch: as in Dassl a short last batch is dropped, unless it is the only one."""
    return max(1, samples // batch_size)


def total_steps(train: TrainConfig, samples: int) -> int:
    """Optimiser steps of the whole training."""
    if train.steps is not None:
        return train.steps
    assert train.epochs is not None
    return train.epochs * steps_per_epoch(samples, train.batch_size)


def total_epochs(train: TrainConfig, samples: int) -> int:
    """Epochs of the whole training, of which the last one may end early where the recipe counts steps."""
    return train.epochs or -(-total_steps(train, samples) // steps_per_epoch(samples, train.batch_size))


def learning_rate(epoch: int, train: TrainConfig) -> float:
    """Rate of an epoch counted from 1: constant during warm-up, then half a cosine that never reaches 0.

    As Dassl's constant warm-up around torch's CosineAnnealingLR: lr / 2 * (1 + cos(pi (e - 1 - warmup) / E)).
    """
    if epoch <= train.warmup_epochs:
        assert train.warmup_lr is not None
        return train.warmup_lr
    assert train.epochs is not None
    return train.lr / 2 * (1 + math.cos(math.pi * (epoch - 1 - train.warmup_epochs) / train.epochs))


def step_rate(step: int, train: TrainConfig, samples: int) -> float:
    """Rate of a step counted from 1, by the schedule of the recipe.

    By step: half a cosine down to `final_lr`, as torch's CosineAnnealingLR(T_max = all steps) stepped after each step.
    """
    if train.schedule == "step":
        low, done = train.final_lr or 0.0, (step - 1) / total_steps(train, samples)
        return low + (train.lr - low) / 2 * (1 + math.cos(math.pi * done))
    if train.epochs is None:
        return train.lr
    return learning_rate((step - 1) // steps_per_epoch(samples, train.batch_size) + 1, train)
