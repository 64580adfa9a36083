"""The stand-in for a GPU (stand_in.py), and jobs on it: what is taken away from them is missed.

Jobs of every kind run on it in test_on_a_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import evaluate, prune
from stand_in import Card, DeviceTensor, Fault, plugged_in

from streamprune.errors import ResourceError
from streamprune.model import budget, pass_memory
from streamprune.model.budget import Layout
from streamprune.model.copies import CopyStream, Sent
from streamprune.model.extra_memory import CONTEXT
from streamprune.model.loader import WeightLoader
from streamprune.pruning.job import JobResult

pytestmark = pytest.mark.usefixtures("one_thread", "_small_batches")


@pytest.fixture
def few(text: Path, tmp_path: Path) -> Path:
    """A part of the text."""
    path = tmp_path / "few.txt"
    path.write_text("".join(text.read_text().splitlines(keepends=True)[:12]))
    return path


Models = Callable[..., Path]
LAYOUTS = {
    "one layer": (1, False), "one ahead": (2, False), "resident": (2, True), "three": (3, True), "streamed": (3, False),
}  # fmt: skip


@pytest.fixture
def card() -> Iterator[Card]:
    with plugged_in(Card()) as card:
        yield card


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two windows, here and there."""
    monkeypatch.setattr(budget, "BATCH_TOKENS", 64)
    monkeypatch.setattr(budget, "DEVICE_BATCH_TOKENS", 64)


def job(model: Path, text: Path, out: Path, device: str = "cuda:0", **more: Any) -> JobResult:
    given = {"samples": 5, "seqlen": 32, "backend": "torch", "dtype": "float32", "only": "down_proj|w2"}
    if not {"sparsity", "pattern"} & more.keys():
        given["pattern"] = "2:4"
    return prune(model, out, calib=text, device=device, **{**given, **more})


def bytes_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))}


def use_layout(patch: pytest.MonkeyPatch, layers: int, resident: bool) -> None:
    layout = Layout(2, layers, resident, 0)
    patch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    patch.setattr("streamprune.evaluation.evaluate.layout_for", lambda *args, **more: layout)


# ---- whole jobs


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_other_architectures(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    """Transposed weights, tied and scaled embeddings, learned positions."""
    job(models(kind, layers=2), text, tmp_path / "cpu", "cpu", only=None)
    with plugged_in(Card()):
        job(models(kind, layers=2), text, tmp_path / "out", only=None)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "cpu")


@pytest.mark.parametrize(("layers", "resident"), LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_is_used_before_it_has_arrived(
    models: Models, text: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int, resident: bool
) -> None:
    """In every layout, with weights that come in many pieces."""
    model, given = models(layers=2), {"seqlen": 32, "dtype": "float32", "work": tmp_path}
    job(model, text, tmp_path / "cpu", "cpu")
    here = evaluate(model, few, device="cpu", **given)
    use_layout(monkeypatch, layers, resident)
    monkeypatch.setattr("streamprune.model.loader._PIECE_BYTES", 3000)
    with plugged_in(Card()):
        job(model, text, tmp_path / "out")
        job(model, text, tmp_path / "propagated", propagate="pruned")
        there = evaluate(model, few, device="cuda:0", **given)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "cpu")
    assert there.nll == here.nll


