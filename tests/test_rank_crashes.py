"""Of two ranks, each is killed before every operation that changes the disk; one or two ranks then go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import GIVEN, Job, Run, digest, do

Models = Callable[..., Path]

SHARDS = {"pattern": "2:4", "shard_size": 40_000}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(models: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[Path], Job]]:
    """From a folder to a job in it: one with a forward pass, and one that takes turns with shards."""
    model, given = models("llama", 2), GIVEN | {"calib": str(text), "samples": 8}
    root = tmp_path_factory.mktemp("given")
    do(root, [Run("one", 1, [Job("calibrate", model, root / "statistics", given=given)])])
    passed = {"propagate": "pruned", "tune": "block", "tune_epochs": 1}
    return {
        "pass": lambda folder: Job(
            "prune", model, folder / "out", given=given | SHARDS | passed | {"save_stats": str(folder / "kept")}
        ),
        "dealt": lambda folder: Job(
            "prune", model, folder / "out", given=SHARDS | {"device": "cpu", "stats": str(root / "statistics")}
        ),
    }


@pytest.mark.parametrize("name", ["pass", "dealt"])
def test_every_operation_of_each_rank(jobs: dict[str, Callable[[Path], Job]], tmp_path: Path, name: str) -> None:
    """The output is that of a job that was left alone, nothing else is left, and nothing was there half."""

    def job(folder: Path) -> Job:
        folder.mkdir(exist_ok=True)
        return jobs[name](folder)

    do(tmp_path, [Run("one", 1, [job(tmp_path / "one")]), Run("count", 2, [job(tmp_path / "two")], dies={})])
    moments = [(rank, at) for rank in range(2) for at in range(_operations(tmp_path, rank))]
    assert len({rank for rank, _ in moments}) == 2 and len(moments) > 60

    def killed(rank: int, at: int) -> list[Run]:
        folder, size = tmp_path / f"{rank}-{at}", 1 + at % 2
        return [
            Run(f"{rank}-{at}-dies", 2, [job(folder)], dies={str(rank): at}),
            Run(f"{rank}-{at}-goes-on", size, [job(folder)]),
        ]

    do(tmp_path, list(chain.from_iterable(killed(*moment) for moment in moments)), 3600)
    died = [not (tmp_path / f"{rank}-{at}-dies-{rank}").read_text() for rank, at in moments]
    assert sum(died) > 0.9 * len(died), "all, but for how threads take turns"
    whole, wrong = digest(tmp_path / "one" / "out"), list[Any]()
    kept = sorted(path.name for path in (tmp_path / "one").iterdir())
    for rank, at in moments:
        folder = tmp_path / f"{rank}-{at}"
        seen = json.loads((tmp_path / f"{rank}-{at}-dies-seen").read_text())
        found = digest(folder / "out"), sorted(path.name for path in folder.iterdir())
        if found != (whole, kept) or seen not in ([""], [whole]):
            wrong.append((rank, at, found, seen, (tmp_path / f"{rank}-{at}-goes-on-0").read_text()))
    assert not wrong, f"{len(wrong)} of {len(moments)}: {wrong[:3]}"


def _operations(folder: Path, rank: int) -> int:
    (told,) = (folder / f"count-{rank}").read_text().splitlines()
    found: int = json.loads(told)["operations"]
    return found
