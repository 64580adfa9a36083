"""Is there room on the disk: what goes to one file system is added up, and the message says what mends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamprune.disk.room import check_room
from streamprune.errors import ResourceError
from streamprune.process.ranks import Ranks
from streamprune.pruning import sharing
from streamprune.pruning.describe import describe_prune, open_model
from streamprune.pruning.prepare import prepare
from streamprune.settings import Calibration, Resources

FREE = 100 << 20


@pytest.fixture(autouse=True)
def free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=FREE))


def test_as_much_as_is_free_fits(tmp_path: Path) -> None:
    check_room([(tmp_path, FREE)], "")
    with pytest.raises(ResourceError):
        check_room([(tmp_path, FREE + 1)], "")


def test_one_file_system_is_counted_once(tmp_path: Path) -> None:
    check_room([(tmp_path / "a", FREE // 2), (tmp_path / "b", FREE // 2)], "")
    with pytest.raises(ResourceError):
        check_room([(tmp_path / "a", FREE // 2), (tmp_path / "b", FREE // 2 + 1)], "")


def test_what_the_message_says(tmp_path: Path) -> None:
    """It names the nearest folder that exists, and leaves nothing behind."""
    with pytest.raises(ResourceError) as found:
        check_room([(tmp_path / "no" / "such", 2 * FREE)], "buy a disk", detail=" for weights")
    assert str(found.value) == f"{tmp_path} has 100 MiB free, this job needs 200 MiB for weights; buy a disk"
    assert not list(tmp_path.iterdir())


def test_ranks_keep_a_layers_new_weights_aside(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they share a refit, until rank 0 writes them; with asymmetric calibration a single process does so, too."""
    asked: list[int] = []
    monkeypatch.setattr(sharing, "check_room", lambda places, *_, **__: asked.append(places[1][1]))
    one, two = Ranks(), Ranks()
    two.size = 2
    checkpoint, calibration = open_model(models()), Calibration(text=text, samples=2, seqlen=16)
    for propagate in ("dense", "asymmetric"):
        spec = describe_prune(
            checkpoint, tmp_path / "out", 0.5, "obs-admm", calibration=calibration, resources=Resources(device="cpu"),
            stats=None, save_stats=None, propagate=propagate, only=None, skip=None,
        )  # fmt: skip
        job = prepare(spec, checkpoint, None)
        forward: Any = SimpleNamespace(cache_bytes=1000, share=SimpleNamespace(own_windows=2), windows=job.windows)
        for ranks in (one, two):
            sharing.check_disk(replace(job, ranks=ranks), job.setup.target, forward, -1, 0)
    largest = max(sum(ref.nbytes for ref in stage.linears.values()) for stage in job.setup.skeleton.layer_stages)
    assert asked[1] - asked[0] == largest > 0 and asked[3] == asked[2]
