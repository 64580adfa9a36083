"""The streamed result against the plainest thing that computes it: the whole model in memory, float64 scores.

The reference shares with the program the calibration windows, and nothing else. A float32 score can fall on
the other side of a tie: at most one weight in a thousand may differ, each within TIE of its row's threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from streamprune.job import JobResult, prune
from streamprune.kernels import EWMA_ALPHA
from streamprune.model.calibration import draw_windows
from streamprune.model.statistics import StatisticsFile

LAYERS = {
    "llama": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gemma2": "model.layers",
    "falcon": "transformer.h",
}
SAMPLES, SEQLEN, SEED, BATCH = 5, 24, 3, 2
TIE = 1e-5

Stats = dict[str, tuple[int, torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples in three batches, the last one smaller."""
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", BATCH * SEQLEN)


# ---- the reference


def linears_of(model: torch.nn.Module, kind: str) -> dict[str, torch.nn.Module]:
    layers = model.get_submodule(LAYERS[kind])
    return {
        f"{LAYERS[kind]}.{name}": module
        for name, module in layers.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """(out, in), whatever way the module stores it."""
    weight = module.weight.detach()
    assert isinstance(weight, torch.Tensor)
    return weight if isinstance(module, torch.nn.Linear) else weight.t()


def in_memory(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def windows_of(folder: Path, text: Path, seed: int = SEED) -> torch.Tensor:
    return torch.from_numpy(draw_windows(text, folder, 199, SAMPLES, SEQLEN, seed))


def round_states(model: torch.nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Between layers, hidden states are kept in the checkpoint's dtype."""

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].to(dtype).float()}
        return (args[0].to(dtype).float(), *args[1:]), kwargs

    for layer in model.get_submodule(LAYERS[kind]):
        layer.register_forward_pre_hook(before, with_kwargs=True)


def gather(model: torch.nn.Module, kind: str, windows: torch.Tensor, only: str = "") -> Stats:
    """Tokens, sums and sums of squares of each linear's input, in float64."""
    found: Stats = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().double().flatten(0, -2)
            tokens, total, squares = found.get(name, (0, torch.zeros(()), torch.zeros(())))
            found[name] = (tokens + len(x), total + x.sum(0), squares + (x * x).sum(0))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in linears_of(model, kind).items()
        if name.startswith(only)
    ]
    with torch.no_grad():
        for batch in windows.split(BATCH):
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def score_of(weight: torch.Tensor, stats: tuple[int, torch.Tensor, torch.Tensor], score: str) -> np.ndarray:
    w = weight.double().abs().numpy()
    a = (stats[2] / stats[0]).numpy()
    if score == "lscore":
        return w**2 * a / (1 - a / a.sum())
    if score == "lscore-isotropic":
        return w**2 / (1 - a / a.sum())
    return w * np.sqrt(a) if score == "wanda" else w


def keys_of(scores: np.ndarray, selector: str) -> np.ndarray:
    """What the selector orders the weights of a row by."""
    if selector == "exact":
        return scores
    return np.stack([references.ewma(row, min(32, len(row)), EWMA_ALPHA).z for row in scores])


def check_mask(pruned: np.ndarray, keys: np.ndarray, count: int) -> int:
    """Each row of `pruned` has `count` of its lowest keys, but for near-ties; returns how many weights differ."""
    assert (pruned.sum(1) == count).all()
    wanted = references.lowest(keys, count)
    rows, columns = np.nonzero(wanted != pruned)
    threshold = np.sort(keys, axis=1)[:, max(count - 1, 0)]
    assert (np.abs(keys[rows, columns] - threshold[rows]) <= TIE * np.maximum(1e-30, np.abs(threshold[rows]))).all()
    return len(rows)


def check_linear(
    before: torch.Tensor, after: torch.Tensor, stats: tuple[int, torch.Tensor, torch.Tensor], job: dict[str, Any]
) -> int:
    assert before.dtype == after.dtype
    assert bool((before != 0).all()), "a zero in the source would hide what was pruned"
    pruned = (after == 0).numpy()
    assert torch.equal(after[~(after == 0)], before[~(after == 0)])
    assert not bool(torch.signbit(after[after == 0]).any())
    width = before.shape[1]
    scores = score_of(before, stats, job["score"])
    if "pattern" in job:
        n, m = map(int, job["pattern"].split(":"))
        return check_mask(pruned.reshape(-1, m), scores.reshape(-1, m), m - n)
    return check_mask(pruned, keys_of(scores, job["selector"]), math.floor(job["sparsity"] * width + 1e-9))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def check_output(source: Path, out: Path, kind: str, stats: Stats, job: dict[str, Any]) -> None:
    before, after = stored(source), stored(out)
    assert list(before) and before.keys() == after.keys()
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    sparse = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    now, differ, weights, names = linears_of(sparse, kind), 0, 0, set()
    for name, module in linears_of(dense, kind).items():
        weight = weight_of(module)
        differ += check_linear(weight, weight_of(now[name]), stats[name], job)
        weights += weight.numel()
        names.add(f"{name}.weight")
    assert differ <= weights / 1000
    for name, tensor in dense.state_dict().items():
        if name not in names:
            assert torch.equal(tensor, sparse.state_dict()[name]), name
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert len(changed) == len(names)  # as stored, too, and nothing but the linears


