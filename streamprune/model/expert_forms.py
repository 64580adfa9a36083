"""The forms in which transformers' modules hold experts, and how they are called.

Most have the common form (`use_experts_implementation`): one weight of three dimensions for all experts' gates and up
projections, another for their down projections, called with states, the numbers of the chosen experts and their routing
weights. A Form says where the weights of a module of experts are, and what happens around them; routed.py computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from streamprune.errors import UnsupportedError

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What computes experts: states (tokens, hidden), numbers of the chosen experts (tokens, k), their routing weights
(tokens, k) -> (tokens, hidden)."""

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"


class Form:
    """A module of experts in the common form. Other forms are subclasses."""

    scales_inputs = False
    """Whether routing weights multiply the inputs of experts instead of their outputs."""
    rounds_inputs = False
    """Whether inputs of experts in FP8 are rounded, too: transformers makes linears of them then."""
    identities = False
    """Whether experts of higher numbers than have weights give back what they are given."""
    beside: tuple[str, ...] = ()
    """Parameters of the module that are not experts'."""

    def __init__(self, module: Any, parent: Any) -> None:
        self.module, self.parent = module, parent
        self.up: tuple[str, ...] = tuple(leaf for leaf in UP if leaf in module._parameters)[:1]
        """Parameters with the matrices that see the states; the outputs of an expert's are concatenated."""
        self.down = DOWN
        """The parameter with the matrices after them."""

    @property
    def caller(self) -> Any:
        """The module whose forward calls the experts, and is replaced."""
        return self.module

    @property
    def leaves(self) -> tuple[str, ...]:
        """All parameters with matrices of experts."""
        return (*self.up, self.down)

    @property
    def count(self) -> int:
        """The number of experts that have weights."""
        return self.shape(self.down)[0]

    def stored_shape(self, leaf: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return tuple(self.module.get_parameter(leaf).shape)

    def shape(self, leaf: str) -> tuple[int, ...]:
        """(experts, rows, columns): the matrices of a parameter as they are stored."""
        return self.stored_shape(leaf)

    def is_transposed(self, leaf: str) -> bool:
        """Whether a parameter's matrices are stored (in, out)."""
        return bool(self.module.is_transposed)

    def bias(self, leaf: str) -> Tensor | None:
        """(experts, out): what is added to the products with a parameter's matrices."""
        found: Tensor | None = self.module._parameters.get(f"{leaf}_bias")
        return found

    def activate(self, up: Tensor) -> Tensor:
        """(n, intermediate) of the concatenated outputs (n, …) of an expert's first matrices."""
        found: Tensor = (
            self.module._apply_gate(up) if getattr(self.module, "has_gate", True) else self.module.act_fn(up)
        )
        return found

    def replaced(self, forward: Forward) -> Callable[..., Any]:
        """A forward for `caller` that lets `forward` compute the experts."""
        return forward

    def name(self, leaf: str) -> str:
        """What an expert's linear is called whose matrix is in this parameter."""
        return leaf.removesuffix(".weight").rpartition(".")[2]

    def check(self, path: str) -> None:
        """Raises UnsupportedError for experts that compute anything beyond up, gate and down projections."""
        known = {*self.leaves, *(f"{leaf}_bias" for leaf in self.leaves), *self.beside}
        extra = sorted({name for name, _ in self.module.named_parameters()} - known)
        if extra or getattr(self.module, "has_post_expert_norm", False):
            raise UnsupportedError(
                f"{path} has experts with {extra[0] if extra else 'a norm'} besides their two projections, which "
                "cannot be pruned yet"
            )


class _Gated(Form):
    """A form of a module that has no `_apply_gate` of its own."""

    def is_transposed(self, leaf: str) -> bool:
        return False

    def activate(self, up: Tensor) -> Tensor:
        gate, linear = up.chunk(2, dim=-1)
        found: Tensor = self.module.act_fn(gate) * linear
        return found


class _Llama4(_Gated):
    """Llama 4, whose module of experts is given a copy of all tokens for each expert, multiplied by routing weights
    that are zero where the expert is not chosen. The layer's block is replaced, so that no copies are made."""

    scales_inputs = True
    rounds_inputs = True

    @property
    def caller(self) -> Any:
        return self.parent

    def is_transposed(self, leaf: str) -> bool:
        return True

    def replaced(self, forward: Forward) -> Callable[..., Any]:
        block = self.parent

        def call(states: Tensor) -> tuple[Tensor, Tensor]:
            tokens = states.reshape(-1, block.hidden_dim)
            scores, logits = block.router(tokens)
            shares, chosen = scores.topk(block.top_k, dim=1)
            routed = forward(tokens, chosen, shares)
            return block.shared_expert(tokens).add_(routed), logits

        return call


class _Dbrx(_Gated):
    """DBRX: three matrices (experts · intermediate, hidden), of which the last is stored (in, out)."""

    def __init__(self, module: Any, parent: Any) -> None:
        super().__init__(module, parent)
        self.up, self.down = ("mlp.w1", "mlp.v1"), "mlp.w2"

    def shape(self, leaf: str) -> tuple[int, ...]:
        return (self.module.num_experts, self.module.ffn_hidden_size, self.module.hidden_size)

    def is_transposed(self, leaf: str) -> bool:
        return leaf == self.down

    def activate(self, up: Tensor) -> Tensor:
        gate, linear = up.chunk(2, dim=-1)
        found: Tensor = self.module.mlp.activation_fn(gate) * linear
        return found

    def replaced(self, forward: Forward) -> Callable[..., Any]:
        def call(states: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
            return forward(states.reshape(-1, states.shape[-1]), chosen, shares).view(states.shape)

        return call


class _Longcat(_Gated):
    """LongCat-Flash, some of whose experts give back their input."""

    identities = True


class _Shared(_Gated):
    """Inkling's shared experts: every token goes through each, with a weight for it."""

    def __init__(self, module: Any, parent: Any) -> None:
        super().__init__(module, parent)
        self.up = ("gate_proj", "up_proj")

    def replaced(self, forward: Forward) -> Callable[..., Any]:
        def call(states: Tensor, gammas: Tensor) -> Tensor:
            tokens = states.reshape(-1, states.shape[-1])
            chosen = torch.arange(self.count, device=states.device).expand(len(tokens), -1)
            return forward(tokens, chosen, gammas.reshape(len(tokens), -1)).view(states.shape)

        return call


class _JetMoe(_Gated):
    """JetMoE, whose router sorts tokens by their experts. The whole block counts as the module of experts."""

    beside = ("bias", "router.layer.weight")

    def __init__(self, module: Any, parent: Any) -> None:
        super().__init__(module, parent)
        self.up, self.down = ("input_linear.weight",), "output_linear.weight"

    def activate(self, up: Tensor) -> Tensor:
        gate, linear = up.chunk(2, dim=-1)
        found: Tensor = self.module.activation(gate) * linear
        return found

    def replaced(self, forward: Forward) -> Callable[..., Any]:
        block = self.module

        def call(states: Tensor) -> Tensor:
            tokens = states.reshape(-1, states.shape[-1])
            order, _, gates, sizes, _ = block.router(tokens)
            numbers = torch.arange(len(sizes), device=tokens.device)
            chosen = torch.empty_like(order)
            chosen[order] = numbers.repeat_interleave(torch.tensor(sizes, device=tokens.device))
            shares = torch.empty_like(gates)
            shares[order] = gates
            out = forward(tokens, chosen.view(len(tokens), -1), shares.view(len(tokens), -1))
            found: Tensor = out.view(states.shape) + block.bias
            return found

        return call


_BY_CLASS: dict[str, type[Form]] = {
    "Llama4TextExperts": _Llama4,
    "DbrxExperts": _Dbrx,
    "LongcatFlashExperts": _Longcat,
    "InklingSharedExperts": _Shared,
    "JetMoeMoE": _JetMoe,
}
"""Names of classes of transformers."""


def form_of(model: nn.Module, path: str, module: nn.Module) -> Form | None:
    """The form of the module called `path`; None if it holds no experts in a known form."""
    form = _BY_CLASS.get(type(module).__name__)
    if form is None and is_experts(module):
        form = Form
    return None if form is None else form(module, model.get_submodule(path.rpartition(".")[0]))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the common form."""
    weights = module._parameters
    return DOWN in weights and any(up in weights for up in UP) and hasattr(module, "is_transposed")
