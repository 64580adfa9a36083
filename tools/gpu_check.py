"""Tests and benchmarks of the Torch backend on a real GPU, by one command.

    python tools/gpu_check.py                          eight minutes, everything, in order of value
    python tools/gpu_check.py --minutes 4 --out found
    python tools/gpu_check.py --only kernels,2:4       some sections, in this order of value all the same
    python tools/gpu_check.py --wheels wheels          Python packages from wheels, no package index

Each section runs in a process of its own, and may take its share of the remaining time. Its results are written to
OUT/gpu_check.json and OUT/gpu_check.md when it ends or its time is up, so that an interrupted run leaves the results so
far. --small (tiny shapes) and --device cpu are for testing this tool; their figures are meaningless.

It needs a Python with torch for CUDA, numpy, numba, safetensors and pytest. Other packages that are missing or too old
can be passed as wheels; streamprune/disk/README.md has the command to download them.

Exit codes: 0 all sections done, 1 one of them failed or was cut off, 2 usage, 5 no GPU, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

TOOLS = Path(__file__).resolve().parent
NO_GPU, INTERRUPTED = 5, 130
_TEXT_LINES = 60  # of a section's output that is no JSON, the last


class CheckError(Exception):
    """A reason why the check cannot be run: a one-line message and the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Section:
    """A command that prints JSON rows or text, its share of the time, and its arguments (`small` with --small)."""

    title: str
    share: float
    command: tuple[str, ...]
    full: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    by_device: bool = True


_NARROW = ("--preset", "narrow", "--hidden", "256", "--intermediate", "512", "--heads", "4", "--vocab", "2048")
_PYTEST = ("-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", "--tb=short", "-m", "gpu or not gpu")
_TESTS = "tests/test_on_a_gpu.py"
_PROCESSES = "killed or one_launch or max_vram or memcheck"
SECTIONS = {
    "environment": Section("The machine", 20, ("tools/gpu_sections.py", "environment")),
    "tests": Section(
        "Tests on the card: kernels, Grams, refits, jobs", 100, (*_PYTEST, _TESTS),
        ("-k", f"card and not ({_PROCESSES})"), ("-k", "stand-in and test_what_is_not_finite"), by_device=False,
    ),
    "kernels": Section(
        "Kernels against a copy of the same bytes, torch.sort, topk", 50, ("tools/bench.py", "kernels", "--json"),
        ("--shape", "4096x4096", "--shape", "8192x28672", "--repeat", "5"), ("--shape", "64x256", "--repeat", "1"),
    ),
    "calibration": Section(
        "Calibration of 7B-shaped layers against the bare layer's forward", 60,
        ("tools/bench.py", "calibration", "--json"),
        ("--preset", "7b", "--layers", "4", "--samples", "64", "--repeat", "2"),
        (*_NARROW, "--layers", "2", "--samples", "2", "--seqlen", "32", "--repeat", "1"),
    ),
    "end-to-end": Section("7B-shaped, 8 layers, against the floor", 70, ("tools/gpu_sections.py", "end-to-end")),
    "large": Section("70B-shaped layers within 8 GiB of VRAM and 6 GiB of RAM", 80, ("tools/gpu_sections.py", "large")),
    "refits": Section("Refits of 7B-shaped layers, for 32 of them", 80, ("tools/gpu_sections.py", "refits")),
    "tuning": Section("Tuning a layer of 7B and one of 70B within 24 GB", 60, ("tools/gpu_sections.py", "tuning")),
    "fp8": Section("FP8 output, loaded by transformers", 40, ("tools/gpu_sections.py", "fp8")),
    "2:4": Section("2:4 against dense with Torch's sparse kernels", 40, ("tools/gpu_sections.py", "two-four")),
    "processes": Section(
        "Tests on the card: killed and resumed, --max-vram, races, memcheck", 100, (*_PYTEST, _TESTS),
        ("-k", f"({_PROCESSES}) and not cpu"), ("-k", "one_launch and cpu"), by_device=False,
    ),
}  # fmt: skip


