"""Several ranks as torchrun starts them: whether this process is one of them, and how it joins the others.

They find each other as torch does, by the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT). A process without it is alone.
"""

from __future__ import annotations

import datetime
import os
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from streamprune.errors import INTERRUPTED, ElsewhereError, ResourceError, UsageError
from streamprune.process import interrupts
from streamprune.process.ranks import ALONE, Ranks, Together

TIMEOUT_VARIABLE = "STREAMPRUNE_RANK_TIMEOUT"
TIMEOUT_SECONDS = 1800
"""How long a rank waits for the others, unless the variable says otherwise."""

_JOIN_SECONDS = 120
"""How long a rank waits at least for the others to start."""

_REFUSED_SECONDS = 30
"""How long another rank than 0 waits, when a command is refused, for torchrun to end it: rank 0 says why."""


def started_together() -> bool:
    """Whether this process is one of several ranks: the environment says how many, which one, and where they meet.

    WORLD_SIZE alone, as clusters export it, makes no ranks.
    """
    return _number("WORLD_SIZE", 1) > 1 and all(map(os.environ.get, ("RANK", "MASTER_ADDR", "MASTER_PORT")))


def is_follower() -> bool:
    """Whether it is another rank than 0, which prints no results."""
    return started_together() and _number("RANK", 0) > 0


def settle_ranks(args: Namespace) -> None:
    """Makes other ranks than 0 quiet. Raises UsageError for a command line that several ranks cannot share."""
    args.quiet = args.quiet or is_follower()
    command, given = args.command, vars(args)
    alone = next((f"{command} --{name.replace('_', '-')}" for name in ("tasks", "dry_run") if given.get(name)), "")
    if command not in ("prune", "calibrate", "eval"):
        alone = command
    if alone and started_together():
        if is_follower():
            time.sleep(_REFUSED_SECONDS)  # the first rank that ends is the last to say anything
            raise ElsewhereError(UsageError.exit_code)
        raise UsageError(f"{alone} runs in a single process; run it without torchrun, or unset WORLD_SIZE")


def prepare_environment() -> None:
    """Lets Numba use as many threads as torchrun gives a rank; before numba is imported.

    Until it has joined the others, another rank than 0 is silent when a signal ends it: torchrun sends one to each.
    """
    if is_follower():
        interrupts.before_leaving(_is_said_elsewhere)
    if started_together() and os.environ.get("OMP_NUM_THREADS"):
        os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run, for as long as it is open. An error within it ends all ranks.

    Raises the error on the rank that has failed first, and ElsewhereError with its exit code on all others: on those
    that it has broken an exchange of, and on those that are stopped because of it.
    """
    if not started_together():
        yield ALONE
        return
    ranks = _join()

    def interrupted() -> bool:
        return ranks.fail(INTERRUPTED) is not None

    interrupts.forget(_is_said_elsewhere)
    interrupts.before_leaving(interrupted)
    try:
        yield ranks
    except BaseException as e:
        code = INTERRUPTED if isinstance(e, KeyboardInterrupt) else getattr(e, "exit_code", 1)
        interrupts.ending()  # torchrun signals all others when the first rank ends
        first = None if isinstance(e, ElsewhereError) else ranks.fail(code)
        if first is not None or isinstance(e, ElsewhereError):
            interrupts.before_leaving(_is_said_elsewhere)
        _leave()  # wakes those that wait for this rank
        ranks.end()
        if first is not None:
            raise first from e
        raise
    finally:
        interrupts.forget(interrupted)
    _leave()


def _join() -> Together:
    import torch
    import torch.distributed as dist

    distributed: Any = dist  # it does not declare all that it documents

    wait = datetime.timedelta(seconds=_number(TIMEOUT_VARIABLE, TIMEOUT_SECONDS))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        joining = max(wait, datetime.timedelta(seconds=_JOIN_SECONDS))
        store, rank, size = next(distributed.rendezvous("env://", timeout=joining))
        store.set_timeout(wait)
        dist.init_process_group(
            backend, store=distributed.PrefixStore("group", store), rank=rank, world_size=size, timeout=wait
        )
    except (RuntimeError, ValueError) as e:
        raise ResourceError(f"the ranks cannot reach each other: {' '.join(str(e).split())[:160]}") from e
    return Together(rank, size, distributed.PrefixStore("streamprune", store))


def _leave() -> None:
    import torch.distributed as dist

    with suppress(RuntimeError):
        dist.destroy_process_group()


def _is_said_elsewhere() -> bool:
    return True


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default
