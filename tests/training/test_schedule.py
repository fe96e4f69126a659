"""Schedules by step against torch's own."""

import pytest
import torch
from pydantic import ValidationError

from vipbench.harness.config.schema import TrainConfig
from vipbench.harness.training.optimizer import make_optimizer, set_rate
from vipbench.harness.training.schedule import learning_rate, step_rate, total_epochs, total_steps

STEPS = {"epochs": None, "warmup_epochs": 0, "batch_size": 4}


def test_a_cosine_by_step_is_torchs() -> None:
    train = TrainConfig(lr=0.1, steps=17, schedule="step", final_lr=1e-3, **STEPS)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17, eta_min=1e-3)
    for step in range(1, 18):
        assert step_rate(step, train, samples=10) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_steps_stand_in_the_place_of_epochs() -> None:
    train = TrainConfig(steps=5, **STEPS)  # type: ignore[arg-type]
    assert (total_steps(train, 10), total_epochs(train, 10)) == (5, 3), "two steps an epoch, the last one cut"
    assert step_rate(3, train, 10) == train.lr, "without a schedule the rate is constant"
    by_epoch = TrainConfig(epochs=3, batch_size=4)
    assert (total_steps(by_epoch, 10), total_epochs(by_epoch, 10)) == (6, 3)
    assert [step_rate(step, by_epoch, 10) for step in (1, 2, 3)] == [
        learning_rate(epoch, by_epoch) for epoch in (1, 1, 2)
    ]


def test_groups_have_rates_of_their_own() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = make_optimizer([{"params": [first]}, {"params": [second], "lr_factor": 10.0}], TrainConfig())
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"steps": 5}, "give epochs or steps"),
        ({"epochs": None}, "give epochs or steps"),
        ({"steps": 5, "epochs": None}, "warmup_epochs goes with epochs"),
        ({"final_lr": 1e-6}, "final_lr has no effect without schedule: step"),
        ({"betas": (0.9, 0.99)}, "betas has no effect, since the optimizer is sgd"),
    ],
)
def test_recipes_that_contradict_themselves(recipe: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        TrainConfig(**recipe)  # type: ignore[arg-type]
