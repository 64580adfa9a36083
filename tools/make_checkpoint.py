"""Makes a synthetic Llama checkpoint of any size, streamed to disk: for measuring, not for talking to.

    python tools/make_checkpoint.py OUT --preset 7b --layers 4
    python tools/make_checkpoint.py OUT --hidden 2048 --intermediate 5632 --layers 12

Weights are bf16, Gaussian with standard deviation 0.02, cut from one random block at places chosen by the seed; norms
are ones. One shard a layer; the tokenizer is that of the demo model, the vocabulary at least as large.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from streamprune.disk import durable
from streamprune.disk.header import TensorRef
from streamprune.disk.shards import shard_name, write_index, write_shard

PRESETS = {
    "1b": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 16, "kv_heads": 4, "vocab": 32000},
    "7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "8b": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "70b": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocab": 128256},
}
BLOCK = 1 << 25


def main() -> None:
    """Reads the arguments and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="1b")
    for name in ("hidden", "intermediate", "layers", "heads", "kv-heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="in place of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    shape = {k: args[k] if args[k] is not None else v for k, v in PRESETS[args["preset"]].items()}
    total = write_checkpoint(args["out"], args["seed"], **shape)
    print(f"{args['out']}: {total / 1e9:.2f} GB, {shape['layers']} layers")


def write_checkpoint(
    out: Path, seed: int, *, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int
) -> int:
    """Writes a Llama checkpoint; returns the bytes of its tensors."""
    durable.make_folder(out)
    head_dim = hidden // heads
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": vocab,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    durable.replace_file(out / "config.json", json.dumps(config, indent=2).encode())
    with importlib.resources.as_file(importlib.resources.files("streamprune") / "demo_model") as demo:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            durable.copy_file(demo / name, out / name)
    stages: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for i in range(layers):
        p, q, kv = f"model.layers.{i}.", heads * head_dim, kv_heads * head_dim
        stages.append({
            p + "self_attn.q_proj.weight": (q, hidden), p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden), p + "self_attn.o_proj.weight": (hidden, q),
            p + "mlp.gate_proj.weight": (intermediate, hidden), p + "mlp.up_proj.weight": (intermediate, hidden),
            p + "mlp.down_proj.weight": (hidden, intermediate), p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
        })  # fmt: skip
    stages.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    generator = np.random.Generator(np.random.PCG64(seed))
    block = _bf16(generator.standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02))
    where: dict[str, str] = {}
    for number, tensors in enumerate(stages, 1):
        name = shard_name(number, len(stages))
        refs = [TensorRef(t, name, "BF16", s, 0, 2 * math.prod(s)) for t, s in tensors.items()]
        write_shard(out / name, refs, lambda ref: _content(ref, block, generator))
        where |= dict.fromkeys(tensors, name)
    total = sum(2 * math.prod(s) for tensors in stages for s in tensors.values())
    write_index(out / "model.safetensors.index.json", {}, total, where)
    return total


def _content(ref: TensorRef, block: np.ndarray, generator: np.random.Generator) -> Iterator[memoryview]:
    """A tensor's bytes: ones for a norm, pieces of the random block for a matrix."""
    left = math.prod(ref.shape)
    if len(ref.shape) == 1:
        yield _bf16(np.ones(left, np.float32)).data.cast("B")
        return
    while left:
        count = min(left, len(block) // 2)
        begin = int(generator.integers(0, len(block) - count + 1))
        yield block[begin : begin + count].data.cast("B")
        left -= count


def _bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    main()
