"""Jobs that refit, from end to end on tiny models: what is written, what the report says, and that memory, crashes,
devices and backends do not change it.

Errors are compared with those of the whole model in memory: inputs are collected by hooks, sums are float64.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, prune
from conftest import VOCAB
from families import FAMILIES
from safetensors.torch import load_file, save_file
from stand_in import Card, plugged_in
from test_crash import Crasher, show
from test_device_path import LAYOUTS, weights_of
from test_grams import flags
from transformers import AutoModelForCausalLM
from whole_model import in_memory, linears_of, round_states, stored, weight_of
from windows import drawn

from streamprune.calibration.gram_sums import HoldOut
from streamprune.calibration.grams import LayerGrams
from streamprune.cli import main
from streamprune.disk.scratch import ScratchMatrix
from streamprune.errors import StreampruneError, UsageError
from streamprune.methods import conjugate as refit
from streamprune.model.budget import Layout
from streamprune.model.loader import WeightLoader
from streamprune.progress import Progress
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.job import JobResult
from streamprune.pruning.shard import ShardWriter

Models = Callable[..., Path]
SAMPLES, SEQLEN, SEED, BATCH = 6, 32, 3, 2
RECIPES: dict[str, dict[str, Any]] = {
    "gradual-cg": {"method": "gradual-cg"},
    "admm": {"method": "admm"},
    "obs-admm": {"method": "obs-admm"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda+cg": {"method": "wanda", "refit": "cg"},
}
AMOUNTS: dict[str, dict[str, Any]] = {"half": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
ONE = 4 * 128 * 128
"""Room for a Gram of the widest linear of any of the models."""
PANELS = {"llama": 4 * 64 * 24, "gpt2": 4 * 128 * 50, "falcon": 4 * 128 * 50}
"""Room for a few narrow ones, or a third of the widest of one of them."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", BATCH * SEQLEN)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """room(bytes) sets the memory for Grams from now on; returns a list that each extra pass is recorded in."""

    def limit(nbytes: int) -> list[int]:
        passes: list[int] = []
        gather = LayerGrams._pass

        def counting(self: LayerGrams, *args: Any) -> Any:
            passes.append(id(self))
            return gather(self, *args)

        monkeypatch.setattr("streamprune.model.budget._room", lambda *args: nbytes)
        monkeypatch.setattr(LayerGrams, "_pass", counting)
        return passes

    return limit


def run(source: Path, out: Path, text: Path, **job: Any) -> JobResult:
    given = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED}
    given |= {"dtype": "float32", "propagate": "dense"}
    return prune(source, out, **{**given, **job})


# ---- in memory


Inputs = dict[str, torch.Tensor]