@pytest.mark.parametrize("how", [{}, {"refit": "obs-admm"}], ids=["2:4", "admm"])
def test_the_second_device_alone(models: Models, text: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """Nothing goes to the first because it is the default."""
    with plugged_in(Card()) as card:
        job(models(layers=2), text, tmp_path / "out", "cuda:1", **how)
    assert card.devices == {torch.device("cuda", 1)}


@pytest.fixture(params=["before 2.9", "since 2.9"])
def tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    """A caller has allowed TF32, in one of torch's two ways."""
    if request.param == "before 2.9":
        torch.set_float32_matmul_precision("high")
    elif hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        pytest.skip("this torch has one way only")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("tf32")
def test_no_product_of_float32_is_computed_in_tf32(models: Models, text: Path, few: Path, tmp_path: Path) -> None:
    """And what a caller allows himself is as it was before."""
    model = models(layers=2)
    with plugged_in(Card()):
        job(model, text, tmp_path / "out", refit="cg", propagate="dense", only="0.mlp.down_proj")
        evaluate(model, few, seqlen=32, dtype="float32", device="cuda:0", work=tmp_path)
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    else:
        assert torch.get_float32_matmul_precision() == "high"


# ---- its memory


def test_less_memory_gives_the_same(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least that is accepted is obeyed: the allocator refuses more."""
    monkeypatch.setattr(pass_memory, "KERNELS", 64 << 10)  # what of it small linears need
    job(models(), text, tmp_path / "cpu", "cpu", only=None)
    with plugged_in(Card()) as card:
        with pytest.raises(ResourceError) as caught:
            job(models(), text, tmp_path / "out", only=None, max_vram=CONTEXT)
        least = int(str(caught.value).rsplit("--max-vram ", 1)[1].removesuffix("MiB")) << 20
        job(models(), text, tmp_path / "out", only=None, max_vram=least)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "cpu")
    assert 0 < card.peak <= card.limit < least - CONTEXT + (1 << 20)


def test_memory_that_another_takes_away(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle: the batch halves, the report says so, and every layer is pruned."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    use_layout(monkeypatch, 1, False)  # nothing goes on beside that would be the one to find none
    forward, calls, given = LlamaMLP.forward, [], {"only": None, "dtype": "float32"}
    job(models(), text, tmp_path / "cpu", "cpu", **given)
    with plugged_in(Card()) as card:

        def crowded(module: Any, x: torch.Tensor) -> Any:
            calls.append(len(x))
            if len(calls) == 4:
                card.limit = card.allocated
            try:
                return forward(module, x)
            finally:
                card.limit = card.total

        monkeypatch.setattr(LlamaMLP, "forward", crowded)
        result = job(models(), text, tmp_path / "out", **given)
    assert result.report["out_of_memory_batch"] == 1
    assert calls[:4] == [2, 2, 1, 2] and set(calls[4:]) == {1}
    ours, wanted = bytes_of(tmp_path / "out"), bytes_of(tmp_path / "cpu")
    assert ours.keys() == wanted.keys() and all(len(ours[n]) == len(wanted[n]) for n in ours)


# ---- it can fail


def without(what: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Takes one wait, or one copy to the device, out of the program."""

    def unwaited(sent: Sent) -> torch.Tensor:
        if sent.arrived is not None:
            sent.tensor.record_stream(torch.cuda.current_stream(sent.tensor.device))
        return sent.tensor

    def unrecorded(sent: Sent) -> torch.Tensor:
        if sent.arrived is not None:
            torch.cuda.current_stream(sent.tensor.device).wait_event(sent.arrived)
        return sent.tensor

    def unmarked(self: CopyStream, tensor: torch.Tensor, after: Any, fetch: Any = CopyStream.fetch) -> torch.Tensor:
        return fetch(self, tensor, None)

    def impatient(self: CopyStream, tensor: torch.Tensor, after: Any) -> torch.Tensor:
        with self.on():
            if after is not None:
                self._stream.wait_event(after)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor.detach(), non_blocking=True)

    def on_host(self: WeightLoader, ref: Any, tensor: Any = WeightLoader.tensor) -> torch.Tensor:
        return self.maps.tensor(ref) if "down_proj" in ref.name else tensor(self, ref)

    def broken(patch: pytest.MonkeyPatch) -> None:
        if what in ("loader waits", "states wait"):
            patch.setattr(
                f"streamprune.model.{'loader' if what == 'loader waits' else 'activations'}.received", unwaited
            )
        elif what == "the stream is recorded":
            patch.setattr("streamprune.model.loader.received", unrecorded)
        elif what == "a fetch waits for what is fetched":
            patch.setattr(CopyStream, "fetch", unmarked)
        elif what == "the host waits for a fetch":
            patch.setattr(CopyStream, "fetch", impatient)
        else:
            patch.setattr(WeightLoader, "tensor", on_host)

    return broken


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("loader waits", "may not be done with"),
        ("states wait", "may not be done with"),
        ("the stream is recorded", "record_stream is missing"),
        ("a fetch waits for what is fetched", "may not be done with"),
        ("the host waits for a fetch", None),
        ("weights go to the device", "same device"),
    ],
)
def test_what_is_taken_away_is_missed(
    models: Models, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: str | None
) -> None:
    """Where what was fetched is used too early, ones are NaN, which may be noticed in many ways."""
    use_layout(monkeypatch, 2, what == "the stream is recorded")
    without(what)(monkeypatch)
    with pytest.raises(Exception) as caught, plugged_in(Card()):
        evaluate(models(layers=2), few, seqlen=32, dtype="float32", device="cuda:0", work=tmp_path)
    assert error is None or error in str(caught.value)


