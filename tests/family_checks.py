"""What is asked of a family of architectures, each question one check: it raises, or returns what a table says of it.

The tests and `tools/families.py` share these, for families with experts (tests/mixtures.py) and without
(tests/families.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calls import evaluate
from families import save_model
from mixtures import EVERY, look, save_mixture, watch_experts, weights_of_experts
from whole_model import (
    SAMPLES,
    SEQLEN,
    Stats,
    check_linear,
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

from streamprune.calibration.statistics import StatisticsFile
from streamprune.errors import UnsupportedError
from streamprune.inspection.inspect import inspect
from streamprune.pruning.expert_codes import IN_TRANSFORMERS, IN_VLLM
from streamprune.pruning.job import JobResult

LAYERS = 2
ROUTERS = re.compile(r"\.(gate|router|shared_expert_gate)(\.\w+)*$")
"""Linears of mixtures that say which expert is used, and how much."""
MIXERS = re.compile(r"\.altup\.\w+$|\.block_inject_weight$")
"""Linears that say how several streams of hidden states are mixed."""
DENSE = re.compile(f"{ROUTERS.pattern}|{MIXERS.pattern}")
"""What stays dense in a mixture."""
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

    like: str
    """A family whose layers have the same path, and which the same class loads."""
    least: int | None = None
    """Tokens that an expert must see to go by them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.source = self.save(folder / "model")
        self.tokens = write_tokens(folder / "tokens.npy")
        self._loaded: dict[Path, Any] = {}

    def save(self, folder: Path) -> Path:
        self.like = self.kind
        return save_model(folder, self.kind, LAYERS, "float32")

    @property
    def whole(self) -> Any:
        return self.load(self.source)

    @cached_property
    def windows(self) -> torch.Tensor:
        return windows_of(self.source, self.tokens)

    @cached_property
    def held(self) -> torch.Tensor:
        """The windows (n, SEQLEN) that `evaluate` cuts the text into."""
        ids = torch.from_numpy(np.load(self.tokens))
        return ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)

    @cached_property
    def statistics(self) -> Stats:
        """Of all linears that are pruned, as a job uses them."""
        found: Stats = {}
        for name, one in gather(self.whole, self.like, self.windows).items():
            if not MIXERS.search(name):  # sums over all uses of a weight
                whole = found.get(self.called[name])
                sums = one if whole is None else (whole[0] + one[0], whole[1] + one[1], whole[2] + one[2])
                found[self.called[name]] = sums
        return found

    @cached_property
    def called(self) -> dict[str, str]:
        """What the weight of each linear is called in the last layer that uses it."""
        linears = linears_of(self.whole, self.like)
        last = {id(module.weight): name for name, module in linears.items()}
        return {name: last[id(module.weight)] for name, module in linears.items()}

    @property
    def kept(self) -> set[str]:
        """Linears that keep their values in a refit."""
        return self.few | {last for name, last in self.called.items() if name != last}

    @property
    def few(self) -> set[str]:
        """Linears that see too little to go by it."""
        return set()

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        """The matrices (out, in) of all linears that are pruned."""
        linears = linears_of(model, self.like)
        names = [name for name in dict.fromkeys(self.called.values()) if not MIXERS.search(name)]
        return {name: weight_of(linears[name]) for name in names}

    def watch(self, see: Callable[[str, torch.Tensor], None]) -> None:
        """Shows `see(linear, x)` each linear's inputs (tokens, in), float64, as they count in what it is judged by."""

        def called(name: str, x: torch.Tensor) -> None:
            if not MIXERS.search(name):
                see(self.called[name], x)

        watch(self.whole, self.like, self.windows, called)

    @property
    def codable(self) -> str:
        """Why FP8 is refused, in words of the error; "" where it is not."""
        if any(name != last for name, last in self.called.items()):
            return "FP8 checkpoints name each linear once"
        conv1d = any(type(m).__name__ == "Conv1D" for m in linears_of(self.whole, self.like).values())
        return "Conv1D" if conv1d else ""

    @property
    def ways(self) -> list[Trial]:
        """This, and the same model stored otherwise."""
        return [self]

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
        if self.least is not None and "stats" not in more:
            more["expert_tokens"] = self.least
        return stream(self.source, self.folder / name, self.tokens, job, **more)

    def load(self, folder: Path) -> Any:
        """The model of a folder, loaded once."""
        if folder not in self._loaded:
            self._loaded[folder] = in_memory(folder, self.like)
        return self._loaded[folder]

    def remember(self, folder: Path, model: Any) -> None:
        """Takes `model` for the one of `folder` from now on."""
        self._loaded[folder] = model


