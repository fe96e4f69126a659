"""Few-shot draws: k images per class, keyed by (seed, class), so that a larger draw holds every smaller one."""

import numpy as np

from vipbench.harness.data.reader import Samples
from vipbench.harness.data.stateless_random import keyed_generator
from vipbench.harness.errors import UserError


def draw(samples: Samples, classes: list[str], k: int, seed: int, fewer: bool = False) -> Samples:
    """Draw k samples of each class, in key order; with `fewer`, all of a class that has fewer.

    Raises:
        UserError: a class has fewer than k, and `fewer` is false.
    """
    by_key = np.argsort(samples.rows)
    chosen = []
    for label, name in enumerate(classes):
        members = by_key[samples.labels[by_key] == label]
        if len(members) < k and not fewer:
            raise UserError(
                f"class {name!r} has {len(members)} images, fewer than the {k} shots asked for; "
                "data.fewer=take takes what there is"
            )
        chosen.append(keyed_generator("few-shot", seed, name).permutation(members)[:k])
    positions = np.concatenate(chosen)
    return samples.select(positions[np.argsort(samples.rows[positions])])


def fewer(samples: Samples, classes: list[str], k: int) -> dict[str, int]:
    """Images of each class that has fewer than k, by its name."""
    counts = np.bincount(samples.labels, minlength=len(classes)).tolist()
    return {name: count for name, count in zip(classes, counts, strict=True) if count < k}
