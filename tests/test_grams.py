"""Grams of a layer's inputs: which tokens are kept out, one pass or several, panels, and what is let go of when."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sparsegpt import normal

from streamprune.calibration import gram_sums as grams_module
from streamprune.calibration.collector import Collector
from streamprune.calibration.gram_sums import MOST_HELD, GramCollector, HoldOut
from streamprune.calibration.grams import LayerGrams, gram_bytes
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError, ResourceError, UsageError
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping
from streamprune.methods.refits import METHODS, Choice, Method, Prepared, Sample
from streamprune.methods.selection import Amount
from streamprune.model.budget import Budget, RefitNeeds, _room, layout_for
from streamprune.model.loader import WeightLoader
from streamprune.model.skeleton import build_skeleton
from streamprune.model.streamed import StreamedModel
from streamprune.pruning.refit import LayerRefit, Outcome, Refit

SEQLEN = 16
SAMPLES = 9

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- which tokens are kept out


def flags(hold: HoldOut, tokens: int, cuts: list[int] | None = None) -> list[bool]:
    """Of every token whether it is kept out, where tokens come in calls that end at `cuts`."""
    found: list[bool] = []
    edges = sorted({0, tokens, *(c for c in cuts or [] if c < tokens)})
    for begin, end in itertools.pairwise(edges):
        for first, last, out in hold.cut(begin, end):
            assert first == len(found) and begin <= first < last <= end
            found += [out] * (last - first)
    assert len(found) == tokens
    return found


@given(tokens=st.integers(1, 30_000), seqlen=st.sampled_from([1, 2, 5, 16, 24, 333, 2048, 8192]), cuts=st.lists(
    st.integers(1, 30_000), max_size=8))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_kept_out(tokens: int, seqlen: int, cuts: list[int]) -> None:
    hold = HoldOut.of(tokens, seqlen)
    whole = flags(hold, tokens)
    assert flags(hold, tokens, cuts) == whole, "how tokens come in calls does not matter"
    held = sum(whole)
    few = tokens // seqlen < 8
    assert held <= tokens / (2 if few else 8) and held <= MOST_HELD * 9 / 8
    assert held >= 1 or tokens < 16
    assert held >= tokens / 16 or held >= MOST_HELD / 2 or tokens < 16
    assert 1 <= hold.block <= seqlen
    blocks = [len(list(run)) for out, run in itertools.groupby(whole) if out]
    assert all(block <= seqlen for block in blocks)
    assert len(blocks) >= 8 or tokens < 64 or few


@pytest.mark.parametrize("tokens", range(20))
def test_tiny_texts(tokens: int) -> None:
    out = flags(HoldOut.of(tokens, 4), tokens) if tokens else []
    assert 0 < sum(out) <= tokens / 2 if tokens > 1 else not any(out)
    if 8 <= tokens < 32:
        windows = tokens // 4
        assert [i // 4 for i, kept_out in enumerate(out) if kept_out] == [windows - 1] * 4, "the last whole window"


@pytest.mark.parametrize("tokens", [8 * MOST_HELD, 9 * MOST_HELD - 1, 128 * 2048, 1 << 27])
@pytest.mark.parametrize("seqlen", [1, 100, 2048])
def test_large_texts(tokens: int, seqlen: int) -> None:
    hold = HoldOut.of(tokens, seqlen)
    held = -(-tokens // hold.block) // hold.every * hold.block
    assert MOST_HELD * 0.9 <= held <= MOST_HELD * 9 / 8
    assert hold.block <= seqlen


# ---- a layer without a model


class Layer(NamedTuple):
    """Linears in the order of use, each with the name of its input; inputs (tokens, width)."""

    uses: dict[str, str]
    inputs: dict[str, torch.Tensor]
    split: int
    """Tokens in a batch."""

    def run(self, *watchers: Any) -> None:
        tokens = len(next(iter(self.inputs.values())))
        for begin in range(0, tokens, self.split):
            with torch.inference_mode():
                now = {k: x[begin : begin + self.split].clone()[None] for k, x in self.inputs.items()}
                for name, key in self.uses.items():
                    for watcher in watchers:
                        watcher.watch(name, now[key])
                for x in now.values():
                    x.zero_()  # as an activation function may, in place
            for watcher in watchers:
                watcher.end_batch()


USES = {"q": "x", "k": "x", "v": "x", "o": "y", "gate": "z", "up": "z", "down": "u"}
WIDTHS = {"x": 12, "y": 8, "z": 12, "u": 40}
TOKENS = SAMPLES * SEQLEN


def make_layer(
    uses: dict[str, str] | None = None, split: int = 32, dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> Layer:
    inputs = {k: normal(tokens, w, seed=i).to(dtype) for i, (k, w) in enumerate(WIDTHS.items())}
    return Layer(uses or USES, inputs, split)


class Gathering:
    """A LayerGrams at work on such a layer."""

    def __init__(self, layer: Layer, linears: list[str], room: int, folder: Path) -> None:
        self.layer, self.folder = layer, folder
        self.hold = HoldOut.of(len(layer.inputs["x"]), SEQLEN)
        self.during: list[Callable[[], None]] = []
        widths = {name: WIDTHS[layer.uses.get(name, "x")] for name in linears}
        self.grams = LayerGrams(widths, room, self.hold, folder, self.rerun)
        beside, stats = self.grams.first_pass(), Collector(lambda rows, total, squares: None)
        self.beside = beside is not None
        layer.run(*([stats, beside] if beside else [stats]))
        self.grams.gathered(beside, stats.groups)

    def rerun(self, make: Callable[[], GramCollector], _: Any) -> GramCollector:
        for look in self.during:
            look()
        make().watch("given up", torch.zeros(3, 3))  # an attempt that ran out of memory
        collector = make()
        self.layer.run(collector)
        return collector

    def check(self, name: str) -> Gram:
        """The Gram of a linear against float64."""
        gram, x = self.grams.take(name), self.layer.inputs[self.layer.uses[name]]
        out = torch.tensor(flags(self.hold, len(x)))
        assert gram.tokens == int((~out).sum()) and gram.held.dtype == x.dtype
        assert torch.equal(gram.held, x[out])
        rest = x[~out].double()
        assert gram.matrix.dtype == torch.float32
        torch.testing.assert_close(gram.matrix, (rest.T @ rest).float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(gram.matrix, gram.matrix.T.contiguous()) or gram.mapped
        torch.testing.assert_close(gram.diagonal, gram.matrix.diagonal())
        return gram


ALL = list(USES)
EVERYTHING = gram_bytes([WIDTHS[key] for key in USES.values()])
LARGEST = gram_bytes([40])
ROOMS = {"all at once": EVERYTHING, "almost all": EVERYTHING - 1, "one at a time": LARGEST, "panels": 4 * 40 * 7,
         "rows": 1}  # fmt: skip


@pytest.fixture(params=["plain", "in blocks"])
def _blocks(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in blocks of a few columns and rows, as those of wide layers."""
    if request.param == "in blocks":
        monkeypatch.setattr(grams_module, "_BLOCK", 3)
        monkeypatch.setattr(grams_module, "_ROWS", 5)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("split", [5, 32, 1000])
