"""Mixtures of experts against the whole model in memory: what their experts see, what is pruned, what is refused."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, evaluate, prune
from families import HIDDEN, SEEING, VOCAB, save_tokenizer
from family_checks import same_sums
from mixtures import FUSED, MIXTURES, look, names_of, save_mixture, watch_experts, weights_of_experts
from safetensors.torch import load_file, save_file
from stand_in import Card, plugged_in
from test_crash import OUTPUTS, Crasher, show
from test_device_path import weights_of
from whole_model import (
    BATCH,
    SAMPLES,
    SEED,
    SEQLEN,
    check_linear,
    in_memory,
    perplexity,
    stored,
    stream,
    windows_of,
)  # fmt: skip
from windows import cut

from streamprune.calibration.statistics import StatisticsFile
from streamprune.cli import main
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError, StateError, UnsupportedError, UsageError
from streamprune.model.bound_experts import ExpertWeights
from streamprune.model.budget import EXPERT_TOKENS, GROUP_BYTES, Budget, Layout, estimate, group_of
from streamprune.model.expert_forms import Form, is_experts
from streamprune.model.loader import WeightLoader
from streamprune.model.pass_memory import waiting_bytes
from streamprune.model.routed import Routed, padded_rows
from streamprune.model.skeleton import build_skeleton
from streamprune.pruning.forward import CalibrationPass
from streamprune.pruning.job import JobResult
from streamprune.pruning.memory import layout_of

PAIRS = {"pattern": "2:4", "method": "wanda", "score": "wanda"}
HALF = {"sparsity": 0.5, "method": "swiftprune", "score": "lscore", "selector": "ewma"}
LEAST, LITTLE = 20, 3

Make = Callable[..., Path]
Job = dict[str, Any]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", BATCH * SEQLEN)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(kind, ...) -> folder of a checkpoint, made once. Do not write there."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(kind: str = "qwen3_moe", **more: Any) -> Path:
        key = (kind, *sorted(more.items()))
        if key not in made:
            made[key] = save_mixture(tmp_path_factory.mktemp(kind) / "model", kind, **more)
        return made[key]

    return get


def given(job: Job) -> Job:
    """The arguments of a job."""
    return {k: v for k, v in job.items() if k not in ("score", "selector")}


def run(source: Path, out: Path, text: Path, job: Job = PAIRS, **more: Any) -> JobResult:
    return stream(source, out, text, given(job), **more)


@pytest.fixture(scope="module")
def held(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 300 words of the text."""
    path = tmp_path_factory.mktemp("held") / "text.txt"
    path.write_text(" ".join(text.read_text().split()[:300]))
    return path


def whole_perplexity(folder: Path, text: Path, whole: Any = None) -> float:
    """Of the whole model in memory, loaded from a folder unless given."""
    windows = torch.from_numpy(cut(text, folder, VOCAB, 32))
    return perplexity(in_memory(folder) if whole is None else whole, windows)


def test_in_bfloat16(make: Make, text: Path, held: Path, tmp_path: Path) -> None:
    """The stored dtype is kept, and N:M masks run along the inputs, also of transposed weights."""
    source = make("gpt_oss", dtype="bfloat16")
    out = run(source, tmp_path / "out", text, PAIRS, dtype="bfloat16").out
    before, after = stored(source), stored(out)
    for name in (n for n in before if n.endswith(("down_proj", "gate_up_proj"))):
        assert after[name].dtype == torch.bfloat16 and after[name].shape == before[name].shape
        zeros = (after[name] == 0).unflatten(1, (-1, 4)).sum(2)  # (experts, in, out)
        assert bool((zeros == 2).all()), name
        assert not bool((after[name] == 0).unflatten(2, (-1, 4)).sum(3).eq(2).all())
    found = evaluate(out, held, seqlen=32, dtype="float32", work=tmp_path)
    assert found.perplexity == pytest.approx(whole_perplexity(out, held), rel=2e-2)  # states are kept in bfloat16


# ---- what experts see


def test_few_tokens_and_none(make: Make, text: Path, tmp_path: Path) -> None:
    """Experts that see too few tokens fall back to pooled statistics, and only these do; the report lists them."""
    source = make("qwen3_moe")
    few_windows = windows_of(source, text)[:1, :8]
    seen = look(in_memory(source), MIXTURES["qwen3_moe"], few_windows)
    counts = {name: seen.stats[name][0] for role in seen.roles for name in role}
    assert {min(n, LITTLE) for n in counts.values()} >= {0, 1, LITTLE}
    tokens = tmp_path / "text.txt"
    tokens.write_text(" ".join(f"w{i}" for i in few_windows[0].tolist()))
    window = {"samples": 1, "seqlen": 8, "expert_tokens": LITTLE, "save_stats": tmp_path / "s"}
    done = stream(source, tmp_path / "out", tokens, given(PAIRS), **window)
    wanted, few = seen.pooled(LITTLE)
    same_sums(StatisticsFile(tmp_path / "s"), wanted)
    for index, stage in enumerate(done.report["stages"][1:-1]):
        assert set(stage["pooled"]) == {n for n in few if n.startswith(f"model.layers.{index}.")}
        assert len(stage["pooled"]) == len(set(stage["pooled"]))
    assert not any("pooled" in done.report["stages"][i] for i in (0, -1))
    file = StatisticsFile(tmp_path / "s")
    for name in counts:
        assert (".pooled." in file.groups[name]) == (name in few)
        assert (".pooled." in file.groups[name]) == (counts[name] < LITTLE)
    every = sum(seen.stats[name][0] for name in seen.roles[0])
    name = next(n for n in few if n.startswith("model.layers.0.") and n.endswith("gate_proj"))
    assert file.load(name, HIDDEN).tokens == every == 2 * 8


