"""What streaming must give: the whole model in memory, hooked, and float64 scores. Shared by tests and tools.

The reference shares with the program the calibration windows, and nothing else. A float32 score can fall on
the other side of a tie: at most one weight in a thousand may differ, each within TIE of its row's threshold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import references
import torch
from calls import prune
from families import VOCAB, family_of, whole_class
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from windows import drawn

from streamprune.calibration.statistics import StatisticsFile
from streamprune.kernels import EWMA_ALPHA
from streamprune.pruning.job import JobResult

SAMPLES, SEQLEN, SEED, BATCH = 5, 24, 3, 2
TIE = 1e-5
DENSE = re.compile(r"(mixer|mamba)\.dt_proj$")
"""Linears that stay dense, as their modules multiply with their weights and do not call them."""

Stats = dict[str, tuple[int, torch.Tensor, torch.Tensor]]


def linears_of(model: torch.nn.Module, kind: str) -> dict[str, torch.nn.Module]:
    """The linears of the decoder layers that can be pruned, by module path."""
    prefix = family_of(kind).layers
    return {
        f"{prefix}.{name}": module
        for name, module in model.get_submodule(prefix).named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and not DENSE.search(name)
    }


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """(out, in), whatever way the module stores it."""
    weight = module.weight.detach()
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, torch.nn.Linear) else weight.t()


def in_memory(folder: Path, kind: str = "llama", dtype: torch.dtype | str = torch.float32) -> Any:
    """The model as transformers loads it, in `dtype`; every tensor has its place and every place its tensor."""
    model, info = whole_class(kind).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def windows_of(folder: Path, text: Path, seed: int = SEED) -> torch.Tensor:
    return torch.from_numpy(drawn(text, folder, VOCAB, SAMPLES, SEQLEN, seed))


def round_states(model: torch.nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Between layers, hidden states are kept in the checkpoint's dtype."""

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to(dtype).float()}
        return (args[0].to(dtype).float(), *args[1:]), kwargs

    for layer in model.get_submodule(family_of(kind).layers):
        layer.register_forward_pre_hook(before, with_kwargs=True)


def watch(
    model: torch.nn.Module, kind: str, windows: torch.Tensor, see: Callable[[str, torch.Tensor], None], only: str = ""
) -> None:
    """Runs the windows (samples, seqlen); `see(linear, x)` is shown each linear's input, (tokens, in), float64."""

    def hook(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        see(name, args[0].detach().double().flatten(0, -2))

    hooks = [
        module.register_forward_pre_hook(partial(hook, name))
        for name, module in linears_of(model, kind).items()
        if name.startswith(only)
    ]
    with torch.no_grad():
        for batch in windows.split(BATCH):
            model(input_ids=batch, use_cache=False)
    for each in hooks:
        each.remove()


def gather(model: torch.nn.Module, kind: str, windows: torch.Tensor, only: str = "") -> Stats:
    """Tokens, sums and sums of squares of each linear's input, in float64."""
    found: Stats = {}

    def see(name: str, x: torch.Tensor) -> None:
        tokens, total, squares = found.get(name, (0, torch.zeros(()), torch.zeros(())))
        found[name] = (tokens + len(x), total + x.sum(0), squares + (x * x).sum(0))

    watch(model, kind, windows, see, only)
    return found


def score_of(weight: torch.Tensor, stats: tuple[int, torch.Tensor, torch.Tensor], score: str) -> np.ndarray:
    w = weight.double().abs().numpy()
    a = (stats[2] / stats[0]).numpy()
    if score == "lscore":
        return w**2 * a / (1 - a / a.sum())
    if score == "lscore-isotropic":
        return w**2 / (1 - a / a.sum())
    return w * np.sqrt(a) if score == "wanda" else w


def keys_of(scores: np.ndarray, score: str, selector: str) -> np.ndarray:
    """What the selector orders the weights of a row by."""
    if selector == "exact":
        return scores
    if score.startswith("lscore"):
        scores = np.sqrt(scores)
    return np.stack([references.ewma(row, min(32, len(row)), EWMA_ALPHA).z for row in scores])


def check_mask(pruned: np.ndarray, keys: np.ndarray, count: int) -> int:
    """Each row of `pruned` has `count` of its lowest keys, but for near-ties; returns how many weights differ."""
    assert (pruned.sum(1) == count).all()
    wanted = references.lowest(keys, count)
    rows, columns = np.nonzero(wanted != pruned)
    threshold = np.sort(keys, axis=1)[:, max(count - 1, 0)]
    assert (np.abs(keys[rows, columns] - threshold[rows]) <= TIE * np.maximum(1e-30, np.abs(threshold[rows]))).all()
    return len(rows)


def check_linear(
    before: torch.Tensor, after: torch.Tensor, stats: tuple[int, torch.Tensor, torch.Tensor], job: dict[str, Any]
) -> int:
    assert before.dtype == after.dtype
    assert bool((before != 0).all()), "a zero in the source would hide what was pruned"
    pruned = (after == 0).numpy()
    assert torch.equal(after[~(after == 0)], before[~(after == 0)])
    assert not bool(torch.signbit(after[after == 0]).any())
    width = before.shape[1]
    scores = score_of(before, stats, job["score"])
    if "pattern" in job:
        n, m = map(int, job["pattern"].split(":"))
        return check_mask(pruned.reshape(-1, m), scores.reshape(-1, m), m - n)
    keys = keys_of(scores, job["score"], job["selector"])
    return check_mask(pruned, keys, math.floor(job["sparsity"] * width + 1e-9))


def check_statistics(path: Path, wanted: Stats) -> None:
    """The statistics file has the sums of `wanted`, of every token."""
    file = StatisticsFile(path)
    assert file.groups.keys() == wanted.keys()
    for name, (tokens, total, squares) in wanted.items():
        found = file.load(name, len(total))
        assert found.tokens == tokens == SAMPLES * SEQLEN
        torch.testing.assert_close(torch.from_numpy(found.sumsq), squares, rtol=1e-5, atol=1e-6 * float(squares.max()))
        spread = (squares * tokens).sqrt()
        assert bool(((torch.from_numpy(found.sum) - total).abs() <= 1e-5 * spread + 1e-6 * spread.max()).all())
        assert bool((squares > 0).any())


def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Of the windows (samples, seqlen), over all tokens that have a predecessor."""
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[:, :-1].double()
    return math.exp(float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def check_output(
    source: Path, out: Path, kind: str, stats: Stats, job: dict[str, Any], models: tuple[Any, Any] | None = None
) -> None:
    """Names, dtypes, shapes; every linear's mask; nothing else has changed. `models` are both, loaded before."""
    before, after = stored(source), stored(out)
    assert list(before) and before.keys() == after.keys()
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    dense, sparse = models or (in_memory(source, kind, "auto"), in_memory(out, kind, "auto"))
    now, differ, weights, names = linears_of(sparse, kind), 0, 0, set()
    for name, module in linears_of(dense, kind).items():
        weight = weight_of(module)
        differ += check_linear(weight, weight_of(now[name]), stats[name], job)
        weights += weight.numel()
        names.add(f"{name}.weight")
    assert differ <= weights / 1000
    for name, tensor in dense.state_dict().items():
        if name not in names:
            assert torch.equal(tensor, sparse.state_dict()[name]), name
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert len(changed) == len(names)  # as stored, too, and nothing but the linears


def stream(source: Path, out: Path, text: Path, job: dict[str, Any], **more: Any) -> JobResult:
    """Prunes in float32, as `job` and `more` say."""
    given = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "dtype": "float32"}
    return prune(source, out, **{"propagate": "dense", **given, **job, **more})
