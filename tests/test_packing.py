"""pack and unpack: byte for byte there and back, whatever the dtype, mask and header; old releases' files; refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, prune
from checkpoint_files import entry
from refusals import refused
from safetensors.torch import load_file
from test_packed import sparse, two_four

import streamprune.methods.bitmask as bitmask
from streamprune.cli import main
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.lock import Lock
from streamprune.disk.packed import BITMASK, TWO_FOUR, is_packed
from streamprune.disk.state import lock_of
from streamprune.errors import (
    CheckpointError,
    CorruptStateError,
    LockedError,
    ResourceError,
    StateError,
    UnsupportedError,
    UsageError,
)
from streamprune.inspection.inspect import inspect
from streamprune.packing.job import pack, unpack

LEGACY = Path(__file__).parent / "data" / "legacy_packed"
ITEM = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F8_E4M3": np.uint8, "U8": np.uint8}
Tensors = dict[str, tuple[str, Any]]


def save(
    folder: Path, *shards: Tensors, config: dict[str, Any] | None = None, metadata: dict[str, str] | None = None,
    padding: int = 0, reverse: bool = False,
) -> Path:  # fmt: skip
    """A checkpoint folder with side files; headers with this metadata, padding and order of keys."""
    folder.mkdir(parents=True)
    where = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        header: dict[str, Any] = {}
        data = b""
        for tensor, (dtype, array) in tensors.items():
            header[tensor] = entry(dtype, list(array.shape), len(data), len(data) + array.nbytes)
            data += np.ascontiguousarray(array).tobytes()
            where[tensor] = name
        keys = list(header)[::-1] if reverse else list(header)
        described = {"__metadata__": metadata} if metadata is not None else {}
        text = json.dumps({**{k: header[k] for k in keys}, **described}).encode() + b" " * padding
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if len(shards) > 1:
        index = {"metadata": {"total_size": 3, "note": "ü"}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, ensure_ascii=False))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}) + " \r\n")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("notes")
    return folder


def layer(number: int, make: Callable[..., Any], dtype: str, *shapes: tuple[int, int]) -> Tensors:
    """One layer: sparse linears of these shapes, and a norm."""
    names = ["mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"]
    tensors: Tensors = {}
    for i, (rows, width) in enumerate(shapes):
        tensors[f"model.layers.{number}.{names[i]}.weight"] = (dtype, make(rows, width, ITEM[dtype], number + i))
    tensors[f"model.layers.{number}.norm.weight"] = (dtype, sparse(1, 7, ITEM[dtype], 1)[0])
    return tensors


def half(rows: int, width: int, dtype: Any, seed: int) -> Any:
    return sparse(rows, width, dtype, 0.3, seed)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def there_and_back(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    """Packs and unpacks; the result must be the model. Returns what the report says of the packing."""
    before = files(model)
    done = pack(model, folder / "packed", **options)
    assert done.status == "done"
    assert unpack(folder / "packed", folder / "back").status == "done"
    assert files(folder / "back") == before == files(model)
    assert sorted(p.name for p in folder.iterdir() if p != model) == ["back", "packed"]
    report = json.loads((folder / "packed" / "streamprune.json").read_text())
    written = files(folder / "packed")
    assert {f["name"]: f["bytes"] for f in report["files"]} == {
        n: len(c) for n, c in written.items() if n != "streamprune.json"
    }
    found: dict[str, Any] = report["packed"]
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards, a linear of odd shape and bits of every kind, a report, a dense embedding."""
    first = {"model.embed_tokens.weight": ("BF16", sparse(5, 12, np.uint16, 0.1)), **layer(0, half, "BF16", (24, 40))}
    folder = save(tmp_path / "model", first, layer(1, half, "BF16", (9, 131), (131, 9)), metadata={"format": "pt"})
    (folder / "streamprune.json").write_text('{"format": "streamprune-report", "version": 1, "job": {"x": 1}}')
    return folder


