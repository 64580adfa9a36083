"""Block-wise tuning: its mathematics against autograd in float64, and whole jobs that tune tiny models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import plan, prune
from conftest import VOCAB
from families import FAMILIES
from safetensors.torch import load_file
from test_crash import Crasher, show
from test_device_path import LAYOUTS, weights_of
from whole_model import in_memory
from windows import drawn

from streamprune.calibration.windows import held_out
from streamprune.errors import ResourceError, UnsupportedError, UsageError
from streamprune.methods import tuning
from streamprune.methods.tuning import BETAS, Tuned, error_sum, filled, schedule, token_weights
from streamprune.model.budget import Budget, Layout
from streamprune.model.extra_memory import RefitNeeds, TuneNeeds, extra_choices, least_extra
from streamprune.model.loader import WeightLoader
from streamprune.model.stages import Stage
from streamprune.progress import Progress
from streamprune.pruning.job import JobResult
from streamprune.pruning.tuning import BlockTuner, windows_a_step

Models = Callable[..., Path]
SAMPLES, SEQLEN = 8, 16
KINDS = ["llama", "gpt2", "gemma2", "opt"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", 2 * 2 * SEQLEN)


def run(source: Path, out: Path, text: Path, **job: Any) -> JobResult:
    given: dict[str, Any] = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "pattern": "2:4", "tune": "block"}
    given |= {"tune_epochs": 2, "dtype": "float32"}
    return prune(source, out, **{**given, **job})


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def tunes(result: JobResult) -> list[dict[str, Any]]:
    return [stage["tune"] for stage in result.report["stages"] if "tune" in stage]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the mathematics


def block(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """A layer of two linears and a norm."""
    return x + torch.tanh(x * norm @ up.T) @ down.T


def sparse(*shape: int, seed: int) -> torch.Tensor:
    weight = normal(*shape, seed=seed)
    return weight * (normal(*shape, seed=seed + 100) > 0)


def columns(weight: torch.Tensor) -> torch.Tensor:
    """How far a step goes in each column."""
    kept = [[abs(float(w)) for w in column if w != 0] for column in torch.atleast_2d(weight).T]
    mean = sum(map(sum, kept)) / sum(map(len, kept))
    return torch.tensor([(sum(c) / max(1, len(c)) + 0.1 * mean) / 1.1 for c in kept], dtype=torch.float64)


def test_steps_are_adam_on_the_weights_that_stay() -> None:
    """Beside a plain Adam over whole matrices whose gradients are multiplied with the mask."""
    given, wanted = normal(3, 5, 6, seed=1), normal(3, 5, 6, seed=2)
    weights = token_weights(wanted).double()
    first = {"up": sparse(9, 6, seed=3), "down": sparse(6, 9, seed=4), "norm": normal(6, seed=5)}
    own = {name: t.clone().requires_grad_() for name, t in first.items()}
    tuned = {name: Tuned.of(own[name], t, masked=name != "norm") for name, t in first.items()}
    plain = {name: t.clone() for name, t in first.items()}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in first.items()}
    reach = {n: columns(t) for n, t in first.items()}
    for number in range(1, 6):
        error_sum(block(given, **own), wanted, weights).backward()
        for each in tuned.values():
            each.step(0.03, number)
        leaves = {name: t.clone().requires_grad_() for name, t in plain.items()}
        loss = ((block(given, **leaves) - wanted).square().sum(-1) * weights).sum()
        for name, slope in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            g = slope if name == "norm" else slope * (first[name] != 0)
            m, v = moments[name]
            m.copy_(BETAS[0] * m + (1 - BETAS[0]) * g)
            v.copy_(BETAS[1] * v + (1 - BETAS[1]) * g * g)
            size = m / (1 - BETAS[0] ** number) / (v / (1 - BETAS[1] ** number)).sqrt().clamp_min(1e-30)
            plain[name] = plain[name] - 0.03 * reach[name] * size
    for name in first:
        torch.testing.assert_close(own[name].detach(), plain[name], rtol=1e-6, atol=1e-10)
        assert bool((own[name] != first[name]).any())
    for name in ("up", "down"):
        assert bool((own[name][first[name] == 0] == 0).all())
        assert len(tuned[name].values) == int((first[name] != 0).sum()), "state of kept weights only"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rate_of_0_changes_nothing(dtype: torch.dtype) -> None:
    stored = sparse(8, 12, seed=1).to(dtype)
    own = stored.clone().requires_grad_()
    each = Tuned.of(own, stored, masked=True)
    for number in (1, 2, 3):
        (own.float() * 3.0).square().sum().backward()
        each.step(0.0, number)
    assert torch.equal(own.detach().view(torch.int16), stored.view(torch.int16))
    assert torch.equal(filled(stored, each.where, each.rounded()), stored)


def test_the_layer_computes_with_what_is_stored() -> None:
    """The masters move by less than the stored dtype can tell; what is computed with is always one of its values."""
    stored = sparse(8, 12, seed=1).to(torch.bfloat16)
    own = stored.float().requires_grad_()
    each = Tuned.of(own, stored, masked=True)
    for number in range(1, 8):
        own.sum().backward()
        each.step(1e-3, number)
        assert torch.equal(own.detach(), own.detach().to(torch.bfloat16).float())
    assert not torch.equal(each.values, each.rounded().float()), "the masters are finer"
    assert bool((own.detach() != stored.float()).any()), "and in time they add up"


def test_there_is_no_negative_zero() -> None:
    stored = torch.tensor([[-6e-8, 1.0, 0.0, -2.0]], dtype=torch.float16)
    each = Tuned.of(stored.clone().requires_grad_(), stored, masked=True)
    each.values[0] = -1e-9
    each.show(each.rounded())
    made = filled(stored, each.where, each.rounded())
    for found in (each.parameter.detach(), made):
        assert found[0, 0] == 0
        assert not torch.signbit(found[0, 0])
        assert found[0].tolist()[1:] == [1.0, 0.0, -2.0]


def test_a_large_tensor_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> torch.Tensor:
        stored = sparse(8, 12, seed=1).float()
        own = stored.clone().requires_grad_()
        each = Tuned.of(own, stored, masked=True)
        (own * normal(8, 12, seed=2).float()).square().sum().backward()
        each.step(0.1, 1)
        return own.detach()

    whole = stepped()
    monkeypatch.setattr(tuning, "_PIECE", 7)
    assert torch.equal(stepped(), whole)


def test_errors_are_relative_to_the_state() -> None:
    wanted = normal(2, 3, 4, seed=2) * torch.tensor([1e-3, 1.0, 1e4])[:, None]
    wanted[0, 0] = 0
    weights = token_weights(wanted)
    assert weights[0, 0] == 0, "of nothing nothing can be a part"
    torch.testing.assert_close(weights.flatten()[1:], (1 / wanted.square().sum(-1)).float().flatten()[1:])
    assert float(error_sum(torch.zeros_like(wanted), wanted, weights)) == pytest.approx(5), "whatever a token's size"
    assert float(error_sum(wanted, wanted, weights)) == 0


def test_the_schedule() -> None:
    sizes = [schedule(i, 50) for i in range(50)]
    assert sizes[:5] == sorted(sizes[:5]) and sizes[4:] == sorted(sizes[4:], reverse=True)
    assert 0 < sizes[0] < 0.3 and 0.9 < max(sizes) <= 1 and 0 < sizes[-1] < 0.01
    assert schedule(0, 1) == 1


def test_what_is_held_out() -> None:
    for samples in (1, 2, 3, 8, 31, 32, 64, 128, 1000):
        held = held_out(samples)
        assert len(held) == max(1, samples // 16) and held[-1] < samples
        assert samples == 1 or 1 <= windows_a_step(512, samples) <= max(1, samples - len(held))
    assert windows_a_step(256, 128) == 2 and windows_a_step(8192, 128) == 1
    assert windows_a_step(16, 17) == 2 and windows_a_step(16, 9) == 1, "an epoch has at least eight steps"


# ---- jobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("propagate", ["asymmetric", "pruned", "dense"])
def test_a_tuned_model(models: Models, text: Path, tmp_path: Path, kind: str, propagate: str) -> None:
    """2:4 to the last group, nothing else touched, and every layer at least as good as it was on what was held out."""
    source = models(kind, 2)
    result = run(source, tmp_path / "out", text, propagate=propagate)
    run(source, tmp_path / "mask", text, tune="none", tune_epochs=None, propagate="dense")
    dense, mask, found = tensors_of(source), tensors_of(tmp_path / "mask"), tensors_of(tmp_path / "out")
    transposed = kind == "gpt2"
    linears = {entry["name"] + ".weight" for entry in result.report["linears"]}
    assert dense.keys() == found.keys() and linears <= found.keys()
    layers = FAMILIES[kind].layers + "."
    changed = set()
    for name, tensor in found.items():
        assert tensor.dtype == dense[name].dtype and tensor.shape == dense[name].shape
        assert not bool(torch.signbit(tensor[tensor == 0]).any()) or name not in linears
        if name in linears:
            rows = tensor.t() if transposed else tensor
            assert bool(((rows.reshape(-1, 4) == 0).sum(1) >= 2).all()), name
            if ".0." in name:
                assert bool((tensor[mask[name] == 0] == 0).all()), "the mask is that of the job without tuning"
                changed |= {name} if not torch.equal(tensor, mask[name]) else set()
        elif not name.startswith(layers) or tensor.dim() > 1:
            assert torch.equal(tensor, dense[name]), name
    assert changed or tunes(result)[0]["left_as_it_was"]
    assert result.recipe == "swiftprune-tuned" and len(tunes(result)) == 2
    for each in tunes(result):
        assert each["held_out_error"] <= each["held_out_error_before"]
        assert each["epochs"] >= 2 and each["seconds"] >= 0
        assert each.get("left_as_it_was") or each["rate"] in (0.015, 0.00375, 0.0009375)


@functools.cache
def _windows(text: Path, source: Path) -> torch.Tensor:
    return torch.from_numpy(drawn(text, source, VOCAB, SAMPLES, SEQLEN, 0))


def first_layer_error(source: Path, out: Path, text: Path) -> float:
    """The held-out error of the first layer as it lies in `out`, from whole models in memory."""
    states: list[torch.Tensor] = []
    for folder in (source, out):
        model = in_memory(folder)
        hook = model.model.layers[0].register_forward_hook(
            lambda _, args, made: states.append(made[0] if isinstance(made, tuple) else made)
        )
        with torch.no_grad():
            model(input_ids=_windows(text, source)[list(held_out(SAMPLES))], use_cache=False)
        hook.remove()
    wanted, made = (s.double() for s in states)
    wanted = wanted.to(torch.bfloat16).double()  # as the cache has it
    return float(((made - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def test_the_error_is_that_of_what_is_written(models: Models, text: Path, tmp_path: Path) -> None:
    source = models("llama", 2)
    (first, _) = tunes(run(source, tmp_path / "out", text, tune_epochs=4))
    assert first["held_out_error"] == pytest.approx(first_layer_error(source, tmp_path / "out", text), rel=1e-3)
    assert first["held_out_error"] < 0.9 * first["held_out_error_before"]
    run(source, tmp_path / "mask", text, tune="none", tune_epochs=None)
    assert first["held_out_error_before"] == pytest.approx(first_layer_error(source, tmp_path / "mask", text), rel=1e-3)


def test_how_far_the_aim_is_from_the_layers_own_outputs(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at all: then the dense model's states are there in vain, and the second layer's error is that of `pruned`."""

    def second(name: str, pull: float, propagate: str = "asymmetric") -> float:
        monkeypatch.setattr("streamprune.pruning.paired.PULL", pull)
        found = tunes(run(models("llama", 2), tmp_path / name, text, propagate=propagate, tune_epochs=1))
        return float(found[1]["held_out_error_before"])

    none, half, whole = (second(str(pull), pull) for pull in (0.0, 0.5, 1.0))
    assert none == pytest.approx(second("pruned", 0.0, "pruned"), rel=0.02)
    assert 1.05 * none < half and 1.05 * half < whole


