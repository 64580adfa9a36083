"""Tuning one layer, its mask fixed: epochs over the windows it learns from, judged on windows that it does not see.

    held out   every 16th window, at least one; what is kept is what was best on these after an epoch
    rates      the one that was asked for; a quarter and a sixteenth of it only if the layer was better off as it was
    windows    in an order that the layer's number decides; the last, incomplete step of an epoch is left out

A layer that no rate makes better on what was held out stays as it was, byte for byte. Everything is decided by the
layer, the windows and the settings, so that a layer that is tuned again comes out the same.

Of a layer with experts, those come first, each by itself (expert_tuning.py). Then the rest of the layer is tuned, with
gradients through the experts, which stay as they are; so do routers. If all experts together have made the layer worse
on what was held out, they are put back.
"""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamprune.calibration.windows import held_out
from streamprune.methods.tuning import Tuned, error_sum, filled, schedule
from streamprune.model.differentiable import BoundExperts, Run, trainable
from streamprune.model.frozen_experts import FrozenExperts
from streamprune.model.pairs import Pairs
from streamprune.model.skeleton import Skeleton
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel
from streamprune.pruning.linears import ROUTER

STEP_TOKENS = 512
"""Tokens of a step."""

RATES = (1.0, 1 / 4, 1 / 16)
"""Of the rate that was asked for, in the order in which they are tried."""

_INDEXER = re.compile(r"(^|\.)indexer\.")

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
    """What is tuned of a layer but its experts, by the parameter's name within it: True for linears' weights, which
    have a mask.

    Nothing where no linear of the layer is among those `pruned`. Linears that are not stay as they are; so do routers,
    and indexers of sparse attention, which only choose.
    """
    masked = {f"{n.removeprefix(stage.prefix + '.')}.weight" for n in stage.linears if n in pruned}
    if not masked:
        return {}
    parameters = dict(skeleton.layers[stage.index].named_parameters())
    vectors = {n for n, p in parameters.items() if p.dim() == 1 and p.is_floating_point()}
    vectors -= {n for n in vectors if stage.experts and ROUTER.search(f".{n}")}
    chosen = {n for n in parameters if n in masked or n in vectors}
    return {n: n in masked for n in parameters if n in chosen and not _INDEXER.search(n)}