@dataclass
class Found:
    """The result of a section."""

    status: str
    seconds: float = 0.0
    command: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    passed: int = 0
    """Of tests."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit code."""
    try:
        arguments = parse(argv)
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            environment = environment_with(arguments.wheels, Path(folder))
            require_device(arguments.device, environment)
            return check(arguments, environment)
    except CheckError as e:
        print(f"gpu_check: error: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("gpu_check: interrupted; what was found by then is kept", file=sys.stderr)
        return INTERRUPTED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises CheckError."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, metavar="N", help="for all sections (default: %(default)s)")
    add("--only", metavar="A,B", help=f"these of {', '.join(SECTIONS)}")
    add("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="for results (default: %(default)s)")
    add("--wheels", type=Path, metavar="DIR", help="wheels of packages that are missing or too old")
    add("--device", default="cuda", help="cuda, cuda:1 … (default: %(default)s)")
    add("--small", action="store_true", help="tiny shapes, to try the tool")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.minutes < float("inf"):
        raise CheckError(f"--minutes {arguments.minutes} must be above 0")
    wanted = list(SECTIONS) if arguments.only is None else arguments.only.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        raise CheckError(f"--only {unknown[0]}: there are {', '.join(SECTIONS)}")
    arguments.sections = [name for name in SECTIONS if name in wanted]
    return arguments


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        raise CheckError(f"{message}; see {self.prog} --help")


def environment_with(wheels: Path | None, folder: Path) -> dict[str, str]:
    """The sections' environment: this tree first in the path, then wheels, which are unpacked into `folder`."""
    paths = [str(TOOLS.parent)]
    if wheels is not None:
        found = sorted(wheels.glob("*.whl"))
        if not found:
            raise CheckError(f"--wheels {wheels}: no wheels there")
        for wheel in found:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder / "wheels")
            except (OSError, zipfile.BadZipFile) as e:
                raise CheckError(f"--wheels {wheel} cannot be unpacked ({e})") from e
        paths.append(str(folder / "wheels"))
    path = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


_ASK = f"""
import re, sys, tomllib, torch
from importlib.metadata import version
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit({NO_GPU})
torch.empty(1, device=sys.argv[1])
project = tomllib.load(open({str(TOOLS.parent / "pyproject.toml")!r}, "rb"))["project"]
number = lambda text: [int(part) for part in re.findall("[0-9]+", text)[:2]]
for name, least in (needed.split(">=") for needed in project["dependencies"]):
    if number(version(name)) < number(least):
        sys.exit(f"{{name}} {{version(name)}} is older than {{least}}")
import streamprune.pruning.job, streamprune.evaluation.evaluate, streamprune.model.skeleton, transformers
"""


def require_device(device: str, environment: dict[str, str]) -> None:
    """Raises CheckError, with 5 where there is no GPU, unless the device and all packages are there."""
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, device], env=environment, capture_output=True, text=True, check=False
    )
    if asked.returncode == NO_GPU:
        raise CheckError(f"no GPU that torch can use ({device}); nothing was measured", NO_GPU)
    if asked.returncode:
        last = asked.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise CheckError(f"{sys.executable} cannot run this: {last[0]}; see --wheels")


def check(arguments: argparse.Namespace, environment: dict[str, str]) -> int:
    """All sections within the time; results are written after each."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    found: dict[str, Found] = {name: Found("not reached") for name in arguments.sections}
    write(arguments, found)
    for number, name in enumerate(arguments.sections):
        shares = [SECTIONS[other].share for other in arguments.sections[number:]]
        left = end - time.monotonic()
        if left < 1:
            break
        print(f"{name} …", flush=True)
        try:
            run(name, arguments, environment, left * shares[0] / sum(shares), found[name])
        finally:
            write(arguments, found)
        print(f"{name}: {found[name].status} after {found[name].seconds:.0f} s", flush=True)
    print(f"results: {arguments.out / 'gpu_check.md'}")
    return 0 if all(f.status == "done" for f in found.values()) else 1


def command_of(name: str, arguments: argparse.Namespace) -> list[str]:
    """A section's command line."""
    section = SECTIONS[name]
    more = section.small if arguments.small else section.full
    command = [sys.executable, *section.command, *more]
    if section.by_device:
        command += ["--device", arguments.device]
    if "tools/gpu_sections.py" in command and arguments.small:
        command.append("--small")
    return command


def run(name: str, arguments: argparse.Namespace, environment: dict[str, str], limit: float, found: Found) -> None:
    """Runs a section for `limit` seconds at most; `found` is filled line by line."""
    begun, command = time.monotonic(), command_of(name, arguments)
    found.status, found.command = "cut off", " ".join(["python", *command[1:]])
    process = subprocess.Popen(
        command, env=environment, cwd=TOOLS.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    try:
        while (left := begun + limit - time.monotonic()) > 0:
            try:
                line = lines.get(timeout=left)
            except queue.Empty:
                break
            if line is None:
                found.status = "done" if process.wait() == 0 else f"failed with {process.returncode}"
                break
            _take(line, found)
    finally:
        found.seconds = round(time.monotonic() - begun, 1)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        reader.join(10)  # all that held the pipe open is gone


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout as said:
        for line in said:
            lines.put(line)
    lines.put(None)


def _take(line: str, found: Found) -> None:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict):
        found.rows.append(row)
    elif re.search(r" PASSED +\[ *\d+%\]$", line):
        found.passed += 1
    elif line.strip():
        found.text = [*found.text, line.rstrip()][-_TEXT_LINES:]


def write(arguments: argparse.Namespace, found: dict[str, Found]) -> None:
    """gpu_check.json and gpu_check.md, each replaced as a whole."""
    for name, content in (
        ("gpu_check.json", json.dumps({n: asdict(f) for n, f in found.items()}, indent=1)),
        ("gpu_check.md", markdown(arguments, found)),
    ):
        part = arguments.out / f".{name}"
        part.write_text(content + "\n")
        part.replace(arguments.out / name)


def markdown(arguments: argparse.Namespace, found: dict[str, Found]) -> str:
    """All results as a page."""
    lines = [f"# gpu_check on {arguments.device}{', small: figures say nothing' * arguments.small}"]
    for name, f in found.items():
        lines += ["", f"## {SECTIONS[name].title}", "", f"{name}: {f.status}, {f.seconds:.0f} s. `{f.command}`"]
        if f.passed:
            lines += ["", f"{f.passed} tests passed."]
        columns = list(dict.fromkeys(key for row in f.rows for key in row))
        if columns:
            lines += ["", _line(columns), _line(["---"] * len(columns))]
            lines += [_line([_cell(row.get(key, "")) for key in columns]) for row in f.rows]
        if f.text:
            lines += ["", "```", *f.text, "```"]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
