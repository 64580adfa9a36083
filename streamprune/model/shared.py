"""Weights that several layers share, as the transformer blocks of Zamba 2 do.

Such a linear belongs to the last layer that uses it: by then, the inputs of all its uses have been seen. Layers before
compute with its dense weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from streamprune.disk.header import TensorRef
from streamprune.errors import UnsupportedError
from streamprune.model.stages import Uses


def shared_linears(
    kind: str, prefix: str, layers: nn.ModuleList, sources: Mapping[str, TensorRef], experts: Collection[str]
) -> dict[str, Uses]:
    """Linear of the last layer that uses its weight -> its uses in earlier layers; empty for most models.

    Raises UnsupportedError for shared experts' weights, and for weights that are stored once for each layer.
    """
    users: dict[int, list[tuple[int, str]]] = {}
    for i, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            users.setdefault(id(parameter), []).append((i, f"{prefix}.{i}.{name}"))
    found: dict[str, Uses] = {}
    for uses in users.values():
        *earlier, (last, name) = uses
        if not earlier or earlier[0][0] == last:
            continue
        if any(name.startswith(f"{path}.") for path in experts):
            raise UnsupportedError(
                f"{kind} uses the same experts in layers {earlier[0][0]} and {last} ({name}); such cannot be pruned yet"
            )
        if any(sources[other].name != sources[name].name for _, other in earlier):
            raise UnsupportedError(
                f"{kind} uses the same weights in layers {earlier[0][0]} and {last}, but {name} is stored for each of "
                "them; load the model with transformers and save it again"
            )
        if name.endswith(".weight"):
            found[name.removesuffix(".weight")] = tuple((i, n.removesuffix(".weight")) for i, n in earlier)
    return found
