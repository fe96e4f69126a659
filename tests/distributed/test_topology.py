"""Launchers that are refused, and the meaning of an error for all ranks."""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from vipbench.harness.distributed import failures
from vipbench.harness.distributed import topology as module
from vipbench.harness.distributed.failures import collective
from vipbench.harness.distributed.launcher import refuse_unsupported
from vipbench.harness.distributed.topology import Topology
from vipbench.harness.errors import AnotherRankFailed, FirstToFail, LostContact, UserError

CLOSED = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:9360."
SILENT = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms for recv"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "accelerate launch asks for FSDP (ACCELERATE_USE_FSDP); supported are one process",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for tensor, context or sequence parallelism"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "asks for --dynamo_backend inductor; leave it out: run.compile=true",
        ),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "asks for 4 gradient accumulation steps"),
    ],
)
def test_what_is_not_supported_is_refused(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        refuse_unsupported(environment)


def test_what_is_supported_is_not_refused() -> None:
    refuse_unsupported({})
    plain = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    refuse_unsupported({**plain, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"})


def test_a_run_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="asks for FSDP"):
        Topology("cpu", "fp32")


@pytest.mark.parametrize(
    ("error", "silent"),
    [
        (RuntimeError(CLOSED), False),
        (RuntimeError(SILENT), True),
        (dist.DistNetworkError("Connection reset by peer"), False),
        (dist.DistStoreError("wait timeout after 300000ms"), True),
        (dist.DistBackendError("NCCL error: remote process exited"), False),
    ],
)
def test_what_a_collective_reports_is_lost_contact(error: Exception, silent: bool) -> None:
    with pytest.raises(LostContact) as caught, collective():
        raise error
    assert caught.value.silent is silent


OTHERS = [
    RuntimeError("DataLoader timed out after 5 seconds"),
    RuntimeError("CUDA out of memory: reset by peer"),
    ConnectionResetError("Connection reset by peer"),
    TimeoutError("The read operation timed out"),
    UserError("https://example.org/a.tar: timed out: closed by peer"),
    BrokenPipeError("Broken pipe"),
]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, collective():
        raise error
    assert caught.value is error


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> Topology:
    """Rank 1 of 2, whose failure is the first; it talks to nobody."""
    topology = Topology.__new__(Topology)
    topology.rank, topology.world, topology.timeout = 1, 2, timedelta(minutes=3)
    monkeypatch.setattr(failures, "_first_failure", lambda failure: failure)
    monkeypatch.setattr(module, "gather_object", lambda items: items)
    return topology


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_an_error_is_said_in_its_own_words(second_rank: Topology, error: Exception) -> None:
    """Whatever words these are: only what a collective raised can mean that another rank is silent or gone."""
    with pytest.raises(type(error)) as caught, second_rank.fail_together():
        raise error
    assert str(error) in str(caught.value)
    assert "did not answer" not in str(caught.value) and "without a word" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SILENT, "rank 1: another process did not answer for 3 minutes (run.timeout_minutes)"),
        (CLOSED, "rank 1: another process of this run ended without a word"),
    ],
)
@pytest.mark.parametrize("call", ["all_gather_objects", "broadcast", "all_reduce_sum"])
def test_silence_is_said_to_be_one(
    second_rank: Topology, text: str, reason: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def lose(*_: Any, **__: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(module, "gather_object", lose)
    monkeypatch.setattr(dist, "broadcast_object_list", lose)
    monkeypatch.setattr(dist, "all_reduce", lose)
    with pytest.raises(FirstToFail, match=re.escape(reason)), second_rank.fail_together():
        getattr(second_rank, call)(torch.ones(()) if call == "all_reduce_sum" else [1])


def test_what_follows_from_anothers_failure_is_not_said(second_rank: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "_first_failure", lambda failure: "rank 0: the disk is full")
    with pytest.raises(AnotherRankFailed, match="rank 0: the disk is full"), second_rank.fail_together():
        raise LostContact(silent=False)
