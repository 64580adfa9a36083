"""Folders as people have them, from source to output: what is said at the end, what counts as the same job."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, evaluate, plan, prune
from refusals import refused
from safetensors.torch import load_file, save_file

from streamprune.calibration import tokens
from streamprune.cli import main
from streamprune.disk import journal
from streamprune.errors import CheckpointError, StateError, UnsupportedError, UsageError
from streamprune.inspection.inspect import inspect
from streamprune.packing.job import pack, unpack
from streamprune.progress import Progress

Models = Callable[..., Path]
HOW: dict[str, Any] = {"pattern": "2:4", "samples": 2, "seqlen": 8}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(models: Models, tmp_path: Path) -> Path:
    """A checkpoint to do things to."""
    return Path(shutil.copytree(models(), tmp_path / "model"))


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


# ---- left behind


def test_what_was_left_behind_is_told_once(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pytorch_model.bin", "optimizer.bin", "model.gguf", "x.bak"):
        (source / name).write_bytes(b"x")
    args = ["prune", str(source), str(tmp_path / "out"), "--pattern", "2:4", "--calib", str(text), "--samples", "2",
            "--seqlen", "8"]  # fmt: skip
    note = (
        "streamprune: note: files not copied, as they are no part of the model: model.gguf, optimizer.bin, "
        "pytorch_model.bin"
    )
    assert main(args) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "note" in line] == [f"{note} and 1 more"]
    report = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert report["left_behind"] == ["model.gguf", "optimizer.bin", "pytorch_model.bin", "x.bak"]
    assert main(args) == 0 and "note" not in capsys.readouterr().err  # it was told
    assert main([*args[:2], str(tmp_path / "quiet"), *args[3:], "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_tensors_beside_the_index(source: Path, text: Path, tmp_path: Path) -> None:
    """The index decides; what it does not name is left out, by name, and nothing else changes."""
    whole = source / "model.safetensors"
    tensors = load_file(whole)
    prune(source, tmp_path / "plain", calib=text, **HOW)
    norm = "model.norm.weight"
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4), norm: tensors[norm]}
    whole.unlink()
    last = {n: t for n, t in tensors.items() if "layers.2" in n}
    save_file({n: t for n, t in tensors.items() if n not in last}, source / "a.safetensors", metadata={"format": "pt"})
    save_file(last | extra, source / "b.safetensors", metadata={"format": "pt"})
    where = {n: "b.safetensors" if n in last else "a.safetensors" for n in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = prune(source, tmp_path / "out", calib=text, **HOW)
    beside = [f"{n} in b.safetensors" for n in sorted(extra)]
    assert sorted(found.report["beside_index"]) == beside
    assert len([note for note in found.notes if "the index does not name them" in note]) == 1
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    refused(UnsupportedError, lambda: pack(source, tmp_path / "packed"), "the index does not name")


def test_links_out_of_the_model(source: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    found = prune(source, tmp_path / "out", calib=text, **HOW)
    assert found.report["left_behind"] == ["notes.txt"] and not (tmp_path / "out" / "notes.txt").exists()
    prune(source, tmp_path / "asked", calib=text, follow_links=True, **HOW)
    assert (tmp_path / "asked" / "notes.txt").read_text() == "x"
    prune(source, tmp_path / "asked", calib=text, follow_links=True, **HOW)


def test_links_that_are_asked_for_when_all_is_done(source: Path, text: Path, tmp_path: Path) -> None:
    """What cannot be had any more is named."""
    (tmp_path / "secret").write_text("x")
    out, packed = tmp_path / "out", tmp_path / "packed"
    (source / "plain.txt").write_text("x")
    (source / "model.gguf").write_bytes(b"x")
    prune(source, out, calib=text, **HOW)
    prune(source, out, calib=text, follow_links=True, **HOW)
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    shutil.rmtree(out)
    prune(source, out, calib=text, **HOW)
    for more in ({}, {"dry_run": True}):
        again = lambda more=more: prune(source, out, calib=text, follow_links=True, **more, **HOW)  # noqa: E731
        refused(UsageError, again, "without what --follow-links would have copied: notes.txt; copy that from ")
    (out / "notes.txt").symlink_to(tmp_path / "secret")
    pack(out, packed)
    refused(UsageError, lambda: pack(out, packed, follow_links=True), "would have copied: notes.txt; copy that")
    assert not (packed / "notes.txt").exists() and pack(out, packed).status == "up-to-date"


def test_a_pointer_to_the_tokenizer(source: Path, text: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"
    (source / "tokenizer.json").write_text(pointer)
    for call in (
        lambda: prune(source, tmp_path / "out", calib=text, **HOW),
        lambda: evaluate(source, text, seqlen=8, work=tmp_path),
    ):
        refused(CheckpointError, call, "tokenizer.json", "git lfs pull")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "T5Tokenizer"])
def test_a_tokenizer_of_sentencepiece_alone(
    source: Path, text: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """transformers names one package at a time, and following it leads to the next error."""
    monkeypatch.setattr(tokens, "_is_installed", lambda module: module == "sentencepiece")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    refused(CheckpointError, lambda: evaluate(source, text, seqlen=8), "sentencepiece and protobuf",
            "protobuf not installed", "streamprune[tokenizers]")  # fmt: skip
    monkeypatch.setattr(tokens, "_is_installed", lambda module: True)
    refused(CheckpointError, lambda: evaluate(source, text, seqlen=8), "no usable tokenizer")


@pytest.mark.parametrize("verb", ["prune", "calibrate", "plan", "eval", "reference", "pack"])
def test_an_adapter_beside_full_weights(models: Models, source: Path, text: Path, tmp_path: Path, verb: str) -> None:
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, source / "adapter_model.safetensors")
    call: dict[str, Callable[[], object]] = {
        "prune": lambda: prune(source, tmp_path / "out", calib=text, **HOW),
        "calibrate": lambda: calibrate(source, tmp_path / "out", calib=text, samples=2, seqlen=8),
        "plan": lambda: plan(source, samples=2, seqlen=8),
        "eval": lambda: evaluate(source, text, seqlen=8),
        "reference": lambda: evaluate(models(), text, reference=source, seqlen=8),
        "pack": lambda: pack(source, tmp_path / "out"),
    }
    refused(UnsupportedError, call[verb], "adapter_config.json", "merge", "move the adapter's files away")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert inspect(source).totals.linears == 21  # bytes are what they are


# ---- other times, the same content


def test_a_finished_output_of_files_that_were_touched(source: Path, text: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "out", calib=text, **HOW)
    calibrate(source, tmp_path / "stats", calib=text, samples=2, seqlen=8)
    pack(tmp_path / "out", tmp_path / "packed", layout="sparse-bitmask")
    unpack(tmp_path / "packed", tmp_path / "again")
    touch(source)
    touch(tmp_path / "out")
    touch(tmp_path / "packed")
    for call in (
        lambda: prune(source, tmp_path / "out", calib=text, **HOW),
        lambda: calibrate(source, tmp_path / "stats", calib=text, samples=2, seqlen=8),
        lambda: pack(tmp_path / "out", tmp_path / "packed", layout="sparse-bitmask"),
    ):
        found = call()
        assert found.status == "up-to-date"
        assert ["other modification times" in note for note in found.notes] == [True]
    assert unpack(tmp_path / "packed", tmp_path / "again").status == "up-to-date"


def test_another_model_of_the_same_shape_is_another_job(source: Path, text: Path, tmp_path: Path) -> None:
    """A single tensor that was trained on, with all times as they were but its file's."""
    prune(source, tmp_path / "out", calib=text, **HOW)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused(StateError, lambda: prune(source, tmp_path / "out", calib=text, **HOW), "model shards")


