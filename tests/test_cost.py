"""The time estimates of `plan`, for a machine with round speeds; and that measuring a real machine stays cheap.

No time is asserted: what is measured is only seen to be there.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, plan
from torch.utils._python_dispatch import TorchDispatchMode

from streamprune.calibration.statistics import StatisticsFile
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import UsageError
from streamprune.model import budget
from streamprune.model.blank_layer import LAYER_BYTES, BlankLayer, window_size
from streamprune.model.skeleton import build_skeleton
from streamprune.planning import speeds as measuring
from streamprune.planning.cost import PER_BATCH, PER_COLUMN, PER_LEARNT, PER_STEP, stage_seconds
from streamprune.planning.ranks import RanksPlan, with_ranks
from streamprune.planning.refit_cost import RefitWork
from streamprune.planning.refits import inputs_shared
from streamprune.planning.work import RunShape, Speeds, Split, StageWork
from streamprune.tables import plan_table

Models = Callable[..., Path]
KINDS = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "falcon"]
EAGER = {"bloom", "gemma2"}
GIGA = Speeds(
    products=1e12, float32=1e11, attention=1e12, elementwise=1e10, embedding=1e10, statistics=1e10, selection=1e9,
    scanning=1e10, hashing=4e9, reading=1e9, writing=1e9, link=1e10, loading=0.0,
)  # fmt: skip
"""A machine with round speeds."""
LAYER = StageWork("layer", 10**9, 9 * 10**8, 10**9, 10**8, 10**6, 10**5)
WORKS = (
    StageWork("embed", 10**8, 0, 0, 0, 0, 0),
    LAYER,
    replace(LAYER, last=True),
    StageWork("head", 10**8, 0, 0, 0, 0, 0),
)
COURSE = RunShape(tokens=10**5, batches=50, groups=50, forwards=1, state_bytes=8192, threads=2)


def total(run: RunShape, speeds: Speeds = GIGA, works: tuple[StageWork, ...] = WORKS) -> float:
    return sum(stage_seconds(works, run, speeds), Split()).total


def test_a_layer_is_its_parts() -> None:
    layer = stage_seconds(WORKS, COURSE, GIGA)[2]
    assert layer.forward == pytest.approx(1e5 * (1e9 / 1e12 + 1e8 / 1e12 + 1e6 / 1e10) + 50 * PER_BATCH)
    assert layer.statistics == pytest.approx(1e5 * 1e5 / 1e10)
    assert layer.selection == pytest.approx(2 * 1e9 / 1e10 + 9e8 / 1e9)  # checked twice, pruned once
    assert layer.total == pytest.approx(layer.forward + layer.statistics + layer.selection + layer.disk)
    assert 0 < layer.disk < 0.2  # reading overlaps with the pass before, writing with pruning


def test_tuning_is_passes_and_steps() -> None:
    """Of the last layer, too, which has no outputs that are needed. A step moves what Adam keeps of each weight."""
    learning = tuple(replace(work, learnt=10**7) if work.kind == "layer" else work for work in WORKS)
    plain, tuned = (
        stage_seconds(learning, replace(COURSE, forwards=1 + n, tuning=n, steps=m), GIGA) for n, m in ((0, 0), (36, 50))
    )
    a_pass = plain[1].forward
    for before, after in zip(plain[1:3], tuned[1:3], strict=True):
        assert after.forward == before.forward == a_pass and not before.tuning
        assert after.tuning == pytest.approx(36 * a_pass + 50 * (PER_STEP + 1e7 * PER_LEARNT / 1e10))
    mixture = replace(LAYER, learnt=10**6, learnt_apart=10**8, experts=8)
    run = replace(COURSE, forwards=37, tuning=36, steps=50, steps_apart=9)
    steps = 50 * (PER_STEP + 1e6 * PER_LEARNT / 1e10) + 9 * (8 * PER_STEP + 1e8 * PER_LEARNT / 1e10)
    assert stage_seconds((WORKS[0], mixture), run, GIGA)[1].tuning == pytest.approx(36 * a_pass + steps)


def test_planned_time_is_made_of_given_speeds(models: Models) -> None:
    found = plan(models(), samples=8, seqlen=32, speeds=GIGA)
    again = plan(models(), samples=8, seqlen=32, speeds=GIGA)
    assert found.stages == again.stages and found.rests_on.startswith("given: matrix products 1000 GFLOP/s")
    assert found.seconds == pytest.approx(found.split.total)
    more = plan(models(), samples=8, seqlen=32, speeds=replace(GIGA, loading=0.7))
    assert more.seconds - found.seconds == pytest.approx(0.7)


@pytest.mark.parametrize(
    "how", [{}, {"tokens": 0}, {"forwards": 2}, {"on_device": True, "layers": 3, "resident": True}]
)
@pytest.mark.parametrize("name", [f.name for f in fields(Speeds)])
def test_slower_is_never_sooner(name: str, how: dict[str, Any]) -> None:
    run = replace(COURSE, **how)
    times = [total(run, replace(GIGA, **{name: getattr(GIGA, name) * f})) for f in (4, 2, 1, 0.5, 0.01, 1e-4)]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(times)) or name == "loading"
    needed = {"link": run.on_device, "float32": False, "hashing": True, "loading": False}.get(name, bool(run.tokens))
    needed |= name in ("selection", "reading", "writing", "scanning")
    assert (times[-1] > 1.5 * times[0]) == needed, "what is used matters, what is not does not"


@pytest.mark.parametrize("how", [{}, {"on_device": True, "layers": 2}, {"on_device": True, "layers": 3}])
def test_a_refit_adds_its_own_time(how: dict[str, Any]) -> None:
    """A refit's time is added to the layers that have one, and changes only their disk time, which it overlaps with."""
    work = replace(LAYER, refit=RefitWork(2, 4e12, 3e12, 1e10, 2e9, 10**5))
    run = replace(COURSE, **how)
    for speeds, more in ((GIGA, 0.0), (replace(GIGA, float32=5e10), 40.0)):
        plain = stage_seconds(WORKS, run, speeds)[1]
        found = stage_seconds((WORKS[0], work, *WORKS[2:]), run, speeds)[1]
        refit = 2 * plain.forward + 40 + more + 3 + 1 + 2 + 10**5 * PER_COLUMN
        assert plain.refit == 0 and found.refit == pytest.approx(refit)
        assert (found.forward, found.statistics) == (plain.forward, plain.statistics)
        assert found.selection == plain.selection and found.disk <= plain.disk
        assert found.total - plain.total == pytest.approx(found.refit, abs=plain.disk + 1e-9)


