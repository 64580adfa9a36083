"""`plan`: its predictions are what `prune` then does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, plan, prune
from safetensors.torch import load_file, save_file

from streamprune.disk import durable
from streamprune.errors import ResourceError, StreampruneError, UnsupportedError, UsageError
from streamprune.model.budget import Layout, RefitNeeds, estimate
from streamprune.model.device import resolve_device
from streamprune.planning import speeds as measuring
from streamprune.planning.plan import Plan
from streamprune.planning.work import Speeds, Split
from streamprune.process import load
from streamprune.pruning.memory import layout_of, models_at_once, refit_needs
from streamprune.pruning.setup import Setup
from streamprune.tables import plan_table, table

Models = Callable[..., Path]
REFITS = ["obs-admm", "gradual-cg", "admm", "sparsegpt"]
EVEN = Speeds(
    products=1e9, float32=1e9, attention=1e9, elementwise=1e9, embedding=1e9, statistics=1e9, selection=1e9,
    scanning=1e9, hashing=1e9, reading=1e9, writing=1e9, link=1e9, loading=0.0,
)  # fmt: skip
"""A machine with the same speed for every kind of work."""
KINDS = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "falcon"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_exact(models: Models, kind: str) -> None:
    tensors = load_file(models(kind) / "model.safetensors")
    found = plan(models(kind), samples=4, seqlen=32)
    assert found.architecture == kind
    assert found.output_bytes == sum(t.nbytes for t in tensors.values()) == sum(s.nbytes for s in found.stages)
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert [s.name for s in found.stages] == ["embed", "layer 0", "layer 1", "layer 2", "head"]
    assert [s.linears for s in found.stages][1:-1] == [len(found_linears(kind))] * 3
    assert found.stages[0].linears == found.stages[-1].linears == 0
    assert found.cache_bytes == 2 * 4 * 32 * 32 * 2
    assert found.disk_bytes == found.output_bytes + found.cache_bytes + (64 << 20)
    assert found.flops == sum(s.flops for s in found.stages)
    assert found.seconds == pytest.approx(sum(s.seconds for s in found.stages)) and found.seconds > 0
    assert found.vram_bytes == 0 and found.device == "cpu" and "measured" in found.rests_on
    assert found.least_ram_bytes <= found.peak_ram_bytes


def found_linears(kind: str) -> set[str]:
    """The linears of one layer, by their names."""
    return {
        "llama": {"q", "k", "v", "o", "gate", "up", "down"},
        "gemma2": {"q", "k", "v", "o", "gate", "up", "down"},
        "opt": {"q", "k", "v", "out", "fc1", "fc2"},
    }.get(kind, {"qkv", "dense", "up", "down"})


def test_arithmetic(models: Models) -> None:
    """Two operations per weight and token, and causal attention: scores and values over half the window on average."""
    found = plan(models(), samples=10, seqlen=20)
    weights = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    attention = 2 * 2 * 20 / 2 * 32
    assert found.stages[1].flops == 10 * 20 * (2 * weights + attention)
    twice = plan(models(), samples=10, seqlen=20, propagate="pruned")  # but what the last layer makes is not needed
    assert [s.flops for s in twice.stages] == [s.flops * n for s, n in zip(found.stages, (0, 2, 2, 1, 0), strict=True)]
    assert plan(models(), samples=20, seqlen=20).flops == 2 * found.flops


@pytest.fixture(scope="module")
def stats(models: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A statistics file of the usual model."""
    return calibrate(models(), tmp_path_factory.mktemp("stats") / "stats", calib=text, samples=2, seqlen=16).out


