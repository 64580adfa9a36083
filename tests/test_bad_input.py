"""Everything that can be wrong with MODEL, the arguments and the texts, through the command line.

Each refusal has its exit code and is one line on stderr that names what, where and the remedy; afterwards MODEL
is as it was, and beside OUT nothing is left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamprune.cli import main

Models = Callable[..., Path]
Refuse = Callable[..., str]

PRUNE = ["--sparsity", "0.5", "--samples", "2", "--seqlen", "16"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(models: Models, tmp_path: Path) -> Path:
    """A llama of three layers to spoil."""
    return Path(shutil.copytree(models("llama"), tmp_path / "in" / "model"))


def look(folder: Path) -> dict[str, str]:
    """Every file below a folder and its hash."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def command(*args: object) -> int:
    try:
        return main([str(a) for a in args])
    except SystemExit as e:  # argparse's own refusals
        assert isinstance(e.code, int)
        return e.code


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """refuse(code, *needles, args=[...]): runs the command, checks all that holds for any refusal; its one line."""

    def check(code: int, *needles: str, args: list[object]) -> str:
        before = look(tmp_path)
        capsys.readouterr()
        assert command(*args) == code
        shown = capsys.readouterr()
        lines = shown.err.splitlines()
        assert len(lines) == 1, shown.err
        assert lines[0].startswith("streamprune: error: ")
        assert "Traceback" not in lines[0] and "unexpected" not in lines[0]
        assert shown.out == ""
        for needle in needles:
            assert needle in lines[0], lines[0]
        assert look(tmp_path) == before  # no OUT, no OUT.partial, no lock, and MODEL unchanged
        return lines[0]

    return check


@pytest.fixture
def prune_args(model: Path, text: Path, tmp_path: Path) -> list[object]:
    return ["prune", model, tmp_path / "out", *PRUNE, "--calib", text, "--quiet"]


def every_verb(model: Path, text: Path, folder: Path) -> dict[str, list[object]]:
    """Commands that read MODEL's weights, each in its own way."""
    window = ["--samples", "2", "--seqlen", "16", "--quiet"]
    return {
        "prune": ["prune", model, folder / "out", "--sparsity", "0.5", "--calib", text, *window],
        "prune with two passes": [
            "prune", model, folder / "out", "--pattern", "2:4", "--calib", text, "--propagate", "pruned", *window,
        ],
        "prune without calibration": ["prune", model, folder / "out", "--sparsity=0.5", "--method=magnitude", "-q"],
        "calibrate": ["calibrate", model, folder / "stats", "--calib", text, *window],
        "eval": ["eval", model, "--text", text, "--seqlen", "16", "--work", folder / "in", "--quiet"],
    }  # fmt: skip


def change(model: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def configure(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))


