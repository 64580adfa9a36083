"""Arrays that ranks make together, here as threads: the same bits for any number of ranks, each part made once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from queue import Queue
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from streamprune.methods.admm import OBS, Operator
from streamprune.methods.admm import prepare as prepare_operator
from streamprune.methods.gram import Gram
from streamprune.methods.inverse import Damping, inverse_diagonal, normalised_inverse, upper_factor
from streamprune.methods.refits import METHODS, Choice, Prepared, RefitRequest, Sample, choose
from streamprune.process.ranks import Ranks
from streamprune.process.share import PARTS, parts_of, share_

Value = TypeVar("Value")


Letters = dict[tuple[int, int], Queue[Any]]
"""What a rank has sent to another one, in order."""


class Threads(Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, letters: Letters) -> None:
        self.rank, self.size, self._letters = rank, size, letters

    def gather(self, value: Value) -> list[Value]:
        everybody = range(self.size)
        for rank in everybody:
            self._letters[self.rank, rank].put(value)
        return [self._letters[rank, self.rank].get(timeout=30) for rank in everybody]

    def broadcasting_(self, tensor: Tensor, source: int) -> Callable[[], None]:
        assert tensor.is_contiguous()
        others = [rank for rank in range(self.size) if rank != source]
        for rank in others if source == self.rank else ():
            self._letters[source, rank].put(tensor.clone())

        def wait() -> None:
            if source != self.rank:
                tensor.copy_(self._letters[source, self.rank].get(timeout=30))

        return wait


def on_ranks(size: int, work: Callable[[Ranks], Value]) -> list[Value]:
    """What `work` returns on each of so many ranks."""
    letters: Letters = {pair: Queue() for pair in product(range(size), repeat=2)}
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(lambda rank: work(Threads(rank, size, letters)), range(size)))
    finally:
        torch.set_num_threads(threads)  # of the whole process


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_part_is_made_once(size: int) -> None:
    made, lock = list[int](), threading.Lock()

    def work(ranks: Ranks) -> Tensor:
        whole = torch.zeros(3, 20)
        parts = parts_of(0, 20, 2)

        def make(i: int) -> Tensor:
            with lock:
                made.append(i)
            return torch.full((3, parts[i].stop - parts[i].start), float(i + 1))

        share_([whole[:, part] for part in parts], make, ranks)  # not contiguous
        return whole

    found = on_ranks(size, work)
    assert sorted(made) == list(range(len(parts_of(0, 20, 2))))
    assert all(torch.equal(each, found[0]) for each in found)
    assert bool((found[0] > 0).all())


@pytest.mark.parametrize(
    ("begin", "end", "least"), [(0, 0, 4), (3, 4, 256), (0, 255, 256), (7, 520, 256), (0, 5000, 256)]
)
def test_parts_cover_everything(begin: int, end: int, least: int) -> None:
    parts = parts_of(begin, end, least)
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(begin, end))
    assert len(parts) <= PARTS
    assert len(parts) == 1 or all(part.stop - part.start >= least // 2 for part in parts[:-1])


@pytest.mark.parametrize("width", [200, 1100])
def test_inverses_do_not_depend_on_the_number_of_ranks(width: int) -> None:
    """One block, and several in parts of which the last is smaller."""
    x = torch.randn(2 * width, width, generator=torch.Generator().manual_seed(width)) * torch.linspace(0.1, 10, width)
    gram = x.T @ x / len(x)

    def work(ranks: Ranks) -> list[Tensor]:
        return [
            upper_factor(gram, Damping(0.01), ranks).matrix,
            normalised_inverse(gram, Damping(0.05), 0.5, ranks).matrix,
            inverse_diagonal(gram, Damping(0.05), ranks).matrix,
        ]

    (alone,) = on_ranks(1, work)
    for size in (2, 3):
        for found in on_ranks(size, work):
            assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    scale = gram.double().diagonal().sqrt()
    normal = gram.double() / (scale * scale[:, None]) + 0.05 * torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(alone[2].double(), torch.linalg.inv(normal).diagonal(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("tokens", "damping"), [(400, 0.05), (20, 0.0)], ids=["as asked", "more damping"])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_operators_do_not_depend_on_the_number_of_ranks(tokens: int, damping: float, products: torch.dtype) -> None:
    """Two ranks make one half each, unless the first half turns out to need more damping."""
    x = torch.randn(tokens, 300, generator=torch.Generator().manual_seed(1))
    gram = x.T @ x

    def work(ranks: Ranks) -> Operator:
        return prepare_operator(gram, Damping(damping), OBS, products, None, ranks)

    (alone,) = on_ranks(1, work)
    assert (alone.damping == damping) == (tokens > 300) and alone.matrix.dtype == products
    for size in (2, 3):
        for found in on_ranks(size, work):
            assert found.damping == alone.damping
            assert all(torch.equal(*pair) for pair in zip(found[:3], alone[:3], strict=True))


@pytest.mark.parametrize("decreasing", [True, False], ids=["all three are tried", "two are tried"])
def test_ranks_try_dampings_at_the_same_time(decreasing: bool) -> None:
    """The choice is that of one rank, which tries them one after the other; none is prepared twice without need."""
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 64, generator=made), torch.randn(40, 64, generator=made)
    errors = {1.0: 0.3, 2.0: 0.2 if decreasing else 0.4, 3.0: 0.1}
    prepared, lock = list[tuple[float, int]](), threading.Lock()

    def prepare(gram: Gram, damping: Damping, ranks: Ranks) -> Prepared:
        with lock:
            prepared.append((damping.value, ranks.size))
        return Prepared(errors[damping.value], damping)

    def solve(weight: Tensor, masked: Tensor, gram: Gram, state: float, request: RefitRequest) -> Tensor:
        return weight * (1 - state)

    method = replace(METHODS["cg"], prepare=prepare, solve=solve)
    ask = RefitRequest(0.5, None, lambda rows, _: rows.abs() > 1)

    def work(ranks: Ranks) -> dict[str, Choice]:
        gram = Gram(x.T @ x, x[:64], len(x), ranks=ranks)
        samples = {"q": Sample(weight, 0 * weight)}
        return choose(method, samples, gram, {"q": ask}, [Damping(value) for value in errors])

    (alone,) = on_ranks(1, work)
    assert prepared == [(1.0, 1), (2.0, 1), (3.0, 1)][: 3 if decreasing else 2]
    assert alone["q"].damping == Damping(3.0 if decreasing else 1.0)
    for size, told in ((2, [(1.0, 1), (2.0, 1)]), (3, [(1.0, 1), (2.0, 1), (3.0, 1)])):
        prepared.clear()
        assert on_ranks(size, work) == [alone] * size
        together = [(3.0, 2), (3.0, 2)] if size == 2 and decreasing else []
        assert sorted(prepared) == told + together
