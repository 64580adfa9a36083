"""Makes what jobs.tar.xz holds, in the working directory; for the package and the tests of commit 28a203c."""

from pathlib import Path

import numpy as np
from families import VOCAB, save_model
from streamprune.job import calibrate, prune  # type: ignore[import-not-found]

GIVEN = {"calib": "text.txt", "samples": 4, "seqlen": 16, "dtype": "float32", "device": "cpu"}
JOBS = {
    "plain": {"sparsity": 0.5},
    "allocated": {"sparsity": 0.5, "allocate": "owl"},
    "refitted": {"pattern": "2:4", "method": "obs-admm"},
    "tuned": {"pattern": "2:4", "method": "swiftprune-tuned", "tune_epochs": 2},
}


class StoppedError(Exception):
    """Ends a job where it stands."""


def stop(step):
    """After the first layer of a prune of four stages, or of a calibration of three."""
    if step.name == "layer 0" and step.total == stages:
        raise StoppedError


save_model(Path("model"), "llama", 2, "bfloat16")
words = np.random.default_rng(7).integers(0, VOCAB, (40, 25))
Path("text.txt").write_text("\n".join(" ".join(f"w{i}" for i in line) for line in words) + "\n")
calibrate("model", "statistics", **GIVEN)
prune("model", "finished", sparsity=0.5, **GIVEN)
for name, job in {**JOBS, "gathered": {}}.items():
    stages = 4 if job else 3
    try:
        (prune if job else calibrate)("model", name, progress=stop, **job, **GIVEN)
    except StoppedError:
        print(name)
