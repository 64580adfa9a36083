"""The activation cache: what is read is what was written, or an error that says where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from streamprune.disk.cache import CacheReader, CacheWriter, remove_cache
from streamprune.errors import CorruptStateError

SEQLEN, HIDDEN = 5, 6


def chunks(dtype: torch.dtype, sizes: tuple[int, ...] = (3, 3, 2)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, SEQLEN, HIDDEN, generator=generator).to(dtype) for n in sizes]


def write(folder: Path, parts: list[torch.Tensor], dtype: torch.dtype, stage: int = 7) -> None:
    with CacheWriter(folder, stage, dtype) as writer:
        for part in parts:
            writer.append(part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes", [(3, 3, 2), (3, 3), (1,), (4, 1)])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    parts = chunks(dtype, sizes)
    write(tmp_path, parts, dtype)
    reader = CacheReader(tmp_path, 7)
    assert (len(reader), reader.samples) == (len(sizes), sum(sizes))
    for i in reversed(range(len(sizes))):
        assert reader[i].dtype == dtype
        assert torch.equal(reader[i], parts[i])
    for i in (-1, len(sizes)):
        with pytest.raises(IndexError):
            reader[i]
    assert (tmp_path / "0007.bin").stat().st_size == sum(sizes) * SEQLEN * HIDDEN * dtype.itemsize
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0007.bin", "0007.json"]


def test_special_values_survive(tmp_path: Path) -> None:
    part = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e-40, 3e38]).reshape(1, 1, 6)
    write(tmp_path, [part], torch.float32)
    assert torch.equal(CacheReader(tmp_path, 7)[0].view(torch.int32), part.view(torch.int32))


def test_states_are_stored_in_the_caches_dtype(tmp_path: Path) -> None:
    part = chunks(torch.float32, (2,))[0]
    write(tmp_path, [part.transpose(1, 2).contiguous().transpose(1, 2)], torch.bfloat16)  # not contiguous
    assert torch.equal(CacheReader(tmp_path, 7)[0], part.bfloat16())


def test_a_chunk_is_the_callers(tmp_path: Path) -> None:
    write(tmp_path, chunks(torch.float32), torch.float32)
    reader = CacheReader(tmp_path, 7)
    reader[0].zero_()
    assert torch.equal(reader[0], chunks(torch.float32)[0])


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_flipped_bit_is_found_in_its_chunk(tmp_path: Path, chunk: int) -> None:
    parts = chunks(torch.bfloat16)
    write(tmp_path, parts, torch.bfloat16)
    path = tmp_path / "0007.bin"
    whole = path.read_bytes()
    size = 3 * SEQLEN * HIDDEN * 2
    end = min(len(whole), (chunk + 1) * size)
    for place in (chunk * size, (chunk * size + end) // 2, end - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        reader = CacheReader(tmp_path, 7)
        for other in {0, 1, 2} - {chunk}:
            assert torch.equal(reader[other], parts[other])
        with pytest.raises(CorruptStateError, match=rf"0007\.bin: chunk {chunk} \(byte {chunk * size}\).*--restart"):
            reader[chunk]


@pytest.mark.parametrize("change", [-1, -180, 1, None])
def test_another_length(tmp_path: Path, change: int | None) -> None:
    write(tmp_path, chunks(torch.bfloat16), torch.bfloat16)
    path = tmp_path / "0007.bin"
    data = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes(data + b"\0" if change > 0 else data[:change])
    found = -1 if change is None else len(data) + change
    with pytest.raises(CorruptStateError, match=rf"0007\.bin has {found} bytes, not {len(data)}.*--restart"):
        CacheReader(tmp_path, 7)


def test_cut_short_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, chunks(torch.bfloat16), torch.bfloat16)
    reader = CacheReader(tmp_path, 7)
    path = tmp_path / "0007.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptStateError, match="chunk 2"):
        reader[2]
    path.unlink()
    with pytest.raises(CorruptStateError, match=r"0007\.bin"):
        reader[0]


def _drop(key: str) -> Callable[[dict[str, object]], object]:
    return lambda manifest: manifest.pop(key)


def _put(key: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda manifest: manifest.update({key: value})


@pytest.mark.parametrize(
    "harm",
    [
        *(_drop(key) for key in ("dtype", "shape", "chunk_samples", "chunks", "format", "version")),
        _put("dtype", "float64"), _put("dtype", None), _put("shape", []), _put("shape", None), _put("shape", ["a"]),
        _put("shape", [8, -5, -6]), _put("chunk_samples", 0), _put("chunk_samples", "x"), _put("chunks", None),
        _put("chunks", 5), _put("chunks", []), _put("chunks", ["0" * 16]), _put("chunks", [1, 2, 3]),
        _put("chunk_samples", 100), _put("version", 2), _put("format", "streamprune-job"),
    ],
)  # fmt: skip
def test_a_damaged_manifest(tmp_path: Path, harm: Callable[[dict[str, object]], object]) -> None:
    write(tmp_path, chunks(torch.bfloat16), torch.bfloat16)
    path = tmp_path / "0007.json"
    manifest = json.loads(path.read_text())
    harm(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptStateError, match="0007"):
        read_all(tmp_path)


def read_all(folder: Path) -> None:
    reader = CacheReader(folder, 7)
    assert sum(len(reader[i]) for i in range(len(reader))) == 8, "samples were lost without a word"


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, chunks(torch.bfloat16), torch.bfloat16)
    (tmp_path / "0007.json").write_bytes(content)
    with pytest.raises(CorruptStateError, match=r"0007\.json"):
        CacheReader(tmp_path, 7)


def test_no_manifest_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CorruptStateError, match=r"0007\.json.*--restart"):
        CacheReader(tmp_path, 7)
    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, 7, torch.float32) as writer:
        writer.append(chunks(torch.float32)[0])
        assert [p.name for p in tmp_path.iterdir()] == [".0007.bin.tmp"]
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_interrupted_rewrite_keeps_nothing_that_could_be_mistaken(tmp_path: Path) -> None:
    """New data under an old manifest would be read as damaged, not as the old."""
    write(tmp_path, chunks(torch.float32), torch.float32)
    write(tmp_path, [c + 1 for c in chunks(torch.float32)], torch.float32)
    assert torch.equal(CacheReader(tmp_path, 7)[2], chunks(torch.float32)[2] + 1)


def test_remove(tmp_path: Path) -> None:
    for stage in (7, 8):
        write(tmp_path, chunks(torch.float32), torch.float32, stage)
    remove_cache(tmp_path, 7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0008.bin", "0008.json"]
    remove_cache(tmp_path, 7)
