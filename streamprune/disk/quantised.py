"""Presents a quantised checkpoint as a dense one: each quantised weight appears as the weight that its codes encode.

    float-quantized, int-quantized, naive-quantized (compressed-tensors)
        `P.weight` F8_E4M3 or I8; `P.weight_scale` for the tensor, each output channel, group of inputs or block;
        integers may have a `P.weight_zero_point`
    pack-quantized (compressed-tensors)
        `P.weight_packed` I32 with 4 or 8 bits a weight, the first one lowest, offset by half of their range;
        `P.weight_shape`; scales as above; zero points packed in the same way, along the rows
    fp8 (DeepSeek-V3, Kimi K2, Qwen3-FP8)
        `P.weight` F8_E4M3; `P.weight_scale_inv` for blocks of `weight_block_size`, or for the tensor, floats or
        F8_E8M0; weights may have three dimensions
    mxfp4 (gpt-oss)
        `NAME_blocks` U8 (experts, out, in / 32, 16), the lower half of a byte first; `NAME_scales` U8 (experts, out,
        in / 32), exponents plus 127; NAME is (experts, in, out)
    gptq (GPTQModel, AutoGPTQ; checkpoint_format gptq or gptq_v2)
        `P.qweight` I32 (in x bits / 32, out) with 4 or 8 bits a weight, along the inputs, the first one lowest;
        `P.scales` (groups, out); `P.qzeros` I32 (groups, out x bits / 32), along the outputs, less one unless gptq_v2;
        `P.g_idx` I32 (in,) the group of each input, else groups follow each other
    awq (AutoAWQ; version gemm)
        `P.qweight` I32 (in, out / 8) with 4 bits a weight, along the outputs, eight of them in the order 0, 2, 4, 6,
        1, 3, 5, 7; `P.qzeros` I32 (groups, out / 8) likewise; `P.scales` (groups, out)

Weights are dequantised when they are read (model/decoded.py). How the inputs of linears are rounded when such a model
runs does not matter here. Imports neither torch nor numpy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from streamprune.disk.checkpoint import Checkpoint, quantisation_of
from streamprune.disk.compressed import find_compressed, read_schemes
from streamprune.disk.encoded import (
    FLOAT,
    PAIRS,
    EncodedRef,
    Encoding,
    damaged_tensor,
    fits,
    missing_tensor,
    wrong_scales,
)
from streamprune.disk.float_quantized import FORMAT, read_scheme
from streamprune.disk.folder import SideFiles
from streamprune.disk.gptq import METHODS, find_words, read_layout
from streamprune.disk.header import TensorRef, show
from streamprune.errors import CheckpointError, UnsupportedError

_SECTION_KEYS = ("quantization_config", "compression_config")
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_PAIR_BLOCK = 32
_DESCRIPTIONS = ("quantize_config.json", "quant_config.json")
"""Side files in which AutoGPTQ and AutoAWQ describe a quantisation once more."""
_OF_INPUTS = ("input_scale", "activation_scale", "input_zero_point", "output_scale", "output_zero_point")


@dataclass(frozen=True)
class PlainView(Checkpoint):
    """The dense view of a quantised checkpoint, `stored`. Its config does not mention the quantisation."""

    stored: Checkpoint = field(kw_only=True)
    method: str = field(kw_only=True)
    """What config.json calls the quantisation."""

    @property
    def streamed(self) -> bool:
        return self.stored.streamed

    def content(self) -> str:
        """As Checkpoint.content, of what is stored."""
        return self.stored.content()

    def fingerprint(self) -> dict[str, str]:
        """As Checkpoint.fingerprint, of what is stored."""
        return self.stored.fingerprint()

    def identity(self) -> dict[str, str]:
        """As Checkpoint.identity, of what is stored."""
        return self.stored.identity()

    def side_files(self) -> SideFiles:
        """As Checkpoint.side_files; a further description of the quantisation is left behind."""
        found = super().side_files()
        gone = set(_DESCRIPTIONS if self.method in METHODS else ()).intersection(found.carried)
        kept = tuple(name for name in found.carried if name not in gone)
        return SideFiles(kept, tuple(sorted({*found.left_behind, *gone})))

    def configuration(self) -> bytes:
        """The text of config.json for dense weights."""
        return json.dumps(self.config, indent=2, ensure_ascii=False).encode() + b"\n"


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint itself if it is not quantised, else its dense view.

    Raises:
        UnsupportedError: it is quantised in a way that is not supported.
        CheckpointError: scales are missing, or do not fit their codes; or nothing is quantised, against config.json.
    """
    found = quantisation_of(checkpoint)
    if found is None:
        return checkpoint
    method, encodings = _read(checkpoint, *found)
    if not encodings:
        raise _nothing_quantised(checkpoint, found[0], method)
    return _view(checkpoint, encodings, method)