# ---- the stand-in itself


def test_host_and_device_do_not_mix(card: Card) -> None:
    here, there = torch.ones(3, 4), torch.ones(3, 4, device="cuda:0")
    assert isinstance(there, DeviceTensor) and there.is_cuda and there.device == torch.device("cuda:0")
    for mixed in (
        lambda: here + there, lambda: there @ here.T, lambda: torch.cat([here, there]), lambda: there.add_(here),
        lambda: torch.where(there > 0, there, here), lambda: torch.nn.functional.linear(there, here),
        lambda: there + torch.ones((), device="cuda:1"), lambda: here[there > 0],
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    for implicit in (there.numpy, there.__array__):
        with pytest.raises(TypeError, match=r"Tensor\.cpu"):
            implicit()
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2), "numbers may be in host memory"
    assert float(there.sum()) == 12 and there[0].tolist() == [1.0] * 4
    assert torch.equal(there[torch.tensor([0, 2])].cpu(), here[:2]), "and indices"


def test_fresh_memory_is_no_zeros(card: Card) -> None:
    assert math.isnan(float(torch.empty(1, device="cuda:0")))


def test_another_stream_has_to_wait(card: Card) -> None:
    there, side = torch.ones(3, device="cuda:0"), torch.cuda.Stream("cuda:0")
    with torch.cuda.stream(side), pytest.raises(Fault, match="may not be done with"):
        there + 1
    made = torch.cuda.current_stream("cuda:0").record_event()
    later = there * 2
    with torch.cuda.stream(side):
        side.wait_event(made)
        assert there.add(1).tolist() == [2.0] * 3
        with pytest.raises(Fault, match="may not be done with"):
            later + 1
        torch.cuda.synchronize()
        assert (later + 1).tolist() == [3.0] * 3
        there.add_(1)
    with pytest.raises(Fault, match="reads"):
        there + 1
    torch.cuda.synchronize()
    del there
    assert len(card.faults) == 3
    card.faults.clear()


def test_memory_outlives_what_another_stream_does_with_it(card: Card) -> None:
    for recorded in (False, True):
        there, side = torch.ones(3, device="cuda:0"), torch.cuda.Stream("cuda:0")
        side.wait_stream(torch.cuda.current_stream("cuda:0"))
        with torch.cuda.stream(side):
            made = there + 1
        if recorded:
            there.record_stream(side)
        del there
        assert len(card.faults) == (not recorded)
        card.faults.clear()
        del made


def test_pinned_copies_are_late(card: Card) -> None:
    there, pinned = torch.ones(3, device="cuda:0"), torch.empty(3, pin_memory=True)
    pinned.copy_(there, non_blocking=True)
    assert pinned.isnan().all()
    torch.cuda.current_stream("cuda:0").synchronize()
    assert pinned.tolist() == [1.0] * 3
    there.copy_(pinned, non_blocking=True)
    pinned.zero_()
    torch.cuda.synchronize()
    assert card.faults == ["pinned memory was changed while a copy of it was on its way"]
    card.faults.clear()


def test_faults_that_were_caught_are_not_forgotten() -> None:
    with pytest.raises(Fault, match="may not be done with"), plugged_in(Card()):
        there = torch.ones(3, device="cuda:0")
        with torch.cuda.stream(torch.cuda.Stream("cuda:0")):
            try:
                there + 1
            except RuntimeError:
                there = None


def test_gradients_are_those_of_torch(card: Card) -> None:
    """Of values that are used twice, added to every row, and reached through a function of our own."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, slope: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                begun = x.float().requires_grad_()
                (found,) = torch.autograd.grad(begun * begun, (begun,), slope)
            return found

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        made = torch.tanh(x @ weight.T + bias) @ weight
        return (Doubled.apply(made + x).sum(-1) * bias.sum()).square().mean()

    values = [
        torch.randn(size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate([(5, 4), (3, 4), (3,)])
    ]
    ours, theirs = ([x.to(place).requires_grad_() for x in values[1:]] for place in ("cuda:0", "cpu"))
    loss(values[0].to("cuda:0"), *ours).backward()
    loss(values[0], *theirs).backward()
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad.cpu(), b.grad, rtol=1e-5)
