"""One layer without its weights, to see what it does besides multiplying with them, and how long that takes.

The model's own code runs on the states of one batch, through the same walk as in a job. Its weights are zeros that
share the memory of one, and products with them, as well as attention, return zeros at once. What is left is all that
a layer does elsewhere: norms, rotary embeddings, activation functions, sums, and the calls themselves.
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
from streamprune.model.budget import token_bytes
from streamprune.model.loader import WeightLoader
from streamprune.model.skeleton import Skeleton
from streamprune.model.streamed import StreamedModel

LAYER_BYTES = {"cpu": 160 << 20, "cuda": 1 << 30}
"""Memory of the layer's activations: more than the processor's caches hold, where a batch's are."""


class _Blank(ShardMaps):
    """Tensors of zeros in place of a checkpoint's, on the device and in the dtype that is computed in; no memory."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(checkpoint)
        self._zero = torch.zeros((), dtype=dtype, device=device)

    def tensor(self, ref: TensorRef) -> Tensor:
        return self._zero.expand(ref.shape)


@dataclass
class _Inputs:
    """Widths of the inputs that statistics are gathered of: a tensor that several linears share counts once."""

    widths: list[int] = field(default_factory=list)
    _last: Tensor | None = None

    def watch(self, _: str, x: Tensor) -> None:
        if x is not self._last:
            self.widths.append(x.shape[-1])
        self._last = x


@dataclass
class Called:
    """How a layer calls attention: shapes (batch, heads, seqlen, head_dim), and what else it says."""

    query: torch.Size
    key: torch.Size
    value: torch.Size
    masked: bool
    options: dict[str, Any]


@dataclass
class _NoProducts(TorchFunctionMode):
    """Within it products with weights and attention take no time: they return zeros of the right shape."""

    called: Called | None = None
    _zeros: list[Tensor] = field(default_factory=list)
    _next: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def rewind(self) -> None:
        """The next call is the first of the layer again, and gets the zeros that it got before."""
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
    """Windows and tokens a window for the first layer: those of a batch, or fewer where they take too much memory."""
    length, most = seqlen, LAYER_BYTES[device]
    while length > 16 and length * token_bytes(skeleton, length, dtype) > most:
        length //= 2
    windows = most // (length * token_bytes(skeleton, length, dtype)) if length == seqlen else 1
    return max(1, min(batch, windows)), length


class BlankLayer:
    """The first layer of a skeleton, for a batch of `windows` windows of `length` tokens.

    `embed` comes first: it makes `states` (windows, length, hidden), what the layer is given. After a run, `called`
    says how it asked for attention (None: not by F.scaled_dot_product_attention, so that a run includes it), and
    `widths` lists the widths of the inputs of which there are statistics. Raises UnsupportedError for a model that
    cannot be walked through.
    """

    def __init__(
        self, checkpoint: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device,
        windows: int, length: int,
    ) -> None:  # fmt: skip
        loader = WeightLoader(_Blank(checkpoint, dtype, device), device, copies=False)
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
        """Makes the states, by the model's own code before its first layer."""
        (states,) = self.streamed.embed([self._ids])
        self.states = states.to(self.streamed.cache_dtype)

    @contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """A function that runs the layer once."""
        with self.streamed.layer(self._stage, watch=self._inputs.watch) as layer, self._without_products:

            def run() -> None:
                self._without_products.rewind()
                self._inputs.widths.clear()
                layer(self.states).to(self.streamed.cache_dtype)

            yield run
