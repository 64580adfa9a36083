"""The path of a GPU, on Torch's CPU device: weights sent ahead, resident states, pruning beside the next layer's pass.

What differs on a real GPU are streams and pinned memory (model/copies.py): for these see test_stand_in.py.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, evaluate, prune

from streamprune.disk import durable
from streamprune.disk.cache import CacheReader
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError, ResourceError, UsageError
from streamprune.model import budget, device, passes
from streamprune.model.activations import Activations
from streamprune.model.budget import Layout, device_layout
from streamprune.model.extra_memory import CONTEXT
from streamprune.model.loader import WeightLoader
from streamprune.model.pass_memory import memory_of
from streamprune.model.skeleton import build_skeleton
from streamprune.progress import Progress
from streamprune.pruning.job import JobResult

CPU = torch.device("cpu")
LAYOUTS = {
    "one layer": (1, False), "one ahead": (2, False), "resident": (2, True), "three": (3, True), "streamed": (3, False),
}  # fmt: skip

Models = Callable[..., Path]
Use = Callable[..., None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Makes jobs run as on a device, in a given layout."""

    def set_layout(layers: int, resident: bool, batch: int = 2) -> None:
        layout = Layout(batch, layers, resident, 0)
        monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
        monkeypatch.setattr("streamprune.evaluation.evaluate.layout_for", lambda *args, **more: layout)
        for place in ("model.loader", "pruning.forward", "evaluation.evaluate"):
            monkeypatch.setattr(f"streamprune.{place}.WeightLoader", functools.partial(WeightLoader, copies=True))

    yield set_layout
    names = [t.name for t in threading.enumerate()]
    assert not [n for n in names if n.startswith("streamprune-worker")], "a thread outlives its job"


def weights_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))}


def job(models: Models, text: Path, kind: str, out: Path, **more: Any) -> JobResult:
    given = {"calib": text, "samples": 5, "seqlen": 32, "pattern": "2:4", "backend": "torch"}
    return prune(models(kind), out, **{**given, **more})


# ---- the whole job


@pytest.mark.parametrize("layers_resident", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("how", [{}, {"propagate": "pruned"}, {"method": "magnitude"}], ids=["dense", "pruned", "none"])
def test_every_layout_gives_the_same_output(
    models: Models, text: Path, tmp_path: Path, use: Use, layers_resident: tuple[int, bool], how: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "BATCH_TOKENS", 64)  # batches of two windows, as below
        job(models, text, "llama", tmp_path / "plain", **how)
    use(*layers_resident)
    result = job(models, text, "llama", tmp_path / "out", **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert not (tmp_path / "out.partial").exists()
    assert [s["name"] for s in result.report["stages"]] == ["embed", "layer 0", "layer 1", "layer 2", "head"]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "falcon", "opt"])
def test_other_architectures(models: Models, text: Path, tmp_path: Path, use: Use, kind: str) -> None:
    """Transposed weights, tied and scaled embeddings, learned positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "BATCH_TOKENS", 64)
        job(models, text, kind, tmp_path / "plain")
        dense = evaluate(models(kind), text, seqlen=32, work=tmp_path)
    use(3, True)
    job(models, text, kind, tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert evaluate(models(kind), text, seqlen=32, work=tmp_path).nll == dense.nll


def test_statistics_are_the_same(models: Models, text: Path, tmp_path: Path, use: Use) -> None:
    given: dict[str, Any] = {"calib": text, "samples": 5, "seqlen": 32, "backend": "torch"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "BATCH_TOKENS", 64)
        calibrate(models(), tmp_path / "plain", **given)
    use(3, True)
    calibrate(models(), tmp_path / "stats", **given)
    assert (tmp_path / "stats").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("layers_resident", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["every cache is kept", "no cache is kept"])
def test_resumed_at_any_stage_in_any_layout(
    models: Models, text: Path, tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch,
    layers_resident: tuple[int, bool], at: int, seconds: float,
) -> None:  # fmt: skip
    monkeypatch.setattr("streamprune.pruning.forward.PERSIST_SECONDS", seconds)
    use(3, True)
    job(models, text, "llama", tmp_path / "whole")

    def stop(step: Progress) -> None:
        if step.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(models, text, "llama", tmp_path / "out", progress=stop)
    kept = sorted(p.name for p in (tmp_path / "out.partial/.streamprune/cache").glob("*.bin"))
    assert len(kept) <= (2 if seconds == 0.0 else 0)
    use(*layers_resident)
    job(models, text, "llama", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_bad_weights_are_named(models: Models, text: Path, tmp_path: Path, use: Use) -> None:
    from safetensors.torch import load_file, save_file

    model = models(layers=2)
    (shard,) = model.glob("*.safetensors")
    tensors = load_file(shard)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = float("inf")
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model.iterdir():
        if file != shard:
            (copy / file.name).write_bytes(file.read_bytes())
    save_file(tensors, copy / shard.name, metadata={"format": "pt"})
    use(3, True)
    with pytest.raises(CheckpointError, match=r"up_proj.weight is inf at \[3, 5\]"):
        prune(copy, tmp_path / "out", sparsity=0.5, calib=text, samples=4, seqlen=32, backend="torch")
    assert not (tmp_path / "out").exists()


# ---- running out of memory


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes a Llama's layers run out of memory for batches of more than `most` samples; lists the sizes they got."""

    def limit(most: int) -> list[int]:
        from transformers.models.llama.modeling_llama import LlamaMLP

        forward, seen = LlamaMLP.forward, list[int]()

        def failing(module: Any, x: torch.Tensor) -> Any:
            seen.append(len(x))
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return forward(module, x)

        monkeypatch.setattr(LlamaMLP, "forward", failing)
        return seen

    return limit


