"""What becomes of an error within an exchange between ranks: the rank that knows says why, the others that it has."""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from streamprune.cli import main
from streamprune.errors import CheckpointError, ElsewhereError, ResourceError, UsageError
from streamprune.process import interrupts, ranks, torchrun
from streamprune.process.ranks import Together

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
CLOSED = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40142. This is typically caused by"
RESET = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:22401: Connection reset by peer. This is typically"
LATE = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"
NO_MEMORY = r"rank 1 ran out of memory while it exchanged data with other ranks; free some and run the same command"

Failing = Callable[[BaseException], None]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Together:
    """Rank 1 of 2, with a store but with nobody at the other end."""
    monkeypatch.setattr(ranks, "_NEWS_SECONDS", 0.01)
    return Together(1, 2, dist.HashStore())


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Makes every gather raise an error."""

    def make(error: BaseException) -> None:
        def gather(*_: Any) -> None:
            raise error

        monkeypatch.setattr(dist, "all_gather_object", gather)

    return make


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(ALLOCATOR), NO_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), NO_MEMORY),
        (RuntimeError("NCCL error in: x.cpp:1, unhandled cuda error. Cuda failure 2 'out of memory'"), NO_MEMORY),
        (MemoryError(), NO_MEMORY),
        (RuntimeError(CLOSED), "another rank has died or cannot be reached; run the same command again"),
        (RuntimeError(RESET), "another rank has died or cannot be reached; run the same command again"),
        (RuntimeError(LATE), "another rank did not answer in time; run the same command again"),
        (RuntimeError("sizes\ndiffer"), "rank 1 could not exchange data with other ranks: sizes differ; run the same"),
    ],
)
def test_what_is_said_of_an_exchange_that_fails(
    rank: Together, failing: Failing, error: BaseException, said: str
) -> None:  # fmt: skip
    failing(error)
    with pytest.raises(ResourceError, match=said):
        rank.gather(1)


def test_who_lacks_memory_says_so_whatever_others_have_said(rank: Together, failing: Failing) -> None:
    assert Together(0, 2, rank._store).fail(CheckpointError.exit_code) is None
    failing(RuntimeError(ALLOCATOR))
    with pytest.raises(ResourceError, match=NO_MEMORY):
        rank.gather(1)


@pytest.mark.parametrize("text", [CLOSED, LATE, "anything else"])
def test_the_error_of_another_rank_is_found(rank: Together, failing: Failing, text: str) -> None:
    Together(0, 2, rank._store).fail(CheckpointError.exit_code)
    failing(RuntimeError(text))
    with pytest.raises(ElsewhereError) as found:
        rank.gather(1)
    assert found.value.exit_code == CheckpointError.exit_code


def test_a_signal_within_an_exchange_is_no_other_error(rank: Together, failing: Failing) -> None:
    failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        rank.gather(1)


@pytest.mark.parametrize(("first", "second"), [({"tune": "block"}, {}), ({}, {"tune": "block"})])
def test_a_setting_that_only_one_rank_has(
    rank: Together, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], second: dict[str, Any]
) -> None:
    monkeypatch.setattr(rank, "gather", lambda mine: [(0, {"verb": "prune"} | first), mine])
    with pytest.raises(UsageError, match=r"^rank 1 is given another job than rank 0: tune is \w+ here and \w+ there"):
        rank.agreed(lambda: None, lambda _: {"verb": "prune"} | second)


@pytest.fixture
def joined(rank: Together, monkeypatch: pytest.MonkeyPatch) -> Together:
    """The same as what `torchrun.joined` opens."""
    monkeypatch.setattr(torchrun, "started_together", lambda: True)
    monkeypatch.setattr(torchrun, "_join", lambda: rank)
    monkeypatch.setattr(torchrun, "_leave", lambda: None)
    return rank


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ResourceError("no space left"), ValueError("a bug")])
def test_an_error_after_that_of_another_rank_is_not_said(joined: Together, error: BaseException) -> None:
    """As torchrun stops the others, each would say that it was interrupted. The exit code is that of the first one."""
    Together(0, 2, joined._store).fail(CheckpointError.exit_code)
    with pytest.raises(ElsewhereError) as found, torchrun.joined():
        raise error
    assert found.value.exit_code == CheckpointError.exit_code


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ResourceError("no space left"), 5)])
def test_the_first_error_is_said_and_left_to_the_others(joined: Together, error: BaseException, code: int) -> None:
    with pytest.raises(type(error)), torchrun.joined():
        raise error
    left = Together(0, 2, joined._store).fail(1)
    assert left is not None and left.exit_code == code


@pytest.mark.parametrize("another", [True, False])
def test_a_signal_that_ends_a_rank_at_once(joined: Together, monkeypatch: pytest.MonkeyPatch, another: bool) -> None:
    """It is told to the other ranks, and said if none of them has failed before."""
    said, codes = list[bytes](), list[int]()
    monkeypatch.setattr(os, "write", lambda _, line: said.append(line))
    monkeypatch.setattr(os, "_exit", codes.append)
    other = Together(0, 2, joined._store)
    if another:
        other.fail(CheckpointError.exit_code)
    with torchrun.joined():
        interrupts.leave(15, None)
    left = other.fail(1)
    assert codes == [130] and said == ([] if another else [b"streamprune: error: interrupted\n"])
    assert another or (left is not None and left.exit_code == 130)


def test_a_rank_that_torchrun_ends_before_it_has_joined(joined: Together, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 says why, or torchrun does; once they have joined, whoever is the first to know."""
    said, codes = list[bytes](), list[int]()
    monkeypatch.setattr(os, "write", lambda _, line: said.append(line))
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(torchrun, "is_follower", lambda: True)
    torchrun.prepare_environment()
    interrupts.leave(15, None)
    assert codes == [130] and not said
    with torchrun.joined():
        interrupts.leave(15, None)
    assert codes == [130, 130] and len(said) == 1


@pytest.mark.parametrize("error", [ResourceError("no space left"), ElsewhereError(5)])
def test_torchrun_does_not_keep_a_rank_from_saying_why(joined: Together, error: Exception) -> None:
    """It sends a signal to those that have not ended yet as soon as one has: the first one is ignored."""
    with interrupts.listening(program=False):
        with pytest.raises(type(error)), torchrun.joined():
            raise error
        os.kill(os.getpid(), signal.SIGTERM)
        assert not interrupts.was_interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    interrupts.forget(torchrun._is_said_elsewhere)


def test_a_refused_command_is_left_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for torchrun to end them, so that it does not end rank 0 before that has said why."""
    waited = list[float]()
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(torchrun, "started_together", lambda: True)
    for rank, error in (("0", UsageError), ("1", ElsewhereError)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(error):
            torchrun.settle_ranks(Namespace(command="inspect", quiet=False))
    assert waited == [torchrun._REFUSED_SECONDS]


@contextmanager
def _raising(error: BaseException) -> Iterator[Any]:
    raise error
    yield


@pytest.mark.parametrize(("error", "line"), [(KeyboardInterrupt(), True), (ElsewhereError(130), False)])
def test_an_interrupted_rank_says_so_unless_another_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, line: bool
) -> None:
    """Whichever it is: rank 0 hears nothing of a signal that is sent to rank 1."""
    monkeypatch.setattr("streamprune.pruning.job.joined", lambda: _raising(error))
    monkeypatch.setattr(interrupts, "was_interrupted", lambda: True)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert main(["calibrate", "model", "out"]) == 130
    said = "streamprune: error: interrupted; run the same command again to resume\n" if line else ""
    assert capsys.readouterr().err == said
