"""Tuning mixtures of experts: gradients through frozen experts, each expert by itself, whole jobs on tiny models."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import plan, prune
from mixtures import MIXTURES, save_mixture, watch_experts
from test_crash import Crasher, show
from test_device_path import weights_of
from whole_model import in_memory, stored, windows_of

from streamprune.calibration.windows import held_out
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import ResourceError, UnsupportedError
from streamprune.methods.tuning import Tuned
from streamprune.model.budget import Layout
from streamprune.model.differentiable import BoundExperts, trainable
from streamprune.model.frozen_experts import FrozenExperts
from streamprune.model.loader import WeightLoader
from streamprune.model.skeleton import build_skeleton
from streamprune.model.streamed import StreamedModel
from streamprune.progress import Progress
from streamprune.pruning import expert_tuning
from streamprune.pruning.expert_tuning import ExpertTuner
from streamprune.pruning.job import JobResult
from streamprune.pruning.tuning import BlockTuner

Make = Callable[..., Path]
SAMPLES, SEQLEN = 16, 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", 4 * SEQLEN)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(kind, ...) -> folder of a checkpoint, made once. Do not write there."""

    @functools.cache
    def get(kind: str = "qwen3_moe", **more: Any) -> Path:
        return save_mixture(tmp_path_factory.mktemp(kind) / "model", kind, **more)

    return get


def run(source: Path, out: Path, text: Path, **job: Any) -> JobResult:
    given: dict[str, Any] = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "pattern": "2:4", "tune": "block"}
    given |= {"tune_epochs": 2, "dtype": "float32", "expert_tokens": 16}
    return prune(source, out, **{**given, **job})


def tunes(result: JobResult) -> list[dict[str, Any]]:
    return [stage["tune"] for stage in result.report["stages"] if "tune" in stage]


# ---- gradients


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text", "longcat_flash", "dbrx"])
def test_gradients_are_those_of_the_whole_layer(make: Make, text: Path, kind: str) -> None:
    """Beside autograd through transformers' own experts: outputs, and slopes of all that is not an expert's."""
    source, at = make(kind), 1
    windows = windows_of(source, text)
    model, given, made = in_memory(source, MIXTURES[kind].like), list[torch.Tensor](), list[torch.Tensor]()
    skeleton = build_skeleton(open_checkpoint(source), torch.float32)
    stage = skeleton.layer_stages[at]
    layer = model.get_submodule(stage.prefix)
    layer.register_forward_pre_hook(
        lambda _, args, more: given.append((args[0] if args else more["hidden_states"]).detach()), with_kwargs=True
    )
    layer.register_forward_hook(lambda _, args, out: made.append(out[0] if isinstance(out, tuple) else out))
    model(input_ids=windows, use_cache=False)
    made[0].square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None and "experts." not in name}
    with (
        ShardMaps(open_checkpoint(source)) as maps,
        WeightLoader(maps, torch.device("cpu")) as loader,
    ):
        streamed = StreamedModel(skeleton, loader, torch.float32)
        streamed.learn_calls([windows])
        own = {n: loader.tensor(skeleton.sources[f"{stage.prefix}.{n}"]).clone().requires_grad_() for n in wanted}
        fixed = {
            n.removeprefix(f"{stage.prefix}."): loader.tensor(ref) for n, ref in skeleton.sources.items()
            if n.startswith(f"{stage.prefix}.") and n.removesuffix(".weight") not in stage.expert_of
        }  # fmt: skip
        experts = BoundExperts(FrozenExperts({}), loader, skeleton.sources)
        with trainable(streamed, stage, {**fixed, **own}, experts) as forward:
            found = forward(given[0])
            found.square().sum().backward()
    torch.testing.assert_close(found, made[0], rtol=1e-4, atol=1e-5)
    assert any("norm" in name for name in wanted) and any(re.search("router|gate|classifier|ffn", n) for n in wanted)
    for name, slope in wanted.items():
        assert own[name].grad is not None, name
        torch.testing.assert_close(own[name].grad, slope, rtol=2e-3, atol=1e-3 * float(slope.abs().max()), msg=name)


