"""Asymmetric calibration: what refits aim at, which inputs they are shown, and that no condition changes the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import plan, prune
from families import FAMILIES
from mixtures import save_mixture
from test_device_path import LAYOUTS, Use, use, weights_of  # noqa: F401 -- use is a fixture
from test_refit_jobs import BATCH, SAMPLES, SEQLEN, collect, linears, run
from whole_model import in_memory, round_states

from streamprune.calibration.gram_sums import GramCollector, HoldOut
from streamprune.errors import UnsupportedError, UsageError
from streamprune.methods import gram as gram_module
from streamprune.methods.gram import Debt, Gram
from streamprune.model.residual import writers_of
from streamprune.progress import Progress
from streamprune.pruning.job import JobResult

Models = Callable[..., Path]
AIM: dict[str, Any] = {"refit": "cg", "sparsity": 0.5, "propagate": "asymmetric"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", 2 * BATCH * SEQLEN)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the mathematics


def gathered(dense: torch.Tensor, x: torch.Tensor, missing: torch.Tensor | None, hold: HoldOut) -> Gram:
    """The Gram of inputs that come in three parts."""
    collector = GramCollector(lambda *_: None, hold)
    for part in torch.arange(len(x)).chunk(3):
        collector.watch_pair("o", dense[part], x[part], None if missing is None else missing[part])
    found = collector.sums["o"]
    found.finish()
    gram = Gram(found.sum, torch.cat(found.held), found.tokens, drift=found.drift)
    gram.held_dense = torch.cat(found.held_dense)
    if found.debt is not None:
        gram.debts["o"] = Debt(found.debt, torch.cat(found.held_debt))
    return gram


@pytest.mark.parametrize("owes", [False, True])
def test_all_of_the_way_is_ridge_regression(monkeypatch: pytest.MonkeyPatch, owes: bool) -> None:
    """In float64 from the normal equations; what was kept out counts once it is absorbed."""
    monkeypatch.setattr(gram_module, "PULL", 1.0)
    tokens, width, rows = 256, 24, 7
    dense = normal(tokens, width, seed=1) * torch.exp(normal(width, seed=2))
    x = dense + 0.3 * normal(tokens, width, seed=3)
    missing, weight = normal(tokens, rows, seed=4), normal(rows, width)
    gram = gathered(dense, x, missing if owes else None, HoldOut(16, 4))
    gram.absorb_held_()
    a, d, w = x.double().numpy(), dense.double().numpy(), weight.double().numpy()
    wanted = d @ w.T + (missing.double().numpy() if owes else 0.0)
    ridge = gram_module.PULL_DAMPING.value * np.diag((a * a).sum(0))
    solved = w + np.linalg.solve(a.T @ a + ridge, a.T @ (wanted - a @ w.T)).T
    np.testing.assert_allclose(gram.aim(weight, "o").numpy(), solved, rtol=1e-3, atol=1e-4)
    some = torch.tensor([4, 1])
    torch.testing.assert_close(gram.aim(weight[some], "o", some), gram.aim(weight, "o")[some], rtol=1e-4, atol=1e-5)


def test_part_of_the_way() -> None:
    dense, weight = normal(64, 8, seed=1), normal(3, 8)
    same = gathered(dense, dense.clone(), None, HoldOut(8, 4))
    assert torch.equal(same.aim(weight), weight), "nothing was lost, nothing is to be made up for"
    plain = Gram(dense.T @ dense, dense[:0], 64)
    assert plain.aim(weight) is weight


def test_errors_on_inputs_that_were_kept_out() -> None:
    dense, x, missing, weight = normal(64, 8, seed=1), normal(64, 8, seed=2), normal(64, 3, seed=3), normal(3, 8)
    hold = HoldOut(8, 4)
    gram = gathered(dense, x, missing, hold)
    out = torch.cat([torch.arange(b, e) for b, e, held in hold.cut(0, 64) if held])
    fitted, some = normal(2, 8, seed=5), torch.tensor([2, 0])
    wanted = weight[some] @ dense[out].T + missing[out][:, some].T
    by_token = gram.held_by_token(weight[some], fitted, "o", some)
    torch.testing.assert_close(by_token, (wanted - fitted @ x[out].T).square().sum(0).double(), rtol=1e-4, atol=1e-4)
    powers = gram.held_by_token(weight)
    torch.testing.assert_close(powers, (weight @ dense[out].T).square().sum(0).double(), rtol=1e-4, atol=1e-4)


def test_who_writes_into_the_residual_stream() -> None:
    q, o, down = (normal(2, 16, 8, seed=i) for i in range(3))
    outputs = {"q": q, "o": o, "down": down}
    rounding = 0.01 * normal(2, 16, 8, seed=4)
    assert writers_of(o + down + rounding, outputs) == ["o", "down"]
    assert writers_of(down + rounding, outputs) == ["down"]
    assert writers_of(0.5 * (o + down), outputs) == [], "scaled: nothing can be said"
    assert writers_of(torch.nn.functional.layer_norm(o, (8,)) + down, outputs) == []
    assert writers_of(o, {}) == []


# ---- jobs


@pytest.mark.parametrize(
    ("kind", "writers"),
    [("llama", ("o_proj", "down_proj")), ("gpt2", ("attn.c_proj", "mlp.c_proj")), ("gemma2", ()),
     ("gpt_neox", ("attention.dense", "dense_4h_to_h"))],
)  # fmt: skip
def test_refits_see_both_models_as_they_are(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, writers: tuple[str, ...]
) -> None:
    """For each linear the dense model's inputs, and those that the finished output has; what the streams differ by."""
    seen: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    add = GramCollector.watch_pair

    def watch(self: Any, name: str, dense: torch.Tensor, x: torch.Tensor, missing: torch.Tensor | None = None) -> None:
        seen.setdefault(name, []).append(tuple(t.flatten(0, -2) for t in (dense, x, missing) if t is not None))
        add(self, name, dense, x, missing)

    monkeypatch.setattr(GramCollector, "watch_pair", watch)
    source = models(kind, 2, "float32")
    result = run(source, tmp_path / "out", text, damping=0.05, **AIM)
    assert result.report["calibration"]["propagate"] == "asymmetric"
    assert not any("Gram" in note for note in result.notes)  # more memory would not save a pass
    whole, pruned = in_memory(source), in_memory(tmp_path / "out")
    for model in (whole, pruned):
        round_states(model, kind, torch.float32)
    dense, ours = (collect(source, model, kind, text) for model in (whole, pruned))
    assert {part for name in seen for part in [name]} <= dense.keys() and len(seen) >= 2 * 2
    for name, parts in seen.items():
        given, own, *missing = (torch.cat(column) for column in zip(*parts, strict=True))
        torch.testing.assert_close(given.double(), dense[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.double(), ours[name], rtol=1e-3, atol=1e-4)
        assert bool(missing) == name.endswith(writers or ("none",)), name
        first = f"{FAMILIES[kind].layers}.0."
        if missing and name.startswith(first) and not name.endswith(writers[-1]):
            assert not missing[0].any(), "before the first writer of the first layer, nothing is lost"
    fitted = linears(tmp_path / "out", kind)
    assert all(((t != 0).sum(1) == t.shape[1] - t.shape[1] // 2).all() for t in fitted.values())


def test_it_comes_nearer_to_the_dense_outputs(models: Models, text: Path, tmp_path: Path) -> None:
    """Of the last layer, on the calibration text, than refits that do not look at the dense model."""
    source = models("llama", 2, "float32")

    def states(folder: Path) -> torch.Tensor:
        model, found = in_memory(folder), []
        model.model.layers[-1].register_forward_hook(
            lambda *a: found.append(a[2][0] if isinstance(a[2], tuple) else a[2])
        )
        collect(source, model, "llama", text)
        return torch.cat(found).double()

    dense = states(source)
    errors = {}
    for how in ("asymmetric", "pruned", "dense"):
        run(source, tmp_path / how, text, **(AIM | {"propagate": how, "damping": 0.05}))
        errors[how] = float((states(tmp_path / how) - dense).square().sum())
    assert errors["asymmetric"] < 0.95 * errors["pruned"] and errors["asymmetric"] < 0.95 * errors["dense"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_output(
    models: Models, text: Path, tmp_path: Path, use: Use, layout: tuple[int, bool]  # noqa: F811
) -> None:  # fmt: skip
    how = AIM | {"backend": "torch"}
    plain = run(models("gpt2", 2), tmp_path / "plain", text, **how)
    use(*layout)
    result = run(models("gpt2", 2), tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert result.report["linears"] == plain.report["linears"]


@pytest.mark.parametrize("how", [AIM, {"pattern": "2:4", "propagate": "pruned"}], ids=["asymmetric", "pruned"])
@pytest.mark.parametrize("resident", [False, True])
def test_a_stopped_job_goes_on(
    models: Models, text: Path, tmp_path: Path, use: Use, how: dict[str, Any], resident: bool  # noqa: F811
) -> None:  # fmt: skip
    """Also where states were on the device only: the layers that are pruned already are run again as they are."""

    def stop(step: Progress) -> None:
        if step.done == 3:
            raise KeyboardInterrupt

    how = how | {"backend": "torch"}
    use(2, resident)
    run(models("llama", 3), tmp_path / "whole", text, **how)
    with pytest.raises(KeyboardInterrupt):
        run(models("llama", 3), tmp_path / "out", text, progress=stop, **how)
    run(models("llama", 3), tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_smaller_batches_where_memory_runs_out(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models' inputs still belong together."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def failing(module: Any, x: torch.Tensor) -> Any:
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(module, x)

    plain = run(models("llama", 2, "float32"), tmp_path / "plain", text, damping=0.05, **AIM)
    monkeypatch.setattr(LlamaMLP, "forward", failing)
    scarce = run(models("llama", 2, "float32"), tmp_path / "out", text, damping=0.05, **AIM)
    assert scarce.report["out_of_memory_batch"] == 1
    for entry, wanted in zip(scarce.report["linears"], plain.report["linears"], strict=True):
        assert entry["error"] == pytest.approx(wanted["error"], rel=2e-2)


def test_fp8(models: Models, text: Path, tmp_path: Path) -> None:
    """The next linears see the values that are stored."""
    result: JobResult = run(models("llama", 2), tmp_path / "out", text, quantize="fp8", **AIM)
    assert all(0 < entry["error_fp8"] < 1 for entry in result.report["linears"])


def test_what_the_default_is(models: Models, text: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "sparsity": 0.5}
    wanted = {"obs-admm": "asymmetric", "gradual-cg": "asymmetric", "sparsegpt": "pruned", "admm": "asymmetric",
              "swiftprune": "dense"}  # fmt: skip
    for method, propagate in wanted.items():
        result = prune(models("llama", 1), tmp_path / method, method=method, **given)
        assert result.report["calibration"]["propagate"] == propagate, method


def test_mixtures_of_experts_go_by_the_pruned_model(models: Models, text: Path, tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "model", "mixtral")
    given: dict[str, Any] = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "sparsity": 0.5, "refit": "cg"}
    with pytest.raises(UnsupportedError, match="--propagate pruned"):
        prune(source, tmp_path / "out", propagate="asymmetric", **given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    result = prune(source, tmp_path / "out", **given)
    assert result.report["calibration"]["propagate"] == "pruned"


def test_only_refits_aim(models: Models, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--refit"):
        prune(models(), tmp_path / "out", pattern="2:4", calib=text, propagate="asymmetric")
    with pytest.raises(UsageError, match="--refit"):
        plan(models(), propagate="asymmetric")


def test_plan_counts_both_models(models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"samples": 6, "seqlen": 32, "refit": "cg"}
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)
    one, two = plan(models(), propagate="pruned", **how), plan(models(), **how)
    assert two.cache_bytes > 2 * one.cache_bytes and two.flops > 2 * one.flops
    least = plan(models(), **how).least_ram_bytes
    result = prune(models(), tmp_path / "out", sparsity=0.5, calib=text, max_ram=least, **how)
    assert result.report["resolved"]["batch"] <= 6
