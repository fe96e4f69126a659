"""Train several runs together: each step takes all their prompts through the text tower in one pass.

A step of prompt learning is a handful of prompts, which leaves a GPU idle; those of many runs fill it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from vipbench.harness.models.prompts import Prompts
from vipbench.harness.models.text_tower import TextTower


class RandomStream:
    """Random numbers of torch for one run among several: what is drawn inside `with` goes on from what was drawn there last.

    It starts where the generators of this process are when it is made.
    """

    def __init__(self) -> None:
        self._save()

    def _save(self) -> None:
        self.cpu = torch.get_rng_state()
        self.gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def __enter__(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)

    def __exit__(self, *_: object) -> None:
        self._save()


def compute_together(
    tower: TextTower, computations: Sequence[Callable[[], Tensor]], streams: Sequence[RandomStream]
) -> list[Tensor]:
    """Results of computations that ask a text tower for features, which answers all that ask at a time in one pass.

    Each computation is a greenlet, which is put aside where it calls the tower and goes on with its own part of the answer;
    so a method need not know of the others. Each draws from its own one of `streams`.
    """
    here = getcurrent()
    tasks = [greenlet(computation, here) for computation in computations]

    def go_on(place: int, *answer: Tensor) -> Any:
        with streams[place]:
            return tasks[place].switch(*answer)

    tower.forward_override = here.switch
    try:
        results = [go_on(place) for place in range(len(tasks))]
        while asking := [place for place, task in enumerate(tasks) if not task.dead]:
            features = tower.compute(Prompts.concatenate([results[place] for place in asking]))
            parts = features.split([len(results[place]) for place in asking])
            for place, part in zip(asking, parts, strict=True):
                results[place] = go_on(place, part)
        return results
    finally:
        tower.forward_override = None
