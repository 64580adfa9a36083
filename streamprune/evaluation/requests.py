"""Requests: token sequences of which the last tokens are to be predicted, as they go through a model together.

Tasks ask for the likelihood of a continuation after a context, thousands of times and of any length. What the model is
given is a request's ids without the last one. Sequences that are equal, or the beginning of another, need no pass of
their own: at a causal model's position only tokens up to there count. So continuations of one token share their
context's pass, however many there are.

The sequences that are left are sorted by length, the longest first, rounded up to one of few lengths (an eighth more
at the most), and those of one length share batches. The rest of a row repeats its last token, for the same reason
harmlessly, and without a mask. A model whose rotary embedding changes beyond a certain length (longrope) is one model
up to there and another one beyond: no sequence is moved over that border.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamprune.calibration.tokens import Ids
from streamprune.errors import UsageError
from streamprune.model.passes import LazyBatches

Numbers = NDArray[np.int64]

_LEAST_STEP = 8
"""Lengths are multiples of it; longer ones of an eighth of the power of two below."""


@dataclass(frozen=True)
class Request:
    """Token ids (context, then continuation), of which the last `count` are to be predicted."""

    ids: Ids
    count: int

    def within(self, most: int) -> Request:
        """The same with no more than `most` tokens to be read: of a long context the end is kept."""
        return self if len(self.ids) <= most + 1 else Request(self.ids[-(most + 1) :], self.count)


class Wanted(NamedTuple):
    """Predictions that are wanted of a batch, one entry each: position in it, counted row by row; token; request."""

    places: Numbers
    tokens: Numbers
    requests: Numbers


class Sequences:
    """The distinct sequences that requests read, the longest first, and how long each is made.

    `most` is the longest the model may be given, `border` the length that none is moved over. Raises UsageError where
    a request predicts nothing, has nothing to be predicted from, or predicts more than `most`.
    """

    def __init__(self, requests: Sequence[Request], most: int, border: int | None = None) -> None:
        for number, r in enumerate(requests, 1):
            if not 1 <= r.count < len(r.ids):
                what = "nothing to predict" if r.count < 1 else "nothing before what it predicts"
                raise UsageError(f"request {number} of {len(requests)} has {what}; its text makes no token there")
            if r.count > most:
                raise UsageError(
                    f"request {number} of {len(requests)} predicts {r.count} tokens, more than the {most} that the "
                    "model may be given (--seqlen)"
                )
        self.requests = [r.within(most) for r in requests]
        self.truncated = sum(len(a.ids) < len(b.ids) for a, b in zip(self.requests, requests, strict=True))
        self.most, self._border = most, border
        owners = self._owners()
        first = sorted(set(owners), key=lambda i: -len(self.requests[i].ids))
        self.ids = [self.requests[i].ids[:-1] for i in first]
        self.readers: list[list[int]] = [[] for _ in first]
        """Of each sequence, the requests that are answered from it."""
        place = {request: at for at, request in enumerate(first)}
        for request, owner in enumerate(owners):
            self.readers[place[owner]].append(request)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def padded(self) -> list[int]:
        """The length that each is made."""
        return [self._padded(len(ids)) for ids in self.ids]

    def _owners(self) -> list[int]:
        """For each request the one whose sequence begins with its own.

        In alphabetical order, what begins with a sequence follows it immediately.
        """
        keys = [r.ids[:-1].astype(">u4").tobytes() for r in self.requests]
        owners, following = list(range(len(keys))), -1
        for at in sorted(owners, key=keys.__getitem__, reverse=True):
            if following >= 0 and keys[following].startswith(keys[at]) and self._alike(at, owners[following]):
                owners[at] = owners[following]
            following = at
        return owners

    def _alike(self, a: int, b: int) -> bool:
        beyond = [self._border is not None and len(self.requests[i].ids) - 1 > self._border for i in (a, b)]
        return beyond[0] == beyond[1]

    def _padded(self, length: int) -> int:
        step = max(_LEAST_STEP, 1 << max(0, (length - 1).bit_length() - 4))
        limits = [self.most] + ([self._border] if self._border is not None and length <= self._border else [])
        return min(-(-length // step) * step, *limits)


class RaggedBatches(LazyBatches):
    """Sequences as batches of ids (samples, length) int64 of at most `tokens` tokens, or of one sequence."""

    def __init__(self, sequences: Sequences, tokens: int) -> None:
        self.sequences = sequences
        self._rows: list[tuple[range, int]] = []
        """Of each batch, which sequences, and how long they are made."""
        for length, group in groupby(enumerate(sequences.padded), key=lambda pair: pair[1]):
            same = [at for at, _ in group]
            samples = max(1, tokens // length)
            self._rows += [
                (range(b, min(b + samples, same[-1] + 1)), length) for b in range(same[0], same[-1] + 1, samples)
            ]

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, index: int) -> Tensor:
        rows, length = self._rows[index]
        batch = np.empty((len(rows), length), np.int64)
        for row, ids in zip(batch, (self.sequences.ids[at] for at in rows), strict=True):
            row[: len(ids)], row[len(ids) :] = ids, ids[-1]
        return torch.from_numpy(batch)

    def wanted(self, index: int) -> Wanted:
        """What is to be predicted in a batch."""
        rows, length = self._rows[index]
        parts = []
        for row, at in enumerate(rows):
            for reader in self.sequences.readers[at]:
                request = self.sequences.requests[reader]
                end = row * length + len(request.ids) - 1
                tokens = request.ids[-request.count :].astype(np.int64)
                parts.append((np.arange(end - request.count, end), tokens, np.full(request.count, reader)))
        return Wanted(*(np.concatenate(of_all) for of_all in zip(*parts, strict=True)))


def border_of(config: Any) -> int | None:
    """The length beyond which a model's rotary embedding is another one (longrope), by its transformers config."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    found = [p.get("original_max_position_embeddings") for p in kinds if p.get("rope_type") == "longrope"]
    return min((int(n) for n in found if n), default=None)
