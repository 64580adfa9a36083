"""What is asked of a family of architectures, each question one check: it raises, or returns what a table says of it.

The tests and `tools/families.py` share these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import save_model
from whole_model import (
    SEQLEN,
    check_output,
    check_statistics,
    gather,
    in_memory,
    linears_of,
    perplexity,
    stored,
    stream,
    watch,
    weight_of,
    windows_of,
)  # fmt: skip

from streamprune.errors import UnsupportedError
from streamprune.evaluation import evaluate
from streamprune.inspection import inspect
from streamprune.job import JobResult

LAYERS = 2
HALF: dict[str, Any] = {"method": "swiftprune", "sparsity": 0.5, "score": "lscore", "selector": "ewma"}
TWO_FOUR: dict[str, Any] = {"method": "swiftprune", "pattern": "2:4", "score": "lscore", "selector": "ewma"}
REFIT: dict[str, Any] = {"method": "obs-admm", "pattern": "2:4"}
FP8: dict[str, Any] = {"method": "hwpq", "pattern": "2:4"}
_FP8_STEP = 2.0**-4
"""Half a step of E4M3, relative to the weight."""


def write_tokens(path: Path) -> Path:
    """A text of 600 tokens of 16 kinds, so that a refit has something to learn; none stands for an image."""
    np.save(path, np.random.default_rng(5).choice(np.arange(10, 26), 600))
    return path


class Trial:
    """A tiny model of a family in `folder`, and what is made of it, each thing when it is first asked for."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.source = save_model(folder / "model", kind, LAYERS, "float32")
        self.tokens = write_tokens(folder / "tokens.npy")
        self._loaded: dict[Path, Any] = {}

    @property
    def whole(self) -> Any:
        return self.load(self.source)

    @cached_property
    def windows(self) -> torch.Tensor:
        return windows_of(self.source, self.tokens)

    @cached_property
    def statistics(self) -> Any:
        return gather(self.whole, self.kind, self.windows)

    @cached_property
    def half(self) -> Path:
        saved = self.folder / "statistics"
        return self.prune("half", HALF, save_stats=saved).out

    @cached_property
    def two_four(self) -> Path:
        """Pruned from the statistics that `half` saved."""
        assert self.half.is_dir()
        return self.prune("two-four", TWO_FOUR, calib=None, stats=self.folder / "statistics").out

    def prune(self, name: str, job: dict[str, Any], **more: Any) -> JobResult:
        return stream(self.source, self.folder / name, self.tokens, job, **more)

    def load(self, folder: Path) -> Any:
        """The model of a folder, loaded once."""
        if folder not in self._loaded:
            self._loaded[folder] = in_memory(folder, self.kind)
        return self._loaded[folder]

    def remember(self, folder: Path, model: Any) -> None:
        """Takes `model` for the one of `folder` from now on."""
        self._loaded[folder] = model


def check_masks(trial: Trial) -> str:
    """A sparsity and 2:4: every linear's mask is the reference's, all else is unchanged."""
    for out, job in ((trial.half, HALF), (trial.two_four, TWO_FOUR)):
        check_output(trial.source, out, trial.kind, trial.statistics, job, (trial.whole, trial.load(out)))
    return "yes"


def check_sums(trial: Trial) -> str:
    """The statistics are those that hooks on the whole model see."""
    assert trial.half.is_dir()
    check_statistics(trial.folder / "statistics", trial.statistics)
    return "yes"


def check_inspect(trial: Trial) -> str:
    """`inspect` finds the same linears without building the model, and 2:4 in each."""
    found = inspect(trial.two_four, expect="2:4")
    assert found.ok and len(found.linears) == len(trial.statistics)
    return "yes"