class MixtureTrial(Trial):
    """The same of a mixture of experts: linears are those of experts, too, but no routers."""

    least = 20

    def __init__(self, kind: str, folder: Path, fused: bool = False) -> None:
        self.mixture, self.fused = EVERY[kind], fused
        super().__init__(kind, folder)

    def save(self, folder: Path) -> Path:
        self.like = self.mixture.like
        return save_mixture(folder, self.kind, fused=self.fused)

    @cached_property
    def _pooled(self) -> tuple[Stats, set[str]]:
        seen = look(self.whole, self.mixture, self.windows, fused=self.fused)
        assert seen.roles, "no experts"
        return seen.pooled(self.least)

    @cached_property
    def statistics(self) -> Stats:
        dense = gather(self.whole, self.like, self.windows)
        return {**{name: s for name, s in dense.items() if not DENSE.search(name)}, **self._pooled[0]}

    @property
    def few(self) -> set[str]:
        return self._pooled[1]

    def weights(self, model: Any) -> dict[str, torch.Tensor]:
        plain = {name: weight for name, weight in super().weights(model).items() if not DENSE.search(name)}
        return plain | weights_of_experts(model, self.mixture, self.fused)

    def watch(self, see: Callable[[str, torch.Tensor], None]) -> None:
        watch(self.whole, self.like, self.windows, lambda name, x: None if DENSE.search(name) else see(name, x))

        def weighted(name: str, x: torch.Tensor, share: torch.Tensor) -> None:
            see(name, (x * share).double())

        watch_experts(self.whole, self.mixture, self.windows, weighted, self.fused)

    @property
    def codable(self) -> str:
        known = self.kind in IN_TRANSFORMERS | IN_VLLM
        return "" if known or (self.mixture.apart and not self.fused) else "which holds all experts"

    @property
    def ways(self) -> list[Trial]:
        return [self, self._other] if self.mixture.apart and not self.fused else [self]

    @cached_property
    def _other(self) -> MixtureTrial:
        (self.folder / "fused").mkdir()
        return MixtureTrial(self.kind, self.folder / "fused", fused=True)


def check_masks(trial: Trial) -> str:
    """A sparsity and 2:4: every linear's mask is the reference's, all else is unchanged."""
    for way in trial.ways:
        for out, job in ((way.half, HALF), (way.two_four, TWO_FOUR)):
            _check_output(way, out, job)
    return "yes"


def _check_output(trial: Trial, out: Path, job: dict[str, Any]) -> None:
    """Names, dtypes, shapes; every linear's mask; nothing else has changed."""
    before, after = stored(trial.source), stored(out)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    dense, sparse = trial.whole, trial.load(out)
    old, new = trial.weights(dense), trial.weights(sparse)
    assert old.keys() == new.keys() == trial.statistics.keys()
    differ = sum(check_linear(old[name], new[name], trial.statistics[name], job) for name in old)
    assert differ <= sum(weight.numel() for weight in old.values()) / 1000
    mine = {weight.untyped_storage().data_ptr() for weight in old.values()}
    unchanged = 0
    for name, tensor in dense.state_dict().items():
        same = torch.equal(tensor, sparse.state_dict()[name])
        assert same != (tensor.untyped_storage().data_ptr() in mine), name
        unchanged += same
    assert unchanged
    pruned = sum(int((weight == 0).sum()) for weight in new.values())
    assert sum(int((before[n] != after[n]).sum()) for n in before) == pruned  # as stored, too


