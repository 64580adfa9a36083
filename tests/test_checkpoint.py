"""Checkpoints: what is read, which files belong to them, and one clear error for each thing amiss."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import DATA, GOOD, JSON, ONE, entry, make, refused, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused as said

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.header import TensorRef
from streamprune.disk.quantised import plain
from streamprune.errors import CheckpointError, UnsupportedError


def test_a_single_file_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "m", config={"model_type": "x", "n": [1]}))
    start = 8 + len(json.dumps(GOOD))
    assert list(checkpoint.tensors.values()) == [
        TensorRef("a", "model.safetensors", "F32", (2, 2), start, start + 16),
        TensorRef("b", "model.safetensors", "U8", (3,), start + 16, start + 19),
    ]
    assert checkpoint.nbytes == 19
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.config == {"model_type": "x", "n": [1]}
    assert checkpoint.tensors["b"].nbytes == 3


def test_order_is_shard_then_offset(tmp_path: Path) -> None:
    one = shard_bytes({"z": entry("U8", [1], 0, 1), "y": entry("U8", [1], 1, 2)}, b"ab")
    two = shard_bytes({"b": entry("U8", [1], 1, 2), "e": entry("F16", [0, 5], 1, 1), "c": entry("U8", [], 0, 1)}, b"cd")
    where = {
        "b": "2.safetensors",
        "c": "2.safetensors",
        "e": "2.safetensors",
        "y": "1.safetensors",
        "z": "1.safetensors",
    }
    index = {"metadata": {"total_size": 999}, "weight_map": where}  # a wrong total_size is harmless
    checkpoint = open_checkpoint(make(tmp_path / "m", {"2.safetensors": two, "1.safetensors": one}, index=index))
    assert list(checkpoint.tensors) == ["z", "y", "c", "e", "b"]
    assert checkpoint.shards == ("1.safetensors", "2.safetensors")
    assert checkpoint.index_metadata == {"total_size": 999}
    assert checkpoint.tensors["c"].shape == ()


# ---- indexes


@settings(max_examples=150, deadline=None)
@given(
    JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.sampled_from("ab"), JSON), "metadata": JSON})
)
def test_fuzzed_indexes_give_a_checkpoint_or_an_error(tmp_path_factory: pytest.TempPathFactory, index: object) -> None:
    shards = {"s.safetensors": shard_bytes(GOOD, DATA)}
    folder = make(tmp_path_factory.getbasetemp() / "fuzz-index", shards, index=index)
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()


S = shard_bytes({"a": ONE}, b"x")


@pytest.mark.parametrize(
    ("weight_map", "needle"),
    [
        (None, "weight_map"),
        ({}, "weight_map"),
        ([], "weight_map"),
        ({"a": 1}, "not a string"),
        ({"a": "../s.safetensors"}, "plain file name"),
        ({"a": "/etc/passwd"}, "plain file name"),
        ({"a": "sub/s.safetensors"}, "plain file name"),
        ({"a": "sub\\s.safetensors"}, "plain file name"),
        ({"a": ".."}, "plain file name"),
        ({"a": ""}, "plain file name"),
        ({"a": "s\0.safetensors"}, "plain file name"),
        ({"a": "gone.safetensors"}, "gone.safetensors"),
        ({"a": "x" * 300}, "cannot be read"),
        ({"a": "s.safetensors", "b": "s.safetensors"}, "tensor b should be in s.safetensors"),
        ({"b": "s.safetensors"}, "tensor b should be in s.safetensors"),
        ({"a": "s.safetensors", "b": "t.safetensors"}, "b should be in t.safetensors, which does not hold it"),
    ],
)
def test_malformed_index(tmp_path: Path, weight_map: object, needle: str) -> None:
    refused(
        make(tmp_path / "m", {"s.safetensors": S, "t.safetensors": S}, index={"weight_map": weight_map}),
        needle,
    )


def test_index_with_a_repeated_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", {"s.safetensors": S})
    text = '{"weight_map": {"a": "s.safetensors", "a": "s.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, "model.safetensors.index.json", "a occurs twice")


def test_files_outside_the_index_are_left_alone(tmp_path: Path) -> None:
    shards = {"s.safetensors": S, "consolidated.safetensors": b"junk"}
    folder = make(tmp_path / "m", shards, index={"weight_map": {"a": "s.safetensors"}})
    assert open_checkpoint(folder).shards == ("s.safetensors",)


def test_other_names_of_the_index_and_the_single_file(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", {"s.safetensors": S}, index={"weight_map": {"a": "s.safetensors"}})
    (folder / "model.safetensors.index.json").rename(folder / "weights.safetensors.index.json")
    assert open_checkpoint(folder).shards == ("s.safetensors",)
    assert open_checkpoint(make(tmp_path / "n", {"weights.safetensors": S})).shards == ("weights.safetensors",)


def test_model_safetensors_goes_before_an_index_that_does_not_name_it(tmp_path: Path) -> None:
    shards = {"model.safetensors": S, "s.safetensors": b"junk"}
    folder = make(tmp_path / "m", shards, index={"weight_map": {"a": "s.safetensors"}})
    assert open_checkpoint(folder).shards == ("model.safetensors",)
    both = {"model.safetensors": S, "s.safetensors": shard_bytes({"b": ONE}, b"x")}
    index = {"weight_map": {"a": "model.safetensors", "b": "s.safetensors"}}
    assert open_checkpoint(make(tmp_path / "n", both, index=index)).shards == (
        "model.safetensors",
        "s.safetensors",
    )


def test_several_files_without_an_index(tmp_path: Path) -> None:
    refused(
        make(tmp_path / "m", {"s.safetensors": S, "t.safetensors": S}),
        "s.safetensors, t.safetensors",
        "index",
    )


# ---- folders and configurations


def test_folder_is_missing_or_a_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder", str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no *.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\ufeff{}", "[" * 100_000])
def test_malformed_config(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "m")
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "malformed")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "missing")


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("pytorch_model.bin", "safe_serialization=True"),
        ("consolidated.00.pth", "safe_serialization=True"),
        ("model.pt", "safe_serialization=True"),
        ("model-q4.gguf", "GGUF"),
    ],
)
def test_other_formats_are_unsupported(tmp_path: Path, name: str, needle: str) -> None:
    folder = make(tmp_path / "m", {name: b"x"})
    refused(folder, needle, kind=UnsupportedError)
    (folder / "config.json").unlink()
    refused(folder, needle, kind=UnsupportedError)


def test_an_adapter_is_unsupported(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", {"adapter_model.safetensors": S, "adapter_config.json": b"{}"})
    refused(folder, "adapter", kind=UnsupportedError)


@pytest.mark.parametrize(
    ("config", "needle"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {}}, None),
        ({"quantization_config": {"quant_method": "c", "sparsity_config": {"format": "dense"}}}, None),
        ({"quantization_config": {"quant_method": "c", "sparsity_config": {"format": "sparse-24-bitmask"}}}, "unpack"),
        ({"quantization_config": None}, None),
        ({"quantization_config": "odd\n"}, "odd"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_quantised_models_open_but_can_be_refused(tmp_path: Path, config: object, needle: str | None) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "m", config=config))
    if needle is None:
        assert plain(checkpoint) is checkpoint
        return
    with pytest.raises(UnsupportedError, match=needle) as caught:
        plain(checkpoint)
    assert "config.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ---- the file system


def hub_snapshot(root: Path) -> Path:
    """A model as the hub's cache has it: links into blobs."""
    source = make(root / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "sub").mkdir()
    (source / "sub" / "extra.jinja").write_text("x")
    snapshot = root / "models--o--n" / "snapshots" / "abc"
    blobs = root / "models--o--n" / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(i))
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(hub_snapshot(tmp_path))
    assert checkpoint.nbytes == 19
    assert checkpoint.side_files().carried == ("config.json", "sub/extra.jinja", "tokenizer.json")
    assert checkpoint.identity() == open_checkpoint(tmp_path / "source").identity()


