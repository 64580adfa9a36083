"""Common parts of the benchmarks: runs and ratios, the machine, child processes, folders on disk."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from make_checkpoint import Shape, shape_from, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SLACK_BYTES = 192 << 20
"""Disk space besides weights and activations; the program itself requires 64 MiB of it."""

Row = dict[str, Any]


class BenchError(Exception):
    """A reason why a benchmark cannot be run; a one-line message, exit code 2."""


# ---- runs and ratios


def interleaved(measures: Sequence[Callable[[], Mapping[str, float]]], repeat: int) -> dict[str, list[float]]:
    """Calls every measure `repeat` times, in rounds of alternating order; returns the runs of each figure by name.

    A measure returns one or several figures. Thus slow changes of the machine's speed affect all measures alike.
    """
    runs: dict[str, list[float]] = {}
    for number in range(repeat):
        for measure in measures if number % 2 == 0 else reversed(measures):
            for name, value in measure().items():
                say(f"round {number + 1}/{repeat}: {name} {value:.4g}")
                runs.setdefault(name, []).append(value)
    return runs


def figure(case: str, runs: Sequence[float], baseline: str, base: Sequence[float], *, unit: str, on: str = "") -> Row:
    """A table row: medians of `runs` and of the baseline's runs `base`, in `unit`, and their ratio.

    Runs with the same index are of the same round. `ratio` is median / median; `ratio_min` and `ratio_max` are the
    least and greatest ratio within a round. `on` says what was measured, such as shape and device.
    """
    ratios = [a / b for a, b in zip(runs, base, strict=True)]
    value, base_value = statistics.median(runs), statistics.median(base)
    numbers = {
        "value": value, "min": min(runs), "max": max(runs), "baseline_value": base_value, "ratio": value / base_value,
        "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip
    rounded = {name: float(f"{number:.6g}") for name, number in numbers.items()}
    return {"on": on, "case": case, "unit": unit, "baseline": baseline} | rounded | {"runs": len(runs)}


def say(text: str) -> None:
    """Shows progress on stderr if it is a terminal; an empty text clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---- the machine


def machine() -> Row:
    """The machine: processor, threads, RAM in bytes, versions of packages, GPU and commit (None without one)."""
    import torch

    memory = _search("/proc/meminfo", r"MemTotal:\s+(\d+) kB")
    return {
        "processor": _search("/proc/cpuinfo", r"model name\s*:\s*(.+)") or os.uname().machine,
        "threads": torch.get_num_threads(),
        "ram_bytes": int(memory) << 10 if memory else None,
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "numpy", "numba", "transformers")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of this working tree, with "+" if tracked files are modified; None without git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--match=", "--dirty=+"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _search(file: str, pattern: str) -> str | None:
    path = Path(file)
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found.group(1).strip() if found else None


# ---- child processes


@dataclass(frozen=True)
class Ran:
    """A finished process: exit code, seconds of wall time, VmHWM in bytes (None without /proc), stdout and stderr."""

    code: int
    seconds: float
    hwm: int | None
    out: str
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on stdout. Raises BenchError with our error or the last line of stderr if it failed."""
        if self.code:
            lines = self.errors.strip().splitlines() or [f"a child process ended with {self.code}"]
            ours = [line for line in lines if line.startswith("streamprune: error: ")]  # torchrun adds lines of its own
            raise BenchError([*lines, *ours][-1].removeprefix("streamprune: error: "))
        found: dict[str, Any] = json.loads(self.out)
        return found


def run(*command: str, python: str = sys.executable) -> Ran:
    """Runs `python` with these arguments to its end, this tree's streamprune first in its path."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begun = time.perf_counter()
        process = subprocess.Popen([python, *command], stdout=out, stderr=errors, env=os.environ | {"PYTHONPATH": path})
        peaks: list[int] = []
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
        watcher.start()
        try:
            code = process.wait()
        except BaseException:
            _stop(process)
            raise
        seconds = time.perf_counter() - begun
        watcher.join()
        out.seek(0)
        errors.seek(0)
        return Ran(code, seconds, max(peaks, default=None), out.read(), errors.read())


