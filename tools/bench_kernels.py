"""Selection and statistics kernels against memcpy of the same bytes, sorting, and topk."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from bench_rig import BenchError, Row, figure, say
from torch import Tensor

Work = Callable[[], object]

SORT = "torch.sort + scatter (Wanda)"
TOPK = "torch.topk + scatter"
PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
_BUDGET = 20.0  # seconds for all runs of a case; slow baselines are run less often
_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `kernels` takes besides the common options."""
    parser.add_argument("--shape", action="append", help="ROWSxINPUTS; may be given several times")
    parser.add_argument("--large", action="store_true", help="8192x28672 as well")
    parser.add_argument("--quick", action="store_true", help="our kernels and memcpy only")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])


def kernels(arguments: argparse.Namespace) -> Iterator[Row]:
    """Selection kernels at 50 % and N:M against memcpy of the same bytes, sorting and topk."""
    shapes = arguments.shape or ["4096x4096", "11008x4096"]
    for shape in [*shapes, *(["8192x28672"] if arguments.large else [])]:
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not found:
            raise BenchError(f"--shape {shape}: write it as ROWSxINPUTS, such as 4096x4096")
        rows, width = int(found.group(1)), int(found.group(2))
        if width % 32:
            raise BenchError(f"--shape {shape}: the number of inputs must be a multiple of 32")
        device = device_named(arguments.device)
        cases = kernel_cases(rows, width, getattr(torch, arguments.dtype), device, arguments.quick)
        yield from _measure(cases, f"{shape} {arguments.dtype} on {device.type}", device, arguments.repeat)
        del cases
        torch.cuda.empty_cache()  # leaves the GPU to the child processes of other benchmarks; nothing without one


def device_named(name: str) -> torch.device:
    """The device of --device; "auto" is the GPU if there is one. Raises BenchError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BenchError(f"--device {name} cannot be used here: {' '.join(str(e).split())[:160]}") from e
    return device


def _measure(cases: dict[str, Work], on: str, device: torch.device, repeat: int) -> Iterator[Row]:
    """Runs all cases in rounds, with memcpy before every single run; then yields a row per case."""
    runs: dict[str, list[float]] = {name: [] for name in cases}
    base: dict[str, list[float]] = {name: [] for name in cases}
    timed = _gpu_timer(device) if device.type == "cuda" else _wall_ms
    for name, work in cases.items():
        say(f"{on}: {name}, unmeasured")
        timed(work)
    for number in range(repeat):
        for name, work in cases.items():
            if sum(runs[name]) > 1e3 * _BUDGET:
                continue
            say(f"{on}: {name}, run {number + 1}/{repeat}")
            base[name].append(timed(cases["memcpy"]))
            runs[name].append(base[name][-1] if name == "memcpy" else timed(work))
    for name in cases:
        selects = not name.startswith(("memcpy", "accumulate", "first_nonfinite", "fp8"))
        row = figure(name, runs[name], "memcpy", base[name], unit="ms", on=on)
        per_group = f"{name} topk per group (Wanda)"
        for key, other in (("sort_over_it", SORT), ("topk_over_it", TOPK), ("group_topk_over_it", per_group)):
            if selects and other in runs and other != name:
                row[key] = float(f"{statistics.median(runs[other]) / statistics.median(runs[name]):.6g}")
        yield row


def _wall_ms(work: Work) -> float:
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def _gpu_timer(device: torch.device) -> Callable[[Work], float]:
    """Milliseconds between two events around the work; the second-level cache is overwritten before each."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def timed(work: Work) -> float:
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))

    return timed


def kernel_cases(rows: int, width: int, dtype: torch.dtype, device: torch.device, quick: bool) -> dict[str, Work]:
    """What to measure by name, memcpy first; then the baselines unless `quick`, then ours at 50 % and at patterns.

    Weights (rows, width) are Gaussian. On the CPU ours are Numba's, on a GPU Torch's.
    """
    from streamprune.kernels import cpu, torch_ops
    from streamprune.methods.fp8 import dequantise, quantise

    torch.manual_seed(0)
    w = torch.empty(rows, width, dtype=dtype, device=device)
    for chunk in torch.split(w, 256):
        chunk.copy_(torch.randn(chunk.shape) * 0.02)
    f = (torch.rand(width) + 0.01).to(device)
    out, ones, k = torch.empty_like(w), torch.ones_like(f), width // 2
    sums = torch.zeros(2, width, dtype=torch.float64, device=device)
    on_cpu = device.type == "cpu"
    ours = cpu if on_cpu else torch_ops
    cases: dict[str, Work] = {"memcpy": (lambda: out.copy_(w)) if not on_cpu else _numpy_copy(w, out)}
    if not quick:
        cases |= _baselines(w, f, k)
    cases |= {
        "ewma": lambda: ours.prune_ewma(w, f, 2, k, out=out),
        "ewma, want_keep": lambda: ours.prune_ewma(w, f, 2, k, out=out, want_keep=True),
        "exact": lambda: ours.prune_exact(w, f, 2, k, out=out),
        "exact, magnitude": lambda: ours.prune_exact(w, ones, 1, k, out=out),
    }
    for n, m in PATTERNS:
        cases[f"{n}:{m}"] = lambda n=n, m=m: ours.prune_n_of_m(w, f, 2, n, m, out=out)  # type: ignore[misc]
    for how in ("amax", "mse"):
        cases[f"fp8 {how}"] = lambda how=how: quantise(w, w.dtype, how, f)  # type: ignore[misc]
    codes = quantise(w, w.dtype)
    cases["fp8 to weights"] = lambda: dequantise(codes.codes, codes.scale, w.dtype)
    cases |= {
        "accumulate": lambda: ours.accumulate(w, sums[0], sums[1]),
        "first_nonfinite": lambda: ours.first_nonfinite(w),
    }
    if not quick and on_cpu:
        cases |= {
            "memcpy, all threads": lambda: out.copy_(w),
            "torch_ops ewma": lambda: torch_ops.prune_ewma(w, f, 2, k, out=out),
            "torch_ops 2:4": lambda: torch_ops.prune_n_of_m(w, f, 2, 2, 4, out=out),
        }
    return cases


def _numpy_copy(w: Tensor, out: Tensor) -> Work:
    source, target = w.view(torch.uint8).numpy(), out.view(torch.uint8).numpy()
    return lambda: np.copyto(target, source)


def _baselines(w: Tensor, f: Tensor, k: int) -> dict[str, Work]:
    """What others do for the same: weights (rows, width), features (width,), `k` pruned in a row."""
    cases: dict[str, Work] = {SORT: lambda: wanda_sort(w, f, k), TOPK: lambda: topk_scatter(w, f, k)}
    if w.device.type == "cpu":
        cases["numpy.partition"] = lambda: numpy_partition(w, f, k)
    for n, m in PATTERNS:
        cases[f"{n}:{m} topk per group (Wanda)"] = lambda n=n, m=m: wanda_groups(w, f, n, m)  # type: ignore[misc]
    return cases | {"2:4 topk, all groups": lambda: topk_all_groups(w, f, 2, 4)}


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
    """One topk a row instead of the sort."""
    score = weight.abs() * feature.to(weight.dtype)
    return weight.scatter(1, torch.topk(score, count, dim=-1, largest=False, sorted=False)[1], 0)


def numpy_partition(weight: Tensor, feature: Tensor, count: int) -> Tensor:
    """A linear-time partition of each row; ties at the threshold all go."""
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