def test_nothing_is_pooled_where_all_see_enough(make: Make, text: Path, tmp_path: Path) -> None:
    done = run(make("mixtral"), tmp_path / "out", text, PAIRS, expert_tokens=2, save_stats=tmp_path / "s")
    assert not any("pooled" in stage for stage in done.report["stages"])
    assert not any("pooled" in leader for leader in StatisticsFile(tmp_path / "s").groups.values())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_calibrate_and_prune(make: Make, text: Path, tmp_path: Path, kind: str) -> None:
    """`calibrate` and `prune --stats` give the same bytes as `prune`."""
    window = {"samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "calib": text, "expert_tokens": 30}
    prune(make(kind), tmp_path / "one", pattern="2:4", **window)
    report = calibrate(make(kind), tmp_path / "stats", **window).report
    assert any(stage.get("pooled") for stage in report["stages"]) == (kind == "qwen3_moe")
    two = prune(make(kind), tmp_path / "two", pattern="2:4", stats=tmp_path / "stats").report
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    pooled = [{*stage.get("pooled", ())} for stage in report["stages"]]
    assert [{*stage.get("pooled", ())} for stage in two["stages"]][: len(pooled)] == pooled


def test_routed(make: Make, text: Path, tmp_path: Path) -> None:
    """With "routed", all tokens routed to an expert count alike, and the job is a different one."""
    source = make("mixtral")
    windows = windows_of(source, text)
    wanted, _ = look(in_memory(source), MIXTURES["mixtral"], windows, weighted=False).pooled(2)
    run(source, tmp_path / "out", text, PAIRS, expert_tokens=2, expert_stats="routed", save_stats=tmp_path / "s")
    same_sums(StatisticsFile(tmp_path / "s"), wanted)
    weighted = run(source, tmp_path / "other", text, PAIRS, expert_tokens=2)
    assert weights_of(tmp_path / "out") != weights_of(weighted.out)
    assert weighted.report["job"]["expert_stats"] == "weighted" and weighted.report["job"]["expert_tokens"] == 2
    for more in ({"expert_stats": "routed", "expert_tokens": 2}, {"expert_tokens": 3}):
        with pytest.raises(StateError, match=f"{next(iter(more))} is"):
            run(source, tmp_path / "other", text, PAIRS, **more)
    for wrong in ({"expert_stats": "some"}, {"expert_tokens": 0}):
        with pytest.raises(UsageError, match="--expert-"):
            run(source, tmp_path / "wrong", text, PAIRS, **wrong)


def test_only_some_experts(make: Make, text: Path, tmp_path: Path) -> None:
    """--only can choose a single expert of a three-dimensional tensor."""
    source = make("gpt_oss")
    done = run(source, tmp_path / "out", text, HALF, only=r"layers\.1\..*experts\.2\.down_proj")
    assert [n["name"] for n in done.report["linears"]] == ["model.layers.1.mlp.experts.2.down_proj"]
    before, after = stored(source), stored(done.out)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"model.layers.1.mlp.experts.down_proj"}
    (name,) = changed
    assert [int((t == 0).sum()) for t in after[name]] == [0, 0, before[name][2].numel() // 2, 0]
    assert all(torch.equal(before[name][e], after[name][e]) for e in (0, 1, 3))


# ---- routers, shared experts


def test_routers_stay(make: Make, text: Path, tmp_path: Path) -> None:
    """Routers and gates of shared experts are pruned only if --only names them; shared experts are pruned."""
    source = make("qwen2_moe")
    done = run(source, tmp_path / "out", text)
    names = {n["name"] for n in done.report["linears"]}
    assert not any(re.search(r"(shared_expert_gate|mlp\.gate)$", name) for name in names)
    assert {f"model.layers.1.mlp.shared_expert.{leaf}_proj" for leaf in ("gate", "up", "down")} <= names
    before, after = stored(source), stored(done.out)
    assert torch.equal(before["model.layers.0.mlp.gate.weight"], after["model.layers.0.mlp.gate.weight"])
    gates = run(source, tmp_path / "gates", text, only="shared_expert_gate$").report["linears"]
    assert [n["name"] for n in gates] == [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]
    with pytest.raises(UsageError, match="leave no linear"):
        run(source, tmp_path / "none", text, only=r"mlp\.shared_expert_g")


@pytest.mark.parametrize("kind, router", [("phimoe", "router"), ("hunyuan_v1_moe", "gate.wg")])
def test_routers_that_are_linears(make: Make, kind: str, router: str) -> None:
    from streamprune.pruning.linears import selected_linears

    stages = build_skeleton(open_checkpoint(make(kind)), torch.float32).stages
    name = f"model.layers.1.mlp.{router}"
    assert name in stages[2].linears and name not in selected_linears(stages, None, None)
    assert list(selected_linears(stages, re.compile(re.escape(name) + "$"), None)) == [name]


# ---- other ways


def test_propagate_pruned(make: Make, text: Path, tmp_path: Path) -> None:
    """With propagate="pruned", layer 1's experts see outputs of pruned experts of layer 0."""
    for kind in ("granitemoe", "mixtral"):
        source = make(kind)
        out = run(source, tmp_path / kind, text, propagate="pruned", expert_tokens=2).out
        windows = windows_of(source, text)
        model, pruned = in_memory(source), in_memory(out)
        model.model.layers[0].load_state_dict(pruned.model.layers[0].state_dict())
        wanted = look(model, MIXTURES[kind], windows).stats
        old, new = (weights_of_experts(m, MIXTURES[kind]) for m in (in_memory(source), pruned))
        mine = [name for name in wanted if name.startswith("model.layers.1.")]
        assert sum(check_linear(old[n], new[n], wanted[n], PAIRS) for n in mine) <= 2
        dense = run(source, tmp_path / f"{kind}-dense", text, expert_tokens=2).out
        assert weights_of(out) != weights_of(dense)


@pytest.mark.parametrize("how", ["error", "owl"])
def test_allocate(make: Make, text: Path, tmp_path: Path, how: str) -> None:
    done = run(make("deepseek_v3"), tmp_path / "out", text, {"sparsity": 0.5}, allocate=how)
    assert done.report["sparsity"] == pytest.approx(0.5, abs=0.02)
    shares = done.report["resolved"]["allocation"]
    assert shares.keys() == {n["name"] for n in done.report["linears"]}
    for linear in done.report["linears"]:
        assert linear["pruned"] == math.floor(shares[linear["name"]] * linear["in_features"]) * linear["rows"]


@pytest.mark.parametrize(
    "kind, fused, how",
    [
        ("mixtral", False, {}),
        ("mixtral", True, {"quantize": None, "expert_stats": "routed"}),
        ("gpt_oss", False, {"method": "swiftprune", "refit": "sparsegpt"}),
        ("deepseek_v3", False, {"quantize": "fp8"}),
    ],
)
def test_refits(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fused: bool, how: Job
) -> None:
    """Each expert's linears are refitted to the inputs routed to it; the reported output errors are right."""
    monkeypatch.setattr("streamprune.model.routed_inputs._GATHERED_ROWS", 3)
    monkeypatch.setattr("streamprune.model.routed_inputs._SCANNED_TOKENS", 7)
    source = make(kind, fused=True) if fused else make(kind)
    whole, flat = in_memory(source), fused or kind == "gpt_oss"
    weighted, inputs = how.get("expert_stats") != "routed", dict[str, list[torch.Tensor]]()

    def see(name: str, x: torch.Tensor, share: torch.Tensor) -> None:
        inputs.setdefault(name, []).append((x * share if weighted else x).double())

    watch_experts(whole, MIXTURES[kind], windows_of(source, text), see, flat)
    job = {"method": "obs-admm", "pattern": "2:4", "expert_tokens": LEAST} | how
    result = run(source, tmp_path / "out", text, job)
    dense = weights_of_experts(whole, MIXTURES[kind], flat)
    if how.get("quantize"):
        after = stored(result.out)
        fitted = {n: after[f"{n}.weight"].float() * after[f"{n}.weight_scale"] for n in dense}
    else:
        fitted = weights_of_experts(in_memory(result.out), MIXTURES[kind], flat)
    reported = {entry["name"]: entry for entry in result.report["linears"]}
    assert reported.keys() > dense.keys() and all("error" in e for n, e in reported.items() if n not in dense)
    sums, few = [0.0, 0.0], 0
    for name, weight in dense.items():
        assert int((fitted[name] != 0).unflatten(1, (-1, 4)).sum(2).max()) == 2
        x, entry = torch.cat(inputs[name]), reported[name]
        if len(x) < LEAST:
            few += 1
            assert "error" not in entry
            assert how.get("quantize") or torch.equal(fitted[name][fitted[name] != 0], weight[fitted[name] != 0])
            continue
        change, whole_output = (x @ w.double().t() for w in (weight - fitted[name], weight))
        error = float(change.square().sum() / whole_output.square().sum())
        if not how.get("quantize"):  # the report has the refit's error, before rounding
            assert error == pytest.approx(entry["error"], rel=1e-3, abs=1e-6), name
        assert entry["error"] <= entry["error_mask"] * 1.0001
        sums = [sums[0] + entry["error"], sums[1] + entry["error_mask"]]
    assert sums[0] < 0.95 * sums[1]
    assert 0 < few < len(dense) / 2 if kind == "deepseek_v3" else not few


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_room_for_grams(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The Grams are the same however little memory there is; each is gathered from its own expert's inputs."""
    job = {"method": "obs-admm", "pattern": "2:4", "expert_tokens": LEAST, "only": r"layers\.1\."}
    source, out, asked = make(kind), {}, []
    gather = CalibrationPass.gather

    def spy(forward: CalibrationPass, stage: Any, make: Any, inputs: Any) -> Any:
        asked.append((room, sorted(inputs)))
        return gather(forward, stage, make, inputs)

    monkeypatch.setattr(CalibrationPass, "gather", spy)
    one = 4 * 32 * 32
    for room in (99 * one, 4 * one, one, one // 3):
        monkeypatch.setattr(
            "streamprune.pruning.memory.layout_of", lambda *a, room=room: replace(layout_of(*a), room=room)
        )
        out[room] = run(source, tmp_path / f"{room}", text, job).out
    wanted = weights_of(out[99 * one])
    for room in (4 * one, one):
        assert weights_of(out[room]) == wanted
    experts = [names for at, names in asked if at == 99 * one]
    assert experts and all("experts" in name for names in experts for name in names), "all else in the first pass"
    together = 1 if kind == "gpt_oss" else 2  # in a fused tensor, experts are gathered one after the other
    assert {len(names) for names in experts} == {together}
    assert all(len({n.rpartition(".")[0] for n in names}) == 1 for names in experts)
    assert any("self_attn" in name for at, names in asked if at == one for name in names)
    panels, plain = stored(out[one // 3]), stored(out[99 * one])  # panels sum in another order
    assert sum(int((panels[n] != plain[n]).logical_and((panels[n] == 0) != (plain[n] == 0)).sum()) for n in plain) <= 4


def test_what_experts_cannot(
    make: Make, text: Path, held: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP8 is refused for three-dimensional tensors; all other linears of such a model can be stored in it."""
    source = make("gpt_oss")
    args = ["prune", str(source), str(tmp_path / "out"), "--method", "hwpq", "--sparsity=0.5", "--calib", str(text)]
    args += ["--samples=2", "--seqlen=16", "--quiet"]
    assert main(args) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "layers.0.mlp.experts.0." in line and "which holds all experts" in line and "--skip" in line
    assert not list(tmp_path.iterdir())
    assert main([*args, "--skip", r"\.experts\."]) == 0
    report = json.loads((tmp_path / "out/streamprune.json").read_text())
    assert {n["name"].rpartition(".")[2] for n in report["linears"]} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    before, after = stored(source), stored(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "experts" in name)
    evaluate(tmp_path / "out", held, seqlen=32, work=tmp_path)


def test_fp8(make: Make, text: Path, held: Path, tmp_path: Path) -> None:
    """Experts with a tensor each, in FP8: masks are as without FP8, and the second pass computes with the codes."""
    source = make("mixtral")
    plain = stored(run(source, tmp_path / "plain", text).out)
    coded = stored(run(source, tmp_path / "dense", text, quantize="fp8").out)
    mine = [name for name in plain if "experts" in name]
    assert mine and all(coded[name].dtype == torch.float8_e4m3fn for name in mine)
    for name in mine:
        near = coded[name].float() * coded[name + "_scale"].float()
        assert int(((plain[name] == 0) & (near != 0)).sum()) == 0
        torch.testing.assert_close(near, plain[name], rtol=2**-4, atol=2**-6 * float(plain[name].abs().max()))
    found = [evaluate(tmp_path / out, held, seqlen=32, work=tmp_path).perplexity for out in ("plain", "dense")]
    assert found[0] == pytest.approx(found[1], rel=0.05) and found[0] != found[1]
    again = stored(run(source, tmp_path / "pruned", text, quantize="fp8", propagate="pruned").out)
    same = {name: torch.equal(coded[name].view(torch.uint8), again[name].view(torch.uint8)) for name in mine}
    assert all(same[name] for name in mine if ".layers.0." in name) and not all(same.values())


def test_batches(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of batches, and the kernels, change only the order of sums."""
    source = make("qwen3_moe")
    wanted = look(in_memory(source), MIXTURES["qwen3_moe"], windows_of(source, text)).pooled(LEAST)[0]
    for samples in (1, 5):
        monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", samples * SEQLEN)
        run(source, tmp_path / f"{samples}", text, expert_tokens=LEAST, save_stats=tmp_path / f"stats{samples}")
        same_sums(StatisticsFile(tmp_path / f"stats{samples}"), wanted)
    torch_out = run(source, tmp_path / "torch", text, expert_tokens=LEAST, backend="torch").out
    one, five, other = (stored(f) for f in (tmp_path / "1", tmp_path / "5", torch_out))
    for name in one:
        assert int((one[name] != five[name]).sum()) <= 2 and int((one[name] != other[name]).sum()) <= 2


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_groups(
    make: Make, text: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """Experts are loaded once per group of batches; outputs do not depend on the size of the group."""
    source = make("mixtral")
    skeleton = build_skeleton(open_checkpoint(source), torch.float32)
    names = {ref for stage in skeleton.layer_stages for e in stage.experts for ref in map(stage.linears.get, e.linears)}
    brought = list[TensorRef]()
    tensor = ShardMaps.tensor

    def view(maps: ShardMaps, ref: TensorRef) -> torch.Tensor:
        if ref in names:
            brought.append(ref)
        return tensor(maps, ref)

    monkeypatch.setattr(ShardMaps, "tensor", view)
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", SEQLEN)
    one = SEQLEN * waiting_bytes(skeleton, torch.float32)
    monkeypatch.setattr("streamprune.model.budget.GROUP_BYTES", (batches - 1) * one)
    calibrate(source, tmp_path / "stats", calib=text, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, dtype="float32")
    assert max(map(brought.count, names)) == -(-SAMPLES // batches), "once a group"
    assert len(brought) > 0.9 * len(names) * -(-SAMPLES // batches), "of tokens that go nearly everywhere"
    whole = look(in_memory(source), MIXTURES["mixtral"], windows_of(source, text))
    same_sums(StatisticsFile(tmp_path / "stats"), whole.pooled(64)[0])
    found = evaluate(source, held, seqlen=32, dtype="float32", work=tmp_path).perplexity
    assert found == pytest.approx(whole_perplexity(source, held), rel=1e-5)


def test_experts_that_are_called_twice(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    once = MixtralSparseMoeBlock.forward
    monkeypatch.setattr(MixtralSparseMoeBlock, "forward", lambda block, x: once(block, once(block, x)))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts is called more than once"):
        run(make("mixtral"), tmp_path / "out", text)
    assert not list(tmp_path.iterdir())


def test_memory_for_groups() -> None:
    """A group of batches may use all of --max-ram; without it, a fixed amount of memory."""
    budget = Budget(base=1000, reserve=0, stage=0, per_sample=10, waiting=4)
    for limit, group in ((1020, 1), (1027, 1), (1028, 2), (1059, 5), (1060, 6), (9999, 50)):
        assert group_of(budget, 2, 100, limit) == group, limit
        assert group == 50 or budget.peak(2, group) <= limit < budget.peak(2, group + 1)
    assert group_of(budget, 2, 1 << 40, None) == 1 + GROUP_BYTES // 8
    assert group_of(replace(budget, waiting=0), 2, 100, None) == 1
    assert group_of(replace(budget, enough=7), 2, 100, 9999) == 4, "no more than are worth waiting for"


def test_who_is_worth_waiting_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are just large enough for efficient products if the experts fit into the page cache; else larger."""
    skeleton = build_skeleton(open_checkpoint(make("qwen3_moe")), torch.float32)  # 2 of 8 experts a token
    assert estimate(skeleton, 1000, torch.float32).enough == math.ceil(4 * EXPERT_TOKENS / 1000)
    monkeypatch.setattr("streamprune.model.shapes.available_bytes", lambda: skeleton.layer_stages[0].nbytes)
    assert estimate(skeleton, 1000, torch.float32).enough is None


@pytest.mark.parametrize("layers, resident", [(1, False), (2, True), (3, False)])
@pytest.mark.parametrize("how", [{}, {"propagate": "pruned"}], ids=["dense", "pruned"])
def test_on_a_device(
    make: Make,
    text: Path,
    held: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    resident: bool,
    how: Job,
) -> None:
    """Experts' weights are copied to the device; the result is the same."""
    source = make("gpt_oss" if layers == 2 else "deepseek_v3")
    more = {"backend": "torch", "expert_tokens": LEAST, **how}
    run(source, tmp_path / "plain", text, **more)
    layout = Layout(BATCH, layers, resident, 0)
    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    monkeypatch.setattr("streamprune.evaluation.evaluate.layout_for", lambda *args, **more: layout)
    monkeypatch.setattr("streamprune.model.loader._PIECE_BYTES", 3000)
    with plugged_in(Card()):
        out = run(source, tmp_path / "out", text, device="cuda:0", **more).out
        found = evaluate(out, held, seqlen=32, dtype="float32", device="cuda:0", work=tmp_path)
    assert weights_of(out) == weights_of(tmp_path / "plain")
    assert found.perplexity == pytest.approx(whole_perplexity(out, held), rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"method": "obs-admm"}, {"method": "magnitude"}])
def test_few_experts_on_a_device(
    make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Job
) -> None:
    """At most two experts are loaded at once, one in use and one prefetched, also while they are pruned."""
    monkeypatch.setattr("streamprune.model.loader.WeightLoader", functools.partial(WeightLoader, copies=True))
    expect, most = WeightLoader.expect, list[int]()

    def spy(loader: WeightLoader, refs: Any) -> None:
        expect(loader, refs)
        there = {re.match(r".*experts\.\d+", ref.name) for ref in loader._prefetched}
        names = {found.group() for found in there if found}
        most.append(len(names))

    monkeypatch.setattr(WeightLoader, "expect", spy)
    run(make("qwen3_moe"), tmp_path / "out", text, how | {"pattern": "2:4", "backend": "torch"})
    assert max(most) == 2 and len([n for n in most if n]) > 8


@pytest.mark.parametrize(
    "kind, how",
    [
        ("qwen3_moe", {}),
        ("gpt_oss", {"propagate": "pruned"}),
        ("mixtral", {"method": "obs-admm", "only": r"layers\.1\."}),
    ],
)
def test_crashes(make: Make, text: Path, tmp_path: Path, kind: str, how: Job) -> None:
    root = tmp_path / "root"
    root.mkdir()
    crasher = Crasher(root, lambda: run(make(kind), root / "out", text, samples=2, expert_tokens=22, **how), OUTPUTS)
    report = json.loads((root / "out/streamprune.json").read_text())
    assert any(stage.get("pooled") for stage in report["stages"])
    failures = crasher.failures("killed", 0.03) + crasher.failures("lost", 0.08)
    assert not failures, show(failures)


def test_who_goes_on_keeps_the_groups(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that began with little memory keeps the order of its sums when resumed with more."""
    source, window = make("qwen3_moe"), {"samples": 5, "seqlen": SEQLEN, "calib": text}
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", SEQLEN)
    calibrate(source, tmp_path / "all", **window)
    monkeypatch.setattr("streamprune.model.budget.GROUP_BYTES", 0)
    calibrate(source, tmp_path / "one", **window)

    def stop(done: Any) -> None:
        if done.name == "layer 0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(source, tmp_path / "out", progress=stop, **window)
    monkeypatch.setattr("streamprune.model.budget.GROUP_BYTES", GROUP_BYTES)
    calibrate(source, tmp_path / "out", **window)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "one").read_bytes() != (tmp_path / "all").read_bytes()


# ---- memory


@pytest.mark.parametrize("kind", ["qwen3_moe", "granitemoe"])
def test_one_expert_at_a_time(
    make: Make, text: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Within a pass, no more than one expert of a module is in use, and none is a parameter."""
    source = make(kind)
    skeleton = build_skeleton(open_checkpoint(source), torch.float32)
    whose = {
        stage.linears[name]: (experts.path, number)
        for stage in skeleton.layer_stages
        for experts in stage.experts
        for number in range(len(experts.down))
        for name in experts.of([number])
    }
    live, most, seen, bound = set[TensorRef](), list[int](), set[TensorRef](), list[str]()
    tensor, release = ShardMaps.tensor, ShardMaps.release

    def view(maps: ShardMaps, ref: TensorRef) -> torch.Tensor:
        if ref in whose:
            live.add(ref)
            seen.add(ref)
            most.append(len({whose[other] for other in live}))
        return tensor(maps, ref)

    def give_back(maps: ShardMaps, refs: Any, **more: Any) -> None:
        refs = list(refs)
        live.difference_update(refs)
        release(maps, refs, **more)

    monkeypatch.setattr(ShardMaps, "tensor", view)
    monkeypatch.setattr(ShardMaps, "release", give_back)
    forward_of = Routed.forward_of

    def spying(routed: Routed, module: Any, *args: Any) -> Any:
        forward = forward_of(routed, module, *args)

        def look_first(*inputs: Any) -> Any:
            parameters = module.module.named_parameters()
            bound.extend(n for n, p in parameters if p.dim() == 3 and p.device.type != "meta")
            return forward(*inputs)

        return look_first

    monkeypatch.setattr(Routed, "forward_of", spying)
    evaluate(source, held, seqlen=32, work=tmp_path)
    assert seen == whose.keys() and max(most) == 1 and not live and not bound
    calibrate(source, tmp_path / "stats", calib=text, samples=2, seqlen=16)
    assert max(most) == 1 and not live and not bound


def test_weights_are_read_once(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are checked before a layer's pass stay in the page cache, as the pass needs them next."""
    dropped = list[str]()
    release = ShardMaps.release

    def note(maps: ShardMaps, refs: Any, *, drop_cache: bool = False) -> None:
        refs = list(refs)
        dropped.extend(ref.name for ref in refs if drop_cache)
        release(maps, refs, drop_cache=drop_cache)

    monkeypatch.setattr(ShardMaps, "release", note)
    calibrate(make("mixtral"), tmp_path / "stats", calib=text, samples=2, seqlen=16)
    assert dropped and not [name for name in dropped if "experts" in name]


def test_few_numbers_of_rows() -> None:
    """In bf16, each new number of rows takes memory: there are few different numbers, and little padding."""
    for rows in range(1, 5000):
        assert rows <= padded_rows(rows) <= max(rows + 63, rows * 1.25), rows
    assert padded_rows(0) == 0
    assert len({padded_rows(rows) for rows in range(2049)}) == 17


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_of_products(make: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """In bf16, numbers of rows are padded, also for refits; statistics and Grams see only the routed rows."""
    seen, product = list[int](), ExpertWeights.product

    def note(weights: ExpertWeights, name: str, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return product(weights, name, x)

    monkeypatch.setattr(ExpertWeights, "product", note)
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", 5 * SEQLEN)
    source = make("mixtral")
    job = {"method": "obs-admm", "pattern": "2:4", "expert_tokens": 2, "save_stats": tmp_path / "stats"}
    run(source, tmp_path / "out", text, job, dtype=dtype)
    assert ({*seen} <= {64, 128}) == (dtype == "bfloat16") and len(seen) > 20
    whole = look(in_memory(source), MIXTURES["mixtral"], windows_of(source, text)).stats
    file = StatisticsFile(tmp_path / "stats")
    found = {name: file.load(name, len(whole[name][1])).tokens for name in whole if ".layers.0." in name}
    differ = sum(abs(tokens - whole[name][0]) for name, tokens in found.items())
    assert differ <= (0 if dtype == "float32" else 0.02 * sum(found.values()))  # a router may have ties in bf16


def test_memory_estimate(make: Make) -> None:
    """The memory of a layer counts its weights without experts, and two experts."""
    for kind in ("mixtral", "gpt_oss"):
        stage = build_skeleton(open_checkpoint(make(kind)), torch.float32).layer_stages[0]
        one = 3 * 32 * 32 * 4
        apart = {ref.name for name, ref in stage.linears.items() if "experts" in name}
        assert len(apart) == (12 if kind == "mixtral" else 2)
        together = sum(t.nbytes for t in stage.tensors if t.name not in apart)
        assert stage.resident == together + 2 * one < stage.nbytes == together + 4 * one


# ---- what is wrong


def spoil(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.mlp.experts.3."
BAD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "one is missing": (lambda t: t.pop(EXPERT + "up_proj.weight"), EXPERT + "up_proj"),
    "the first is missing": (lambda t: t.pop(EXPERT + "gate_proj.weight"), EXPERT + "gate_proj"),
    "all of a kind are missing": (
        lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts" in n and "gate_proj" in n],
        "model.layers.1.mlp.experts",
    ),
    "a kind is missing": (
        lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts" in n and "down_proj" in n],
        "model.layers.1.mlp.experts.down_proj",
    ),
    "an expert is missing": (lambda t: [t.pop(n) for n in list(t) if n.startswith(EXPERT)], EXPERT),
    "wrong inputs": (lambda t: t.update({EXPERT + "up_proj.weight": torch.ones(16, 31)}), EXPERT + "up_proj"),
    "wrong outputs": (lambda t: t.update({EXPERT + "down_proj.weight": torch.ones(31, 16)}), EXPERT + "down_proj"),
    "uneven halves": (
        lambda t: t.update({EXPERT + f"{p}_proj.weight": torch.ones(n, 32) for p, n in (("gate", 15), ("up", 17))}),
        EXPERT,
    ),
    "a vector": (lambda t: t.update({EXPERT + "up_proj.weight": torch.ones(512)}), EXPERT + "up_proj"),
    "too many": (
        lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(16, 32)}),
        "model.layers.1.mlp.experts.8.up_proj.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit, name", BAD.values(), ids=BAD)
def test_damaged(make: Make, text: Path, tmp_path: Path, edit: Any, name: str) -> None:
    model = spoil(make("qwen3_moe"), tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        run(model, tmp_path / "out", text)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_damaged_and_fused(make: Make, text: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    model = spoil(make("gpt_oss"), tmp_path / "model", lambda t: t.update({name: t[name][:3].clone()}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[3, 32, 32\], config.json says \[4, 32, 32\]"):
        run(model, tmp_path / "out", text)
    model = spoil(make("gpt_oss"), tmp_path / "other", lambda t: t.update({name: t[name].to(torch.float64)}))
    with pytest.raises(UnsupportedError, match=f"{name} is F64"):
        run(model, tmp_path / "out", text)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_not_a_number(make: Make, text: Path, held: Path, tmp_path: Path, kind: str) -> None:
    """NaN is found before a pass and while writing, and reported with its position in the stored tensor."""

    def edit(t: dict[str, torch.Tensor]) -> None:
        if kind == "gpt_oss":
            t["model.layers.1.mlp.experts.down_proj"][2, 5, 7] = math.nan
        else:
            t["model.layers.1.mlp.experts.2.down_proj.weight"][5, 7] = math.nan

    model = spoil(make(kind), tmp_path / "model", edit)
    where = (
        r"down_proj is nan at \[2, 5, 7\]" if kind == "gpt_oss" else r"experts.2.down_proj.weight is nan at \[5, 7\]"
    )
    ways: list[Job] = [{}, {"method": "magnitude"}, {"method": "magnitude", "only": r"experts\.0|q_proj"}]
    for more in ways:
        with pytest.raises(CheckpointError, match=where):
            run(model, tmp_path / "out", text, {"pattern": "2:4"}, **more)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(CheckpointError, match=where):
        evaluate(model, held, seqlen=32, work=tmp_path)


def test_layers_that_predict_further_tokens(make: Make, text: Path, tmp_path: Path) -> None:
    """Tensors that transformers ignores on purpose are copied; tensors that it does not know are an error."""

    def edit(t: dict[str, torch.Tensor]) -> None:
        t |= {n.replace("layers.1.", "layers.46."): v.clone() for n, v in t.items() if "layers.1." in n}

    model = spoil(make("glm4_moe"), tmp_path / "model", edit)
    out = run(model, tmp_path / "out", text, expert_tokens=LEAST).out
    run(make("glm4_moe"), tmp_path / "plain", text, expert_tokens=LEAST)
    after, plain, before = stored(out), stored(tmp_path / "plain"), stored(model)
    assert {n: t for n, t in after.items() if ".46." in n}.keys() == {n for n in before if ".46." in n}
    assert all(torch.equal(tensor, (before if ".46." in name else plain)[name]) for name, tensor in after.items())
    wrong = spoil(
        make("glm4_moe"), tmp_path / "wrong", lambda t: t.update({"model.layers.7.mlp.gate.weight": torch.ones(8, 32)})
    )
    with pytest.raises(CheckpointError, match=r"layers\.7\.mlp\.gate\.weight belongs to a layer"):
        run(wrong, tmp_path / "no", text)


def test_stored_the_other_way_round(text: Path, tmp_path: Path) -> None:
    """For experts that transformers transposes on loading, masks run along the inputs as stored."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    seeing = SEEING["qwen3_vl"]
    assert seeing.vision is not None
    settings = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4,
        "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_vl_moe", text_config={**seeing.settings, **settings}, **seeing.vision)
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "plain")
    save_tokenizer(tmp_path / "plain")

    def turn(t: dict[str, torch.Tensor]) -> None:
        t |= {name: tensor.transpose(1, 2).contiguous() for name, tensor in t.items() if ".mlp.experts." in name}

    turned = spoil(tmp_path / "plain", tmp_path / "turned", turn)
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    assert stored(turned)[name].shape == (4, HIDDEN, 48) == stored(tmp_path / "plain")[name].mT.shape
    outs = [run(folder, tmp_path / f"{folder.name}-out", text).out for folder in (tmp_path / "plain", turned)]
    plain, other = (stored(out) for out in outs)
    assert all(torch.equal(t, other[n].mT if ".mlp.experts." in n else other[n]) for n, t in plain.items())
    assert bool(((other[name] == 0).unflatten(1, (-1, 4)).sum(2) == 2).all())
    loaded = AutoModelForImageTextToText.from_pretrained(outs[1], dtype=torch.float32)
    assert torch.equal(loaded.state_dict()[name], plain[name])


# ---- other kinds of experts


def test_experts_with_more_than_two_projections() -> None:
    class Module(torch.nn.Module):
        is_transposed = False

        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(2, 4, 4)))

    plain, normed = Module("up_proj", "down_proj"), Module("gate_up_proj", "down_proj")
    assert is_experts(plain) and not is_experts(Module("up_proj")) and not is_experts(torch.nn.Linear(4, 4))
    Form(plain, None).check("at")
    with pytest.raises(UnsupportedError, match="at has experts with gate_scale besides"):
        Form(Module("up_proj", "down_proj", "gate_scale"), None).check("at")
    normed.has_post_expert_norm = True  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="at has experts with a norm"):
        Form(normed, None).check("at")


def test_names(make: Make) -> None:
    """An expert's linears are named by transformers' module path, the expert's number and the checkpoint's name."""
    for kind, fused in (("mixtral", False), ("qwen3_moe", False), ("qwen3_moe", True), ("granitemoe", False)):
        skeleton = build_skeleton(open_checkpoint(make(kind, fused=True) if fused else make(kind)), torch.float32)
        mixture = MIXTURES[kind]
        assert fused or mixture.up != FUSED or kind == "granitemoe"
        for path, experts in skeleton.experts.items():
            for expert, (up, down) in enumerate(zip(experts.up, experts.down, strict=True)):
                assert ([*up], down) == names_of(path, expert, mixture, fused)
