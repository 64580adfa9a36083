"""The output folder: transformers loads it, every file of MODEL that should be there is, and nothing else."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from calls import prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune.errors import CorruptStateError, UsageError
from streamprune.inspection.inspect import inspect
from streamprune.progress import Progress

KINDS = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "falcon"]
Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(source: Path, out: Path, text: Path, **more: Any) -> dict[str, Any]:
    """In shards of a stage each, unless `more` says otherwise."""
    how = {
        "calib": text,
        "samples": 3,
        "seqlen": 16,
        "shard_size": 1,
        **({"pattern": "2:4"} if "sparsity" not in more else {}),
    }
    return dict(prune(source, out, **(how | more)).report)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def split_in_two(folder: Path) -> Path:
    """Turns a single-file checkpoint into two shards that cut through a layer, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {n: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == shard}, folder / shard, metadata={"format": "pt"})
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size, "total_parameters": 12345}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_it(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    pruned(models(kind), out, text)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = AutoTokenizer.from_pretrained(out)("w3 w14 w15", return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    found = inspect(out, expect="2:4")
    assert found.ok and found.totals.negative_zeros == 0 and found.totals.sparsity == 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_shards_and_index(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    """One shard a stage; the index knows every tensor and where it is, once."""
    out = tmp_path / "out"
    report = pruned(models(kind), out, text)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    held: dict[str, str] = {}
    size = 0
    for shard in shards:
        with safe_open(out / shard, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}
            for name in f.keys():  # noqa: SIM118
                assert held.setdefault(name, shard) == shard
                size += f.get_tensor(name).nbytes
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == size
    before = tensors_of(models(kind))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors_of(out).items()
    }
    for i in range(3):
        layer = {n for n in held if f".{i}." in n}
        assert {held[n] for n in layer} == {shards[i + 1]} and len(layer) > 4
    sizes = {f["name"]: f["bytes"] for f in report["files"]}
    on_disk = {str(p.relative_to(out)): p.stat().st_size for p in out.rglob("*") if p.is_file()}
    assert sizes == {n: b for n, b in on_disk.items() if n != "streamprune.json"}


def test_tied_embeddings_are_written_once(models: Models, text: Path, tmp_path: Path) -> None:
    for kind in ("gpt2", "gemma2", "bloom", "opt"):
        out = tmp_path / kind
        pruned(models(kind), out, text)
        assert not any("lm_head" in n for n in tensors_of(out))
        assert sum(p.stat().st_size for p in out.glob("*.safetensors")) < 1.5 * sum(
            t.nbytes for t in tensors_of(models(kind)).values()
        )
        model = AutoModelForCausalLM.from_pretrained(out)
        assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_a_sharded_source(models: Models, text: Path, tmp_path: Path) -> None:
    """How the source is cut into files changes nothing in the tensors, and the index keeps its metadata."""
    source = split_in_two(Path(shutil.copytree(models("llama"), tmp_path / "two")))
    pruned(source, tmp_path / "out", text)
    pruned(models("llama"), tmp_path / "one", text)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "out")
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in two.values()), "total_parameters": 12345}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_one_file_without_an_index(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    """Where all of it fits into a shard; the same tensors as in many."""
    pruned(models(kind), tmp_path / "one", text, shard_size="5GB")
    pruned(models(kind), tmp_path / "many", text)
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(t, many[n]) for n, t in one.items())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert inspect(tmp_path / "one", expect="2:4", against=models(kind)).ok