@pytest.mark.parametrize("how", [{}, {"propagate": "pruned"}], ids=["dense", "pruned"])
def test_out_of_memory_takes_smaller_batches(
    models: Models, text: Path, tmp_path: Path, use: Use, scarce: Callable[[int], list[int]], how: dict[str, Any]
) -> None:
    """Statistics count every token once, also after failed attempts, and the report has the reduced batch."""
    use(2, True, batch=4)
    plain = job(models, text, "llama", tmp_path / "plain", save_stats=tmp_path / "plain.stats", **how)
    assert "out_of_memory_batch" not in plain.report
    seen = scarce(1)
    result = job(models, text, "llama", tmp_path / "out", save_stats=tmp_path / "out.stats", **how)
    assert 4 in seen and 2 in seen and seen.count(1) >= 15
    assert seen.index(4) < seen.index(2) < seen.index(1) and 2 not in seen[seen.index(1) :]
    assert result.report["out_of_memory_batch"] == 1
    from safetensors.torch import load_file

    ours, wanted = load_file(tmp_path / "out.stats"), load_file(tmp_path / "plain.stats")
    assert ours.keys() == wanted.keys()
    for name, values in wanted.items():
        torch.testing.assert_close(ours[name], values, rtol=3e-2, atol=1e-3)
        if name.endswith("tokens"):
            assert int(ours[name]) == 5 * 32


