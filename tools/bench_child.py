"""One call of streamprune's Python interface in a process of its own, for tools/bench.py.

    python tools/bench_child.py calibrate '{"model": "m7", "out": "stats.safetensors", "calibration": {"samples": 8}}'

`calibration` and `resources` are the fields of these settings, `recipe` a name or the arguments of Recipe.named.

Prints one JSON object: `report`, `seconds` of each stage as the progress callback heard them, and `vram_bytes`, null
without a GPU: the most that Torch reserved, the most that was allocated, and what all processes and their contexts
hold on the device at the end. The process has the same settings as `python -m streamprune`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Returns the exit code: that of the error, if there was one."""
    import streamprune
    from streamprune.__main__ import _steady_heap
    from streamprune.errors import StreampruneError

    _steady_heap()
    stages: list[tuple[str, float]] = []
    verb, arguments = getattr(streamprune, sys.argv[1]), json.loads(sys.argv[2])
    make = {"calibration": streamprune.Calibration, "resources": streamprune.Resources}
    make["recipe"] = streamprune.Recipe.named
    try:
        arguments = {k: make[k](**v) if isinstance(v, dict) else v for k, v in arguments.items()}
        result = verb(**arguments, progress=lambda step: stages.append((step.name, step.seconds)))
    except (StreampruneError, TypeError) as e:
        print(f"streamprune: error: {' '.join(str(e).split())}", file=sys.stderr)
        return getattr(e, "exit_code", 2)
    import torch

    vram = None
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        vram = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
        vram["device"] = total - free
    print(json.dumps({"report": dict(result.report), "stages": stages, "vram_bytes": vram}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
