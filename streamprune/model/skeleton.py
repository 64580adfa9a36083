"""The model without its weights: transformers' own code on the meta device, cut into stages.

A stage is what is resident at once and what becomes one output shard:

    embed      everything before the decoder layers
    layer i    decoder layer i
    head       everything after them (final norm, lm_head), and tensors that nothing in the model claims

The skeleton is built by `AutoModelForCausalLM.from_config` with every parameter on the meta device and every
buffer real: rotary frequencies and the like are computed by the model's own constructor. Parameters are bound
to mapped tensors of the checkpoint while their stage is at work, and unbound afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.float_quantized import SCALE, Scheme, read_scheme
from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError, UnsupportedError

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Stage:
    """One step of the walk and one output shard."""

    kind: str
    """"embed", "layer" or "head"."""
    index: int
    """Layer number; -1 for embed and head."""
    prefix: str
    """Module path of a layer, "model.layers.3"; empty for embed and head."""
    tensors: tuple[TensorRef, ...]
    linears: Mapping[str, TensorRef]
    """Module path of each linear of a layer -> its weight; insertion order is the module's."""

    @property
    def name(self) -> str:
        return f"layer {self.index}" if self.kind == "layer" else self.kind

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class Skeleton:
    """A meta model, its decoder layers, its stages, and which stored tensor each parameter is."""

    model: nn.Module
    layers: nn.ModuleList
    stages: tuple[Stage, ...]
    sources: Mapping[str, TensorRef]
    """Name of every parameter and stored buffer -> tensor of the checkpoint (tied ones share one). Of a weight that is
    stored in FP8, `….weight_scale` is here, too."""
    transposed: frozenset[str]
    """Linears whose weight is stored (in, out): transformers' Conv1D."""
    dtype: torch.dtype
    """The checkpoint's own dtype; with FP8 weights, that of the others."""
    scheme: Scheme | None
    """How FP8 weights are computed with; None where the checkpoint is not quantised."""
    hidden_size: int
    vocab_size: int

    @property
    def layer_stages(self) -> tuple[Stage, ...]:
        return self.stages[1:-1]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, every parameter lands on the meta device as soon as a module registers it.

    `torch.empty` reserves address space only, and initialisers then run on meta tensors, so nothing is ever
    filled in. Buffers stay real.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most bytes of a checkpoint are in, FP8 weights and their scales left out.

    Raises UnsupportedError when it is none we compute in.
    """
    sizes: dict[str, int] = {}
    scaled = {name for name in checkpoint.tensors if name + SCALE in checkpoint.tensors}
    left_out = {*scaled, *(name + SCALE for name in scaled)}
    for ref in [ref for name, ref in checkpoint.tensors.items() if name not in left_out] or checkpoint.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    largest = max(sizes, key=lambda d: sizes[d])
    if largest not in TORCH_DTYPES:
        raise UnsupportedError(f"{checkpoint.path}: most weights are {largest}; only BF16, F16 and F32 can be pruned")
    return TORCH_DTYPES[largest]


def build_skeleton(checkpoint: Checkpoint, compute_dtype: torch.dtype, *, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of a checkpoint.

    Raises UnsupportedError when transformers does not know the architecture or it has no list of decoder
    layers, CheckpointError when tensors are missing or of another shape than the configuration says.
    """
    scheme = read_scheme(checkpoint)
    config = _load_config(checkpoint, trust_remote_code)
    model = _build_model(checkpoint, config, compute_dtype, trust_remote_code)
    prefix, layers = _find_layers(model, config)
    sources = _match_tensors(checkpoint, model, scheme is not None)
    _refuse_other_weights(prefix, layers)
    stages = _cut_stages(checkpoint, model, prefix, layers, sources)
    return Skeleton(
        model=model,
        layers=layers,
        stages=stages,
        sources=sources,
        transposed=frozenset(f"{prefix}.{n}" for n, m in layers.named_modules() if type(m).__name__ == "Conv1D"),
        dtype=stored_dtype(checkpoint),
        scheme=scheme,
        hidden_size=int(config.get_text_config().hidden_size),
        vocab_size=int(config.get_text_config().vocab_size),
    )


