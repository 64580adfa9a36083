"""Tuning one layer, its mask fixed: epochs over the windows it learns from, judged on windows that it does not see.

    held out   every 16th window, at least one; what is kept is what was best on these after an epoch
    rates      the one that was asked for; a quarter and a sixteenth of it only if the layer was better off as it was
    windows    in an order that the layer's number decides; the last, incomplete step of an epoch is left out

A layer that no rate makes better on what was held out stays as it was, byte for byte. Everything is decided by the
layer, the windows and the settings, so that a layer that is tuned again comes out the same.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprune.methods.tuning import Tuned, error_sum, filled, schedule
from streamprune.model.differentiable import Run, trainable
from streamprune.model.pairs import Pairs
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel

STEP_TOKENS = 512
"""Tokens of a step."""

RATES = (1.0, 1 / 4, 1 / 16)
"""Of the rate that was asked for, in the order in which they are tried."""

_HELD = 16

_LEAST_STEPS = 8
"""Of an epoch."""


New = Callable[[Tensor], Tensor]
"""From a stored tensor to a new one of its shape and dtype."""


@dataclass(frozen=True)
class Tuning:
    """How long a layer is tuned, and how fast: `rate` is relative to each tensor's mean magnitude."""

    epochs: int
    rate: float


def tuned_names(skeleton: Skeleton, stage: Stage, pruned: Collection[str]) -> dict[str, bool]:
    """What is tuned of a layer, by the parameter's name within it: True for linears' weights, which have a mask.

    Nothing where no linear of the layer is among those `pruned`. Linears that are not stay as they are.
    """
    masked = {f"{n.removeprefix(stage.prefix + '.')}.weight" for n in stage.linears if n in pruned}
    if not masked:
        return {}
    parameters = skeleton.layers[stage.index].named_parameters()
    return {n: n in masked for n, p in parameters if n in masked or (p.dim() == 1 and p.is_floating_point())}