def test_an_output_of_before_is_refused_as_it_was(source: Path, text: Path, tmp_path: Path) -> None:
    """Reports of earlier versions do not say what the content was."""
    prune(source, tmp_path / "out", calib=text, **HOW)
    path = tmp_path / "out" / "streamprune.json"
    report = journal.read_json(path, "report")
    journal.write_json(path, "report", {key: value for key, value in report.items() if key not in ("content", "files")})
    assert prune(source, tmp_path / "out", calib=text, **HOW).status == "up-to-date"
    touch(source)
    refused(StateError, lambda: prune(source, tmp_path / "out", calib=text, **HOW), "model shards")


@pytest.mark.parametrize("work", [False, True])
def test_unfinished_work_goes_on(source: Path, text: Path, tmp_path: Path, work: bool) -> None:
    more: dict[str, Any] = {"work": tmp_path / "work"} if work else {}

    def stop(step: Progress) -> None:
        if step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", calib=text, **HOW, **more, progress=stop)
    touch(source)
    steps: list[int] = []
    found = prune(source, tmp_path / "out", calib=text, **HOW, **more, progress=lambda step: steps.append(step.done))
    assert found.status == "done" and min(steps) > 1
    assert any("other modification times" in note for note in found.notes)
    prune(source, tmp_path / "plain", calib=text, **HOW)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


# ---- names of wrappers


@pytest.mark.parametrize(
    ("prefix", "whose"),
    [("_orig_mod.", "torch.compile"), ("module.", "DistributedDataParallel"), ("base_model.model.", "peft"),
     ("module._orig_mod.", "torch.compile")],
)  # fmt: skip
def test_weights_saved_with_their_wrapper(source: Path, tmp_path: Path, prefix: str, whose: str) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({prefix + n: t for n, t in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    refused(CheckpointError, lambda: plan(source, samples=2, seqlen=8), prefix, whose, "rename")


def test_a_weight_that_the_index_forgot(source: Path) -> None:
    names = [name for name in load_file(source / "model.safetensors") if name != "lm_head.weight"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(CheckpointError, lambda: plan(source, samples=2, seqlen=8), "lm_head.weight in model.safetensors", "add it")
