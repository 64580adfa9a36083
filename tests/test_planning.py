"""`plan`: what it says beforehand is what prune then does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamprune.disk import durable
from streamprune.errors import ResourceError, UnsupportedError, UsageError
from streamprune.job import prune
from streamprune.model import speeds as measuring
from streamprune.model.cost import Split
from streamprune.planning import Plan, plan
from streamprune.tables import plan_table, table

Models = Callable[..., Path]
KINDS = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "falcon"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """Two operations a weight and token, and causal attention: scores and values over half the window."""
    found = plan(models(), samples=10, seqlen=20)
    weights = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    attention = 2 * 2 * 20 / 2 * 32
    assert found.stages[1].flops == 10 * 20 * (2 * weights + attention)
    twice = plan(models(), samples=10, seqlen=20, propagate="pruned")  # but what the last layer makes is not needed
    assert [s.flops for s in twice.stages] == [s.flops * n for s, n in zip(found.stages, (0, 2, 2, 1, 0), strict=True)]
    assert plan(models(), samples=20, seqlen=20).flops == 2 * found.flops


def test_with_statistics(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pass none is planned for, and none is measured."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 400 << 20)
    without = plan(models())
    monkeypatch.setattr(measuring, "HollowLayer", None)
    monkeypatch.setattr(measuring, "_products", None)
    found = plan(models(), with_stats=True)
    assert found.flops == 0 and found.cache_bytes == 0
    assert found.disk_bytes == found.output_bytes + (64 << 20)
    assert found.peak_ram_bytes < without.peak_ram_bytes
    assert found.split.forward == found.split.statistics == 0 < found.split.selection
    assert without.split.forward > 0 and without.split.statistics > 0


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
    """Batch, dtype, output, the number of linears and the most that is ever in the cache."""
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
    """One byte less than planned is refused before anything is written, the planned amount is enough."""
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


def test_nothing_is_written(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(models(), tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    plan(source)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_refusals(models: Models) -> None:
    with pytest.raises(UnsupportedError, match="experts"):
        plan(models("mixtral"))
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
    from streamprune.planning import StagePlan

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
