"""The arguments of every command, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, TypeVar

from streamprune.errors import UsageError
from streamprune.methods.recipes import Recipe
from streamprune.process.completion import SHELLS, PrintCompletion
from streamprune.settings import Calibration, Resources, flags_of

EXIT_CODES = """exit codes:
  0    done, or already done
  1    an error in streamprune itself (run again with --debug and report it), or its output is not read to the end
  2    wrong arguments, pattern, sparsity or text; inspect --expect not met
  3    bad checkpoint: missing, malformed, truncated, NaN or Inf
  4    valid checkpoint of a kind that is not supported
  5    not enough RAM, VRAM or disk; or writing failed, or another rank has died
  6    OUT cannot be written, belongs to another job, or was not made by streamprune
  7    a file that streamprune wrote is damaged
  69   the Hugging Face hub cannot be reached, or refuses
  75   another run holds the lock on OUT: try later
  130  interrupted by Ctrl-C or SIGTERM; the same command resumes
"""

Handler = Callable[[argparse.Namespace], int]
Group = argparse._ActionsContainer
Settings = TypeVar("Settings")


class _Parser(argparse.ArgumentParser):
    """Reports wrong arguments in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"streamprune: error: {message}; see {self.prog} --help\n")


def make_parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """The parser of all commands. `args.handler` is the entry of `handlers` for the command given."""
    parser = _Parser(
        prog="streamprune", description="Prune safetensors causal LMs larger than memory, one layer at a time.",
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"streamprune {_version()}")
    parser.add_argument(
        "--print-completion", action=PrintCompletion, choices=SHELLS, metavar="SHELL", default=argparse.SUPPRESS,
        help="print a script that completes commands and options in bash or zsh",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, model: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if model:
            p.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hugging Face hub")
        p.set_defaults(handler=handlers[name])
        return p

    _prune_options(add("prune", "prune the checkpoint MODEL and write the result to the folder OUT"))
    _calibrate_options(add("calibrate", "write statistics of MODEL's activations to the file STATS, for prune --stats"))
    _eval_options(add("eval", "measure the perplexity of MODEL on a text, or its scores on tasks"))
    p = add("inspect", "show the sparsity, pattern, faults and size of each linear of MODEL, which may be packed")
    _inspect_options(p)
    _filter_options(p)
    p = add("plan", "predict the memory, disk space and time that pruning MODEL takes; measures for about two seconds")
    _job_options(p)
    p.add_argument("--nproc", type=int, default=1, metavar="N",
                   help="ranks that share the work under torchrun (default: %(default)s)")  # fmt: skip
    _report_options(
        add(
            "report",
            "write an HTML page about OUT, a finished output of prune, or about several side by side",
            model=False,
        )
    )
    p = add("pack", "pack the pruned checkpoint MODEL into OUT for storage and transfer: nonzeros and bitmasks")
    _out_argument(p)
    _restart_option(p)
    _link_option(p)
    p.add_argument("--layout", default="auto", choices=("auto", "sparse-24-bitmask", "sparse-bitmask"),
                   help="layout of compressed-tensors up to 0.14 (default: by whether 2:4 holds)")  # fmt: skip
    p = add("unpack", "unpack the packed checkpoint MODEL into OUT, exactly as it was before packing")
    _out_argument(p)
    _restart_option(p)
    _upload_options(add("upload", "upload OUT, a finished output, to the Hugging Face hub as NAME", model=False))
    add(
        "demo",
        "prune the small model that is part of streamprune, and compare its perplexity before and after",
        model=False,
    )
    for name, p in commands.choices.items():
        still = "only the result and errors" if name == "eval" else "no summary, only errors"
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        p.add_argument("--quiet", "-q", action="store_true", help=f"print no progress, {still}")
        p.add_argument("--debug", action="store_true", help="print a traceback before an error")
    return parser


def _out_argument(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="folder to write; appears only when it is complete")


def _restart_option(p: Group, name: str = "OUT") -> None:
    p.add_argument("--restart", action="store_true", help=f"discard unfinished work for {name} and start again")


def _link_option(p: Group) -> None:
    p.add_argument("--follow-links", action="store_true",
                   help="also copy side files that are symlinks to files outside of MODEL")  # fmt: skip


def _prune_options(p: argparse.ArgumentParser) -> None:
    _out_argument(p)
    _job_options(p, saves=True)
    output = p.add_argument_group("output")
    output.add_argument("--shard-size", default="5GB", metavar="SIZE",
                        help="largest size of a shard; if all weights fit into one, a single file without an index is "
                             "written (default: %(default)s)")  # fmt: skip
    _link_option(output)
    _restart_option(output)
    output.add_argument(
        "--dry-run", action="store_true",
        help="make all checks that come before the work and print what `plan` predicts, but write nothing; the exit "
             "code is that of the job's start",
    )  # fmt: skip
    _zeros_option(p)


def _job_options(p: argparse.ArgumentParser, saves: bool = False) -> None:
    """What `prune` and `plan` have in common; `saves` adds --save-stats."""
    what = p.add_argument_group("what is pruned")
    amount = what.add_mutually_exclusive_group()
    amount.add_argument(
        "--sparsity", type=float, metavar="S", help="share of the weights to prune in every row, 0 ≤ S < 1"
    )
    amount.add_argument("--pattern", metavar="N:M", help="keep N of every M consecutive weights of a row, such as 2:4")
    _filter_options(what)
    add_settings(what, Recipe, only=("mtp",), with_defaults=False)
    how = p.add_argument_group("method")
    how.add_argument("--method", default="swiftprune", metavar="RECIPE",
                     help="recipes that only choose the weights to prune: swiftprune (default), hwpq (the same, in "
                          "FP8), wanda, magnitude; recipes that also give the kept weights new values: "
                          "swiftprune-tuned, obs-admm-tuned, obs-admm, gradual-cg, admm, sparsegpt")  # fmt: skip
    add_settings(how, Recipe, only=("score", "selector", "refit", "damping", "allocate"), with_defaults=False)
    add_settings(how, Recipe, only=("replace_tokens",), with_defaults=False)
    tuning = p.add_argument_group("tuning of whole layers")
    add_settings(tuning, Recipe, only=("tune", "tune_epochs", "tune_lr"), with_defaults=False)
    fp8 = p.add_argument_group("FP8")
    add_settings(fp8, Recipe, only=("quantize", "fp8_scale", "fp8_rounding"), with_defaults=False)
    given = _calibration_options(p)
    given.add_argument(
        "--stats", metavar="FILE", help="use the statistics in this file, made by `calibrate`, instead of calibrating"
    )
    if saves:
        given.add_argument("--save-stats", metavar="FILE", help="also save the statistics, for prune --stats")
    given.add_argument(
        "--propagate", choices=("dense", "pruned", "asymmetric"),
        help="whose outputs the next layer is calibrated on: those of the dense layer (default if no weight gets a new "
             "value), of the pruned layer (default for sparsegpt), or asymmetric: both, so that new values also "
             "compensate for errors of earlier layers (default for other refits and --tune)",
    )  # fmt: skip
    _fetch_option(_resource_options(p))


def _calibrate_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="STATS", help="safetensors file to write; appears only when it is complete")
    _restart_option(p, "STATS")
    _calibration_options(p)
    _zeros_option(p)
    _fetch_option(_resource_options(p))


