"""Who reads the output: transformers, safetensors and GGUF take what every recipe writes as they take the original.

gguf has no converter of its own; `to_gguf` does what llama.cpp's does for the architecture llama, tokenizer aside.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from calls import prune
from conftest import save_tokenizer, tiny_config
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from streamprune.inspection.inspect import inspect
from streamprune.methods.recipes import RECIPES

LAYERS, HEADS, KV_HEADS = 2, 4, 2
QUANTISED = [name for name, recipe in RECIPES.items() if getattr(recipe, "quantize", None) is not None]
PLAIN = [name for name in RECIPES if name not in QUANTISED]
LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SIDE_FILES = {
    "chat_template.jinja": TEMPLATE.encode(),
    "additional_chat_templates/tools.jinja": b"{{ tools }}\r\n",
    "processor_config.json": b'{"processor_class": "SpecialProcessor"}\n',
    "preprocessor_config.json": b'{ "size": 224 }',
    "special.py": "raise SystemExit  # \N{SNOWMAN}\r\n".encode(),
    "special/deeper/kernels.py": b"raise SystemExit",
    "special/deeper/table.bin": bytes(range(256)),
    "NOTICE": b"",
}
Outputs = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def save_llama(folder: Path, *, tied: bool) -> Path:
    """A random llama in bfloat16, tied or not, with a tokenizer."""
    torch.manual_seed(11)
    config = tiny_config("llama", LAYERS)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that most tests prune, with all kinds of files beside its weights."""
    folder = save_llama(tmp_path_factory.mktemp("consumers") / "model", tied=False)
    for name, data in SIDE_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def outputs(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """outputs(recipe) -> its output at 2:4, made once. Do not write there."""
    made: dict[str, Path] = {}

    def get(recipe: str) -> Path:
        if recipe not in made:
            out = tmp_path_factory.mktemp(f"consumers-{recipe}") / "out"
            prune_it(source, out, text, method=recipe)
            made[recipe] = out
        return made[recipe]

    return get


def prune_it(source: Path, out: Path, text: Path, **more: Any) -> Path:
    prune(source, out, pattern="2:4", calib=text, samples=4, seqlen=32, device="cpu", shard_size=1, **more)
    return out


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def is_linear(name: str) -> bool:
    return any(name.endswith(f".{linear}.weight") for linear in LINEARS)


# ---- transformers


def generates(model: Any, folder: Path) -> None:
    ids = AutoTokenizer.from_pretrained(folder)("w3 w14 w15 w92", return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, 8) and torch.equal(made[:, :4], ids)


@pytest.mark.parametrize("recipe", PLAIN)
def test_transformers(source: Path, outputs: Outputs, recipe: str) -> None:
    """It loads without a word about any tensor, holds what is stored, computes finite numbers, and generates."""
    out = outputs(recipe)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.to_dict() == AutoConfig.from_pretrained(source).to_dict() | {"_name_or_path": str(out)}
    state, tensors = model.state_dict(), stored(out)
    assert state.keys() == tensors.keys() and all(torch.equal(state[n], t) for n, t in tensors.items())
    assert model.dtype == torch.bfloat16
    with torch.inference_mode():
        assert bool(torch.isfinite(model(torch.arange(3, 19)[None]).logits).all())
    generates(model, out)


@pytest.mark.parametrize("recipe", ["swiftprune", "obs-admm"])
def test_tied_weights(text: Path, tmp_path: Path, recipe: str) -> None:
    """The head of a tied model is not written a second time, is not pruned, and is tied again once loaded."""
    before = stored(save_llama(tmp_path / "model", tied=True))
    out = prune_it(tmp_path / "model", tmp_path / "out", text, method=recipe)
    after = stored(out)
    assert "lm_head.weight" not in before and after.keys() == before.keys()
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    generates(model, out)


SPECIAL = """
from transformers import LlamaConfig, LlamaForCausalLM

from .special_config import SpecialConfig


class SpecialForCausalLM(LlamaForCausalLM):
    config_class = SpecialConfig
"""
SPECIAL_CONFIG = """
from transformers import LlamaConfig


class SpecialConfig(LlamaConfig):
    model_type = "special"
"""


def test_custom_code(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose code lies beside its weights is pruned and loaded by that code, which is the output's own copy."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = save_llama(tmp_path / "model", tied=False)
    (source / "special_model.py").write_text(SPECIAL)
    (source / "special_config.py").write_text(SPECIAL_CONFIG)
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "special", "architectures": ["SpecialForCausalLM"]}
    classes = {"AutoConfig": "special_config.SpecialConfig", "AutoModelForCausalLM": "special_model.SpecialForCausalLM"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": classes}))
    out = prune_it(source, tmp_path / "out", text, trust_remote_code=True)
    shutil.rmtree(source)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, trust_remote_code=True)
    assert type(model).__name__ == "SpecialForCausalLM" and not any(info.values()), info
    assert inspect(out, expect="2:4").ok
    generates(model, out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_beside_the_weights(source: Path, outputs: Outputs, recipe: str) -> None:
    """Code, templates and processors go over byte for byte, also in subfolders; the chat template works."""
    out = outputs(recipe)
    for name, data in SIDE_FILES.items():
        assert (out / name).read_bytes() == data, name
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    if recipe in PLAIN:
        assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(out)
    words = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
    assert tokenizer.apply_chat_template(words, tokenize=False) == "w5 w6 w7 "


# ---- safetensors


@pytest.mark.parametrize("recipe", RECIPES)
def test_safetensors(source: Path, outputs: Outputs, recipe: str) -> None:
    """safe_open reads every shard; names, dtypes and shapes are the source's; only linears of layers differ from it."""
    out = outputs(recipe)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    before, after = stored(source), {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            assert f.metadata() == {"format": "pt"}
            for name in f.keys():  # noqa: SIM118
                assert index[name] == file.name and name not in after
                after[name] = f.get_tensor(name)
    assert after.keys() == index.keys()
    scales = {n for n in after if n.endswith("_scale")}
    assert bool(scales) == (recipe in QUANTISED) and after.keys() - scales == before.keys()
    for name, tensor in before.items():
        found = after[name]
        assert found.shape == tensor.shape
        if not is_linear(name):
            tuned = RECIPES[recipe].tune is not None and ".layers." in name  # norms and biases
            assert found.dtype == tensor.dtype and (tuned or torch.equal(found, tensor)), name
            continue
        assert found.dtype == (tensor.dtype if recipe in PLAIN else torch.float8_e4m3fn)
        zeros = (found.float() == 0).unflatten(1, (-1, 4)).sum(2)
        assert int(zeros.min()) >= 2 and (recipe not in PLAIN or int(zeros.max()) == 2), name


# ---- GGUF


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K, (out, in), in llama.cpp's order for rotary embeddings: the two halves of a head interleaved."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def in_gguf(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a llama checkpoint under their names in GGUF, float32. Raises KeyError where a name has none."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    found = {}
    for name, tensor in stored(folder).items():
        data = tensor.float().numpy()
        for ending, heads in (("q_proj.weight", HEADS), ("k_proj.weight", KV_HEADS)):
            data = permute(data, heads) if name.endswith(ending) else data
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None or mapped in found:
            raise KeyError(name)
        found[mapped] = data
    return found


def to_gguf(folder: Path, path: Path, kind: Kind) -> dict[str, np.ndarray]:
    """Writes a checkpoint as GGUF: vectors in F32, matrices in `kind`. Returns what it was made of."""
    config = json.loads((folder / "config.json").read_text())
    tensors = in_gguf(folder)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, data in tensors.items():
        how = Kind.F32 if data.ndim == 1 else kind
        writer.add_tensor(name, gguf.quants.quantize(data, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def from_gguf(path: Path, kind: Kind) -> dict[str, np.ndarray]:
    """Tensors of a GGUF file in float32, in the order of axes of the checkpoint."""
    reader = gguf.GGUFReader(path)
    count = reader.fields["llama.block_count"]
    assert int(count.parts[count.data[0]][0]) == LAYERS
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert tensor.tensor_type == (Kind.F32 if len(shape) == 1 else kind)
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0], ids=lambda k: k.name)
@pytest.mark.parametrize("recipe", PLAIN)
def test_gguf(outputs: Outputs, tmp_path: Path, recipe: str, kind: Kind) -> None:
    """Every tensor finds a name and its place, numbers are as near as the type allows, and what was pruned is zero."""
    made = to_gguf(outputs(recipe), tmp_path / "model.gguf", kind)
    read = from_gguf(tmp_path / "model.gguf", kind)
    expected = {"token_embd.weight", "output_norm.weight", "output.weight"}
    parts = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "attn_norm", "ffn_norm"]
    assert read.keys() == made.keys() == expected | {f"blk.{i}.{p}.weight" for i in range(LAYERS) for p in parts}
    for name, data in made.items():
        found = read[name]
        assert found.shape == data.shape
        assert not found[data == 0].any(), name
        if data.ndim == 1 or kind == Kind.BF16:
            assert np.array_equal(found, data), name
        else:
            step = np.abs(data).reshape(-1, 32).max(1, keepdims=True) / 127  # of a block of Q8_0; F16 is finer
            most = (0.5 + 127 / 2**11) * step  # rounded to a step, and the step to half precision
            assert (np.abs(found - data).reshape(-1, 32) <= most).all(), name
        if any(f".{p}." in name for p in parts[:7]):
            assert (np.count_nonzero(data.reshape(-1, 4), axis=1) == 2).all(), name
            assert (np.count_nonzero(found.reshape(-1, 4), axis=1) <= 2).all(), name


def test_gguf_of_a_tied_model(text: Path, tmp_path: Path) -> None:
    """Without a head of its own: llama.cpp takes the embeddings then."""
    save_llama(tmp_path / "model", tied=True)
    made = to_gguf(prune_it(tmp_path / "model", tmp_path / "out", text), tmp_path / "model.gguf", Kind.F16)
    assert "token_embd.weight" in made and "output.weight" not in made
    assert from_gguf(tmp_path / "model.gguf", Kind.F16).keys() == made.keys()


def test_gguf_refuses_what_it_has_no_name_for(source: Path, tmp_path: Path) -> None:
    """The check of names can fail."""
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.up_proj.mask": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(KeyError, match=r"up_proj\.mask"):
        in_gguf(tmp_path)
