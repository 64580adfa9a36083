"""What a GPU makes of it, against the CPU. `pytest -m gpu` takes a card; else the same bodies run on the stand-in.

On a card, sums are rounded otherwise than on the CPU: weights whose scores are nearly equal may change places. How many
may is stated with each test. On the stand-in jobs give the CPU's bytes.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, prune
from conftest import VOCAB, save_model
from safetensors.torch import load_file
from stand_in import Card, plugged_in
from torch import Tensor

from streamprune.calibration.gram_sums import GramCollector, HoldOut
from streamprune.kernels import Selection, cpu, cpu_fp8, torch_fp8, torch_ops
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping, normalised_inverse
from streamprune.methods.refits import METHODS, RefitRequest
from streamprune.methods.selection import Pattern, select
from streamprune.model import budget
from streamprune.model.budget import Layout
from streamprune.model.device import exact_products
from streamprune.process.ranks import ALONE
from streamprune.pruning.job import JobResult

ROOT = Path(__file__).resolve().parent.parent
Models = Callable[..., Path]

TIES = 0.005
"""Of all weights, the share that a job may prune on one device and keep on the other."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (5, 40), (33, 1000), (64, 256), (7, 4096), (0, 16), (4, 0)]
CARD = pytest.param("card", marks=pytest.mark.gpu)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["stand-in", CARD])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "card":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield torch.device("cuda:0")
        return
    with plugged_in(Card()):
        yield torch.device("cuda:0")


@pytest.fixture
def card() -> torch.device:
    """A card, and nothing else."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda:0")


# ---- kernels

IN_TORCH = torch.cuda.is_available()
"""What kernels are compared with: on the CPU Numba's, beside a card Torch's own on the CPU, whose equals Numba's are
(test_kernels.py, test_fp8.py): compiling takes longer than all else, and time on a card is dear."""

SELECTING, CODING = (torch_ops, torch_fp8) if IN_TORCH else (cpu, cpu_fp8)


def weights(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def features(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.01


def selected(kernels: Any, name: str, w: Tensor, f: Tensor) -> Selection:
    if name == "2:4":
        found: Selection = kernels.prune_n_of_m(w, f, 2, 2, 4, want_keep=True)
    else:
        found = getattr(kernels, f"prune_{name}")(w, f, 2, w.shape[1] // 2, want_keep=True)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["exact", "ewma", "2:4"])
def test_selection(device: torch.device, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The same counts always; the same masks but for one weight in a thousand, or one of a small linear."""
    w, f = weights(*shape, dtype), features(shape[1])
    here = selected(SELECTING, name, w, f)
    there = selected(torch_ops, name, w.to(device), f.to(device))
    assert here.keep is not None and there.keep is not None
    keep = there.keep.cpu()
    assert torch.equal(keep.sum(1), here.keep.sum(1))
    assert int((keep != here.keep).sum()) <= max(2, keep.numel() // 1000)
    assert torch.equal(there.weight.cpu(), w.masked_fill(~keep, 0) + 0.0)
    assert (there.finite, here.finite) == (True, True)
    np.testing.assert_allclose([there.removed, there.total], [here.removed, here.total], rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(device: torch.device, dtype: torch.dtype, bad: float) -> None:
    w = weights(9, 64, dtype)
    assert torch_ops.first_nonfinite(w.to(device)) is None
    w[5, 7] = bad
    assert torch_ops.first_nonfinite(w.to(device)) == 5 * 64 + 7 == SELECTING.first_nonfinite(w)
    for name in ("exact", "ewma", "2:4"):
        assert not selected(torch_ops, name, w.to(device), features(64).to(device)).finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 1000])
def test_accumulate(device: torch.device, tokens: int, dtype: torch.dtype) -> None:
    x = weights(tokens, 48, dtype)
    sums = [torch.zeros(48, dtype=torch.float64, device=device) for _ in range(2)]
    torch_ops.accumulate(x.to(device), *sums)
    exact = x.double()
    torch.testing.assert_close(sums[0].cpu(), exact.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums[1].cpu(), exact.square().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 40), (33, 1000), (0, 16)], ids=str)