def _nothing_quantised(checkpoint: Checkpoint, where: str, method: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path / 'config.json'}: {where} says that the weights are quantised ({show(method)}), and no "
        f"tensor is; remove {where} if they have been dequantised, or pass the quantised checkpoint"
    )


def _read(checkpoint: Checkpoint, where: str, description: Any) -> tuple[str, dict[str, Encoding]]:
    """What config.json calls a quantisation, and the weights that are stored in it. Raises as `plain`."""
    config = checkpoint.path / "config.json"
    if not isinstance(description, dict):
        raise UnsupportedError(f"{config}: {where} says that the weights are quantised ({show(description)}); {_MENDS}")
    sparsity = description.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(f"{config}: {where} says that the weights are packed; restore them with `unpack`")

    def refuse(why: str) -> UnsupportedError:
        return UnsupportedError(f"{config}: {where}: {show(why)}; {_MENDS}")

    method = str(description.get("quant_method", "unknown"))
    if method == "compressed-tensors":
        schemes = read_schemes(description, refuse)
        encodings = find_compressed(checkpoint, schemes)
        method = str(description.get("format", method))
    elif method == "fp8":
        encodings = _find_fp8(checkpoint, _block_size(description, refuse))
    elif method == "mxfp4":
        encodings = _find_pairs(checkpoint)
    elif method in METHODS:
        encodings = find_words(checkpoint, read_layout(method, description, refuse))
    else:
        raise refuse(f"the weights are quantised ({method})")
    return method, encodings


_MENDS = (
    "of quantised checkpoints, only compressed-tensors (float-, int-, naive- and pack-quantized), FP8, MXFP4, GPTQ "
    "(gptq and gptq_v2, 4 or 8 bits) and AWQ (gemm, 4 bits) ones can be read; pass the unquantised checkpoint"
)


def computable(checkpoint: Checkpoint) -> Checkpoint:
    """Returns what `eval` computes with: compressed-tensors' FP8 with a scale a channel unchanged, else `plain`.

    Raises as `plain`.
    """
    try:
        scheme = read_scheme(checkpoint)
    except UnsupportedError:
        view = plain(checkpoint)
        if view is checkpoint:  # packed
            raise
        return view
    if scheme is not None and not any(ref.dtype == "F8_E4M3" for ref in checkpoint.tensors.values()):
        return plain(checkpoint)
    return checkpoint


def inspectable(checkpoint: Checkpoint, against: Checkpoint | None = None) -> Checkpoint:
    """Returns what `inspect` reads: FP8 of compressed-tensors unchanged, to report faulty scales; else `plain`.

    Unsupported formats are unchanged, too, and so is what config.json calls quantised and is not. If a dense checkpoint
    is compared with it (`against`), FP8 is dequantised, as that checkpoint was made from rounded numbers. Raises
    CheckpointError as `plain`.
    """
    found = quantisation_of(checkpoint)
    if found is None:
        return checkpoint
    as_it_is = isinstance(found[1], dict) and found[1].get("format") == FORMAT
    if as_it_is and (against is None or quantisation_of(against) is not None):
        return checkpoint
    try:
        method, encodings = _read(checkpoint, *found)
    except UnsupportedError:
        return checkpoint
    return _view(checkpoint, encodings, method) if encodings else checkpoint


def stored_parts(view: PlainView) -> dict[str, tuple[TensorRef, ...]]:
    """Quantised weight -> all tensors that are stored of it, the codes first; those of its inputs included."""
    found: dict[str, tuple[TensorRef, ...]] = {}
    for name, ref in view.tensors.items():
        if isinstance(ref, EncodedRef):
            names = [f"{name.removesuffix('.weight')}.{leaf}" for leaf in _beside(name)]
            known = {part.name: part for part in ref.encoding.parts}
            known |= {n: view.stored.tensors[n] for n in names if n in view.stored.tensors}
            found[name] = tuple(known.values())
    return found


def _beside(name: str) -> tuple[str, ...]:
    """What may be stored beside a quantised weight and its scales, by the last part of the name."""
    return (*_OF_INPUTS, "weight_shape", "weight_zero_point") if name.endswith(".weight") else ()


