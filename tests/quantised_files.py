"""Quantised checkpoints made from plain ones, each with the dense checkpoint that others' code makes of it.

What codes stand for is computed by transformers (FP8 blocks, MXFP4) or by compressed-tensors, never by the program.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor
from whole_model import stored

FP8 = torch.float8_e4m3fn
LINEARS = re.compile(r"layers\.\d+\..*proj(_with_mqa)?\.weight$|layers\.\d+\..*(q|kv)_[ab](_proj)?\.weight$")

Encode = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""(name, weight) -> what is stored of it, and what that stands for."""


def quantise(
    source: Path, folder: Path, encode: Encode, config: Mapping[str, Any], which: re.Pattern[str] = LINEARS
) -> tuple[Path, Path]:
    """The quantised checkpoint, and the dense one that it stands for."""
    coded: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in stored(source).items():
        if which.search(name):
            parts, dense[name] = encode(name, tensor)
            coded |= parts
        else:
            coded[name] = dense[name] = tensor
    assert len(coded) > len(dense)
    for path, tensors in ((folder / "coded", coded), (folder / "dense", dense)):
        shutil.copytree(source, path)
        for file in path.glob("*.safetensors*"):
            file.unlink()
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    described = json.loads((source / "config.json").read_text()) | {"quantization_config": dict(config)}
    (folder / "coded" / "config.json").write_text(json.dumps(described))
    return folder / "coded", folder / "dense"


def rewritten(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint whose tensors were changed."""
    shutil.copytree(folder, to)
    tensors = stored(to)
    change(tensors)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def blocks_of(size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32) -> tuple[Encode, dict[str, Any]]:
    """FP8 as DeepSeek-V3 and others have it; dense as transformers' Fp8Dequantize has it."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        assert rows % size[0] == 0 and columns % size[1] == 0
        scale = weight.float().unfold(0, size[0], size[0]).unfold(1, size[1], size[1]).abs().amax((2, 3)) / 448
        if dtype == torch.float8_e8m0fnu:
            scale = torch.exp2(torch.log2(scale).ceil())
        scale = scale.to(dtype)
        by = scale.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
        codes = (weight.float() / by).clamp(-448, 448).to(FP8)
        dense = Fp8Dequantize(None)._dequantize_one(codes, scale, weight.dtype)
        return {name: codes, f"{name}_scale_inv": scale}, dense

    return encode, {"quant_method": "fp8", "weight_block_size": list(size), "activation_scheme": "dynamic"}


def compressed(form: str, **weights: Any) -> tuple[Encode, dict[str, Any]]:
    """A format of compressed-tensors; dense as that has it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    if form in ("float-quantized", "int-quantized"):
        kind = "float" if form == "float-quantized" else "int"
        group["input_activations"] = {
            "num_bits": 8, "type": kind, "strategy": "token", "dynamic": True, "symmetric": True,
        }  # fmt: skip
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(form)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, zero = _scales(weight, scheme)
        state = {"weight": weight, "weight_scale": scale} | ({} if zero is None else {"weight_zero_point": zero})
        made = compressor.compress(state, scheme)
        module = name.removesuffix(".weight")
        dense = compressor.decompress(dict(made), scheme)["weight"].to(weight.dtype)
        return {f"{module}.{leaf}": t for leaf, t in made.items()}, dense

    description = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return encode, description | {"ignore": ["lm_head"], "quantization_status": "compressed"}


def _scales(weight: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor | None]:
    """Scales of a weight, and zero points where the scheme has them."""
    args = scheme.weights
    assert args is not None
    rows, whole = weight.shape[0], args.strategy == "tensor"
    width = args.group_size if args.strategy == "group" else weight.shape[1]
    parts = weight.float().reshape(1, 1, -1) if whole else weight.float().reshape(rows, -1, int(width or 0))
    if args.symmetric:
        most = 448 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
        scale = (parts.abs().amax(-1) / most).to(weight.dtype)
        return (scale.reshape(1) if whole else scale), None
    low, high = parts.amin(-1), parts.amax(-1)
    scale = ((high - low) / (2**args.num_bits - 1)).to(weight.dtype)
    half = 2 ** (args.num_bits - 1)
    return scale, (-half - low / scale.float()).round().clamp(-half, half - 1).to(torch.int8)


def pairs_of(seed: int = 0) -> tuple[Encode, dict[str, Any]]:
    """MXFP4 as gpt-oss has it, random; dense as transformers' convert_moe_packed_tensors has it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    made = torch.Generator().manual_seed(seed)

    def encode(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=made)
        scales = torch.randint(118, 125, blocks.shape[:-1], dtype=torch.uint8, generator=made)
        dense = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        assert dense.shape == weight.shape
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, dense

    return encode, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


FUSED = re.compile(r"experts\.(gate_up|down)_proj$")


def each_once(
    source: Path, formats: Mapping[str, Callable[[], tuple[Any, ...]]], folder: Callable[[], Path]
) -> Callable[[str], tuple[Path, Path]]:
    """What `quantise` makes of `source` in a format, by name; each is made once, in a folder of its own."""
    known: dict[str, tuple[Path, Path]] = {}

    def get(form: str) -> tuple[Path, Path]:
        if form not in known:
            known[form] = quantise(source, folder(), *formats[form]())
        return known[form]

    return get