def _eval_options(p: argparse.ArgumentParser) -> None:
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="text to evaluate on, in any format of prune's --calib")
    what.add_argument("--tasks", metavar="NAMES",
                      help="tasks of lm-eval, separated by commas (pip install 'streamprune[tasks]')")  # fmt: skip
    add_settings(p, Calibration, only=("text_field", "bos", "seqlen"))
    p.add_argument(
        "--windows", type=int, metavar="N", help="evaluate only the first N windows of the text (default: all)"
    )
    tasks = p.add_argument_group("with --tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="number of examples before each document")
    tasks.add_argument("--limit", type=float, metavar="N",
                       help="use only the first N documents of each task, or this fraction of them")  # fmt: skip
    tasks.add_argument("--include-path", metavar="FOLDER", help="folder with more tasks, as lm_eval's --include_path")
    p.add_argument(
        "--reference", metavar="DENSE",
        help="also compare MODEL's predictions, or its scores, with those of this model, which must have the same "
             "tokenizer",
    )  # fmt: skip
    p.add_argument(
        "--by-window", action="store_true",
        help="with --json, also print each window's loss in nats per token, to compare models window by window",
    )  # fmt: skip
    _resource_options(p, "device", "dtype", "max_ram", "max_vram", "work")


def check_eval(args: argparse.Namespace) -> None:
    """Raises UsageError for what is said of tasks beside a text, of a text beside tasks, or of JSON that is not asked
    for."""
    of_others = ("num_fewshot", "limit", "include_path") if args.tasks is None else (
        "windows", "by_window", "text_field",
    )  # fmt: skip
    for name in of_others:
        value = getattr(args, name)
        if value is not None and value is not False and value != Calibration.text_field:
            what = "--tasks" if args.tasks is None else "--text"
            raise UsageError(f"--{name.replace('_', '-')} is for {what}; leave it out")
    if args.by_window and not args.json:
        raise UsageError("--by-window adds to what --json prints; add that, or leave it out")


def _inspect_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--expect", metavar="WHAT", action="append",
        help="exit with 2 unless every linear (in an output of prune, every one that was pruned) has this pattern "
             "(2:4), sparsity (0.5) or format (fp8), or all of several: 2:4,fp8; with --against, also if anything but "
             "linears differs",
    )  # fmt: skip
    p.add_argument(
        "--against", metavar="SOURCE",
        help="also compare every tensor with this checkpoint (folder or hub name), which MODEL was made from",
    )  # fmt: skip


