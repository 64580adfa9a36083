"""Versions of the packages that a result was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """Its version, or "not installed": this program may be run from its source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
