"""The sections of tools/gpu_check.py that no other tool has: one JSON object a line, each as soon as it is known.

python tools/gpu_sections.py large --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from bench_forward import BareLayer, Batches  # noqa: E402
from bench_rig import Row, copy_durably, into_page_cache, machine, run, streamprune  # noqa: E402
from bench_rig import call as child  # noqa: E402
from gpu_sparse import two_four  # noqa: E402
from make_checkpoint import PRESETS, Shape, write_checkpoint  # noqa: E402

GIB = 1 << 30
_TINY = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocab=2048)
_SLACK = 4 * GIB  # of disk, that the checkpoint and its output leave


def environment(device: torch.device, small: bool) -> Iterator[Row]:
    """The machine, then what it can at best: copies, and a product in bf16."""
    yield machine()
    if device.type == "cuda":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False) if shutil.which(asked[0]) else None
        properties = torch.cuda.get_device_properties(device)
        yield {
            "driver": told.stdout.strip() if told else None, "cuda": torch.version.cuda,
            "memory_gib": round(properties.total_memory / GIB, 1), "processors": properties.multi_processor_count,
        }  # fmt: skip
    for name, value in peaks(device, small).items():
        yield {"what": name, "value": float(f"{value:.4g}")}


def peaks(device: torch.device, small: bool = False) -> dict[str, float]:
    """GB/s from pinned memory to the device and within it (read and written), TFLOP/s of a bf16 product."""
    nbytes, side = (1 << 20, 128) if small else (GIB, 8192)
    here = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there, other = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    a = torch.randn(side, side).to(device, torch.bfloat16)
    return {
        "host to device, GB/s": nbytes / 1e9 / seconds_of(lambda: there.copy_(here, non_blocking=True), device),
        "device copy, GB/s": 2 * nbytes / 1e9 / seconds_of(lambda: other.copy_(there), device),
        "bf16 product, TFLOP/s": 2 * side**3 / 1e12 / seconds_of(lambda: a @ a, device),
    }


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Of one call, after two that do not count."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for number in range(calls + 2):
        if number == 2:
            wait()
            begun = time.perf_counter()
        work()
    wait()
    return (time.perf_counter() - begun) / calls


# ---- whole jobs


def end_to_end(device: torch.device, small: bool) -> Iterator[Row]:
    """7B-shaped, 8 layers, 128 windows of 2048 tokens; the seconds of 32 layers follow."""
    shape = _TINY if small else Shape(**{**vars(PRESETS["7b"]), "layers": 8})
    windows = (2, 32) if small else (128, 2048)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        yield from measured(shape, windows, device, Path(folder), [], [], small, layers=32)


def large(device: torch.device, small: bool) -> Iterator[Row]:
    """70B-shaped layers, as many as fit the disk, at most 4, within 8 GiB of VRAM and 6 GiB of RAM."""
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        shape, room = PRESETS["70b-layer"], shutil.disk_usage(folder).free - _SLACK
        one = Shape(**{**vars(shape), "layers": 2}).nbytes - shape.nbytes
        layers = max(1, min(4, (room // 2 - (shape.nbytes - one)) // one))
        shape = _TINY if small else Shape(**{**vars(shape), "layers": layers})
        vram = ["--max-vram", "8GiB"] if device.type == "cuda" else []
        windows = (2, 32) if small else (32, 2048)
        yield from measured(shape, windows, device, Path(folder), ["--max-ram", "6GiB"], vram, small, layers=80)


def measured(
    shape: Shape, windows: tuple[int, int], device: torch.device, folder: Path, how: list[str], both: list[str],
    small: bool, layers: int,
) -> Iterator[Row]:  # fmt: skip
    """A prune, what plan said, and the floor: the longest of copying the files, sending the weights, and computing.

    `how` are options of prune alone, `both` of plan as well; `layers` is how many a whole model has.
    """
    model, out = folder / "model", folder / "out"
    write_checkpoint(model, 0, shape)
    yield {"what": "checkpoint, GB", "value": shape.nbytes / 1e9, "layers": shape.layers}
    into_page_cache(model)
    copied = copy_durably(model, folder / "copy")
    into_page_cache(model)
    best = peaks(device, small)
    torch.cuda.empty_cache()  # of this process, whose memory is not the job's; nothing without a GPU
    job = [*both, "--samples", str(windows[0]), "--seqlen", str(windows[1]), "--device", str(device)]
    with watched(device) as most:
        ran = streamprune("prune", str(model), str(out), "--pattern", "2:4", *how, *job)
    result = ran.result
    report = json.loads((out / "streamprune.json").read_text())
    shutil.rmtree(out)
    yield {
        "what": "prune, s", "value": result["seconds"], "whole process, s": ran.seconds,
        "RAM by the program, MiB": result["peak_rss_bytes"] >> 20, "RAM seen, MiB": (ran.hwm or 0) >> 20,
        "VRAM seen, MiB": most[0] >> 20, "batch": report["resolved"]["batch"],
    }  # fmt: skip
    bare = BareLayer(model, Batches.of(report))
    forward = bare.seconds()
    floor = {
        "copy of the files": copied,
        "weights to the device": shape.nbytes / 1e9 / best["host to device, GB/s"],
        "forward at the product's speed": shape.layers * bare.flops / 1e12 / best["bf16 product, TFLOP/s"],
        "bare forward of all layers": shape.layers * forward,
    }
    for name, value in floor.items():
        yield {"what": f"floor: {name}, s", "value": value}
    least = max(value for name, value in floor.items() if not name.startswith("bare"))
    yield {"what": "prune ÷ floor", "value": result["seconds"] / least}
    yield {"what": f"beyond copying, s for {layers} layers",
           "value": (result["seconds"] - copied) * layers / shape.layers}  # fmt: skip
    planned = streamprune("plan", str(model), *job).result
    yield {
        "what": "plan said, s",
        "value": planned["seconds"],
        "RAM by the program, MiB": planned["peak_ram_bytes"] >> 20,
    }


class watched:  # noqa: N801 - reads as a word
    """Within it, `most[0]` is the most memory of the device that was in use beyond what was in use before, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.most, self.done = device, [0], threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> list[int]:
        if self.device.type == "cuda":
            self.before = self._used()
            self.thread.start()
        return self.most

    def __exit__(self, *error: object) -> None:
        self.done.set()
        if self.device.type == "cuda":
            self.thread.join()

    def _used(self) -> int:
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def _look(self) -> None:
        while not self.done.wait(0.02):
            self.most[0] = max(self.most[0], self._used() - self.before)