def _report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("outs", metavar="OUT", nargs="+", help="folder of a finished output of prune, packed or not")
    p.add_argument(
        "--output", "-o", metavar="FILE", required=True, help="HTML file to write; an existing one is replaced"
    )
    p.add_argument("--against", metavar="OUT", nargs="+", default=None,
                   help="more such folders, shown side by side with the first OUT")  # fmt: skip
    p.add_argument("--eval", metavar="FILE", action="append",
                   help="also show the output of `eval --json` in this file; may be given several times")  # fmt: skip


def _upload_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", metavar="OUT", help="folder of a finished output of prune, pack or unpack")
    p.add_argument("name", metavar="NAME", help="name on the hub: org/model, or model for one of your own")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument("--dry-run", action="store_true", help="make all checks, but send nothing")


def _filter_options(p: Group) -> None:
    p.add_argument(
        "--only", metavar="REGEX", help="only linears whose names contain a match of this regular expression"
    )
    p.add_argument("--skip", metavar="REGEX", help="leave out linears whose names contain a match")


def _calibration_options(p: argparse.ArgumentParser) -> Group:
    group = p.add_argument_group("calibration")
    add_settings(group, Calibration)
    return group


def _fetch_option(p: Group) -> None:
    p.add_argument(
        "--fetch", default="whole", choices=("whole", "stream"),
        help="for a MODEL on the hub: download it first (default), or stream: fetch each shard when it is needed and "
             "drop it afterwards, so that the disk needs room for the output and two shards",
    )  # fmt: skip


def _zeros_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--allow-zeros", action="store_true",
        help="accept linears that are all zeros, in whole or in a long run of rows; they are refused as a sign of a "
             "broken download",
    )  # fmt: skip


def _resource_options(p: argparse.ArgumentParser, *only: str) -> Group:
    group = p.add_argument_group("resources")
    add_settings(group, Resources, only=only)
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the checkpoint"
    )
    return group


def add_settings(p: Group, settings: type, *, only: Collection[str] = (), with_defaults: bool = True) -> None:
    """Adds a flag for each field of `settings`, or for those named by `only`.

    Without defaults, a flag that is not given is None.
    """
    for name, default, flag in flags_of(settings):
        if not only or name in only:
            how: dict[str, Any] = {"metavar": flag.metavar} if flag.metavar else {}
            how |= {"choices": flag.choices} if flag.choices else {}
            how |= {"type": flag.kind} if flag.kind else {}
            p.add_argument(flag.name, dest=name, default=default if with_defaults else None, help=flag.help, **how)


def settings_of(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """An object of the class `settings`, from its flags. Raises UsageError for invalid values."""
    return settings(**{name: getattr(args, name) for name, *_ in flags_of(settings) if hasattr(args, name)})


def _version() -> str:
    from streamprune.process.versions import version_of

    return version_of("streamprune")
