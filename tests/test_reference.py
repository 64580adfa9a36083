"""The streamed result against the plainest thing that computes it: the whole model in memory (whole_model.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM
from whole_model import (
    BATCH,
    SEED,
    SEQLEN,
    Stats,
    check_linear,
    check_output,
    gather,
    in_memory,
    round_states,
    stored,
    stream,
    windows_of,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples in three batches, the last one smaller."""
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", BATCH * SEQLEN)


JOBS: list[dict[str, Any]] = [
    {"method": "swiftprune", "sparsity": 0.5, "score": "lscore", "selector": "ewma"},
    {"method": "swiftprune", "pattern": "2:4", "score": "lscore", "selector": "ewma"},
    {"method": "wanda", "sparsity": 0.7, "score": "wanda", "selector": "exact"},
    {"method": "wanda", "pattern": "4:8", "score": "wanda", "selector": "exact"},
    {"method": "magnitude", "sparsity": 0.3, "score": "magnitude", "selector": "exact"},
    {"method": "swiftprune", "sparsity": 0.61, "score": "lscore-isotropic", "selector": "exact"},
    {"method": "magnitude", "pattern": "1:4", "score": "magnitude", "selector": "exact"},
]


def named(job: dict[str, Any]) -> str:
    return f"{job['score']}-{job.get('pattern') or job['sparsity']}"


@pytest.fixture(scope="module")
def dense_stats(models: Callable[..., Path], text: Path) -> Callable[[str, str], Stats]:
    """Statistics of a model's dense forward pass, gathered once."""
    made: dict[tuple[str, str], Stats] = {}

    def get(kind: str, dtype: str) -> Stats:
        if (kind, dtype) not in made:
            model = in_memory(models(kind, dtype=dtype), kind)
            round_states(model, kind, getattr(torch, dtype))
            made[kind, dtype] = gather(model, kind, windows_of(models(kind, dtype=dtype), text))
        return made[kind, dtype]

    return get


@pytest.mark.parametrize("job", JOBS, ids=named)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_every_method(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, kind: str, job: Any
) -> None:
    source = models(kind, dtype="float32")
    result = stream(source, tmp_path / "out", text, job)
    assert result.report["resolved"]["batch"] == BATCH or job["score"] == "magnitude"
    check_output(source, tmp_path / "out", kind, dense_stats(kind, "float32"), job)


@pytest.mark.parametrize("job", JOBS[:4], ids=named)
def test_kernels_of_torch(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, job: Any
) -> None:
    """What runs on a GPU, on the CPU."""
    source = models("llama", dtype="float32")
    stream(source, tmp_path / "out", text, job, backend="torch")
    check_output(source, tmp_path / "out", "llama", dense_stats("llama", "float32"), job)


@pytest.mark.parametrize("job", JOBS[:2], ids=named)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "falcon"])
def test_stored_as_bfloat16(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, kind: str, job: Any
) -> None:
    """Linears stored in bf16 and computed in float32 go through in panels; hidden states are kept in bf16."""
    source = models(kind, dtype="bfloat16")
    stream(source, tmp_path / "out", text, job)
    check_output(source, tmp_path / "out", kind, dense_stats(kind, "bfloat16"), job)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_pruned_predecessors(models: Callable[..., Path], text: Path, tmp_path: Path, kind: str) -> None:
    """With propagate="pruned", layer i sees what the pruned layers before it make, itself still dense."""
    source, job = models(kind, dtype="float32"), {**JOBS[0], "sparsity": 0.6}
    stream(source, tmp_path / "out", text, job, propagate="pruned")
    windows = windows_of(source, text)
    sparse, mixed = in_memory(tmp_path / "out", kind), in_memory(source, kind)
    stats: Stats = {}
    for i, layer in enumerate(mixed.get_submodule(FAMILIES[kind].layers)):
        stats |= gather(mixed, kind, windows, only=f"{FAMILIES[kind].layers}.{i}.")
        layer.load_state_dict(sparse.get_submodule(FAMILIES[kind].layers)[i].state_dict())
    check_output(source, tmp_path / "out", kind, stats, job)
    stream(source, tmp_path / "dense", text, job)
    assert any(not torch.equal(t, stored(tmp_path / "dense")[n]) for n, t in stored(tmp_path / "out").items())


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are several EWMA blocks long, one of them not a whole number of blocks."""
    torch.manual_seed(4)
    config = AutoConfig.for_model(
        "llama", vocab_size=199, hidden_size=96, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.exp(torch.randn(parameter.shape[-1])) * (4 if parameter.dim() == 2 else 1))
    folder = tmp_path_factory.mktemp("wide") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_ewma_over_several_blocks(wide: Path, tmp_path: Path, sparsity: float) -> None:
    ids = np.random.default_rng(1).integers(0, 199, 4000)
    np.save(tmp_path / "ids.npy", ids)
    job = {**JOBS[0], "sparsity": sparsity}
    stream(wide, tmp_path / "out", tmp_path / "ids.npy", job)
    model = in_memory(wide)
    stats = gather(model, "llama", windows_of(wide, tmp_path / "ids.npy"))
    check_output(wide, tmp_path / "out", "llama", stats, job)
    exact = {**job, "selector": "exact"}
    with pytest.raises(AssertionError):  # the moving mean does choose differently
        check_output(wide, tmp_path / "out", "llama", stats, exact)


def test_nothing_to_prune(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    stream(models("llama"), tmp_path / "out", text, {**JOBS[0], "sparsity": 0.0})
    before, after = stored(models("llama")), stored(tmp_path / "out")
    assert all(torch.equal(t.view(torch.int16), after[n].view(torch.int16)) for n, t in before.items())


def test_filters(models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path) -> None:
    source = models("llama", dtype="float32")
    result = stream(source, tmp_path / "out", text, JOBS[0], only=r"mlp|self_attn\.v", skip=r"layers\.1\.|down")
    wanted = {f"model.layers.{i}.{n}" for i in (0, 2) for n in ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")}
    assert {n["name"] for n in result.report["linears"]} == wanted
    before, after = stored(source), stored(tmp_path / "out")
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in wanted:
            check_linear(tensor, after[name], dense_stats("llama", "float32")[module], JOBS[0])
        else:
            assert torch.equal(tensor, after[name])


def test_the_seed_decides(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """The comparison above would fail with other windows than those asked for."""
    source = models("llama", dtype="float32")
    stream(source, tmp_path / "out", text, JOBS[0])
    stats = gather(in_memory(source), "llama", windows_of(source, text, seed=SEED + 1))
    with pytest.raises(AssertionError):
        check_output(source, tmp_path / "out", "llama", stats, JOBS[0])