def shard(model: Path) -> None:
    """Two shards and an index instead of one file."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    where = {n: f"model-0000{1 + ('layers.1' in n)}-of-00002.safetensors" for n in sorted(tensors)}
    for name in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == name}, model / name, metadata={"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


# ---- shards


VERBS = ["prune", "prune with two passes", "prune without calibration", "calibrate", "eval"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("spoil", "needle"),
    [
        (lambda data: data[:-10], "truncated"),
        (lambda data: data[:200], "truncated"),
        (lambda data: data[:5], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: data + b"12", "bytes after the last tensor"),
        (lambda data: data[:8] + b"[" + data[9:], "no safetensors file"),
        (lambda data: data[:20] + b"\xff" + data[21:], "malformed"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ],
)
def test_spoilt_file(
    model: Path, text: Path, tmp_path: Path, refuse: Refuse, verb: str, spoil: Any, needle: str
) -> None:
    path = model / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    refuse(3, "model.safetensors", needle, args=every_verb(model, text, tmp_path)[verb])


def test_spoilt_shard(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    shard(model)
    path = model / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refuse(3, path.name, "truncated", "download", args=prune_args)
    path.unlink()
    refuse(3, path.name, "missing", "download", args=prune_args)
    save_file({"model.norm.weight": torch.zeros(32)}, path)
    refuse(3, "index", path.name, "which does not hold it", "download", args=prune_args)


def test_spoilt_index(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    shard(model)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for bad in ("{", "[]", "{}", '{"weight_map": {"a": "../evil.safetensors"}}'):
        index.write_text(bad)
        refuse(3, "model.safetensors.index.json", args=prune_args)
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refuse(3, "layers.9", "model-00001-of-00002.safetensors", args=prune_args)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_missing_tensor(model: Path, prune_args: list[object], refuse: Refuse, name: str) -> None:
    change(model, lambda tensors: [tensors.pop(name)][:0])  # type: ignore[arg-type, return-value]
    refuse(3, f"tensor {name} is missing", args=prune_args)


# ---- NaN and Inf


PLACES = [
    ("model.layers.1.mlp.up_proj.weight", [17, 5]),
    ("model.layers.2.self_attn.o_proj.weight", [0, 0]),
    ("model.layers.0.input_layernorm.weight", [31]),
    ("model.norm.weight", [3]),
    ("model.embed_tokens.weight", [198, 30]),
    ("lm_head.weight", [100, 2]),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("name", "place"), PLACES, ids=[n for n, _ in PLACES])
def test_not_a_number(
    model: Path, text: Path, tmp_path: Path, refuse: Refuse, verb: str, name: str, place: list[int]
) -> None:
    """File, tensor and index are named, also of rows that no token of the text looks up."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][tuple(place)] = float("nan")

    change(model, edit)
    refuse(3, "model.safetensors", name, "nan", f"at {place}", "damaged", args=every_verb(model, text, tmp_path)[verb])


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("verb", ["prune", "prune without calibration"])
def test_infinity_in_a_shard(model: Path, text: Path, tmp_path: Path, refuse: Refuse, verb: str, value: float) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][[30, 31], [60, 2]] = value

    change(model, edit)
    shard(model)
    refuse(
        3, "model-00002-of-00002.safetensors: tensor model.layers.1.mlp.down_proj.weight", f"is {value} at [30, 60]",
        args=every_verb(model, text, tmp_path)[verb],
    )  # fmt: skip