# ---- jobs


@pytest.mark.parametrize(
    "kind, propagate",
    [("qwen3_moe", "pruned"), ("gpt_oss", "dense"), ("llama4_text", "pruned"), ("deepseek_v3", "dense")],
)
def test_a_tuned_mixture(make: Make, text: Path, tmp_path: Path, kind: str, propagate: str) -> None:
    """2:4 to the last group, routers untouched, every layer at least as good as it was on what was held out."""
    source = make(kind)
    result = run(source, tmp_path / "out", text, propagate=propagate)
    run(source, tmp_path / "mask", text, tune="none", tune_epochs=None, propagate="dense")
    dense, mask, found = stored(source), stored(tmp_path / "mask"), stored(tmp_path / "out")
    assert dense.keys() == found.keys()
    changed = set()
    for name, tensor in found.items():
        assert tensor.dtype == dense[name].dtype and tensor.shape == dense[name].shape
        pruned = not torch.equal(mask[name], dense[name])
        if pruned and "layers.0." in name:
            assert bool((tensor[mask[name] == 0] == 0).all()), "the mask is that of the job without tuning"
            assert not bool(torch.signbit(tensor[tensor == 0]).any())
        elif not pruned and (tensor.dim() > 1 or not name.startswith("model.layers.") or "router" in name):
            assert torch.equal(tensor, dense[name]), name
        changed |= {name} if pruned and "layers.0." in name and not torch.equal(tensor, mask[name]) else set()
    for each in tunes(result):
        assert each["held_out_error"] <= each["held_out_error_before"]
        told = each.get("experts")
        if told is not None:
            assert told["tuned"] + told["left_as_they_were"] + told["too_few_tokens"] == MIXTURES[kind].settings.get(
                "num_experts", MIXTURES[kind].settings.get("num_local_experts", 8)
            )
            assert told["held_out_error"] <= told["held_out_error_before"]
    assert any(each.get("experts", {}).get("tuned") for each in tunes(result))
    assert any("experts" in name for name in changed) or not tunes(result)[0].get("experts", {}).get("tuned")
    assert any("experts" not in name for name in changed)


def test_fused_or_each(make: Make, text: Path, tmp_path: Path) -> None:
    """How a checkpoint stores its experts makes no difference beyond the order of sums."""
    each, fused = (run(make("mixtral", fused=f), tmp_path / f"{f}", text) for f in (False, True))
    for one, other in zip(tunes(each), tunes(fused), strict=True):
        assert one["held_out_error"] == pytest.approx(other["held_out_error"], rel=0.1)
        assert one["experts"]["held_out_error"] == pytest.approx(other["experts"]["held_out_error"], rel=0.1)


