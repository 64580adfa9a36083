"""Benchmarks, each compared with a baseline: copying, a plain forward pass, or the sorting that others do.

    python tools/bench.py kernels --large                    selection kernels against memcpy, sort, topk
    python tools/bench.py refits --shape 1024x4096           refits against one product with the Gram
    python tools/bench.py stats --preset 7b --layers 4       prune --stats against cp -r
    python tools/bench.py startup                            how soon commands begin, against importing torch
    python tools/bench.py calibration --preset 1b            calibration against a bare forward of the same layer
    python tools/bench.py tuning --preset 1b                 tuning against bare forward and backward passes
    python tools/bench.py eval --checkpoint smollm2          eval against transformers' own pass of the same windows
    python tools/bench.py memory                             peak memory against layers, --max-ram, --max-vram
    python tools/bench.py end-to-end --preset 1b --layers 4  the whole prune, and what plan said
    python tools/bench.py ranks --preset 1b --threads 1      one rank against two under torchrun
    python tools/bench.py peers --peer peer/bin/python       the same prune by llm-compressor
    python tools/bench.py all --quick                        each of them on small shapes, in a minute or two

Every figure is the median of several runs, with minimum and maximum, and the ratio to a baseline that was measured in
alternation with it. Output is a table, in Markdown with --markdown, or with --json one object per line, the machine
first. A new subcommand is a function that yields rows (bench_rig.figure) and an entry in COMMANDS.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from pathlib import Path
from subprocess import SubprocessError
from typing import NoReturn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from bench_rig import BenchError, Row, machine, say  # noqa: E402

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A subcommand: module and functions, extra table columns, default repeats, and arguments when run by `all`."""

    module: str
    measure: str
    options: str
    help: str
    repeat: int
    columns: Mapping[str, str] = field(default_factory=dict)
    small: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


_QUICK = ("--preset", "narrow", "--layers", "3", "--samples", "8", "--seqlen", "512", "--repeat", "1")
COMMANDS = {
    "kernels": Command(
        "bench_kernels", "kernels", "add_options", "selection kernels against memcpy, sorting, topk", 7,
        {"sort ÷ it": "sort_over_it", "topk ÷ it": "topk_over_it", "group topk ÷ it": "group_topk_over_it"},
        ("--shape", "4096x4096"), ("--shape", "1024x4096", "--repeat", "3"),
    ),
    "refits": Command(
        "bench_refits", "refits", "add_options", "refits of one linear against one product with its Gram", 3,
        {}, ("--shape", "512x4096"), ("--shape", "128x512", "--repeat", "1"),
    ),
    "stats": Command(
        "bench_jobs", "stats", "add_stats_options", "prune --stats against cp -r and fsync", 5, {"GB/s": "gb_per_s"},
        ("--layers", "4"), ("--preset", "narrow", "--repeat", "2"),
    ),
    "startup": Command(
        "bench_startup", "startup", "add_options", "how soon commands begin, against importing torch and numba", 5,
        {}, (), ("--repeat", "1"),
    ),
    "calibration": Command(
        "bench_forward", "calibration", "add_calibration_options", "calibration against a bare forward", 3,
        {"TFLOP/s": "tflop_per_s", "% of bare": "percent_of_bare"},
        ("--layers", "3"), _QUICK,
    ),
    "tuning": Command(
        "bench_tuning", "tuning", "add_options", "tuning against bare forward and backward passes", 3,
        {"% of bare": "percent_of_bare"},
        ("--samples", "16"), ("--preset", "narrow", "--samples", "8", "--seqlen", "128", "--repeat", "1"),
    ),
    "eval": Command(
        "bench_eval", "evaluation", "add_options", "eval against transformers with the model in memory", 3,
        {"% of its speed": "percent_of_theirs"},
        ("--layers", "3"), ("--preset", "narrow", "--samples", "8", "--seqlen", "128", "--repeat", "1"),
    ),
    "memory": Command(
        "bench_jobs", "memory", "add_memory_options", "peak memory against layers and limits", 3,
        {"seen outside": "vmhwm_mib", "checkpoint": "checkpoint_mib", "batch": "batch", "s": "seconds",
         "whole device": "device_mib"},
        (), ("--layers", "2", "8", "--limits", "2", "--repeat", "1"),
    ),
    "end-to-end": Command(
        "bench_forward", "end_to_end", "add_end_to_end_options", "the whole prune, and what plan said", 3,
        {"÷ prune": "over_prune", "peak MiB": "peak_mib"},
        ("--layers", "3", "--samples", "4"),
        _QUICK,
    ),
    "ranks": Command(
        "bench_ranks", "ranks", "add_options", "one rank against several under torchrun", 3,
        {"times as fast": "times", "% of it waiting": "waited_percent"},
    ),
    "peers": Command("bench_peers", "peers", "add_options", "the same prune by llm-compressor, if it is installed", 3),
}  # fmt: skip
APART = {"ranks", "peers"}
"""Not part of `all`, as they need cores for several ranks, or other programs."""


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{message}; see {self.prog} --help")


