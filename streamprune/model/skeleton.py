"""The model without its weights: transformers' own code on the meta device, divided into stages.

A stage is the part of the model that is in memory at once, and becomes one output shard:

    embed      everything before the decoder layers
    layer i    decoder layer i
    head       everything after them (final norm, lm_head), and tensors that the model does not use

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
from streamprune.disk.float_quantized import SCALE, Scheme, read_scheme
from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.model.between import Between
from streamprune.model.configuration import load_config, one_line
from streamprune.model.experts import Experts
from streamprune.model.naming import TORCH_DTYPES, layer_numbers, match_tensors
from streamprune.model.prunable import is_linear, left_dense


@dataclass(frozen=True)
class Stage:
    """A part of the model that is in memory at once, and one output shard."""

    kind: str
    """"embed", "layer" or "head"."""
    index: int
    """Layer number; -1 for embed and head."""
    prefix: str
    """Module path of a layer, "model.layers.3"; empty for embed and head."""
    tensors: tuple[TensorRef, ...]
    """All tensors of the checkpoint that belong to the stage."""
    linears: Mapping[str, TensorRef]
    """Module path of each linear of a layer -> its weight, in the order of the module. Experts' linears come last;
    their weights may be slices of a tensor (model/experts.py)."""
    experts: tuple[Experts, ...] = ()
    """The layer's experts, whose weights are loaded one expert at a time."""
    unclaimed: frozenset[str] = frozenset()
    """Names of tensors that the model does not use; they are copied to the output."""
    tables: frozenset[str] = frozenset()
    """Names of embeddings beside the input embedding, of which only the rows that are looked up are loaded."""

    @property
    def name(self) -> str:
        return f"layer {self.index}" if self.kind == "layer" else self.kind

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def resident_tensors(self) -> list[TensorRef]:
        """The tensors that are loaded together: all but experts', tables and unclaimed ones."""
        excluded = (
            self.unclaimed
            | self.tables
            | {self.linears[name].name for experts in self.experts for name in experts.linears}
        )
        return [t for t in self.tensors if t.name not in excluded]

    @functools.cached_property
    def expert_of(self) -> dict[str, str]:
        """Linear of an expert -> name of the expert."""
        return {
            name: f"{experts.path}.{number}"
            for experts in self.experts
            for number in range(len(experts.down))
            for name in experts.of([number])
        }

    @property
    def resident(self) -> int:
        """Bytes of weights in memory at once: resident_tensors, and two of the largest expert."""
        by_expert = [
            sum(self.linears[name].nbytes for name in (*up, down))
            for experts in self.experts
            for up, down in zip(experts.up, experts.down, strict=True)
        ]
        return sum(t.nbytes for t in self.resident_tensors) + 2 * max(by_expert, default=0)


@dataclass(frozen=True)
class Skeleton:
    """A meta model, its decoder layers and stages, and the stored tensor of each parameter."""

    model: nn.Module
    layers: nn.ModuleList
    stages: tuple[Stage, ...]
    sources: Mapping[str, TensorRef]
    """Name of every parameter and stored buffer -> tensor of the checkpoint; tied parameters share one. Scales of FP8
    weights are included, as `….weight_scale`."""
    transposed: frozenset[str]
    """Linears whose weight is stored (in, out): transformers' Conv1D."""
    dtype: torch.dtype
    """The dtype of most weights, FP8 ones not counted."""
    experts: Mapping[str, Experts]
    """Module path of each module of experts -> its experts' linears."""
    scheme: Scheme | None
    """How linears compute with FP8 weights; None where the checkpoint is not quantised."""
    dense: Mapping[str, str]
    """Matrices of layers that cannot be pruned, by parameter name -> why (model/prunable.py)."""
    hidden_size: int
    vocab_size: int
    between: Between
    """What is kept between two layers; build_skeleton does not know of more than hidden states (tracing.py)."""

    @property
    def ordinary(self) -> bool:
        """Whether layers take and give hidden states of the configured size, and nothing else."""
        return self.between.plain and self.between.hidden == self.hidden_size

    @property
    def layer_stages(self) -> tuple[Stage, ...]:
        return self.stages[1:-1]

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
    """The dtype of most bytes of a checkpoint, not counting FP8 weights and their scales.

    Raises UnsupportedError when it is not BF16, F16 or F32.
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
    """The skeleton of a checkpoint, to compute in `compute_dtype`.

    Raises UnsupportedError when transformers does not know the architecture or its layers cannot be streamed or pruned,
    CheckpointError when tensors are missing or of another shape than the configuration says.
    """
    scheme = read_scheme(checkpoint)
    config = load_config(checkpoint, trust_remote_code)
    model = _build_model(checkpoint, config, compute_dtype, trust_remote_code)
    prefix, layers = _find_layers(model, config)
    sources, experts = match_tensors(checkpoint, model, scheme is not None)
    text = config.get_text_config()
    dense = left_dense(config.model_type, int(text.hidden_size), prefix, layers, experts.keys())
    stages = _cut_stages(checkpoint, model, prefix, layers, sources, experts, dense.keys())
    transposed = [f"{prefix}.{n}" for n, m in layers.named_modules() if type(m).__name__ == "Conv1D"]
    transposed += [name for e in experts.values() for name in e.transposed]
    return Skeleton(
        model=model,
        layers=layers,
        stages=stages,
        sources=sources,
        transposed=frozenset(transposed),
        dtype=stored_dtype(checkpoint),
        experts=experts,
        scheme=scheme,
        dense=dense,
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        between=Between(len(layers), (int(text.hidden_size),)),
    )


def _build_model(checkpoint: Checkpoint, config: Any, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    kind = checkpoint.config["model_type"]
    config.use_cache = False
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
    _refuse_dependent_layers(config, outermost[0][1])
    return outermost[0]


def _refuse_dependent_layers(config: Any, layers: nn.ModuleList) -> None:
    """Refuses layers that share weights with other layers."""
    users: dict[int, int] = {}
    for i, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            if (first := users.setdefault(id(parameter), i)) != i:
                raise UnsupportedError(
                    f"{config.model_type} uses the same weights in layers {first} and {i} ({name}); layers cannot be "
                    "pruned alone"
                )


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
        linears = {name: sources[f"{name}.weight"] for name in names if f"{name}.weight" not in dense}
        mixtures = tuple(e for at, e in experts.items() if at.startswith(path + "."))
        linears |= {name: sources[f"{name}.weight"] for e in mixtures for name in e.linears}
        stages.append(Stage("layer", i, path, tuple(inside[i]), linears, mixtures))
    known = {ref.name for ref in sources.values()}
    unclaimed = frozenset(ref.name for ref in kinds["head"] if ref.name not in known)
    return (*stages, Stage("head", -1, "", tuple(kinds["head"]), {}, unclaimed=unclaimed, tables=tables))
