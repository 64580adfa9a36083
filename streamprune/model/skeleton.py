"""The model without its weights: transformers' own code on the meta device, divided into stages.

The skeleton is built by `AutoModelForCausalLM.from_config` with every parameter on the meta device and every buffer
real: rotary frequencies and the like are computed by the model's own constructor. Parameters are bound to mapped
tensors of the checkpoint while their stage computes, and unbound afterwards.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.float_quantized import Scheme, read_scheme
from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.model.arithmetic import stored_name
from streamprune.model.between import Between
from streamprune.model.configuration import load_config, one_line
from streamprune.model.experts import Experts
from streamprune.model.naming import TORCH_DTYPES, layer_numbers, match_tensors
from streamprune.model.prunable import is_linear, left_dense
from streamprune.model.shared import shared_linears
from streamprune.model.stages import Outline, Stage
from streamprune.process.imports import many_imports


@dataclass(frozen=True)
class Skeleton(Outline):
    """A meta model, its decoder layers and stages, and the stored tensor of each parameter."""

    model: nn.Module
    layers: nn.ModuleList
    sources: Mapping[str, TensorRef]
    """Name of every parameter and stored buffer -> tensor of the checkpoint; tied parameters share one. Scales of FP8
    weights are included, as `….weight_scale`."""
    dtype: torch.dtype
    """The dtype of most weights, FP8 ones not counted."""
    experts: Mapping[str, Experts]
    """Module path of each module of experts -> its experts' linears."""
    scheme: Scheme | None
    """How linears compute with FP8 weights; None where the checkpoint is not quantised."""
    hidden_size: int
    vocab_size: int
    between: Between
    """What is kept between two layers; build_skeleton does not know of more than hidden states (tracing.py)."""

    @property
    def ordinary(self) -> bool:
        """Whether layers take and give hidden states of the configured size, and nothing else."""
        return self.between.plain and self.between.hidden == self.hidden_size

    @functools.cached_property
    def causal(self) -> nn.Module:
        """The smallest part of the model that has both the layers and the LM head."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        paths = {id(module): path for path, module in self.model.named_modules()}
        path = paths.get(id(head), "")
        while not paths[id(self.layers)].startswith(f"{path}." if path else ""):
            path = path.rpartition(".")[0]
        return self.model.get_submodule(path)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it, every parameter is moved to the meta device as soon as a module registers it.

    `torch.empty` only reserves address space, and initialisers then run on meta tensors, so no memory is ever touched.
    Buffers stay real.
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
    """The dtype of most bytes of a checkpoint. Raises as stored_name."""
    return TORCH_DTYPES[stored_name(checkpoint)]


def build_skeleton(checkpoint: Checkpoint, compute_dtype: torch.dtype, *, trust_remote_code: bool = False) -> Skeleton:
    """The skeleton of a checkpoint, to compute in `compute_dtype`.

    Raises UnsupportedError when transformers does not know the architecture or its layers cannot be streamed or pruned,
    CheckpointError when tensors are missing or of another shape than the configuration says.
    """
    scheme = read_scheme(checkpoint)
    with many_imports():  # transformers, as much of it as the model needs
        config = load_config(checkpoint, trust_remote_code)
        model = _build_model(checkpoint, config, compute_dtype, trust_remote_code)
    prefix, layers = _find_layers(model, config)
    sources, experts = match_tensors(checkpoint, model, scheme is not None)
    text = config.get_text_config()
    dense = left_dense(config.model_type, int(text.hidden_size), prefix, layers, experts.keys())
    stages = _cut_stages(checkpoint, model, prefix, layers, sources, experts, dense.keys())
    shared = shared_linears(config.model_type, prefix, layers, sources, experts.keys())
    transposed = [f"{prefix}.{n}" for n, m in layers.named_modules() if type(m).__name__ == "Conv1D"]
    transposed += [name for e in experts.values() for name in e.transposed]
    return Skeleton(
        model=model,
        layers=layers,
        stages=stages,
        used=frozenset(ref.name for ref in sources.values()),
        modules=tuple(name for name, module in model.named_modules() if is_linear(module)),
        sources=sources,
        transposed=frozenset(transposed),
        dtype=stored_dtype(checkpoint),
        experts=experts,
        scheme=scheme,
        dense=dense,
        streams=1,
        shared=shared,
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        between=Between(len(layers), (int(text.hidden_size),)),
    )


def _build_model(checkpoint: Checkpoint, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    kind = checkpoint.config["model_type"]
    config.use_cache = False
    if getattr(config, "rescale_every", 0):
        config.rescale_every = 0  # RWKV halves states between layers, and weights with them: outputs are the same
    try:
        with _parameters_on_meta():
            model = _model_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as e:
        if "Unrecognized configuration class" in str(e):
            raise UnsupportedError(f"{kind} has no causal language model in transformers") from e
        raise CheckpointError(f"{checkpoint.path}/config.json: {one_line(e)}") from e
    except ImportError as e:
        raise UnsupportedError(f"{kind} needs a package that is not installed: {one_line(e)}") from e
    except Exception as e:
        why = "its weights would exceed all memory" if _is_too_large(e) else one_line(e)
        raise CheckpointError(f"{checkpoint.path}/config.json does not describe a {kind} model: {why}") from e
    model.requires_grad_(False)
    result: nn.Module = model.eval()
    return result


def _is_too_large(error: Exception) -> bool:
    """Whether torch could not reserve the address space of a tensor."""
    return any(words in str(error) for words in ("you tried to allocate", "Storage size calculation overflowed"))


def _model_class(config: Any) -> Any:
    """The class that loads the whole checkpoint, other modalities included."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    classes = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    if _wraps(config):
        classes = [*classes[1:], classes[0]]  # for some, the causal class is the text model alone
    return next((c for c in classes if type(config) in c._model_mapping), AutoModelForCausalLM)


