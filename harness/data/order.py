"""The order in which an epoch shows samples: a pure function of (seed, epoch, the samples), whoever asks and how often."""

import numpy as np

from vipbench.harness.data.reader import Samples


def epoch_order(samples: Samples, seed: int, epoch: int, block: int | None = None) -> np.ndarray:
    """Positions [N] int64 of all samples, each once.

    Args:
        block: None shuffles all samples at once. A number shuffles at two levels, for shards that are far away or many: they come
            in a random order, each one's samples in a random order, and the sequence is cut into blocks of this many samples
            that are shuffled within. A stretch of the epoch then touches few shards.
    """
    random = np.random.default_rng([seed, epoch])
    if block is None:
        return random.permutation(len(samples))
    mixed = random.permutation(len(samples))
    place = np.argsort(random.permutation(len(samples.files)))  # of each shard in this epoch
    order = mixed[np.argsort(place[samples.shards[mixed]], kind="stable")]
    for first in range(0, len(order), block):
        order[first : first + block] = random.permutation(order[first : first + block])
    return order