def test_out_of_memory_on_the_cpu_is_noticed_as_well(models: Models, text: Path, tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
    assert passes.is_out_of_memory(error)
    assert not passes.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_not_even_one_sample(
    models: Models, text: Path, tmp_path: Path, use: Use, scarce: Callable[[int], list[int]]
) -> None:
    use(2, False)
    seen = scarce(0)
    with pytest.raises(ResourceError, match="single sample"):
        job(models, text, "llama", tmp_path / "out")
    assert seen == [2, 1]
    assert (tmp_path / "out.partial").is_dir(), "what is done is kept for a machine with more memory"
    with pytest.raises(ResourceError, match="single sample"):
        evaluate(models(), text, seqlen=32, work=tmp_path)


def test_a_resumed_run_does_not_try_the_large_batch_again(
    models: Models, text: Path, tmp_path: Path, use: Use, scarce: Callable[[int], list[int]]
) -> None:
    use(2, False, batch=4)

    def stop(step: Progress) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    seen = scarce(2)
    with pytest.raises(KeyboardInterrupt):
        job(models, text, "llama", tmp_path / "out", progress=stop)
    assert 4 in seen
    del seen[:]
    result = job(models, text, "llama", tmp_path / "out")
    assert set(seen) <= {1, 2}
    assert result.report["out_of_memory_batch"] == 2


# ---- weights on their way


def test_what_is_expected_arrives(models: Models) -> None:
    checkpoint = open_checkpoint(models())
    refs = list(checkpoint.tensors.values())
    with ShardMaps(checkpoint) as maps, WeightLoader(maps, CPU, copies=True) as loader:
        loader.expect(refs)
        loader.expect(refs[:3])
        for ref in reversed(refs):
            arrived = loader.tensor(ref)
            assert torch.equal(arrived, maps.tensor(ref))
            assert arrived.data_ptr() == loader.tensor(ref).data_ptr() != maps.tensor(ref).data_ptr()
        two = loader.rows(refs[0], 1, 3)
        assert torch.equal(two, maps.tensor(refs[0])[1:3])
        loader.release(refs)
        assert loader.tensor(refs[0]).data_ptr() != arrived.data_ptr()
        assert torch.equal(loader.rows(refs[0], 1, 3), two)


def test_many_pieces(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.loader._PIECE_BYTES", 100)
    checkpoint = open_checkpoint(models(dtype="float32"))
    refs = list(checkpoint.tensors.values())
    with ShardMaps(checkpoint) as maps, WeightLoader(maps, CPU, copies=True) as loader:
        loader.expect(refs)
        assert all(torch.equal(loader.tensor(ref), maps.tensor(ref)) for ref in refs)


def test_an_error_on_the_way_is_raised_where_the_tensor_is_used(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(models())
    first, second, *_ = checkpoint.tensors.values()
    with ShardMaps(checkpoint) as maps, WeightLoader(maps, CPU, copies=True) as loader:
        carry = WeightLoader._copy

        def failing(self: WeightLoader, ref: Any) -> Any:
            if ref is first:
                raise CheckpointError("gone")
            return carry(self, ref)

        monkeypatch.setattr(WeightLoader, "_copy", failing)
        loader.expect([first, second])
        with pytest.raises(CheckpointError, match="gone"):
            loader.tensor(first)
        assert torch.equal(loader.tensor(second), maps.tensor(second))
        assert torch.equal(loader.tensor(first), maps.tensor(first)), "it is tried again without haste"


def test_the_mapped_file_itself_on_the_cpu(models: Models) -> None:
    checkpoint = open_checkpoint(models())
    refs = list(checkpoint.tensors.values())
    with ShardMaps(checkpoint) as maps, WeightLoader(maps, CPU) as loader:
        loader.expect(refs)
        assert all(loader.tensor(ref).data_ptr() == maps.tensor(ref).data_ptr() for ref in refs)


# ---- states on their way


@pytest.mark.parametrize("resident", [False, True])
def test_states_come_back_as_they_were_rounded(tmp_path: Path, resident: bool) -> None:
    """Activations that stay on the device equal those that a resumed run reads from disk."""
    chunks = [torch.randn(n, 4, 8) for n in (3, 3, 1)]
    activations = Activations(tmp_path, torch.bfloat16, CPU, resident=resident)
    with activations.write(2) as put:
        for chunk in chunks:
            put(chunk)
    found = list(activations.read(2))
    assert [torch.equal(f, c.bfloat16()) for f, c in zip(found, chunks, strict=True)] == [True] * 3
    reader = CacheReader(tmp_path, 2)
    assert all(torch.equal(reader[i], f) for i, f in enumerate(found))


def test_resident_states_need_no_disk(tmp_path: Path) -> None:
    activations = Activations(tmp_path, torch.float32, CPU, resident=True)
    with activations.write(0, persist=False) as put:
        put(torch.ones(1, 2, 3))
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        (states,) = activations.read(0)
        assert torch.equal(states, torch.ones(1, 2, 3))


# ---- memory of a device


def skeleton(models: Models) -> Any:
    return build_skeleton(open_checkpoint(models()), torch.bfloat16)


def test_less_memory_gives_up_the_right_things_first(models: Models) -> None:
    model, dtype, device = skeleton(models), torch.bfloat16, torch.device("cuda")
    seqlen, samples = 32, 512

    def need(layers: int, resident: bool, batch: int) -> int:
        return memory_of(model, seqlen, samples, dtype, layers, resident, batch)

    def found(limit: int) -> tuple[int, bool, int]:
        layout = device_layout(model, seqlen, samples, dtype, device, limit)
        assert layout.nbytes <= limit
        return layout.layers, layout.resident, layout.batch

    assert found(1 << 40) == (3, True, 256)
    assert found(need(3, True, 100)) == (3, True, 100)
    assert found(need(3, True, 64) - 1)[:2] == (2, True)
    assert found(need(2, True, 64) - 1)[:2] == (2, False)
    assert found(need(2, False, 64) - 1)[:2] == (1, False)
    assert found(need(1, False, 1)) == (1, False, 1)
    with pytest.raises(ResourceError) as caught:
        found(need(1, False, 1) - 1)
    named = int(str(caught.value).rsplit("--max-vram ", 1)[1].removesuffix("MiB")) << 20
    assert found(named) == (1, False, device_layout(model, seqlen, samples, dtype, device, named).batch)


def test_memory_of_a_prune_without_a_pass(models: Models) -> None:
    model, dtype, device = skeleton(models), torch.bfloat16, torch.device("cuda")
    assert device_layout(model, 1, 0, dtype, device, 1 << 40).layers == 3
    with pytest.raises(ResourceError, match="--max-vram"):
        device_layout(model, 1, 0, dtype, device, 1 << 20)


def test_max_vram_needs_a_gpu(models: Models, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-vram is for a GPU"):
        prune(models(), tmp_path / "out", sparsity=0.5, calib=text, max_vram=1 << 30, device="cpu")
    with pytest.raises(UsageError, match="--max-vram is for a GPU"):
        evaluate(models(), text, seqlen=32, max_vram=1 << 30, device="cpu", work=tmp_path)
    assert not (tmp_path / "out.partial").exists()


def test_the_report_is_json(models: Models, text: Path, tmp_path: Path, use: Use) -> None:
    use(3, True)
    job(models, text, "llama", tmp_path / "out")
    assert json.loads((tmp_path / "out/streamprune.json").read_text())["resolved"]["batch"] == 2


# ---- what was wrong once


def test_running_out_of_memory_while_resuming_keeps_the_work(
    models: Models, text: Path, tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running out of memory while a layer's arguments are recorded is not reported as a fault of the model."""
    from transformers.models.llama.modeling_llama import LlamaModel

    def stop(step: Progress) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    def scarce(module: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    use(1, False)
    job(models, text, "llama", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        job(models, text, "llama", tmp_path / "out", progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr(LlamaModel, "forward", scarce)
        with pytest.raises(ResourceError):
            job(models, text, "llama", tmp_path / "out")
    assert len((tmp_path / "out.partial/.streamprune/journal").read_bytes().splitlines()) == 2
    job(models, text, "llama", tmp_path / "out")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("how", [{}, {"propagate": "pruned"}, {"method": "magnitude"}], ids=["dense", "pruned", "none"])
@pytest.mark.parametrize(("layers", "resident"), LAYOUTS.values(), ids=LAYOUTS)
def test_no_more_layers_are_held_than_the_layout_says(
    models: Models, text: Path, tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch,
    layers: int, resident: bool, how: dict[str, Any],
) -> None:  # fmt: skip
    """Also when the disk is slow to make a shard durable."""
    held: list[int] = []
    expect, fsync = WeightLoader.expect, durable.os.fsync

    def counting(self: WeightLoader, refs: Any) -> None:
        expect(self, refs)
        held.append(len({ref.name.split(".")[2] for ref in self._prefetched}))

    def slow(fd: int) -> None:
        time.sleep(0.005)
        fsync(fd)

    use(layers, resident)
    monkeypatch.setattr(WeightLoader, "expect", counting)
    monkeypatch.setattr(durable.os, "fsync", slow)
    job(models, text, "llama", tmp_path / "out", **how)
    assert held and max(held) <= max(layers, 1)


def test_weights_that_found_no_room_are_sent_again(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(models())
    (ref, *_) = checkpoint.tensors.values()

    def full(self: WeightLoader, ref: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(WeightLoader, "_copy", full)
    with ShardMaps(checkpoint) as maps, WeightLoader(maps, CPU, copies=True) as loader:
        loader.expect([ref])
        assert torch.equal(loader.tensor(ref), maps.tensor(ref))


def test_pruning_in_halves_where_temporaries_do_not_fit(
    models: Models, text: Path, tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.pruning.target import Target

    use(2, True)
    job(models, text, "llama", tmp_path / "whole")
    select, seen = Target.select, list[int]()

    def scarce(self: Target, name: str, weight: torch.Tensor, *args: Any) -> Any:
        seen.append(len(weight))
        if len(weight) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return select(self, name, weight, *args)

    monkeypatch.setattr(Target, "select", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    job(models, text, "llama", tmp_path / "out")
    assert max(seen) > 10 >= min(seen)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_the_allocator_is_told_the_limit_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses torch.device("cuda") without an index; and None ends a limit that an earlier job set."""
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (6 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, index: told.append((share, index)))
    device.limit_memory((4 << 30) + CONTEXT, torch.device("cuda"))
    device.limit_memory(None, torch.device("cuda", 2))
    device.limit_memory(1 << 20, CPU)
    assert told == [(0.5, 1), (1.0, 2)]


def test_the_head_counts_where_it_is_used(models: Models) -> None:
    model, dtype = skeleton(models), torch.bfloat16
    table = max(t.nbytes for t in model.stages[0].tensors)
    layer = max(s.nbytes for s in model.layer_stages)
    without, with_head = (memory_of(model, 32, 4, dtype, 1, False, 1, head=head) for head in (False, True))
    assert with_head - without == max(0, table - layer)
