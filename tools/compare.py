"""Compares the quality of methods: every recipe at several sparsities and patterns, on given models and a text.

    python tools/compare.py tiny-llama --calib c4.txt --text wikitext2.txt --samples 64 --seqlen 512
    python tools/compare.py tiny-llama --calib c4.txt --text wikitext2.txt --methods wanda,wanda+cg --amounts 0.5,2:4
    python tools/compare.py tiny-llama smollm2 --calib c4.txt --text wikitext2.txt --seeds 0,1,2 --out results

For each cell: perplexity of the text, KL divergence to the dense model and top-1 agreement with it, seconds and peak
memory of the prune. With several seeds, each is calibrated on other windows, and the tables have means and standard
deviations; a last table has the difference of each method to the best one, window by window, with standard errors. Of
several models, each has a folder of its own. Written to --out as comparison.json (every figure, the commands, versions,
machine, digests), comparison.md (the tables, printed at the end as well) and comparison.png (perplexity against
sparsity). Both files of text are replaced after every cell: the same command goes on where an interrupted one stopped,
tries failed cells again, and with other --methods, --amounts or --seeds adds to what is there. Anything else that
differs is refused.

Every prune and every evaluation is a process of its own. Recipes that only need a mask share statistics that are
gathered once; those with a refit calibrate themselves. `wanda+cg` means --method wanda --refit cg; at the end
`+fp8` means --quantize fp8, and `+tune` --tune block.
Exit codes: 0 all cells are there, 1 some failed (their messages are below the tables), 2 it could not be run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import SubprocessError
from typing import NoReturn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import bench_rig  # noqa: E402
from bench_rig import BenchError, say  # noqa: E402
from compare_plot import write_plot  # noqa: E402
from compare_report import markdown  # noqa: E402
from compare_run import (  # noqa: E402
    INTERRUPTED,
    Comparison,
    Runner,
    cells_of,
    now,
    parse_amounts,
    parse_methods,
    parse_seeds,
)
from compare_state import Results, describe_job  # noqa: E402

AMOUNTS = "0.5,0.6,0.7,2:4,4:8"
NO_PLOT = "no plot, matplotlib is missing: pip install 'matplotlib>=3.8' and run the same command again"


def compare(arguments: argparse.Namespace, model_name: str, command: str, run: Runner) -> int:
    """Runs the comparison of one model or what is left of it; returns the exit code.

    Of several models each has a folder of its own, within --out if that is given.
    """
    from streamprune.disk import durable
    from streamprune.disk.hub import resolve_model
    from streamprune.disk.lock import Lock

    arguments.model, several = model_name, len(arguments.models) > 1
    methods, amounts = parse_methods(arguments.methods), parse_amounts(arguments.amounts)
    seeds = parse_seeds(arguments.seeds)
    if arguments.kl_windows < 0:
        raise BenchError(f"--kl-windows {arguments.kl_windows}: a number of windows, or 0 for all")
    model = resolve_model(arguments.model)
    own = f"comparison-{model.resolve().name}"
    folder = Path(arguments.out) / own if arguments.out and several else Path(arguments.out or own)
    if model.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise BenchError(f"--out {folder} lies within MODEL; choose a place outside {model}")
    job = describe_job(arguments)
    durable.make_folder(folder)
    with Lock(folder / ".lock"):
        results = Results(folder, job, markdown, restart=arguments.restart)
        todo = [(m, a, s) for m, a, s in cells_of(methods, amounts, seeds) if not results.is_done(m.name, a, s)]
        if todo:
            results.begin({"command": command, "date": now(), "machine": bench_rig.machine()})
            durable.make_folder(folder / "work")
            Comparison(arguments, results, run).fill(todo)
        results.save()
        if not write_plot(results.value, folder / "comparison.png"):
            print(f"compare: {NO_PLOT}", file=sys.stderr)
        durable.clear(folder / "work")
        if not arguments.keep:
            durable.clear(folder / "models")
    print(markdown(results.value))
    return 1 if any("error" in cell for cell in results.value["cells"]) else 0


# ---- the command line


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise BenchError(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="a checkpoint's folder, or its name on the hub")
    add("--calib", metavar="FILE", required=True, help="calibration text, as prune takes it")
    add("--text", metavar="FILE", required=True, help="text that perplexity is measured on, as eval takes it")
    add("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    add("--seqlen", type=int, metavar="N", help="length of all windows (default: min(2048, the model's limit))")
    add("--seeds", default="0", metavar="A,B", help="which windows; of several, mean and spread (default: %(default)s)")
    add(
        "--methods",
        metavar="A,B",
        help="recipes, or RECIPE+REFIT as wanda+cg, +fp8, +tune (default: every recipe)",
    )
    add("--amounts", default=AMOUNTS, metavar="A,B", help="sparsities and patterns (default: %(default)s)")
    add("--out", metavar="FOLDER", help="where results go (default: comparison-MODEL)")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--reference-text", metavar="FILE", help="measure KL and agreement on this text instead")
    beside.add_argument("--kl-windows", type=int, default=64, metavar="N",
                        help="measure them on the text's first N windows; 0: all (default: %(default)s)")  # fmt: skip
    add("--keep", action="store_true", help="keep the pruned models, in FOLDER/models")
    add("--restart", action="store_true", help="throw the results in FOLDER away and start again")
    add("--device", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    add("--dtype", help="what to compute in, as prune and eval take it")
    add("--max-ram", metavar="SIZE", help="resident memory to stay within, as prune and eval take it")
    add("--max-vram", metavar="SIZE", help="memory of the GPU to stay within, likewise")
    return parser


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, run: Runner = bench_rig.streamprune) -> int:
    """Runs the tool; returns the exit code. `run` may be another way to run streamprune."""
    from streamprune.errors import StreampruneError

    words = list(sys.argv[1:] if argv is None else argv)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        arguments, command = make_parser().parse_args(words), shlex.join(["python", "tools/compare.py", *words])
        return max(compare(arguments, model, command, run) for model in arguments.models)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BenchError, StreampruneError, OSError, RuntimeError, ValueError, SubprocessError) as e:
        return _fail(" ".join(str(e).split()) or type(e).__name__, 2)
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> int:
    say("")
    print(f"compare: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