def windows_a_step(seqlen: int, samples: int) -> int:
    """Windows that a step learns from."""
    return max(1, min(STEP_TOKENS // seqlen, (samples - len(held_out(samples))) // _LEAST_STEPS))


Loss = Callable[[Tensor], Tensor]
"""The error of some windows or tokens (n,) int64, summed over all tokens of them; it can be differentiated."""


@dataclass(frozen=True)
class Lesson:
    """What is learnt from: windows or tokens, by their numbers."""

    loss: Loss
    learnt: Tensor
    """Those that are learnt from (n,) int64."""
    held: Tensor
    """Those that are held out (n,) int64."""
    size: int
    """How many a step learns from."""
    tokens: int
    """Tokens of each."""
    seed: int
    """Decides their order."""


class Searcher:
    """Finds better values of tensors, from `most` windows or tokens of a lesson at a time; calls `at_work` before each
    step."""

    def __init__(self, tuning: Tuning, most: int, at_work: Callable[[], None]) -> None:
        self._tuning, self._most, self._at_work = tuning, most, at_work

    def _search(self, lesson: Lesson, tuned: list[Tuned]) -> tuple[list[Tensor] | None, dict[str, Any]]:
        """The best values found, None where those that were there are, and the report."""
        some = lesson.learnt[:: -(-len(lesson.learnt) // len(lesson.held))]
        judge = Judge(lambda windows: self._error(lesson, windows), lesson.held)
        first = [each.rounded() for each in tuned]
        report: dict[str, Any] = {
            "held_out_error_before": judge.least, "error_before": self._error(lesson, some), "epochs": 0,
        }  # fmt: skip
        for rate in (self._tuning.rate * part for part in RATES) if tuned else ():
            self._train(lesson, tuned, rate, judge)
            report["epochs"] += self._tuning.epochs
            if judge.best is not None:
                report |= {"rate": rate, "best_epoch": judge.epoch}
                break
            for each, kept in zip(tuned, first, strict=True):
                each.begin_again(kept)
        for each, kept in zip(tuned, judge.best or first, strict=True):
            each.show(kept)
        report |= {"held_out_error": judge.least, "error": self._error(lesson, some)}
        if judge.best is None:
            report["left_as_it_was"] = True
        return judge.best, report

    def _train(self, lesson: Lesson, tuned: list[Tuned], rate: float, judge: Judge) -> None:
        learnt, size = lesson.learnt, lesson.size
        order = torch.Generator().manual_seed(lesson.seed)
        steps = len(learnt) // size * self._tuning.epochs
        number = 0
        for epoch in range(1, self._tuning.epochs + 1):
            shuffled = learnt[torch.randperm(len(learnt), generator=order)]
            for windows in torch.split(shuffled[: len(learnt) // size * size], size):
                self._at_work()
                for part in torch.split(windows, self._most):
                    lesson.loss(part).backward()  # type: ignore[no-untyped-call]
                for each in tuned:
                    each.step(rate * schedule(number, steps), number + 1)
                number += 1
            if not judge.look(epoch, tuned):
                return

    def _error(self, lesson: Lesson, windows: Tensor) -> float:
        """Of tokens of these windows, the mean error."""
        with torch.no_grad():
            parts = [float(lesson.loss(part)) for part in torch.split(windows, self._most)]
        return math.fsum(parts) / (len(windows) * lesson.tokens)


class BlockTuner(Searcher):
    """Tunes layers with `streamed`."""

    def __init__(
        self, streamed: StreamedModel, tuning: Tuning, most: int, at_work: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(tuning, most, at_work)
        self._streamed = streamed

    def tune(
        self, stage: Stage, tensors: Iterable[tuple[str, Tensor]], names: Mapping[str, bool], pairs: Pairs,
        experts: BoundExperts | None = None,
    ) -> tuple[dict[str, New], dict[str, Any]]:  # fmt: skip
        """What makes the new of each stored tensor among `names`, and the report of the layer.

        `tensors` brings all of the layer's but experts', as stored, by their names within it; none is changed, or
        held. Nothing comes back for a layer that stays as it was. New weights of `experts` are taken from them where
        they do harm.
        """
        since = time.perf_counter()
        own, tuned = dict[str, Tensor](), dict[str, Tuned]()
        for name, stored in tensors:
            own[name] = self._own(stored, name in names)
            if name in names:
                tuned[name] = Tuned.of(own[name], stored, masked=names[name])
        with trainable(self._streamed, stage, own, experts) as run, repeatable(self._streamed.device):
            lesson = self._lesson(run, pairs, stage.index)
            begun = {} if experts is None else self._without_harm(lesson, experts.frozen)
            best, report = self._search(lesson, list(tuned.values()))
        report |= begun
        if experts is not None and experts.frozen.new:
            report.pop("left_as_it_was", None)
        report["seconds"] = round(time.perf_counter() - since, 3)
        if best is None:
            return {}, report
        made = zip(tuned.items(), best, strict=True)
        return {name: functools.partial(filled, where=each.where, kept=kept) for (name, each), kept in made}, report

    def _own(self, stored: Tensor, learns: bool) -> Tensor:
        dtype = self._streamed.dtype if stored.is_floating_point() else stored.dtype
        own = stored.to(self._streamed.device, dtype, copy=True).contiguous()
        return torch.nn.Parameter(own, requires_grad=learns) if own.is_floating_point() else own

    def _lesson(self, run: Run, pairs: Pairs, seed: int) -> Lesson:
        def loss(windows: Tensor) -> Tensor:
            given, wanted, weights = pairs.of(windows, self._streamed.dtype)
            return error_sum(run(given), wanted, weights)

        held = torch.tensor(held_out(pairs.samples))
        learnt = torch.tensor([w for w in range(pairs.samples) if w not in held_out(pairs.samples)] or [0])
        return Lesson(loss, learnt, held, windows_a_step(pairs.seqlen, pairs.samples), pairs.seqlen, seed)

    def _without_harm(self, lesson: Lesson, experts: FrozenExperts) -> dict[str, float]:
        """Drops experts' new weights if the layer is worse with them; returns the errors of the layer without them."""
        new, some = experts.renewed({}), lesson.learnt[:: -(-len(lesson.learnt) // len(lesson.held))]
        before = {
            "held_out_error_before": self._error(lesson, lesson.held), "error_before": self._error(lesson, some),
        }  # fmt: skip
        experts.renewed(new)
        if new and not self._error(lesson, lesson.held) <= before["held_out_error_before"]:
            experts.renewed({})
        return before


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
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
