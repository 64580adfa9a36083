"""Speed of 2:4 on a GPU: tokens per second of a pruned model with Torch's sparse kernels and with dense ones.

    python tools/run_24.py OUT                                   a 2:4 output of prune: its linears, and all of it
    python tools/run_24.py OUT --batches 1,64,4096 --seqlen 512
    python tools/run_24.py --linears-only 4096x4096,14336x4096   linears with random weights, no model

A batch is that many tokens in one forward pass without a cache: sequences of --seqlen, or one that is shorter. 1 is
nearly what generating costs, 4096 what reading a prompt does. Printed is a table in Markdown, of medians; the ratio's
least and greatest are of runs that followed each other (linears), or of runs of the same number (whole model: dense
first, then converted in place, as both would not always fit). Kernels are launched one by one, as transformers does
it, so small batches measure launching as well; a compiled model would gain on both sides. A linear alone may stay in
the GPU's second-level cache, which flatters small batches; in the whole model it does not. cuSPARSELt runs its default
algorithm. The model is held whole, on the GPU.

Which linears Torch's kernels take is in run_24_convert.py; those that are left dense are counted, with the reason.

Exit codes: 0 measured, 1 sparse and dense outputs differ, 2 usage, 3 bad checkpoint, 4 MODEL is quantised, 5 no GPU
that can, or too little of its memory, 130 interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from bench_rig import Row, commit, figure, interleaved, say  # noqa: E402
from run_24_convert import Convert, convert_linears, find_gpu, takes, to_sparse  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import linear  # noqa: E402

from streamprune.errors import INTERRUPTED, StreampruneError, UnsupportedError, UsageError  # noqa: E402

MOST_DIFFERENCE = 0.1
"""Of sparse outputs to dense ones, relative; rounding of bfloat16 stays well below, a wrong kernel or mask does not."""


class DifferentError(StreampruneError):
    """The sparse model does not compute what the dense one does."""

    exit_code = 1


# ---- measuring


def tokens_per_second(work: Callable[[], object], tokens: int, device: torch.device, seconds: float) -> float:
    """Of calls of `work` in a row that take about `seconds` in all; what was launched before is waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None

    def timed(calls: int) -> float:
        wait(device)
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        wait(device)
        return time.perf_counter() - begun

    timed(2)  # compiles, chooses algorithms, fills pools of memory
    calls = max(1, math.ceil(seconds / max(timed(1), 1e-9)))
    return calls * tokens / timed(calls)


def measure_linear(dense: Tensor, sparse: Tensor, arguments: argparse.Namespace) -> Iterator[Row]:
    """A row a batch: x (batch, in) times the dense and the sparse form of a weight (out, in), in turns."""
    label = f"linear {dense.shape[0]}x{dense.shape[1]}"
    generator = torch.Generator().manual_seed(0)
    for tokens in arguments.batches:
        x = torch.randn(tokens, dense.shape[1], generator=generator).to(dense.device, dense.dtype)
        _check_outputs(label, linear(x, dense), linear(x, sparse))
        measures = [
            partial(_speed, "dense", partial(linear, x, dense), x, arguments.seconds),
            partial(_speed, "2:4", partial(linear, x, sparse), x, arguments.seconds),
        ]
        runs = interleaved(measures, arguments.repeat)
        yield _row(label, tokens, runs["2:4"], runs["dense"])


def measure_shapes(arguments: argparse.Namespace, backend: str, convert: Convert) -> Iterator[Row]:
    """Rows of --linears-only: random weights of which two in four are zero."""
    for rows, columns in arguments.linears_only:
        dense = random_24(rows, columns).to(arguments.device, getattr(torch, arguments.dtype))
        if (reason := takes(dense, backend)) is not None:
            raise UsageError(f"--linears-only {rows}x{columns}: {backend} does not take it ({reason})")
        yield from measure_linear(dense, convert(dense, backend), arguments)


def random_24(rows: int, columns: int) -> Tensor:
    """(rows, columns) in float32; the two smallest of every four are zero."""
    groups = torch.randn(rows, -(-columns // 4), 4, generator=torch.Generator().manual_seed(1))
    groups.scatter_(2, groups.abs().argsort(2)[..., :2], 0.0)
    return groups.flatten(1)[:, :columns].contiguous()


def measure_model(arguments: argparse.Namespace, backend: str, convert: Convert) -> Iterator[Row]:
    """Rows of MODEL: a linear of each shape, then all of it."""
    model = load(arguments)
    limit = getattr(model.config, "max_position_embeddings", None) or arguments.seqlen or 1024
    windows = [window(tokens, arguments.seqlen, limit) for tokens in arguments.batches]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(model.config.vocab_size, w, generator=generator).to(arguments.device) for w in windows]
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids, use_cache=False, **keep).logits
        return found

    before = [logits(ids).cpu() for ids in inputs]
    dense = _speeds(logits, inputs, arguments)
    conversion = convert_linears(model, backend, convert)
    if not conversion.converted:
        raise UsageError(f"nothing of {arguments.model} can run in 2:4 ({conversion}); prune it with --pattern 2:4")
    print(f"{conversion}.", flush=True)
    for ids, expected in zip(inputs, before, strict=True):
        _check_outputs(f"the model at {ids.numel()} tokens", expected, logits(ids).cpu())
    for name, weight in conversion.examples.values():
        yield from measure_linear(weight, model.get_submodule(name).weight, arguments)
    for tokens, fast, base in zip(arguments.batches, _speeds(logits, inputs, arguments), dense, strict=True):
        yield _row("whole model", tokens, fast, base)


