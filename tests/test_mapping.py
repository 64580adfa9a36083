"""Mapped tensors equal what the safetensors library reads, copy nothing, and give their memory back."""

from __future__ import annotations

import gc
import json
import os
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, make, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import streamprune.disk.mapped as mapped
from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.mapping import SAFETENSORS_DTYPES, ShardMaps
from streamprune.errors import CheckpointError, ResourceError, UnsupportedError


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    make(folder)
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


DTYPES = sorted(set(SAFETENSORS_DTYPES) - {"F8_E8M0"})  # which the safetensors library does not write in all versions


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Up to six tensors of random dtype and shape, 0-d and empty ones among them, of random bytes."""
    made = {}
    for i in range(draw(st.integers(1, 6))):
        dtype = SAFETENSORS_DTYPES[draw(st.sampled_from(DTYPES))]
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        top = 2 if dtype == torch.bool else 256
        count = int(torch.tensor(shape).prod()) if shape else 1
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
        data = torch.randint(0, top, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        made[f"t{i}"] = data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    return made


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, written: dict[str, torch.Tensor]) -> None:
    checkpoint = saved(tmp_path_factory.mktemp("round"), written)
    assert set(checkpoint.tensors) == set(written)
    with ShardMaps(checkpoint) as maps:
        for name, tensor in written.items():
            ref = checkpoint.tensors[name]
            read = maps.tensor(ref)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert as_bytes(read) == as_bytes(tensor) == bytes(maps.raw(ref))
            if tensor.ndim:
                start, stop = len(tensor) // 3, len(tensor)
                rows = maps.rows(ref, start, stop)
                assert rows.shape == tensor[start:stop].shape
                assert as_bytes(rows) == as_bytes(tensor[start:stop])


def test_views_share_the_mapping_and_leave_the_file_alone(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", {"w": torch.arange(6, dtype=torch.int32).reshape(2, 3)})
    ref = checkpoint.tensors["w"]
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of buffers that may not be written
        with ShardMaps(checkpoint) as maps:
            first, second, rows = maps.tensor(ref), maps.tensor(ref), maps.rows(ref, 1, 2)
            assert first.data_ptr() == second.data_ptr()
            assert rows.data_ptr() == first.data_ptr() + 12
            first[1, 0] = 100
            assert second[1, 0] == rows[0, 0] == 100
            with pytest.raises(TypeError):
                maps.raw(ref)[0] = 1
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("shift", range(8))
def test_unaligned_offsets(tmp_path: Path, shift: int) -> None:
    """Values that begin at any byte of the file, odd ones too, which no torch view may do."""
    header = {
        "pad": entry("U8", [1], 0, 1),
        "f": entry("F32", [2, 2], 1, 17),
        "b": entry("BF16", [3, 1], 17, 23),
    }
    values = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0) + b"\x80\x3f\x00\x40\x40\x40"
    content = shard_bytes(json.dumps(header).encode() + b" " * shift, b"!" + values)
    checkpoint = open_checkpoint(make(tmp_path / "m", {"model.safetensors": content}))
    with ShardMaps(checkpoint) as maps:
        assert maps.tensor(checkpoint.tensors["f"]).data_ptr() % 4 == 0
        assert maps.tensor(checkpoint.tensors["f"]).tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert maps.rows(checkpoint.tensors["f"], 1, 2).tolist() == [[3.0, 4.0]]
        assert maps.tensor(checkpoint.tensors["b"]).tolist() == [[1.0], [2.0], [3.0]]
        assert maps.rows(checkpoint.tensors["b"], 1, 3).tolist() == [[2.0], [3.0]]


def test_views_outlive_close(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", {"w": torch.ones(10_000), "e": torch.zeros(0)})
    with ShardMaps(checkpoint) as maps:
        view, raw = maps.tensor(checkpoint.tensors["w"]), maps.raw(checkpoint.tensors["w"])
    maps.close()
    gc.collect()
    assert float(view.sum()) == 10_000.0
    assert raw[:4] == struct.pack("<f", 1.0)
    with pytest.raises(ValueError, match="closed"):
        maps.tensor(checkpoint.tensors["w"])


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


def test_close_gives_the_files_back(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", {"w": torch.ones(10)})
    before = open_descriptors()
    for _ in range(20):
        with ShardMaps(checkpoint) as maps:
            maps.tensor(checkpoint.tensors["w"]).sum()
    gc.collect()
    assert open_descriptors() == before


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (0, 3), (2, 1)])
def test_rows_out_of_range(tmp_path: Path, start: int, stop: int) -> None:
    checkpoint = saved(tmp_path / "m", {"w": torch.ones(2, 2), "s": torch.tensor(1.0)})
    with ShardMaps(checkpoint) as maps:
        with pytest.raises(IndexError, match="of w"):
            maps.rows(checkpoint.tensors["w"], start, stop)
        with pytest.raises(IndexError, match="of s"):
            maps.rows(checkpoint.tensors["s"], 0, 0)


def test_subbyte_dtypes(tmp_path: Path) -> None:
    header = {
        "four": entry("F4", [2, 4], 0, 4),
        "odd": entry("F4", [2, 1], 4, 5),
        "six": entry("F6_E2M3", [4], 5, 8),
    }
    folder = make(tmp_path / "m", {"model.safetensors": shard_bytes(header, b"abcdefgh")})
    checkpoint = open_checkpoint(folder)
    with ShardMaps(checkpoint) as maps:
        assert bytes(maps.raw(checkpoint.tensors["six"])) == b"fgh"
        for name in ("odd", "six"):
            with pytest.raises(UnsupportedError, match=r"model\.safetensors: tensor (odd|six): torch .* F"):
                maps.tensor(checkpoint.tensors[name])
        with pytest.raises(IndexError, match="within a byte"):
            maps.rows(checkpoint.tensors["odd"], 1, 2)
        if hasattr(torch, "float4_e2m1fn_x2"):
            four = maps.tensor(checkpoint.tensors["four"])
            assert (four.dtype, four.shape) == (torch.float4_e2m1fn_x2, (2, 2))
            assert as_bytes(four) == b"abcd"
            assert as_bytes(maps.rows(checkpoint.tensors["four"], 1, 2)) == b"cd"


@pytest.mark.parametrize("change", ["shorter", "longer", "touched", "gone"])
def test_a_file_that_changes_is_refused(tmp_path: Path, change: str) -> None:
    checkpoint = saved(tmp_path / "m", {"w": torch.ones(100)})
    path = tmp_path / "m" / "model.safetensors"
    with ShardMaps(checkpoint) as early, ShardMaps(checkpoint) as late:
        early.tensor(checkpoint.tensors["w"])
        size = path.stat().st_size
        if change == "gone":
            path.unlink()
        elif change == "touched":
            os.utime(path, ns=(1, 1))
        else:
            os.truncate(path, size + (1 if change == "longer" else -1))
        with pytest.raises(CheckpointError, match=r"model\.safetensors: (has changed|is missing)"):
            late.tensor(checkpoint.tensors["w"])
        if change in ("shorter", "longer"):
            with pytest.raises(CheckpointError, match=f"changed from {size} to"):
                early.tensor(checkpoint.tensors["w"])
        else:
            assert float(early.tensor(checkpoint.tensors["w"]).sum()) == 100.0


def test_a_refused_mapping_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(descriptor: int, size: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    checkpoint = saved(tmp_path / "m", {"w": torch.ones(100)})
    before = open_descriptors()
    monkeypatch.setattr(mapped, "_private_map", no_memory)
    with ShardMaps(checkpoint) as maps, pytest.raises(ResourceError, match=r"model\.safetensors: .*ulimit"):
        maps.tensor(checkpoint.tensors["w"])
    assert open_descriptors() == before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mapped._PAGE


if sys.platform == "linux":

    def test_release_gives_memory_back_and_views_stay_usable(tmp_path: Path) -> None:
        size = 32 * 2**20
        header = {"a": entry("U8", [size], 0, size), "b": entry("U8", [size], size, 2 * size)}
        folder = make(tmp_path / "m", {"model.safetensors": shard_bytes(header, b"\1" * size + b"\2" * size)})
        checkpoint = open_checkpoint(folder)
        a, b = checkpoint.tensors["a"], checkpoint.tensors["b"]
        with ShardMaps(checkpoint) as maps:
            maps.prefetch([a, b])
            views = maps.tensor(a), maps.tensor(b)
            start = resident()
            assert [int(view.sum()) for view in views] == [size, 2 * size]
            assert resident() - start > 2 * size * 0.9  # or the test shows nothing
            maps.release([b])
            assert size * 0.9 < resident() - start < size * 1.1
            maps.release([a], drop_cache=True)
            assert resident() - start < size * 0.1
            assert [int(view.sum()) for view in views] == [size, 2 * size]
            maps.release([b, a])
            assert resident() - start < size * 0.1

    def test_a_shard_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal:", "SwapTotal:"))) * 1024
        size = 2 * total
        path = make(tmp_path / "m") / "model.safetensors"
        path.write_bytes(shard_bytes({"w": entry("U8", [size], 0, size)}))
        try:
            os.truncate(path, path.stat().st_size + size)  # sparse: takes no room on the disk
        except OSError:
            return  # a file system without files of this size
        checkpoint = open_checkpoint(tmp_path / "m")
        with ShardMaps(checkpoint) as maps:
            assert int(maps.rows(checkpoint.tensors["w"], size - 10, size).sum()) == 0

    def test_release_touches_no_neighbour(tmp_path: Path) -> None:
        page = mapped._PAGE
        sizes = {"a": page + 5, "b": 3 * page, "c": 7, "d": page}
        header, at = {}, 0
        for name, size in sizes.items():
            header[name] = entry("U8", [size], at, at + size)
            at += size
        checkpoint = open_checkpoint(make(tmp_path / "m", {"model.safetensors": shard_bytes(header, bytes(at))}))
        with ShardMaps(checkpoint) as maps:
            views = {name: maps.tensor(ref) for name, ref in checkpoint.tensors.items()}
            for view in views.values():
                view.fill_(9)  # private pages: a released one reads 0 again
            maps.release([checkpoint.tensors["b"]])
            assert [int(views[name].min()) for name in "acd"] == [9, 9, 9]
            assert int((views["b"] == 0).sum()) >= 2 * page
            maps.release(list(checkpoint.tensors.values()))  # joined: only the header's page stays
            assert all(int((views[name] == 9).sum()) == 0 for name in "bcd")


def test_release_over_several_shards(tmp_path: Path) -> None:
    """Ranges that would be neighbours were they in one file are not."""
    sizes = {"a": 4 * mapped._PAGE, "b": 8 * mapped._PAGE}
    shards = {f"{name}.safetensors": shard_bytes({name: entry("U8", [n], 0, n)}, bytes(n)) for name, n in sizes.items()}
    index = {"weight_map": {name: f"{name}.safetensors" for name in sizes}}
    checkpoint = open_checkpoint(make(tmp_path / "m", shards, index=index))
    with ShardMaps(checkpoint) as maps:
        views = {name: maps.tensor(ref) for name, ref in checkpoint.tensors.items()}
        for view in views.values():
            view.fill_(9)
        maps.release(checkpoint.tensors.values())
        if sys.platform == "linux":
            assert [int((view == 0).sum()) >= len(view) - mapped._PAGE for view in views.values()] == [
                True,
                True,
            ]
        maps.prefetch(checkpoint.tensors.values())


def test_release_of_what_was_never_mapped(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", {"w": torch.ones(10), "e": torch.zeros(0)})
    with ShardMaps(checkpoint) as maps:
        maps.release(checkpoint.tensors.values())
        maps.release([])
        maps.prefetch([checkpoint.tensors["e"]])
        maps.prefetch(checkpoint.tensors.values())
        maps.release([checkpoint.tensors["e"]])