def _wraps(config: Any) -> bool:
    """Whether the text model is only a part of the model, as in vision-language models."""
    return config.get_text_config() is not config


def _find_layers(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The path of the list of decoder layers, and the list: the outermost ModuleList of the configured length.

    In a multimodal model, the one within its text model.
    """
    text = config.get_text_config()
    counts = {getattr(text, name, None) for name in ("num_hidden_layers", "num_layers")}  # may count them as halves
    count = getattr(text, "num_hidden_layers", None)
    root = model.get_decoder() if _wraps(config) else model  # type: ignore[operator]
    inside = {id(m) for m in root.modules()}
    found = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) in counts and id(m) in inside
    ]
    if not found or not count:
        raise UnsupportedError(f"{config.model_type} has no list of {count} decoder layers that could be streamed")
    depth = min(n.count(".") for n, _ in found)
    outermost = [(n, m) for n, m in found if n.count(".") == depth]
    if len(outermost) > 1:
        raise UnsupportedError(f"{config.model_type} has several layer lists ({', '.join(n for n, _ in outermost)})")
    return outermost[0]


def is_table(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module is an embedding that is looked up by the tokens, beside the model's input embedding."""
    main = model.get_input_embeddings()  # type: ignore[operator]
    return (
        isinstance(module, nn.Embedding)
        and module is not main
        and 2 * module.num_embeddings >= getattr(main, "num_embeddings", 1 << 62)  # not of positions or kinds of tokens
        and len(inspect.signature(module.forward).parameters) == 1
    )


def _cut_stages(
    checkpoint: Checkpoint,
    model: nn.Module,
    prefix: str,
    layers: nn.ModuleList,
    sources: Mapping[str, TensorRef],
    experts: Mapping[str, Experts],
    dense: Collection[str],
) -> tuple[Stage, ...]:
    """Assigns every tensor of the checkpoint to exactly one stage."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if n in sources]
    before = {sources[n].name for n in names[: next(i for i, n in enumerate(names) if n.startswith(prefix + "."))]}
    numbers = layer_numbers(checkpoint, model, prefix, len(layers), sources)
    kinds: dict[str, list[TensorRef]] = {"embed": [], "head": []}
    inside: list[list[TensorRef]] = [[] for _ in layers]
    for ref in checkpoint.tensors.values():
        at = numbers.get(ref.name)
        (kinds["embed" if ref.name in before else "head"] if at is None else inside[at]).append(ref)
    outside = [n for n, m in model.named_modules() if is_table(model, m) and not n.startswith(prefix + ".")]
    tables = frozenset(sources[f"{name}.weight"].name for name in outside)
    stages = [Stage("embed", -1, "", tuple(kinds["embed"]), {}, tables=tables)]
    for i, layer in enumerate(layers):
        path = f"{prefix}.{i}"
        names = [f"{path}.{name}" for name, module in layer.named_modules() if is_linear(module)]
        mine = {ref.name for ref in inside[i]}  # without what later layers share
        linears = {name: sources[f"{name}.weight"] for name in names if f"{name}.weight" not in dense}
        linears = {name: ref for name, ref in linears.items() if ref.name in mine}
        mixtures = tuple(e for at, e in experts.items() if at.startswith(path + "."))
        linears |= {name: sources[f"{name}.weight"] for e in mixtures for name in e.linears}
        stages.append(Stage("layer", i, path, tuple(inside[i]), linears, mixtures))
    known = {ref.name for ref in sources.values()}
    unclaimed = frozenset(ref.name for ref in kinds["head"] if ref.name not in known)
    return (*stages, Stage("head", -1, "", tuple(kinds["head"]), {}, unclaimed=unclaimed, tables=tables))
