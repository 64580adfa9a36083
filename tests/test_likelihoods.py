"""Log-likelihoods of requests: the whole model's in memory, request by request, from one layer at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import likelihoods, prune
from families import VOCAB, whole_class
from safetensors.torch import load_file, save_file
from stand_in import Card, plugged_in
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from streamprune.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from streamprune.evaluation import likelihoods as module
from streamprune.evaluation.likelihoods import Likelihoods
from streamprune.evaluation.requests import Request
from streamprune.model.budget import Layout
from streamprune.packing.job import pack
from streamprune.progress import Progress

Models = Callable[..., Path]
KINDS = [
    "llama", "gpt_neox", "gpt2", "opt", "bloom", "falcon", "gemma2", "mpt", "gpt_bigcode", "phi3", "gpt_neo", "mixtral",
    "lfm2", "qwen3_5_text", "falcon_h1",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Of all lengths: some that differ in their last token, or where they are cut, and one that is given twice."""
    draw = np.random.default_rng(5)
    found = []
    for length in (2, 3, 7, 8, 9, 12, 17, 23, 31, 40, 41, 55, 64, 65):
        ids = draw.integers(3, VOCAB, length).astype(np.uint32)
        found += [Request(ids, 1), Request(np.append(ids[:-1], np.uint32(7)), 1), Request(ids, (length + 1) // 2)]
        found.append(Request(ids[: max(2, length - 2)], 1))
    return [*found, found[5]]


def in_memory(folder: Path, kind: str, requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
    """One request at a time, without any padding, in float32."""
    model = whole_class(kind).from_pretrained(folder, dtype=torch.float32).eval()
    sums, greedy = [], []
    with torch.no_grad():
        for r in requests:
            ids = torch.from_numpy(r.ids.astype(np.int64))
            logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, -r.count :].double()
            p = logits.log_softmax(-1).gather(-1, ids[-r.count :, None])
            sums.append(float(p.sum()))
            greedy.append(bool((logits.argmax(-1) == ids[-r.count :]).all()))
    return np.array(sums), np.array(greedy)


def check(found: Likelihoods, wanted: tuple[np.ndarray, np.ndarray], rel: float = 1e-5) -> None:
    np.testing.assert_allclose(found.logprobs, wanted[0], rtol=rel, atol=rel)
    assert (found.greedy == wanted[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_the_whole_model(models: Models, requests: list[Request], tmp_path: Path, kind: str) -> None:
    """What fills up a row at its right changes nothing to the left, in attention, convolutions, scans and experts."""
    model = models(kind, layers=2, dtype="float32")
    found = likelihoods(model, requests, work=tmp_path)
    check(found, in_memory(model, kind, requests))
    assert found.greedy.sum() < len(requests) and found.truncated == 0
    assert found.sequences == 14 and found.tokens == sum((1, 2, 6, 7, 8, 11, 16, 22, 30, 39, 40, 54, 63, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def llama(models: Models, requests: list[Request]) -> tuple[Path, tuple[np.ndarray, np.ndarray]]:
    """A model in float32, and what it answers as a whole."""
    model = models("llama", layers=2, dtype="float32")
    return model, in_memory(model, "llama", requests)


Answered = tuple[Path, tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_many_batches(
    models: Models, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A sequence a batch; logits for three positions at a time; arguments of layers that are recorded every time."""
    model = models(kind, layers=2, dtype="float32")
    wanted = in_memory(model, kind, requests)
    shapes: list[int] = []
    answer = module._answer

    def watched(logits: torch.Tensor, *rest: Any) -> None:
        shapes.append(len(logits))
        answer(logits, *rest)

    monkeypatch.setattr(module, "_answer", watched)
    monkeypatch.setattr(module, "LOGITS_BYTES", {"cpu": 3 * 8 * VOCAB})
    monkeypatch.setattr("streamprune.model.calls.CALLS_BYTES", 0)
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", 64)
    check(likelihoods(model, requests, work=tmp_path), wanted)
    assert set(shapes[:-1]) == {3} and 1 <= shapes[-1] <= 3  # whole pieces, whatever a batch has of them


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_of_a_pruned_model_in_short_numbers(
    models: Models, requests: list[Request], text: Path, tmp_path: Path, dtype: str
) -> None:
    """Computed in float32, and kept in it between layers: nothing is rounded."""
    out = tmp_path / "out"
    prune(models("llama", layers=2, dtype=dtype), out, sparsity=0.5, calib=text, samples=4, seqlen=24)
    found = likelihoods(out, requests, work=tmp_path / "work", dtype="float32")
    check(found, in_memory(out, "llama", requests))
    rounded = likelihoods(out, requests, work=tmp_path / "work", dtype=dtype)
    np.testing.assert_allclose(rounded.logprobs, found.logprobs, rtol=3e-2, atol=3e-2)


def test_of_a_model_in_fp8(models: Models, requests: list[Request], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = models("llama", layers=2, dtype="float32")
    prune(source, out, method="hwpq", sparsity=0.5, calib=text, samples=4, seqlen=24)
    check(likelihoods(out, requests, work=tmp_path / "work", dtype="float32"), in_memory(out, "llama", requests))


def test_packed_models_are_refused(models: Models, requests: list[Request], text: Path, tmp_path: Path) -> None:
    prune(models("llama", layers=2), tmp_path / "out", pattern="2:4", method="magnitude")
    pack(tmp_path / "out", tmp_path / "packed")
    with pytest.raises(UnsupportedError, match="unpack"):
        likelihoods(tmp_path / "packed", requests, work=tmp_path / "work")


def test_another_model_beyond_a_border(models: Models, tmp_path: Path) -> None:
    """With longrope, 30 tokens are not made 32 where more than 30 turn another way; nor do 20 of them share a pass
    with 40 that begin alike."""
    source = Path(shutil.copytree(models("phi3", layers=2, dtype="float32"), tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    config["original_max_position_embeddings"] = 30
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 100.0, "factor": 2.0,
        "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    ids = np.random.default_rng(3).integers(3, VOCAB, 41).astype(np.uint32)
    few = [Request(ids, 5), Request(ids[:31], 5), Request(ids[:21], 5)]
    found = likelihoods(source, few, work=tmp_path / "work")
    check(found, in_memory(source, "phi3", few))
    assert found.sequences == 2
    long_only = likelihoods(source, few[:1], work=tmp_path / "work").logprobs
    config["rope_parameters"]["long_factor"] = [1.0] * 4
    (source / "config.json").write_text(json.dumps(config))
    assert abs(likelihoods(source, few[:1], work=tmp_path / "work").logprobs - long_only) > 1e-3


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_on_a_device(
    models: Models, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, resident: bool
) -> None:
    model = models(kind, layers=2, dtype="float32")
    layout = Layout(2, 2, resident, 0, group=2)
    monkeypatch.setattr(module, "layout_for", lambda *args, **more: layout)
    monkeypatch.setattr("streamprune.model.loader._PIECE_BYTES", 3000)
    with plugged_in(Card()) as card:
        found = likelihoods(model, requests, device="cuda:0", work=tmp_path, dtype="float32")
    assert not card.faults
    check(found, in_memory(model, kind, requests))


def test_memory_that_runs_out(
    llama: Answered, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer starts again with smaller parts; what was written before is not taken for its input."""
    forward = LlamaDecoderLayer.forward

    def scarce(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden_states) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(module, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    check(likelihoods(llama[0], requests, work=tmp_path), llama[1])


def test_limits_of_memory(
    llama: Answered, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little is refused with a value that works; a full disk before anything is computed."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 300 << 20)
    with pytest.raises(ResourceError, match=r"needs --max-ram \d+MiB") as caught:
        likelihoods(llama[0], requests, work=tmp_path, max_ram=1 << 20)
    least = int(re.findall(r"needs --max-ram (\d+)MiB", str(caught.value))[0]) << 20
    check(likelihoods(llama[0], requests, work=tmp_path, max_ram=least), llama[1])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(ResourceError, match="--work"):
        likelihoods(llama[0], requests, work=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind(llama: Answered, requests: list[Request], tmp_path: Path) -> None:
    """Nothing is ever to be seen, so there is nothing to be removed when it is interrupted."""
    steps: list[Progress] = []

    def look(step: Progress) -> None:
        steps.append(step)
        assert list((tmp_path / "work").iterdir()) == []
        if len(steps) == 6:
            raise KeyboardInterrupt

    likelihoods(llama[0], requests, work=tmp_path / "work", progress=look)
    assert [(s.name, s.done, s.total) for s in steps] == [
        ("embed", 1, 4), ("layer 0", 2, 4), ("layer 1", 3, 4), ("head", 4, 4),
    ]  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        likelihoods(llama[0], requests, work=tmp_path / "work", progress=look)
    assert list((tmp_path / "work").iterdir()) == []


def test_long_contexts_lose_their_beginning(llama: Answered, tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(3, VOCAB, 90).astype(np.uint32)
    found = likelihoods(llama[0], [Request(ids, 3), Request(ids[:40], 3)], work=tmp_path)
    assert found.truncated == 1
    check(found, in_memory(llama[0], "llama", [Request(ids[-65:], 3), Request(ids[:40], 3)]))
    shorter = likelihoods(llama[0], [Request(ids, 3), Request(ids[:40], 3)], work=tmp_path, seqlen=10)
    assert shorter.truncated == 2
    check(shorter, in_memory(llama[0], "llama", [Request(ids[-11:], 3), Request(ids[29:40], 3)]))


def test_refusals(llama: Answered, tmp_path: Path) -> None:
    ids = np.arange(3, 80, dtype=np.uint32)
    good = Request(ids[:9], 2)
    for wrong, why in [
        (Request(ids[:9], 0), "request 2 of 2 has nothing to predict"),
        (Request(ids[:2], 2), "request 2 of 2 has nothing before"),
        (Request(ids, 65), "predicts 65 tokens, more than the 64"),
        (Request(np.array([1, VOCAB], np.uint32), 1), f"token id {VOCAB}"),
    ]:
        with pytest.raises(UsageError, match=why):
            likelihoods(llama[0], [good, wrong], work=tmp_path / "work")
    for seqlen in (0, 65):
        with pytest.raises(UsageError, match="--seqlen"):
            likelihoods(llama[0], [good], work=tmp_path / "work", seqlen=seqlen)
    assert not (tmp_path / "work").exists()
    assert likelihoods(llama[0], [], work=tmp_path / "work").sequences == 0


def test_weights_that_are_not_finite(models: Models, tmp_path: Path) -> None:
    """Named before their layer is run."""
    source = Path(shutil.copytree(models("llama", layers=2, dtype="float32"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight is nan at \[3, 4\]"):
        likelihoods(source, [Request(np.arange(3, 9, dtype=np.uint32), 2)], work=tmp_path / "work")