@pytest.mark.parametrize("factors", [(1.0,), (1.5, 1.25, 1.0)], ids=["amax", "mse"])
def test_fp8(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, factors: tuple[float, ...]) -> None:
    """Codes and scales bit for bit, and back."""
    w, power = weights(*shape, dtype), features(shape[1])
    codes, scale, sums = CODING.quantise_rows(w, power, factors, torch.bfloat16)
    found = torch_fp8.quantise_rows(w.to(device), power.to(device), factors, torch.bfloat16)
    assert torch.equal(found[0].view(torch.uint8).cpu(), codes.view(torch.uint8))
    assert torch.equal(found[1].cpu(), scale)
    torch.testing.assert_close(found[2].cpu(), sums, rtol=1e-6, atol=1e-9)
    here, there = torch.empty(shape), torch.empty(shape, device=device)
    CODING.dequantise_rows(codes, scale, here)
    torch_fp8.dequantise_rows(found[0], found[1], there)
    assert torch.equal(there.cpu(), here)


def test_fp8_descent(device: torch.device) -> None:
    """Rounding is otherwise: of the codes, one in fifty may be another."""
    rows, width = 32, 48
    x = weights(256, width).double()
    gram = (x.T @ x).float()
    w = weights(width, rows)
    given = [w.clone(), torch.zeros(width, rows), torch.zeros(width, rows), torch.ones(width, rows, dtype=torch.bool)]
    given += [gram, 1 / gram.diagonal(), w.abs().amax(0) / 448]
    there = [t.clone().to(device) for t in given]
    CODING.descend_block(*given)
    torch_fp8.descend_block(*there)
    assert int((there[0].cpu() != given[0]).sum()) <= rows * width // 50


# ---- Grams and refits


@pytest.fixture(params=["highest", "high"])
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """TF32 is allowed by the caller, or is not; jobs end that."""
    torch.set_float32_matmul_precision(request.param)
    with exact_products():
        yield
    torch.set_float32_matmul_precision("highest")


def gram_on(device: torch.device, x: Tensor, hold: HoldOut) -> Gram:
    collector = GramCollector(lambda name, width: (0, width), hold)
    for part in torch.split(x.to(device), 100):
        collector.watch("it", part)
        collector.end_batch()
    found = collector.sums["it"]
    found.finish()
    held = torch.cat(found.held) if found.held else found.sum.new_empty(0, x.shape[1])
    return Gram(found.sum, held, found.tokens)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 640])
def test_grams(device: torch.device, width: int, dtype: torch.dtype) -> None:
    """TF32 would be wrong by a thousandth."""
    x = weights(400, width, dtype)
    gram = gram_on(device, x, HoldOut.of(400, 50))
    gram.absorb_held_()
    exact = x.double().T @ x.double()
    assert float((gram.matrix.cpu().double() - exact).norm() / exact.norm()) < 2e-6
    assert gram.tokens == 400
    torch.testing.assert_close(gram.energy(weights(3, width, seed=2).to(device)).cpu(),
                               ((weights(3, width, seed=2).double() @ exact) * weights(3, width, seed=2)).sum(1),
                               rtol=1e-4, atol=1e-6)  # fmt: skip


