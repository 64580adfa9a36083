"""What a refit is counted as, against what it does: products, inverses, and passes for Grams."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from streamprune.calibration import gram_sums
from streamprune.calibration.gram_sums import GramCollector, HoldOut
from streamprune.calibration.grams import LayerGrams
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping
from streamprune.methods.refits import METHODS, RefitRequest
from streamprune.planning.refit_cost import (
    EFFORTS,
    LEAST_BLOCK,
    Refitted,
    RefitWork,
    Trials,
    gathered,
    refit_work,
    triangle,
)
from streamprune.process.ranks import ALONE


class Counted(TorchDispatchMode):
    """Multiply-adds of products of matrices, and how many blocks are factorised."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.factors = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        left = {"aten::mm": 0, "aten::addmm_": 1, "aten::addmm": 1, "aten::addmv_": 1}.get(func._schema.name)
        if left is not None:
            self.products += args[left].numel() * (args[left + 1].shape[1] if args[left + 1].ndim == 2 else 1)
        self.factors += func._schema.name == "aten::linalg_cholesky_ex"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", METHODS)
def test_efforts_are_what_methods_do(name: str) -> None:
    """Products with the Gram, choices, and inverses; SparseGPT's products are half of what they are counted as."""
    assert EFFORTS.keys() == METHODS.keys()
    rows, width, chosen = 8, 512, []
    x = torch.randn(1024, width, generator=torch.Generator().manual_seed(0))
    gram = Gram(x.T @ x, x[:0], 1024)

    def keep(weight: torch.Tensor, share: float) -> torch.Tensor:
        chosen.append(share)
        return weight.abs() >= weight.abs().median(dim=1, keepdim=True).values

    method, effort = METHODS[name], EFFORTS[name]
    with Counted() as prepared:
        state = method.prepare(gram, Damping(method.damping), ALONE).state
    weight = torch.randn(rows, width)
    with Counted() as solved:
        method.solve(weight, torch.where(keep(weight, 1.0), weight, 0.0), gram, state, RefitRequest(0.5, None, keep))
    asked = effort.products * rows * width**2
    assert solved.products == asked if name != "sparsegpt" else 0.3 * asked < solved.products < 0.6 * asked
    assert prepared.factors == 2 * math.ceil(effort.inverses)  # a matrix of this width has two blocks
    if "cg" in name:
        assert len(chosen) - 1 == effort.selections


LINEARS = [
    Refitted(shares, rows, width, 2 * rows * width, 64, 2)
    for shares, rows, width in (("d", 512, 1024), ("g", 512, 512), ("g", 512, 512), ("q", 512, 768), ("o", 512, 256),
                                ("q", 512, 768))
]  # fmt: skip


@pytest.mark.parametrize("room", [1 << 30, 7 << 20, 5 << 20, 4 << 20, 3 << 20, 1 << 20, 300_000])
def test_passes_for_grams(room: int, tmp_path: Path) -> None:
    """As many as LayerGrams needs, of as many Grams."""
    names = [f"{linear.shares}{i}" for i, linear in enumerate(LINEARS)]
    leaders = {names[i]: next(n for n in names if n[0] == linear.shares) for i, linear in enumerate(LINEARS)}
    inputs = {linear.shares: torch.ones(4, linear.width) for linear in LINEARS}
    made: list[str] = []

    def run(make: Any, _: Any = None) -> GramCollector:
        collector: GramCollector = make()
        for name in sorted(names, key=leaders.__getitem__):
            collector.watch(name, inputs[name[0]])
        made.extend(name[0] for name, found in collector.sums.items() if found.begin == 0)
        return collector

    widths = {name: linear.width for name, linear in zip(names, LINEARS, strict=True)}
    grams = LayerGrams(widths, room, HoldOut(1, 4), tmp_path, run)
    first = grams.first_pass()
    grams.gathered(None if first is None else run(lambda: first), leaders)
    for name in names:
        grams.take(name)
        grams.done(name)
    found = gathered(LINEARS, room)
    assert found.passes == grams.passes
    assert sorted(width for width, _ in found.grams) == sorted(inputs[shares].shape[1] for shares in made)
    assert [panels for width, panels in found.grams] == [4 * width**2 > room for width, _ in found.grams]


def test_refit_work() -> None:
    """One linear of 512 x 1024 by hand; and what it grows with."""
    (one,) = (linear for linear in LINEARS if linear.shares == "d")
    found = refit_work(EFFORTS["admm"], [one], 1 << 30, 10_000, Trials(3, 1000))
    product, inverse = 2 * 1024**2, 2 * 1024**3
    grams = 9000 * 0.625 * product + 1000 * product  # four blocks of 256 columns: five eighths
    judged = 2 * 1000 * 1024 * 64 * (2 + 3) + 3 * 512 * product
    assert found.float32 == pytest.approx(grams + 4 * 0.9 * inverse + judged + 20 * (512 + 3 * 64) * product)
    assert (found.passes, found.native, found.selected) == (0, 0, one.nbytes * 15 * (1 + 3 * 64 / 512))
    assert found.columns == 0
    assert refit_work(EFFORTS["sparsegpt"], [one], 1 << 30, 10_000, Trials(3, 1000)).columns == 8 * (2 + 3)
    assert LEAST_BLOCK == gram_sums._BLOCK and triangle(256) == 1 and triangle(8192) == 9 / 16
    works = {n: refit_work(e, LINEARS, 1 << 30, 10_000, Trials(3, 1000)) for n, e in EFFORTS.items()}
    assert works["obs-admm"].native > 0 == works["gradual-cg"].native
    assert works["gradual-cg"].float32 > works["admm"].float32 > works["cg"].float32
    tight = refit_work(EFFORTS["cg"], LINEARS, 1 << 20, 10_000, Trials(3, 1000))
    assert tight.passes > works["cg"].passes == 0 and tight.float32 > works["cg"].float32
    assert refit_work(EFFORTS["cg"], [], 1 << 30, 10_000, Trials(3, 1000)) == RefitWork()
