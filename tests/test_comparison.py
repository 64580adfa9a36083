"""`evaluate` with a reference: KL and agreement of two whole models in memory, from one layer of either at a time."""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, prune
from conftest import save_tokenizer, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from streamprune.cli import main
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from streamprune.evaluation import evaluate as evaluation
from streamprune.evaluation import two_models as comparison
from streamprune.evaluation.result import Evaluation
from streamprune.evaluation.two_models import Subject, divergence, fit_two, predictions, ram_of_two
from streamprune.model.budget import RESERVE, Layout, estimate
from streamprune.model.extra_memory import CONTEXT
from streamprune.model.loader import WeightLoader
from streamprune.model.pass_memory import memory_of
from streamprune.model.skeleton import build_skeleton
from streamprune.progress import Progress

N = 24
WINDOWS = 11
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    return np.random.default_rng(11).integers(0, 199, WINDOWS * N + 5)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, words: np.ndarray) -> Path:
    """A text of eleven windows and a rest."""
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in np.array_split(words, 20)))
    return path


def perturbed(source: Path, folder: Path, scale: float = 0.3, seed: int = 5) -> Path:
    """A copy of a model with noise on every weight, in the scale of each."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, t in tensors.items():
        tensors[name] = t + scale * t.float().std(correction=0) * torch.randn(t.shape, generator=generator).to(t.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def noisy(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return perturbed(models("llama", dtype="float32"), tmp_path_factory.mktemp("noisy") / "model")


def small_model(folder: Path, kind: str = "llama", **config: Any) -> Path:
    """Another model of the same tokenizer."""
    torch.manual_seed(3)
    made = tiny_config(kind)
    for name, value in config.items():
        setattr(made, name, value)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def log_p(folder: Path, words: np.ndarray) -> Tensor:
    """(windows, N − 1, vocab) float64, the whole model in memory, computed in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.from_numpy(words[: WINDOWS * N].reshape(WINDOWS, N))
    with torch.no_grad():
        return torch.cat([model(input_ids=w[None], use_cache=False).logits[:, :-1].log_softmax(-1) for w in ids])


def expected(dense: Path, model: Path, words: np.ndarray) -> dict[str, float]:
    """What evaluate should find, in float64 and in the plainest way."""
    p, q = log_p(dense, words), log_p(model, words)
    next_ones = torch.from_numpy(words[: WINDOWS * N].reshape(WINDOWS, N)[:, 1:])
    each = [math.fsum(float(v) for v in (a.exp() * (a - b)).sum(-1)) / (N - 1) for a, b in zip(p, q, strict=True)]
    mean = math.fsum(each) / WINDOWS
    spread = math.fsum((e - mean) ** 2 for e in each) / (WINDOWS - 1)
    losses = [-float(m.gather(-1, next_ones[..., None]).mean()) for m in (q, p)]
    return {
        "kl": mean,
        "kl_stderr": math.sqrt(spread / WINDOWS),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "perplexity": math.exp(losses[0]),
        "reference_perplexity": math.exp(losses[1]),
    }


def assert_found(found: Evaluation, want: dict[str, float], rel: float = 2e-5) -> None:
    for name, value in want.items():
        assert getattr(found, name) == pytest.approx(value, rel=rel), name


# ---- what is measured


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "falcon"])
def test_equals_whole_models(models: Models, short: Path, words: np.ndarray, tmp_path: Path, kind: str) -> None:
    dense = models(kind, dtype="float32")
    model = perturbed(dense, tmp_path / "model")
    want = expected(dense, model, words)
    assert want["kl"] > 0.01 and want["kl_stderr"] > 1e-4 and 0.02 < want["top1_agreement"] < 0.98
    found = evaluate(model, short, reference=dense, seqlen=N, work=tmp_path / "work")
    assert_found(found, want)
    assert (found.tokens, found.windows, found.seqlen) == (WINDOWS * (N - 1), WINDOWS, N)
    alone = evaluate(model, short, seqlen=N, work=tmp_path / "work")
    assert alone.nll == pytest.approx(found.nll, rel=1e-6)
    assert alone.window_nll == pytest.approx(found.window_nll, rel=1e-6) and len(found.window_nll) == WINDOWS
    assert (alone.kl, alone.kl_stderr, alone.top1_agreement, alone.reference_perplexity) == (None,) * 4