@pytest.mark.parametrize("propagate", ["pruned", "dense"])
@pytest.mark.parametrize("harm", [{"tune_lr": 0.0}, {"tune_lr": 0.99}], ids=["a rate of 0", "a ruinous rate"])
def test_a_layer_that_gets_no_better_stays(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: str, harm: dict[str, Any]
) -> None:
    monkeypatch.setattr("streamprune.pruning.tuning.RATES", (1.0,))
    monkeypatch.setattr(tuning, "schedule", lambda *_: 1.0)
    monkeypatch.setattr("streamprune.pruning.tuning.schedule", lambda *_: 1.0)
    result = run(models(), tmp_path / "out", text, propagate=propagate, **harm)
    run(models(), tmp_path / "plain", text, propagate=propagate, tune="none", tune_epochs=None)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    for each in tunes(result):
        assert each["left_as_it_was"] and "rate" not in each
        assert each["held_out_error"] == each["held_out_error_before"] and each["error"] == each["error_before"]


def test_another_rate_is_tried_where_the_first_does_harm(models: Models, text: Path, tmp_path: Path) -> None:
    result = run(models("llama", 2), tmp_path / "out", text, tune_lr=0.5)
    assert any(each.get("rate", 0.5) < 0.5 and each["epochs"] > 2 for each in tunes(result))
    assert all(each["held_out_error"] <= each["held_out_error_before"] for each in tunes(result))