# ---- the tests

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


def stream(source: Path, out: Path, text: Path, job: dict[str, Any], **more: Any) -> JobResult:
    given = {"calib": text, "samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "dtype": "float32"}
    result = prune(source, out, **given, **job, **more)
    if job["score"] != "magnitude":
        assert result.report["resolved"]["batch"] == BATCH
    return result


@pytest.fixture(scope="module")
def dense_stats(models: Callable[..., Path], text: Path) -> Callable[[str, str], Stats]:
    """Statistics of a model's dense forward pass, gathered once."""
    made: dict[tuple[str, str], Stats] = {}

    def get(kind: str, dtype: str) -> Stats:
        if (kind, dtype) not in made:
            model = in_memory(models(kind, dtype=dtype))
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
    stream(source, tmp_path / "out", text, job)
    check_output(source, tmp_path / "out", kind, dense_stats(kind, "float32"), job)


@pytest.mark.parametrize("job", JOBS[:4], ids=named)
def test_kernels_of_torch(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, job: Any
) -> None:
    """What runs on a GPU, on the CPU."""
    source = models("llama", dtype="float32")
    stream(source, tmp_path / "out", text, job, backend="torch")
    check_output(source, tmp_path / "out", "llama", dense_stats("llama", "float32"), job)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2", "bloom", "falcon"])
def test_every_architecture(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, kind: str
) -> None:
    source = models(kind, dtype="float32")
    stream(source, tmp_path / "out", text, JOBS[0])
    check_output(source, tmp_path / "out", kind, dense_stats(kind, "float32"), JOBS[0])


@pytest.mark.parametrize("job", JOBS[:2], ids=named)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "falcon"])
def test_stored_as_bfloat16(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, kind: str, job: Any
) -> None:
    """Linears stored in bf16 and computed in float32 go through in panels; hidden states are kept in bf16."""
    source = models(kind, dtype="bfloat16")
    stream(source, tmp_path / "out", text, job)
    check_output(source, tmp_path / "out", kind, dense_stats(kind, "bfloat16"), job)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "opt", "gemma2", "bloom", "falcon"])
def test_statistics(
    models: Callable[..., Path], text: Path, dense_stats: Callable[..., Stats], tmp_path: Path, kind: str
) -> None:
    stream(models(kind, dtype="float32"), tmp_path / "out", text, JOBS[0], save_stats=tmp_path / "s")
    file = StatisticsFile(tmp_path / "s")
    wanted = dense_stats(kind, "float32")
    assert file.groups.keys() == wanted.keys()
    for name, (tokens, total, squares) in wanted.items():
        found = file.load(name, len(total))
        assert found.tokens == tokens == SAMPLES * SEQLEN
        torch.testing.assert_close(found.sumsq, squares, rtol=1e-5, atol=1e-6 * float(squares.max()))
        spread = (squares * tokens).sqrt()
        assert bool(((found.sum - total).abs() <= 1e-5 * spread + 1e-6 * spread.max()).all())
        assert bool((squares > 0).any())


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_pruned_predecessors(models: Callable[..., Path], text: Path, tmp_path: Path, kind: str) -> None:
    """With propagate="pruned", layer i sees what the pruned layers before it make, itself still dense."""
    source, job = models(kind, dtype="float32"), {**JOBS[0], "sparsity": 0.6}
    stream(source, tmp_path / "out", text, job, propagate="pruned")
    windows = windows_of(source, text)
    sparse, mixed = in_memory(tmp_path / "out"), in_memory(source)
    stats: Stats = {}
    for i, layer in enumerate(mixed.get_submodule(LAYERS[kind])):
        stats |= gather(mixed, kind, windows, only=f"{LAYERS[kind]}.{i}.")
        layer.load_state_dict(sparse.get_submodule(LAYERS[kind])[i].state_dict())
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
