"""Tuning the experts of a layer, each as a block of its own: its gate, up and down projections, their masks fixed.

    loss      mean over the tokens t routed to it of s_t² · ‖f(x_t) − y_t‖² / ‖h_t‖², divided by that of y_t itself
              s_t the routing weight, h_t what the dense layer gives for the token
    x_t       what the expert is given by the dense model's layer, from the states that this layer has in the job
    y_t       what the dense expert makes of the same x_t

Input and target are of the same tokens with the same x: with --propagate pruned, states come from the pruned layers
before, and the dense attention and router of this layer send them to its experts. What the pruned router would send
elsewhere has no dense counterpart at this expert; and as the rest of the layer is tuned afterwards, with gradients
through the tuned experts, to give what the dense layer gives, x comes close to that of the dense layer again.

An error of one expert reaches the layer's output multiplied with s_t, and there counts relative to the state, as in
methods/tuning.py. Tokens of windows that are held out of tuning judge each expert: it stays as it was where they are no
better off, and where it sees fewer than --expert-tokens, or none that is held out. Experts' biases stay as they were.

One expert is in memory at a time, with its gradients and moments; targets are in a file, and so are new weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.calibration.windows import held_out
from streamprune.disk.header import TensorRef
from streamprune.disk.scratch import ScratchMatrix
from streamprune.methods.tuning import Tuned, error_sum, filled
from streamprune.model.experts import Experts
from streamprune.model.frozen_experts import SpareWeight
from streamprune.model.loader import WeightLoader
from streamprune.model.pairs import Pairs
from streamprune.model.routed import Mixture, Routed, Weights
from streamprune.model.routed_inputs import RoutedInputs
from streamprune.model.stages import Stage
from streamprune.model.streamed import StreamedModel
from streamprune.pruning.tuning import STEP_TOKENS, Lesson, Loss, Searcher, Tuning, repeatable

AT_ONCE = 4 * STEP_TOKENS
"""Tokens that an expert computes for at once."""

_LEAST_STEPS = 8
"""Of an epoch."""


def tokens_a_step(learnt: int) -> int:
    """Tokens that a step learns from, of an expert that learns from so many in all."""
    return max(1, min(STEP_TOKENS, learnt // _LEAST_STEPS))


class ExpertTuner(Searcher):
    """Tunes experts. Files are in `folder`; an expert that sees fewer than `least` tokens stays as it was."""

    def __init__(
        self, streamed: StreamedModel, tuning: Tuning, least: int, folder: Path,
        at_work: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        super().__init__(tuning, AT_ONCE, at_work)
        self._streamed, self._least, self._folder = streamed, least, folder

    def tune(
        self, stage: Stage, selected: Collection[str], routed: Routed, pairs: Pairs, loader: WeightLoader,
        sources: Mapping[str, TensorRef],
    ) -> tuple[dict[str, SpareWeight], dict[str, Any]]:  # fmt: skip
        """New weights of experts' linears among those `selected`, as stored, and a report.

        `routed` has recorded what the experts of the dense layer are given; `loader` and `sources` have the layer's
        pruned weights.
        """
        since, number = time.perf_counter(), 0
        new, reports = dict[str, SpareWeight](), list[dict[str, Any]]()
        for experts in stage.experts:
            with self._streamed.experts(experts.path, routed), repeatable(self._streamed.device):
                mixture, kept = routed.recorded(experts.path)
                kept.check(experts.path, pairs.samples * pairs.seqlen)
                for e in range(len(experts.down)):
                    number += 1
                    if selected_of := [name for name in experts.of([e]) if name in selected]:
                        given = _Given(self._streamed, mixture, kept, e, pairs, self._folder)
                        refs = {name: sources[f"{name}.weight"] for name in experts.of([e])}
                        seed = (stage.index << 20) + number
                        found, report = self._expert(given, refs, selected_of, loader, seed)
                        new |= found
                        reports.append(report)
        return new, _summary(reports) | {"seconds": round(time.perf_counter() - since, 3)}

    def _expert(
        self, given: _Given, refs: Mapping[str, TensorRef], selected: Sequence[str], loader: WeightLoader, seed: int
    ) -> tuple[dict[str, SpareWeight], dict[str, Any]]:  # fmt: skip
        """The new weights of one expert, none where it stays as it was; its report is empty if it saw too little."""
        learnt, held = given.learnt, given.held
        if len(learnt) + len(held) < self._least or not len(learnt) or not len(held):
            return {}, {}
        given.aim()
        own, tuned = dict[str, Tensor](), dict[str, Tuned]()
        for name, ref in refs.items():
            stored = loader.tensor(ref)
            copy = stored.to(self._streamed.device, self._streamed.dtype, copy=True).contiguous()
            own[name] = torch.nn.Parameter(copy, requires_grad=name in selected)
            if name in selected:
                tuned[name] = Tuned.of(own[name], stored, masked=True)
        size = tokens_a_step(len(learnt))
        best, report = self._search(Lesson(given.loss(own), learnt, held, size, 1, seed), list(tuned.values()))
        new = {
            name: SpareWeight(self._folder, filled(loader.tensor(refs[name]), each.where, kept))
            for (name, each), kept in zip(tuned.items(), best or (), strict=best is not None)
        }
        loader.release(refs.values())
        return new, report


class _Own(Weights):
    """The weights of one expert, in memory: linear -> as stored, but in the compute dtype."""

    def __init__(self, weights: Mapping[str, Tensor], experts: Experts, device: torch.device) -> None:
        self._weights, self._transposed, self.device = weights, experts.transposed, device

    def stored(self, name: str) -> tuple[TensorRef, Tensor]:
        raise NotImplementedError(name)

    def product(self, name: str, x: Tensor) -> Tensor:
        weight = self._weights[name].to(x.dtype)
        return F.linear(x, weight.t() if name in self._transposed else weight)

    def expect(self, names: Collection[str]) -> None:
        """They are there."""

    def release(self, names: Collection[str]) -> None:
        """They stay."""


class _Given:
    """What expert number `e` of a `mixture`, bound with dense weights, is given, and what is wanted of it."""

    def __init__(
        self, streamed: StreamedModel, mixture: Mixture, kept: RoutedInputs, e: int, pairs: Pairs, folder: Path
    ) -> None:  # fmt: skip
        self._mixture, self._kept, self._e, self._folder = mixture, kept, e, folder
        self._device, self._dtype = streamed.device, streamed.dtype
        self._path, self._weights = mixture.experts.path, pairs.token_weights
        self._tokens, self._shares = kept.routed_to(self._path, e)
        held = torch.isin(self._tokens // pairs.seqlen, torch.tensor(held_out(pairs.samples)))
        self.learnt, self.held = (~held).nonzero().flatten(), held.nonzero().flatten()
        """Of the tokens routed to the expert, those that are learnt from and those that are not."""
        self._wanted: ScratchMatrix | None = None
        self._counts = torch.empty(0)

    def aim(self) -> None:
        """Computes what is wanted, with the dense weights, which are freed then."""
        mixture, parts = self._mixture, list[Tensor]()
        total, count = 0.0, len(self._tokens)
        for begin in range(0, count, AT_ONCE):
            which = torch.arange(begin, min(begin + AT_ONCE, count))
            x, part = self._of(which)
            with torch.no_grad():
                made = mixture.output(self._e, mixture.intermediate(self._e, x))
            if self._wanted is None:
                self._wanted = ScratchMatrix(self._folder, count, made.shape[1], made.dtype)
            self._wanted.tensor[which] = made.cpu()
            self._wanted.forget(0, count)
            counts = self._weights[self._tokens[which].to(self._device)] * part[:, 0].float().square()
            total += float((made.double().square().sum(1) * counts).sum())
            parts.append(counts)
        mixture.weights.release(mixture.experts.of([self._e]))
        self._counts = torch.cat(parts) * (count / total if total > 0 else 0.0)

    def loss(self, own: Mapping[str, Tensor]) -> Loss:
        """The summed error of some of the tokens with these weights."""
        mixture = Mixture(self._mixture.form, self._mixture.experts, _Own(own, self._mixture.experts, self._device))

        def loss(which: Tensor) -> Tensor:
            assert self._wanted is not None
            x, _ = self._of(which)
            made = mixture.output(self._e, mixture.intermediate(self._e, x))
            wanted = self._wanted.tensor[which].to(self._device)
            self._wanted.forget(0, len(self._tokens))
            return error_sum(made, wanted, self._counts[which.to(self._device)])

        return loss

    def _of(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """The expert's input (n, hidden) of some of its tokens, and the weights of its outputs (n, 1)."""
        x = self._kept.states(self._path, self._tokens[which]).to(self._device, self._dtype)
        return self._mixture.given_to(x, self._shares[which].to(self._device))


def _summary(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many experts were tuned, and the means of their errors. An empty report is of one that saw too little."""
    judged = [report for report in reports if report]
    left = sum("left_as_it_was" in report for report in judged)
    found: dict[str, Any] = {
        "tuned": len(judged) - left, "left_as_they_were": left, "too_few_tokens": len(reports) - len(judged),
    }  # fmt: skip
    for key in ("held_out_error_before", "held_out_error", "error_before", "error") if judged else ():
        found[key] = sum(report[key] for report in judged) / len(judged)
    return found


def put_back(told: Mapping[str, Any]) -> dict[str, Any]:
    """The report of experts that are all as they were, as the layer was worse with them."""
    now = {key: told[f"{key}_before"] for key in ("held_out_error", "error")}
    return {**told, **now, "tuned": 0, "left_as_they_were": told["tuned"] + told["left_as_they_were"], "put_back": True}
