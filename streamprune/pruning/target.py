"""Which linears of a model are pruned, how much of each, and with which scores.

Found from headers alone: nothing here reads or writes a weight. `plan` and the jobs use the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from streamprune.disk.checkpoint import Checkpoint
from streamprune.disk.encoded import written
from streamprune.disk.header import TensorRef
from streamprune.disk.linears import compile_filter
from streamprune.disk.shards import in_order
from streamprune.kernels import Selection
from streamprune.methods.allocation import least_share
from streamprune.methods.recipes import Recipe
from streamprune.methods.scores import SCORES, Feature
from streamprune.methods.selection import Amount, parse_pattern, select
from streamprune.methods.stats import InputStats
from streamprune.model.shapes import linear_shape
from streamprune.model.stages import PRUNABLE, Outline, Stage
from streamprune.pruning.codes import Quantisation, check_codable, coded
from streamprune.pruning.expert_codes import Apart, experts_apart
from streamprune.pruning.kept_codes import Parts, parts_to_keep
from streamprune.pruning.linears import check_widths, selected_linears
from streamprune.pruning.spec import JobSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Target:
    """Which linears to prune, how much of each, and how."""

    skeleton: Outline
    selected: frozenset[str]
    """Module paths of the linears to prune."""
    recipe: Recipe
    amount: Amount
    backend: str | None = None
    """Kernels: "numba", "torch", or None: chosen by device."""
    damping: str = "auto"
    """Damping of a refit, see refit.Refit."""
    quantisation: Quantisation | None = None
    apart: Apart = field(default_factory=dict)
    """Linears of experts that are in one tensor, and are quantised: what each is stored as."""
    kept: Parts = field(default_factory=dict)
    """With --quantize keep: what is stored of each quantised weight, which is written again."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Linears with a sparsity of their own instead of `amount`, by module path."""
    least: Amount | None = None
    """The smallest sparsity that a linear may be given, while a sparsity is not allocated yet."""

    @classmethod
    def of_job(cls, spec: JobSpec, checkpoint: Checkpoint, skeleton: Outline, backend: str) -> Target | None:
        """The target of a prune job; None for `calibrate`.

        Raises UsageError for filters and patterns that do not fit the model, UnsupportedError for linears that cannot
        be stored in FP8, or in the source's format.
        """
        if spec.recipe is None:
            return None
        amount = Amount(spec.sparsity, parse_pattern(spec.pattern) if spec.pattern else None)
        quantisation, apart = None, dict[str, tuple[TensorRef, ...]]()
        if spec.recipe.in_fp8:
            compensates = spec.recipe.fp8_rounding == "compensate"
            quantisation = Quantisation(spec.recipe.fp8_scale or "amax", compensates, backend)
        only, skip = compile_filter("--only", spec.only), compile_filter("--skip", spec.skip)
        chosen = selected_linears(skeleton.stages, only, skip, skeleton.streams)
        if quantisation is not None:
            apart = experts_apart(str(checkpoint.config.get("model_type")), chosen, skeleton)
            check_codable({name: ref for name, ref in chosen.items() if name not in apart}, skeleton)
        kept = parts_to_keep(checkpoint, chosen) if spec.recipe.keeps_codes else {}
        check_widths(amount.pattern, chosen, skeleton)
        kind = spec.recipe.allocate
        least = Amount(least_share(kind, spec.sparsity)) if kind and spec.sparsity else None
        return cls(
            skeleton, frozenset(chosen), spec.recipe, amount, backend, str(spec.recipe.damping or "auto"), quantisation,
            apart, kept, least=least,
        )  # fmt: skip

    def sharing(self, shares: Mapping[str, float]) -> Target:
        """The same target with sparsities `shares` for some linears, by module path."""
        return replace(self, shares=shares, least=None)

    @property
    def refitted(self) -> frozenset[str]:
        """Module paths of the linears to refit. Experts that see too few tokens are left out later."""
        return self.selected if self.recipe.needs_gram else frozenset()

    def of(self, name: str) -> Amount:
        """How much of a linear is pruned."""
        return Amount(self.shares[name]) if name in self.shares else self.amount

    def least_of(self, name: str) -> Amount:
        """Lower bound on how much of a linear is pruned; exact once the sparsity is allocated."""
        return self.least or self.of(name)

    def select(self, name: str, weight: Tensor, feature: Tensor, power: int) -> Selection:
        """Prunes rows (n, in) of a linear; see selection.select."""
        return select(
            weight, feature, power, selector=self.recipe.selector, backend=self.backend, **self.of(name)._asdict()
        )  # fmt: skip

    def feature(self, stats: Callable[[str, int], InputStats], name: str, in_features: int) -> tuple[Feature, int]:
        """The recipe's score of each input feature of a linear, see scores.py. `stats` is asked only if needed."""
        if name in self.unseen:
            return SCORES["magnitude"](InputStats.zeros(in_features))
        known = stats(name, in_features) if self.recipe.needs_statistics else InputStats.zeros(in_features)
        return SCORES[self.recipe.score](known)

    @property
    def unseen(self) -> Collection[str]:
        """Linears that no pass goes through (model/further.py), which are chosen from by magnitude."""
        return self.skeleton.stages[-1].linears

    def keep(self, name: str, weight: Tensor, feature: Tensor, power: int, share: float) -> Tensor:
        """Mask of the weights that are kept at the fraction `share` of the final amount: (n, in) bool."""
        keep = select(
            weight, feature, power, selector=self.recipe.selector, backend=self.backend, want_keep=True,
            **self.of(name).at(share)._asdict(),
        ).keep  # fmt: skip
        assert keep is not None
        return keep

    def tensors_of(self, stage: Stage) -> list[TensorRef]:
        """The tensors of a stage in the output; quantised tensors have no file offset yet."""
        if self.kept:
            return [part for ref in stage.tensors for part in self.kept.get(ref.name, (ref,))]
        tensors = [written(ref) for ref in stage.tensors]
        if self.quantisation is None:
            return tensors
        chosen = {ref.name for name, ref in stage.linears.items() if name in self.selected}
        apart = [new for name in stage.linears for part in self.apart.get(name, ()) for new in coded(part)]
        whole = {stage.linears[name].name for name in stage.linears if name in self.apart}
        rest = [ref for ref in tensors if ref.name not in whole]
        return [new for ref in rest for new in (coded(ref) if ref.name in chosen else (ref,))] + apart

    def codes_of(self, name: str, ref: TensorRef) -> list[tuple[TensorRef, TensorRef]]:
        """The codes and scales that a linear `ref` becomes, one below the other, without file offsets."""
        return [coded(part) for part in self.apart.get(name, (ref,))]

    def linears_of(self, stage: Stage) -> dict[str, int]:
        """The linears of a stage that are pruned -> in_features, in the order in which they are written."""
        names = [name for name in stage.linears if name in self.selected]
        if not names:
            return {}
        place = {ref.name: i for i, ref in enumerate(in_order(self.tensors_of(stage)))}
        stored = {name: self.apart.get(name, (stage.linears[name],))[0].name for name in names}
        names.sort(key=lambda name: (place[stored[name]], stage.linears[name].begin))
        return {name: linear_shape(self.skeleton, name, stage)[1] for name in names}

    @property
    def output_bytes(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(ref.nbytes for stage in self.skeleton.stages for ref in self.tensors_of(stage))

    def not_quantised(self) -> list[str]:
        """Names for `ignore` in config.json: linears that are not quantised, and other matrices such as routers."""
        names = [name for name in self.skeleton.modules if name not in self.selected]
        for stage in self.skeleton.stages:
            refs = self.tensors_of(stage)
            if stage.kind != "layer":
                refs = [ref for ref in refs if ref.name in stage.unclaimed]
            plain = (ref for ref in refs if ref.dtype in PRUNABLE and len(ref.shape) == 2)
            names += [n.removesuffix(".weight") for n in (ref.name for ref in plain) if n.endswith(".weight")]
        return list(dict.fromkeys(names))


class Features:
    """The recipe's score of each input feature, computed once for each linear of a stage."""

    def __init__(self, target: Target, stats: Callable[[str, int], InputStats], device: torch.device) -> None:
        self._target, self._stats, self._device = target, stats, device
        self._known: dict[str, tuple[Tensor, int]] = {}

    def of(self, name: str, in_features: int) -> tuple[Tensor, int]:
        """(feature (in,) float32 on the device, power p): the score of a weight w is |w|^p · feature."""
        import torch

        if name not in self._known:
            feature, power = self._target.feature(self._stats, name, in_features)
            self._known[name] = (torch.from_numpy(feature).to(self._device), power)
        return self._known[name]

    def power(self, name: str, in_features: int) -> Tensor | None:
        """E[x_j²] (in,) float32 on the device; None if the recipe uses no statistics."""
        import torch

        if not self._target.recipe.needs_statistics or name in self._target.unseen:
            return None
        return torch.from_numpy(self._stats(name, in_features).mean_square).float().to(self._device)