def _view(checkpoint: Checkpoint, encodings: Mapping[str, Encoding], method: str) -> PlainView:
    dtype = _dtype_of(checkpoint.config)
    tensors: dict[str, TensorRef] = {}
    parts = {part.name for encoding in encodings.values() for part in encoding.parts}
    for name in encodings:
        parts |= {f"{name.removesuffix('.weight')}.{leaf}" for leaf in _beside(name)}
    names = {encoding.codes.name: name for name, encoding in encodings.items()}
    for stored in checkpoint.tensors.values():
        if stored.name in names:
            name = names[stored.name]
            if name in checkpoint.tensors and name != stored.name:
                raise damaged_tensor(checkpoint, stored, f"is there both quantised and as {show(name)}")
            tensors[name] = EncodedRef.whole(name, dtype, encodings[name])
        elif stored.name not in parts:
            tensors[stored.name] = stored
    own = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    own |= {"tensors": tensors, "config": _without(checkpoint.config)}
    return PlainView(**own, stored=checkpoint, method=method)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without descriptions of a quantisation, in its sections as well."""
    plain = {key: value for key, value in config.items() if key not in _SECTION_KEYS}
    return {
        key: {k: v for k, v in value.items() if k not in _SECTION_KEYS} if isinstance(value, dict) else value
        for key, value in plain.items()
    }


def _dtype_of(config: Mapping[str, Any]) -> str:
    """The dtype in which the model is loaded; bf16 if config.json names none."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    said = [str(section[key]) for section in sections for key in ("dtype", "torch_dtype") if section.get(key)]
    return next((_DTYPES[name] for text in said if (name := text.removeprefix("torch.")) in _DTYPES), "BF16")


def _block_size(description: Mapping[str, Any], refuse: Callable[[str], UnsupportedError]) -> tuple[int, int] | None:
    """Rows and columns of a block; None if each tensor has one scale."""
    size = description.get("weight_block_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise refuse(f"weight_block_size is {size}")
    return size[0], size[1]


def _find_fp8(checkpoint: Checkpoint, block: tuple[int, int] | None) -> dict[str, Encoding]:
    found = {}
    for name, ref in checkpoint.tensors.items():
        if ref.dtype != "F8_E4M3":
            continue
        scale = next((s for end in ("_scale_inv", "_scale") if (s := checkpoint.tensors.get(name + end))), None)
        if scale is None:
            raise missing_tensor(checkpoint, ref, f"{name}_scale_inv")
        if len(ref.shape) not in (2, 3):
            raise damaged_tensor(
                checkpoint, ref, f"has {len(ref.shape)} dimensions, where FP8 weights have two or three"
            )
        sizes = [block] if block else []
        sizes += [(ref.shape[-2], ref.shape[-1])]  # some tensors of a checkpoint with blocks have one scale
        encodings = [Encoding(FLOAT, ref.shape, size, ref, scale) for size in sizes]
        fitting = [e for e in encodings if fits(scale, e.scales)]
        if not fitting or scale.dtype not in ("F32", "BF16", "F16", "F8_E8M0"):
            raise wrong_scales(checkpoint, encodings[0])
        found[name] = fitting[0]
    return found


def _find_pairs(checkpoint: Checkpoint) -> dict[str, Encoding]:
    encodings = {}
    for name, ref in checkpoint.tensors.items():
        whole = name.removesuffix("_blocks")
        if name.endswith("_scales") and (whole := name.removesuffix("_scales")) + "_blocks" not in checkpoint.tensors:
            if ref.dtype == "U8":
                raise missing_tensor(checkpoint, ref, f"{whole}_blocks")
            continue
        if not name.endswith("_blocks"):
            continue
        scale = checkpoint.tensors.get(f"{whole}_scales")
        if scale is None:
            raise missing_tensor(checkpoint, ref, f"{whole}_scales")
        if ref.dtype != "U8" or len(ref.shape) != 4 or ref.shape[-1] != _PAIR_BLOCK // 2:
            raise damaged_tensor(
                checkpoint, ref, f"is {ref.dtype} {list(ref.shape)}, where blocks are U8 [experts, out, in / 32, 16]"
            )
        experts, out, groups, _ = ref.shape
        encoding = Encoding(PAIRS, (experts, groups * _PAIR_BLOCK, out), (1, _PAIR_BLOCK), ref, scale)
        if scale.dtype != "U8" or scale.shape != ref.shape[:-1]:
            raise wrong_scales(checkpoint, encoding)
        encodings[whole] = encoding
    return encodings
