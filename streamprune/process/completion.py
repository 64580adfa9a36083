"""Completion of the command line in a shell: a script that shtab makes of the parser, once, so that starting costs
nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from streamprune.errors import UsageError

SHELLS = ("bash", "zsh")
_FILES = {"FILE", "STATS"}
_FOLDERS = {"MODEL", "OUT", "DIR", "FOLDER", "DENSE", "SOURCE"}
"""Metavars of arguments that are a file or a folder."""


class PrintCompletion(argparse.Action):
    """An option that prints the script of a shell and ends the program. Raises UsageError where shtab is missing."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        try:
            import shtab
        except ImportError:
            raise UsageError(
                f"{option_string} needs shtab, which is not installed: pip install 'streamprune[completion]'"
            ) from None
        name_paths(parser, shtab.FILE, shtab.DIRECTORY)
        print(shtab.complete(parser, shell=str(values)))
        parser.exit()


def name_paths(parser: argparse.ArgumentParser, file: object, folder: object) -> None:
    """Tells a parser and those of its commands which arguments are files, and which are folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                name_paths(command, file, folder)
        elif action.metavar in _FILES or action.metavar in _FOLDERS:
            action.complete = file if action.metavar in _FILES else folder  # type: ignore[attr-defined]
