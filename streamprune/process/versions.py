"""Versions of installed packages."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """The version of `package`, or "not installed", as streamprune itself may be when run from its source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a job's bytes may depend on."""
    names = ("streamprune", "torch", "transformers", "numba", "numpy", "safetensors")
    return {"python": platform.python_version()} | {name: version_of(name) for name in names}