def test_more_work_takes_longer() -> None:
    base = total(COURSE)
    assert total(replace(COURSE, tokens=2 * 10**5, batches=100)) > 1.8 * base - 5
    assert total(replace(COURSE, forwards=2)) > 1.3 * base
    assert total(replace(COURSE, tokens=0)) < base / 10
    assert total(COURSE, works=(*WORKS[:2], *WORKS[1:])) - base == pytest.approx(
        stage_seconds(WORKS, COURSE, GIGA)[1].total, rel=0.05
    )


def test_reading_hides_behind_the_pass_before() -> None:
    """Layer 1 is read during layer 0's pass of 120 s: 1 GB fits into that at 20 MB/s, not at 2 MB/s."""
    times = [stage_seconds(WORKS, COURSE, replace(GIGA, reading=r))[2].disk for r in (1e9, 2e7, 2e6)]
    assert times[0] == pytest.approx(times[1])
    passed = stage_seconds(WORKS, COURSE, GIGA)[1]
    assert times[2] - times[0] == pytest.approx(500 - (passed.total - passed.disk), rel=0.01)


def test_without_a_pass_the_slowest_counts() -> None:
    """A stage takes the larger of reading and writing on one disk, and of pruning with hashing on one of two cores."""
    run = replace(COURSE, tokens=0)

    def layer(**speeds: float) -> float:
        return stage_seconds(WORKS, run, replace(GIGA, **speeds))[1].total

    assert layer(reading=1e8, writing=2e8) == pytest.approx(10 + 5, rel=0.01)
    assert layer(selection=1e8) == pytest.approx(9 + 0.1 + 0.25 / 2, rel=0.01)
    assert layer(hashing=1e8) == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("slow", ["link", "reading", "writing", "selection", "hashing"])
