"""Failures of a run on several processes: all ranks fail as one, with the reason of the rank that failed first."""

import logging
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vipbench.harness.errors import AnotherRankFailed, FirstToFail, LostContact, UserError

log = logging.getLogger(__name__)

FIRST_FAILURE = "vipbench/failure"  # in the store that the ranks share
ENDED_SILENTLY = "another process of this run ended without a word"
# Errors of gloo are plain RuntimeErrors that begin with a place in its source.
OF_GLOO = re.compile(r"\[\S*gloo/\S+:\d+\] ")


@contextmanager
def collective() -> Iterator[None]:
    """Do something that all ranks do together; also a decorator.

    Raises:
        LostContact: torch.distributed or gloo report that another rank is silent or gone. Other errors stay what they are.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not OF_GLOO.match(str(error)):
            raise
        raise LostContact(silent=bool(re.search("timed out|timeout", str(error), re.IGNORECASE))) from error


@contextmanager
def fail_together(
    rank: int, world: int, timeout: timedelta, all_gather: Callable[[Iterable[Any]], list[Any]]
) -> Iterator[None]:
    """End on all ranks together, or fail on all for one reason: that of the rank which failed first.

    Args:
        timeout: of collectives, for the message about a silent process.
        all_gather: gives all ranks' items on every rank.

    Raises:
        FirstToFail: instead of a user error, on the rank where it happened first.
        AnotherRankFailed: instead of what happened here, where it happened because another rank had failed.
    """
    try:
        yield
        all_gather([])  # a process that left before would end what the others still do with it
    except (FirstToFail, AnotherRankFailed):
        raise
    except Exception as error:
        log.debug("this rank stopped", exc_info=True)  # for the log of this rank
        if world == 1:
            raise
        lost = _lost_contact(error, timeout) if isinstance(error, LostContact) else ""
        last = traceback.format_exception_only(error)[-1].strip()
        own = f"rank {rank}: {lost or (error if isinstance(error, UserError) else last)}"
        first = _first_failure(own)
        if first != own:
            raise AnotherRankFailed(first) from error
        if lost or isinstance(error, UserError):
            raise FirstToFail(own) from error
        raise


def _lost_contact(error: LostContact, timeout: timedelta) -> str:
    if error.silent:
        return f"another process did not answer for {timeout.total_seconds() / 60:g} minutes (run.timeout_minutes)"
    return ENDED_SILENTLY


def _first_failure(failure: str) -> str:
    """Record why the run failed unless another rank has done so; returns what is on record."""
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set(FIRST_FAILURE, "", failure).decode()
    except (RuntimeError, ValueError):  # the rank that kept the store is gone
        return ENDED_SILENTLY