def make_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all subcommands; with `only`, the options of no other are looked up."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help, description=command.help)
        _common(sub, command.repeat)
        if only in (None, name):
            getattr(import_module(command.module), command.options)(sub)
    sub = commands.add_parser("all", help="each of them, on small shapes", description="all of the above")
    _common(sub, None)
    sub.add_argument("--quick", action="store_true", help="smaller shapes, fewer runs: a minute or two")
    return parser


def _common(parser: argparse.ArgumentParser, repeat: int | None) -> None:
    parser.add_argument("--repeat", type=int, default=repeat, metavar="N",
                        help="measured runs of everything" + (" (default: %(default)s)" if repeat else ""))  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    parser.add_argument(
        "--work", metavar="DIR", help="folder for checkpoints, removed at the end (default: the system's)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line, the machine first")
    form.add_argument("--markdown", action="store_true", help="tables in Markdown")


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of a subcommand, each with its name as `benchmark`."""
    if arguments.command != "all":
        if arguments.repeat < 1:
            raise BenchError(f"--repeat {arguments.repeat}: at least 1")
        command = COMMANDS[arguments.command]
        for row in getattr(import_module(command.module), command.measure)(arguments):
            yield {"benchmark": arguments.command} | row
        return
    for name, command in ((n, c) for n, c in COMMANDS.items() if n not in APART):
        given = [*(command.quick if arguments.quick else command.small), "--device", arguments.device]
        given += ["--repeat", str(arguments.repeat)] if arguments.repeat is not None else []
        given += ["--work", arguments.work] if arguments.work else []
        yield from measure(make_parser(name).parse_args([name, *given]))


# ---- output


def show(rows: Iterator[Row], arguments: argparse.Namespace) -> None:
    """Prints the machine, then rows as they come in JSON, or a table for each thing that was worked on."""
    if arguments.json:
        print(json.dumps(machine()), flush=True)
        for row in rows:
            say("")
            print(json.dumps(row), flush=True)
        return
    here = machine()
    memory = f"{here['ram_bytes'] / 2**30:.0f} GiB, " if here["ram_bytes"] else ""
    gpu = f"{here['gpu']}, " if here["gpu"] else ""
    versions = ", ".join(f"{name} {here[name]}" for name in ("torch", "numpy", "numba", "transformers"))
    print(
        f"{here['processor']}, {here['threads']} threads, {memory}{gpu}{versions}, commit {here['commit']}", flush=True
    )
    for (benchmark, on), group in groupby(rows, key=lambda row: (row["benchmark"], row["on"])):
        found = list(group)
        say("")
        print(f"\n{'**' * arguments.markdown}{benchmark}: {on}{'**' * arguments.markdown}\n")
        print(_table(found, COMMANDS[benchmark].columns, arguments.markdown), flush=True)


def _table(rows: list[Row], extra: Mapping[str, str], markdown: bool) -> str:
    """Cases down, figures across; columns that no row has are left out."""
    from streamprune.tables import table

    extra = {title: key for title, key in extra.items() if any(key in row for row in rows)}
    head = ["", rows[0]["unit"], "min … max", f"÷ {rows[0]['baseline']}", "min … max", *extra]
    cells = [
        [
            row["case"], number(row["value"]), f"{number(row['min'])} … {number(row['max'])}", number(row["ratio"]),
            f"{number(row['ratio_min'])} … {number(row['ratio_max'])}",
            *(number(row[key]) if key in row else "" for key in extra.values()),
        ]
        for row in rows
    ]  # fmt: skip
    if not markdown:
        return table(head, cells)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """Three digits, more only before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code: 2 with one line when it cannot be run."""
    from streamprune.errors import StreampruneError

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        words = sys.argv[1:] if argv is None else argv
        arguments = make_parser(next((w for w in words if w in COMMANDS), "all")).parse_args(words)
        show(measure(arguments), arguments)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BenchError, StreampruneError, OSError, RuntimeError, ValueError, SubprocessError) as e:
        return _fail(" ".join(str(e).split()) or type(e).__name__, 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    say("")
    print(f"bench: error: {message}", file=sys.stderr)
    return code


def run() -> None:
    """Runs main with the settings of the program, so that what it is compared with has them too; before torch comes."""
    from streamprune.__main__ import _steady_heap

    _steady_heap()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())


if __name__ == "__main__":
    run()