@pytest.mark.usefixtures("_precision")
def test_inverses(device: torch.device) -> None:
    """N⁻¹ of the normalised Gram with damping and ridge, against float64."""
    x = weights(400, 96)
    exact, damping = x.double().T @ x.double(), Damping(0.05)
    found, used = normalised_inverse((x.T @ x).to(device), damping, 0.6)
    normal = exact / exact.diagonal().sqrt() / exact.diagonal().sqrt()[:, None]
    wanted = torch.linalg.inv(normal + 0.65 * torch.eye(96, dtype=torch.float64))
    assert used == 0.05
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"pattern": Pattern(2, 4)}], ids=["50 %", "2:4"])
@pytest.mark.parametrize("name", METHODS)
def test_refits(device: torch.device, name: str, amount: dict[str, Any]) -> None:
    """The error in float64 is that of the refit on the CPU, within a hundredth; so are the counts."""
    x, w = weights(300, 64) * features(64), weights(12, 64, seed=3)
    method, exact = METHODS[name], x.double().T @ x.double()

    def fitted(on: torch.device) -> Tensor:
        gram, weight = gram_on(on, x, HoldOut(300, 1000)), w.to(on)
        feature = x.square().mean(0).to(on)

        def keep(rows: Tensor, share: float) -> Tensor:
            found = select(rows, feature, 2, selector="exact", want_keep=True, backend="torch", **amount).keep
            assert found is not None
            return found

        state = method.prepare(gram, Damping(method.damping), ALONE).state
        ask = RefitRequest(amount.get("sparsity"), amount.get("pattern"), keep, "torch")
        masked = weight.masked_fill(~keep(weight, 1.0), 0.0)
        return method.solve(weight, masked, gram, state, ask).cpu()

    def error(fit: Tensor) -> float:
        change = w.double() - fit.double()
        return float(((change @ exact) * change).sum())

    here, there = fitted(torch.device("cpu")), fitted(device)
    assert torch.equal((there != 0).sum(1), (here != 0).sum(1))
    assert error(there) == pytest.approx(error(here), rel=0.01)


# ---- jobs


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BATCH_TOKENS", 64)
    monkeypatch.setattr(budget, "DEVICE_BATCH_TOKENS", 64)


def job(model: Path, text: Path, out: Path, device: str = "cuda:0", **more: Any) -> JobResult:
    given: dict[str, Any] = {"samples": 5, "seqlen": 32, "backend": "torch", "dtype": "float32"}
    if not {"sparsity", "pattern"} & more.keys():
        given["pattern"] = "2:4"
    return prune(model, out, calib=text, device=device, **{**given, **more})


JOBS: dict[str, dict[str, Any]] = {
    "unstructured": {"sparsity": 0.5},
    "2:4": {},
    "pruned inputs": {"propagate": "pruned"},
    "hwpq": {"method": "hwpq"},
    "allocated": {"sparsity": 0.6, "allocate": "error"},
    "obs-admm": {"refit": "obs-admm", "propagate": "dense", "only": "1.mlp.down_proj"},
    "asymmetric": {"refit": "obs-admm", "only": "0.mlp.down_proj"},
    "cg": {"sparsity": 0.5, "refit": "cg", "propagate": "dense", "only": "down_proj"},
    "sparsegpt": {"sparsity": 0.5, "refit": "sparsegpt", "propagate": "pruned", "only": "down_proj"},
    "magnitude": {"method": "magnitude"},
    "tuned": {"tune": "block", "tune_epochs": 1, "only": "1.mlp"},
    "tuned, dense": {"tune": "block", "tune_epochs": 1, "only": "0.self_attn", "propagate": "dense"},
    "tuned, FP8": {"tune": "block", "tune_epochs": 1, "quantize": "fp8", "only": "0.mlp"},
    "mixture": {"kind": "mixtral"},
    "mixture, cg": {"kind": "mixtral", "refit": "cg", "only": "experts.1.w2"},
    "mixture, tuned": {"kind": "mixtral", "tune": "block", "tune_epochs": 1, "only": "0..*experts", "expert_tokens": 9},
}


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("how", JOBS.values(), ids=JOBS)
def test_jobs(models: Models, text: Path, tmp_path: Path, device: torch.device, how: dict[str, Any]) -> None:
    """The same masks but for TIES; where a mask is the same, values differ by rounding. On the stand-in, nothing does
    but what gradients have led to: their sums are in another order."""
    model = models(how.get("kind", "llama"), layers=2)
    how = {k: v for k, v in how.items() if k != "kind"}
    job(model, text, tmp_path / "cpu", "cpu", **how)
    job(model, text, tmp_path / "gpu", str(device), **how)
    if not torch.cuda.is_available() and "tune" not in how:
        assert bytes_of(tmp_path / "gpu") == bytes_of(tmp_path / "cpu") != []
        return
    differ = total = 0
    for shard in sorted((tmp_path / "cpu").glob("*.safetensors")):
        ours = load_file(tmp_path / "gpu" / shard.name)
        for name, here in load_file(shard).items():
            there = ours[name]
            if here.element_size() == 1:
                here, there = here.view(torch.uint8), there.view(torch.uint8)
            total, differ = total + here.numel(), differ + int(((here == 0) != (there == 0)).sum())
            both = (here != 0) & (there != 0)
            apart = (here.float() - there.float())[both].norm() / here.float()[both].norm().clamp_min(1e-30)
            assert float(apart) < 0.05, name
    assert differ <= TIES * total


