"""Environments in which the libraries fail with misleading errors."""

from __future__ import annotations

import os
import sys

from streamprune.errors import UsageError


def check_environment() -> None:
    """Raises UsageError for environments in which torch, transformers or numba fail with misleading errors."""
    if sys.flags.optimize >= 2:
        raise UsageError(
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which transformers needs; run it without"
        )
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise UsageError("NUMBA_DISABLE_JIT is set, and the kernels must be compiled; unset it")
    try:
        os.getcwd()  # noqa: PTH109
    except FileNotFoundError:
        raise UsageError("the working directory has been removed; change to another one") from None