@pytest.mark.parametrize("method", ["swiftprune", "hwpq", "obs-admm", "swiftprune-tuned"])
def test_shards_are_as_large_as_asked(models: Models, text: Path, tmp_path: Path, method: str) -> None:
    """Nothing is left out, all is aligned, and the report tells each file's size and hash."""
    sizes = [t.nbytes for t in tensors_of(models("llama")).values()]
    limit = sum(sizes) * 3 // 5
    report = pruned(models("llama"), tmp_path / "out", text, shard_size=limit, method=method)
    shards = bytes_of(tmp_path / "out")
    assert sorted(shards) == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in range(1, len(shards) + 1)]
    assert 2 <= len(shards) <= 3 and max(map(len, shards.values())) < limit + 4096
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_of(tmp_path / "out").keys()
    said = {f["name"]: (f["bytes"], f["xxh3_128"]) for f in report["files"]}
    for name, data in shards.items():
        assert said[name] == (len(data), xxhash.xxh3_128_hexdigest(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                itemsize = {"BF16": 2, "F32": 4, "F8_E4M3": 1}[entry["dtype"]]
                assert entry["data_offsets"][0] % itemsize == 0 and index[tensor] == name


@pytest.mark.parametrize("method", ["swiftprune", "obs-admm", "swiftprune-tuned"])
def test_a_stopped_job_goes_on_within_its_shard(models: Models, text: Path, tmp_path: Path, method: str) -> None:
    """The bytes of an uninterrupted run, whatever lay behind the last stage; another size asked for changes nothing."""
    pruned(models("llama"), tmp_path / "whole", text, shard_size="5GB", method=method)
    whole = bytes_of(tmp_path / "whole")

    def stop(step: Progress) -> None:
        if step.name == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(models("llama"), tmp_path / "out", text, shard_size="5GB", method=method, progress=stop)
    with (tmp_path / "out.partial" / "model.safetensors").open("ab") as f:
        f.write(b"torn" * 99)
    steps: list[str] = []
    how = {"shard_size": 1, "method": method, "progress": lambda step: steps.append(step.name)}
    pruned(models("llama"), tmp_path / "out", text, **how)
    assert steps == ["layer 2", "head"] and bytes_of(tmp_path / "out") == whole


def test_what_was_written_is_checked_before_a_shard_is_continued(models: Models, text: Path, tmp_path: Path) -> None:
    def stop(step: Progress) -> None:
        if step.name == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruned(models("llama"), tmp_path / "out", text, shard_size="5GB", progress=stop)
    shard = tmp_path / "out.partial" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptStateError, match=r"model\.safetensors is missing or damaged.*--restart"):
        pruned(models("llama"), tmp_path / "out", text, shard_size="5GB")


@pytest.mark.parametrize("size", ["much", "0", "-1GB"])
def test_wrong_shard_sizes(models: Models, text: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(UsageError, match=size):
        pruned(models("llama"), tmp_path / "out", text, shard_size=size)


def test_side_files(models: Models, text: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    side = {
        "LICENSE": b"Do as you like.\r\n",
        "modeling_special.py": b"raise SystemExit\n",
        "sub/deeper/notes.txt": bytes(range(256)),
        "chat_template.jinja": b"{{ messages }}",
        "empty.json": b"",
        "generation_config.json": b'{"temperature": 0.5}',
    }
    left_out = {
        "pytorch_model.bin": b"weights",
        "pytorch_model-00001-of-00002.bin": b"weights",
        "model.gguf": b"weights",
        "tf_model.h5": b"weights",
        "sub/model.safetensors": b"weights",
        ".hidden": b"hidden",
        ".git/config": b"hidden",
        "__pycache__/modeling_special.pyc": b"compiled",
        "streamprune.json": b"of an earlier job",
    }
    for name, data in (side | left_out).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    out = tmp_path / "out"
    pruned(source, out, text)
    for name in [*side, "config.json", "tokenizer.json", "tokenizer_config.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    ours = {
        "README.md",
        "streamprune.json",
        "model.safetensors.index.json",
        *(p.name for p in out.glob("*.safetensors")),
    }
    assert names == {*side, "config.json", "tokenizer.json", "tokenizer_config.json", *ours}


def test_modes_follow_the_umask(models: Models, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned(models("llama"), out, text)
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    expected = stat.S_IMODE(plain.stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir() if p.is_file()} == {expected}


def test_config_says_nothing_new(models: Models, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned(models("llama"), out, text)
    assert (out / "config.json").read_bytes() == (models("llama") / "config.json").read_bytes()
    assert not {"quantization_config", "sparsity_config"} & json.loads((out / "config.json").read_text()).keys()
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_no_negative_zero(models: Models, text: Path, tmp_path: Path) -> None:
    """-0.0 in a linear becomes +0.0, kept or pruned; what is not pruned keeps every bit."""
    source = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:, ::3] = -0.0
    tensors["model.layers.1.input_layernorm.weight"][3] = -0.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    pruned(source, out, text, sparsity=0.25)
    after = tensors_of(out)
    for name, tensor in after.items():
        negative = torch.signbit(tensor) & (tensor == 0)
        assert int(negative.sum()) == (name == "model.layers.1.input_layernorm.weight"), name
    assert inspect(out).totals.negative_zeros == 0


def test_what_the_model_does_not_know_is_kept(models: Models, text: Path, tmp_path: Path) -> None:
    """Tensors of old exports and odd dtypes go through bit by bit, into the shard of their layer."""
    source = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.tensor([1.0, float("nan")]),
        "model.extra.counts": torch.arange(5, dtype=torch.int64),
        "model.extra.flags": torch.tensor([True, False, True]),
        "model.extra.scalar": torch.tensor(3.5, dtype=torch.float64),
        "model.extra.none": torch.zeros(0, 7),
    }
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    pruned(source, out, text)
    after = tensors_of(out)
    assert after.keys() == (tensors | extra).keys()
    for name, tensor in extra.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].nan_to_num(9.0), tensor.nan_to_num(9.0)), name
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.1.self_attn.rotary_emb.inv_freq"] == "model-00003-of-00005.safetensors"


def test_mixed_dtypes_stay_mixed(models: Models, text: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors = {n: t.float() if "norm" in n or "layers.2.mlp" in n else t for n, t in tensors.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    pruned(source, out, text)
    assert {n: t.dtype for n, t in tensors_of(out).items()} == {n: t.dtype for n, t in tensors.items()}
    assert inspect(out, expect="2:4").ok


def test_the_report(models: Models, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    returned = pruned(models("llama"), out, text, sparsity=0.3, skip="down_proj")
    report = json.loads((out / "streamprune.json").read_text())
    assert {k: v for k, v in report.items() if k in returned} == json.loads(json.dumps(returned))
    assert report["recipe"] == "swiftprune"
    assert report["job"]["sparsity"] == 0.3 and report["job"]["skip"] == "down_proj"
    assert len(report["linears"]) == 18
    for linear in report["linears"]:
        weight = tensors_of(out)[f"{linear['name']}.weight"]
        assert linear["pruned"] == int((weight == 0).sum()) == linear["rows"] * 9
        assert 0 < linear["removed_score"] < 0.5
    zeros = sum(n["pruned"] for n in report["linears"]) / sum(n["rows"] * n["in_features"] for n in report["linears"])
    assert report["sparsity"] == pytest.approx(zeros) == pytest.approx(9 / 32)
    assert [s["name"] for s in report["stages"]] == ["embed", "layer 0", "layer 1", "layer 2", "head"]
    assert report["calibration"]["samples"] == 3 and report["calibration"]["text"] == text.name
    assert {"streamprune", "torch", "transformers", "python"} <= report["versions"].keys()
    assert report["seconds"] > 0 and report["peak_rss_bytes"] > 1 << 20


def test_scores_beyond_float32(models: Models, tmp_path: Path) -> None:
    """Weights may be as large as bf16 goes: their scores are not known then, and the report says so."""
    source = tmp_path / "model"
    shutil.copytree(models("llama"), source)
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name][0] = torch.finfo(torch.bfloat16).max
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    report = prune(source, tmp_path / "out", sparsity=0.5, method="magnitude", score="lscore-isotropic", calib=None,
                   samples=1, seqlen=8, only="layers.1.").report  # fmt: skip
    scores = {n["name"]: n["removed_score"] for n in report["linears"]}
    assert scores.pop(name.removesuffix(".weight")) is None
    assert all(0 < score < 0.5 for score in scores.values())