def refits(device: torch.device, small: bool) -> Iterator[Row]:
    """Seconds of a 7B-shaped layer with each refit, its pass included, and of 32 such layers."""
    shape = _TINY if small else Shape(**{**vars(PRESETS["7b"]), "layers": 2})
    samples, seqlen = (2, 32) if small else (32, 2048)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        write_checkpoint(model, 0, shape)
        for refit, propagate in (
            ("obs-admm", "asymmetric"), ("obs-admm", "dense"), ("sparsegpt", "pruned"), ("gradual-cg", "dense"),
        ):  # fmt: skip
            found = child(
                "prune", model=str(model), out=str(out), amount="2:4", propagate=propagate,
                recipe={"name": "swiftprune", "refit": refit}, resources={"device": str(device)},
                calibration={"samples": samples, "seqlen": seqlen},
            )  # fmt: skip
            shutil.rmtree(out)
            last = [took for name, took in found["stages"] if name.startswith("layer ")][-1]
            yield {"refit": refit, "propagate": propagate, "s a layer": last, "min for 32": 32 * last / 60}


def tuning(device: torch.device, small: bool) -> Iterator[Row]:
    """Seconds of tuning a layer of the 7B and of the 70B shape for two epochs, within 24 GB of VRAM, and its errors."""
    samples, seqlen = (4, 32) if small else (16, 2048)
    for preset in ("7b", "70b-layer"):
        shape = _TINY if small else Shape(**{**vars(PRESETS[preset]), "layers": 1})
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            model = Path(folder) / "model"
            write_checkpoint(model, 0, shape)
            found = child(
                "prune", model=str(model), out=str(Path(folder) / "out"), amount="2:4",
                recipe={"name": "swiftprune-tuned", "tune_epochs": 2},
                resources={"device": str(device), "max_vram": None if device.type == "cpu" else "24GB"},
                calibration={"samples": samples, "seqlen": seqlen},
            )  # fmt: skip
        told = next(stage["tune"] for stage in found["report"]["stages"] if "tune" in stage)
        yield {
            "layer": preset, "s": told["seconds"], "tokens/s": told["epochs"] * samples * seqlen / told["seconds"],
            "held-out error before": told["held_out_error_before"], "after": told["held_out_error"],
            "bytes of VRAM": (found["vram_bytes"] or {}).get("reserved"),
        }  # fmt: skip


_READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval().to(sys.argv[3])
ids = torch.load(sys.argv[2]).to(sys.argv[3])
with torch.inference_mode():
    logits = torch.cat([model(some[None]).logits[:, :-1].float().flatten(0, 1) for some in ids])
nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
print(json.dumps({"nll": float(nll), "class": type(model.model.layers[0].mlp.up_proj).__name__}))
"""


def fp8(device: torch.device, small: bool) -> Iterator[Row]:
    """What transformers makes of an FP8 output, and what eval does, on the same windows."""
    from streamprune.calibration.texts import Text
    from streamprune.calibration.windows import Source, cut_windows
    from streamprune.disk.scratch import ScratchTokens

    shape = _TINY if small else Shape(**{**vars(PRESETS["7b"]), "layers": 2})
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        write_checkpoint(folder / "model", 0, shape)
        few = ["--samples", "4", "--seqlen", "64", "--device", str(device)]
        made = streamprune(
            "prune", str(folder / "model"), str(folder / "out"), "--pattern", "2:4", "--quantize", "fp8", *few
        )  # fmt: skip
        yield {"what": "prune --quantize fp8, s", "value": made.result["seconds"]}
        text = folder / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog, and then it goes home again.\n" * 40)
        with ScratchTokens(folder) as ids:
            windows = cut_windows(Source(Text(text), folder / "out", {}, shape.vocab), 64, ids)[:]
        torch.save(torch.from_numpy(windows), folder / "ids.pt")
        ours = streamprune("eval", str(folder / "out"), "--text", str(text), "--seqlen", "64", *few[4:]).result
        yield {"what": "nll, streamprune eval", "value": ours["nll"]}
        theirs = run("-c", _READ, str(folder / "out"), str(folder / "ids.pt"), str(device)).result
        yield {"what": "nll, transformers", "value": theirs["nll"], "of": theirs["class"]}


SECTIONS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "environment": environment, "end-to-end": end_to_end, "large": large, "refits": refits, "tuning": tuning,
    "fp8": fp8, "two-four": two_four,
}  # fmt: skip


def main() -> int:
    """Runs a section; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows: Any = SECTIONS[arguments.section](torch.device(arguments.device), arguments.small)
    try:
        for row in rows:
            print(json.dumps(row), flush=True)
    except Exception as e:  # noqa: BLE001 - whatever it is, the rows before it count
        print(f"{type(e).__name__}: {' '.join(str(e).split())[:600]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