def windows_a_step(seqlen: int, samples: int) -> int:
    """Windows that a step learns from."""
    return max(1, min(STEP_TOKENS // seqlen, (samples - len(held_out(samples))) // _LEAST_STEPS))


def held_out(samples: int) -> range:
    """Windows that are kept out of tuning. Of a single one, it."""
    count = max(1, samples // _HELD)
    return range(samples // count - 1, samples, samples // count)[:count]


class BlockTuner:
    """Tunes layers with `streamed`, `most` windows at a time; calls `at_work` before each step."""

    def __init__(
        self, streamed: StreamedModel, tuning: Tuning, most: int, at_work: Callable[[], None] = lambda: None
    ) -> None:
        self._streamed, self._tuning, self._most, self._at_work = streamed, tuning, most, at_work

    def tune(
        self, stage: Stage, tensors: Iterable[tuple[str, Tensor]], names: Mapping[str, bool], pairs: Pairs
    ) -> tuple[dict[str, New], dict[str, Any]]:  # fmt: skip
        """What makes the new of each stored tensor among `names`, and the report of the layer.

        `tensors` brings all of the layer's, as stored, by their names within it; none is changed, or held. Nothing
        comes back for a layer that stays as it was.
        """
        since = time.perf_counter()
        own, tuned = dict[str, Tensor](), dict[str, Tuned]()
        for name, stored in tensors:
            own[name] = self._own(stored, name in names)
            if name in names:
                tuned[name] = Tuned.of(own[name], stored, masked=names[name])
        with trainable(self._streamed, stage, own) as run, _repeatable(self._streamed.device):
            best, report = self._search(run, list(tuned.values()), pairs, stage.index)
        report["seconds"] = round(time.perf_counter() - since, 3)
        if best is None:
            return {}, report
        made = zip(tuned.items(), best, strict=True)
        return {name: functools.partial(filled, where=each.where, kept=kept) for (name, each), kept in made}, report

    def _own(self, stored: Tensor, learns: bool) -> Tensor:
        dtype = self._streamed.dtype if stored.is_floating_point() else stored.dtype
        own = stored.to(self._streamed.device, dtype, copy=True).contiguous()
        return torch.nn.Parameter(own, requires_grad=learns) if own.is_floating_point() else own

    def _search(
        self, run: Run, tuned: list[Tuned], pairs: Pairs, seed: int
    ) -> tuple[list[Tensor] | None, dict[str, Any]]:  # fmt: skip
        """The best values found, None where those that were there are, and the report."""
        held = torch.tensor(held_out(pairs.samples))
        learnt = torch.tensor([w for w in range(pairs.samples) if w not in held_out(pairs.samples)] or [0])
        some = learnt[:: -(-len(learnt) // len(held))]
        judge = Judge(lambda windows: self._error(run, pairs, windows), held)
        first = [each.rounded() for each in tuned]
        report: dict[str, Any] = {
            "held_out_error_before": judge.least, "error_before": self._error(run, pairs, some), "epochs": 0,
        }  # fmt: skip
        for rate in (self._tuning.rate * part for part in RATES):
            self._train(run, tuned, pairs, learnt, rate, seed, judge)
            report["epochs"] += self._tuning.epochs
            if judge.best is not None:
                report |= {"rate": rate, "best_epoch": judge.epoch}
                break
            for each, kept in zip(tuned, first, strict=True):
                each.begin_again(kept)
        for each, kept in zip(tuned, judge.best or first, strict=True):
            each.show(kept)
        report |= {"held_out_error": judge.least, "error": self._error(run, pairs, some)}
        if judge.best is None:
            report["left_as_it_was"] = True
        return judge.best, report

    def _train(
        self, run: Run, tuned: list[Tuned], pairs: Pairs, learnt: Tensor, rate: float, seed: int, judge: Judge
    ) -> None:  # fmt: skip
        size = windows_a_step(pairs.seqlen, pairs.samples)
        order = torch.Generator().manual_seed(seed)
        steps = len(learnt) // size * self._tuning.epochs
        number = 0
        for epoch in range(1, self._tuning.epochs + 1):
            shuffled = learnt[torch.randperm(len(learnt), generator=order)]
            for windows in torch.split(shuffled[: len(learnt) // size * size], size):
                self._at_work()
                for part in torch.split(windows, self._most):
                    self._loss(run, pairs, part).backward()  # type: ignore[no-untyped-call]
                for each in tuned:
                    each.step(rate * schedule(number, steps), number + 1)
                number += 1
            if not judge.look(epoch, tuned):
                return

    def _loss(self, run: Run, pairs: Pairs, windows: Tensor) -> Tensor:
        given, wanted, weights = pairs.of(windows, self._streamed.dtype)
        return error_sum(run(given), wanted, weights)

    def _error(self, run: Run, pairs: Pairs, windows: Tensor) -> float:
        """Of tokens of these windows, the mean error."""
        with torch.no_grad():
            parts = [float(self._loss(run, pairs, part)) for part in torch.split(windows, self._most)]
        return math.fsum(parts) / (len(windows) * pairs.seqlen)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Within it, a GPU's kernels that add in any order are left out where there are others: the same bytes again."""
    if device.type != "cuda":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


class Judge:
    """Keeps the best values of a layer, by their error on what was held out."""

    def __init__(self, error: Callable[[Tensor], float], held: Tensor) -> None:
        self._error, self._held = error, held
        self.least = error(held)
        """The error of the best so far; at first of what was there."""
        self.best: list[Tensor] | None = None
        self.epoch = 0

    def look(self, epoch: int, tuned: list[Tuned]) -> bool:
        """Judges the values after an epoch. False where going on is of no use: the error is no number."""
        error = self._error(self._held)
        if error < self.least:
            self.least, self.epoch = error, epoch
            self.best = [each.rounded() for each in tuned]
        return math.isfinite(error)
