"""Statistics files: the same from every command that makes one, as good as a calibration, refused when damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streamprune.calibration.collector import Collector
from streamprune.calibration.statistics import StatisticsFile, merge_statistics, write_statistics
from streamprune.calibration.statistics_header import _data_digest
from streamprune.disk.header import read_shard
from streamprune.disk.state import partial_of
from streamprune.errors import CheckpointError, CorruptStateError, StateError, UsageError
from streamprune.kernels import cpu
from streamprune.methods.stats import InputStats

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def how(text: Path) -> dict[str, Any]:
    return {"calib": text, "samples": 5, "seqlen": 24, "seed": 2}


@pytest.fixture(scope="module")
def given(models: Models, how: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the llama, by `calibrate`. Do not write there."""
    path = tmp_path_factory.mktemp("given") / "stats.safetensors"
    calibrate(models("llama"), path, **how)
    return path


def parts(path: Path) -> tuple[dict[str, str], bytes]:
    """A safetensors file's metadata, and its header without them with all data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    return metadata, json.dumps(header).encode() + data[8 + length :]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prune_saves_what_calibrate_gathers(models: Models, how: dict[str, Any], tmp_path: Path, kind: str) -> None:
    """The same tensors, bit by bit; `calibrate` adds the job that made them, to recognise it when it runs again."""
    calibrate(models(kind), tmp_path / "a", **how)
    prune(models(kind), tmp_path / "out", sparsity=0.9, save_stats=tmp_path / "b", **how)
    prune(models(kind), tmp_path / "out2", pattern="1:4", save_stats=tmp_path / "c", method="magnitude", **how)
    (a, a_data), (b, b_data), (c, c_data) = (parts(tmp_path / n) for n in "abc")
    assert a_data == b_data == c_data
    calibration = json.loads(a.pop("calibration"))
    assert calibration.pop("job")["verb"] == "calibrate" and calibration.pop("content")
    assert calibration == json.loads(b.pop("calibration")) == json.loads(c.pop("calibration"))
    assert a == b == c


def test_calibrate_twice(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    first = calibrate(models("llama"), tmp_path / "a", **how)
    assert (first.status, first.recipe, first.out) == ("done", None, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    calibrate(models("llama"), tmp_path / "b", **how)
    assert (tmp_path / "b").read_bytes() == data
    again = calibrate(models("llama"), tmp_path / "a", **how)
    assert again.status == "up-to-date" and (tmp_path / "a").read_bytes() == data
    with pytest.raises(StateError, match="samples is 5 there and 6 here"):
        calibrate(models("llama"), tmp_path / "a", **{**how, "samples": 6})
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_calibrate_does_not_overwrite(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder").mkdir()
    prune(models("llama"), tmp_path / "out", sparsity=0.5, save_stats=tmp_path / "saved", **how)
    for name in ("notes", "folder", "saved"):
        with pytest.raises(StateError, match=name):
            calibrate(models("llama"), tmp_path / name, **how)
    assert (tmp_path / "notes").read_text() == "mine"


AMOUNTS = [
    {"sparsity": 0.5},
    {"pattern": "2:4"},
    {"sparsity": 0.5, "method": "wanda", "skip": "down"},
    {"sparsity": 0.5, "score": "lscore-isotropic", "selector": "exact", "only": "mlp"},
]


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_as_good_as_calibrating(
    models: Models, how: dict[str, Any], given: Path, tmp_path: Path, amount: dict[str, Any]
) -> None:
    """Byte-identical in all but the report."""
    prune(models("llama"), tmp_path / "a", **amount, **how)
    result = prune(models("llama"), tmp_path / "b", stats=given, **amount)
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    reports = [json.loads(f.pop("streamprune.json")) for f in (a, b)]
    assert a == b
    assert reports[0]["linears"] == reports[1]["linears"] == result.report["linears"]
    assert reports[1]["calibration"]["samples"] == 5
    assert reports[1]["job"]["stats"] and not reports[0]["job"]["stats"]
    assert prune(models("llama"), tmp_path / "b", stats=given, **amount).status == "up-to-date"


def test_a_copy_of_the_model_will_do(models: Models, given: Path, tmp_path: Path) -> None:
    """Statistics belong to the weights, not to a folder or a time."""
    copy = Path(shutil.copytree(models("llama"), tmp_path / "copy"))
    shutil.copy(copy / "model.safetensors", tmp_path / "fresh")  # another mtime
    (tmp_path / "fresh").replace(copy / "model.safetensors")
    assert prune(copy, tmp_path / "out", stats=given, sparsity=0.5).status == "done"


def test_of_another_model(models: Models, given: Path, tmp_path: Path) -> None:
    """Another architecture, another dtype, or the same shapes with other weights."""
    tuned = Path(shutil.copytree(models("llama"), tmp_path / "tuned"))
    tensors = {n: t * 1.5 for n, t in load_file(tuned / "model.safetensors").items()}
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    for source in (models("gpt2"), models("llama", dtype="float32"), models("llama", layers=2), tuned):
        with pytest.raises(UsageError, match=r"another model.*calibrate"):
            prune(source, tmp_path / "out", stats=given, sparsity=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"tuned"}


def test_what_does_not_go_together(models: Models, given: Path, text: Path, tmp_path: Path) -> None:
    for more in ({"calib": text}, {"save_stats": tmp_path / "s"}, {"propagate": "pruned"}):
        with pytest.raises(UsageError, match="--stats"):
            prune(models("llama"), tmp_path / "out", stats=given, sparsity=0.5, **more)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"leave out --expert-stats and --expert-tokens, which `calibrate` takes"):
        prune(models("llama"), tmp_path / "out", stats=given, sparsity=0.5, expert_tokens=3)
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="--stats"):
            prune(models("llama"), tmp_path / "out", stats=bad, sparsity=0.5)


def test_save_stats_names_a_place(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    for place in (tmp_path, tmp_path / "no" / "s", tmp_path / "out" / "s", model / "s"):
        with pytest.raises(UsageError, match="--save-stats"):
            prune(model, tmp_path / "out", sparsity=0.5, save_stats=place, **how)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    prune(model, tmp_path / "out", sparsity=0.5, save_stats=tmp_path / "s", **how)
    (tmp_path / "s").unlink()
    with pytest.raises(UsageError, match="calibrate"):
        prune(model, tmp_path / "out", sparsity=0.5, save_stats=tmp_path / "s", **how)


def test_statistics_that_are_not_the_jobs_are_neither_replaced_nor_taken_for_its_own(
    models: Models, how: dict[str, Any], given: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UsageError, match="is not a statistics file"):
        prune(models("llama"), tmp_path / "out", sparsity=0.5, save_stats=tmp_path / "mine", **how)
    assert {p.name for p in tmp_path.iterdir()} == {"mine"} and (tmp_path / "mine").read_text() == "precious"
    job = {"sparsity": 0.5, **how, "seed": 1}
    out = prune(models("llama"), tmp_path / "out", save_stats=tmp_path / "s", **job).out
    for place in (out, partial_of(out)):  # finished, and all but renamed
        out.rename(place)
        for dry in (True, False):
            with pytest.raises(UsageError, match=r"finished, and .* holds statistics of another job"):
                prune(models("llama"), out, save_stats=given, dry_run=dry, **job)
    assert prune(models("llama"), out, save_stats=tmp_path / "s", **job).status == "done"


def test_flags_that_make_no_difference_are_named(
    models: Models, given: Path, how: dict[str, Any], tmp_path: Path
) -> None:
    notes = prune(models("llama"), tmp_path / "0", stats=given, sparsity=0.5, samples=5, seqlen=24, seed=2).notes
    assert notes == ("--stats are finished statistics, so that --samples, --seqlen and --seed made no difference",)
    more = how | {"samples": 128, "expert_tokens": 3}
    notes = prune(models("llama"), tmp_path / "a", sparsity=0.5, method="magnitude", **more).notes
    assert notes == ("magnitude needs no calibration, so that --calib, --seqlen, --seed and --expert-tokens made no "
                     "difference",)  # fmt: skip
    notes = prune(models("llama", 2), tmp_path / "b", sparsity=0.5, **how, expert_tokens=3).notes
    assert "the model has no experts, so that --expert-tokens made no difference" in notes
    assert prune(models("llama", 2), tmp_path / "c", sparsity=0.5, method="magnitude").notes == ()


def test_shared_inputs_are_stored_once(given: Path) -> None:
    file = StatisticsFile(given)
    layer = "model.layers.1"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    assert {n: g for n, g in file.groups.items() if n.startswith(layer)} == {
        f"{attention}.q_proj": f"{attention}.q_proj",
        f"{attention}.k_proj": f"{attention}.q_proj",
        f"{attention}.v_proj": f"{attention}.q_proj",
        f"{attention}.o_proj": f"{attention}.o_proj",
        f"{mlp}.gate_proj": f"{mlp}.gate_proj",
        f"{mlp}.up_proj": f"{mlp}.gate_proj",
        f"{mlp}.down_proj": f"{mlp}.down_proj",
    }
    with safe_open(given, framework="pt") as f:
        leaders = {n.rpartition(".")[0] for n in f.keys() if n.startswith(layer)}  # noqa: SIM118
        assert f.get_tensor(f"{attention}.q_proj.sumsq").dtype == torch.float64
        assert int(f.get_tensor(f"{attention}.q_proj.tokens")) == 5 * 24
    assert leaders == {f"{attention}.q_proj", f"{attention}.o_proj", f"{mlp}.gate_proj", f"{mlp}.down_proj"}
    q, k = (file.load(f"{attention}.{n}_proj", 32) for n in "qk")
    assert (q.sumsq == k.sumsq).all() and q.tokens == k.tokens
    with pytest.raises(UsageError, match="inputs"):
        file.load(f"{attention}.q_proj", 33)
    with pytest.raises(UsageError, match="no statistics of nobody"):
        file.load("nobody", 32)


# ---- damage


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of a safetensors file; its data stay."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _meta(key: str, value: str | None) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        if value is None:
            del header["__metadata__"][key]
        else:
            header["__metadata__"][key] = value

    return change


def _dtype(header: dict[str, Any]) -> None:
    header["model.layers.0.self_attn.q_proj.sum"] |= {"dtype": "F32", "shape": [64]}


def _tokens_dtype(header: dict[str, Any]) -> None:
    header["model.layers.0.self_attn.q_proj.tokens"] |= {"dtype": "F32", "shape": [2]}


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": _meta("format", "something else"),
    "no format": _meta("format", None),
    "newer version": _meta("version", "2"),
    "no version": _meta("version", None),
    "no groups": _meta("groups", None),
    "groups are no JSON": _meta("groups", "{"),
    "groups are a list": _meta("groups", "[]"),
    "no model": _meta("model", None),
    "calibration is a list": _meta("calibration", "[1]"),
    "metadata gone": lambda header: header.pop("__metadata__"),
    "sums of float32": _dtype,
    "tokens of float32": _tokens_dtype,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_headers(models: Models, given: Path, tmp_path: Path, damage: str) -> None:
    path = Path(shutil.copy(given, tmp_path / "s"))
    rewrite(path, DAMAGES[damage])
    with pytest.raises(CorruptStateError, match="calibrate"):
        prune(models("llama"), tmp_path / "out", stats=path, sparsity=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"s"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_damaged_sums(models: Models, given: Path, tmp_path: Path, value: float) -> None:
    with safe_open(given, framework="pt") as f:
        tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        metadata = f.metadata()
    tensors["model.layers.2.mlp.down_proj.sumsq"][5] = value
    save_file(tensors, tmp_path / "s", metadata=metadata)
    with pytest.raises(CorruptStateError, match=r"is not what was written.*calibrate"):
        prune(models("llama"), tmp_path / "out", stats=tmp_path / "s", sparsity=0.5)
    metadata["digest"] = _data_digest(tmp_path / "s")
    save_file(tensors, tmp_path / "s", metadata=metadata)
    with pytest.raises(CorruptStateError, match=r"model\.layers\.2\.mlp\.down_proj.*calibrate"):
        prune(models("llama"), tmp_path / "out", stats=tmp_path / "s", sparsity=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"s"}


def test_negative_tokens(models: Models, given: Path, tmp_path: Path) -> None:
    with safe_open(given, framework="pt") as f:
        tensors = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        metadata = f.metadata()
    tensors["model.layers.2.mlp.down_proj.tokens"] = torch.tensor(-3)
    save_file(tensors, tmp_path / "s", metadata=metadata)
    with pytest.raises(CorruptStateError, match="calibrate"):
        prune(models("llama"), tmp_path / "out", stats=tmp_path / "s", sparsity=0.5)


def test_every_truncation(given: Path, tmp_path: Path) -> None:
    data = given.read_bytes()
    for size in [*range(0, 40), *range(40, len(data), 997), len(data) - 1]:
        (tmp_path / "s").write_bytes(data[:size])
        with pytest.raises(CorruptStateError, match="calibrate"):
            StatisticsFile(tmp_path / "s")
    (tmp_path / "s").write_bytes(data + b"\0")
    with pytest.raises(CorruptStateError):
        StatisticsFile(tmp_path / "s")


def test_shrinks_while_it_is_open(given: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(given, tmp_path / "s"))
    file = StatisticsFile(path)
    begin = next(r.begin for r in read_shard(path).refs if r.name == "model.layers.1.self_attn.q_proj.sum")
    path.write_bytes(path.read_bytes()[: begin + 3])
    with pytest.raises(CorruptStateError, match="truncated"):
        file.load("model.layers.1.self_attn.q_proj", 32)


def test_not_ours(models: Models, tmp_path: Path) -> None:
    for path in (models("llama") / "model.safetensors", models("llama") / "config.json"):
        with pytest.raises(CorruptStateError, match="calibrate"):
            prune(models("llama"), tmp_path / "out", stats=path, sparsity=0.5)


# ---- the pieces


def some(width: int, seed: int) -> InputStats:
    x = torch.randn(20, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return InputStats(20, x.sum(0).numpy(), (x * x).sum(0).numpy())


def test_write_and_merge(tmp_path: Path) -> None:
    one, two = some(5, 0), some(9, 1)
    write_statistics(tmp_path / "1", [("a", one)], {"a": "a", "b": "a"}, {}, {})
    write_statistics(tmp_path / "2", [("c", two)], {"c": "c"}, {}, {})
    merge_statistics(tmp_path / "m", [tmp_path / "1", tmp_path / "2"], {"config": "x"}, {"seed": 1})
    file = StatisticsFile(tmp_path / "m")
    assert (file.groups, file.model, file.calibration) == ({"a": "a", "b": "a", "c": "c"}, {"config": "x"}, {"seed": 1})
    for name, stats in (("a", one), ("b", one), ("c", two)):
        found = file.load(name, stats.in_features)
        assert (found.sum == stats.sum).all() and (found.sumsq == stats.sumsq).all() and found.tokens == 20
    write_statistics(tmp_path / "w", [("a", one), ("c", two)], file.groups, {"config": "x"}, {"seed": 1})
    assert (tmp_path / "w").read_bytes() == (tmp_path / "m").read_bytes()
    (tmp_path / "2").write_bytes(b"torn")
    with pytest.raises(CorruptStateError):
        merge_statistics(tmp_path / "n", [tmp_path / "1", tmp_path / "2"], {}, {})
    assert not (tmp_path / "n").exists()


def test_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very same tensor is counted once; an equal one, and the next batch's, again."""
    calls: list[int] = []

    def accumulate(x: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> None:
        calls.append(len(x))
        cpu.accumulate(x, total, squares)

    collector = Collector(accumulate)
    x, y = torch.randn(2, 3, 8), torch.randn(6, 4)
    for _ in range(2):
        collector.watch("q", x)
        collector.watch("k", x)
        collector.watch("other", x.clone())
        collector.watch("out", y)
        collector.end_batch()
    assert collector.groups == {"q": "q", "k": "q", "other": "other", "out": "out"}
    assert calls == [6] * 6
    found = collector.finish()
    assert found.keys() == {"q", "other", "out"} and found["q"].tokens == 12
    np.testing.assert_allclose(found["q"].sumsq, 2 * (x.double() ** 2).sum((0, 1)), rtol=1e-6)
    collector.watch("q", torch.full((1, 8), float("nan")))
    with pytest.raises(CheckpointError, match=r"input of q is not finite .*--dtype float32"):
        collector.finish()


def test_a_model_that_overflows(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    """In float16, 65504 is the end: refused with what mends it, nothing is left; float32 goes on."""
    source = Path(shutil.copytree(models("llama", dtype="float16"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 16384.0
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1024.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="--dtype float32"):
        calibrate(source, tmp_path / "s", dtype="float16", **how)
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    assert calibrate(source, tmp_path / "s", dtype="float32", **how).status == "done"


def test_damaged_names(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    """A name that is no linear's in place of one, or of a tensor, is damage; the model is the right one."""
    calibrate(models("llama"), tmp_path / "s", **how)
    before, name = (tmp_path / "s").read_bytes(), "model.layers.1.mlp.up_proj"

    def renamed(header: dict[str, Any]) -> None:
        groups = json.loads(header["__metadata__"]["groups"])
        groups["model.layers.1.mlp.uq_proj"] = groups.pop(name)
        header["__metadata__"]["groups"] = json.dumps(groups)

    def moved(header: dict[str, Any]) -> None:
        header["model.layers.1.mlp.gbte_proj.sumsq"] = header.pop("model.layers.1.mlp.gate_proj.sumsq")

    for change, what in ((renamed, "uq_proj.*none of model.layers.1.mlp.up_proj"), (moved, "gate_proj.sumsq.*missing")):
        (tmp_path / "s").write_bytes(before)
        rewrite(tmp_path / "s", change)
        with pytest.raises(CorruptStateError, match=rf"is damaged: .*{what}; make it again"):
            prune(models("llama"), tmp_path / "out", stats=tmp_path / "s", sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_linears_that_are_not_used(models: Models, how: dict[str, Any], tmp_path: Path) -> None:
    """Only what is pruned needs statistics."""
    calibrate(models("llama"), tmp_path / "s", **how)
    rewrite(tmp_path / "s", _meta("groups", json.dumps({"model.layers.0.mlp.up_proj": "model.layers.0.mlp.gate_proj"})))
    only = {"stats": tmp_path / "s", "sparsity": 0.5}
    assert prune(models("llama"), tmp_path / "out", only=r"0\.mlp\.up", **only).status == "done"  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no statistics of"):
        prune(models("llama"), tmp_path / "out2", only=r"0\.mlp", **only)  # type: ignore[arg-type]


def test_a_linear_that_is_called_again_with_an_input_of_its_own() -> None:
    """Its first input is that of the linear before, the second is not: both count, for it alone, in every batch."""
    collector = Collector(_sum_rows)
    wanted = torch.zeros(3, dtype=torch.float64)
    for seed in range(3):
        x, other = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)), torch.full((2, 3), 7.0)
        for name, given in (("q", x), ("k", x), ("v", x), ("v", other)):
            collector.watch(name, given)
        collector.end_batch()
        wanted += (x.double() ** 2).sum(0) + 98
    found = collector.finish()
    assert collector.groups == {"q": "q", "k": "q", "v": "v"}
    assert (found["q"].tokens, found["v"].tokens) == (15, 21)
    torch.testing.assert_close(torch.as_tensor(found["v"].sumsq), wanted)
    torch.testing.assert_close(torch.as_tensor(found["q"].sumsq), wanted - 3 * 98)


def _sum_rows(rows: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> None:
    total += rows.double().sum(0)
    squares += (rows.double() ** 2).sum(0)