def test_not_a_number_with_statistics(
    model: Path, text: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that came after the calibration, at a place that is not among what identifies a model."""
    monkeypatch.setattr("streamprune.disk.checkpoint._SAMPLES_PER_SHARD", 1)
    stats = tmp_path / "in" / "stats"
    assert command("calibrate", model, stats, "--calib", text, "--samples", "2", "--seqlen", "16", "-q") == 0
    args = ["prune", model, tmp_path / "out", "--pattern", "2:4", "--stats", stats, "-q"]
    change(model, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), float("nan")))
    refuse(3, "model.layers.1.mlp.up_proj.weight is nan at [3, 4]", args=args)
    monkeypatch.undo()
    refuse(2, "another model", args=args)


def test_not_a_number_in_a_transposed_linear(models: Models, text: Path, tmp_path: Path, refuse: Refuse) -> None:
    """The index is the one in the file."""
    model = Path(shutil.copytree(models("gpt2"), tmp_path / "in" / "model"))
    name = "transformer.h.1.attn.c_attn.weight"
    change(model, lambda tensors: tensors[name].__setitem__((31, 90), float("nan")))
    refuse(3, name, "at [31, 90]", args=every_verb(model, text, tmp_path)["prune without calibration"])
    refuse(3, name, "at [31, 90]", args=every_verb(model, text, tmp_path)["prune"])


# ---- configuration


@pytest.mark.parametrize(
    ("values", "code", "needle"),
    [
        ({"intermediate_size": 48}, 3, "model.layers.0.mlp"),
        ({"hidden_size": 64}, 3, "config.json says"),
        ({"vocab_size": 200}, 3, "config.json says"),
        ({"num_hidden_layers": 4}, 3, "model.layers.3."),
        ({"num_hidden_layers": 2}, 3, "model.layers.2."),
        ({"num_hidden_layers": 0}, 4, "decoder layers"),
        ({"num_hidden_layers": -1}, 4, "decoder layers"),
        ({"hidden_size": "wide"}, 3, "config.json"),
        ({"num_attention_heads": 0}, 3, "config.json"),
        ({"hidden_act": "unheard of"}, 3, "config.json"),
        ({"model_type": "llama9"}, 4, "llama9"),
        ({"model_type": "REMOVE"}, 4, "model_type"),
        ({"model_type": 7}, 4, "model_type"),
        ({"model_type": "vit"}, 4, "vit"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 4, "gptq"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, 4, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, 4, "compressed-tensors"),
    ],
    ids=str,
)
def test_configuration(
    model: Path, prune_args: list[object], refuse: Refuse, values: dict[str, Any], code: int, needle: str
) -> None:
    configure(model, **values)
    refuse(code, needle, args=prune_args)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model_type": "llama\xff"}', b"[" * 10**5])
def test_malformed_configuration(model: Path, prune_args: list[object], refuse: Refuse, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    refuse(3, "config.json", args=prune_args)


def test_no_configuration(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    (model / "config.json").unlink()
    refuse(3, "config.json", "missing", args=prune_args)


def test_wrong_shape(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    change(model, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(64, 31, dtype=torch.bfloat16)}))
    line = refuse(3, "model.safetensors", "model.layers.1.mlp.up_proj.weight", args=prune_args)
    assert "[64, 31]" in line and "[64, 32]" in line


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_are_not_pruned(model: Path, prune_args: list[object], refuse: Refuse, dtype: torch.dtype) -> None:
    change(model, lambda t: t.update({n: v.to(dtype) for n, v in t.items() if "layers.1.mlp.up" in n}))
    refuse(4, "model.layers.1.mlp.up_proj.weight", "BF16, F16 and F32", args=prune_args)
    change(model, lambda t: t.update({n: v.float().to(dtype) for n, v in t.items()}))
    refuse(4, "BF16, F16 and F32", args=prune_args)


# ---- kinds of models


def test_experts_of_another_form(model: Path, text: Path, tmp_path: Path, refuse: Refuse) -> None:
    """Doge's outputs depend on the other texts of a batch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "doge", vocab_size=199, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, is_moe=True, num_experts=64, num_experts_per_tok=2,
    )  # fmt: skip
    (model / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    for args in every_verb(model, text, tmp_path).values():
        refuse(4, "doge", "model.layers.0.mlp chooses experts", args=args)


def test_encoder_decoder(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=199, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    shutil.rmtree(model)
    T5ForConditionalGeneration(small).save_pretrained(model)
    refuse(4, "t5", "encoder-decoder", args=prune_args)


def test_no_language_model(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    refuse(4, "clip_vision_model", args=prune_args)


def test_weights_of_another_format(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refuse(4, "pytorch_model.bin", "safetensors", args=prune_args)
    (model / "pytorch_model.bin").rename(model / "model.gguf")
    refuse(4, "GGUF", args=prune_args)
    (model / "model.gguf").unlink()
    refuse(3, "safetensors", args=prune_args)


def test_no_such_model(text: Path, tmp_path: Path, refuse: Refuse) -> None:
    for place in (tmp_path / "none", "no-such-model-name", "./none", text):
        refuse(3, args=["prune", place, tmp_path / "out", *PRUNE])


# ---- arguments


@pytest.mark.parametrize(
    "amount",
    [
        ["--sparsity", "nan"], ["--sparsity", "1"], ["--sparsity", "1.0"], ["--sparsity=-0.1"], ["--sparsity", "50"],
        ["--sparsity", "inf"], ["--sparsity", "half"], ["--sparsity", ""],
        ["--pattern", "4:2"], ["--pattern", "0:4"], ["--pattern", "4:4"], ["--pattern", "2"], ["--pattern", "2:4:8"],
        ["--pattern", "a:b"], ["--pattern", "2:64"], ["--pattern=-1:4"], ["--pattern", ""], ["--pattern", "2.0:4"],
        [], ["--sparsity", "0.5", "--pattern", "2:4"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_impossible_amounts(model: Path, text: Path, tmp_path: Path, refuse: Refuse, amount: list[str]) -> None:
    needle = amount[0].partition("=")[0].removeprefix("--") if amount else "--pattern"
    refuse(2, needle, args=["prune", model, tmp_path / "out", "--calib", text, *amount])


@pytest.mark.parametrize(
    "wrong",
    [
        ["--method", "sparsegpt9"], ["--score", "taylor"], ["--selector", "median"], ["--propagate", "both"],
        ["--dtype", "int8"], ["--backend", "jax"], ["--device", "nonsense"], ["--device", "cuda:99"],
        ["--samples", "0"],
        ["--samples", "two"], ["--seqlen", "1"], ["--seqlen", "65"], ["--seed=-1"], ["--max-ram", "much"],
        ["--max-ram", "0"], ["--max-ram", "1e400"], ["--only", "("], ["--skip", "[z-a]"], ["--nonsense"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_arguments(prune_args: list[object], refuse: Refuse, wrong: list[str]) -> None:
    refuse(2, args=[*prune_args, *wrong])


def test_filters_that_match_nothing(prune_args: list[object], model: Path, refuse: Refuse) -> None:
    for wrong in (["--only", "attention_9"], ["--skip", "."], ["--only", "mlp", "--skip", "proj"]):
        for args in (prune_args, ["plan", model], ["inspect", model]):
            refuse(2, "--only and --skip", "model.layers.0.", args=[*args, *wrong])


@pytest.mark.parametrize(("pattern", "width"), [("3:5", 32), ("2:12", 32), ("16:32", 48)])
def test_widths_that_the_pattern_does_not_divide(
    models: Models, text: Path, tmp_path: Path, refuse: Refuse, pattern: str, width: int
) -> None:
    from conftest import save_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    model = models("llama")
    if width == 48:  # hidden size 32 divides, the width of down_proj does not
        config = AutoConfig.for_model(
            "llama", vocab_size=199, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=64,
        )  # fmt: skip
        model = tmp_path / "in" / "model"
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        save_tokenizer(model)
    window = ["--calib", text, "--samples", "2", "--seqlen", "16", "-q"]
    args = ["prune", model, tmp_path / "out", "--pattern", pattern, *window]
    line = refuse(2, f"{width}", pattern, "--skip", args=args)
    assert ("down_proj" in line) == (width == 48)
    if width == 48:
        assert command(*args, "--skip", "down_proj") == 0
        assert command("inspect", tmp_path / "out", "--skip", "down_proj", "--expect", pattern, "-q") == 0


# ---- texts


@pytest.mark.parametrize(
    ("name", "content", "code", "needle"),
    [
        ("a.txt", b"w1 w2 \xff", 2, "is not text"),
        ("a.txt", b"w1 w2 w3", 2, "3 tokens"),
        ("a.txt", b"", 2, "0 tokens"),
        ("a.jsonl", b'{"text": "w1"}\n{"txt": "w1"}', 2, "line 2"),
        ("a.txt.gz", b"no gzip", 2, "a.txt.gz"),
        ("a.npy", b"no array", 2, "a.npy"),
        ("a.npy", b"", 2, "a.npy"),
    ],
)
def test_texts(model: Path, tmp_path: Path, refuse: Refuse, name: str, content: bytes, code: int, needle: str) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(code, name, needle, args=["prune", model, tmp_path / "out", *PRUNE, "--calib", tmp_path / name])
    refuse(code, name, needle, args=["calibrate", model, tmp_path / "stats", "--calib", tmp_path / name])


def test_token_ids(model: Path, tmp_path: Path, refuse: Refuse) -> None:
    np.save(tmp_path / "a.npy", np.full(100, 199))
    refuse(2, "a.npy", "token id 199", args=["prune", model, tmp_path / "out", *PRUNE, "--calib", tmp_path / "a.npy"])
    refuse(2, "a.npy", "token id 199", args=["eval", model, "--text", tmp_path / "a.npy", "--work", tmp_path / "in"])


def test_no_tokenizer(model: Path, prune_args: list[object], refuse: Refuse) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    refuse(3, "no usable tokenizer", "--calib", args=prune_args)


def test_missing_texts(model: Path, tmp_path: Path, refuse: Refuse) -> None:
    refuse(2, "none.txt", "no such file", args=["prune", model, tmp_path / "out", *PRUNE, "--calib", "none.txt"])
    refuse(2, "none.txt", "no such file", args=["eval", model, "--text", "none.txt"])
    refuse(2, "--text", args=["eval", model])


# ---- places


def test_out_is_taken(model: Path, prune_args: list[object], tmp_path: Path, refuse: Refuse) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    refuse(6, "out", "choose another OUT", args=prune_args)
    out.unlink()
    (out / "sub").mkdir(parents=True)
    refuse(6, "out", "choose another OUT", args=prune_args)
    shutil.rmtree(out)
    out.symlink_to(tmp_path / "nowhere")
    refuse(6, "out", args=prune_args)
    out.unlink()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    refuse(6, "out.partial", args=prune_args)
    shutil.rmtree(tmp_path / "out.partial")
    assert command(*prune_args) == 0
    refuse(6, "sparsity is 0.5 there and 0.6 here", args=[*prune_args, "--sparsity", "0.6"])
    refuse(6, "another job", args=[*prune_args, "--sparsity", "0.6", "--restart"])


def test_places_within_the_model(
    model: Path, text: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [*PRUNE, "--calib", text]
    for out in (model, model / "out", model / "sub" / ".." / "out"):
        refuse(2, "within MODEL", args=["prune", model, out, *more])
    refuse(2, "--work", "within MODEL", args=["prune", model, tmp_path / "out", *more, "--work", model / "w"])
    refuse(2, "--save-stats", args=["prune", model, tmp_path / "out", *more, "--save-stats", model / "s"])
    monkeypatch.chdir(model)
    refuse(2, "within MODEL", args=["prune", ".", "out", *more])
    refuse(2, "OUT", args=["prune", ".", ".", *more])
    refuse(2, "OUT", args=["prune", model, "/", *more])


def test_work_within_out(prune_args: list[object], tmp_path: Path, refuse: Refuse) -> None:
    """The activations would make OUT exist before it is finished: a resume could not tell it from another's."""
    for work in (tmp_path / "out", tmp_path / "out" / "work", tmp_path / "out.partial"):
        refuse(2, "--work", "OUT", args=[*prune_args, "--work", work])


def test_a_file_where_a_folder_is_needed(model: Path, text: Path, tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "file").write_text("x")
    refuse(6, "file", args=["prune", model, tmp_path / "file" / "out", *PRUNE, "--calib", text])
    refuse(6, "file", args=["eval", model, "--text", text, "--work", tmp_path / "file"])


# ---- afterwards


def test_debug_shows_where(model: Path, prune_args: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").unlink()
    assert command(*prune_args, "--debug") == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and "open_checkpoint" in err
    assert err.splitlines()[-1].startswith("streamprune: error: ")


def test_a_fault_of_ours(
    prune_args: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw is one line too, and says how to see more."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("streamprune.pruning.job.prune", fail)
    assert command(*prune_args) == 1
    line = "streamprune: error: unexpected RuntimeError: first line second line; run again with --debug for "
    line += "a traceback\n"
    assert capsys.readouterr().err == line


def test_a_file_that_this_user_may_not_read(
    prune_args: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is no fault of ours, wherever it is met."""

    def look(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "/of/others/text.txt")

    monkeypatch.setattr("streamprune.pruning.job.prune", look)
    assert command(*prune_args) == 2
    line = "streamprune: error: /of/others/text.txt: Permission denied; give this user access to it, or name another "
    line += "place\n"
    assert capsys.readouterr().err == line


def test_after_the_fault_is_mended(model: Path, prune_args: list[object], tmp_path: Path, refuse: Refuse) -> None:
    """A refusal leaves nothing that hinders the same command later."""
    clean = (model / "model.safetensors").read_bytes()
    change(model, lambda tensors: tensors["lm_head.weight"].__setitem__((3, 4), float("nan")))
    refuse(3, "lm_head.weight", args=prune_args)
    (model / "model.safetensors").write_bytes(clean)
    assert command(*prune_args) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}


def test_a_spoilt_layer_after_a_good_one(model: Path, prune_args: list[object], tmp_path: Path, refuse: Refuse) -> None:
    """With work already done, bad input throws that work away: it belongs to no sound model."""
    change(model, lambda tensors: tensors["model.layers.2.mlp.up_proj.weight"].__setitem__((0, 0), float("nan")))
    work = tmp_path / "in" / "work"
    work.mkdir()
    refuse(3, "model.layers.2", args=[*prune_args, "--work", work, "--save-stats", tmp_path / "stats"])
