"""What each of several ranks does of a common work: batches that are passed through a model, and parts of arrays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamprune.errors import UsageError
from streamprune.process.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

PARTS = 8
"""Most parts that an array is cut into."""


@dataclass(frozen=True)
class Share:
    """The batches that each rank passes through a model: they are dealt in groups of `group`, in turn.

    `windows` in all, `batch` of them a batch, the last one may be smaller.
    """

    ranks: Ranks
    windows: int
    batch: int
    group: int = 1

    @property
    def batches(self) -> int:
        """The number of batches of all ranks."""
        return -(-self.windows // self.batch)

    def __len__(self) -> int:
        """The number of batches of this rank."""
        return sum(1 for _ in self.numbers())

    def numbers(self) -> Iterator[int]:
        """The numbers of this rank's batches, among those of all."""
        step = self.group * self.ranks.size
        for first in range(self.ranks.rank * self.group, self.batches, step):
            yield from range(first, min(first + self.group, self.batches))

    def number(self, own: int) -> int:
        """The number among the batches of all ranks of this rank's batch `own`."""
        return (own // self.group * self.ranks.size + self.ranks.rank) * self.group + own % self.group

    def owner(self, number: int) -> int:
        """The rank that passes a batch through the model."""
        return number // self.group % self.ranks.size

    def ends_group(self, own: int) -> bool:
        """Whether this rank's batch `own` is the last of its group."""
        return (own + 1) % self.group == 0 or own + 1 == len(self)

    def size(self, number: int) -> int:
        """The windows in a batch."""
        return min(self.batch, self.windows - number * self.batch)

    @property
    def own_windows(self) -> int:
        """The windows in this rank's batches."""
        return sum(map(self.size, self.numbers()))

    def check(self, more: str) -> None:
        """Raises UsageError if there are fewer groups of batches than ranks; `more` is what would help."""
        if self.groups < self.ranks.size:
            what = "batches" if self.group == 1 else "groups of batches that experts process at once"
            raise UsageError(
                f"{self.windows} windows are {self.groups} {what}, too few for {self.ranks.size} ranks; start fewer "
                f"ranks, or give {more}"
            )

    @property
    def groups(self) -> int:
        """The number of groups of all ranks."""
        return -(-self.batches // self.group)

    def present(self, number: int) -> int:
        """How many ranks have a group in the round of batch `number`."""
        size = self.ranks.size
        return min(size, self.groups - number // self.group // size * size)

    @property
    def last_round(self) -> int:
        """How many ranks have a group in the last round; of those, each may own a sum."""
        return self.present(self.batches - 1)


def parts_of(begin: int, end: int, least: int) -> list[slice]:
    """Cuts `begin` to `end` into parts, of at least `least` unless it is shorter: the same for any number of ranks."""
    size = end - begin
    step = max(1, -(-size // max(1, min(PARTS, size // least))))
    return [slice(at, min(at + step, end)) for at in range(begin, end, step)]


def share_(parts: Sequence[Tensor], make: Callable[[int], Tensor], ranks: Ranks) -> None:
    """Fills each of `parts` (any strides) with what `make` returns for its index, on all ranks.

    The ranks take turns, in alternating order, so that each has as much to do where parts grow or shrink. Parts are
    replaced in the order of their indices while later ones are made: `make` may read parts with a higher index as they
    were before, but none with a lower one.
    """
    sent: deque[tuple[Tensor, Tensor, Callable[[], None]]] = deque()
    size = ranks.size

    def arrive() -> None:
        part, made, wait = sent.popleft()
        wait()
        part.copy_(made)

    for i, part in enumerate(parts):
        turn, at = divmod(i, size)
        owner = size - 1 - at if turn % 2 else at
        made = make(i).contiguous() if owner == ranks.rank else part.new_empty(part.shape)
        sent.append((part, made, ranks.broadcasting_(made, owner)))
        while len(sent) > (2 * size if size > 1 else 0):
            arrive()
    while sent:
        arrive()
