"""Benchmarks. Each subcommand prints a table, or JSON lines with --json; baselines run in the same process.

    python tools/bench.py kernels                        4096x4096 and 11008x4096, bf16
    python tools/bench.py kernels --large --json         8192x28672 as well
    python tools/bench.py kernels --shape 4096x4096 --dtype float16 --repeat 9

A new subcommand is a function that yields rows (dicts with the same keys) and an entry in COMMANDS.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Row = dict[str, str | float]
SORT = "torch.sort + scatter (Wanda)"
TOPK = "torch.topk + scatter"
GROUPS = "2:4 topk per group (Wanda)"


def wall_ms(work: Callable[[], object], repeat: int, budget_s: float = 20.0) -> tuple[float, float]:
    """Median and least wall time in ms of `repeat` runs after one unmeasured run; fewer past the budget."""
    begin = time.perf_counter()
    work()
    times: list[float] = []
    while len(times) < repeat and (not times or time.perf_counter() - begin < budget_s):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times), 1e3 * min(times)


def wanda_sort(weight: Tensor, feature: Tensor, count: int) -> Tensor:
    """What Wanda's public code does for a sparsity: score, stable sort of every row, scatter, zero."""
    score = weight.abs() * feature.to(weight.dtype)
    mask = torch.zeros_like(score, dtype=torch.bool)
    order = torch.sort(score, dim=-1, stable=True)[1][:, :count]
    mask.scatter_(1, order, True)
    result = weight.clone()
    result[mask] = 0
    return result


def topk_scatter(weight: Tensor, feature: Tensor, count: int) -> Tensor:
    score = weight.abs() * feature.to(weight.dtype)
    return weight.scatter(1, torch.topk(score, count, dim=-1, largest=False, sorted=False)[1], 0)


def numpy_partition(weight: Tensor, feature: Tensor, count: int) -> Tensor:
    score = weight.float().abs() * feature
    threshold = np.partition(score.numpy(), count - 1, axis=1)[:, count - 1 : count]
    return weight.masked_fill(score <= torch.from_numpy(threshold), 0)


def wanda_groups(weight: Tensor, feature: Tensor, n: int, m: int) -> Tensor:
    """What Wanda's public code does for N:M: one topk for each group of columns."""
    score = weight.float().abs() * feature
    mask = torch.zeros_like(score, dtype=torch.bool)
    for column in range(0, score.shape[1], m):
        order = torch.topk(score[:, column : column + m], m - n, dim=1, largest=False)[1]
        mask.scatter_(1, column + order, True)
    result = weight.clone()
    result[mask] = 0
    return result


def topk_all_groups(weight: Tensor, feature: Tensor, n: int, m: int) -> Tensor:
    """One topk call over all groups at once."""
    score = (weight.float().abs() * feature).reshape(-1, m)
    order = torch.topk(score, m - n, dim=1, largest=False, sorted=False)[1]
    return weight.reshape(-1, m).scatter(1, order, 0).reshape(weight.shape)


def kernel_cases(rows: int, width: int, dtype: torch.dtype, quick: bool) -> dict[str, Callable[[], object]]:
    """Baselines first, memcpy the very first; then our kernels at 50 % and at patterns."""
    from streamprune.kernels import cpu, torch_ops

    torch.manual_seed(0)
    w = torch.empty(rows, width, dtype=dtype)
    for chunk in torch.split(w, 256):
        chunk.copy_(torch.randn(chunk.shape) * 0.02)
    f, ones, k = torch.rand(width) + 0.01, torch.ones(width), width // 2
    out = torch.empty_like(w)
    source, target = w.view(torch.uint8).numpy(), out.view(torch.uint8).numpy()
    sums = torch.zeros(2, width, dtype=torch.float64)
    cases: dict[str, Callable[[], object]] = {"memcpy": lambda: np.copyto(target, source)}
    if not quick:
        cases |= {
            SORT: lambda: wanda_sort(w, f, k),
            TOPK: lambda: topk_scatter(w, f, k),
            "numpy.partition": lambda: numpy_partition(w, f, k),
            GROUPS: lambda: wanda_groups(w, f, 2, 4),
            "2:4 topk, all groups": lambda: topk_all_groups(w, f, 2, 4),
        }
    cases |= {
        "ewma": lambda: cpu.prune_ewma(w, f, 2, k, out=out),
        "ewma, want_keep": lambda: cpu.prune_ewma(w, f, 2, k, out=out, want_keep=True),
        "exact": lambda: cpu.prune_exact(w, f, 2, k, out=out),
        "exact, magnitude": lambda: cpu.prune_exact(w, ones, 1, k, out=out),
        "2:4": lambda: cpu.prune_n_of_m(w, f, 2, 2, 4, out=out),
        "4:8": lambda: cpu.prune_n_of_m(w, f, 2, 4, 8, out=out),
        "8:16": lambda: cpu.prune_n_of_m(w, f, 2, 8, 16, out=out),
        "16:32": lambda: cpu.prune_n_of_m(w, f, 2, 16, 32, out=out),
        "accumulate": lambda: cpu.accumulate(w, sums[0], sums[1]),
        "first_nonfinite": lambda: cpu.first_nonfinite(w),
    }
    if not quick:
        cases |= {
            "torch_ops ewma": lambda: torch_ops.prune_ewma(w, f, 2, k, out=out),
            "torch_ops 2:4": lambda: torch_ops.prune_n_of_m(w, f, 2, 2, 4, out=out),
        }
    return cases


def kernels(arguments: argparse.Namespace) -> Iterator[Row]:
    """Selection kernels against memcpy of the same bytes and against sorting, at 50 % and 2:4."""
    shapes = arguments.shape or ["4096x4096", "11008x4096", *(["8192x28672"] if arguments.large else [])]
    for shape in shapes:
        rows, width = (int(number) for number in shape.split("x"))
        times: dict[str, float] = {}
        for name, work in kernel_cases(rows, width, getattr(torch, arguments.dtype), arguments.quick).items():
            times[name], best = wall_ms(work, arguments.repeat)
            row: Row = {"shape": shape, "dtype": arguments.dtype, "kernel": name}
            row |= {"ms": round(times[name], 2), "best ms": round(best, 2)}
            row["/ memcpy"] = round(times[name] / times["memcpy"], 2)
            for title, baseline in (("sort /", SORT), ("topk /", TOPK), ("2:4 topk /", GROUPS)):
                row[title] = round(times[baseline] / times[name], 1) if baseline in times else "-"
            yield row


def machine() -> Row:
    """What the figures were measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def show(rows: Iterator[Row], as_json: bool) -> None:
    """Print rows as they come: JSON lines, or a table with the columns of the first row."""
    widths: dict[str, int] = {}
    for row in rows:
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        if not widths:
            widths = {key: max(len(key), 30 if key == "kernel" else 10) for key in row}
            print("  ".join(f"{key:<{width}}" for key, width in widths.items()))
        print("  ".join(f"{row[key]!s:<{width}}" for key, width in widths.items()), flush=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {"kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__)
        sub.add_argument("--json", action="store_true", help="one JSON object per line")
        sub.add_argument("--repeat", type=int, default=7, help="runs per figure; ratios are of medians")
        if name == "kernels":
            sub.add_argument("--shape", action="append", help="ROWSxINPUTS; may be given several times")
            sub.add_argument("--large", action="store_true", help="8192x28672 as well")
            sub.add_argument("--quick", action="store_true", help="our kernels and memcpy only")
            sub.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    show(iter([machine()]) if arguments.json else iter(()), arguments.json)
    show(COMMANDS[arguments.command](arguments), arguments.json)


if __name__ == "__main__":
    main()
