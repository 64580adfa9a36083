"""Versions of installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """The version of `package`, or "not installed", as streamprune itself may be when run from its source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