def test_a_device_overlaps_what_fits(slow: str) -> None:
    speeds = replace(GIGA, products=1e13, **{slow: 2e8})
    three, two, one = (total(replace(COURSE, on_device=True, resident=True, layers=n), speeds) for n in (3, 2, 1))
    assert three <= two <= one and three < one
    away = total(replace(COURSE, on_device=True, resident=False, layers=3), speeds)
    assert away > three, "activations that do not stay there go to the disk"


def test_attention_of_its_own() -> None:
    """Recovers a and b of the seconds a + b · length from measurements at two lengths."""
    a, b = 2e-6, 3e-9
    whole, half = (replace(GIGA, elementwise=LAYER.traffic / (a + b * n), attention=math.inf) for n in (256, 128))
    found = measuring.growing(whole, half, 256, LAYER, 2048)
    assert LAYER.traffic / found.elementwise == pytest.approx(a)
    assert LAYER.attention / found.attention == pytest.approx(b * 2048)
    assert measuring.growing(whole, whole, 256, LAYER, 2048) == whole


def test_clock() -> None:
    """The median of all calls but the first, whose extra time counts as loading."""
    times = iter([0.0, 5.0, 10.0, 11.0, 20.0, 21.0])
    clock = measuring.Clock(torch.device("cpu"), lambda: next(times, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_SECONDS", 0.0)
        assert clock.typical(lambda: None, loads=True) == 1.0
    assert clock.loading == 4.0


@pytest.mark.parametrize("kind", KINDS)
def test_every_speed_is_measured(
    models: Models, text: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also, the layer without weights has as many inputs as a real one, with the same widths."""
    seen: list[Speeds] = []
    widths: list[list[int]] = []
    statistics = measuring._statistics

    def measure(*args: Any, **how: Any) -> Speeds:
        seen.append(measuring.measure(*args, **how))
        return seen[-1]

    def gathered(found: list[int], *args: Any) -> float:
        widths.append(list(found))
        return statistics(found, *args)

    monkeypatch.setattr("streamprune.planning.plan.measure", measure)
    monkeypatch.setattr(measuring, "_statistics", gathered)
    monkeypatch.setattr(ShardMaps, "tensor", None)  # weights are read only to measure the disk
    plan(models(kind), samples=4, seqlen=32)
    slow = {f.name: getattr(seen[0], f.name) for f in fields(Speeds)}
    infinite = {name for name, speed in slow.items() if not 0 < speed < math.inf}
    assert infinite <= {"link", "loading", "attention", "float32"}
    assert math.isfinite(slow["attention"]) == (kind not in EAGER)
    assert slow["float32"] == math.inf, "no refit, and nothing measured for it"
    plan(models(kind), refit="cg", samples=4, seqlen=32, only=r"\.1\.")
    assert 0 < seen[1].float32 < math.inf
    monkeypatch.undo()
    calibrate(models(kind), tmp_path / "stats", calib=text, samples=2, seqlen=32)
    file = StatisticsFile(tmp_path / "stats")
    leaders = {leader for name, leader in file.groups.items() if ".0." in name}
    checkpoint = open_checkpoint(models(kind))
    shared = inputs_shared(checkpoint, build_skeleton(checkpoint, torch.bfloat16), torch.bfloat16, 16)
    assert sorted(shared.items()) == sorted(
        tuple(n.partition(".0")[2] for n in pair) for pair in file.groups.items() if ".0." in pair[0]
    )
    assert sorted(widths[0]) == sorted(file.refs[f"{leader}.sum"].shape[0] for leader in leaders)


def huge(folder: Path) -> Path:
    """A checkpoint with a 70B model's widths in sparse files, which take no space on disk."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "vocab_size": 32000,
        "intermediate_size": 28672, "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (32000, 8192), "lm_head.weight": (32000, 8192), "model.norm.weight": (8192,)}
    for i in range(2):
        for name, shape in {
            "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
            "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
            "mlp.down_proj": (8192, 28672), "input_layernorm": (8192,), "post_attention_layernorm": (8192,),
        }.items():  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(len(data).to_bytes(8, "little") + data)
        f.truncate(8 + len(data) + at)
    return folder


class Largest(TorchDispatchMode):
    """The largest memory of a tensor, and the operations of all products."""

    nbytes, operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else []:
            if tensor.device.type != "meta":
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.linear.default):
            self.operations = max(self.operations, 2 * args[0].numel() * args[1].numel() // args[0].shape[-1])
        return out


def test_measuring_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a 70B model's layer (1.6 GiB and three windows of activations), only small parts are measured."""
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    monkeypatch.setattr(
        "streamprune.model.budget.available_bytes", lambda: None
    )  # does not depend on what else runs here
    largest = Largest()

    def measure(*args: Any, **how: Any) -> Speeds:
        with largest:
            return measuring.measure(*args, **how)

    monkeypatch.setattr("streamprune.planning.plan.measure", measure)
    found = plan(huge(tmp_path / "model"), method="obs-admm", samples=4, seqlen=2048)
    assert found.stages[1].nbytes > 1600 << 20
    assert 1 << 20 < largest.nbytes <= 160 << 20
    assert 1e8 < largest.operations <= 2.4e10
    for rows, width in ((8192, 28672), (28672, 8192), (10**6, 10**6), (16, 16)):
        few, some = measuring.product_size(rows, width, 2048, "cpu")
        assert 1 <= few <= 2048 and 1 <= some <= rows and few * some * width <= 1.2e10
        assert few * width * 4 <= 128 << 20 and some * width * 4 <= 512 << 20
    assert measuring.product_size(256, 256, 2048, "cpu") == (2048, 256), "small ones are measured whole"


def test_window(models: Models) -> None:
    """Windows as in the job if they fit into memory, fewer or shorter ones if not."""
    skeleton = build_skeleton(open_checkpoint(models()), torch.bfloat16)
    assert window_size(skeleton, 5, 32, torch.bfloat16, "cpu") == (5, 32)
    windows, length = window_size(skeleton, 10**6, 32, torch.bfloat16, "cpu")
    assert length == 32 and 1 < windows < 10**6
    assert window_size(skeleton, 3, 10**6, torch.bfloat16, "cpu")[0] == 1
    assert window_size(skeleton, 3, 10**6, torch.bfloat16, "cpu")[1] * 900 <= LAYER_BYTES["cpu"]


def test_hollow_layer_does_not_touch_weights(models: Models) -> None:
    """The layer without weights produces finite states of the right shape."""
    checkpoint = open_checkpoint(models())
    skeleton = build_skeleton(checkpoint, torch.bfloat16)
    layer = BlankLayer(checkpoint, skeleton, torch.bfloat16, torch.device("cpu"), 2, 16)
    layer.embed()
    assert layer.states.shape == (2, 16, 32) and layer.tokens == 32 and not bool(layer.states.any())
    with layer.ready() as run:
        run()
        run()
    assert layer.widths == [32, 32, 32, 64]  # of q, k and v; of o; of gate and up; of down
    assert layer.called is not None and layer.called.query == (2, 4, 16, 8) and layer.called.key[1] in (2, 4)


def test_several_ranks(models: Models) -> None:
    """Windows are dealt batch by batch; pruning and writing are not."""
    given: dict[str, Any] = {"samples": 10 * budget.BATCH_TOKENS // 32, "seqlen": 32, "speeds": GIGA}
    alone, four = plan(models(), **given), plan(models(), nproc=4, **given)
    assert alone.shared is None and "shared" not in alone.to_json()
    shared = four.shared
    assert shared is not None and four.split == alone.split and shared.ranks == 4
    assert shared.split.forward == pytest.approx(0.3 * alone.split.forward), "three of ten batches"
    assert shared.split.statistics == pytest.approx(0.3 * alone.split.statistics)
    assert shared.split.selection == alone.split.selection and shared.split.disk == alone.split.disk
    assert shared.cache_bytes == round(0.3 * alone.cache_bytes) and shared.bound == "disk"
    assert "4 ranks     about" in plan_table(four) and four.to_json()["shared"]["ranks"] == 4
    refitted = plan(models(), nproc=2, method="obs-admm", pattern="2:4", **given)
    assert refitted.shared is not None
    assert refitted.shared.split.refit == pytest.approx(0.5 * refitted.split.refit)
    slow = plan(models(), nproc=4, **given | {"speeds": replace(GIGA, products=1e9)})
    assert slow.shared is not None and slow.shared.bound == "windows"
    with pytest.raises(UsageError, match="--nproc 11: there are 10 batches to share out"):
        plan(models(), nproc=11, **given)
    with pytest.raises(UsageError, match="--nproc must be at least 1"):
        plan(models(), nproc=0, **given)


def test_what_binds_several_ranks() -> None:
    """Experts are refitted one at a time; rank 0 tunes; shards are dealt whole, and have one disk."""

    def shared(
        run: RunShape, works: tuple[StageWork, ...] = WORKS, *, ranks: int, shards: int = 4, speeds: Speeds = GIGA
    ) -> RanksPlan:
        split = sum(stage_seconds(works, run, speeds), Split())
        return with_ranks(ranks, run, works, split, 10**6, 6, shards, speeds)

    experts = tuple(replace(work, refit=RefitWork(float32=4e15, apart=3e15)) for work in WORKS)
    one, four = shared(COURSE, experts, ranks=1), shared(COURSE, experts, ranks=4)
    assert one.parts["experts"] == pytest.approx(3 * one.parts["refits"])
    assert four.parts["experts"] == pytest.approx(one.parts["experts"] / 3), "six experts in two rounds"
    assert four.parts["refits"] == pytest.approx(one.parts["refits"] * 0.26), "13 of 50 batches"
    assert four.bound == "experts"
    tuned = replace(COURSE, forwards=37, tuning=36, groups=48)
    one, four = shared(tuned, ranks=1), shared(tuned, ranks=4)
    assert one.parts["tuning"] == four.parts["tuning"] and four.bound == "tuning" and four.cache_bytes > 10**6
    assert four.split.forward == pytest.approx(one.split.forward / 4)
    copied = replace(COURSE, tokens=0, batches=0, groups=0, forwards=1)
    one, two, three = (shared(copied, ranks=ranks) for ranks in (1, 2, 3))
    assert two.parts["masks"] == pytest.approx(one.parts["masks"] / 2) and three.parts == two.parts, "four shards"
    assert one.bound == two.bound == "disk" and two.seconds == pytest.approx(one.seconds), "there is one disk"
    quick = replace(GIGA, reading=1e12, writing=1e12)
    one, two = (shared(copied, ranks=ranks, speeds=quick) for ranks in (1, 2))
    assert one.bound == "masks" and 0.5 * one.seconds < two.seconds < 0.6 * one.seconds
    assert shared(copied, ranks=2, shards=1, speeds=quick).parts == one.parts