def check_use(trial: Trial) -> str:
    """The output loads without a missing or an unexpected tensor, is tied where the source is, and generates."""
    names = list(stored(trial.half))
    assert sorted(names) == sorted(stored(trial.source))
    model = trial.load(trial.half)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = trial.whole.get_input_embeddings().weight is trial.whole.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert sum(tensor.shape == embedding.shape for tensor in stored(trial.half).values()) == (1 if tied else 2)
    start = trial.windows[:1, :4]
    made = model.generate(start, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 7)
    return "tied" if tied else "yes"


def check_eval(trial: Trial) -> str:
    """`evaluate` of the pruned model gives the whole model's perplexity; it is not that of the dense one."""
    ids = torch.from_numpy(np.load(trial.tokens))
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    found = evaluate(trial.half, trial.tokens, seqlen=SEQLEN, dtype="float32", work=trial.folder).perplexity
    wanted, dense = (perplexity(model, windows) for model in (trial.load(trial.half), trial.whole))
    assert abs(found - wanted) <= 1e-5 * wanted < 1e-1 * abs(found - dense), (found, wanted, dense)
    return "yes"


def check_refit(trial: Trial) -> str:
    """2:4 with new values: output errors on the calibration text are as reported, and below those of the mask alone."""
    result = trial.prune("refit", REFIT)
    dense, fitted = linears_of(trial.whole, trial.kind), linears_of(trial.load(result.out), trial.kind)
    change, power = dict.fromkeys(dense, 0.0), dict.fromkeys(dense, 0.0)

    def see(name: str, x: torch.Tensor) -> None:
        before, after = weight_of(dense[name]).double(), weight_of(fitted[name]).double()
        change[name] += float((x @ (before - after).t()).square().sum())
        power[name] += float((x @ before.t()).square().sum())

    watch(trial.whole, trial.kind, trial.windows, see)
    reported = {entry["name"]: entry for entry in result.report["linears"]}
    assert reported.keys() == dense.keys()
    for name, entry in reported.items():
        assert int((weight_of(fitted[name]) != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2
        error = change[name] / power[name]
        assert abs(error - entry["error"]) <= 1e-3 * error + 1e-6, (name, error, entry["error"])
    assert sum(e["error"] for e in reported.values()) < 0.9 * sum(e["error_mask"] for e in reported.values())
    return "yes"


def check_fp8(trial: Trial) -> str:
    """Codes and scales of the 2:4 weights, which transformers loads and generates with; Conv1D is refused."""
    conv1d = any(type(m).__name__ == "Conv1D" for m in linears_of(trial.whole, trial.kind).values())
    try:
        out = trial.prune("fp8", FP8).out
    except UnsupportedError as e:
        assert conv1d and "Conv1D" in str(e), str(e)
        assert not (trial.folder / "fp8").exists()
        return "refused"
    assert not conv1d
    before, after = stored(trial.source), stored(out)
    codes = {n for n, t in after.items() if t.dtype == torch.float8_e4m3fn}
    assert len(codes) == len(linears_of(trial.whole, trial.kind))
    assert after.keys() == before.keys() | {f"{n}_scale" for n in codes}
    for name, tensor in before.items():
        if name not in codes:
            assert torch.equal(tensor, after[name]), name
            continue
        weight = after[name].float() * after[f"{name}_scale"]
        kept = weight != 0
        assert int(kept.unflatten(1, (-1, 4)).sum(2).max()) <= 2
        assert bool(((weight - tensor).abs() <= _FP8_STEP * tensor.abs() + after[f"{name}_scale"] * 2**-9)[kept].all())
    ignored = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    others = {n for n, m in trial.whole.named_modules() if isinstance(m, torch.nn.Linear)}
    assert ignored == others - linears_of(trial.whole, trial.kind).keys()
    model = in_memory(out, trial.kind)
    assert model.generate(trial.windows[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 4
    return "yes"


CHECKS: dict[str, Callable[[Trial], str]] = {
    "masks": check_masks,
    "statistics": check_sums,
    "inspect": check_inspect,
    "loads, generates": check_use,
    "eval": check_eval,
    "refit": check_refit,
    "FP8": check_fp8,
}