def collect(source: Path, model: torch.nn.Module, kind: str, text: Path, only: str = "") -> Inputs:
    """The inputs of each linear (tokens, in) float64, in the order of the text."""
    found: dict[str, list[torch.Tensor]] = {}

    def hook(name: str, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.setdefault(name, []).append(args[0].detach().double().flatten(0, -2))

    hooks = [
        module.register_forward_pre_hook(functools.partial(hook, name))
        for name, module in linears_of(model, kind).items()
        if name.startswith(only)
    ]
    with torch.no_grad():
        for batch in torch.from_numpy(drawn(text, source, VOCAB, SAMPLES, SEQLEN, SEED)).split(BATCH):
            model(input_ids=batch, use_cache=False)
    for each in hooks:
        each.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture(scope="module")
def inputs(models: Models, text: Path) -> Callable[[str, str], Inputs]:
    """Inputs of a dense model's linears, collected once per model."""

    @functools.cache
    def get(kind: str, dtype: str) -> Inputs:
        source = models(kind, 2, dtype)
        model = in_memory(source)
        round_states(model, kind, getattr(torch, dtype))
        return collect(source, model, kind, text)

    return get


def error_of(weight: torch.Tensor, fitted: torch.Tensor, x: torch.Tensor) -> float:
    """‖(W − Ŵ)X‖² / ‖WX‖²."""
    dense, now = weight.double(), fitted.double()
    return float((x @ (dense - now).T).square().sum() / (x @ dense.T).square().sum())


def linears(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """(out, in) of every linear, loaded by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: weight_of(module) for name, module in linears_of(model, kind).items()}


def check_kept(fitted: torch.Tensor, amount: dict[str, Any]) -> None:
    """Checks exact counts, no −0.0, and that all values are finite."""
    keep = fitted != 0
    assert torch.isfinite(fitted).all()
    assert not bool(torch.signbit(fitted[~keep]).any())
    if "pattern" in amount:
        n, m = map(int, amount["pattern"].split(":"))
        assert (keep.reshape(len(keep), -1, m).sum(-1) == n).all()
    else:
        assert ((~keep).sum(1) == math.floor(amount["sparsity"] * keep.shape[1])).all()


def check_report(entry: dict[str, Any], dense: torch.Tensor, fitted: torch.Tensor, x: torch.Tensor) -> None:
    """Checks the report of one linear against the error computed in memory."""
    assert entry["error"] <= entry["error_mask"] < 1
    assert entry["error"] == pytest.approx(error_of(dense, fitted, x), rel=1e-2)
    if entry["damping"] is None:
        assert entry["held_out_error"] > 0.5 * entry["held_out_error_mask"], "far better refits are taken"
        assert entry["error"] == entry["error_mask"]
    else:
        assert entry["damping"] > 0 and 0 < entry["held_out_error"] < entry["held_out_error_mask"]


def same_but_for(names: set[str], before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert list(before) and before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert {n.removesuffix(".weight") for n in changed} == names


@pytest.mark.parametrize(
    ("kind", "how", "amount"),
    [
        *(("llama", how, amount) for how in RECIPES for amount in AMOUNTS),
        ("gpt2", "gradual-cg", "2:4"), ("gpt2", "obs-admm", "half"), ("gpt2", "sparsegpt", "half"),
        ("gpt2", "wanda+cg", "2:4"), ("falcon", "gradual-cg", "half"), ("falcon", "admm", "2:4"),
        ("falcon", "sparsegpt", "2:4"),
    ],
)  # fmt: skip
def test_every_refit(
    models: Models, text: Path, tmp_path: Path, inputs: Callable[..., Inputs], kind: str, how: str, amount: str
) -> None:
    """Weights shared by q, k and v; transposed ones; and float16."""
    dtype = {"llama": "bfloat16", "gpt2": "float32", "falcon": "float16"}[kind]
    source, given = models(kind, 2, dtype), inputs(kind, dtype)
    result = run(source, tmp_path / "out", text, **RECIPES[how], **AMOUNTS[amount])
    entries = {entry["name"]: entry for entry in result.report["linears"]}
    dense, fitted = linears(source, kind), linears(tmp_path / "out", kind)
    assert entries.keys() == dense.keys() == fitted.keys() and result.sparsity == 0.5
    same_but_for({n.removeprefix("transformer.") if kind == "gpt2" and not any(
        k.startswith("transformer.") for k in stored(source)) else n for n in entries},
        stored(source), stored(tmp_path / "out"))  # fmt: skip
    for name, entry in entries.items():
        check_kept(fitted[name], AMOUNTS[amount])
        check_report(entry, dense[name], fitted[name], given[name])
    better = sum(entry["error"] < 0.97 * entry["error_mask"] for entry in entries.values())
    assert better > len(entries) / 2, "a refit that helps hardly anywhere is none"
    assert json.loads((tmp_path / "out/streamprune.json").read_text())["linears"] == result.report["linears"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_mask_it_is_compared_with(
    models: Models, text: Path, tmp_path: Path, inputs: Callable[..., Inputs], kind: str
) -> None:
    """error_mask is the error without the refit; held-out errors are those on the held-out tokens."""
    source, given = models(kind, 2, "float32"), inputs(kind, "float32")
    entries = run(source, tmp_path / "out", text, method="admm", sparsity=0.6).report["linears"]
    plain = run(source, tmp_path / "mask", text, method="admm", refit="none", sparsity=0.6)
    assert plain.recipe == "wanda" and "error" not in plain.report["linears"][0]
    dense, masked = linears(source, kind), linears(tmp_path / "mask", kind)
    out = torch.tensor(flags(HoldOut.of(SAMPLES * SEQLEN, SEQLEN), SAMPLES * SEQLEN))
    assert int(out.sum()) == SEQLEN, "of six windows one"
    for entry in entries:
        w, m, x = dense[entry["name"]], masked[entry["name"]], given[entry["name"]]
        assert entry["error_mask"] == pytest.approx(error_of(w, m, x), rel=1e-3)
        if len(w) <= 64:  # all of its rows are sampled
            assert entry["held_out_error_mask"] == pytest.approx(error_of(w, m, x[out]), rel=1e-3)


@pytest.mark.parametrize("amount", AMOUNTS.values(), ids=AMOUNTS)
def test_without_its_refit_a_recipe_is_its_mask(
    models: Models, text: Path, tmp_path: Path, amount: dict[str, Any]
) -> None:
    source = models("llama", 2)
    run(source, tmp_path / "none", text, method="gradual-cg", refit="none", **amount)
    run(source, tmp_path / "mask", text, method="swiftprune", selector="exact", **amount)
    assert weights_of(tmp_path / "none") == weights_of(tmp_path / "mask")
    run(source, tmp_path / "refit", text, method="gradual-cg", **amount)
    assert weights_of(tmp_path / "refit") != weights_of(tmp_path / "mask")


def test_cg_keeps_the_mask(models: Models, text: Path, tmp_path: Path) -> None:
    for how in ({"method": "swiftprune"}, {"method": "magnitude"}):
        run(models("gpt2", 2), tmp_path / "mask", text, sparsity=0.4, **how)
        run(models("gpt2", 2), tmp_path / "cg", text, sparsity=0.4, refit="cg", **how)
        masked, fitted = linears(tmp_path / "mask", "gpt2"), linears(tmp_path / "cg", "gpt2")
        assert all(torch.equal(masked[name] != 0, fitted[name] != 0) for name in masked)
        for name in ("mask", "cg"):
            shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("how", RECIPES.values(), ids=RECIPES)
def test_nothing_to_prune(models: Models, text: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    source = models("llama", 2)
    result = run(source, tmp_path / "out", text, sparsity=0.0, **how)
    same_but_for(set(), stored(source), stored(tmp_path / "out"))
    assert all(entry["error"] == entry["error_mask"] == 0 for entry in result.report["linears"])


# ---- which linears


@pytest.mark.parametrize("place", ["room", "one", "panels"])
@pytest.mark.parametrize(
    ("kind", "filters", "count"),
    [
        ("llama", {"only": r"self_attn\.v|mlp\.up"}, 4),  # q and gate have the same inputs, and stay dense
        (
            "falcon",
            {"skip": r"attention\.dense$"},
            6,
        ),  # the MLP has the same input as attention, with a linear between them
        ("gpt2", {"only": r"c_fc"}, 2),
    ],
    ids=["leaders", "beside attention", "one"],
)
def test_filters(
    models: Models, text: Path, tmp_path: Path, inputs: Callable[..., Inputs], room: Callable[[int], list[int]],
    place: str, kind: str, filters: dict[str, str], count: int,
) -> None:  # fmt: skip
    source, given = models(kind, 2, "float32"), inputs(kind, "float32")
    room({"room": 1 << 30, "one": ONE, "panels": PANELS[kind]}[place])
    result = run(source, tmp_path / "out", text, refit="cg", sparsity=0.5, **filters)
    entries = {entry["name"]: entry for entry in result.report["linears"]}
    dense, fitted = linears(source, kind), linears(tmp_path / "out", kind)
    assert len(entries) == count == len(result.report["linears"])
    for name, entry in entries.items():
        check_kept(fitted[name], {"sparsity": 0.5})
        check_report(entry, dense[name], fitted[name], given[name])
    assert all(torch.equal(dense[n], fitted[n]) for n in dense.keys() - entries.keys())


# ---- memory


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", RECIPES["gradual-cg"]), ("gpt2", RECIPES["sparsegpt"])], ids=["llama", "gpt2"]
)
def test_one_gram_at_a_time_changes_no_bit(
    models: Models, text: Path, tmp_path: Path, room: Callable[[int], list[int]], kind: str, how: dict[str, Any]
) -> None:
    source = models(kind, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerGrams, "_pass", lambda *args: pytest.fail("there is room for all"))
        whole = run(source, tmp_path / "whole", text, sparsity=0.5, **how)
    passes = room(ONE if kind == "gpt2" else 4 * 64 * 64)
    result = run(source, tmp_path / "out", text, sparsity=0.5, **how)
    assert len(passes) >= 4 and len(set(passes)) == 2
    assert sum(stage.get("gram_passes", 0) for stage in result.report["stages"]) == len(passes)
    assert not any("gram_passes" in stage for stage in whole.report["stages"])
    assert any("Gram matrices did not fit" in note for note in result.notes)
    assert not any("Gram" in note for note in whole.notes)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")
    assert result.report["linears"] == whole.report["linears"]


@pytest.mark.parametrize("how", [RECIPES["gradual-cg"], RECIPES["wanda+cg"]], ids=["gradual-cg", "wanda+cg"])
def test_grams_in_a_file(
    models: Models, text: Path, tmp_path: Path, inputs: Callable[..., Inputs], room: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch, how: dict[str, Any],
) -> None:  # fmt: skip
    """A Gram in panels gives nearly the same weights, and its file has no name on the disk."""
    source, given = models("llama", 2, "float32"), inputs("llama", "float32")
    whole = run(source, tmp_path / "whole", text, sparsity=0.5, **how)
    made: list[tuple[int, ...]] = []

    def counting(*args: Any) -> ScratchMatrix:
        made.append(args[1:])
        return ScratchMatrix(*args)

    monkeypatch.setattr("streamprune.calibration.grams.ScratchMatrix", counting)
    monkeypatch.setattr("streamprune.methods.gram._PANEL", 4 * 64 * 5)
    passes = room(4 * 64 * 10)
    result = run(source, tmp_path / "out", text, sparsity=0.5, **how)
    assert len(passes) > len(made) and {(32, 32), (64, 64)} == set(made)
    before, after = linears(tmp_path / "whole", "llama"), linears(tmp_path / "out", "llama")
    dense = linears(source, "llama")
    for entry, wanted in zip(result.report["linears"], whole.report["linears"], strict=True):
        name = entry["name"]
        check_kept(after[name], {"sparsity": 0.5})
        check_report(entry, dense[name], after[name], given[name])
        assert entry["damping"] == wanted["damping"]
        assert entry["error"] == pytest.approx(wanted["error"], rel=2e-2)
        same = (before[name] != 0) == (after[name] != 0)
        assert float(same.float().mean()) > 0.99
        torch.testing.assert_close(after[name][same], before[name][same], rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rows_in_chunks(models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Rows are refitted in chunks that fit into memory, also those of transposed linears."""
    source = models(kind, 2, "float32")
    whole = run(source, tmp_path / "whole", text, refit="cg", sparsity=0.5)
    monkeypatch.setattr("streamprune.pruning.refit.WORKING_BYTES", 4 * 9 * 32 * 7)
    rows, descend = list[int](), refit.descend

    def watched(weight: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(weight))
        return descend(weight, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.pruning.pruned_linears.sampled", lambda count: torch.arange(min(count, 7)))
        patch.setattr("streamprune.methods.refits.descend", watched)
        result = run(source, tmp_path / "out", text, refit="cg", sparsity=0.5, damping="0.05")
    assert max(rows) <= 7
    before, after = linears(tmp_path / "whole", kind), linears(tmp_path / "out", kind)
    for entry, wanted in zip(result.report["linears"], whole.report["linears"], strict=True):
        check_kept(after[entry["name"]], {"sparsity": 0.5})
        assert entry["error_mask"] == pytest.approx(wanted["error_mask"], rel=1e-4)
        if entry["damping"] == wanted["damping"] == 0.05:
            assert entry["error"] == pytest.approx(wanted["error"], rel=2e-2)
            torch.testing.assert_close(after[entry["name"]] != 0, before[entry["name"]] != 0, rtol=0, atol=0)


# ---- other conditions


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pruned_predecessors(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    """With propagate="pruned", a layer is refitted on outputs of the refitted layers before it."""
    source = models(kind, 2, "float32")
    result = run(source, tmp_path / "out", text, method="gradual-cg", sparsity=0.6, propagate="pruned")
    entries = {entry["name"]: entry for entry in result.report["linears"]}
    dense, fitted = linears(source, kind), linears(tmp_path / "out", kind)
    sparse, mixed = in_memory(tmp_path / "out"), in_memory(source)
    for i, layer in enumerate(mixed.get_submodule(FAMILIES[kind].layers)):
        for name, x in collect(source, mixed, kind, text, only=f"{FAMILIES[kind].layers}.{i}.").items():
            check_kept(fitted[name], {"sparsity": 0.6})
            check_report(entries.pop(name), dense[name], fitted[name], x)
        layer.load_state_dict(sparse.get_submodule(FAMILIES[kind].layers)[i].state_dict())
    assert not entries


@pytest.mark.parametrize("nbytes", [1 << 30, PANELS["llama"]], ids=["room", "panels"])
def test_statistics_on_the_side(
    models: Models, text: Path, tmp_path: Path, room: Callable[[int], list[int]], nbytes: int
) -> None:
    """Saved statistics equal those of `calibrate`, regardless of extra passes for Grams."""
    source = models("llama", 2)
    given: dict[str, Any] = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "dtype": "float32"}
    calibrate(source, tmp_path / "wanted", **given)
    room(nbytes)
    run(source, tmp_path / "out", text, refit="cg", sparsity=0.5, save_stats=tmp_path / "stats")
    found, wanted = load_file(tmp_path / "stats"), load_file(tmp_path / "wanted")
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())


@pytest.mark.parametrize("how", RECIPES.values(), ids=RECIPES)
def test_kernels_of_torch(models: Models, text: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """Selection with the GPU's kernels, run on the CPU: the same masks, except for ties of rounded scores."""
    source, amount = models("llama", 1, "float32"), AMOUNTS["2:4" if how["method"] == "admm" else "half"]
    run(source, tmp_path / "numba", text, backend="numba", **how, **amount)
    run(source, tmp_path / "torch", text, backend="torch", **how, **amount)
    ours, theirs = linears(tmp_path / "numba", "llama"), linears(tmp_path / "torch", "llama")
    differ = sum(int(((ours[n] != 0) != (theirs[n] != 0)).sum()) for n in ours)
    assert differ <= sum(w.numel() for w in ours.values()) / 200
    for name, weight in ours.items():
        same = ((weight != 0) == (theirs[name] != 0)).all(1)
        torch.testing.assert_close(weight[same], theirs[name][same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("how", "samples", "seqlen"),
    [(how, 1, 2) for how in RECIPES] + [("gradual-cg", 1, 9), ("sparsegpt", 2, 8), ("obs-admm", 1, 40)],
)
def test_hardly_any_text(models: Models, text: Path, tmp_path: Path, how: str, samples: int, seqlen: int) -> None:
    source = models("llama", 1)
    result = run(source, tmp_path / "out", text, sparsity=0.5, samples=samples, seqlen=seqlen, **RECIPES[how])
    for name, weight in linears(tmp_path / "out", "llama").items():
        check_kept(weight, {"sparsity": 0.5})
        assert float(weight.abs().max()) < 100, name
    for entry in result.report["linears"]:
        assert entry["error"] <= entry["error_mask"]
        assert ("held_out_error" in entry) == (samples * seqlen >= 2)


@pytest.mark.parametrize("damping", ["0.3", "absolute", "auto", None])
def test_damping_as_asked(models: Models, text: Path, tmp_path: Path, damping: str | None) -> None:
    for how, published in (({"refit": "cg"}, 0.05), ({"method": "sparsegpt"}, 0.01)):
        result = run(models("llama", 1), tmp_path / str(published), text, sparsity=0.5, damping=damping, **how)
        used = {e["damping"] for e in result.report["linears"]} - {None}
        assert used
        if damping in ("0.3", "absolute"):
            assert used == {0.3 if damping == "0.3" else published}
        assert result.report["job"]["damping"] == (damping or "auto")


def test_the_damping_belongs_to_the_job(models: Models, text: Path, tmp_path: Path) -> None:
    job = functools.partial(run, models("llama", 2), tmp_path / "out", text, sparsity=0.5, refit="cg")
    job(damping="0.3")
    assert job(damping="0.3").status == "up-to-date"
    for other in ({"damping": "0.2"}, {}, {"damping": "0.3", "refit": "gradual-cg"}):
        with pytest.raises(StreampruneError, match="another job"):
            job(**other)


def test_weights_that_would_not_fit_into_float16(models: Models, text: Path, tmp_path: Path) -> None:
    """Rows whose new values overflow keep their own, and the report counts them."""
    source = Path(shutil.copytree(models("llama", 2, "float16"), tmp_path / "model"))
    (shard,) = source.glob("*.safetensors")
    tensors, name = load_file(shard), "model.layers.1.self_attn.v_proj"
    weight = tensors[f"{name}.weight"].float()
    tensors[f"{name}.weight"] = (torch.sign(weight) * (60000 + 500 * torch.tanh(weight))).half()
    save_file(tensors, shard, metadata={"format": "pt"})
    run(source, tmp_path / "mask", text, method="wanda", sparsity=0.5)
    result = run(source, tmp_path / "out", text, method="wanda", refit="cg", sparsity=0.5, damping="0.05")
    (entry,) = (e for e in result.report["linears"] if e["name"] == name)
    fitted, masked = linears(tmp_path / "out", "llama")[name], linears(tmp_path / "mask", "llama")[name]
    check_kept(fitted, {"sparsity": 0.5})
    left = int((fitted == masked).all(1).sum())
    assert left > 0 and entry["rows_not_refitted"] == left
    assert math.isfinite(entry["error"]) and entry["error"] <= entry["error_mask"]
    assert not any("rows_not_refitted" in e for e in result.report["linears"] if "layers.0" in e["name"])


# ---- stopped and resumed


def test_stopped_at_any_stage(models: Models, text: Path, tmp_path: Path, room: Callable[[int], list[int]]) -> None:
    """A resumed job keeps the size of its panels, regardless of the memory it has now."""
    job: dict[str, Any] = {"refit": "cg", "sparsity": 0.5}
    source, few = models("llama", 2), PANELS["llama"]
    room(few)
    run(source, tmp_path / "whole", text, **job)

    def stop_at(number: int) -> Callable[[Progress], None]:
        def stop(step: Progress) -> None:
            if step.done == number:
                raise KeyboardInterrupt

        return stop

    for at in (1, 2, 3):
        room(few)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / f"{at}", text, progress=stop_at(at), **job)
        passes = room(1 << 30)
        run(source, tmp_path / f"{at}", text, **job)
        assert bool(passes) == (at < 3)
        assert weights_of(tmp_path / f"{at}") == weights_of(tmp_path / "whole")


@pytest.fixture
def crasher(models: Models, tmp_path: Path, room: Callable[[int], list[int]]) -> Callable[..., Crasher]:
    def make(**job: Any) -> Crasher:
        root = tmp_path / "root"
        root.mkdir()
        np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(0, VOCAB, 500))
        room(PANELS["llama"])
        given: dict[str, Any] = {"calib": tmp_path / "tokens.npy", "samples": 4, "seqlen": 16, "sparsity": 0.5}
        source = models("llama", 2)
        return Crasher(root, lambda: prune(source, root / "out", **given, **job), ("out",))

    return make


CRASHES: dict[str, dict[str, Any]] = {
    "dense": {"method": "gradual-cg"}, "pruned": {"refit": "cg", "propagate": "pruned"},
}  # fmt: skip


def test_some_moments_of_a_crash(crasher: Callable[..., Crasher]) -> None:
    """CrashDisk also checks before every operation that no file of a Gram has a name."""
    here = crasher(refit="cg")
    failures = here.failures("killed", 0.07) + here.failures("lost", 0.15)
    assert not failures, show(failures)


@pytest.mark.slow
@pytest.mark.parametrize("how", CRASHES.values(), ids=CRASHES)
def test_every_moment_of_a_crash(crasher: Callable[..., Crasher], how: dict[str, Any]) -> None:
    here = crasher(**how)
    failures = [f for kind in ("killed", "lost", "emptied") for f in here.failures(kind)]
    assert not failures, show(failures)


# ---- as on a device


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes jobs run as on a device, in a given layout, with `room` bytes for Grams."""

    def set_layout(layers: int, resident: bool, nbytes: int) -> None:
        layout = Layout(BATCH, layers, resident, 0, nbytes)
        monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
        for place in ("model.loader", "pruning.forward"):
            monkeypatch.setattr(f"streamprune.{place}.WeightLoader", functools.partial(WeightLoader, copies=True))

    return set_layout


@pytest.mark.parametrize(
    ("layout", "nbytes", "propagate"),
    [
        ("one layer", PANELS["gpt2"], "dense"), ("one ahead", ONE, "pruned"), ("resident", PANELS["gpt2"], "dense"),
        ("resident", ONE, "pruned"), ("three", 1 << 30, "dense"), ("three", ONE, "dense"), ("streamed", ONE, "dense"),
    ],
)  # fmt: skip
def test_the_path_of_a_device(
    models: Models, text: Path, tmp_path: Path, room: Callable[[int], list[int]], use: Callable[..., None],
    layout: str, nbytes: int, propagate: str,
) -> None:  # fmt: skip
    """The same bytes as on the CPU.

    Where states stay on the device, a layer is passed again whose outputs are there and whose inputs were never on
    disk.
    """
    job: dict[str, Any] = {"refit": "cg", "sparsity": 0.5, "backend": "torch", "propagate": propagate}
    room(nbytes)
    whole = run(models("gpt2", 2), tmp_path / "plain", text, **job)
    use(*LAYOUTS[layout], nbytes)
    with plugged_in(Card()):
        result = run(models("gpt2", 2), tmp_path / "out", text, device="cuda:0", **job)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert result.report["linears"] == whole.report["linears"]


def test_one_shard_at_a_time(
    models: Models, text: Path, tmp_path: Path, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage without a refit is written during the next layer's pass; one with a refit is written before it."""
    fill, others = ShardWriter.fill, threading.Semaphore(0)
    at_work: list[str] = []

    def slow(self: ShardWriter, path: Path, stage: Any, *args: Any) -> Any:
        assert not at_work, f"{stage.name} while {at_work}"
        at_work.append(stage.name)
        if stage.name in ("embed", "layer 0"):
            others.acquire(timeout=0.4)  # long enough for a pass that does not wait to get here
        try:
            return fill(self, path, stage, *args)
        finally:
            at_work.remove(stage.name)

    use(3, True, 1 << 30)
    job: dict[str, Any] = {"refit": "cg", "sparsity": 0.5, "backend": "torch", "only": r"layers\.1"}
    run(models("llama", 2), tmp_path / "plain", text, **job)
    monkeypatch.setattr(ShardWriter, "fill", slow)
    result = run(models("llama", 2), tmp_path / "out", text, **job)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert len(result.report["linears"]) == 7


def test_smaller_batches_where_memory_runs_out(
    models: Models, text: Path, tmp_path: Path, use: Callable[..., None], room: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every token counts once in a Gram, whatever was tried before."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def failing(module: Any, x: torch.Tensor) -> Any:
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(module, x)

    for i, nbytes in enumerate((1 << 30, PANELS["llama"])):
        room(nbytes)
        with pytest.MonkeyPatch.context() as patch:
            plain = run(models("llama", 2, "float32"), tmp_path / f"plain{i}", text, refit="cg", sparsity=0.5)
            patch.setattr(LlamaMLP, "forward", failing)
            scarce = run(models("llama", 2, "float32"), tmp_path / f"out{i}", text, refit="cg", sparsity=0.5)
        assert scarce.report["out_of_memory_batch"] == 1
        for entry, wanted in zip(scarce.report["linears"], plain.report["linears"], strict=True):
            assert entry["error"] == pytest.approx(wanted["error"], rel=1e-2)
            assert entry["held_out_error_mask"] == pytest.approx(wanted["held_out_error_mask"], rel=1e-3)


def test_memory_that_runs_out_in_a_pass_for_grams(
    models: Models, text: Path, tmp_path: Path, use: Callable[..., None], room: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The smaller batch is recorded; otherwise a run resumed after a crash would use larger ones."""
    gather, failed = CalibrationPass.gather, []

    def scarce(forward: CalibrationPass, stage: Any, make: Any, inputs: Any) -> Any:
        if stage.index == 1 and not failed:
            failed.append(stage.name)
            forward.streamed.halve_batch()
        return gather(forward, stage, make, inputs)

    room(PANELS["llama"])
    monkeypatch.setattr(CalibrationPass, "gather", scarce)
    result = run(models("llama", 2), tmp_path / "out", text, refit="cg", sparsity=0.5)
    assert failed and result.report["out_of_memory_batch"] == 1


# ---- what is refused

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown refit": ({"refit": "lsq"}, r"--refit lsq: .*none, cg, .*gradual-cg"),
    "unknown recipe": ({"method": "cg"}, r"--method cg: .*gradual-cg"),
    "damping of nothing": ({"damping": "0.1"}, r"--damping .*--refit"),
    "damping of none": ({"method": "admm", "refit": "none", "damping": "0.1"}, r"--damping .*--refit"),
    **{
        f"damping {value}": ({"refit": "cg", "damping": value}, rf"--damping {re.escape(value)}: choose auto, absolute")
        for value in ("much", "0", "-0.1", "nan", "inf", "1e999", "Auto", "0.1.2")
    },
    "stats": ({"refit": "cg", "stats": "STATS"}, r"--stats .*--refit none"),
    "stats of a recipe": ({"method": "sparsegpt", "stats": "STATS"}, r"--stats .*--refit none"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_usage(
    models: Models, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: dict[str, Any], message: str
) -> None:
    """Refused with one line, from Python and from the command line, and nothing is written."""
    (tmp_path / "s").write_bytes(b"not looked at")
    wrong = {k: str(tmp_path / "s") if v == "STATS" else v for k, v in wrong.items()}
    with pytest.raises(UsageError, match=message) as caught:
        prune(models("llama", 2), tmp_path / "out", sparsity=0.5, **wrong)
    assert "\n" not in str(caught.value)
    flags = [f"--{key}={value}" for key, value in wrong.items()]
    assert main(["prune", str(models("llama", 2)), str(tmp_path / "out"), "--sparsity", "0.5", *flags]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and re.search(message, shown.err) and not shown.out
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_from_the_command_line(models: Models, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--calib", str(text), "--samples", "2", "--seqlen", "16", "--dtype", "float32"]
    how = ["--method", "wanda", "--refit", "cg", "--damping", "0.3", "--pattern", "2:4", "--json"]
    assert main(["prune", str(models("llama", 2)), str(tmp_path / "out"), *given, *how]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "wanda+exact+cg"
    prune(
        models("llama", 2), tmp_path / "same", calib=text, samples=2, seqlen=16, dtype="float32", method="wanda",
        refit="cg", damping="0.3", pattern="2:4", replace_tokens=None,
    )  # fmt: skip
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "same")
