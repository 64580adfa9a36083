"""Runs one layer without matrix products and attention, to see and to time what else it does.

The model's own code runs on the states of one batch, just as in a job. Its weights are expanded scalar zeros, which
take no memory; products with them and attention return zeros at once. What is left: norms, rotary embeddings,
activation functions, residual sums, and the overhead of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.model.loader import WeightLoader
from streamprune.model.pass_memory import token_bytes
from streamprune.model.skeleton import Skeleton
from streamprune.model.streamed import StreamedModel

LAYER_BYTES = {"cpu": 160 << 20, "cuda": 1 << 30}
"""Memory for the layer's activations: more than fits into the processor's caches, as in a job."""


class Blank(ShardMaps):
    """Zero tensors in place of a checkpoint's, on the device and in the compute dtype; they take no memory."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(checkpoint)
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def tensor(self, ref: TensorRef) -> Tensor:
        return self._zero.expand(ref.shape)


@dataclass
class _Inputs:
    """Widths of the linears' inputs; a tensor that several linears share counts once."""

    widths: list[int] = field(default_factory=list)
    _last: Tensor | None = None

    def watch(self, _: str, x: Tensor) -> None:
        if x is not self._last:
            self.widths.append(x.shape[-1])
        self._last = x


@dataclass
class Called:
    """How a layer calls attention: shapes (batch, heads, seqlen, head_dim), mask or not, other arguments."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    masked: bool
    options: dict[str, Any]


@dataclass
class _NoProducts(TorchFunctionMode):
    """Within it, products with weights and attention return zeros of the right shape at once."""

    called: Called | None = None
    _zeros: list[Tensor] = field(default_factory=list)
    _next: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def rewind(self) -> None:
        """Before the layer runs again: its calls will get the same zeros, in order, without new allocations."""
        self._next = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self._out(args[0], (*args[0].shape[:-1], args[1].shape[0]))
        if func is torch.addmm:
            return self._out(args[1], (args[1].shape[0], args[2].shape[1]))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any, **how: Any
    ) -> Any:
        how |= dict(zip(("dropout_p", "is_causal"), rest, strict=False))
        self.called = Called(query.shape, key.shape, value.shape, attn_mask is not None, how)
        return self._out(query, (*query.shape[:-1], value.shape[-1]))

    def _out(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self._next == len(self._zeros) or self._zeros[self._next].shape != shape:
            self._zeros[self._next :] = [torch.zeros(shape, dtype=like.dtype, device=like.device)]
        self._next += 1
        return self._zeros[self._next - 1]


def window_size(skeleton: Skeleton, batch: int, seqlen: int, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """(windows, tokens in each) to run a layer on: those of a batch, or fewer so as not to exceed LAYER_BYTES."""
    length, limit = seqlen, LAYER_BYTES[device]
    while length > 16 and length * token_bytes(skeleton, length, dtype) > limit:
        length //= 2
    windows = limit // (length * token_bytes(skeleton, length, dtype)) if length == seqlen else 1
    return max(1, min(batch, windows)), length


class BlankLayer:
    """The first layer of a skeleton, for a batch of `windows` windows of `length` tokens.

    Call `embed` first: it makes `states` (windows, length, hidden), the layer's input. After a run, `called` says how
    attention was called (None: not through F.scaled_dot_product_attention, so a run includes its time), and `widths`
    lists the widths of the linears' distinct inputs. Raises UnsupportedError for a model that cannot be streamed.
    """

    def __init__(
        self, checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device,
        windows: int, length: int,
    ) -> None:  # fmt: skip
        loader = WeightLoader(Blank(checkpoint, dtype, device), device, copies=False)
        self.streamed, self._stage = StreamedModel(skeleton, loader, dtype), skeleton.layer_stages[0]
        self._ids = torch.zeros(windows, length, dtype=torch.long)
        self._without_products, self._inputs = _NoProducts(), _Inputs()
        self.tokens, self.length, self.depth = windows * length, length, len(skeleton.layers)
        self.states = torch.empty(0)

    @property
    def called(self) -> Called | None:
        return self._without_products.called

    @property
    def widths(self) -> list[int]:
        return self._inputs.widths

    def embed(self) -> None:
        """Computes `states` with the model's own code before its first layer."""
        (states,) = self.streamed.embed([self._ids])
        self.states = states.to(self.streamed.cache_dtype)

    @contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """Yields a function that runs the layer once."""
        with self.streamed.layer(self._stage, watch=self._inputs.watch) as layer, self._without_products:

            def run() -> None:
                self._without_products.rewind()
                self._inputs.widths.clear()
                layer(self.states).to(self.streamed.cache_dtype)

            yield run