@pytest.mark.usefixtures("_small_batches")
def test_perplexity(models: Models, text: Path, tmp_path: Path, device: torch.device) -> None:
    """Within a thousandth."""
    few = tmp_path / "few.txt"
    few.write_text("".join(text.read_text().splitlines(keepends=True)[:12]))
    given: dict[str, Any] = {"seqlen": 32, "dtype": "float32", "work": tmp_path, "reference": models(layers=1)}
    here = evaluate(models(layers=2), few, device="cpu", **given)
    there = evaluate(models(layers=2), few, device=str(device), **given)
    if not torch.cuda.is_available():
        assert (there.nll, there.kl, there.top1_agreement) == (here.nll, here.kl, here.top1_agreement)
    for name in ("perplexity", "reference_perplexity", "kl"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-3), name


@pytest.mark.parametrize("how", [{}, {"propagate": "pruned"}], ids=["dense", "pruned"])
def test_every_layout_gives_the_same_bytes(
    models: Models,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    how: dict[str, Any],
) -> None:
    found = set()
    for layers, resident in ((1, False), (2, False), (2, True), (3, True), (3, False)):
        layout = Layout(2, layers, resident, 0)
        monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args, layout=layout: layout)
        out = tmp_path / f"{layers}-{resident}"
        job(models(layers=2), text, out, str(device), only="down_proj|q_proj", **how)
        found.add(b"".join(p.read_bytes() for p in sorted(out.glob("*.safetensors"))))
    assert len(found) == 1