def _watch(pid: int, peaks: list[int]) -> None:
    """Reads a process's VmHWM a hundred times a second until it is gone.

    getrusage would include the memory of this process at the fork; VmHWM starts with the child's own program.
    """
    while True:
        try:
            kilobytes = _search(f"/proc/{pid}/status", r"VmHWM:\s+(\d+) kB")
        except OSError:
            return
        if kilobytes is None:
            return
        peaks.append(int(kilobytes) << 10)
        time.sleep(0.01)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminates a process; kills it if it does not end."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def streamprune(*arguments: str) -> Ran:
    """Runs `python -m streamprune … --json --quiet`."""
    return run("-m", "streamprune", *arguments, "--json", "--quiet")


def call(verb: str, **arguments: object) -> dict[str, Any]:
    """Runs streamprune.verb(**arguments) in a fresh process; returns what tools/bench_child.py says of it."""
    return run(str(ROOT / "tools" / "bench_child.py"), verb, json.dumps(arguments)).result


# ---- places on disk


@contextmanager
def temporary_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """A folder below --work that is removed afterwards in any case."""
    work = Path(arguments.work) if arguments.work else None
    if work is not None and not work.is_dir():
        raise BenchError(f"--work {work}: no such folder")
    with tempfile.TemporaryDirectory(prefix="streamprune-bench-", dir=work, ignore_cleanup_errors=True) as name:
        yield Path(name)


def require_disk(folder: Path, nbytes: int) -> None:
    """Raises BenchError unless `nbytes` and some slack are free where `folder` is."""
    free, needed = shutil.disk_usage(folder).free, nbytes + SLACK_BYTES
    if free < needed:
        raise BenchError(
            f"{folder.parent} has {free / 1e9:.3g} GB free, this benchmark needs {needed / 1e9:.3g} GB; "
            "free some, choose another place with --work DIR, or a smaller shape"
        )


def chosen_shape(arguments: argparse.Namespace, **sizes: int) -> Shape:
    """The shape of the synthetic checkpoint. Raises BenchError when its sizes do not fit together."""
    try:
        return shape_from(arguments, **sizes)
    except ValueError as e:
        raise BenchError(str(e)) from e


def checkpoint_in(folder: Path, arguments: argparse.Namespace, *, copies: int, activations: int = 0) -> Path:
    """--checkpoint, or a synthetic one in `folder`, with room left for `copies` more and twice the activations.

    `activations` is how many tokens are cached, as float32 at most.
    """
    given = getattr(arguments, "checkpoint", None)
    if given:
        path = Path(given)
        config = read_config(path)
        require_disk(folder, copies * checkpoint_bytes(path) + 8 * activations * hidden_size(config))
        return path
    shape = chosen_shape(arguments)
    require_disk(folder, (copies + 1) * shape.nbytes + 8 * activations * shape.hidden)
    say(f"making a checkpoint of {shape.nbytes / 1e9:.3g} GB")
    path = folder / "checkpoint"
    write_checkpoint(path, arguments.seed, shape)
    return path


def read_config(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config.json. Raises BenchError when there is none."""
    try:
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    except (OSError, ValueError) as e:
        raise BenchError(f"--checkpoint {checkpoint}: its config.json cannot be read") from e
    text: dict[str, Any] = config.get("text_config", config)
    return text


def hidden_size(config: Mapping[str, Any]) -> int:
    """Width of the hidden states; GPT-2 calls it n_embd."""
    return int(config.get("hidden_size") or config.get("n_embd") or 0)


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum(p.stat().st_size for p in files_of(folder))


def describe(checkpoint: Path) -> str:
    """Size and number of layers."""
    config = read_config(checkpoint)
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    return f"{checkpoint_bytes(checkpoint) / 1e9:.3g} GB, {layers} layers of width {hidden_size(config)}"


def copy_durably(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and of an fsync of every file and the folder; the copy is removed afterwards.

    Links are followed, as on the hub's cache; only this copy is synced, so other writers do not count.
    """
    begun = time.perf_counter()
    subprocess.run(["cp", "-rL", str(source), str(target)], check=True)
    for path in [*files_of(target), target]:
        with _opened(path) as fd:
            os.fsync(fd)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def into_page_cache(folder: Path) -> None:
    """Reads all files of a folder, so that they are in the page cache if they fit."""
    buffer = bytearray(8 << 20)
    for path in files_of(folder):
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def out_of_page_cache(folder: Path) -> None:
    """Drops all files of a folder from the page cache. Raises BenchError where the system cannot."""
    if not hasattr(os, "posix_fadvise"):
        raise BenchError("--cold needs posix_fadvise, which this system does not have")
    for path in files_of(folder):
        with _opened(path) as fd:
            os.fsync(fd)  # dirty pages would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