@pytest.mark.parametrize("how", [
    {"method": "obs-admm"}, {"method": "wanda", "pattern": None, "sparsity": 0.6}, {"method": "magnitude"},
    {"method": "swiftprune", "pattern": None, "sparsity": 0.5, "allocate": "owl"}, {"method": "swiftprune-tuned"},
], ids=["refit", "unstructured", "magnitude", "allocated", "by name"])  # fmt: skip
def test_it_goes_with_every_mask_and_refit(models: Models, text: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    result = run(models("llama", 2), tmp_path / "out", text, **{"tune": "block", **how})
    assert any(each["held_out_error"] < each["held_out_error_before"] for each in tunes(result))
    assert result.report["job"]["tune"] == "block" and result.report["job"]["tune_lr"] == 0.015
    pruned = sum(entry["pruned"] for entry in result.report["linears"])
    found = tensors_of(tmp_path / "out")
    assert sum(int((found[e["name"] + ".weight"] == 0).sum()) for e in result.report["linears"]) >= pruned


def test_linears_that_are_not_pruned_stay(models: Models, text: Path, tmp_path: Path) -> None:
    source = models("llama", 3)
    result = run(source, tmp_path / "out", text, only=r"layers\.1\.mlp")
    assert len(tunes(result)) == 1
    dense, found = tensors_of(source), tensors_of(tmp_path / "out")
    changed = {name for name in dense if not torch.equal(dense[name], found[name])}
    assert changed and all(n.startswith("model.layers.1.mlp") or (".1." in n and "norm" in n) for n in changed)


# ---- conditions


@pytest.mark.parametrize("propagate", ["asymmetric", "dense"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_resumed_at_any_stage(models: Models, text: Path, tmp_path: Path, propagate: str, at: int) -> None:
    how = {"propagate": propagate, "tune_epochs": 1}
    run(models(), tmp_path / "whole", text, **how)

    def stop(step: Progress) -> None:
        if step.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(models(), tmp_path / "out", text, progress=stop, **how)
    assert (tmp_path / "out.partial").exists()
    run(models(), tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("propagate", ["asymmetric", "dense"])
def test_interrupted_within_a_layer(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, propagate: str
) -> None:
    """Its part of the shard is there already, untuned and in no journal; the layer begins again."""
    run(models(), tmp_path / "whole", text, propagate=propagate)
    train, calls = BlockTuner._train, []

    def stop(self: BlockTuner, *args: Any) -> None:
        calls.append(args)
        train(self, *args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockTuner, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            run(models(), tmp_path / "out", text, propagate=propagate)
    assert len(calls) == 2 and [p.name for p in (tmp_path / "out.partial").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    run(models(), tmp_path / "out", text, propagate=propagate)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["killed", "lost", "emptied"])
def test_no_crash_does_harm(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    crasher = Crasher(root, lambda: run(models("llama", 2), root / "out", text, tune_epochs=1, samples=4), ("out",))
    show(crasher.failures(kind, 0.08))


@pytest.mark.parametrize("layers_resident", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("propagate", ["asymmetric", "pruned", "dense"])
def test_every_layout_gives_the_same(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers_resident: tuple[int, bool],
    propagate: str,
) -> None:  # fmt: skip
    how = {"propagate": propagate, "backend": "torch", "tune_epochs": 1}
    run(models(), tmp_path / "plain", text, **how)
    layout = Layout(2, *layers_resident, 0, windows=1)
    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    for place in ("model.loader", "pruning.forward"):
        monkeypatch.setattr(f"streamprune.{place}.WeightLoader", functools.partial(WeightLoader, copies=True))
    run(models(), tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")


def test_less_memory_means_fewer_windows_at_once(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 500 << 20)
    monkeypatch.setattr("streamprune.pruning.memory.estimate", functools.partial(_estimate, base=500 << 20))
    monkeypatch.setattr("streamprune.pruning.tuning._LEAST_STEPS", 1)
    source = models("llama", 2)
    with pytest.raises(ResourceError, match=r"needs --max-ram (\d+)MiB") as refused:
        run(source, tmp_path / "out", text, max_ram=400 << 20)
    assert not list(tmp_path.iterdir()) or not (tmp_path / "out.partial").exists()
    least = int(str(refused.value).split("--max-ram ")[2].split("MiB")[0])
    few = run(source, tmp_path / "few", text, max_ram=least << 20)
    many = run(source, tmp_path / "many", text)
    assert 1 <= few.report["resolved"]["tune_windows"] <= many.report["resolved"]["tune_windows"] == 7


def _estimate(*args: Any, **more: Any) -> Any:
    from streamprune.model.budget import estimate

    return estimate(*args, **more)


def test_what_lies_beside_a_pass() -> None:
    """Grams are given up before windows; a refit's arrays and tuning have their turns one after the other."""
    refit, tune = RefitNeeds(100, 40, 5, 30), TuneNeeds(200, 10, 5, 0)
    found = list(extra_choices(refit, tune))
    assert [(room, windows) for room, windows, _ in found] == [(100, 5), (70, 5), (40, 5), (40, 3), (40, 2), (40, 1)]
    assert found[0][2] == 100 + 5 + 250 and found[-1][2] == 40 + 5 + 210 == least_extra(refit, tune)
    assert list(extra_choices(None, tune))[-1] == (0, 1, 210) and next(iter(extra_choices(refit, None))) == (
        100,
        0,
        135,
    )
    assert (
        Budget(1, 2, 30, 1).tuning(tune, 3).peak(4) == 3 + 230 and Budget(1, 2, 300, 1).tuning(tune, 3).peak(4) == 307
    )


def test_the_plan_knows_it(models: Models) -> None:
    from test_planning import EVEN

    source, seqlen = models("llama", 2), 64
    plain, tuned, longer = (
        plan(source, samples=32, seqlen=seqlen, propagate="pruned", speeds=EVEN, **how)
        for how in ({}, {"tune": "block"}, {"method": "swiftprune-tuned", "tune_epochs": 24})
    )
    assert plain.seconds < tuned.seconds < longer.seconds
    assert tuned.disk_bytes > plain.disk_bytes and tuned.flops > plain.flops
    assert tuned.peak_ram_bytes >= tuned.least_ram_bytes >= plain.least_ram_bytes


def test_half_the_windows_are_tried_when_memory_runs_out(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune, sizes = BlockTuner.tune, list[int]()

    def tight(self: BlockTuner, *args: Any) -> Any:
        sizes.append(self._most)
        if self._most > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tune(self, *args)

    monkeypatch.setattr(BlockTuner, "tune", tight)
    monkeypatch.setattr("streamprune.pruning.tuning._LEAST_STEPS", 1)
    result = run(models("llama", 2), tmp_path / "out", text)
    assert sizes == [7, 4, 2, 1, 1]
    assert [each["out_of_memory_windows"] for each in tunes(result)] == [1, 1]


def test_a_resumed_job_goes_on_with_the_windows_that_fit(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if all would fit now: the bytes are those of a job that was not stopped."""
    tune, sizes, lacks, stops = BlockTuner.tune, list[int](), [True], [False]

    def tight(self: BlockTuner, stage: Stage, *args: Any) -> Any:
        sizes.append(self._most)
        if stops[0] and stage.index == 1:
            raise KeyboardInterrupt
        if lacks[0] and self._most > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tune(self, stage, *args)

    monkeypatch.setattr(BlockTuner, "tune", tight)
    monkeypatch.setattr("streamprune.pruning.tuning._LEAST_STEPS", 1)
    whole = run(models("llama", 2), tmp_path / "whole", text)
    stops[0] = True
    with pytest.raises(KeyboardInterrupt):
        run(models("llama", 2), tmp_path / "out", text)
    stops[0] = lacks[0] = False
    sizes.clear()
    result = run(models("llama", 2), tmp_path / "out", text)
    assert sizes == [2] and [each["out_of_memory_windows"] for each in tunes(result)] == [2, 2]
    name = "model.safetensors"
    assert (result.out / name).read_bytes() == (whole.out / name).read_bytes()


# ---- refusals


def test_layers_without_gradients_are_refused(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x).detach())
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0 \(LlamaDecoderLayer\) cannot be differentiated"):
        run(models(), tmp_path / "out", text)

    def in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
        made = forward(self, x).sigmoid()
        made.mul_(2.0)
        made.sigmoid().add_(1.0)
        return made.exp_().mul_(made)

    monkeypatch.setattr(LlamaMLP, "forward", in_place)
    with pytest.raises(UnsupportedError, match="leave out --tune"):
        run(models(), tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("how", "message"), [
    ({"tune": "layer"}, "no such tune"), ({"tune_epochs": 0}, "at least 1"), ({"tune_lr": 1.0}, r"not in \[0, 1\)"),
    ({"tune": "none"}, "are for --tune block"), ({"samples": 1}, "at least 2"),
])  # fmt: skip
def test_what_cannot_be(models: Models, text: Path, tmp_path: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(models(), tmp_path / "out", text, **how)
    assert not list(tmp_path.iterdir())


def test_statistics_do_not_suffice(models: Models, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no hidden states, which --tune needs"):
        prune(models(), tmp_path / "out", pattern="2:4", tune="block", stats=tmp_path / "s")
    with pytest.raises(UsageError, match="no hidden states, which --tune needs"):
        plan(models(), tune="block", stats=tmp_path / "s")


def test_jobs_that_do_not_tune_are_as_they_were(models: Models, text: Path, tmp_path: Path) -> None:
    """No field of theirs names it, so that those that were begun or finished before it was there are the same jobs."""
    result = run(models(), tmp_path / "out", text, tune=None, tune_epochs=None)
    assert not [key for key in (*result.report["job"], *result.report["resolved"]) if "tune" in key]
    assert all("tune" not in stage for stage in result.report["stages"])
    tuned = run(models(), tmp_path / "tuned", text)
    assert {key: tuned.report["job"][key] for key in ("tune", "tune_epochs", "tune_lr")} == {
        "tune": "block", "tune_epochs": 2, "tune_lr": 0.015,
    }  # fmt: skip
    assert run(models(), tmp_path / "tuned", text).status == "up-to-date"
