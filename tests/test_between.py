"""Models that keep more than hidden states between layers: what is packed, found out, resumed, tuned, on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, evaluate, likelihoods, prune
from families import save_model
from family_checks import write_tokens
from mixtures import save_mixture
from stand_in import Card, plugged_in
from whole_model import in_memory, perplexity, stored

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.errors import UnsupportedError
from streamprune.evaluation.requests import Request
from streamprune.model.between import Between, Given, Leaf, Parcel
from streamprune.model.skeleton import Skeleton, build_skeleton
from streamprune.model.tracing import traced
from streamprune.progress import Progress

JOB: dict[str, Any] = {"samples": 6, "seqlen": 16, "dtype": "float32"}
KEYS, INDICES, STREAMS = "gemma3n_text", "glm_moe_dsa", "deepseek_v4"
"""Keys and values, streams, and lookups by the tokens; indices of another layer; streams, and experts by the tokens."""

slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(kind: str, dtype: str = "float32") -> Path:
        name = f"{kind}-{dtype}"
        if name not in made:
            folder = tmp_path_factory.mktemp("source") / name
            made[name] = save_model(folder, kind, 4, dtype) if kind == KEYS else save_mixture(folder, kind, dtype)
        return made[name]

    return get


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy")


def skeleton_of(source: Path) -> Skeleton:
    checkpoint = open_checkpoint(source)
    return traced(checkpoint, build_skeleton(checkpoint, torch.float32), torch.float32)


def files_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def wanted_perplexity(source: Path, kind: str, tokens: Path, dtype: torch.dtype = torch.float32) -> float:
    """That of the whole model, on the windows of 16 tokens that `evaluate` cuts the text into."""
    ids = torch.from_numpy(np.load(tokens))
    model = in_memory(source, kind if kind == KEYS else "llama", dtype)
    return perplexity(model, ids[: len(ids) // 16 * 16].view(-1, 16))


# ---- packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_packed_comes_back(dtype: torch.dtype) -> None:
    """In another order of dimensions, with ids, keys and indices, through every dtype of a cache."""
    leaves = (Leaf((2, 5, 3), 0, torch.bfloat16), None, Leaf((5, 2), 1, torch.int64), Leaf((7,), 0, torch.bool))
    made = (torch.randn(4, 2, 5, 3).bfloat16(), None, torch.randint(-5, 1 << 20, (5, 4, 2)), torch.rand(4, 7) > 0.5)
    tree = torch.utils._pytree.tree_flatten(made)[1]
    place = ("output", 0, 0)
    parcels = [[], [Parcel(place, leaves, tree)], []]
    between = Between(2, (3, 8), (1, 2), ids=True, parcels=lambda length: parcels)
    hidden, ids = torch.randn(3, 4, 5, 8).to(dtype), torch.randint(0, 250_000, (4, 5))
    for layer, width in ((0, 24 + 4), (1, 24 + 4 + 14), (2, 24)):  # 30 numbers, 10 and 7 integers in 5 rows: 19.6
        packed = between.pack(layer, Given(hidden, ids, {place: made}))
        assert packed.shape == (4, 5, between.width(layer, 5)) and packed.dtype == dtype
        assert layer == 1 or packed.shape[2] == width
        again = between.unpack(layer, packed.to(torch.float32).to(dtype))
        assert torch.equal(again.hidden, hidden) and again.hidden.shape == hidden.shape
        assert layer == 2 or (again.ids is not None and torch.equal(again.ids, ids))
    assert between.most(5) == between.width(1, 5) == 24 + 4 + -(-(30 + 4 * 10 + 4 * 7) // 5)
    keys, nothing, indices, mask = between.unpack(1, between.pack(1, Given(hidden, ids, {place: made}))).values[place]
    assert nothing is None and torch.equal(indices, made[2]) and torch.equal(mask, made[3])
    assert keys.dtype == torch.bfloat16 and torch.equal(keys, made[0].to(dtype).bfloat16())


def test_what_was_not_expected_is_refused() -> None:
    place = ("output", 0, 0)
    parcel = Parcel(place, (Leaf((5, 2), 0, torch.int64),), torch.utils._pytree.tree_flatten(torch.zeros(1))[1])
    between = Between(2, (8,), parcels=lambda length: [[], [parcel], []])
    for value in (None, torch.zeros(4, 5, 3, dtype=torch.long)):
        with pytest.raises(UnsupportedError, match="hands on"):
            between.pack(1, Given(torch.zeros(4, 5, 8), None, {place: value}))


# ---- what is found out


def test_most_models_keep_hidden_states_alone(models: Callable[..., Path]) -> None:
    between = skeleton_of(models("llama")).between
    assert between.plain and between.most(99) == 32
    states = torch.zeros(2, 3, 32)
    assert between.pack(1, Given(states)) is states and between.unpack(1, states).hidden is states


def test_kept_for_as_long_as_a_later_layer_uses_it(sources: Callable[..., Path]) -> None:
    """Layers 2 and 3 use the keys of 0 and 1; a window of 24 tokens has 2 · 2 · 24 · 8 numbers of them."""
    between = skeleton_of(sources(KEYS)).between
    assert (between.streams, between.order, between.ids) == ((2, 32), (1, 2), True)
    kept = [[place[2] for place in (p.place for p in between.before(layer, 24))] for layer in range(5)]
    assert kept == [[], ["sliding_attention"], ["sliding_attention", "full_attention"], ["full_attention"], []]
    assert [between.width(layer, 24) for layer in range(5)] == [68, 100, 132, 100, 64]


def test_as_many_indices_as_a_window_has(sources: Callable[..., Path]) -> None:
    """At most 16 for each token, four digits each; and nothing before the layer that makes them."""
    between = skeleton_of(sources(INDICES)).between
    assert not between.ids and between.streams == (32,)
    assert [between.width(layer, 8) for layer in range(3)] == [32, 32 + 4 * 8, 32]
    assert [between.width(layer, 24) for layer in range(3)] == [32, 32 + 4 * 16, 32]


def test_indices_that_the_next_layer_does_not_use_are_dropped(tokens: Path, tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "model", INDICES, indexer_types=["full", "full"])
    assert skeleton_of(source).between.most(16) == 32
    found = evaluate(source, tokens, seqlen=16, dtype="float32", work=tmp_path).perplexity
    assert abs(found - wanted_perplexity(source, INDICES, tokens)) <= 1e-5 * found


# ---- jobs


@pytest.mark.parametrize(
    "job",
    [pytest.param({"sparsity": 0.5, "propagate": "dense"}, marks=slow), {"pattern": "2:4", "propagate": "pruned"}],
)
def test_resumed(sources: Callable[..., Path], tokens: Path, tmp_path: Path, job: dict[str, Any]) -> None:
    """What is stored is enough to go on: the same bytes as without a break, with dense and with pruned inputs."""
    whole = prune(sources(KEYS), tmp_path / "whole", calib=tokens, **JOB, **job).out
    for at in (2, 4):

        def stop(step: Progress, at: int = at) -> None:
            if step.done == at:
                raise KeyboardInterrupt

        out = tmp_path / f"out-{at}"
        with pytest.raises(KeyboardInterrupt):
            prune(sources(KEYS), out, calib=tokens, progress=stop, **JOB, **job)
        assert not out.exists() and list((tmp_path / f"out-{at}.partial").rglob("*.bin"))
        assert files_of(prune(sources(KEYS), out, calib=tokens, **JOB, **job).out) == files_of(whole)


@pytest.mark.parametrize("kind", [pytest.param(KEYS, marks=slow), INDICES, pytest.param(STREAMS, marks=slow)])
def test_pruned_inputs(sources: Callable[..., Path], tokens: Path, tmp_path: Path, kind: str) -> None:
    """The statistics of a calibration with pruned inputs are those of the pruned model."""
    job = {"calib": tokens, **JOB, "expert_tokens": 1}
    out = prune(sources(kind), tmp_path / "out", pattern="2:4", propagate="pruned", **job).out
    found = evaluate(out, tokens, seqlen=16, dtype="float32", work=tmp_path)
    wanted = wanted_perplexity(out, kind, tokens)
    assert abs(found.perplexity - wanted) <= 1e-5 * wanted
    apart = evaluate(out, tokens, seqlen=16, dtype="float32", work=tmp_path, reference=sources(kind))
    assert apart.perplexity == found.perplexity and apart.kl is not None and apart.kl > 0
    assert calibrate(sources(kind), tmp_path / "statistics", **job).status == "done"


def test_what_transformers_holds_in_float32(sources: Callable[..., Path], tokens: Path, tmp_path: Path) -> None:
    """In bf16, the weights that mix streams, and some norms, are float32 as in the whole model."""
    wanted = wanted_perplexity(sources(STREAMS, "bfloat16"), STREAMS, tokens, torch.bfloat16)
    found = evaluate(sources(STREAMS, "bfloat16"), tokens, seqlen=16, dtype="bfloat16", work=tmp_path).perplexity
    assert abs(found - wanted) <= 1e-5 * wanted


@slow
def test_tuned(sources: Callable[..., Path], tokens: Path, tmp_path: Path) -> None:
    """Layers that look something up by the tokens and use keys of others can be tuned, and get better."""
    result = prune(
        sources(KEYS), tmp_path / "out", pattern="2:4", method="swiftprune-tuned", tune_epochs=2, calib=tokens, **JOB
    )
    tuned = [stage["tune"] for stage in result.report["stages"] if stage.get("tune")]
    assert len(tuned) == 4 and all(each["error"] < each["error_before"] for each in tuned), tuned


@pytest.mark.parametrize("kind", [KEYS, pytest.param(INDICES, marks=slow), pytest.param(STREAMS, marks=slow)])
def test_on_a_device(sources: Callable[..., Path], tokens: Path, tmp_path: Path, kind: str) -> None:
    job = {"pattern": "2:4", "calib": tokens, **JOB, "propagate": "pruned", "expert_tokens": 1}
    wanted = prune(sources(kind), tmp_path / "cpu", backend="torch", **job).out
    with plugged_in(Card()):
        found = prune(sources(kind), tmp_path / "device", device="cuda:0", **job).out
    before, after = stored(wanted), stored(found)
    differ = sum(int(((before[name] == 0) != (after[name] == 0)).sum()) for name in before)
    assert differ <= sum(tensor.numel() for tensor in before.values()) / 1000


@pytest.mark.parametrize("kind", [pytest.param(KEYS, marks=slow), INDICES])
def test_sequences_of_any_length(sources: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Log-likelihoods of requests are the whole model's, whatever their lengths."""
    drawn = np.random.default_rng(7)
    requests = [Request(drawn.integers(10, 26, 5 + 3 * n).astype(np.uint32), 2) for n in range(6)]
    found = likelihoods(sources(kind), requests, seqlen=32, dtype="float32", work=str(tmp_path))
    model = in_memory(sources(kind), kind if kind == KEYS else "llama")
    for request, logprob in zip(requests, found.logprobs, strict=True):
        ids = torch.from_numpy(request.ids.astype(np.int64))[None]
        with torch.no_grad():
            logs = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -2:].double().log_softmax(-1)
        assert abs(float(logs.gather(1, ids[0, -2:, None]).sum()) - logprob) < 1e-4
