"""The command line: arguments in, tables or JSON on stdout, progress and errors on stderr, an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from streamprune.arguments import Handler, make_parser
from streamprune.commands import COMMANDS
from streamprune.disk.hub import as_folder, is_offline
from streamprune.disk.places import settle_hub_caches
from streamprune.errors import INTERRUPTED, CheckpointError, ElsewhereError, StreampruneError, UsageError
from streamprune.process import interrupts
from streamprune.process.console import print_stderr
from streamprune.process.environment import check_environment
from streamprune.process.output import forget_output, output
from streamprune.process.torchrun import settle_ranks


def main(argv: Sequence[str] | None = None, *, program: bool = False) -> int:
    """Runs one command; returns its exit code. `program`: this is the whole process, which signals may end."""
    args = argparse.Namespace(command="", debug=False)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with interrupts.listening(program):
            try:
                settle_hub_caches(os.environ)
                args = _parsed(argv)
                check_environment()
                settle_ranks(args)
                _announce_downloads(args)
                handler: Handler = args.handler
                return handler(args)
            except Exception as e:
                if interrupts.was_interrupted() and not isinstance(e, ElsewhereError):
                    # a library has turned KeyboardInterrupt into another error
                    raise KeyboardInterrupt from e
                return _refused(args, e)
    except KeyboardInterrupt as e:
        resumes = args.command in ("prune", "calibrate", "pack", "unpack", "upload")
        return _fail(args, e, "interrupted" + "; run the same command again to resume" * resumes, INTERRUPTED)


def _announce_downloads(args: argparse.Namespace) -> None:
    """Says which models come from the hub, as a download may take hours; on a terminal, lets it show bars."""
    given = [getattr(args, what, None) for what in ("model", "reference", "against")]
    names: list[str] = []
    if getattr(args, "fetch", "whole") == "whole" and not is_offline():
        with contextlib.suppress(CheckpointError):  # which the command will raise
            names = [name for name in given if isinstance(name, str) and as_folder(name) is None]
    for name in () if args.quiet else names:
        print_stderr(f"{args.command}: downloads {name} from the Hugging Face hub, unless its cache has it")
    transfers = bool(names) or args.command == "upload"
    if not transfers or args.quiet or sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _refused(args: argparse.Namespace, error: Exception) -> int:
    if isinstance(error, StreampruneError):
        return _fail(args, error, str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        forget_output()
        return 1
    if isinstance(error, PermissionError) and error.filename is not None:
        mend = "give this user access to it, or name another place"
        return _fail(args, error, f"{error.filename}: {error.strerror}; {mend}", UsageError.exit_code)
    what = " ".join(str(error).split())[:300]
    return _fail(args, error, f"unexpected {type(error).__name__}: {what}; run again with --debug for a traceback", 1)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    try:
        return build_parser().parse_args(argv)
    except SystemExit:  # after --help, --version, or an error that has been printed
        with output():
            raise


def _fail(args: argparse.Namespace, error: BaseException, message: str, code: int) -> int:
    if args.debug:
        print_stderr("".join(traceback.format_exception(error)).rstrip())
    if not isinstance(error, ElsewhereError):
        print_stderr(f"streamprune: error: {' '.join(message.split())}")
    return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return make_parser(COMMANDS)