def load(arguments: argparse.Namespace) -> Any:
    """transformers' model on the device. Raises UnsupportedError when it is quantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from streamprune.disk.hub import resolve_model

    path = resolve_model(arguments.model)
    if getattr(AutoConfig.from_pretrained(path), "quantization_config", None):
        raise UnsupportedError(f"{path} is quantised; this tool runs 16-bit weights: prune without --quantize")
    with torch.inference_mode(False):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype))
        return model.eval().to(arguments.device)


def window(tokens: int, seqlen: int | None, limit: int) -> tuple[int, int]:
    """(sequences, length) of a batch. Raises UsageError when tokens are no whole number of sequences."""
    if seqlen is not None and seqlen > limit:
        raise UsageError(f"--seqlen {seqlen}: the model takes {limit} tokens at most")
    length = min(tokens, seqlen or min(1024, limit))
    if tokens % length:
        raise UsageError(f"--batches {tokens} is no whole number of sequences; make it a multiple of --seqlen {length}")
    return tokens // length, length


def _speed(name: str, work: Callable[[], object], x: Tensor, seconds: float) -> dict[str, float]:
    tokens = x.shape[0] if x.is_floating_point() else x.numel()
    return {name: tokens_per_second(work, tokens, x.device, seconds)}


def _speeds(
    logits: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], arguments: argparse.Namespace
) -> list[list[float]]:
    """Runs of each input, in tokens per second."""
    measures = [partial(_speed, str(x.numel()), partial(logits, x), x, arguments.seconds) for x in inputs]
    return list(interleaved(measures, arguments.repeat).values())


def _check_outputs(label: str, dense: Tensor, sparse: Tensor) -> None:
    """Raises DifferentError unless the outputs agree up to rounding."""
    expected = dense.float()
    difference = float((sparse.float() - expected).norm() / expected.norm().clamp_min(1e-30))
    if not difference <= MOST_DIFFERENCE:
        raise DifferentError(
            f"{label}: 2:4 outputs differ from dense ones by {100 * difference:.3g} %, so their speed says nothing; "
            "another version of Torch or cuSPARSELt may mend it"
        )


def _row(on: str, tokens: int, sparse: Sequence[float], dense: Sequence[float]) -> Row:
    return figure(str(tokens), sparse, "dense", dense, unit="tokens/s", on=on)


# ---- output and the command line


def markdown(rows: Sequence[Row]) -> str:
    """Rows of bench_rig.figure, tokens per second of 2:4 over dense, as a table; above 1 is faster."""
    head = ["", "tokens per forward", "dense, tokens/s", "2:4, tokens/s", "2:4 ÷ dense", "min … max"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        ratios = [f"{row[key]:.2f}" for key in ("ratio", "ratio_min", "ratio_max")]
        speeds = [f"{row[key]:.0f}" if row[key] >= 100 else f"{row[key]:.3g}" for key in ("baseline_value", "value")]
        lines.append([row["on"], row["case"], *speeds, ratios[0], f"{ratios[1]} … {ratios[2]}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def _batches(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: write numbers of tokens, such as 1,16,256")
    return list(dict.fromkeys(int(n) for n in text.split(",")))


def _shapes(text: str) -> list[tuple[int, int]]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: write OUTxIN, such as 4096x4096, with commas between several")
    return [(int(rows), int(columns)) for rows, columns in (shape.split("x") for shape in text.split(","))]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises UsageError."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a 2:4 output: its folder, or its name on the hub")
    add("--linears-only", metavar="SHAPE", type=_shapes, help="OUTxIN of linears to measure without a model")
    add("--batches", metavar="A,B", type=_batches, default=[1, 16, 64, 256, 1024, 4096],
        help="tokens per forward (default: 1,16,64,256,1024,4096)")  # fmt: skip
    add("--seqlen", metavar="N", type=int, help="longest sequence (default: min(1024, the model's limit))")
    add("--device", default="cuda", help="cuda, cuda:1 … (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="of weights and states (%(default)s)")
    add("--repeat", type=int, default=5, metavar="N", help="measured runs of everything (default: %(default)s)")
    add("--seconds", type=float, default=0.2, metavar="S", help="length of a run, about (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.linears_only is None):
        parser.error("either MODEL or --linears-only SHAPE")
    if arguments.repeat < 1 or not 0 < arguments.seconds < math.inf or (arguments.seqlen or 1) < 1:
        parser.error("--repeat, --seqlen and --seconds must be above 0")
    return arguments


def main(argv: Sequence[str] | None = None, gpu: Callable[[str], str] = find_gpu, convert: Convert = to_sparse) -> int:
    """Runs the tool; returns the exit code. `gpu` finds the backend for a device, `convert` compresses a weight."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        backend = gpu(arguments.device)
        name = torch.cuda.get_device_name(arguments.device) if arguments.device.startswith("cuda") else arguments.device
        print(f"{name}, torch {torch.__version__}, {backend}, {arguments.dtype}, commit {commit()}", flush=True)
        measure = measure_model if arguments.model is not None else measure_shapes
        with torch.inference_mode():
            rows = list(measure(arguments, backend, convert))
        say("")
        print(f"\n{markdown(rows)}")
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except StreampruneError as e:
        return _fail(str(e), e.exit_code)
    except torch.OutOfMemoryError:
        return _fail("not enough memory on the GPU; leave out the largest of --batches, or choose a smaller model", 5)
    except (OSError, RuntimeError, ValueError, NotImplementedError) as e:
        return _fail(" ".join(str(e).split()) or type(e).__name__, 2)


def _fail(message: str, code: int) -> int:
    say("")
    print(f"run_24: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main())