def experts(make: Callable[..., Any]) -> Tensors:
    """A tensor of all experts as most checkpoints call it, another with `.weight`, and one that is not theirs."""
    three = {
        "model.layers.0.mlp.experts.down_proj": make(24, 16, np.uint16, 5).reshape(3, 8, 16),
        "model.layers.0.block_sparse_moe.input_linear.weight": make(24, 16, np.uint16, 6).reshape(3, 8, 16),
        "model.layers.0.mixer.conv1d.weight": make(24, 16, np.uint16, 7).reshape(24, 1, 16),
    }
    return {name: ("BF16", array) for name, array in three.items()}


@pytest.mark.parametrize("make", [two_four, half])
def test_experts_of_one_tensor(tmp_path: Path, make: Callable[..., Any]) -> None:
    """Packed as a whole; `inspect` finds each expert's matrix in what is packed, with the same zeros."""
    source = save(tmp_path / "model", experts(make) | layer(0, make, "BF16", (24, 40)))
    packed = there_and_back(source, tmp_path)
    assert packed["layout"] == (TWO_FOUR if make is two_four else BITMASK) and packed["tensors"] == 3
    dense, there = inspect(source), inspect(tmp_path / "packed", against=source)
    assert [(n.name, n.shape, n.zeros, n.pattern) for n in dense.linears] == [
        (n.name, n.shape, n.zeros, n.pattern) for n in there.linears
    ]
    assert len(dense.linears) == 7 and dense.totals.zeros == there.totals.zeros > 0
    assert there.against is not None and set(there.against.tensors.values()) == {"equal"}
    assert sum(n.packed is not None for n in there.linears) == 7
    if make is half:
        file = next((tmp_path / "packed").glob("*.safetensors"))
        data = bytearray(file.read_bytes())
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        begin, _ = header["model.layers.0.mlp.experts.down_proj.row_offsets"]["data_offsets"]
        at = 8 + int.from_bytes(data[:8], "little")
        data[at + begin + 64 : at + begin + 72] = (10**6).to_bytes(8, "little")  # of the second expert's first row
        file.write_bytes(data)
        refused(CheckpointError, lambda: inspect(tmp_path / "packed"), "down_proj.row_offsets", "does not count")


