"""`prune --stats` against copying, and the memory of a prune against layers and limits."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench_rig import (
    BenchError,
    Ran,
    Row,
    call,
    checkpoint_bytes,
    checkpoint_in,
    chosen_shape,
    copy_durably,
    describe,
    figure,
    interleaved,
    into_page_cache,
    out_of_page_cache,
    require_disk,
    say,
    streamprune,
    temporary_folder,
)
from make_checkpoint import add_shape_options, write_checkpoint

COPY = "cp -r + fsync"
MIB = 1 << 20
_LEAST_SPAN = 32 * MIB  # between the least and the greatest --max-ram
_NOT_ENOUGH = 5  # the exit code


def add_stats_options(parser: argparse.ArgumentParser) -> None:
    """What `stats` takes besides the common options."""
    parser.add_argument("--checkpoint", metavar="DIR", help="this checkpoint instead of a synthetic one")
    add_shape_options(parser)
    add_amount(parser)
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the page cache before each run")


def add_amount(parser: argparse.ArgumentParser) -> None:
    """--sparsity or --pattern."""
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--sparsity", metavar="S", help="share to prune")
    amount.add_argument("--pattern", metavar="N:M", help="pattern to prune to (default: 2:4)")


def amount_of(arguments: argparse.Namespace) -> list[str]:
    """The amount as arguments of prune."""
    if arguments.sparsity:
        return ["--sparsity", arguments.sparsity]
    return ["--pattern", arguments.pattern or "2:4"]


def stats(arguments: argparse.Namespace) -> Iterator[Row]:
    """prune --stats against cp -r and fsync of the same checkpoint."""
    with temporary_folder(arguments) as folder:
        checkpoint = checkpoint_in(folder, arguments, copies=1, activations=64)
        size = checkpoint_bytes(checkpoint)
        amount, device = amount_of(arguments), ["--device", arguments.device]
        gathered, out = folder / "statistics", folder / "out"
        say("gathering statistics")
        few = ["--samples", "2", "--seqlen", "32"]
        streamprune("calibrate", str(checkpoint), str(gathered), *few, *device).result  # noqa: B018
        prepare = out_of_page_cache if arguments.cold else into_page_cache

        def copy() -> dict[str, float]:
            prepare(checkpoint)
            return {COPY: copy_durably(checkpoint, folder / "copy")}

        def prune() -> dict[str, float]:
            prepare(checkpoint)
            ran = streamprune("prune", str(checkpoint), str(out), *amount, "--stats", str(gathered), *device)
            seconds = float(ran.result["seconds"])
            shutil.rmtree(out)
            return {"prune --stats, work": seconds, "prune --stats, whole process": ran.seconds}

        say("unmeasured runs")
        copy()
        prune()
        runs = interleaved([copy, prune], arguments.repeat)
        on = f"{describe(checkpoint)}, {' '.join(amount)}, source {'not ' if arguments.cold else ''}in the page cache"
        for case, seconds in runs.items():
            row = figure(case, seconds, COPY, runs[COPY], unit="s", on=on)
            yield row | {"gb_per_s": float(f"{size / 1e9 / row['value']:.6g}")}


# ---- memory


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """What `memory` takes besides the common options."""
    add_shape_options(parser, "narrow", layers=False)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8], metavar="N", help="default: 2 4 8")
    parser.add_argument("--limits", type=int, default=4, metavar="N", help="values of --max-ram (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--seqlen", type=int, default=128, metavar="N", help="default: %(default)s")


def memory(arguments: argparse.Namespace) -> Iterator[Row]:
    """Peak memory of prune against the number of layers, --max-ram, and on a GPU --max-vram."""
    if arguments.limits < 0 or min(arguments.layers) < 1:
        raise BenchError("--layers takes numbers from 1, --limits a number from 0")
    layers = sorted(set(arguments.layers))
    with temporary_folder(arguments) as folder:
        shapes = {count: chosen_shape(arguments, layers=count) for count in layers}
        cached = 8 * arguments.samples * arguments.seqlen * shapes[layers[0]].hidden
        require_disk(folder, sum(s.nbytes for s in shapes.values()) + shapes[layers[-1]].nbytes + cached)
        models: dict[int, Path] = {}
        for count, shape in shapes.items():
            say(f"making a checkpoint of {count} layers")
            models[count] = folder / f"layers-{count}"
            write_checkpoint(models[count], arguments.seed, shape)
        yield from _by_layers(arguments, folder, models)
        if arguments.limits:
            yield from _by_limit(arguments, folder, models[layers[-1]])
        if arguments.limits and _uses_gpu(arguments.device):
            yield from _by_vram(arguments, folder, models[layers[-1]])


def _by_layers(arguments: argparse.Namespace, folder: Path, models: Mapping[int, Path]) -> Iterator[Row]:
    """A row for each number of layers; the baseline is the fewest."""

    def peaks(count: int) -> dict[str, float]:
        return _peaks(_layers(count), _prune(arguments, folder, models[count])[0])

    runs = interleaved([partial(peaks, count) for count in models], arguments.repeat)
    first = _layers(next(iter(models)))
    for count, model in models.items():
        case = _layers(count)
        row = figure(case, runs[case], first, runs[first], unit="MiB", on="peak RAM against the number of layers")
        yield row | {"checkpoint_mib": round(checkpoint_bytes(model) / MIB, 2)} | _outside(runs, case)


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def _by_limit(arguments: argparse.Namespace, folder: Path, model: Path) -> Iterator[Row]:
    """A row for each --max-ram, from the least that is allowed to where batches are full; the baseline is the limit."""
    limit = least = _needed(_prune(arguments, folder, model, "--max-ram", "1MiB")[0])
    step = 0
    if arguments.limits > 1:
        job = ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen), "--device", arguments.device]
        plan = streamprune("plan", str(model), *job).result
        span = max(_LEAST_SPAN, plan["peak_ram_bytes"] - plan["least_ram_bytes"])
        step = span // (arguments.limits - 1)
    for number in range(arguments.limits):
        runs: dict[str, list[float]] = {"limit": []}
        for _ in range(arguments.repeat):
            limit, ran, report = _limited(arguments, folder, model, max(limit, least + number * step))
            for name, value in _peaks("peak", ran).items():
                runs.setdefault(name, []).append(value)
            runs["limit"].append(limit / MIB)
        row = figure(f"--max-ram {limit / MIB:.0f}MiB", runs["peak"], "the limit", runs["limit"], unit="MiB",
                     on="peak RAM against --max-ram")  # fmt: skip
        yield row | {"batch": report["resolved"]["batch"]} | _outside(runs, "peak")


def _limited(
    arguments: argparse.Namespace, folder: Path, model: Path, limit: int
) -> tuple[int, Ran, Mapping[str, Any]]:
    """A prune within `limit` bytes, or what the refusal asks for: the program itself varies by a MiB or so."""
    for _ in range(3):
        ran, report = _prune(arguments, folder, model, "--max-ram", str(limit))
        if ran.code != _NOT_ENOUGH:
            break
        limit = _needed(ran)
    return limit, ran, report


def _prune(
    arguments: argparse.Namespace, folder: Path, model: Path, *more: str
) -> tuple[Ran, Mapping[str, Any]]:  # fmt: skip
    """One prune in a fresh process; how it ran, and streamprune.json (empty if it was refused)."""
    out = folder / "out"
    job = ["--samples", str(arguments.samples), "--seqlen", str(arguments.seqlen), "--device", arguments.device]
    say(f"pruning {model.name} {' '.join(more)}")
    ran = streamprune("prune", str(model), str(out), "--pattern", "2:4", *job, *more)
    report: Mapping[str, Any] = {}
    if out.exists():
        report = json.loads((out / "streamprune.json").read_text())
        shutil.rmtree(out)
    return ran, report


def _peaks(name: str, ran: Ran) -> dict[str, float]:
    """Peak in MiB as the program says, as seen from outside where there is /proc, and seconds."""
    result = ran.result
    found = {name: result["peak_rss_bytes"] / MIB, f"{name}, s": result["seconds"]}
    return found if ran.hwm is None else found | {f"{name}, outside": ran.hwm / MIB}


def _outside(runs: Mapping[str, list[float]], name: str) -> Row:
    """Medians of the peak as /proc shows it and of the seconds, for a row."""
    columns = {"vmhwm_mib": f"{name}, outside", "seconds": f"{name}, s"}
    return {key: round(statistics.median(runs[run]), 4) for key, run in columns.items() if run in runs}


def _needed(ran: Ran) -> int:
    found = re.search(r"needs --max-ram (\d+)MiB", ran.errors)
    if not found:
        raise BenchError(f"--max-ram 1MiB was not refused with what would do: {ran.errors.strip() or ran.out.strip()}")
    return int(found.group(1)) * MIB


# ---- GPU memory


def _uses_gpu(device: str) -> bool:
    import torch

    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _by_vram(arguments: argparse.Namespace, folder: Path, model: Path) -> Iterator[Row]:
    """As _by_limit, with --max-vram and the most that Torch reserved; the GPU's context counts within the limit too."""

    def prune(limit: int | None) -> dict[str, int]:
        say(f"pruning with --max-vram {limit}")
        out = folder / "out"
        given = {} if limit is None else {"max_vram": limit}
        found = call(
            "prune", model=str(model), out=str(out), amount="2:4", resources={"device": arguments.device, **given},
            calibration={"samples": arguments.samples, "seqlen": arguments.seqlen},
        )  # fmt: skip
        shutil.rmtree(out)
        vram: dict[str, int] = found["vram_bytes"]
        return vram

    least, most = 0, prune(None)["device"]
    try:
        prune(1)
    except BenchError as e:
        found = re.search(r"needs --max-vram (\d+)MiB", str(e))
        if not found:
            raise
        least = int(found.group(1)) * MIB
    step = max(_LEAST_SPAN, most - least) // max(1, arguments.limits - 1)
    for number in range(arguments.limits):
        limit = least + number * step
        vram = [prune(limit) for _ in range(arguments.repeat)]
        row = figure(
            f"--max-vram {limit / MIB:.0f}MiB", [v["reserved"] / MIB for v in vram], "the limit",
            [limit / MIB] * arguments.repeat, unit="MiB", on="VRAM that Torch reserved against --max-vram",
        )  # fmt: skip
        yield row | {"device_mib": round(statistics.median(v["device"] for v in vram) / MIB, 2)}