def test_the_error_is_that_of_what_is_written(make: Make, text: Path, tmp_path: Path) -> None:
    """The experts of the first layer, from whole models in memory: weighted with routing, relative to the states."""
    source, kind = make("mixtral"), "mixtral"
    result = run(source, tmp_path / "out", text, propagate="dense", only=r"layers\.0\..*experts", expert_tokens=1)
    (told,) = (each["experts"] for each in tunes(result))
    assert told["tuned"] == 4
    windows = _drawn(text, source)
    whole, inputs, states = in_memory(source), dict[str, Any](), list[torch.Tensor]()

    def see(name: str, x: torch.Tensor, share: torch.Tensor) -> None:
        inputs.setdefault(name, []).append((x, share))

    whole.model.layers[0].register_forward_hook(lambda _, args, out: states.append(out))
    watch_experts(whole, MIXTURES[kind], windows, see)
    sizes = torch.cat([s.flatten(0, -2) for s in states]).square().sum(-1)
    chosen = _chosen(in_memory(source), windows)
    dense, tuned = stored(source), stored(tmp_path / "out")
    held = list(held_out(SAMPLES))
    errors = []
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}"
        x, share = (torch.cat(parts) for parts in zip(*inputs[f"{name}.w1"], strict=True))
        tokens = (chosen == e).any(1).nonzero().flatten()
        wanted, made = (_expert(weights, name, x) for weights in (dense, tuned))
        counts = share[:, 0].square() / sizes[tokens]
        counts *= len(x) / float((counts * wanted.square().sum(1)).sum())
        of_held = torch.isin(tokens // SEQLEN, torch.tensor(held))
        errors.append(float((counts * (made - wanted).square().sum(1))[of_held].mean()))
    assert told["held_out_error"] == pytest.approx(sum(errors) / 4, rel=2e-2)


def _drawn(text: Path, source: Path) -> torch.Tensor:
    from families import VOCAB
    from windows import drawn

    return torch.from_numpy(drawn(text, source, VOCAB, SAMPLES, SEQLEN, 0))


def _expert(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    name = name.replace("mlp", "block_sparse_moe") if f"{name}.w1.weight" not in weights else name
    w1, w2, w3 = (weights[f"{name}.w{i}.weight"] for i in (1, 2, 3))
    return (torch.nn.functional.silu(x @ w1.t()) * (x @ w3.t())) @ w2.t()


def _chosen(model: Any, windows: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args[1]))
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    return torch.cat(found)


# ---- what does no harm


def test_a_rate_of_0_changes_nothing(make: Make, text: Path, tmp_path: Path) -> None:
    result = run(make("gpt_oss"), tmp_path / "out", text, tune_lr=0.0, tune_epochs=1)
    run(make("gpt_oss"), tmp_path / "plain", text, tune="none", tune_epochs=None, propagate="pruned")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    for each in tunes(result):
        assert each["left_as_it_was"] and each["experts"]["tuned"] == 0 and each["experts"]["left_as_they_were"] == 4


def test_experts_that_see_too_little_stay(make: Make, text: Path, tmp_path: Path) -> None:
    job = {"only": r"layers\.0\..*experts", "propagate": "dense"}
    some = run(make(), tmp_path / "some", text, **job, expert_tokens=120)
    run(make(), tmp_path / "plain", text, **job, expert_tokens=120, tune="none", tune_epochs=None)
    (told,) = (each["experts"] for each in tunes(some))
    assert 0 < told["too_few_tokens"] < 8
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "some")
    same = {n for n in before if "experts" in n and ".0.mlp" in n and torch.equal(before[n], after[n])}
    assert len(same) == 3 * (told["too_few_tokens"] + told["left_as_they_were"])