def _load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str):
        raise UnsupportedError(f"{checkpoint.path}/config.json names no model_type, so its architecture is unknown")
    if kind not in CONFIG_MAPPING and not (trust_remote_code and checkpoint.config.get("auto_map")):
        custom = (
            ", or pass --trust-remote-code to run the code in its folder" if checkpoint.config.get("auto_map") else ""
        )
        raise UnsupportedError(f"model_type {kind!r} is unknown to this transformers; a newer one may know it{custom}")
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as e:
        raise CheckpointError(
            f"{checkpoint.path}/config.json is not a valid {kind} configuration: {_one_line(e)}"
        ) from e
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind} is an encoder-decoder model; only decoder-only causal models can be pruned")
    return config


def _build_model(checkpoint: Checkpoint, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    kind = checkpoint.config["model_type"]
    config.use_cache = False
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as e:
        if "Unrecognized configuration class" in str(e):
            raise UnsupportedError(f"{kind} has no causal language model in transformers") from e
        raise CheckpointError(f"{checkpoint.path}/config.json: {_one_line(e)}") from e
    except Exception as e:
        raise CheckpointError(f"{checkpoint.path}/config.json does not describe a {kind} model: {_one_line(e)}") from e
    model.requires_grad_(False)
    result: nn.Module = model.eval()
    return result


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _find_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The outermost ModuleList with one entry a decoder layer."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found or not count:
        raise UnsupportedError(f"{config.model_type} has no list of {count} decoder layers that could be streamed")
    depth = min(n.count(".") for n, _ in found)
    outermost = [(n, m) for n, m in found if n.count(".") == depth]
    if len(outermost) > 1:
        raise UnsupportedError(f"{config.model_type} has several layer lists ({', '.join(n for n, _ in outermost)})")
    if getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        raise UnsupportedError(
            f"{config.model_type} shares keys and values across layers; layers cannot be streamed alone"
        )
    return outermost[0]


def _match_tensors(checkpoint: Checkpoint, model: nn.Module, quantised: bool) -> dict[str, TensorRef]:
    """Which stored tensor each parameter and persistent buffer is, by name. Tied parameters may be stored once.

    In a `quantised` checkpoint linears may be FP8, with a scale beside them.
    """
    stored, converted = _module_names(checkpoint, model)
    owners: dict[int, TensorRef] = {}
    found: dict[str, TensorRef] = {}
    missing: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        ref = stored.get(name)
        if ref is None:
            missing.append((name, parameter))
            continue
        if ref.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{ref.shard}: tensor {ref.name} has shape {list(ref.shape)}, config.json says {list(parameter.shape)}"
            )
        if quantised and ref.dtype == "F8_E4M3" and _is_linears(model, name):
            found[name + SCALE] = _scale_of(checkpoint, ref, stored.get(name + SCALE))
        elif ref.dtype not in TORCH_DTYPES:
            raise UnsupportedError(
                f"{ref.shard}: tensor {ref.name} is {ref.dtype}; only BF16, F16 and F32 weights can be pruned"
            )
        found[name] = ref
        owners.setdefault(id(parameter), ref)
    for name, parameter in missing:
        if id(parameter) in owners:
            found[name] = owners[id(parameter)]
        elif name in converted:
            raise UnsupportedError(
                f"{checkpoint.path}: {name} is stored in pieces ({converted[name]}, …); such weights, as of mixtures "
                "of experts, cannot be pruned yet"
            )
        else:
            raise CheckpointError(f"{checkpoint.path}: tensor {name} is missing; is the download complete?")
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        ref = stored.get(name) if name in persistent else None
        if ref is not None and ref.shape == tuple(buffer.shape) and ref.dtype in TORCH_DTYPES:
            found[name] = ref
    return found


