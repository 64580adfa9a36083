"""The command line: arguments in, tables or JSON on stdout, progress and errors on stderr, an exit code."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from streamprune.errors import INTERRUPTED, StreampruneError, UsageError

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        handler: Handler = args.handler
        return handler(args)
    except StreampruneError as e:
        return _fail(args, e, str(e), e.exit_code)
    except KeyboardInterrupt as e:
        resumes = args.command in ("prune", "calibrate")
        return _fail(
            args,
            e,
            "interrupted" + ("; run the same command again to resume" if resumes else ""),
            INTERRUPTED,
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:  # noqa: BLE001 - the last resort: one line, never a traceback
        what = " ".join(str(e).split())[:300]
        return _fail(args, e, f"unexpected {type(e).__name__}: {what}; run again with --debug for the place", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(args: argparse.Namespace, error: BaseException, message: str, code: int) -> int:
    if args.debug:
        traceback.print_exception(error)
    print(f"streamprune: error: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"streamprune: error: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each stores its handler."""
    parser = _Parser(
        prog="streamprune", description="Prune any safetensors causal LM out of core, one layer at a time.",
        epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"streamprune {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, handler: Handler, text: str, model: bool = True) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if model:
            p.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or its name on the hub")
        p.set_defaults(handler=handler)
        return p

    p = add("prune", _prune, "prune MODEL into OUT")
    p.add_argument("out", metavar="OUT", help="folder to write; appears only when it is complete")
    _method_options(p)
    _calibration_options(p)
    p.add_argument("--stats", metavar="FILE", help="use these statistics instead of calibrating")
    p.add_argument("--save-stats", metavar="FILE", help="also keep the statistics for later --stats")
    p.add_argument("--propagate", default="dense", choices=("dense", "pruned"),
                   help="which layer's outputs the next layer is calibrated on (default: %(default)s)")  # fmt: skip
    p.add_argument("--restart", action="store_true", help="throw unfinished work for OUT away")
    _resource_options(p)

    p = add("calibrate", _calibrate, "gather the statistics of MODEL into STATS, for prune --stats")
    p.add_argument("out", metavar="STATS", help="safetensors file to write")
    _calibration_options(p)
    p.add_argument("--restart", action="store_true", help="throw unfinished work for STATS away")
    _resource_options(p)

    p = add("eval", _eval, "measure the perplexity of MODEL on a text, layer by layer")
    p.add_argument("--text", metavar="FILE", required=True, help="text (.txt, .gz) or token ids (.npy)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window length (default: min(2048, the model's limit))")
    _resource_options(p, with_kernels=False)

    p = add("inspect", _inspect, "show sparsity and pattern of every linear of MODEL")
    p.add_argument("--expect", metavar="N:M|S", help="exit with 2 unless every linear has this pattern or sparsity")
    _filter_options(p)

    p = add("plan", _plan, "say what pruning MODEL will take: memory, disk, arithmetic, time; reads headers only")
    _filter_options(p)
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window length (default: min(2048, the model's limit))")
    p.add_argument("--stats", metavar="FILE", help="plan for a run with these statistics, without calibration")
    p.add_argument("--propagate", default="dense", choices=("dense", "pruned"), help="as for prune")
    _device_options(p)

    add("demo", _demo, "prune the small model that comes with streamprune, and show the result", model=False)
    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        p.add_argument("--quiet", "-q", action="store_true", help="no progress, no summary; errors only")
        p.add_argument("--debug", action="store_true", help="print a traceback before an error")
    return parser


def _method_options(p: argparse.ArgumentParser) -> None:
    amount = p.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, metavar="S", help="prune this share of every row, 0 ≤ S < 1")
    amount.add_argument("--pattern", metavar="N:M", help="keep N of every M consecutive inputs, such as 2:4")
    p.add_argument("--method", default="swiftprune", metavar="RECIPE",
                   help="swiftprune (default), wanda or magnitude")  # fmt: skip
    p.add_argument("--score", help="another score: lscore, lscore-isotropic, wanda, magnitude")
    p.add_argument("--selector", help="another selector for --sparsity: ewma, exact")
    _filter_options(p)


def _filter_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--only", metavar="REGEX", help="only linears whose name matches somewhere")
    p.add_argument("--skip", metavar="REGEX", help="not linears whose name matches somewhere")


def _calibration_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--calib", metavar="FILE",
                   help='calibration text: .txt, .jsonl with "text", .gz of either, or .npy of token ids '
                        "(default: a built-in text)")  # fmt: skip
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window length (default: min(2048, the model's limit))")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="which windows (default: %(default)s)")


def _device_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                   help="what to compute in (default: the stored dtype where it is fast, else float32)")  # fmt: skip
    p.add_argument("--trust-remote-code", action="store_true", help="allow the checkpoint's own Python code to run")


def _resource_options(p: argparse.ArgumentParser, with_kernels: bool = True) -> None:
    _device_options(p)
    if with_kernels:
        p.add_argument(
            "--backend", default="auto", choices=("auto", "numba", "torch"),
            help="kernels that prune: numba (CPU) or torch (any device); default by device",
        )  # fmt: skip
    p.add_argument("--max-ram", metavar="SIZE", help="resident memory to stay within, such as 4GiB")
    p.add_argument("--work", metavar="DIR", help="folder for the activation cache (a fast disk)")


def _version() -> str:
    from importlib.metadata import version

    return version("streamprune")


def _resources(args: argparse.Namespace) -> dict[str, Any]:
    from streamprune.spec import parse_bytes

    return {
        "device": args.device, "dtype": args.dtype, "work": args.work, "trust_remote_code": args.trust_remote_code,
        "max_ram": parse_bytes(args.max_ram) if args.max_ram else None,
    }  # fmt: skip


def _calibration(args: argparse.Namespace) -> dict[str, Any]:
    return {k: getattr(args, k) for k in ("calib", "samples", "seqlen", "seed", "restart", "backend")}


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _prune(args: argparse.Namespace) -> int:
    from streamprune.job import prune
    from streamprune.progress import show_progress
    from streamprune.spec import format_bytes

    own = (
        "sparsity",
        "pattern",
        "method",
        "score",
        "selector",
        "only",
        "skip",
        "stats",
        "save_stats",
        "propagate",
    )
    with show_progress("prune", args.quiet) as progress:
        result = prune(
            args.model, args.out, **{k: getattr(args, k) for k in own},
            **_calibration(args), **_resources(args), progress=progress,
        )  # fmt: skip
    if args.json:
        _print_json({
            "status": result.status, "out": str(result.out), "recipe": result.recipe, "sparsity": result.sparsity,
            "seconds": result.seconds, "peak_rss_bytes": result.peak_rss_bytes,
        })  # fmt: skip
    elif not args.quiet:
        share = f"{result.recipe}, {100 * (result.sparsity or 0):.2f} % of the weights in pruned linears"
        if result.status == "done":
            share += f", {result.seconds:.1f} s, peak {format_bytes(result.peak_rss_bytes)}"
        print(f"{result.out}: {result.status} ({share})")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from streamprune.job import calibrate
    from streamprune.progress import show_progress
    from streamprune.spec import format_bytes

    with show_progress("calibrate", args.quiet) as progress:
        result = calibrate(args.model, args.out, **_calibration(args), **_resources(args), progress=progress)
    if args.json:
        _print_json({
            "status": result.status, "out": str(result.out), "seconds": result.seconds,
            "peak_rss_bytes": result.peak_rss_bytes,
        })  # fmt: skip
    elif not args.quiet:
        cost = (
            f" ({result.seconds:.1f} s, peak {format_bytes(result.peak_rss_bytes)})" if result.status == "done" else ""
        )
        print(f"{result.out}: {result.status}{cost}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    import dataclasses

    from streamprune.evaluation import evaluate
    from streamprune.progress import show_progress
    from streamprune.spec import format_bytes

    with show_progress("eval", args.quiet) as progress:
        found = evaluate(args.model, args.text, seqlen=args.seqlen, **_resources(args), progress=progress)
    if args.json:
        _print_json({"model": str(args.model), "text": str(args.text), **dataclasses.asdict(found)})
    else:
        print(
            f"perplexity {found.perplexity:.3f}  ({found.tokens} tokens in {found.windows} windows of {found.seqlen}, "
            f"{found.seconds:.1f} s, peak {format_bytes(found.peak_rss_bytes)})"
        )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from streamprune.inspection import inspect
    from streamprune.tables import inspection_table

    found = inspect(args.model, expect=args.expect, only=args.only, skip=args.skip)
    if args.json:
        _print_json(found.to_json())
    elif not args.quiet:
        print(inspection_table(found))
    for failure in found.failures[:10]:
        print(f"streamprune: {failure}", file=sys.stderr)
    return 0 if found.ok is not False else 2


def _plan(args: argparse.Namespace) -> int:
    from streamprune.planning import plan
    from streamprune.tables import plan_table

    found = plan(
        args.model, only=args.only, skip=args.skip, samples=args.samples, seqlen=args.seqlen,
        with_stats=args.stats is not None, propagate=args.propagate, device=args.device, dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if args.json:
        _print_json(found.to_json())
    elif not args.quiet:
        print(plan_table(found))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from streamprune.demo import run_demo
    from streamprune.progress import show_progress
    from streamprune.tables import demo_table

    with show_progress("demo", args.quiet) as progress:
        rows = run_demo(progress)
    if args.json:
        _print_json({"models": rows})
    elif not args.quiet:
        print(demo_table(rows))
    return 0