@pytest.mark.parametrize("make", [two_four, half])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
def test_there_and_back(tmp_path: Path, dtype: str, make: Callable[..., Any]) -> None:
    shapes = [(16, 40), (40, 16), (9, 44)]
    tensors = layer(0, make, dtype, *shapes)
    if dtype == "F8_E4M3":
        tensors["model.layers.0.mlp.up_proj.weight_scale"] = ("F32", sparse(16, 1, np.uint32, 1))
    folder = save(tmp_path / "model", tensors, layer(1, make, dtype, *shapes))
    found = there_and_back(folder, tmp_path)
    assert found["layout"] == (TWO_FOUR if make is two_four else BITMASK)
    assert found["tensors"] == 6
    packed = open_checkpoint(tmp_path / "packed")
    assert not [n for n in packed.tensors if n.endswith("proj.weight")]
    assert ("model.layers.0.mlp.up_proj.weight_scale" in packed.tensors) == (dtype == "F8_E4M3")
    for ref in packed.tensors.values():
        assert ref.begin % {"I64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(ref.dtype, 1) == 0, ref


def test_the_size_is_what_the_layout_says(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": ("BF16", two_four(64, 512, np.uint16))})
    found = there_and_back(folder, tmp_path)
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in tmp_path.glob("packed/*.safetensors"))
    assert found["bytes_after"] - headers == 64 * 512 * 2 * 0.5625 + 16


@pytest.mark.parametrize(
    "style",
    [
        {},
        {"metadata": {}},
        {"metadata": {"format": "pt", "ü": '\ud83d\ude00 "quoted"'}, "padding": 13, "reverse": True},
        {"padding": 1},
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_headers_of_any_style(tmp_path: Path, style: dict[str, Any], shards: int) -> None:
    odd: Tensors = {"odd": ("U8", np.arange(3, dtype=np.uint8)), "empty": ("F32", np.zeros((0, 4), np.uint32))}
    parts = [{**odd, **layer(0, half, "BF16", (8, 40))}, layer(1, half, "BF16", (8, 40))]
    there_and_back(save(tmp_path / "model", *parts[:shards], **style), tmp_path)


def test_pieces_smaller_than_a_tensor(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.packing.rows.CHUNK_BYTES", 300)
    monkeypatch.setattr("streamprune.packing.shards.MASK_BYTES", 100)  # one bitmask is kept, others made again
    there_and_back(model, tmp_path)


def test_bitmasks_that_cannot_follow_their_values(tmp_path: Path) -> None:
    """Their sizes are no multiples of the item size, so all go to the end."""
    tensors = layer(0, half, "F32", (9, 44), (7, 44), (5, 44))
    there_and_back(save(tmp_path / "model", tensors), tmp_path)
    order = sorted(open_checkpoint(tmp_path / "packed").tensors.values(), key=lambda ref: ref.begin)
    assert [ref.name.rpartition(".")[2] for ref in order[-3:]] == ["bitmask"] * 3


def test_nan_and_negative_zero_come_back(tmp_path: Path) -> None:
    bits = half(8, 40, np.uint16, 0)
    bits[0, :4] = [0x7FC1, 0x8000, 0xFF80, 0x0001]
    there_and_back(save(tmp_path / "model", {"h.0.fc.weight": ("BF16", bits)}), tmp_path)


def test_files_that_are_no_utf8_and_a_stale_index(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", layer(0, half, "BF16", (8, 40)))
    (folder / "streamprune.json").write_bytes(b"\xff\x00{")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    there_and_back(folder, tmp_path)
    assert not (tmp_path / "packed" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    "name",
    ["back\\slash.txt", "results_10:30.json", "two\nlines.txt", os.fsdecode(b"\xff\xfe.txt"), "ü/ä ö.txt"],
    ids=ascii,
)
@pytest.mark.skipif(os.name == "nt", reason="such names cannot be")
def test_names_of_any_kind(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"\x00mine\n")
    there_and_back(model, tmp_path)
    assert unpack(tmp_path / "packed", tmp_path / "back").status == "up-to-date"


def test_what_is_not_carried_over_is_named(model: Path, tmp_path: Path) -> None:
    """Weights that the checkpoint does not use, of whatever format."""
    (model / "original").mkdir()
    for name in ("extra.safetensors", "original/consolidated.00.pth", ".gitattributes"):
        (model / name).write_bytes(b"x")
    done = pack(model, tmp_path / "packed")
    assert done.left_out == ("extra.safetensors", "original/consolidated.00.pth")
    assert pack(model, tmp_path / "packed").left_out == done.left_out
    assert unpack(tmp_path / "packed", tmp_path / "back").left_out == ()
    assert not (tmp_path / "back" / "original").exists()


def test_only_what_becomes_smaller_is_packed(tmp_path: Path) -> None:
    tensors = layer(0, half, "BF16", (8, 40))
    tensors["model.layers.0.dense.weight"] = ("BF16", sparse(8, 40, np.uint16, 1))
    tensors["lm_head.weight"] = ("BF16", half(8, 40, np.uint16, 3))
    folder = save(tmp_path / "model", tensors)
    found = there_and_back(folder, tmp_path)
    assert found["tensors"] == 1
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": BITMASK, "sparsity_structure": "unstructured", "targets": ["Linear"],
            "ignore": ["lm_head", "model.layers.0.dense"], "global_sparsity": round(found["sparsity"], 6),
        },
    }  # fmt: skip
    bits = tensors["model.layers.0.mlp.up_proj.weight"][1]
    assert found["sparsity"] == pytest.approx((bits == 0).mean())


def test_one_linear_without_the_pattern_decides_for_all(tmp_path: Path) -> None:
    tensors = layer(0, two_four, "BF16", (8, 40))
    mixed = {**tensors, "model.layers.0.other.weight": ("BF16", half(8, 40, np.uint16, 1))}
    assert there_and_back(save(tmp_path / "a" / "model", mixed), tmp_path / "a")["layout"] == BITMASK
    dense = {**tensors, "model.layers.0.other.weight": ("BF16", sparse(8, 40, np.uint16, 1))}
    assert there_and_back(save(tmp_path / "b" / "model", dense), tmp_path / "b")["layout"] == TWO_FOUR
    found = there_and_back(save(tmp_path / "c" / "model", mixed), tmp_path / "c", layout=TWO_FOUR)
    assert (found["layout"], found["tensors"]) == (TWO_FOUR, 1)
    assert there_and_back(save(tmp_path / "d" / "model", tensors), tmp_path / "d", layout=BITMASK)["layout"] == BITMASK


def test_an_fp8_description_stays(tmp_path: Path) -> None:
    described = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {}}}
    tensors = layer(0, half, "F8_E4M3", (8, 40))
    there_and_back(save(tmp_path / "model", tensors, config={"quantization_config": described}), tmp_path)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config.pop("sparsity_config")["format"] == BITMASK
    assert config == described


def test_metadata_of_a_packed_shard(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    name = "model-00001-of-00002.safetensors"
    data = (tmp_path / "packed" / f"packed-{name}").read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    source = (model / name).read_bytes()
    kept = metadata.pop("streamprune.header").encode()
    assert source.startswith(len(kept).to_bytes(8, "little") + kept)
    assert metadata == {"format": "pt"}


# ---- again, and resumed


def test_the_same_command_again(model: Path, tmp_path: Path) -> None:
    first = pack(model, tmp_path / "packed")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "packed").rglob("*")}
    again = pack(model, tmp_path / "packed")
    assert (first.status, again.status) == ("done", "up-to-date")
    assert (first.layout, first.bytes_before, first.bytes_after) == (
        again.layout,
        again.bytes_before,
        again.bytes_after,
    )
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "packed").rglob("*")} == before
    first = unpack(tmp_path / "packed", tmp_path / "back")
    again = unpack(tmp_path / "packed", tmp_path / "back")
    assert (first.status, again.status) == ("done", "up-to-date")
    assert (first.layout, first.bytes_before, first.bytes_after) == (
        again.layout,
        again.bytes_before,
        again.bytes_after,
    )
    with pytest.raises(StateError, match="layout is auto there and sparse-bitmask here"):
        pack(model, tmp_path / "packed", layout=BITMASK)


