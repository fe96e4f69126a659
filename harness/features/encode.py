"""Encode images with the frozen image tower: into the feature cache, or at once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from vipbench.harness.config.identity import RESULT_VERSION
from vipbench.harness.data.augment import Augmentation
from vipbench.harness.data.reader import Samples
from vipbench.harness.data.views import EVALUATION, Loading, Views
from vipbench.harness.distributed.engines.zero import is_sharded
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import UserError
from vipbench.harness.features.cache import STORED, FeatureBank
from vipbench.harness.models.backbone import Backbone
from vipbench.harness.system.devices import each_to_host
from vipbench.harness.system.progress import Progress

SECONDS_TO_ASK_AGAIN = 1.0


def sharded(module: nn.Module) -> bool:
    """Check if ZeRO-3 holds the weights of a module in pieces, all or none, so that all ranks take part in each of its passes."""
    return is_sharded(next(module.parameters()))


@torch.no_grad()
def encode_images(backbone: Backbone, pixels: Tensor, topology: Topology) -> Tensor:
    """Rows [b, d + 1] float32 of pixels [b, 3, H, W]: L2-normalised features, and the norm that they had, last.

    Rounded to the run's precision, so that they are the same whether they come from a bank, which stores them in that precision,
    or not.
    """
    with topology.autocast():
        return backbone.encode_with_norms(pixels).to(STORED[topology.precision][1]).float()


def unnormalised(rows: Tensor) -> Tensor:
    """Features as the image tower gave them [..., d], from rows [..., d + 1]."""
    return rows[..., :-1] * rows[..., -1:]


def check_finite(outputs: Tensor, what: str) -> None:
    """Raise UserError where outputs of the model [b, ...] on the CPU hold NaN or infinity, before more work is done with them."""
    bad = int((~outputs.isfinite().flatten(1).all(dim=1)).sum())
    if bad:
        raise UserError(
            f"{what}: the model's output is not finite for {bad} of {len(outputs)}; check the backbone's weights, or use "
            "precision=fp32"
        )


def bank_facts(
    backbone: str,
    dataset: str,
    split: str,
    precision: str,
    augmentation: Augmentation | None,
    *,
    device: str,
    compiled: bool,
) -> dict[str, Any]:
    """List all that determines the features of a split: what goes in, the augmentation if any, the result version, and all that
    rounds differently.

    Args:
        backbone, dataset: digests.
        device: "cpu" or "cuda".
        compiled: whether the image tower runs through torch.compile.
    """
    facts: dict[str, Any] = {"backbone": backbone, "dataset": dataset, "split": split, "result_version": RESULT_VERSION}
    facts |= {"precision": precision, "device": device, "compiled": compiled}
    if augmentation is not None:
        facts["augmentation"] = augmentation.facts()
    return facts


def fill_bank(
    bank: FeatureBank, images: Views, views: Sequence[int], backbone: Backbone, topology: Topology, description: str
) -> None:
    """Compute what a bank lacks of some views of samples; all ranks share the work. Waits while another run fills it.

    Damaged samples that are skipped stay missing.

    Raises:
        Stopped: a signal asked for an end; what was computed is in the bank.
    """
    lock = bank.lock()
    topology.signals.exchange.restart()
    while not topology.broadcast(topology.is_main and _acquired(lock)):
        topology.signals.stop_if_asked()
    try:
        rows, size = images.samples.rows, images.loading.batch_size
        absent = [(view, int(place)) for view in views for place in np.flatnonzero(~bank.read(view, rows)[1])]
        missing = topology.broadcast(absent)
        if topology.is_main:
            bank.reserve([(view, int(rows[place])) for view, place in missing])
        mine = missing[topology.share(len(missing))]
        batches = [mine[first : first + size] for first in range(0, len(mine), size)]
        if missing:
            with Progress(description, len(mine), "images") as progress:
                pixels = (loaded.pixels for loaded in images.load(batches, topology.device))
                forward = partial(encode_images, backbone, topology=topology)
                passes = topology.passes(len(missing), size)
                computed = topology.map_batches(forward, pixels, passes, backbone.pixels_shape, sharded(backbone))
                for batch, features in zip(batches, each_to_host(computed), strict=True):
                    _store(bank, images, batch, features)
                    progress.advance(len(batch))
        topology.all_gather_objects([])  # nobody reads before everybody has written
    finally:
        lock.release()


def _store(bank: FeatureBank, images: Views, batch: list[tuple[int, int]], features: Tensor) -> None:
    """Put the rows [b, d + 1] of a batch of (view, position) into a bank, but for damaged samples.

    Raises:
        UserError: a feature is not finite.
    """
    good = [place for place, (_, position) in enumerate(batch) if images.samples.key(position) not in images.skipped]
    for view in {batch[place][0] for place in good}:
        chosen = [place for place in good if batch[place][0] == view]
        check_finite(features[chosen], "encode images")
        bank.write(view, images.samples.rows[[batch[place][1] for place in chosen]], features[chosen])


def _acquired(lock: FileLock) -> bool:
    """Wait for a lock as long as a signal may wait to be acted on."""
    try:
        lock.acquire(timeout=SECONDS_TO_ASK_AGAIN)
    except Timeout:
        return False
    return True


@torch.no_grad()
def encode_samples(
    backbone: Backbone,
    samples: Samples,
    *,
    batch_size: int = 64,
    workers: int = 0,
    description: str = "encode images",
) -> Tensor:
    """L2-normalised features [N, d] (float32, CPU) of samples in their order, with the backbone's own preprocessing."""
    dataset, features = Views(samples, backbone, None, Loading(batch_size, workers)), []
    positions = [(EVALUATION, place) for place in range(len(samples))]
    batches = [positions[first : first + batch_size] for first in range(0, len(positions), batch_size)]
    device = backbone.logit_scale.device
    with Progress(description, len(samples), "images") as progress:
        encoded = (backbone.encode_images(loaded.pixels) for loaded in dataset.load(batches, device))
        for part in each_to_host(encoded):
            features.append(part)
            progress.advance(len(part))
    return torch.cat(features) if features else torch.empty(0, backbone.dim)
