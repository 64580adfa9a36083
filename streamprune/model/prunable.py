"""Which weights of decoder layers can be pruned, and which stay dense.

Linears and experts are pruned. Small weights of other kinds stay dense without a word: norms, biases, depthwise
convolutions, with which recurrent layers begin, and matrices with one side shorter than the hidden size, such as those
of routers and recurrent states. Larger ones are named in the report, and refused where they are most of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from streamprune.errors import UnsupportedError

_MOST = 0.5
"""The share of the layers' weights that may stay dense."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map whose weight can be pruned."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def left_dense(kind: str, width: int, prefix: str, layers: nn.ModuleList, experts: Collection[str]) -> dict[str, str]:
    """Parameter of a layer that stays dense, though it is a matrix -> why.

    `experts` are the paths of modules of experts, `width` is the hidden size. Raises UnsupportedError if more than half
    of the layers' weights would stay dense, or if what a token gets depends on the other texts of a batch.
    """
    for path, module in layers.named_modules():
        if isinstance(getattr(module, "router_gate", None), nn.Linear) and hasattr(module, "down_embed"):
            raise UnsupportedError(
                f"{kind}: {prefix}.{path} chooses experts for all tokens of a batch at once, so that outputs depend on "
                "how texts are put into batches"
            )
    found = dict(_left_dense(width, prefix, layers, experts))
    sizes = {f"{prefix}.{name}": parameter.numel() for name, parameter in layers.named_parameters()}
    dense, whole = sum(sizes[name] for name in found), sum(sizes.values())
    if dense > _MOST * whole:
        largest = max(found, key=lambda name: sizes[name])
        raise UnsupportedError(
            f"{kind}: {100 * dense // whole} % of its layers' weights are of kinds that cannot be pruned yet, such as "
            f"{largest}, {found[largest]}"
        )
    return found


def _left_dense(width: int, prefix: str, layers: nn.ModuleList, experts: Collection[str]) -> Iterator[tuple[str, str]]:
    uncalled = {name for path, module in layers.named_modules() for name in _uncalled(path, module)}
    for name, parameter in layers.named_parameters():
        path = name.rpartition(".")[0]
        owner, shape = layers.get_submodule(path), [size for size in parameter.shape if size > 1]
        depthwise = isinstance(owner, nn.Conv1d) and owner.groups == owner.in_channels
        if depthwise or any(whole in experts for whole in _ancestors(f"{prefix}.{name}")):
            continue
        if name in uncalled:
            yield f"{prefix}.{name}", "whose inputs cannot be watched, as its module is not called"
        elif len(shape) > 2:
            yield f"{prefix}.{name}", f"which has {len(shape)} dimensions and is not of experts in a known form"
        elif len(shape) == 2 and min(shape) >= width and not is_linear(owner):
            yield f"{prefix}.{name}", "which is in no linear layer"


def _ancestors(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _uncalled(path: str, module: nn.Module) -> Iterator[str]:
    """Weights of a module's linears that it multiplies with itself: `dt_proj` in Mamba layers of the first version."""
    states = getattr(module, "A_log", None)
    if isinstance(getattr(module, "dt_proj", None), nn.Linear) and states is not None and states.dim() == 2:
        yield f"{path}.dt_proj.weight"
