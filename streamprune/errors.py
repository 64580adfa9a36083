"""Every error shown to a user, with its exit code.

    StreampruneError            (never raised itself)
    ├── UsageError          2   an argument or a text is wrong; nothing was changed
    ├── CheckpointError     3   MODEL is missing, malformed, truncated or holds NaN/Inf
    ├── UnsupportedError    4   MODEL is valid, but of a kind that cannot be pruned
    ├── ResourceError       5   not enough RAM, VRAM or disk; or writing failed, or another rank has died
    ├── StateError          6   OUT cannot be written, belongs to another job, or was not made by streamprune
    ├── CorruptStateError   7   our own journal, cache, statistics or report is damaged
    ├── HubError           69   the Hugging Face hub cannot be reached, or refuses (EX_UNAVAILABLE)
    ├── LockedError        75   another process is working on the same OUT (EX_TEMPFAIL: try later)
    └── ElsewhereError          another rank of the same run has failed, and has said why: its exit code, no message

Ctrl-C and SIGTERM exit with 130. A message is one line: what, where, why, and the flag or command that mends it.
"""

from __future__ import annotations


class StreampruneError(Exception):
    """Base of all errors with an exit code."""

    exit_code = 1


class UsageError(StreampruneError):
    """A wrong argument, pattern, sparsity or calibration text."""

    exit_code = 2


class CheckpointError(StreampruneError):
    """The source checkpoint is missing or damaged."""

    exit_code = 3


class UnsupportedError(StreampruneError):
    """A valid checkpoint of a kind that streamprune does not handle."""

    exit_code = 4


class ResourceError(StreampruneError):
    """Not enough RAM, VRAM or disk; the message names the smallest sufficient value where it can be known."""

    exit_code = 5


class StateError(StreampruneError):
    """OUT, its unfinished state or its work folder belongs to another job, or cannot be written."""

    exit_code = 6


class CorruptStateError(StreampruneError):
    """A file that streamprune wrote is damaged or of an unknown version."""

    exit_code = 7


class HubError(StreampruneError):
    """The hub cannot be reached, or refuses what is asked of it; unfinished work is kept."""

    exit_code = 69


class LockedError(StreampruneError):
    """Another process holds the lock on OUT."""

    exit_code = 75


class ElsewhereError(StreampruneError):
    """Another rank of a run has failed with `exit_code`, and has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another rank has failed")
        self.exit_code = exit_code


INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""
