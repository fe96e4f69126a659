"""The launcher of this process: python, torchrun or accelerate, read from the variables that it sets."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vipbench.harness.errors import UserError

log = logging.getLogger(__name__)

USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
NOT_SUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
SUPPORTED = "one process, DDP (--multi_gpu), and DeepSpeed's ZeRO 1 to 3 (--use_deepspeed)"


def announced_launcher(environment: Mapping[str, str]) -> str:
    """Name the launcher of this process by the variables that it set."""
    if "ACCELERATE_MIXED_PRECISION" in environment:
        return "accelerate"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "python"


def announced_world(environment: Mapping[str, str]) -> int:
    """Read from the launcher's variables how many processes there are.

    Raises:
        UserError: WORLD_SIZE without a launcher, or `accelerate launch --num_processes N` without `--multi_gpu`, which starts
            one process without a warning.
    """
    if "WORLD_SIZE" in environment:
        world = int(environment["WORLD_SIZE"])
        if world > 1 and "MASTER_ADDR" not in environment:
            raise UserError(
                f"WORLD_SIZE says {world} processes, but no launcher started them; use torchrun, or unset WORLD_SIZE"
            )
        return world
    # accelerate's simple launcher sets an address only when several processes were asked for, yet starts one.
    if announced_launcher(environment) == "accelerate" and "MASTER_ADDR" in environment:
        raise UserError(
            "accelerate launch was asked for several processes, but on this machine it started one; "
            "use torchrun --nproc-per-node N harness/run.py ... or accelerate launch --multi_gpu"
        )
    return 1


def refuse_unsupported(environment: Mapping[str, str]) -> None:
    """Raises UserError where `accelerate launch` was asked for what a run would ignore, or compute otherwise."""
    for variable, name in NOT_SUPPORTED.items():
        if environment.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(f"accelerate launch asks for {name} ({variable}); supported are {SUPPORTED}")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise UserError(
            f"accelerate launch asks for --dynamo_backend {backend.lower()}; leave it out: run.compile=true compiles "
            "the image tower"
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1", "auto"):
        raise UserError(
            f"accelerate launch asks for {steps} gradient accumulation steps; leave them out: run.micro_batch accumulates"
        )


def deepspeed_settings(environment: Mapping[str, str], cpu: bool) -> dict[str, Any] | None:
    """DeepSpeed's settings as `accelerate launch` was given them, as a JSON file or as options; None without DeepSpeed.

    Settings that the run's own config makes are left out (optimizer, schedule, precision, clipping, batch size), and "auto".

    Raises:
        UserError: DeepSpeed is not installed, or its settings name no stage from 1 to 3.
    """
    if environment.get(USE_DEEPSPEED, "false").lower() != "true":
        return None
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    try:
        import deepspeed  # noqa: F401
        from accelerate import DeepSpeedPlugin
    except ImportError as error:
        raise UserError(
            "accelerate launch asks for DeepSpeed, which is not installed: pip install deepspeed"
        ) from error
    try:
        given = DeepSpeedPlugin(zero3_init_flag=False).hf_ds_config.config
    except (ValueError, OSError) as error:
        raise UserError(f"DeepSpeed's settings: {' '.join(str(error).split())}") from error
    for key in ("optimizer", "scheduler"):
        if key in given:
            log.warning("DeepSpeed's settings: %s is ignored, the run's config decides", key)
    ours = ("optimizer", "scheduler", "fp16", "bf16", "amp", "torch_autocast")
    settings = _without_auto({key: value for key, value in given.items() if key not in ours})
    if zero_stage(settings) not in (1, 2, 3):
        raise UserError(
            "DeepSpeed's settings: zero_optimization.stage must be 1, 2 or 3; without ZeRO leave DeepSpeed out"
        )
    return settings


def zero_stage(settings: Mapping[str, Any] | None) -> int:
    """The stage in DeepSpeed's settings; 0 without DeepSpeed."""
    return int((settings or {}).get("zero_optimization", {}).get("stage", 0))


@contextmanager
def without(variable: str) -> Iterator[None]:
    """An environment without a variable."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}
