"""What likelihoods of many requests take, against lm-eval's own `hf` model: time, peak memory, and how far they differ.

    python tools/task_speed.py MODEL [--documents 50] [--dtype float32] [--text FILE]

Requests are made of a text: 20 to 90 words, and four continuations of 3 to 14 words, one of them the right one. Each
model is loaded and asked in a process of its own, on one thread. Takes the extra `tasks`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parents[1] / "streamprune" / "text" / "heldout.txt.gz"


def made(text: str, documents: int) -> list[tuple[str, str]]:
    """(context, continuation), four of each context."""
    words, draw = text.split(), random.Random(0)

    def some(begin: int, least: int, most: int) -> str:
        return " ".join(words[begin : begin + draw.randint(least, most)])

    pairs = []
    for _ in range(documents):
        begin = draw.randrange(len(words) - 200)
        context = some(begin, 20, 90)
        places = [begin + len(context.split()), *(draw.randrange(len(words) - 20) for _ in range(3))]
        pairs += [(context, " " + some(at, 3, 14)) for at in places]
    return pairs


def child(args: argparse.Namespace) -> None:
    """One model's answers, as JSON on the last line."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from streamprune.process.memory import peak_resident_bytes, resident_bytes

    read = gzip.open if args.text.suffix == ".gz" else open
    with read(args.text, "rt", encoding="utf-8") as f:
        pairs = made(f.read(), args.documents)
    asked = [Instance("loglikelihood", {}, pair, i, ("made", i // 4, 1)) for i, pair in enumerate(pairs)]
    if args.child == "hf":
        import lm_eval.models.huggingface  # noqa: F401

        more: dict[str, Any] = {"batch_size": args.batch}
    else:
        import streamprune.evaluation.harness  # noqa: F401

        more = {}
    import torch

    torch.set_num_threads(1)
    base, begun, busy = resident_bytes(), time.perf_counter(), time.process_time()
    lm = get_model(args.child)(pretrained=str(args.model), dtype=args.dtype, device="cpu", **more)
    found = lm.loglikelihood(asked, disable_tqdm=True)
    result = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - busy, "found": found}
    print("\n" + json.dumps(result | {"peak": peak_resident_bytes(), "base": base}))


def run(args: argparse.Namespace, which: str) -> dict[str, Any]:
    """`child` in a process of its own."""
    words = [sys.executable, __file__, str(args.model), "--documents", str(args.documents), "--dtype", args.dtype]
    words += ["--text", str(args.text), "--batch", str(args.batch), "--child", which]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{which}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--batch", type=int, default=16, help="of hf")
    parser.add_argument("--child", choices=("hf", "streamprune"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    results = {which: run(args, which) for which in ("hf", "streamprune")}
    for which, r in results.items():
        print(
            f"{which:12} {r['seconds']:7.1f} s  {r['cpu']:7.1f} s of processor  peak {r['peak'] / 2**20:.0f} MiB "
            f"({r['base'] / 2**20:.0f} MiB before the model)"
        )
    ours, theirs = (results[which]["found"] for which in ("streamprune", "hf"))
    apart = [abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)]
    size = max(abs(b[0]) for b in theirs)
    equal = sum(a[1] == b[1] for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference {max(apart):.3g} of up to {size:.4g} nats; is_greedy equal in {equal} of {len(ours)}")


if __name__ == "__main__":
    main()