def test_with_statistics(models: Models, stats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --stats, no forward pass is planned for, and none is measured."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)
    without = plan(models())
    monkeypatch.setattr(measuring, "BlankLayer", None)
    monkeypatch.setattr(measuring, "_products", None)
    found = plan(models(), stats=stats)
    assert found.flops == 0 and found.cache_bytes == 0
    assert found.disk_bytes == found.output_bytes + (64 << 20)
    assert found.peak_ram_bytes < without.peak_ram_bytes
    assert found.split.forward == found.split.statistics == 0 < found.split.selection
    assert without.split.forward > 0 and without.split.statistics > 0


def test_memory_without_torch(models: Models, stats: Path, tmp_path: Path) -> None:
    """Where `prune --stats` imports no torch, that is the memory to plan with: this process has far more, a new one
    accepts what is said to be the least."""
    plain, quantised = (plan(models(), stats=stats, **more) for more in ({}, {"quantize": "fp8"}))
    assert plain.peak_ram_bytes == plain.least_ram_bytes < 320 << 20 < quantised.peak_ram_bytes
    with pytest.raises(ResourceError, match="needs --max-ram"):
        plan(models(), stats=stats, max_ram=plain.least_ram_bytes - 1)
    assert plan(models(), stats=stats, max_ram=plain.least_ram_bytes).seconds > 0
    limit = f"{-(-plain.least_ram_bytes >> 20)}MiB"
    command = [sys.executable, "-m", "streamprune", "prune", str(models()), str(tmp_path / "out"), "--quiet"]
    subprocess.run([*command, "--sparsity", "0.5", "--stats", str(stats), "--max-ram", limit], check=True)


def test_mixed_dtypes(models: Models, tmp_path: Path) -> None:
    """Parameters are counted, not guessed from bytes."""
    source = Path(shutil.copytree(models(), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    mixed = {n: t.float() if "norm" in n or "layers.1" in n else t for n, t in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    assert plan(source).parameters == sum(t.numel() for t in tensors.values())


def test_filters(models: Models) -> None:
    assert [s.linears for s in plan(models(), only="mlp").stages] == [0, 3, 3, 3, 0]
    assert [s.linears for s in plan(models(), skip=r"layers\.1\.|down").stages] == [0, 6, 0, 6, 0]
    with pytest.raises(UsageError, match="--only"):
        plan(models(), only="nothing")
    with pytest.raises(UsageError, match="regular expression"):
        plan(models(), skip="(")


def test_prune_keeps_to_it(models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch, dtype, output size, number of linears, and peak size of the activation cache."""
    how: dict[str, Any] = {"samples": 7, "seqlen": 24}
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", 3 * 24)
    found = plan(models(), skip="down", **how)
    cached: list[int] = []
    write = durable.AtomicFile.commit

    def commit(self: durable.AtomicFile) -> None:
        write(self)
        cached.append(sum(p.stat().st_size for p in tmp_path.rglob("*.bin")))

    monkeypatch.setattr(durable.AtomicFile, "commit", commit)
    result = prune(models(), tmp_path / "out", sparsity=0.5, skip="down", calib=text, **how)
    assert found.batch == result.report["resolved"]["batch"] == 3
    assert found.dtype == result.report["resolved"]["dtype"]
    assert sum(s.linears for s in found.stages) == len(result.report["linears"])
    assert found.cache_bytes == max(cached)
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert found.output_bytes <= written <= found.output_bytes + (1 << 20)


def test_disk_that_prune_asks_for(models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--max-ram one byte below the planned minimum is refused before anything is written; the minimum is enough."""
    how: dict[str, Any] = {"samples": 7, "seqlen": 24}
    need = plan(models(), **how).disk_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ResourceError, match=r"free.*--work"):
        prune(models(), tmp_path / "out", sparsity=0.5, calib=text, **how)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    assert prune(models(), tmp_path / "out", sparsity=0.5, calib=text, **how).status == "done"


def test_the_least_memory_is_enough(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)
    how: dict[str, Any] = {"samples": 7, "seqlen": 24}
    least = plan(models(), **how).least_ram_bytes
    with pytest.raises(ResourceError):
        prune(models(), tmp_path / "out", sparsity=0.5, calib=text, max_ram=least - 1, **how)
    result = prune(models(), tmp_path / "out", sparsity=0.5, calib=text, max_ram=least, **how)
    assert result.report["resolved"]["batch"] == 1


@pytest.mark.parametrize("how", [{"method": name} for name in REFITS] + [{"method": "wanda", "refit": "cg"}], ids=str)
@pytest.mark.parametrize("more", [{}, {"only": "down"}, {"device": "meta"}], ids=str)
def test_memory_of_a_refit(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any],
    more: dict[str, Any],
) -> None:  # fmt: skip
    """The planned RAM or device memory is what a job estimates, read where it has just made its layout."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)

    def resolve(device: str) -> torch.device:
        return torch.device("meta") if device == "meta" else resolve_device(device)

    monkeypatch.setattr("streamprune.model.device.resolve_device", resolve)
    seen: list[tuple[Layout, RefitNeeds, int]] = []

    def stop(setup: Setup, resolved: Any, shape: tuple[int, int]) -> Layout:
        layout, needs = layout_of(setup, resolved, shape), refit_needs(setup)
        assert needs is not None
        on_device = setup.device.type != "cpu"
        budget = estimate(setup.skeleton, 24 * models_at_once(setup.propagate), setup.dtype, on_device=on_device)
        budget = budget if on_device else budget.refitting(needs, layout.room)
        seen.append((layout, needs, budget.peak(layout.batch)))
        raise ResourceError("seen enough")

    monkeypatch.setattr("streamprune.pruning.memory.layout_of", stop)
    both = {"samples": 7, "seqlen": 24, **how, **more}
    if "device" in more:  # so that all but the refit is as without one
        both["propagate"] = "pruned"
    with pytest.raises(ResourceError, match="seen enough"):
        prune(models(), tmp_path / "out", sparsity=0.5, calib=text, **both)
    found = plan(models(), speeds=EVEN, **both)
    plain = plan(models(), speeds=EVEN, **(both | {"method": "swiftprune", "refit": None}))
    [(layout, needs, peak)] = seen
    assert (found.peak_ram_bytes, found.vram_bytes, found.batch) == (peak, layout.nbytes, layout.batch)
    least = needs.least + needs.held + needs.working
    if "device" in more:
        assert found.vram_bytes - plain.vram_bytes == layout.room + needs.held + needs.working > 192 << 20
        assert found.least_vram_bytes - plain.least_vram_bytes == least
        assert found.peak_ram_bytes == plain.peak_ram_bytes
    else:
        assert found.peak_ram_bytes > plain.peak_ram_bytes + (128 << 20)
        assert plain.least_ram_bytes < found.least_ram_bytes <= found.peak_ram_bytes


@pytest.mark.parametrize(("working", "batch"), [(1 << 12, 1), (192 << 20, 7)], ids=["pass", "refit"])
def test_the_least_memory_is_enough_for_a_refit(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, working: int, batch: int
) -> None:
    """The peak is the larger of a batch and a refit; beside a refit's arrays, any batch of this text is small."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)
    monkeypatch.setattr("streamprune.pruning.refit.WORKING_BYTES", working)
    how: dict[str, Any] = {"samples": 7, "seqlen": 24, "refit": "cg", "only": "mlp", "propagate": "pruned"}
    least = plan(models(), **how).least_ram_bytes
    with pytest.raises(ResourceError):
        prune(models(), tmp_path / "out", sparsity=0.5, calib=text, max_ram=least - 1, **how)
    result = prune(models(), tmp_path / "out", sparsity=0.5, calib=text, max_ram=least, **how)
    assert result.report["resolved"]["batch"] == batch


def test_time_of_a_refit(models: Models) -> None:
    """More products take longer; products in bf16 use its speed; only layers with a refit take longer."""
    how: dict[str, Any] = {"samples": 16, "seqlen": 48, "dtype": "bfloat16", "speeds": EVEN, "propagate": "dense"}
    plain = plan(models(), **how)
    found = {name: plan(models(), **how, refit=name) for name in ("cg", *REFITS)}
    assert plain.split.refit == 0 and all(p.split.refit > 0 for p in found.values())
    for p in found.values():
        assert (p.split.forward, p.split.statistics) == (plain.split.forward, plain.split.statistics)
        assert (p.output_bytes, p.cache_bytes, p.flops) == (plain.output_bytes, plain.cache_bytes, plain.flops)
        assert p.seconds == pytest.approx(p.split.total) and p.seconds > plain.seconds
        assert p.stages[0] == plain.stages[0] and p.stages[-1] == plain.stages[-1]
    assert found["gradual-cg"].split.refit > 3 * found["cg"].split.refit
    assert found["admm"].split.refit > found["cg"].split.refit
    for name, matters in (("obs-admm", True), ("admm", False)):
        slow = plan(models(), **(how | {"speeds": replace(EVEN, products=1e8)}), refit=name)
        assert (slow.split.refit > 2 * found[name].split.refit) == matters
        slow = plan(models(), **(how | {"speeds": replace(EVEN, float32=1e8)}), refit=name)
        assert slow.split.refit > 1.5 * found[name].split.refit
    in_float32 = how | {"dtype": "float32", "speeds": replace(EVEN, products=1e8)}
    same = plan(models(), **(how | {"dtype": "float32"}), refit="obs-admm")
    assert plan(models(), **in_float32, refit="obs-admm").split.refit == pytest.approx(same.split.refit)
    some = plan(models(), **how, refit="cg", only=r"layers\.1\.")
    assert [s.seconds > p.seconds for s, p in zip(some.stages, plain.stages, strict=True)] == [False] * 2 + [
        True, False, False,
    ]  # fmt: skip
    assert "products of a refit in float32 1 GFLOP/s" in found["cg"].rests_on
    assert "refit 0." in plan_table(found["cg"]) and "refit" not in plan_table(plain)


@pytest.mark.parametrize("given", ["none", "pruned", "stats"])
def test_recipes_without_a_refit(models: Models, stats: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """Without a refit its speeds are not measured and do not matter; magnitude needs no pass."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)
    monkeypatch.setattr("streamprune.planning.refits.inputs_shared", None)
    more = {"none": {}, "pruned": {"propagate": "pruned"}, "stats": {"stats": stats}}[given]
    how: dict[str, Any] = {"samples": 8, "seqlen": 32, "speeds": EVEN, **more}
    plain = plan(models(), **how)
    assert plan(models(), method="wanda", **how) == plan(models(), method="admm", refit="none", **how) == plain
    if given == "pruned":
        with pytest.raises(UsageError, match="magnitude needs none"):
            plan(models(), method="magnitude", **how)
        return
    without = plan(models(), method="magnitude", **how)
    other = plain if more else plan(models(), **(how | {"stats": stats}))
    same = {"peak_ram_bytes": without.peak_ram_bytes, "least_ram_bytes": without.least_ram_bytes}
    assert without == replace(other, **(same if not more else {}))  # a statistics file says what torch would find out


def test_a_refit_cannot_do_with_statistics(models: Models, tmp_path: Path) -> None:
    """`plan` refuses what `prune` refuses, with the same message."""
    for how in ({"method": "obs-admm"}, {"refit": "cg"}, {"tune": "block"}):
        same_refusal(models(), tmp_path, stats=tmp_path / "stats", sparsity=0.5, **how)
    with pytest.raises(UsageError, match="--method"):
        plan(models(), method="nothing")
    with pytest.raises(UsageError, match="--refit"):
        plan(models(), refit="nothing")


def same_refusal(source: Path, tmp_path: Path, **job: Any) -> str:
    """The error message of `prune`, which `plan` must give as well."""
    with pytest.raises(StreampruneError) as pruned:
        prune(source, tmp_path / "out", **job)
    with pytest.raises(type(pruned.value)) as planned:
        plan(source, **job)
    assert str(planned.value) == str(pruned.value)
    assert not (tmp_path / "out").exists()
    return str(pruned.value)


@pytest.mark.parametrize(
    "job",
    [
        {"sparsity": 1.0}, {"pattern": "3:5"}, {"pattern": "0:4"}, {"pattern": "2:4", "allocate": "owl"},
        {"sparsity": 0.5, "propagate": "asymmetric"}, {"sparsity": 0.5, "calib": "nowhere.txt"},
        {"sparsity": 0.5, "stats": "nowhere"}, {"sparsity": 0.5, "tune": "block", "samples": 1},
        {"sparsity": 0.5, "backend": "numba", "device": "meta"}, {"sparsity": 0.5, "only": "nothing"},
    ],
    ids=str,
)  # fmt: skip
def test_what_prune_refuses(models: Models, tmp_path: Path, job: dict[str, Any]) -> None:
    assert same_refusal(models(), tmp_path, **job)


def test_a_statistics_file_is_looked_into(models: Models, text: Path, stats: Path, tmp_path: Path) -> None:
    other = calibrate(models("llama", 2), tmp_path / "other", calib=text, samples=2, seqlen=16).out
    assert "another model" in same_refusal(models(), tmp_path, sparsity=0.5, stats=other)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(stats.read_bytes()[:-40])
    assert str(damaged) in same_refusal(models(), tmp_path, sparsity=0.5, stats=damaged)


def test_sharing_a_sparsity_out_takes_time(models: Models, stats: Path) -> None:
    """--allocate runs the selection over all linears several times; with a refit, its statistics take an extra pass."""
    how: dict[str, Any] = {"sparsity": 0.5, "samples": 8, "seqlen": 32, "speeds": EVEN}
    plain, owl, error = (plan(models(), allocate=kind, **how).split for kind in ("uniform", "owl", "error"))
    assert plain.selection < owl.selection < error.selection and plain.disk < owl.disk == error.disk
    assert plain.forward == owl.forward
    given = plan(models(), stats=stats, allocate="error", **how).split
    assert given.forward == 0 and given.selection > plan(models(), stats=stats, **how).split.selection
    refit = {"refit": "cg", "propagate": "dense", **how}
    assert plan(models(), allocate="owl", **refit).split.forward > plan(models(), **refit).split.forward * 1.5


def test_the_memory_asked_for_is_kept_to(models: Models, tmp_path: Path) -> None:
    least = plan(models(), samples=4, seqlen=32, speeds=EVEN).least_ram_bytes + (1 << 20)
    assert plan(models(), samples=4, seqlen=32, max_ram=least, speeds=EVEN).peak_ram_bytes <= least
    assert "--max-ram" in same_refusal(models(), tmp_path, sparsity=0.5, samples=4, seqlen=32, max_ram="1MiB")


def test_memory_is_that_of_a_job_not_of_measuring(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine comes after the sum: what it leaves behind in this process does not count."""
    resident = [1 << 30]
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: resident[0])

    def measured(*args: object) -> Speeds:
        resident[0] += 1 << 30
        return EVEN

    monkeypatch.setattr("streamprune.planning.plan.measure", measured)
    assert (1 << 30) < plan(models(), samples=4, seqlen=32).peak_ram_bytes < (2 << 30)


def test_nothing_is_written(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(models(), tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    plan(source)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_refusals(models: Models) -> None:
    with pytest.raises(UnsupportedError, match="encoder"):
        plan(models("bart"))
    with pytest.raises(UsageError, match="--samples"):
        plan(models(), samples=0)
    with pytest.raises(UsageError, match="--seqlen"):
        plan(models(), seqlen=1)
    with pytest.raises(UsageError, match="--seqlen"):
        plan(models(), seqlen=65)


def test_json(models: Models) -> None:
    found = plan(models())
    values = json.loads(json.dumps(found.to_json()))
    assert values["stages"][1]["name"] == "layer 0"
    assert values["peak_ram_bytes"] == found.peak_ram_bytes


def test_vram_is_for_a_gpu(models: Models) -> None:
    with pytest.raises(UsageError, match="--max-vram"):
        plan(models(), max_vram=8 << 30)


def shown(**more: Any) -> str:
    from streamprune.planning.plan import StagePlan

    stages = (
        StagePlan("embed", 10 << 20, 0, 0, 0.1),
        *(StagePlan(f"layer {i}", 5 << 20, 7, 10**9, 0.2) for i in range(40)),
        StagePlan("layer 40", 6 << 20, 7, 10**9, 0.2),
        StagePlan("head", 3 << 20, 0, 0, 0.05),
    )
    plain = Plan(
        model="m", architecture="llama", parameters=10**9, stages=stages, peak_ram_bytes=1 << 30,
        least_ram_bytes=1 << 29, vram_bytes=0, least_vram_bytes=0, layout="",
        output_bytes=1 << 31, cache_bytes=1 << 20, disk_bytes=3 << 30,
        flops=10**12, seconds=5.0, split=Split(3.0, 0.25, 0.0, 1.75),
        batch=4, dtype="float32", device="cpu", rests_on="a guess",
    )  # fmt: skip
    return plan_table(replace(plain, **more))


def test_table() -> None:
    text = shown()
    assert "layer 0 … 39" in text and "layer 40" in text and "layer 5 " not in text
    assert "1000.0 M parameters" in text and "peak RAM    1 GiB" in text and "about 5.0 s" in text
    assert "about 5.0 s: forward 3.0 s, disk 1.8 s, statistics 0.2 s\n            (a guess)" in text
    on_gpu = shown(vram_bytes=2 << 30, least_vram_bytes=1 << 30, layout="3 layers at once")
    assert "VRAM" not in text and "peak VRAM   2 GiB (3 layers at once); least --max-vram 1 GiB\n" in on_gpu
    for seconds, words in ((30.2, "30 s"), (119.9, "120 s"), (600, "10 min"), (7300, "2 h 2 min")):
        assert f"about {words}: " in shown(seconds=seconds)


def test_columns() -> None:
    text = table(["name", "n"], [["a", "1"], ["long name", "1000"]])
    assert text.splitlines() == ["name          n", "---------  ----", "a             1", "long name  1000"]


def test_other_programs_make_it_a_range(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 s of all processors, 7 were used, 1 of them by this process: 0.6 by others."""
    monkeypatch.setattr(load, "_STAT", tmp_path / "stat")
    monkeypatch.setattr("streamprune.process.load.os.sysconf", lambda name: 100)
    times = iter([(1.0, 0.5, 0.0, 0.0, 0.0), (1.5, 1.0, 0.0, 0.0, 0.0)] * 2)
    monkeypatch.setattr("streamprune.process.load.os.times", lambda: next(times))

    def measured(*given: Any, **more: Any) -> Speeds:
        (tmp_path / "stat").write_text("cpu  600 0 150 400 200 0 10 40 25 0\ncpu0 1 1 1\n")
        return EVEN

    monkeypatch.setattr("streamprune.planning.plan.measure", measured)
    (tmp_path / "stat").write_text("cpu  100 0 0 200 100 0 0 0 0 0\ncpu0 1 1 1\n")
    found = plan(models(), samples=2, seqlen=16)
    assert found.busy == pytest.approx(0.6)
    assert found.to_json()["seconds_range"] == pytest.approx([0.4 * found.seconds, 1.6 * found.seconds])
    assert "as other programs took 60 % of the processors" in plan_table(found)
    assert "other programs" not in plan_table(replace(found, busy=0.05))
    (tmp_path / "stat").unlink()
    monkeypatch.setattr("streamprune.planning.plan.measure", lambda *given, **more: EVEN)
    unknown = plan(models(), samples=2, seqlen=16)
    assert unknown.busy is None and unknown.seconds_range == (unknown.seconds, unknown.seconds)