def check_sums(trial: Trial) -> str:
    """The statistics are those that hooks on the whole model see."""
    for way in trial.ways:
        assert way.half.is_dir()
        file = StatisticsFile(way.folder / "statistics")
        beside = file.groups.keys() ^ way.statistics.keys()
        beside -= {name for name, last in way.called.items() if name != last}  # of a single use
        assert all(name in file.groups and DENSE.search(name) for name in beside), beside
        assert {name for name, leader in file.groups.items() if ".pooled." in leader} == way.few
        assert len(way.few) < len(way.statistics)
        same_sums(file, way.statistics)
        for name, (tokens, _, squares) in way.statistics.items():
            assert tokens % (SAMPLES * SEQLEN) == 0 or isinstance(way, MixtureTrial), name
            assert tokens == SAMPLES * SEQLEN or isinstance(way, MixtureTrial) or name in way.kept, name
            assert bool((squares > 0).any()), name
    return "yes"


def same_sums(file: StatisticsFile, wanted: Stats) -> None:
    """The linears of `wanted` have these sums in the file, of at least a token."""
    for name, (tokens, total, squares) in wanted.items():
        found = file.load(name, len(total))
        assert found.tokens == tokens > 0, name
        torch.testing.assert_close(torch.from_numpy(found.sumsq), squares, rtol=1e-5, atol=1e-6 * float(squares.max()))
        spread = (squares * tokens).sqrt()
        assert bool(((torch.from_numpy(found.sum) - total).abs() <= 1e-5 * spread + 1e-6 * spread.max()).all()), name


def check_inspect(trial: Trial) -> str:
    """`inspect` finds the same linears without building the model, and 2:4 in each."""
    for way in trial.ways:
        found = inspect(way.two_four, expect="2:4")
        assert found.ok and not found.left_dense and len(found.linears) == len(way.statistics), len(found.linears)
    return "yes"


def check_use(trial: Trial) -> str:
    """The output loads without a missing or an unexpected tensor, is tied where the source is, and generates."""
    names = list(stored(trial.half))
    assert sorted(names) == sorted(stored(trial.source))
    model = trial.load(trial.half)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = trial.whole.get_input_embeddings().weight is trial.whole.get_output_embeddings().weight
    assert (embedding is head) == tied
    alike = 1 if tied or head.shape != embedding.shape else 2
    assert sum(tensor.shape == embedding.shape for tensor in stored(trial.half).values()) >= alike
    start = trial.windows[:1, :4]
    made = model.generate(start, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 7)
    return "tied" if tied else "yes"


def check_eval(trial: Trial) -> str:
    """`evaluate` of the pruned model gives the whole model's perplexity; it is not that of the dense one."""
    found = evaluate(trial.half, trial.tokens, seqlen=SEQLEN, dtype="float32", work=trial.folder).perplexity
    wanted, dense = (perplexity(model, trial.held) for model in (trial.load(trial.half), trial.whole))
    assert abs(found - wanted) <= 1e-5 * wanted < 2e-1 * abs(found - dense), (found, wanted, dense)
    return "yes"