def _is_linears(model: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a linear, of any class."""
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear)


def _scale_of(checkpoint: Checkpoint, weight: TensorRef, scale: TensorRef | None) -> TensorRef:
    """The scale of an FP8 weight, if it is one. Raises CheckpointError."""
    if scale is None:
        raise CheckpointError(f"{checkpoint.path}: tensor {weight.name}{SCALE} is missing; is the download complete?")
    if scale.dtype not in TORCH_DTYPES or scale.shape not in ((weight.shape[0], 1), (weight.shape[0],), (1,), ()):
        raise CheckpointError(
            f"{scale.shard}: tensor {scale.name} is {scale.dtype} {list(scale.shape)}, which is no scale of "
            f"{weight.name} {list(weight.shape)}"
        )
    return scale


def _module_names(checkpoint: Checkpoint, model: nn.Module) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Stored tensors under the names of today's modules, renamed by transformers' own tables of old names.

    Also returns the module names whose tensors would have to be converted, not only renamed, with the name of
    one of their pieces.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    prefix, state = getattr(model, "base_model_prefix", ""), model.state_dict()
    stored: dict[str, TensorRef] = {}
    converted: dict[str, str] = {}
    for name in sorted(checkpoint.tensors):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if pattern is None:
            stored[renamed] = checkpoint.tensors[name]
        else:
            converted.setdefault(renamed, name)
    return stored, converted


def _refuse_other_weights(prefix: str, layers: nn.ModuleList) -> None:
    """Refuses layers whose weights are not linears, such as fused experts: they would silently stay dense."""
    for name, parameter in layers.named_parameters():
        if parameter.dim() > 2:
            raise UnsupportedError(
                f"{prefix}.{name} is a weight of {parameter.dim()} dimensions (fused experts?); "
                "mixtures of experts cannot be pruned yet"
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight can be pruned."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _cut_stages(
    checkpoint: Checkpoint,
    model: nn.Module,
    prefix: str,
    layers: nn.ModuleList,
    sources: Mapping[str, TensorRef],
) -> tuple[Stage, ...]:
    """Every tensor of the checkpoint into exactly one stage."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    before = {sources[n].name for n in names[: next(i for i, n in enumerate(names) if n.startswith(prefix + "."))]}
    stem = _stored_stem(prefix, names, sources)
    kinds: dict[str, list[TensorRef]] = {"embed": [], "head": []}
    inside: list[list[TensorRef]] = [[] for _ in layers]
    layer_name = re.compile(re.escape(stem) + r"\.(\d+)\.")
    for ref in checkpoint.tensors.values():
        found = layer_name.match(ref.name)
        if found and int(found.group(1)) >= len(layers):
            raise CheckpointError(f"{ref.shard}: tensor {ref.name} belongs to a layer that config.json does not have")
        target = inside[int(found.group(1))] if found else kinds["embed" if ref.name in before else "head"]
        target.append(ref)
    stages = [Stage("embed", -1, "", tuple(kinds["embed"]), {})]
    for i, layer in enumerate(layers):
        path = f"{prefix}.{i}"
        linears = {f"{path}.{n}": sources[f"{path}.{n}.weight"] for n, m in layer.named_modules() if is_linear(m)}
        stages.append(Stage("layer", i, path, tuple(inside[i]), linears))
    return (*stages, Stage("head", -1, "", tuple(kinds["head"]), {}))


def _stored_stem(prefix: str, names: list[str], sources: Mapping[str, TensorRef]) -> str:
    """The layer list's path as the checkpoint spells it: "h" for "transformer.h"."""
    name = next(n for n in names if n.startswith(prefix + "."))
    inner = name.removeprefix(prefix)
    return sources[name].name.removesuffix(inner)
