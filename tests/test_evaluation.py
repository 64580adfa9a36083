"""`evaluate`: the perplexity of the whole model in memory, from one layer at a time."""

from __future__ import annotations

import gzip
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, prune
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from streamprune.disk.lock import Lock
from streamprune.errors import CheckpointError, ResourceError, UsageError
from streamprune.evaluation import evaluate as evaluation

N = 24
KINDS = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "falcon"]
Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    return np.random.default_rng(11).integers(0, 199, 11 * N + 5)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, words: np.ndarray) -> Path:
    """A text of eleven windows and a rest."""
    path = tmp_path_factory.mktemp("short") / "text.txt"
    path.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in np.array_split(words, 20)))
    return path


def whole_model(folder: Path, words: np.ndarray, seqlen: int = N) -> float:
    """Mean −log p over the predicted tokens of all windows, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    with torch.no_grad():
        for begin in range(0, len(words) // seqlen * seqlen, seqlen):
            ids = torch.from_numpy(words[begin : begin + seqlen])[None]
            p = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
            losses += [-float(p[i, ids[0, i + 1]]) for i in range(seqlen - 1)]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_model(models: Models, short: Path, words: np.ndarray, tmp_path: Path, kind: str) -> None:
    found = evaluate(models(kind, dtype="float32"), short, seqlen=N, work=tmp_path)
    nll = whole_model(models(kind, dtype="float32"), words)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert (found.tokens, found.windows, found.seqlen) == (11 * (N - 1), 11, N)
    fourth = whole_model(models(kind, dtype="float32"), words[3 * N : 4 * N])
    assert len(found.window_nll) == 11 and found.window_nll[3] == pytest.approx(fourth, rel=1e-5)
    assert found.seconds > 0 and found.peak_rss_bytes > 1 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights(models: Models, short: Path, words: np.ndarray, tmp_path: Path, kind: str) -> None:
    """Computed in float32, hidden states kept in bf16 between layers: within a part in a hundred."""
    found = evaluate(models(kind), short, seqlen=N, work=tmp_path, dtype="float32")
    assert found.nll == pytest.approx(whole_model(models(kind), words), rel=1e-2)


def test_of_a_pruned_model(models: Models, short: Path, words: np.ndarray, tmp_path: Path) -> None:
    prune(models("llama", dtype="float32"), tmp_path / "out", sparsity=0.7, calib=short, samples=4, seqlen=N)
    found = evaluate(tmp_path / "out", short, seqlen=N, work=tmp_path / "work")
    assert found.nll == pytest.approx(whole_model(tmp_path / "out", words), rel=1e-5)
    assert abs(found.nll - whole_model(models("llama", dtype="float32"), words)) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("positions", [1, 5, 10**6])
def test_logits_in_pieces(
    models: Models, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, positions: int
) -> None:
    model = models(kind, dtype="float32")
    expected = evaluate(model, short, seqlen=N, work=tmp_path).nll
    shapes: list[int] = []
    nll = evaluation._nll

    def watched(logits: torch.Tensor, wanted: torch.Tensor) -> float:
        shapes.append(len(logits))
        return nll(logits, wanted)

    monkeypatch.setattr(evaluation, "_nll", watched)
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", {"cpu": positions * 8 * 199})
    assert evaluate(model, short, seqlen=N, work=tmp_path).nll == pytest.approx(expected, rel=1e-6)
    assert max(shapes) == min(positions, N) and sum(shapes) == 11 * (N - 1)


def test_batches(models: Models, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models("falcon", dtype="float32")
    expected = evaluate(model, short, seqlen=N, work=tmp_path).nll
    for batch in (1, 4):
        monkeypatch.setattr("streamprune.model.budget.BATCH_TOKENS", batch * N)
        assert evaluate(model, short, seqlen=N, work=tmp_path).nll == pytest.approx(expected, rel=1e-6)


def test_kinds_of_text(models: Models, short: Path, words: np.ndarray, tmp_path: Path) -> None:
    model = models("llama", dtype="float32")
    expected = evaluate(model, short, seqlen=N, work=tmp_path / "work")
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(short.read_bytes()))
    np.save(tmp_path / "flat.npy", words.astype(np.uint16))
    np.save(tmp_path / "windows.npy", words[: 11 * N].reshape(11, N).astype(np.int32))
    for name in ("t.txt.gz", "flat.npy", "windows.npy"):
        found = evaluate(model, tmp_path / name, seqlen=N, work=tmp_path / "work")
        assert (found.nll, found.tokens) == (expected.nll, expected.tokens), name


def test_default_length(models: Models, text: Path, tmp_path: Path) -> None:
    assert evaluate(models("llama"), text, work=tmp_path).seqlen == 64


def test_nothing_is_left_behind(models: Models, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work" / "deep"
    seen: list[set[str]] = []

    def look(step: Any) -> None:
        seen.append({p.name for p in work.rglob("*")})

    evaluate(models("llama"), short, seqlen=N, work=work, progress=look)
    assert len(seen) == 5 and all(seen)
    assert list(work.iterdir()) == []
    caches = [{n for n in names if n.endswith(".bin")} for names in seen]
    assert caches == [{"0000.bin"}, {"0001.bin"}, {"0002.bin"}, {"0003.bin"}, {"0003.bin"}]

    def fail(step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(models("llama"), short, seqlen=N, work=work, progress=fail)
    assert list(work.iterdir()) == []


def test_default_work_folder(models: Models, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evaluate(models("llama"), short, seqlen=N)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["streamprune"]
    assert list((tmp_path / "cache" / "streamprune").iterdir()) == []


def test_rests_of_dead_processes_are_removed(models: Models, short: Path, tmp_path: Path) -> None:
    """A folder whose lock nobody holds goes; one that is at work, and what is not ours, stays."""
    for name in ("eval-1-dead", "eval-2-alive", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0000.bin").write_bytes(b"x")
    (tmp_path / "eval-1-dead.lock").write_text("1\n")
    with Lock(tmp_path / "eval-2-alive.lock"):
        evaluate(models("llama"), short, seqlen=N, work=tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"eval-2-alive", "eval-2-alive.lock", "mine"}
        assert (tmp_path / "eval-2-alive" / "0000.bin").exists()


def test_a_killed_evaluation(models: Models, short: Path, tmp_path: Path) -> None:
    """What SIGKILL leaves is what the next evaluation removes."""
    work = tmp_path / "work"
    code = (
        "import os, sys, streamprune\nwork = streamprune.Resources(work=sys.argv[3])\n"
        "end = lambda step: os.kill(os.getpid(), 9)\n"
        "streamprune.evaluate(sys.argv[1], sys.argv[2], seqlen=24, resources=work, progress=end)"
    )
    done = subprocess.run([sys.executable, "-c", code, models("llama"), short, work], check=False)
    assert done.returncode == -9
    assert len(list(work.iterdir())) == 2
    evaluate(models("llama"), short, seqlen=N, work=work)
    assert list(work.iterdir()) == []


def test_memory(models: Models, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little is refused with a value that works; less memory means smaller batches and the same result."""
    monkeypatch.setattr("streamprune.model.budget.resident_bytes", lambda: 300 << 20)
    model = models("llama", dtype="float32")
    expected = evaluate(model, short, seqlen=N, work=tmp_path)
    with pytest.raises(ResourceError, match=r"needs --max-ram \d+MiB") as caught:
        evaluate(model, short, seqlen=N, work=tmp_path, max_ram=1 << 20)
    least = int(re.findall(r"needs --max-ram (\d+)MiB", str(caught.value))[0]) << 20
    with pytest.raises(ResourceError):
        evaluate(model, short, seqlen=N, work=tmp_path, max_ram=least - (3 << 20))
    assert evaluate(model, short, seqlen=N, work=tmp_path, max_ram=least).nll == pytest.approx(expected.nll, rel=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_noticed_before(
    models: Models, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(ResourceError, match="--work"):
        evaluate(models("llama"), short, seqlen=N, work=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_refusals(models: Models, short: Path, tmp_path: Path) -> None:
    model, work = models("llama"), tmp_path / "work"
    with pytest.raises(UsageError, match="no such file"):
        evaluate(model, tmp_path / "nothing.txt", work=work)
    for length in (0, 1, -5):
        with pytest.raises(UsageError, match="a window needs at least 2 tokens"):
            evaluate(model, short, seqlen=length, work=work)
    (tmp_path / "few.txt").write_text("w1 w2 w3")
    with pytest.raises(UsageError, match="3 tokens, one window needs 24"):
        evaluate(model, tmp_path / "few.txt", seqlen=N, work=work)
    with pytest.raises(UsageError, match="64 tokens"):
        evaluate(model, short, seqlen=65, work=work)
    (tmp_path / "picture.txt").write_bytes(b"w1 \xff\xfe\xfd w3")
    with pytest.raises(UsageError, match=r"picture\.txt: is not text"):
        evaluate(model, tmp_path / "picture.txt", seqlen=2, work=work)
    with pytest.raises(UsageError, match="--windows"):
        evaluate(model, short, seqlen=N, windows=0, work=work)
    with pytest.raises(UsageError, match="device"):
        evaluate(model, short, seqlen=N, work=work, device="nonsense")
    assert not work.exists() or not list(work.iterdir())


def test_dtype_of_the_api_is_checked(models: Models, short: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype"):
        evaluate(models("llama"), short, seqlen=N, work=tmp_path, dtype="int8")


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_windows_beyond_learned_positions(models: Models, short: Path, tmp_path: Path, kind: str) -> None:
    """A table of 64 positions cannot serve windows of 65 tokens: the caller's mistake, said before anything runs."""
    with pytest.raises(UsageError, match="--seqlen"):
        evaluate(models(kind), short, seqlen=66, work=tmp_path)


def test_float16_that_overflows(models: Models, short: Path, words: np.ndarray, tmp_path: Path) -> None:
    """A float16 model whose hidden states exceed 65504: refused in float16, right with --dtype float32."""
    source = Path(shutil.copytree(models("llama", dtype="float16"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 16384.0
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1024.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="--dtype float32"):
        evaluate(source, short, seqlen=N, work=tmp_path / "work", dtype="float16")
    nll = whole_model(source, words)
    assert math.isfinite(nll)
    found = evaluate(source, short, seqlen=N, work=tmp_path / "work", dtype="float32")
    assert found.nll == pytest.approx(nll, rel=1e-2)


def test_the_arithmetic_holds_for_one_prediction(models: Models, tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.array([5, 77]))
    found = evaluate(models("llama", dtype="float32"), tmp_path / "two.npy", seqlen=2, work=tmp_path / "work")
    assert (found.tokens, found.windows) == (1, 1)
    assert found.nll == pytest.approx(whole_model(models("llama", dtype="float32"), np.array([5, 77]), 2), rel=1e-5)
    assert os.listdir(tmp_path / "work") == []  # noqa: PTH208
