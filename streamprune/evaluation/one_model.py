"""Streams one model through its layers, for `evaluate`, and keeps the hidden states after the last one for the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from streamprune.errors import CheckpointError
from streamprune.evaluation.two_models import Subject
from streamprune.model.activations import Activations
from streamprune.model.budget import Layout
from streamprune.model.loader import WeightLoader
from streamprune.model.passes import check_weights, embed_pass, layer_pass, retry_smaller
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel
from streamprune.process.memory import give_back_free_memory


class Run:
    """A model that is run in `layout`, with its activation caches in `folder`.

    `keep`: resident hidden states stay on the device after the last layer; otherwise they are written to disk.
    `activations` may keep them elsewhere than in `folder`.
    """

    def __init__(
        self, subject: Subject, loader: WeightLoader, folder: Path, layout: Layout, *,
        keep: bool = True, is_reference: bool = False, activations: Activations | None = None,
    ) -> None:  # fmt: skip
        self.subject, self.layout, self.keep, self._is_reference = subject, layout, keep, is_reference
        self.stages = subject.skeleton.stages
        self.streamed = StreamedModel(subject.skeleton, loader, subject.dtype, group=layout.group)
        self._activations = activations or Activations(
            folder, self.streamed.cache_dtype, loader.device, resident=layout.resident
        )

    def name_of(self, stage: Stage) -> str:
        """The name of a stage in progress messages."""
        return f"reference {stage.name}" if self._is_reference else stage.name

    def check(self, stage: Stage) -> None:
        """As check_weights; the error says if it is the reference that is damaged."""
        with self._whose():
            retry_smaller(self.streamed, partial(check_weights, self.streamed.loader, self.subject.skeleton, stage))

    @contextmanager
    def _whose(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as e:
            if not self._is_reference:
                raise
            raise CheckpointError(f"the reference's {e}") from e

    def do(self, stage: Stage, batches: Sequence[Tensor], *, last: bool) -> None:
        """Embeds `batches`, or runs one layer, and prefetches the next stages.

        For the `last` model, this includes the head.
        """
        streamed, resident, activations = self.streamed, self.layout.resident, self._activations
        stages = self.stages if last else self.stages[:-1]
        position = stage.index + 1
        for near in stages[position : position + (2 if self.layout.layers > 1 or not streamed.loader.copies else 1)]:
            if near.kind == "layer" or not streamed.loader.copies:
                streamed.loader.expect(near.resident_tensors)
        self.check(stage)
        persist = not resident or (stage is self.stages[-2] and not self.keep)
        if stage.kind == "embed":
            retry_smaller(streamed, partial(embed_pass, streamed, batches, activations, persist=persist))
        else:
            with self._whose():
                retry_smaller(streamed, partial(layer_pass, streamed, stage, activations, write=True, persist=persist))
            if not resident:
                activations.drop(stage.index)
        streamed.loader.release(stage.tensors)
        give_back_free_memory()

    def make_room(self) -> None:
        """Frees device memory after the last layer, for the other model or for its head."""
        if self.layout.resident and not self.keep:  # states are on disk as well, and are read from there
            self._activations = Activations(self._activations.folder, self.streamed.cache_dtype, self.streamed.device)
        if self.streamed.device.type == "cuda":
            torch.cuda.empty_cache()  # memory freed on one loader's stream cannot serve the other's

    def last_states(self) -> Iterator[Tensor]:
        """The states after the last layer, batch by batch: (batch, seqlen, hidden)."""
        return self._activations.read(len(self.subject.skeleton.layers))


def disk_bytes(runs: Sequence[Run], windows: int, length: int) -> int:
    """Peak bytes of hidden states on disk: those before and after a layer, plus the final ones of earlier models.

    There are `windows` windows of `length` tokens.
    """
    most = kept = 0
    for run in runs:
        size, stays = run.subject.state_bytes(windows, length), run.layout.resident and run.keep
        most = max(most, kept + (0 if stays else size if run.layout.resident else 2 * size))
        kept += 0 if stays else size
    return most