def check_refit(trial: Trial) -> str:
    """2:4 with new values: output errors on the calibration text are as reported, and below those of the mask alone.

    Experts that see too little keep their values: of them, no error is reported.
    """
    result = trial.prune("refit", REFIT | {"propagate": "dense"})
    dense, fitted = trial.weights(trial.whole), trial.weights(trial.load(result.out))
    change, power = dict.fromkeys(dense, 0.0), dict.fromkeys(dense, 0.0)

    def see(name: str, x: torch.Tensor) -> None:
        before, after = dense[name].double(), fitted[name].double()
        change[name] += float((x @ (before - after).t()).square().sum())
        power[name] += float((x @ before.t()).square().sum())

    trial.watch(see)
    reported = {entry["name"]: entry for entry in result.report["linears"]}
    assert reported.keys() == dense.keys()
    assert {name for name, entry in reported.items() if "error" not in entry} == trial.kept
    for name, entry in reported.items():
        kept = fitted[name] != 0
        assert int(kept.unflatten(1, (-1, 4)).sum(2).max()) == 2, name
        if name in trial.kept:
            assert torch.equal(fitted[name][kept], dense[name][kept]), name
            continue
        error = change[name] / power[name]
        assert abs(error - entry["error"]) <= 1e-3 * error + 1e-6, (name, error, entry["error"])
    judged = [entry for name, entry in reported.items() if name not in trial.kept]
    assert sum(e["error"] for e in judged) < 0.9 * sum(e["error_mask"] for e in judged)
    for name, weight in trial.weights(trial.load(trial.prune("default", REFIT).out)).items():
        assert int((weight != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2 and torch.isfinite(weight).all(), name
    return "yes"


def check_fp8(trial: Trial) -> str:
    """Codes and scales of the 2:4 weights; transformers loads them, generates, and computes as `eval` does; or refused.

    compressed-tensors rounds inputs token by token only where they have three dimensions, so that is what it is given.
    """
    try:
        out = trial.prune("fp8", FP8).out
    except UnsupportedError as e:
        assert trial.codable and trial.codable in str(e), str(e)
        assert not (trial.folder / "fp8").exists()
        return "refused"
    assert not trial.codable
    if trial.kind in IN_VLLM:
        return "vLLM"  # what is stored: see test_expert_codes.py
    if not isinstance(trial, MixtureTrial) or trial.mixture.apart:
        _check_codes(trial, out)
    model = in_memory(out, trial.like)
    assert model.generate(trial.windows[:1, :4], max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > 4
    found = evaluate(out, trial.tokens, seqlen=SEQLEN, dtype="float32", work=trial.folder).perplexity
    as_given = perplexity(model, trial.held)
    ranks = _in_three_dimensions(model)
    wanted = perplexity(model, trial.held)
    assert abs(found - wanted) <= 1e-5 * wanted, (found, wanted)
    assert ranks and (ranks != {3} or as_given == wanted), (as_given, wanted)
    return "yes"


def _check_codes(trial: Trial, out: Path) -> None:
    """Codes and scales of all linears that are pruned, all else unchanged, and what config.json says is not in FP8."""
    before, after = stored(trial.source), stored(out)
    codes = {n for n, t in after.items() if t.dtype == torch.float8_e4m3fn}
    assert len(codes) == len(trial.statistics)
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
    linears = {n for n, m in trial.whole.named_modules() if isinstance(m, torch.nn.Linear)}
    names = {n.removesuffix(".weight") for n in before.keys() - codes if n.endswith(".weight")}
    routers = {n for n in names if ROUTERS.search(n)}  # no linears, some of them, and called otherwise on disk
    idle = {n for n in names if re.search(r"\.experts\.\d+\.", n)}  # that give back what they are given
    assert ignored == linears - trial.statistics.keys() | routers | idle


def _in_three_dimensions(model: Any) -> set[int]:
    """Has the linears of a loaded FP8 model take their inputs as (1, tokens, in), rounded by compressed-tensors.

    Returns how many dimensions the inputs had, known once the model has run.
    """
    ranks: set[int] = set()

    def forward(own: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        ranks.add(x.dim())
        return own(x.reshape(1, -1, x.shape[-1])).view(*x.shape[:-1], -1)

    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.forward = partial(forward, module.forward)
    return ranks


CHECKS: dict[str, Callable[[Trial], str]] = {
    "masks": check_masks,
    "statistics": check_sums,
    "inspect": check_inspect,
    "loads, generates": check_use,
    "eval": check_eval,
    "refit": check_refit,
    "FP8": check_fp8,
}