class StopError(Exception):
    pass


def stop_after(shards: int) -> Any:
    def progress(step: Any) -> None:
        if step.done == shards:
            raise StopError

    return progress


def test_a_resumed_run_neither_counts_nor_writes_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(model, tmp_path / "whole")
    with pytest.raises(StopError):
        pack(model, tmp_path / "packed", progress=stop_after(1))
    assert not (tmp_path / "packed").exists()
    shard = tmp_path / "packed.partial" / "packed-model-00001-of-00002.safetensors"
    written = shard.stat().st_ino
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr("streamprune.packing.work.survey", lambda *_: pytest.fail("counted again"))
        assert pack(model, tmp_path / "packed", progress=lambda s: steps.append(s.done)).status == "done"
    assert steps == [2] and (tmp_path / "packed" / shard.name).stat().st_ino == written
    found, wanted = files(tmp_path / "packed"), files(tmp_path / "whole")
    del found["streamprune.json"], wanted["streamprune.json"]
    assert found == wanted
    with pytest.raises(StopError):
        unpack(tmp_path / "packed", tmp_path / "back", progress=stop_after(1))
    assert unpack(tmp_path / "whole", tmp_path / "back").status == "done"  # the same content, at another time
    assert files(tmp_path / "back") == files(model)


def test_damaged_state(model: Path, tmp_path: Path) -> None:
    for damage in ("counts", "shard"):
        with pytest.raises(StopError):
            pack(model, tmp_path / "packed", progress=stop_after(1))
        partial = tmp_path / "packed.partial"
        path = partial / (".streamprune/counts" if damage == "counts" else "packed-model-00001-of-00002.safetensors")
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(CorruptStateError, match=f"{path.name} is missing or damaged.*--restart"):
            pack(model, tmp_path / "packed")
        assert pack(model, tmp_path / "packed", restart=True).status == "done"
        shutil.rmtree(tmp_path / "packed")


