"""The arguments of every command, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar

from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe
from streamprune.settings import Calibration, Resources, flags_of

EXIT_CODES = """exit codes:
  0    done, or already done
  1    an error in streamprune itself (run again with --debug and report it)
  2    wrong arguments, pattern, sparsity or text; inspect --expect not met
  3    bad checkpoint: missing, malformed, truncated, NaN or Inf
  4    sound checkpoint of a kind that cannot be pruned
  5    not enough RAM, VRAM or disk
  6    OUT belongs to another job, or is not ours
  7    a file of ours is damaged
  75   another run holds the lock on OUT: try later
  130  interrupted; the same command resumes
"""

Handler = Callable[[argparse.Namespace], int]
Group = argparse._ActionsContainer
Settings = TypeVar("Settings")


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"streamprune: error: {message}; see {self.prog} --help\n")


def make_parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """The parser of all commands; each stores its handler, found under its name."""
    parser = _Parser(
        prog="streamprune", description="Prune any safetensors causal LM out of core, one layer at a time.",
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"streamprune {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, model: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if model:
            p.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or its name on the hub")
        p.set_defaults(handler=handlers[name])
        return p

    _prune_options(add("prune", "prune MODEL into OUT"))
    _calibrate_options(add("calibrate", "gather the statistics of MODEL into STATS, for prune --stats"))
    _eval_options(add("eval", "measure the perplexity of MODEL on a text, or its scores on tasks, layer by layer"))
    p = add("inspect", "show sparsity, pattern, faults and bytes of every linear of MODEL, dense or packed")
    _inspect_options(p)
    _filter_options(p)
    _job_options(
        add("plan", "say what pruning MODEL will take: memory, disk, arithmetic, time; measures for about two seconds")
    )
    _report_options(add("report", "make a page to look at of OUT, or of several side by side", model=False))
    p = add("pack", "pack the pruned checkpoint MODEL into OUT, for storing and sending: nonzeros and bitmasks")
    _out_options(p)
    _link_option(p)
    p.add_argument("--layout", default="auto", choices=("auto", "sparse-24-bitmask", "sparse-bitmask"),
                   help="of compressed-tensors up to 0.14 (default: by whether 2:4 holds)")  # fmt: skip
    _out_options(add("unpack", "unpack the packed checkpoint MODEL into OUT, as it was when it was packed"))
    add("demo", "prune the small model that comes with streamprune, and show the result", model=False)
    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        p.add_argument("--quiet", "-q", action="store_true", help="no progress, no summary; errors only")
        p.add_argument("--debug", action="store_true", help="print a traceback before an error")
    return parser


def _out_options(p: argparse.ArgumentParser, name: str = "OUT", what: str = "") -> None:
    p.add_argument("out", metavar=name, help=what or "folder to write; appears only when it is complete")
    p.add_argument("--restart", action="store_true", help=f"throw unfinished work for {name} away")


def _link_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--follow-links", action="store_true",
                   help="carry over side files that are links to places outside of MODEL, too")  # fmt: skip


def _prune_options(p: argparse.ArgumentParser) -> None:
    _out_options(p)
    _link_option(p)
    _job_options(p)
    p.add_argument("--shard-size", default="5GB", metavar="SIZE",
                   help="write shards of up to this size; one file, without an index, where all fits (default: "
                        "%(default)s)")  # fmt: skip
    p.add_argument("--save-stats", metavar="FILE", help="also keep the statistics for later --stats")
    _zeros_option(p)


def _job_options(p: argparse.ArgumentParser) -> None:
    """What prune does, and plan foretells."""
    what = p.add_argument_group("what is pruned")
    amount = what.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, metavar="S", help="prune this share of every row, 0 ≤ S < 1")
    amount.add_argument("--pattern", metavar="N:M", help="keep N of every M consecutive inputs, such as 2:4")
    _filter_options(what)
    how = p.add_argument_group("how")
    how.add_argument("--method", default="swiftprune", metavar="RECIPE",
                     help="swiftprune (default), hwpq (the same in FP8), wanda, magnitude; with new values for the "
                          "weights that stay: swiftprune-tuned, obs-admm, gradual-cg, admm, sparsegpt")  # fmt: skip
    add_settings(how, Recipe, with_defaults=False)
    given = _calibration_options(p)
    given.add_argument("--stats", metavar="FILE", help="use these statistics instead of calibrating")
    given.add_argument(
        "--propagate", choices=("dense", "pruned", "asymmetric"),
        help="whose outputs the next layer is calibrated on: the dense layer's (default without a refit), the pruned "
             "layer's (default of sparsegpt), or both, so that new values also make up for earlier layers (default of "
             "other refits and of --tune)",
    )  # fmt: skip
    _resource_options(p)


def _calibrate_options(p: argparse.ArgumentParser) -> None:
    _out_options(p, "STATS", "safetensors file to write")
    _calibration_options(p)
    _zeros_option(p)
    _resource_options(p)


def _eval_options(p: argparse.ArgumentParser) -> None:
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="text, as prune's --calib")
    what.add_argument("--tasks", metavar="NAMES",
                      help="tasks of lm-eval, separated by commas (pip install 'streamprune[tasks]')")  # fmt: skip
    add_settings(p, Calibration, only=("text_field", "bos", "seqlen"))
    p.add_argument("--windows", type=int, metavar="N", help="only the text's first N windows (default: all)")
    p.add_argument("--num-fewshot", type=int, metavar="N", help="of tasks: examples before each document")
    p.add_argument("--limit", type=float, metavar="N", help="of tasks: only the first N documents, or this share")
    p.add_argument("--include-path", metavar="FOLDER", help="with more tasks, as lm_eval's --include_path")
    p.add_argument(
        "--reference", metavar="DENSE",
        help="also tell how far MODEL's predictions (same tokenizer), or its scores, are from those of this model",
    )  # fmt: skip
    p.add_argument(
        "--by-window", action="store_true",
        help="with --json, also the nats per token of each window, to compare models window by window",
    )  # fmt: skip
    _resource_options(p, "device", "dtype", "max_ram", "max_vram", "work")


def check_eval(args: argparse.Namespace) -> None:
    """Raises UsageError for what is said of tasks beside a text, or of a text beside tasks."""
    of_others = ("num_fewshot", "limit", "include_path") if args.tasks is None else ("windows", "by_window")
    for name in of_others:
        if not any(getattr(args, name) is unset for unset in (None, False)):
            what = "--tasks" if args.tasks is None else "--text"
            raise UsageError(f"--{name.replace('_', '-')} is for {what}; leave it out")


def _inspect_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--expect", metavar="WHAT", action="append",
        help="exit with 2 unless every linear has this pattern (2:4), sparsity (0.5) or format (fp8), or several: "
             "2:4,fp8; with --against, unless nothing but linears differs, too",
    )  # fmt: skip
    p.add_argument(
        "--against", metavar="SOURCE",
        help="also compare every tensor with that of this checkpoint, a folder or a hub name: what MODEL was made from",
    )  # fmt: skip


def _report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("outs", metavar="OUT", nargs="+", help="finished output of prune, packed or not")
    p.add_argument("--output", "-o", metavar="FILE", required=True, help="HTML file to write, or to replace")
    p.add_argument("--eval", metavar="FILE", action="append",
                   help="also show what `eval --json` printed into this file; as often as there are files")  # fmt: skip


def _filter_options(p: Group) -> None:
    p.add_argument("--only", metavar="REGEX", help="only linears whose name matches somewhere")
    p.add_argument("--skip", metavar="REGEX", help="not linears whose name matches somewhere")


def _calibration_options(p: argparse.ArgumentParser) -> Group:
    group = p.add_argument_group("calibration")
    add_settings(group, Calibration)
    return group


def _zeros_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--allow-zeros", action="store_true",
        help="go on where a linear, or a long stretch of its rows, is all zeros, as in a broken download",
    )  # fmt: skip


def _resource_options(p: argparse.ArgumentParser, *only: str) -> None:
    group = p.add_argument_group("resources")
    add_settings(group, Resources, only=only)
    group.add_argument("--trust-remote-code", action="store_true", help="allow the checkpoint's own code to run")


def add_settings(p: Group, settings: type, *, only: Collection[str] = (), with_defaults: bool = True) -> None:
    """A flag for each field of `settings`, or for those named by `only`; without defaults, None is not given."""
    for name, default, flag in flags_of(settings):
        if not only or name in only:
            how: dict[str, Any] = {"metavar": flag.metavar} if flag.metavar else {}
            how |= {"choices": flag.choices} if flag.choices else {}
            how |= {"type": flag.kind} if flag.kind else {}
            p.add_argument(flag.name, dest=name, default=default if with_defaults else None, help=flag.help, **how)


def settings_of(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """The object that the flags of `settings` describe. Raises UsageError for what cannot be."""
    return settings(**{name: getattr(args, name) for name, *_ in flags_of(settings) if hasattr(args, name)})


def _version() -> str:
    from streamprune.process.versions import version_of

    return version_of("streamprune")