def test_however_they_are_gathered(tmp_path: Path, room: int, dtype: torch.dtype, split: int) -> None:
    gathering = Gathering(make_layer(split=split, dtype=dtype), ALL, room, tmp_path)
    assert gathering.beside == (room == EVERYTHING)
    for name in sorted(ALL):
        gram = gathering.check(name)
        assert (gram.mapped is not None) == (gram_bytes([len(gram.matrix)]) > room)
        gathering.grams.done(name)
    assert (gathering.grams.passes == 0) == (room == EVERYTHING)
    assert not list(tmp_path.iterdir())


def test_a_pass_more_changes_no_bit(tmp_path: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for room in (EVERYTHING, EVERYTHING - 1, LARGEST):
        gathering = Gathering(make_layer(), ALL, room, tmp_path)
        found.append({name: gathering.grams.take(name).matrix.clone() for name in sorted(ALL)})
    assert all(torch.equal(there[name], found[0][name]) for there in found for name in ALL)


def test_one_triangle_or_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels compute what the mirror image gives otherwise."""
    monkeypatch.setattr(grams_module, "_BLOCK", 3)
    whole, panels = (Gathering(make_layer(), ["down"], room, tmp_path).grams.take("down") for room in (LARGEST, 999))
    torch.testing.assert_close(whole.matrix, panels.matrix, rtol=1e-5, atol=1e-4)
    assert torch.equal(whole.held, panels.held) and whole.tokens == panels.tokens


@pytest.mark.parametrize("room", [EVERYTHING, LARGEST, 999])
def test_an_input_that_is_shared_counts_once(tmp_path: Path, room: int) -> None:
    gathering = Gathering(make_layer(), ALL, room, tmp_path)
    first = gathering.check("q")
    assert gathering.grams.take("k") is first and gathering.grams.take("v") is first
    assert gathering.grams.sharing("v") == ["q", "k", "v"] and gathering.grams.sharing("down") == ["down"]
    gathering.grams.done("q")
    assert gathering.grams.sharing("v") == ["k", "v"] and gathering.grams.take("v") is first


@pytest.mark.parametrize("room", [EVERYTHING, gram_bytes([12]), 200])
@pytest.mark.parametrize("linears", [["v"], ["k", "v"], ["v", "up"], ["q", "v", "o"]], ids=str)
def test_a_linear_that_stays_dense_may_lead(tmp_path: Path, room: int, linears: list[str]) -> None:
    gathering = Gathering(make_layer(), linears, room, tmp_path)
    for name in linears:
        gathering.check(name)
        gathering.grams.done(name)


@pytest.mark.parametrize("room", [EVERYTHING, gram_bytes([40, 12]), gram_bytes([12]), 200])
@pytest.mark.parametrize("linears", [["mlp", "qkv"], ["mlp", "qkv", "down"], ["mlp"]], ids=str)
def test_the_same_input_again_after_a_linear_that_stays_dense(tmp_path: Path, room: int, linears: list[str]) -> None:
    """Attention beside the MLP (Falcon, Phi, GPT-J): both are fed x, and another linear is called in between."""
    uses = {"qkv": "x", "out": "y", "mlp": "x", "down": "u"}
    gathering = Gathering(make_layer(uses), linears, room, tmp_path)
    for name in linears:
        gathering.check(name)
        gathering.grams.done(name)


def test_room_for_one(tmp_path: Path) -> None:
    """In the order of the shard (k, o, q, v), that of q is gathered twice; what nobody needs is let go of."""
    uses = {"q": "x", "k": "x", "v": "x", "o": "z"}
    gathering = Gathering(make_layer(uses), ["k", "o", "q", "v"], gram_bytes([12]), tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    gathering.during.append(lambda: (gc.collect(), alive_now.append(sum(r() is not None for r in alive)))[1])
    alive_now: list[int] = []
    passes = []
    for name in ("k", "o", "q", "v"):
        alive.append(weakref.ref(gathering.check(name).matrix))
        passes.append(gathering.grams.passes)
        gathering.grams.done(name)
    assert passes == [1, 2, 3, 3]
    assert alive_now == [0, 0, 0], "before another one is gathered, the last is gone"
    gc.collect()
    assert [r() for r in alive] == [None] * 4


def test_what_fits_comes_along(tmp_path: Path) -> None:
    gathering = Gathering(make_layer(), ALL, gram_bytes([40, 12]), tmp_path)
    for name in ("down", "gate", "up", "k", "q", "v", "o"):
        gathering.check(name)
        gathering.grams.done(name)
    assert gathering.grams.passes == 2  # down with q's, then gate's with o's; without room for sharing they are three


def test_a_gram_is_alive_while_its_linears_are(tmp_path: Path) -> None:
    gathering = Gathering(make_layer(), ALL, EVERYTHING, tmp_path)
    matrix = weakref.ref(gathering.grams.take("q").matrix)
    for name in ("k", "v"):
        gathering.grams.done(name)
        gram = gathering.grams.take("q")
        assert gathering.grams.holds(gram) and gram.matrix is matrix()
    gathering.grams.done("q")
    assert not gathering.grams.holds(gram)
    del gram
    gc.collect()
    assert matrix() is None


@pytest.mark.parametrize("room", [EVERYTHING, LARGEST, 200])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite(tmp_path: Path, room: int, bad: float) -> None:
    layer = make_layer()
    layer.inputs["u"][3, 5] = bad
    with pytest.raises(CheckpointError, match=r"input of down.*--dtype float32"):
        Gathering(layer, ALL, room, tmp_path).grams.take("down")


def test_a_linear_that_is_never_called(tmp_path: Path) -> None:
    gathering = Gathering(make_layer(), [*ALL, "expert"], EVERYTHING, tmp_path)
    for ask in (gathering.grams.take, gathering.grams.sharing):
        with pytest.raises(UsageError, match=r"expert was not used.*--skip"):
            ask("expert")


@pytest.mark.parametrize("tokens", [1, 2, 7, 8])
@pytest.mark.parametrize("room", [EVERYTHING, 200])
def test_hardly_any_text(tmp_path: Path, tokens: int, room: int) -> None:
    gathering = Gathering(make_layer(tokens=tokens), ALL, room, tmp_path)
    gram = gathering.check("down")
    assert gram.held.shape == (sum(flags(gathering.hold, tokens)), 40) and len(gram.held) <= tokens / 2
    gram.absorb_held_()
    assert gram.tokens == tokens


# ---- what a refit holds besides


@pytest.mark.parametrize("name", ["cg", "admm", "sparsegpt"])
def test_a_refit_lets_go_before_another_gram_is_gathered(tmp_path: Path, name: str) -> None:
    """There is room for one: neither it nor what was prepared from it may be held while the next one is made."""
    uses = {"q": "x", "k": "x", "v": "x", "o": "z"}
    gathering = Gathering(make_layer(uses), ["k", "o", "q", "v"], gram_bytes([12]), tmp_path)
    weights = {linear: normal(6, 12, seed=i) for i, linear in enumerate(uses)}
    seen: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def keep(linear: str, weight: torch.Tensor, share: float) -> torch.Tensor:
        return weight.abs() >= weight.abs().quantile(0.5 * share, dim=1, keepdim=True)

    def sample(linear: str) -> Sample:
        return Sample(weights[linear], weights[linear] * keep(linear, weights[linear], 1.0))

    work = LayerRefit(Refit(name, "auto"), lambda linear: Amount(0.5), gathering.grams, keep, None)
    gathering.during.append(lambda: left.append((gc.collect(), sum(r() is not None for r in seen))[1]))
    for linear in ("k", "o", "q", "v"):
        outcome = work.begin(linear, sample)
        gram = weakref.ref(gathering.grams.take(linear).matrix)
        if not any(r() is gram() for r in seen):
            seen.append(gram)
        fitted = work.rows(linear, 0, *sample(linear)[:2], outcome)
        assert fitted.shape == (6, 12) and outcome.refit <= outcome.mask < outcome.whole
        work.done(linear)
    assert left == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A row that is not better than its mask keeps it, and nothing becomes −0.0."""
    gathering = Gathering(make_layer(), ["q"], EVERYTHING, tmp_path)
    weight = normal(6, 12).to(dtype)
    masked = torch.where(weight.abs() > 0.7, weight, 0.0)
    fitted = torch.where(masked == 0, -1e-30 if dtype == torch.bfloat16 else -1e-10, weight.float())
    fitted[1] = float("nan")
    fitted[2, 3] = 1e30
    fitted[3, 3] = float("-inf")
    fitted[4] = 3 * weight[4]
    fitted[5] = weight[5] * 0.999
    method = Method(
        1.0, (), lambda gram, damping, ranks: Prepared(None, damping), lambda *args: fitted.clone(), 0, False
    )
    monkeypatch.setitem(METHODS, "cg", method)
    work = LayerRefit(Refit("cg", "1.0"), lambda linear: Amount(0.5), gathering.grams, lambda *args: masked != 0, None)
    outcome = Outcome(Choice(Damping(1.0), None, None), Damping(1.0))
    gathering.grams.take("q").absorb_held_()
    found = work.rows("q", 0, weight, masked, outcome)
    assert found.dtype == dtype and torch.equal(found[1:5], masked[1:5])
    assert torch.equal(found[0], masked[0] if dtype == torch.float16 else fitted[0].to(dtype))
    assert not bool(torch.signbit(found[found == 0]).any())
    assert torch.equal(found[5], fitted[5].to(dtype))
    assert outcome.rows_left == 4 and outcome.report()["rows_not_refitted"] == 4
    x = gathering.layer.inputs["x"].double()
    for got, values in ((outcome.refit, found), (outcome.mask, masked), (outcome.whole, torch.zeros(6, 12))):
        assert got == pytest.approx(float((x @ (weight.double() - values.double()).T).square().sum()), rel=1e-4)


@pytest.mark.parametrize(("damping", "failed"), [("1e-9", True), ("0.1", False)])
def test_a_damping_that_had_to_be_larger_is_reported(tmp_path: Path, damping: str, failed: bool) -> None:
    """Fewer tokens than features: there is no factor with hardly any damping."""
    gathering = Gathering(make_layer(tokens=8), ["down"], EVERYTHING, tmp_path)
    weight = normal(5, 40)

    def sample(linear: str) -> Sample:
        return Sample(weight, torch.where(weight.abs() > 0.7, weight, 0.0))

    work = LayerRefit(
        Refit("sparsegpt", damping), lambda linear: Amount(0.5), gathering.grams, lambda *args: weight.abs() > 0.7, None
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamprune.pruning.refit.choose", lambda *args: {"down": Choice(args[-1][0], None, None)})
        report = work.begin("down", sample).report()
    assert ("damping_asked" in report) == failed
    assert report["damping"] > float(damping) == report["damping_asked"] if failed else report["damping"] == 0.1


# ---- room


@pytest.mark.parametrize("max_vram", [1 << 31, (1 << 30) + (200 << 20), 950 << 20])
def test_room_on_a_device(models: Callable[..., Path], max_vram: int) -> None:
    """All of it where it fits, then half, then the least; and never more than there is."""
    skeleton = build_skeleton(open_checkpoint(models("llama", 2)), torch.float32)
    needs = RefitNeeds(most=500 << 20, least=10 << 20, held=1 << 20, working=20 << 20)
    sizes = (skeleton, 16, 4, torch.float32, torch.device("xpu"), None)
    found = layout_for(*sizes, max_vram, refit=needs)
    assert found.room == {1 << 31: 500 << 20, (1 << 30) + (200 << 20): 255 << 20, 950 << 20: 10 << 20}[max_vram]
    assert found.nbytes <= max_vram and layout_for(*sizes, max_vram).room == 0
    with pytest.raises(ResourceError, match="--max-vram"):
        layout_for(*sizes, 900 << 20, refit=needs)


def test_room_is_what_one_sample_leaves() -> None:
    budget = Budget(base=100, reserve=10, stage=50, per_sample=7)
    needs = RefitNeeds(most=1000, least=30, held=20, working=40)
    assert _room(budget, None, 5000) == 0
    for limit in range(0, 2000, 13):
        room = _room(budget, needs, limit)
        assert 30 <= room <= 1000
        assert room == 30 or budget.refitting(needs, room).peak(1) <= limit
        assert room == 1000 or budget.refitting(needs, room + 1).peak(1) > limit


# ---- a real layer


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_a_real_layer(models: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """All in one pass against float64, and who shares with whom."""
    checkpoint = open_checkpoint(models(kind, dtype="float32"))
    skeleton = build_skeleton(checkpoint, torch.float32)
    ids = torch.randint(0, 199, (4, 16), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, list[torch.Tensor]] = {}
    with ShardMaps(checkpoint) as maps, WeightLoader(maps, torch.device("cpu")) as loader:
        streamed = StreamedModel(skeleton, loader, torch.float32)
        states = list(streamed.embed([ids[:3], ids[3:]]))
        stage = skeleton.layer_stages[0]
        linears = {name: 4 * 32 if name.endswith(("4h_to_h", "mlp.c_proj")) else 32 for name in stage.linears}
        if kind == "llama":
            linears |= {name: 64 for name in linears if "down" in name}
        hold = HoldOut.of(64, 16)
        grams = LayerGrams(linears, 1 << 30, hold, tmp_path, lambda make, _: pytest.fail("one pass is enough"))
        beside, stats = grams.first_pass(), Collector(lambda rows, total, squares: None)
        assert beside is not None

        def watch(name: str, x: torch.Tensor) -> None:
            inputs.setdefault(name, []).append(x.double().flatten(0, -2))
            stats.watch(name, x)
            beside.watch(name, x)

        with streamed.layer(stage, watch=watch) as run:
            for batch in states:
                run(batch)
                stats.end_batch()
                beside.end_batch()
    grams.gathered(beside, stats.groups)
    out = torch.tensor(flags(hold, 64))
    sizes = sorted(len(grams.sharing(name)) for name in linears)
    assert sizes == {"llama": [1, 1, 2, 2, 3, 3, 3], "gpt2": [1] * 4, "falcon": [1] * 4}[kind]
    for name in linears:
        x, gram = torch.cat(inputs[name]), grams.take(name)
        torch.testing.assert_close(gram.matrix.double(), x[~out].T @ x[~out], rtol=1e-4, atol=1e-4)
        assert torch.equal(gram.held.double(), x[out])