def test_what_is_packed_is_read_back(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bits: Any, two_four: bool) -> Any:
        values, mask = bitmask.pack_rows(bits, two_four)
        return values[::-1].copy(), mask

    with monkeypatch.context() as patch:
        patch.setattr("streamprune.packing.shards.pack_rows", wrong)
        refused(CorruptStateError, lambda: pack(model, tmp_path / "packed"), "does not unpack to", "--restart")
    assert not (tmp_path / "packed").exists()
    assert pack(model, tmp_path / "packed").status == "done"


def test_one_run_at_a_time(model: Path, tmp_path: Path) -> None:
    with Lock(lock_of(tmp_path / "packed")), pytest.raises(LockedError):
        pack(model, tmp_path / "packed")


# ---- refusals


def test_places_and_kinds_that_are_refused(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    out, packed = tmp_path / "out", tmp_path / "packed"
    refused(UnsupportedError, lambda: pack(packed, out), "packed already", "`unpack`")
    refused(UnsupportedError, lambda: unpack(model, out), "nothing to unpack", "`pack`")
    refused(UsageError, lambda: pack(model, out, layout="dense"), "--layout")
    refused(UsageError, lambda: pack(model, model / "out"), "within")
    refused(UsageError, lambda: unpack(packed, packed), "within")
    refused(UsageError, lambda: pack(model, tmp_path / ".."), "name of its own")
    refused(UsageError, lambda: pack(model, tmp_path / ("n" * 300)), "another OUT")
    refused(UsageError, lambda: unpack(packed, tmp_path / ("n" * 300)), "another OUT")
    refused(UsageError, lambda: pack(model, tmp_path), "lies within OUT")
    inner = save(tmp_path / "x.partial" / "m", layer(0, half, "BF16", (8, 40)))
    refused(UsageError, lambda: pack(inner, tmp_path / "x"), "lies within OUT")
    refused(StateError, lambda: pack(model, tmp_path / "x.partial"), "not an output of streamprune")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    refused(StateError, lambda: unpack(packed, tmp_path / "other"), "is not what")
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_nothing_to_gain(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", {"model.layers.0.fc.weight": ("BF16", sparse(8, 40, np.uint16, 1))})
    refused(UnsupportedError, lambda: pack(folder, tmp_path / "out"), "0.0 % zeros", "nothing to pack")
    folder = save(tmp_path / "none", {"fc.weight": ("BF16", half(8, 40, np.uint16, 0))})
    refused(UnsupportedError, lambda: pack(folder, tmp_path / "out"), "no linears were found")
    half_zero = save(tmp_path / "half", {"model.layers.0.fc.weight": ("BF16", half(8, 40, np.uint16, 0))})
    refused(UnsupportedError, lambda: pack(half_zero, tmp_path / "out", layout=TWO_FOUR), TWO_FOUR)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "model", "none"]


def test_a_full_disk_is_noticed_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=64 << 20))
    refused(ResourceError, lambda: pack(model, tmp_path / "packed"), "free")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], data: Callable[[bytes], bytes] = bytes) -> None:
    """Changes the header and the data of a shard."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data(whole[start:]))


def edit_kept(edit: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """Changes the header that a packed shard keeps."""

    def change(header: dict[str, Any]) -> None:
        kept = json.loads(header["__metadata__"]["streamprune.header"])
        edit(kept)
        header["__metadata__"]["streamprune.header"] = json.dumps(kept)

    return change


def remove_kept(header: dict[str, Any]) -> None:
    del header["__metadata__"]["streamprune.header"]


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


UP = "model.layers.0.mlp.up_proj.weight"
TAMPERED: dict[str, tuple[Any, Any, str]] = {
    "kept header removed": (remove_kept, bytes, "has no streamprune.header"),
    "kept header no JSON": (lambda h: h["__metadata__"].update({"streamprune.header": "{"}), bytes, "malformed"),
    "kept header empty": (lambda h: h["__metadata__"].update({"streamprune.header": ""}), bytes, "byte 8"),
    "kept header no text": (lambda h: h["__metadata__"].update({"streamprune.header": "{\ud800"}), bytes, "UTF-8"),
    "tensor removed": (edit_kept(lambda k: k.pop(UP)), bytes, "a gap"),
    "other shape": (edit_kept(lambda k: k[UP].update(shape=[40, 24])), bytes, "to streamprune.header"),
    "other name": (edit_kept(lambda k: k.update({UP.replace("up", "xx"): k.pop(UP)})), bytes, "to streamprune.header"),
    "other metadata": (edit_kept(lambda k: k.update(__metadata__={"format": "xx"})), bytes, "other bytes than"),
    "longer metadata": (edit_kept(lambda k: k.update(__metadata__={"format": "x"})), bytes, "the file ends at"),
    "another last byte": (lambda h: None, flip, "other bytes than were packed"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_shard_that_was_tampered_with(model: Path, tmp_path: Path, name: str) -> None:
    pack(model, tmp_path / "packed")
    change, data, why = TAMPERED[name]
    rewrite(tmp_path / "packed" / "packed-model-00001-of-00002.safetensors", change, data)
    call = lambda: unpack(tmp_path / "packed", tmp_path / "back")  # noqa: E731
    refused(CheckpointError, call, why, "model-00001-of-00002.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "packed"]


def report_edit(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        report = json.loads((folder / "streamprune.json").read_text())
        edit(report["packed"]["original"]["files"])
        (folder / "streamprune.json").write_text(json.dumps(report))

    return change


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


ODD_REPORTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "outside": (report_edit(lambda f: f.update({"../evil": f["config.json"]})), "damaged"),
    "absolute": (report_edit(lambda f: f.update({"/tmp/evil": f["config.json"]})), "damaged"),
    "name too long": (report_edit(lambda f: f.update({"x" * 300: f["tokenizer.json"]})), "damaged"),
    "no such name": (report_edit(lambda f: f.update({"\ud800": f["tokenizer.json"]})), "damaged"),
    "hidden": (report_edit(lambda f: f.update({".streamprune/job.json": f["config.json"]})), "damaged"),
    "no size": (report_edit(lambda f: f["config.json"].pop("bytes")), "damaged"),
    "shard missing": (report_edit(lambda f: f.pop("model-00001-of-00002.safetensors")), "not among"),
    "another text": (report_edit(lambda f: f["config.json"].update(text="{}")), "not what was packed"),
    "too large": (report_edit(lambda f: f["config.json"].update(bytes=10**400)), "damaged"),
    "text of no bytes": (report_edit(lambda f: f["config.json"].update(text="\ud800")), "damaged"),
    "nested": (lambda folder: (folder / "streamprune.json").write_text("[" * 100000) and None, "damaged"),
    "other layout": (lambda folder: replace_in(folder / "streamprune.json", '"layout": "', '"layout": "x'), "damaged"),
    "cut off": (lambda folder: os.truncate(folder / "streamprune.json", 100), "damaged; download it again, or remove"),
    "another report": (lambda folder: replace_in(folder / "streamprune.json", '"packed":', '"pakced":'), "damaged"),
    "file gone": (lambda folder: (folder / "tokenizer.json").unlink(), "missing or not what was packed"),
    "file changed": (lambda folder: (folder / "tokenizer.json").write_text("{}") and None, "not what was packed"),
}


@pytest.mark.parametrize("name", ODD_REPORTS)
def test_reports_and_files_that_were_tampered_with(model: Path, tmp_path: Path, name: str) -> None:
    pack(model, tmp_path / "packed")
    change, why = ODD_REPORTS[name]
    change(tmp_path / "packed")
    refused(CheckpointError, lambda: unpack(tmp_path / "packed", tmp_path / "back"), why)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "packed"]


def test_another_model_of_the_same_size_is_not_taken_for_the_output(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 5)):
        bits = {"model.layers.0.fc.weight": ("BF16", two_four(16, 1024, np.uint16, seed))}
        pack(save(tmp_path / name, bits), tmp_path / f"packed-{name}")
    unpack(tmp_path / "packed-a", tmp_path / "back")
    assert unpack(tmp_path / "packed-a", tmp_path / "back").status == "up-to-date"
    refused(StateError, lambda: unpack(tmp_path / "packed-b", tmp_path / "back"), "is not what")


# ---- other programs


def bits_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for shard in sorted(folder.glob("*.safetensors")) for n, t in load_file(shard).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


@pytest.mark.parametrize("name", ["two-four", "two-four-fp8", "bitmask", "bitmask-fp8"])
def test_what_an_old_release_wrote(tmp_path: Path, name: str) -> None:
    done = unpack(LEGACY / name, tmp_path / "out")
    assert (done.status, unpack(LEGACY / name, tmp_path / "out").status) == ("done", "up-to-date")
    assert_same(bits_of(tmp_path / "out"), load_file(LEGACY / f"{name}.expected.safetensors"))
    found = open_checkpoint(tmp_path / "out")
    assert not is_packed(found)
    before = json.loads((LEGACY / name / "config.json").read_text())
    described = before.pop("quantization_config")
    if "fp8" in name:
        assert found.config == {**before, "quantization_config": {**described, "sparsity_config": {}}}
    else:
        assert found.config == before
    report = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert {f["name"] for f in report["files"]} == files(tmp_path / "out").keys() - {"streamprune.json"}
    assert report["unpacked"]["layout"] == done.layout


@pytest.mark.parametrize("where", ["compression_config", "top"])
def test_older_places_of_the_description(tmp_path: Path, where: str) -> None:
    shutil.copytree(LEGACY / "bitmask", tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    config = json.loads(path.read_text())
    described = config.pop("quantization_config")
    path.write_text(json.dumps({
        **config,
        **({"sparsity_config": described["sparsity_config"]} if where == "top" else {where: described}),
    }))  # fmt: skip
    unpack(tmp_path / "packed", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config == config


def test_ours_without_its_report_unpacks_as_any_other(model: Path, tmp_path: Path) -> None:
    pack(model, tmp_path / "packed")
    (tmp_path / "packed" / "streamprune.json").unlink()
    unpack(tmp_path / "packed", tmp_path / "out")
    assert_same(bits_of(tmp_path / "out"), bits_of(model))
    assert "quantization_config" not in open_checkpoint(tmp_path / "out").config


@pytest.mark.parametrize("shards", [1, 2])
def test_ours_without_its_report_is_found_by_loaders(tmp_path: Path, shards: int) -> None:
    parts = [layer(number, half, "BF16", (24, 40)) for number in range(shards)]
    pack(save(tmp_path / "model", *parts), tmp_path / "packed")
    (tmp_path / "packed" / "streamprune.json").unlink()
    unpack(tmp_path / "packed", tmp_path / "out")
    weights = {n for n in files(tmp_path / "out") if ".safetensors" in n}
    assert weights == {n for n in files(tmp_path / "model") if ".safetensors" in n}


def test_no_runtime_takes_a_packed_folder_for_a_model(models: Callable[..., Path], tmp_path: Path) -> None:
    """With shards of the usual names transformers would make random weights, and say so in a warning only."""
    from transformers import AutoModelForCausalLM

    for kind, given in {"bf16": {}, "fp8": {"quantize": "fp8"}}.items():
        prune(models("llama", 2), tmp_path / kind, pattern="2:4", method="magnitude", **given)
        pack(tmp_path / kind, tmp_path / f"packed-{kind}")
        with pytest.raises(OSError, match="no file named model"):
            AutoModelForCausalLM.from_pretrained(tmp_path / f"packed-{kind}")
        packed, text = tmp_path / f"packed-{kind}", tmp_path / kind / "tokenizer.json"
        with pytest.raises(UnsupportedError, match="unpack"):
            prune(packed, tmp_path / "out", sparsity=0.5)
        with pytest.raises(UnsupportedError, match="unpack"):
            evaluate(packed, text)
        config = packed / "config.json"
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "config" not in k}))
        with pytest.raises(UnsupportedError, match="unpack"):
            prune(packed, tmp_path / "out", sparsity=0.5)
        with pytest.raises(UnsupportedError, match="unpack"):
            evaluate(packed, text)


# ---- the command line


def test_commands(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, back = str(tmp_path / "packed"), str(tmp_path / "back")
    assert main(["pack", str(model), packed, "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found["status"] == "done" and found["layout"] == BITMASK
    assert found["bytes_after"] == sum(
        len(c) for n, c in files(tmp_path / "packed").items() if "safetensors" in n[-12:]
    )
    assert "pack: 2/2 model-00002-of-00002.safetensors" in told.err
    assert main(["unpack", packed, back]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{back}: done (sparse-bitmask, ") and len(told.out.splitlines()) == 1
    assert main(["unpack", packed, back, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["unpack", str(model), back]) == 4
    assert capsys.readouterr().err.startswith("streamprune: error: ")


# ---- the last release that knew these layouts

_OTHER = """
import json, sys
from pathlib import Path
import compressed_tensors
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import load_file, save_file
assert compressed_tensors.__version__ == "0.14.0.1", compressed_tensors.__version__
source, target = Path(sys.argv[1]), Path(sys.argv[2])
config = json.loads((source / "config.json").read_text())["quantization_config"]
sparsity = ModelCompressor.parse_sparsity_config(config)
sparsity = SparsityCompressionConfig.load_from_registry(sparsity.pop("format"), **sparsity)
compressor = BaseCompressor.load_from_registry(sparsity.format, config=sparsity)
save_file({n: t.contiguous() for n, t in compressor.decompress(str(source))}, target)
"""


@pytest.fixture(scope="session")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """compressed-tensors 0.14.0.1 in a folder of its own; what it needs is there."""
    folder = tmp_path_factory.mktemp("old")
    command = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "compressed-tensors==0.14.0.1"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot be installed: {done.stderr.strip()[-200:]}")
    return folder


def run_old(release: Path, script: Sequence[str | Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(release), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("make", [two_four, half])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
def test_the_old_release_reads_ours(tmp_path: Path, old_release: Path, dtype: str, make: Callable[..., Any]) -> None:
    tensors = [layer(i, make, dtype, (16, 40), (40, 16)) for i in range(2)]
    save(tmp_path / "model", *tensors, metadata={"format": "pt"})
    pack(tmp_path / "model", tmp_path / "packed")
    for path in [*(tmp_path / "packed").glob("packed*")]:  # under the names that it looks for
        path.rename(path.with_name(path.name.replace("packed-", "").replace("packed.", "model.")))
    index = tmp_path / "packed" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"packed-', '"'))
    run_old(old_release, ["-c", _OTHER, tmp_path / "packed", tmp_path / "found.safetensors"])
    assert_same(load_file(tmp_path / "found.safetensors"), bits_of(tmp_path / "model"))


@pytest.mark.slow
def test_the_old_release_writes_what_is_in_the_repository(tmp_path: Path, old_release: Path) -> None:
    shutil.copy(LEGACY / "make.py", tmp_path / "make.py")
    run_old(old_release, [tmp_path / "make.py"])
    for name in ("two-four", "two-four-fp8", "bitmask", "bitmask-fp8"):
        unpack(tmp_path / name, tmp_path / "out" / name)
        assert_same(bits_of(tmp_path / "out" / name), load_file(tmp_path / f"{name}.expected.safetensors"))
        assert_same(bits_of(tmp_path / name), bits_of(LEGACY / name))
