"""Writes the checkpoints in this folder. Run with compressed-tensors 0.14.0.1 in front on PYTHONPATH.

Each NAME/ is what that release makes of NAME.expected.safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.config import SparsityCompressionConfig
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
LAYER = "model.layers.0"
FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}


def two_four(weight: Tensor) -> Tensor:
    """The two largest of every four stay."""
    groups = weight.reshape(-1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    return torch.where(keep, groups, 0.0).reshape(weight.shape)


def half(weight: Tensor) -> Tensor:
    return torch.where(torch.rand(weight.shape) < 0.5, weight, 0.0)


def state(prune: object, widths: tuple[int, int], fp8: bool) -> dict[str, Tensor]:
    """Two linears, pruned, and two tensors that are not; with scales in FP8."""
    torch.manual_seed(14)
    tensors = {"model.embed_tokens.weight": torch.randn(7, widths[0]).bfloat16()}
    for name, shape in (("mlp.up_proj", (widths[1], widths[0])), ("mlp.down_proj", (widths[0], widths[1]))):
        weight = prune(torch.randn(shape))  # type: ignore[operator]
        if fp8:
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors[f"{LAYER}.{name}.weight_scale"] = scale.bfloat16()
            tensors[f"{LAYER}.{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        else:
            tensors[f"{LAYER}.{name}.weight"] = weight.bfloat16()
    tensors["model.norm.weight"] = torch.rand(widths[0]).bfloat16()
    return tensors


def make(
    name: str, layout: str, tensors: dict[str, Tensor], *, whole: bool = False, quantised: str = "", shards: int = 1
) -> None:
    """Compresses `tensors`: linears alone, or the whole of what is called weight, as old releases did."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    structure = "2:4" if "24" in layout else "unstructured"
    config = SparsityCompressionConfig.load_from_registry(
        layout, format=layout, targets=["Linear"], ignore=[], global_sparsity=0.5, sparsity_structure=structure
    )
    compressor = BaseCompressor.load_from_registry(layout, config=config)
    linears = {n.removesuffix(".weight") for n in tensors if ".mlp." in n and n.endswith("weight")}
    packed = compressor.compress(tensors, compression_targets=None if whole else linears)
    packed = {n: t.contiguous() for n, t in packed.items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, HERE / f"{name}.expected.safetensors", {"format": "pt"})
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {n: names[i % shards] for i, n in enumerate(sorted(packed))}
    if shards == 1:
        save_file(packed, folder / "model.safetensors", {"format": "pt"})
    else:
        for shard in names:
            save_file({n: packed[n] for n, s in where.items() if s == shard}, folder / shard, {"format": "pt"})
        total = sum(t.nbytes for t in packed.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 16}))
    groups = {"group_0": {"targets": ["Linear"], "weights": FP8_SCHEME}}
    described = QuantizationConfig(config_groups=groups, format=quantised, ignore=["lm_head"]) if quantised else None
    ModelCompressor(sparsity_config=config, quantization_config=described).update_config(str(folder))


if __name__ == "__main__":
    if compressed_tensors.__version__ != "0.14.0.1":
        raise SystemExit(f"compressed-tensors is {compressed_tensors.__version__}, not 0.14.0.1")
    make("two-four", "sparse-24-bitmask", state(two_four, (16, 24), False), shards=3)
    make("two-four-fp8", "sparse-24-bitmask", state(two_four, (20, 12), True), quantised="float-quantized")
    experts = {f"{LAYER}.experts.weight": half(torch.randn(2, 3, 10)).bfloat16()}
    make("bitmask", "sparse-bitmask", state(half, (13, 21), False) | experts, whole=True)
    make("bitmask-fp8", "sparse-bitmask", state(half, (16, 11), True), quantised="naive-quantized")
