"""Makes a synthetic Llama or Mixtral checkpoint of any size, streamed to disk, for benchmarks.

    python tools/make_checkpoint.py OUT --preset 7b --layers 4
    python tools/make_checkpoint.py OUT --preset 70b-layer
    python tools/make_checkpoint.py OUT --hidden 2048 --intermediate 5632 --layers 12
    python tools/make_checkpoint.py OUT --preset 256-experts --fp8

Weights are bf16, or with --fp8 the layers' linears in FP8 with a scale for each block of 128 × 128, as in DeepSeek-V3;
Gaussian with standard deviation 0.02, cut from one random block at places chosen by the seed; norms
are ones. One shard a layer; the tokenizer is that of the demo model, the vocabulary at least as large.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from streamprune.disk.header import TensorRef

BLOCK = 1 << 25
LEAST_VOCAB = 2048
"""Tokens of the demo model's tokenizer."""
_SIDE = 128
"""Of a block of weights with one scale."""
_CODED = 2048.0
"""What weights are multiplied with to become FP8 codes: five standard deviations are 205, and 448 is the largest."""


Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, or with experts of a Mixtral: widths, and how many there are of each.

    Raises ValueError when they do not fit together.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 0
    """Experts in each layer, each of width `intermediate`; 0 for a Llama."""
    routed: int = 2
    """Experts per token."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name == "experts" else 1
            if value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if self.experts and self.routed > self.experts:
            raise ValueError(f"--routed {self.routed} is more than --experts {self.experts}")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"--hidden {self.hidden} is not an even number for each of --heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}")
        if self.vocab < LEAST_VOCAB:
            raise ValueError(f"--vocab {self.vocab} is smaller than the tokenizer's, {LEAST_VOCAB}")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in bf16."""
        return sum(2 * math.prod(s) for tensors in self.stages() for s in tensors.values())

    def stages(self) -> list[Shapes]:
        """Names and shapes of the tensors of each shard: embedding, layers, head."""
        hidden, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        stages: list[Shapes] = [{"model.embed_tokens.weight": (self.vocab, hidden)}]
        for i in range(self.layers):
            p = f"model.layers.{i}."
            stages.append({
                p + "self_attn.q_proj.weight": (hidden, hidden), p + "self_attn.k_proj.weight": (kv, hidden),
                p + "self_attn.v_proj.weight": (kv, hidden), p + "self_attn.o_proj.weight": (hidden, hidden),
                p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,),
            })  # fmt: skip
            stages[-1] |= self._mixture(p + "block_sparse_moe.") if self.experts else self._mlp(p + "mlp.")
        stages.append({"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab, hidden)})
        return stages

    def _mlp(self, prefix: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
        gate, up, down = (f"{prefix}{name}.weight" for name in names)
        wide = (self.intermediate, self.hidden)
        return {gate: wide, up: wide, down: wide[::-1]}

    def _mixture(self, prefix: str) -> Shapes:
        found: Shapes = {prefix + "gate.weight": (self.experts, self.hidden)}
        for expert in range(self.experts):
            found |= self._mlp(f"{prefix}experts.{expert}.", ("w1", "w3", "w2"))
        return found


PRESETS = {
    "narrow": Shape(hidden=1024, intermediate=2816, layers=4, heads=16, kv_heads=4, vocab=32000),
    "1b": Shape(hidden=2048, intermediate=5632, layers=22, heads=16, kv_heads=4, vocab=32000),
    "7b": Shape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32000),
    "8b": Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
    "70b": Shape(hidden=8192, intermediate=28672, layers=80, heads=64, kv_heads=8, vocab=128256),
    "70b-layer": Shape(hidden=8192, intermediate=28672, layers=1, heads=64, kv_heads=8, vocab=32000),
    "8x7b": Shape(4096, 14336, 32, 32, 8, vocab=32000, experts=8),
    "128-experts": Shape(2048, 768, 2, 16, 4, vocab=32000, experts=128, routed=8),
    "256-experts": Shape(7168, 2048, 1, 56, 8, vocab=32000, experts=256, routed=8),
}


def add_shape_options(parser: argparse.ArgumentParser, preset: str = "1b", *, layers: bool = True) -> None:
    """--preset, one option for each size (--layers only if wanted), --seed."""
    parser.add_argument("--preset", choices=PRESETS, default=preset, help="default: %(default)s")
    for size in fields(Shape):
        if layers or size.name != "layers":
            parser.add_argument(
                f"--{size.name.replace('_', '-')}", type=int, metavar="N", help="in place of the preset's"
            )
    parser.add_argument("--seed", type=int, default=0, help="which random weights (default: %(default)s)")


def shape_from(arguments: argparse.Namespace, **sizes: int) -> Shape:
    """The preset's shape with what was given in its place, `sizes` before all. Raises ValueError as Shape does."""
    given = {f.name: getattr(arguments, f.name, None) for f in fields(Shape)} | sizes
    return replace(PRESETS[arguments.preset], **{name: size for name, size in given.items() if size is not None})


def main() -> int:
    """Reads the arguments and writes the checkpoint; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    add_shape_options(parser)
    parser.add_argument("--fp8", action="store_true", help="layers' linears in FP8, with block scales")
    arguments = parser.parse_args()
    from streamprune.errors import StreampruneError

    try:
        shape = shape_from(arguments)
        out: Path = arguments.out
        there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
        if (free := shutil.disk_usage(there).free) < shape.nbytes:
            raise ValueError(f"{there} has {free / 1e9:.3g} GB free, {out} needs {shape.nbytes / 1e9:.3g} GB")
        total = write_checkpoint(out, arguments.seed, shape, fp8=arguments.fp8)
    except (ValueError, OSError, StreampruneError) as e:
        print(f"make_checkpoint: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    print(f"{out}: {total / 1e9:.3g} GB, {shape.layers} layers")
    return 0


def write_checkpoint(out: Path, seed: int, shape: Shape, *, fp8: bool = False) -> int:
    """Writes a Llama or Mixtral checkpoint; returns the bytes of its tensors."""
    from streamprune.disk import durable
    from streamprune.disk.header import TensorRef
    from streamprune.disk.shards import shard_name, write_index, write_shard

    durable.make_folder(out)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "vocab_size": shape.vocab, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if shape.experts:
        config |= {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.routed, "sliding_window": None,
        }  # fmt: skip
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [_SIDE, _SIDE],
        }  # fmt: skip
    durable.replace_file(out / "config.json", json.dumps(config, indent=2).encode())
    with importlib.resources.as_file(importlib.resources.files("streamprune") / "demo_model") as demo:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            durable.copy_file(demo / name, out / name)
    stages = shape.stages()
    largest = max(math.prod(s) for tensors in stages for s in tensors.values())
    generator = np.random.Generator(np.random.PCG64(seed))
    block = _bf16(generator.standard_normal(min(BLOCK, 2 * largest), dtype=np.float32) * np.float32(0.02))
    blocks = {"BF16": block} | ({"F8_E4M3": _codes(block)} if fp8 else {})
    where: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(stages, 1):
        name = shard_name(number, len(stages))
        refs = []
        for tensor, size in tensors.items():
            coded = fp8 and len(size) == 2 and ".layers." in tensor and not tensor.endswith(".gate.weight")
            refs.append(TensorRef(tensor, name, "F8_E4M3", size, 0, math.prod(size)) if coded else
                        TensorRef(tensor, name, "BF16", size, 0, 2 * math.prod(size)))  # fmt: skip
            if coded:
                scales = (-(-size[0] // _SIDE), -(-size[1] // _SIDE))
                refs.append(TensorRef(f"{tensor}_scale_inv", name, "F32", scales, 0, 4 * math.prod(scales)))
        write_shard(out / name, refs, lambda ref: _content(ref, blocks, generator))
        where |= {ref.name: name for ref in refs}
        total += sum(ref.nbytes for ref in refs)
    write_index(out / "model.safetensors.index.json", {}, total, where)
    return total


def _content(ref: TensorRef, blocks: dict[str, np.ndarray], generator: np.random.Generator) -> Iterator[memoryview]:
    """A tensor's bytes: ones for a norm, one scale for all blocks, pieces of the random block for a matrix."""
    left = math.prod(ref.shape)
    if ref.dtype == "F32":
        yield np.full(left, 1 / _CODED, np.float32).data.cast("B")
        return
    if len(ref.shape) == 1:
        yield _bf16(np.ones(left, np.float32)).data.cast("B")
        return
    block = blocks[ref.dtype]
    while left:
        count = min(left, len(block) // 2)
        begin = int(generator.integers(0, len(block) - count + 1))
        yield block[begin : begin + count].data.cast("B")
        left -= count


def _codes(block: np.ndarray) -> np.ndarray:
    """bf16 bits to FP8 codes (E4M3) of the same values times _CODED."""
    import torch

    values = torch.from_numpy(block).view(torch.bfloat16).float() * _CODED
    codes: np.ndarray = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return codes


def _bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bits, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


if __name__ == "__main__":
    sys.exit(main())