def test_dangling_links(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "pytorch_model.bin").symlink_to("nowhere")  # weights of another format: not needed
    (folder / ".hidden").symlink_to("nowhere")
    checkpoint = open_checkpoint(folder)
    checkpoint.side_files()
    (folder / "merges.txt").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"merges\.txt: the link leads nowhere"):
        checkpoint.side_files()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    refused(folder, "model.safetensors: the link leads nowhere")


def test_folders_and_pipes_in_place_of_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "model.safetensors", "not a regular file")
    (folder / "model.safetensors").rmdir()
    os.mkfifo(folder / "model.safetensors")  # must not wait for a writer
    refused(folder, "model.safetensors", "not a regular file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_unreadable_files(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "m")
    real = Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:  # chmod 0 would not stop root
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    refused(folder, name, "Permission denied")


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    refused(make(tmp_path / "m"), "Permission denied")


def test_side_files(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    keep = [
        "LICENSE",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "code/deep/modeling_x.py",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer.model",
    ]
    drop = [
        ".gitattributes",
        ".cache/huggingface/x",
        ".git/config",
        "model.safetensors.index.json",
        "flax_model.msgpack",
        "model-00001-of-00002.safetensors",
        "original/consolidated.00.pth",
        "original/consolidated.safetensors",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "q.gguf",
        "onnx/m.onnx",
        "onnx/m.onnx_data",
        "tf_model.h5",
        "rust_model.ot",
        "m.tflite",
        "m.ckpt",
        "streamprune.json",
        "__pycache__/x.pyc",
        "MODEL.GGUF",
    ]
    for name in keep + drop:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "config.json":
            (folder / name).write_text("x")
    (folder / "model.safetensors.index.json").unlink()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file.txt").write_text("x")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    found = open_checkpoint(folder).side_files()
    assert list(found.carried) == sorted(keep)
    hidden = {".gitattributes", ".cache/huggingface/x", ".git/config", "__pycache__/x.pyc", "streamprune.json"}
    assert set(found.left_behind) == set(drop) - hidden - {"model.safetensors.index.json"}


def test_fingerprint_and_identity(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("one")
    first = open_checkpoint(folder)
    copied = open_checkpoint(Path(shutil.copytree(folder, tmp_path / "copy")))
    os.utime(copied.path / "model.safetensors", ns=(1, 1))
    copied = open_checkpoint(copied.path)
    assert first.identity() == copied.identity()
    assert first.fingerprint()["shards"] != copied.fingerprint()["shards"]
    (folder / "README.md").write_text("two")
    assert open_checkpoint(folder).fingerprint() == first.fingerprint() == open_checkpoint(folder).fingerprint()
    before = first.fingerprint()
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "config.json").write_text('{"b": 1}')
    after = open_checkpoint(folder).fingerprint()
    assert {key for key in before if before[key] != after[key]} == {"config", "tokenizer"}


def test_identity_tells_a_fine_tune_from_its_base(tmp_path: Path) -> None:
    big = {"a": entry("U8", [100_000], 0, 100_000)}
    base = open_checkpoint(make(tmp_path / "m", {"model.safetensors": shard_bytes(big, bytes(100_000))}))
    tuned = open_checkpoint(make(tmp_path / "n", {"model.safetensors": shard_bytes(big, b"\1" * 100_000)}))
    differ = {key for key, value in base.identity().items() if tuned.identity()[key] != value}
    assert differ == {"sample"}


def test_no_heavy_import(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from streamprune.disk.checkpoint import open_checkpoint\n"
        "open_checkpoint(Path(sys.argv[1])).fingerprint()\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code, make(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# ---- tensors beside the index


TWO = shard_bytes({"a": ONE, "b": entry("U8", [1], 1, 2)}, b"xy")


def test_the_index_decides(tmp_path: Path) -> None:
    """Tensors that it does not name are no part of the model, nor are second copies of those that it names."""
    shards = {"s.safetensors": TWO, "t.safetensors": shard_bytes({"b": ONE, "c": entry("U8", [1], 1, 2)}, b"zw")}
    folder = make(tmp_path / "m", shards, index={"weight_map": {"a": "s.safetensors", "b": "t.safetensors"}})
    found = open_checkpoint(folder)
    assert {name: ref.shard for name, ref in found.tensors.items()} == {"a": "s.safetensors", "b": "t.safetensors"}
    assert found.beside == ("b in s.safetensors", "c in t.safetensors")
    assert found.index == "model.safetensors.index.json"


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    """Another download would be the same."""
    shards = {"s.safetensors": TWO, "t.safetensors": shard_bytes({"c": ONE}, b"z")}
    weight_map = {"a": "s.safetensors", "b": "t.safetensors", "c": "t.safetensors"}
    message = refused(
        make(tmp_path / "m", shards, index={"weight_map": weight_map}), "s.safetensors holds it: mend the index"
    )
    assert "download" not in message


def test_metadata_that_is_null(tmp_path: Path) -> None:
    shard = shard_bytes({"__metadata__": None, **GOOD}, DATA)
    assert open_checkpoint(make(tmp_path / "m", {"model.safetensors": shard})).tensors.keys() == GOOD.keys()


# ---- what stands in place of files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4000\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Please log in.</body></html>"


@pytest.mark.parametrize(("data", "needle"), [(POINTER, "run `git lfs pull`"), (PAGE, "is a web page")])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_pointers_and_pages(tmp_path: Path, name: str, data: bytes, needle: str) -> None:
    folder = make(tmp_path / "m", index={"weight_map": dict.fromkeys(GOOD, "model.safetensors")})
    (folder / name).write_bytes(data)
    message = refused(folder, name, needle)
    assert ("download" in message) == (data == PAGE)


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "modeling_x.py", "code/tokenizer.model"])
def test_pointers_to_side_files(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(POINTER)
    said(CheckpointError, open_checkpoint(folder).side_files, name, "git lfs pull")


def test_rubbish_is_left_behind(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    rubbish = [
        "model-00001-of-00002.safetensors.incomplete", "tokenizer.json.aria2", "config.json.bak", "optimizer.bin",
        "scheduler.bin", "config.json~", "pytorch_model.bin.index.json", "model.fp16.safetensors.index.json", "x.part",
    ]  # fmt: skip
    for name in rubbish:
        (folder / name).write_text("{}")
    (folder / "special_tokens_map.json").write_bytes(PAGE)
    (folder / "picture.png").write_bytes(POINTER)
    (folder / "page.html").write_bytes(PAGE)
    for name in ("checkpoint-500/config.json", "checkpoint-500/model.bin", "global_step20/x.txt", "more/x.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    found = open_checkpoint(folder).side_files()
    assert found.carried == ("config.json", "more/x.txt", "page.html")
    there = [*rubbish, "special_tokens_map.json", "picture.png", "checkpoint-500/", "global_step20/"]
    assert list(found.left_behind) == sorted(there)


# ---- links


def test_links_that_lead_out_are_left_behind(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (tmp_path / "secret.txt").write_text("x")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inside.txt").write_text("x")
    (folder / "again.txt").symlink_to("inside.txt")
    found = open_checkpoint(folder).side_files()
    assert (found.carried, found.left_behind) == (("again.txt", "config.json", "inside.txt"), ("notes.txt",))
    assert "notes.txt" in open_checkpoint(folder, follow_links=True).side_files().carried


def test_a_folder_of_links(tmp_path: Path) -> None:
    """A snapshot in the hub's cache links to its blobs, and people link a model's files into a folder of their own."""
    blobs = tmp_path / "blobs"
    real = make(blobs)
    (real / "abc").write_text("{}")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for name, blob in (("config.json", "config.json"), ("model.safetensors", "model.safetensors"), ("LICENSE", "abc")):
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob))
    assert open_checkpoint(snapshot).side_files().carried == ("LICENSE", "config.json")


def test_content_goes_by_more_than_time(tmp_path: Path) -> None:
    first = open_checkpoint(make(tmp_path / "m"))
    os.utime(first.path / "model.safetensors", ns=(1, 1))
    touched = open_checkpoint(first.path)
    assert first.fingerprint() != touched.fingerprint() and first.content() == touched.content()
    for at in range(19):  # any tensor
        data = bytearray(DATA)
        data[at] ^= 1
        other = open_checkpoint(make(tmp_path / "n", {"model.safetensors": shard_bytes(GOOD, bytes(data))}))
        assert other.content() != first.content()