def test_the_divergence_has_a_direction(models: Models, noisy: Path, short: Path, tmp_path: Path) -> None:
    dense = models("llama", dtype="float32")
    there = evaluate(noisy, short, reference=dense, seqlen=N, work=tmp_path)
    back = evaluate(dense, short, reference=noisy, seqlen=N, work=tmp_path)
    assert there.kl is not None and back.kl is not None and abs(there.kl - back.kl) > 1e-3
    assert there.top1_agreement == back.top1_agreement
    assert (there.perplexity, there.reference_perplexity) == pytest.approx(
        (back.reference_perplexity, back.perplexity), rel=1e-6
    )


@pytest.mark.parametrize("kind", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_model_with_itself(models: Models, short: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    model = models(kind, dtype=dtype)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    for reference in (model, copy):
        found = evaluate(model, short, reference=reference, seqlen=N, work=tmp_path / "work", dtype=dtype)
        assert (found.kl, found.kl_stderr, found.top1_agreement) == (0.0, 0.0, 1.0)
        assert found.reference_perplexity == found.perplexity


def test_of_a_pruned_model(models: Models, short: Path, words: np.ndarray, tmp_path: Path) -> None:
    dense = models("llama", dtype="float32")
    kls = []
    for sparsity in (0.2, 0.7):
        out = tmp_path / str(sparsity)
        prune(dense, out, sparsity=sparsity, calib=short, samples=4, seqlen=N)
        found = evaluate(out, short, reference=dense, seqlen=N, work=tmp_path / "work")
        assert_found(found, expected(dense, out, words))
        kls.append(found.kl)
    assert 0 < kls[0] < kls[1]  # type: ignore[operator]


@pytest.mark.parametrize(
    "other", [("llama", {"hidden_size": 48, "num_hidden_layers": 2}), ("gpt2", {}), ("falcon", {})], ids=str
)
def test_another_architecture(models: Models, short: Path, words: np.ndarray, tmp_path: Path, other: Any) -> None:
    """Other layers, heads and hidden sizes, the same tokenizer."""
    model, dense = models("llama", dtype="float32"), small_model(tmp_path / "dense", other[0], **other[1])
    found = evaluate(model, short, reference=dense, seqlen=N, work=tmp_path / "work")
    assert_found(found, expected(dense, model, words))


def test_each_in_its_own_dtype(models: Models, short: Path, words: np.ndarray, tmp_path: Path) -> None:
    """A bfloat16 model against a float32 one: states are kept in either's dtype."""
    model, dense = perturbed(models("llama"), tmp_path / "model"), models("llama", dtype="float32")
    found = evaluate(model, short, reference=dense, seqlen=N, work=tmp_path / "work", dtype="float32")
    want = expected(dense, model, words)
    assert found.reference_perplexity == pytest.approx(want["reference_perplexity"], rel=1e-5)
    assert found.perplexity == pytest.approx(want["perplexity"], rel=1e-2)
    assert found.kl == pytest.approx(want["kl"], rel=0.05)


def test_one_prediction(models: Models, noisy: Path, tmp_path: Path) -> None:
    """Nothing is known of the error of a single window."""
    np.save(tmp_path / "two.npy", np.array([5, 77]))
    found = evaluate(noisy, tmp_path / "two.npy", reference=models("llama", dtype="float32"), seqlen=2, work=tmp_path)
    assert found.kl is not None and found.kl > 0 and found.kl_stderr is None
    assert found.top1_agreement in (0.0, 1.0)


# ---- arithmetic


def test_divergence_of_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, logits = (3 * torch.randn(37, 501, generator=generator) for _ in range(2))
    (p, top_p), (q, top_q) = predictions(dense), predictions(logits)
    kept = p.clone(), q.clone()
    a, b = dense.double().log_softmax(-1), logits.double().log_softmax(-1)
    found = divergence(p, q)
    assert found.dtype == torch.float64 and found.shape == (37,)
    torch.testing.assert_close(found, (a.exp() * (a - b)).sum(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(p, kept[0]) and torch.equal(q, kept[1]), "the caller's arrays are never changed"
    assert torch.equal(top_p, dense.argmax(-1)) and torch.equal(top_q, logits.argmax(-1))
    assert (divergence(p, p) == 0).all()


def test_tokens_that_cannot_come() -> None:
    """A logit of −inf in the reference adds nothing; in the model alone it is an infinite divergence."""
    dense = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    both, other = torch.tensor([[1.0, 0.0, -torch.inf, 2.0]]), torch.tensor([[1.0, -torch.inf, 0.0, 0.0]])
    p = dense.double().softmax(-1)[0, :2]
    want = (p * (p.log() - both.double().log_softmax(-1)[0, :2])).sum()
    assert float(divergence(predictions(dense)[0], predictions(both)[0])) == pytest.approx(float(want), rel=1e-6)
    assert float(divergence(predictions(dense)[0], predictions(other)[0])) == math.inf


def test_low_precision_logits_become_float32() -> None:
    log, top = predictions(torch.tensor([[1.0, 3.0, 3.0, 2.0]], dtype=torch.bfloat16))
    assert log.dtype == torch.float32 and int(top) == 1
    assert float(log.exp().sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("positions", [1, 5, 10**6])
def test_logits_in_pieces(
    models: Models, noisy: Path, short: Path, words: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    positions: int,
) -> None:  # fmt: skip
    shapes: list[int] = []
    made = comparison.predictions

    def watched(logits: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(len(logits))
        return made(logits)

    monkeypatch.setattr(comparison, "predictions", watched)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", {"cpu": positions * comparison.POSITION_BYTES * 199})
    dense = models("llama", dtype="float32")
    assert_found(evaluate(noisy, short, reference=dense, seqlen=N, work=tmp_path), expected(dense, noisy, words))
    assert max(shapes) == min(positions, N) and sum(shapes) == 2 * WINDOWS * (N - 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_batches(
    models: Models, noisy: Path, short: Path, words: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:  # fmt: skip
    monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", batch * N)
    dense = models("llama", dtype="float32")
    assert_found(evaluate(noisy, short, reference=dense, seqlen=N, work=tmp_path), expected(dense, noisy, words))


# ---- what is refused


def test_refusals(models: Models, short: Path, tmp_path: Path) -> None:
    model, work = models("llama"), tmp_path / "work"

    def refused(error: type[Exception], match: str, reference: Path, **more: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            evaluate(model, more.pop("text", short), reference=reference, work=work, **{"seqlen": N, **more})
        assert len(str(caught.value).splitlines()) == 1 and str(reference) in str(caught.value)
        assert not work.exists() or not list(work.iterdir())

    wide = small_model(tmp_path / "wide", vocab_size=203)
    refused(UsageError, "vocabulary has 203 tokens, the model's has 199", wide)

    other = Path(shutil.copytree(model, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    names = tokenizer["model"]["vocab"]
    names["w7"], names["w8"] = names["w8"], names["w7"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(UsageError, "other tokens", other)
    tokenizer["pre_tokenizer"] = None  # the whole text is one unknown word
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(UsageError, "other tokens", other)

    near = small_model(tmp_path / "near", max_position_embeddings=16)
    refused(UsageError, "context of 16 tokens.*smaller --seqlen", near)
    refused(UsageError, "--seqlen 64 .*context of 16 tokens", near, seqlen=None)

    packed = Path(shutil.copytree(model, tmp_path / "packed"))
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refused(UnsupportedError, "gptq", packed)
    refused(CheckpointError, "nowhere", tmp_path / "nowhere")


def test_token_ids_need_no_tokenizer(models: Models, noisy: Path, words: np.ndarray, tmp_path: Path) -> None:
    dense = models("llama", dtype="float32")
    copies = []
    for source in (dense, noisy):
        copies.append(Path(shutil.copytree(source, tmp_path / f"copy {len(copies)}")))
        for file in copies[-1].glob("tokenizer*"):
            file.unlink()
    np.save(tmp_path / "ids.npy", words)
    found = evaluate(copies[1], tmp_path / "ids.npy", reference=copies[0], seqlen=N, work=tmp_path / "work")
    assert_found(found, expected(dense, noisy, words))


def test_a_reference_that_is_damaged(models: Models, noisy: Path, short: Path, tmp_path: Path) -> None:
    """Whose fault it is, is said: NaN in a weight, and predictions that overflow."""
    dense = Path(shutil.copytree(models("llama", dtype="float16"), tmp_path / "dense"))
    whole = load_file(dense / "model.safetensors")
    save_file(
        whole | {"lm_head.weight": whole["lm_head.weight"] * torch.nan}, dense / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match=r"the reference's model\.safetensors: tensor lm_head\.weight is nan"):
        evaluate(noisy, short, reference=dense, seqlen=N, work=tmp_path / "work")
    whole["model.layers.0.mlp.down_proj.weight"] *= 16384.0
    whole["model.layers.0.mlp.up_proj.weight"] *= 1024.0
    save_file(whole, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{re.escape(str(dense))}: .*--dtype float32"):
        evaluate(noisy, short, reference=dense, seqlen=N, work=tmp_path / "work", dtype="float16")
    assert list((tmp_path / "work").iterdir()) == []


# ---- disk, memory, progress


def test_progress_and_caches(models: Models, short: Path, tmp_path: Path) -> None:
    """Both models' stages are told; beside the one at work only the reference's last states are on disk."""
    model, dense, work = models("llama"), models("gpt2", layers=2), tmp_path / "work"
    steps: list[Progress] = []
    caches: list[set[str]] = []

    def look(step: Progress) -> None:
        steps.append(step)
        found = [p.relative_to(next(work.glob("eval-*[!k]"))) for p in work.rglob("*.bin")]
        caches.append({str(p) for p in found})

    evaluate(model, short, reference=dense, seqlen=N, work=work, progress=look)
    names = ["reference embed", "reference layer 0", "reference layer 1", "embed", *(f"layer {i}" for i in range(3))]
    assert [(s.name, s.done, s.total) for s in steps] == [(n, i, 8) for i, n in enumerate([*names, "heads"], 1)]
    last = "reference/0002.bin"
    assert caches[:3] == [{"reference/0000.bin"}, {"reference/0001.bin"}, {last}]
    assert caches[3:] == [{last, f"000{i}.bin"} for i in (0, 1, 2, 3, 3)]
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("at", [1, 4, 5, 9])
def test_interrupted(models: Models, short: Path, tmp_path: Path, at: int) -> None:
    def stop(step: Progress) -> None:
        if step.done == at:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        evaluate(models("llama"), short, reference=models("llama"), seqlen=N, work=tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == before


@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 128)], ids=str)
def test_disk_for_both_caches(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """Twice the first model's states, or once and twice the second's; a byte less is refused before anything runs."""
    dense, model = (small_model(tmp_path / f"{i}", hidden_size=h) for i, h in enumerate(shape))
    first, second = (WINDOWS * N * h * 4 for h in shape)
    need = max(2 * first, first + 2 * second) + (64 << 20)
    steps: list[Progress] = []
    usage = shutil.disk_usage(tmp_path)
    run = functools.partial(evaluate, model, short, reference=dense, seqlen=N, work=tmp_path / "work")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ResourceError, match="--work"):
        run(progress=steps.append)
    assert not steps and list((tmp_path / "work").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    assert run().kl is not None


def subject(folder: Path) -> Subject:
    return Subject(build_skeleton(open_checkpoint(folder), torch.float32), torch.float32)


def test_ram_holds_both_heads(models: Models, tmp_path: Path) -> None:
    """The larger layer, or both heads' matrices, whichever is more."""
    small, deep = subject(models("llama", dtype="float32")), subject(small_model(tmp_path / "a", intermediate_size=999))
    heads = 2 * (199 * 32 * 4) + 2 * 32 * 4  # and the final norms
    largest = max(s.nbytes for s in small.skeleton.stages)
    assert heads > largest
    two = ram_of_two(small, small, N, on_device=False, base=1000)
    assert (two.base, two.reserve, two.stage) == (1000, RESERVE, heads)
    assert two.per_sample == estimate(small.skeleton, N, torch.float32).per_sample
    layer = max(s.nbytes for s in deep.skeleton.stages)
    assert layer > heads
    for pair in ((small, deep), (deep, small)):
        two = ram_of_two(*pair, N, on_device=False, base=1000)
        assert (two.stage, two.per_sample) == (layer, estimate(deep.skeleton, N, torch.float32).per_sample)
    chunks = ram_of_two(small, deep, N, on_device=True, base=1000)
    assert chunks.per_sample == 2 * 3 * N * 32 * 4


def test_max_ram(models: Models, noisy: Path, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little is refused with a value that works, and it works."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 300 << 20)
    run = functools.partial(evaluate, noisy, short, reference=models("llama", dtype="float32"), seqlen=N, work=tmp_path)
    with pytest.raises(ResourceError, match=r"needs --max-ram \d+MiB") as caught:
        run(max_ram=1 << 20)
    least = int(re.findall(r"needs --max-ram (\d+)MiB", str(caught.value))[0]) << 20
    with pytest.raises(ResourceError):
        run(max_ram=least - (3 << 20))
    assert run(max_ram=least).kl == pytest.approx(run().kl, rel=1e-4)
    with pytest.raises(UsageError, match="--max-vram"):
        run(max_vram=1 << 30, device="cpu")


@pytest.mark.parametrize("logits", [1 << 20, 1 << 30])
def test_every_layout_fits(models: Models, tmp_path: Path, logits: int) -> None:
    """From the least memory on, what is laid out stays within the limit: either model's layers, and both heads."""
    pair = (subject(models("llama", dtype="float32")), subject(small_model(tmp_path / "m", hidden_size=64)))
    samples, seqlen = 20000, 64
    whole = [s.state_bytes(samples, seqlen) for s in pair]
    with pytest.raises(ResourceError, match=r"needs --max-vram \d+MiB") as caught:
        fit_two(*pair, seqlen, samples, CUDA, 1 << 20, logits)
    least = int(re.findall(r"needs --max-vram (\d+)MiB", str(caught.value))[0]) << 20
    with pytest.raises(ResourceError):
        fit_two(*pair, seqlen, samples, CUDA, least - (2 << 20), logits)
    seen = set()
    for limit in [*range(least, least + (64 << 20), 1 << 20), *range(least, least + (3 << 30), 16 << 20)]:
        *layouts, keep = fit_two(*pair, seqlen, samples, CUDA, limit, logits)
        assert layouts[0].batch == layouts[1].batch >= 1
        stays = [size if one.resident and keep else 0 for size, one in zip(whole, layouts, strict=True)]
        for s, one, beside in zip(pair, layouts, (0, stays[0]), strict=True):
            peak = memory_of(s.skeleton, seqlen, samples, s.dtype, one.layers, one.resident, one.batch)
            assert peak + beside <= limit
        in_flight = sum(4 * s.state_bytes(layouts[0].batch, seqlen) for s in pair)
        assert CONTEXT + logits + sum(s.head_bytes for s in pair) + in_flight + sum(stays) <= limit
        seen.add((layouts[0].resident, layouts[1].resident, keep))
    if logits == 1 << 20:  # layers are what counts
        assert {(False, False), (True, True)} <= {s[:2] for s in seen}
    else:
        assert {s[2] for s in seen} == {True, False}


def test_more_memory_keeps_all(models: Models) -> None:
    one = subject(models("llama", dtype="float32"))
    first, second, keep = fit_two(one, one, N, 100, CUDA, 64 << 30, 1 << 20)
    assert first.resident and second.resident and keep
    first, second, keep = fit_two(one, one, N, 100, torch.device("meta"), None, 1 << 20)
    assert not (first.resident or second.resident or keep), "where nothing is known of the device"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("resident", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_path_of_a_device(
    models: Models, noisy: Path, short: Path, words: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    keep: bool, resident: tuple[bool, bool], layers: int,
) -> None:  # fmt: skip
    """Every layout finds the same; on disk is what does not stay on the device, and the check counts just that."""
    layouts = [Layout(2, layers, r, 0) for r in resident]
    monkeypatch.setattr("streamprune.evaluation.evaluate.lay_out_two", lambda *args: (*layouts, keep))
    monkeypatch.setattr("streamprune.evaluation.evaluate.WeightLoader", functools.partial(WeightLoader, copies=True))
    size, most = WINDOWS * N * 32 * 4, 0
    before = threading.active_count()

    def look(step: Progress) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_size for p in tmp_path.rglob("*.bin")))

    dense = models("llama", dtype="float32")
    found = evaluate(noisy, short, reference=dense, seqlen=N, work=tmp_path, progress=look)
    assert_found(found, expected(dense, noisy, words))
    on_disk = [not (r and keep) for r in resident]
    assert most == sum(on_disk) * size
    assert threading.active_count() == before


# ---- the command


def test_command(
    models: Models, noisy: Path, short: Path, words: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = models("llama", dtype="float32")
    args = ["eval", str(noisy), "--text", str(short), "--seqlen", str(N), "--work", str(tmp_path)]
    want = expected(dense, noisy, words)
    capsys.readouterr()
    assert main([*args, "--reference", str(dense)]) == 0
    shown = capsys.readouterr()
    assert [line.split()[1] for line in shown.err.splitlines()[:-2]] == [f"{i}/9" for i in range(1, 10)]
    first, second = shown.out.splitlines()
    assert re.fullmatch(r"perplexity [\d.]+  \(253 tokens in 11 windows of 24, [\d.]+ s, peak [\d.]+ [MG]iB\)", first)
    assert re.fullmatch(r"reference [\d.]+, KL [\d.]+ ± [\d.]+ nats per token, same most likely token [\d.]+ %", second)
    assert float(second.split()[1].rstrip(",")) == pytest.approx(want["reference_perplexity"], rel=1e-3)
    assert float(second.split()[3]) == pytest.approx(want["kl"], rel=1e-3)
    assert float(second.split()[-2]) == pytest.approx(100 * want["top1_agreement"], abs=0.01)

    assert main([*args, "--reference", str(dense), "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == "" and found["reference"] == str(dense)
    for name, value in want.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    assert main([*args, "--json", "--quiet"]) == 0
    without = json.loads(capsys.readouterr().out)
    assert found.keys() - without.keys() == {
        "reference", "kl", "kl_stderr", "top1_agreement", "reference_perplexity"
    }  # fmt: skip

    wide = small_model(tmp_path / "wide", vocab_size=203)
    capsys.readouterr()
    assert main([*args, "--reference", str(wide), "--quiet"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1 and "vocabulary" in shown.err
