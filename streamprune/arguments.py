"""The arguments of every command, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import NoReturn

from streamprune.errors import UsageError

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
    _eval_options(add("eval", "measure the perplexity of MODEL on a text, layer by layer"))
    p = add("inspect", "show sparsity, pattern, faults and bytes of every linear of MODEL, dense or packed")
    _inspect_options(p)
    _filter_options(p)
    _plan_options(
        add("plan", "say what pruning MODEL will take: memory, disk, arithmetic, time; measures for about two seconds")
    )
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
    _method_options(p)
    _calibration_options(p)
    p.add_argument("--stats", metavar="FILE", help="use these statistics instead of calibrating")
    p.add_argument("--save-stats", metavar="FILE", help="also keep the statistics for later --stats")
    p.add_argument("--propagate", choices=("dense", "pruned", "asymmetric"),
                   help="which layer's outputs the next layer is calibrated on: the dense one's (default without a "
                        "refit), the pruned one's (default of sparsegpt), or both, so that new values also make up "
                        "for earlier layers (default of other refits and of --tune)")  # fmt: skip
    _resource_options(p)


def _calibrate_options(p: argparse.ArgumentParser) -> None:
    _out_options(p, "STATS", "safetensors file to write")
    _calibration_options(p)
    _resource_options(p)


def _eval_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--text", metavar="FILE", required=True, help="text, as prune's --calib")
    _text_options(p)
    p.add_argument("--windows", type=int, metavar="N", help="only the text's first N windows (default: all)")
    p.add_argument(
        "--reference", metavar="DENSE",
        help="also tell how far MODEL's predictions are from those of this model (same tokenizer)",
    )  # fmt: skip
    p.add_argument("--seqlen", type=int, metavar="N", help="window length (default: min(2048, the model's limit))")
    p.add_argument(
        "--by-window", action="store_true",
        help="with --json, also the nats per token of each window, to compare models window by window",
    )  # fmt: skip
    _resource_options(p, with_kernels=False)


def _plan_options(p: argparse.ArgumentParser) -> None:
    _method_option(p)
    _refit_option(p)
    _quantize_option(p)
    _tune_option(p)
    p.add_argument("--tune-epochs", type=int, metavar="N", help="as for prune")
    _filter_options(p)
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window length (default: min(2048, the model's limit))")
    _bos_option(p)
    p.add_argument("--stats", metavar="FILE", help="plan for a run with these statistics, without calibration")
    p.add_argument("--propagate", choices=("dense", "pruned", "asymmetric"), help="as for prune")
    _device_options(p)


def _method_options(p: argparse.ArgumentParser) -> None:
    amount = p.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", type=float, metavar="S", help="prune this share of every row, 0 ≤ S < 1")
    amount.add_argument("--pattern", metavar="N:M", help="keep N of every M consecutive inputs, such as 2:4")
    p.add_argument("--allocate", default="uniform", metavar="HOW",
                   help="share a --sparsity out: uniform (default), owl (layers with outliers keep more), error (least "
                        "sum of relative errors); these read all weights once more, and calibrate first")  # fmt: skip
    _method_option(p)
    p.add_argument("--score", help="another score: lscore, lscore-isotropic, wanda, magnitude")
    p.add_argument("--selector", help="another selector for --sparsity: ewma, exact")
    _refit_option(p)
    p.add_argument("--damping", metavar="D",
                   help="of a refit: auto (in proportion to each feature's power, chosen per linear on tokens that are "
                        "kept out; default), such a number, or absolute (as published for sparsegpt)")  # fmt: skip
    _quantize_option(p)
    _tune_option(p)
    p.add_argument("--fp8-scale", metavar="HOW",
                   help="of each output channel: amax (its largest weight becomes 448; default), mse (least squared "
                        "error, weighted by the inputs' power)")  # fmt: skip
    p.add_argument(
        "--fp8-rounding",
        metavar="HOW",
        help="nearest, or compensate (what one weight loses, the next make up for; default with a refit)",
    )
    p.add_argument("--tune-epochs", type=int, metavar="N", help="passes over the calibration (default: 6)")
    p.add_argument("--tune-lr", type=float, metavar="R",
                   help="of a step, relative to the weights' mean magnitude (default: 0.02)")  # fmt: skip
    _filter_options(p)


def _method_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--method", default="swiftprune", metavar="RECIPE",
                   help="swiftprune (default), hwpq (the same in FP8), wanda, magnitude; with new values for the "
                        "weights that stay: swiftprune-tuned, obs-admm, gradual-cg, admm, sparsegpt")  # fmt: skip


def _quantize_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--quantize",
        metavar="HOW",
        help="fp8: store pruned linears in FP8 (E4M3, a scale an output channel), as compressed-tensors; none",
    )


def _tune_option(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--tune", metavar="HOW", help="block: let each layer, its mask fixed, learn to give what the dense one gave"
    )


def _refit_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--refit", metavar="REFIT",
                   help="another refit: none, cg (on the mask of any score), "
                        "obs-admm, gradual-cg, admm, sparsegpt")  # fmt: skip


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


def _filter_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--only", metavar="REGEX", help="only linears whose name matches somewhere")
    p.add_argument("--skip", metavar="REGEX", help="not linears whose name matches somewhere")


def _calibration_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--calib", metavar="FILE",
                   help="calibration text: plain, JSON records or Parquet, packed or not, a folder or pattern of them, "
                        "or .npy of token ids (default: a built-in text)")  # fmt: skip
    _text_options(p)
    p.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    p.add_argument("--seqlen", type=int, metavar="N", help="window length (default: min(2048, the model's limit))")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="which windows (default: %(default)s)")
    p.add_argument("--expert-stats", default="weighted", choices=("weighted", "routed"),
                   help="of a mixture: tokens count for an expert as the routing weights them, or all that it is "
                        "routed count alike (default: %(default)s)")  # fmt: skip
    p.add_argument(
        "--expert-tokens",
        type=int,
        default=64,
        metavar="N",
        help="an expert that sees fewer goes by what all of its layer see (default: %(default)s)",
    )

    p.add_argument(
        "--allow-zeros", action="store_true",
        help="go on where a linear, or a long stretch of its rows, is all zeros, as in a broken download",
    )  # fmt: skip


def _text_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--text-field", default="text", metavar="NAME",
                   help="what is read of records: a string, or messages that go through the tokenizer's chat template "
                        "(default: %(default)s)")  # fmt: skip
    _bos_option(p)


def _bos_option(p: argparse.ArgumentParser) -> None:
    p.add_argument("--bos", default="auto", choices=("auto", "always", "never"),
                   help="begin each window with the BOS token (default: if the tokenizer does by itself)")  # fmt: skip


def _device_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: the GPU if there is one)")
    p.add_argument("--max-vram", metavar="SIZE", help="memory of the GPU to stay within (default: what is free there)")
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
    from streamprune.process.versions import version_of

    return version_of("streamprune")
