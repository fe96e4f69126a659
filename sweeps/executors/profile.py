"""Profiles: the resources that a job of a cluster asks for, in YAML; options of the command line override them.

partition: gpu
account: my_group
time: "4:00:00"
gpus_per_run: 1
cpus_per_run: 8
mem: 32G
max_parallel: 64
setup: [module load cuda]
options: {exclude: "node[13-14]"}
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from vipbench.harness.config.validation import Section, validate
from vipbench.harness.errors import UserError, shortened
from vipbench.harness.system.files import read_yaml


def minutes(value: Any) -> Any:
    """A time in one of Slurm's ways (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) as whole minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(value).strip())
    if not match:
        raise ValueError(
            f"not a time; write minutes, hours:minutes:seconds or days-hours:minutes:seconds; found {shortened(value)}"
        )
    days, *parts = (int(part) if part is not None else None for part in match.groups())
    numbers = [part for part in parts if part is not None]
    if days is not None:
        hours, mins, seconds = (*numbers, 0, 0)[:3]
        return days * 1440 + hours * 60 + mins + bool(seconds)
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1] + bool(numbers[2])
    return numbers[0] + bool(numbers[1:] and numbers[1])


class Profile(Section):
    """The settings of a job; None takes the cluster's default.

    Attributes:
        time: of one start of a job, in minutes (written in any of Slurm's ways); a run that needs longer is requeued.
        gpus_per_run, cpus_per_run, processes_per_run: on all nodes of a run together. Processes: one per GPU, or per node.
        mem: of each node, such as 32G.
        max_parallel: jobs of a sweep at a time.
        seconds_to_save: time between the signal to write a checkpoint and the end of a job.
        max_requeues: how often a job that ran out of time is put into the queue again.
        setup: shell commands that come first on each job.
        options: further options of sbatch, by their long names.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Annotated[PositiveInt, BeforeValidator(minutes)] = 60
    gpus_per_run: NonNegativeInt = 1
    nodes_per_run: PositiveInt = 1
    processes_per_run: PositiveInt | None = None
    cpus_per_run: PositiveInt | None = None
    mem: str | None = None
    max_parallel: PositiveInt | None = None
    seconds_to_save: PositiveInt = 120
    max_requeues: NonNegativeInt = 20
    setup: tuple[str, ...] = ()
    options: dict[str, str | int | bool] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None, options: Mapping[str, Any]) -> "Profile":
        """Read a profile, or take the defaults; options that are None are not given.

        Raises:
            UserError: no such file, unknown or misspelt key, wrong value, or a count that cannot be split among the nodes.
        """
        given = {key: value for key, value in options.items() if value is not None}
        profile = validate(cls, (read_yaml(path) if path else {}) | given, where=str(path or "options"))
        for name in ("gpus_per_run", "processes_per_run", "cpus_per_run"):
            if (getattr(profile, name) or 0) % profile.nodes_per_run:
                count = getattr(profile, name)
                raise UserError(f"{name}: {count} cannot be split evenly among {profile.nodes_per_run} nodes")
        return profile

    @property
    def processes_per_node(self) -> int:
        return (self.processes_per_run or self.gpus_per_run or self.nodes_per_run) // self.nodes_per_run

    def sbatch(self) -> dict[str, Any]:
        """Give the settings as submitit's parameters. One task per node: torchrun starts the processes of a node."""
        cpus = self.cpus_per_run // self.nodes_per_run if self.cpus_per_run else None
        parameters: dict[str, Any] = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.time,
            "nodes": self.nodes_per_run,
            "ntasks_per_node": 1,
            "gpus_per_node": self.gpus_per_run // self.nodes_per_run or None,
            "cpus_per_task": cpus,
            "srun_args": [f"--cpus-per-task={cpus}"] if cpus else None,  # srun has not inherited it since Slurm 22.05
            "mem": self.mem,
            "signal_delay_s": self.seconds_to_save,
            "setup": list(self.setup) or None,
            "additional_parameters": {"requeue": True, **self.options},
        }
        return {key: value for key, value in parameters.items() if value is not None}