# ---- on a card alone


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The command line of a job of eight layers: command(device, out)."""
    folder = tmp_path_factory.mktemp("given")
    model = save_model(folder / "model", "llama", 8)
    np.save(folder / "tokens.npy", np.random.default_rng(3).integers(0, VOCAB, 3000))
    given = ["--pattern", "2:4", "--calib", str(folder / "tokens.npy"), "--samples", "256", "--seqlen", "64"]

    def line(device: str, out: Path, *more: str) -> list[str]:
        start = [sys.executable, "-m", "streamprune", "prune", str(model), str(out)]
        return [*start, *given, "--device", device, "--json", "--quiet", *more]

    return line


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    there = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    return subprocess.run(command, env=there, capture_output=True, text=True, timeout=240, check=False)


def bytes_of(out: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(out.glob("*.safetensors"))]


@pytest.mark.parametrize(
    "where", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda:0", marks=pytest.mark.gpu)]
)
def test_killed_and_resumed(command: Callable[..., list[str]], tmp_path: Path, where: str, request: Any) -> None:
    """By SIGKILL, at three random moments."""
    if where != "cpu":
        request.getfixturevalue("card")
    begun = time.perf_counter()
    assert run(command(where, tmp_path / "whole")).returncode == 0
    took, chance, out = time.perf_counter() - begun, random.Random(5), tmp_path / "out"
    for _ in range(3):
        process = subprocess.Popen(command(where, out), stdout=subprocess.DEVNULL, cwd=ROOT)
        time.sleep(took * (0.4 + 0.5 * chance.random()))
        process.kill()
        process.wait(60)
    done = run(command(where, out))
    assert done.returncode == 0, done.stderr
    assert bytes_of(out) == bytes_of(tmp_path / "whole") != []


@pytest.mark.parametrize(
    "where", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda:0", marks=pytest.mark.gpu)]
)
def test_one_launch_after_the_other_gives_the_same(
    command: Callable[..., list[str]], tmp_path: Path, where: str, request: Any
) -> None:
    """With CUDA_LAUNCH_BLOCKING nothing overlaps: what differs without it was a race."""
    if where != "cpu":
        request.getfixturevalue("card")
    for name in ("0", "1"):
        done = run(command(where, tmp_path / name), CUDA_LAUNCH_BLOCKING=name)
        assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1") != []


def used_by_all(smi: str = "nvidia-smi") -> int:
    """Bytes of the first card's memory that are in use, as its driver says."""
    asked = [smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


@pytest.mark.gpu
def test_max_vram_is_obeyed(command: Callable[..., list[str]], tmp_path: Path, card: torch.device) -> None:
    """What the driver sees of the process, its context included; at the least value, too. One MiB less is refused."""
    refused = run(command(str(card), tmp_path / "out", "--max-vram", "1MiB"))
    found = re.search(r"needs --max-vram (\d+)MiB", refused.stderr)
    assert refused.returncode == 5 and found, refused.stderr
    least = int(found.group(1))
    assert run(command(str(card), tmp_path / "out", "--max-vram", f"{least - 1}MiB")).returncode == 5
    for limit in (least, 2 * least):
        before, most, out = used_by_all(), 0, tmp_path / str(limit)
        with subprocess.Popen(
            command(str(card), out, "--max-vram", f"{limit}MiB"), stdout=-1, text=True, cwd=ROOT
        ) as child:
            while child.poll() is None:
                most = max(most, used_by_all() - before)
            assert child.stdout and json.loads(child.stdout.read())["status"] == "done"
        assert most <= limit << 20, f"{most >> 20} MiB within {limit} MiB"
    assert bytes_of(tmp_path / str(least)) != []


@contextmanager
def no_memory_left(device: torch.device) -> Iterator[None]:
    """Another tensor takes all that torch may have, down to 512 bytes."""
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total + 1e-6, device)
    taken = []
    try:
        for size in (1 << 20, 1 << 14, 512):
            try:
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device=device))
            except torch.OutOfMemoryError:
                pass
        yield
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@pytest.mark.usefixtures("_small_batches")
def test_memory_that_runs_out_in_the_middle(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The batch halves, the report says so, and what is pruned is right but for TIES: sums come in another order."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: Layout(2, 1, False, 0))
    forward, calls = LlamaMLP.forward, list[int]()
    job(models(layers=2), text, tmp_path / "whole", str(device))

    def crowded(module: Any, x: Tensor) -> Any:
        calls.append(len(x))
        if len(calls) != 4:
            return forward(module, x)
        with no_memory_left(device):
            return forward(module, x)

    monkeypatch.setattr(LlamaMLP, "forward", crowded)
    result = job(models(layers=2), text, tmp_path / "out", str(device))
    assert result.report["out_of_memory_batch"] == 1 and set(calls[4:]) == {1}
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        ours = load_file(tmp_path / "out" / shard.name)
        for name, wanted in load_file(shard).items():
            assert int(((wanted == 0) != (ours[name] == 0)).sum()) <= TIES * wanted.numel(), name


@pytest.mark.gpu
def test_memcheck_finds_nothing(card: torch.device) -> None:
    """compute-sanitizer over the kernels, one shape each."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("no compute-sanitizer")
    which = "(test_selection or test_fp8 or test_accumulate) and float32 and (1000 or 255)"
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", which, "-p", "no:cacheprovider", __file__]
    done = run([tool, "--tool", "memcheck", "--error-exitcode", "9", *tests], PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert done.returncode == 0, done.stdout[-2000:]