def test_experts_are_put_back_where_the_layer_is_worse_with_them(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, calls = BlockTuner._error, list[int]()

    def worse(self: Any, *args: Any) -> float:
        calls.append(1)
        return 1e9 if isinstance(self, BlockTuner) and len(calls) == 3 else error(self, *args)

    monkeypatch.setattr(BlockTuner, "_error", worse)
    result = run(make("mixtral"), tmp_path / "out", text, only=r"layers\.0\..*experts", propagate="dense")
    run(make("mixtral"), tmp_path / "plain", text, only=r"layers\.0\..*experts", tune="none", tune_epochs=None)
    (each,) = tunes(result)
    assert each["experts"]["put_back"] and each["experts"]["tuned"] == 0
    before, after = stored(tmp_path / "plain"), stored(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "experts" in name)


# ---- conditions


def test_one_expert_at_a_time(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight, gradient or moment of an expert is held when the next one is tuned."""
    of, alive, most = Tuned.of.__func__, weakref.WeakSet[Any](), list[int]()  # type: ignore[attr-defined]

    class Seen:
        """What can be in a weak set."""

    def note(cls: type[Tuned], *args: Any, **more: Any) -> Tuned:
        made: Tuned = of(cls, *args, **more)
        mark = Seen()
        made.__dict__["mark"] = mark
        alive.add(mark)
        most.append(len(alive))
        return made

    monkeypatch.setattr(Tuned, "of", classmethod(note))
    run(make(), tmp_path / "out", text, only=r"layers\.1\..*\.experts\.", samples=8)
    norms = 4  # of the rest of a layer
    assert len(most) > 20 and max(most) <= max(3, norms)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resumed_at_any_stage(make: Make, text: Path, tmp_path: Path, at: int) -> None:
    how = {"tune_epochs": 1, "samples": 8}
    run(make("gpt_oss"), tmp_path / "whole", text, **how)

    def stop(step: Progress) -> None:
        if step.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make("gpt_oss"), tmp_path / "out", text, progress=stop, **how)
    run(make("gpt_oss"), tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_interrupted_between_experts(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    source, how = make("gpt_oss"), {"tune_epochs": 1, "samples": 8}
    run(source, tmp_path / "whole", text, **how)
    search, calls = ExpertTuner._search, list[int]()

    def stop(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return search(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertTuner, "_search", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "out", text, **how)
    run(source, tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "lost"])
def test_no_crash_does_harm(make: Make, text: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    job = {"tune_epochs": 1, "samples": 4, "expert_tokens": 1}
    crasher = Crasher(root, lambda: run(make("gpt_oss"), root / "out", text, **job), ("out",))
    show(crasher.failures(kind, 0.08))


@pytest.mark.parametrize("layers, resident", [(1, False), (2, True)])
def test_every_layout_gives_the_same(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, resident: bool
) -> None:
    """Experts are copied one by one, as to a device."""
    source, how = make("gpt_oss"), {"backend": "torch", "tune_epochs": 1, "samples": 8, "seqlen": 16}
    run(source, tmp_path / "plain", text, **how)
    layout = Layout(4, layers, resident, 0, windows=1)
    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    for place in ("model.loader", "pruning.forward"):
        monkeypatch.setattr(f"streamprune.{place}.WeightLoader", functools.partial(WeightLoader, copies=True))
    run(source, tmp_path / "out", text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")


def test_in_pieces(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are computed for a few tokens at once, and files read so, with the same result to rounding."""
    how = {"samples": 8, "seqlen": 16, "tune_epochs": 1}
    whole = tunes(run(make("gpt_oss"), tmp_path / "whole", text, **how))
    monkeypatch.setattr(expert_tuning, "AT_ONCE", 11)
    monkeypatch.setattr("streamprune.model.routed_inputs._GATHERED_ROWS", 3)
    monkeypatch.setattr("streamprune.pruning.linears.CHUNK_BYTES", 1 << 10)
    for one, other in zip(whole, tunes(run(make("gpt_oss"), tmp_path / "pieces", text, **how)), strict=True):
        assert one["experts"]["held_out_error"] == pytest.approx(other["experts"]["held_out_error"], rel=1e-2)


def test_the_plan_knows_it(make: Make) -> None:
    from test_planning import EVEN

    plain, tuned = (
        plan(make(), samples=32, seqlen=32, propagate="pruned", pattern="2:4", speeds=EVEN, **how)
        for how in ({}, {"tune": "block"})
    )
    assert plain.seconds < tuned.seconds and plain.flops < tuned.flops and plain.disk_bytes < tuned.disk_bytes
    assert tuned.peak_ram_bytes >= tuned.least_ram_bytes >= plain.least_ram_bytes


def test_max_ram_is_refused_with_what_is_enough(make: Make, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs --max-ram \d+MiB"):
        run(make(), tmp_path / "out", text, max_ram=64 << 20)
    assert not list(tmp_path.iterdir())


def test_layers_that_run_on_no_meta_device_are_refused(make: Make, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"jetmoe: model\.layers\.0 .* cannot be .*leave out --tune"):
        run(make("jetmoe"), tmp_path / "out", text)
    assert not (tmp_path / "out.partial").exists()


def test_without_biases_that_only_choose(make: Make) -> None:
    """Vectors that no gradient reaches are no reason to refuse a layer with experts; routers are not tuned."""
    from streamprune.pruning.tuning import tuned_names

    skeleton = build_skeleton(open_checkpoint(make("gpt_oss")), torch.float32)
    stage = skeleton.layer_stages[0]
    names = tuned_names(skeleton, stage, frozenset(stage.linears))
    assert not any("router" in name or "experts" in name for name in names)
    assert {name for name, masked in names.items() if masked} == {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    assert sum(not masked for masked in names.values()) >= 6
