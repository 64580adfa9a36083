"""`prune --dry-run`: what the job itself would say at its start, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streamprune.cli import main
from streamprune.disk.lock import Lock
from streamprune.disk.state import lock_of, partial_of
from streamprune.errors import StateError

Models = Callable[..., Path]
Told = tuple[int, str, str]

pytestmark = pytest.mark.usefixtures("one_thread")


class Place:
    """A folder to write into, and the command that does."""

    def __init__(self, root: Path, model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.model, self.out, self._capsys = root, model, root / "work" / "out", capsys
        self.args = ["--sparsity", "0.5", "--calib", str(text), "--samples", "2", "--seqlen", "8"]
        (root / "work").mkdir()

    def run(self, *more: str) -> Told:
        self._capsys.readouterr()
        code = main(["prune", str(self.model), str(self.out), *self.args, *more])
        return code, *self._capsys.readouterr()

    def dry(self, *more: str) -> Told:
        """Run dry, which changes nothing."""
        before = self.seen()
        found = self.run("--dry-run", *more)
        assert self.seen() == before
        return found

    def status(self, *more: str) -> str:
        code, out, _ = self.dry("--json", "--quiet", *more)
        found = json.loads(out)
        assert code == 0 and list(found) == ["status", "out", "plan"] and found["out"] == str(self.out)
        assert (found["plan"] is not None) == (found["status"] in ("would begin", "would resume"))
        return str(found["status"])

    def seen(self) -> dict[str, tuple[int, int]]:
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in (self.root / "work").rglob("*")}

    def interrupt(self, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("streamprune.progress._Lines.__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            assert self.run(*more)[0] == 130


@pytest.fixture
def place(tmp_path: Path, models: Models, text: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, models(), text, capsys)


def test_it_says_what_plan_says(place: Place) -> None:
    place.out = place.root / "work" / "not" / "yet" / "out"
    code, out, err = place.dry()
    assert (code, err) == (0, "")
    assert "stage (each)" in out and "peak RAM" in out
    assert out.endswith(f"{place.out}: would begin (a dry run: nothing was written)\n")
    assert place.dry("--quiet") == (0, "", "")


def test_every_status(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.status() == "would begin"
    place.interrupt(monkeypatch)
    assert place.status() == "would resume"
    assert place.dry()[2].endswith("of 5 stages are done\n")
    assert place.status("--restart") == "would begin"
    assert place.run()[0] == 0
    assert place.status() == "up-to-date"
    place.out.rename(partial_of(place.out))
    assert place.status() == "would finish"
    assert place.run()[0] == 0 and place.status() == "up-to-date"


def test_a_finished_output_on_a_disk_that_is_read_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found, although no lock can be taken beside it."""
    assert place.run()[0] == 0
    access, taken = os.access, Lock.__enter__

    def enter(lock: Lock) -> Lock:
        if lock.path.parent == place.out.parent:
            raise StateError(f"cannot write {lock.path}")
        return taken(lock)

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place.out.parent and access(path, mode))
    monkeypatch.setattr(Lock, "__enter__", enter)
    assert place.status() == "up-to-date"
    code, out, _ = place.run()
    assert code == 0 and out.startswith(f"{place.out}: up-to-date (")
    place.args[1] = "0.25"
    assert place.run()[0] == 6
    place.out = place.out.with_name("other")
    assert place.run()[0] == place.dry()[0] == 6


def test_work_that_never_began_is_left_alone(place: Place) -> None:
    (partial_of(place.out) / ".streamprune" / "cache").mkdir(parents=True)
    assert place.status() == "would begin"


def test_a_sparsity_that_is_shared_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are gathered by a job of their own, which comes first."""
    more = ("--allocate", "owl")
    assert place.status(*more) == "would begin"
    place.interrupt(monkeypatch, *more)
    assert place.status(*more) == "would resume"
    assert place.run(*more)[0] == 0
    assert place.status(*more) == "up-to-date"


def zeros(place: Place, _: pytest.MonkeyPatch) -> None:
    source = place.root / "zeros"
    shutil.copytree(place.model, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros_like(tensors["model.layers.1.mlp.up_proj.weight"])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    place.model = source


def in_the_way(place: Place, _: pytest.MonkeyPatch) -> None:
    place.out.mkdir()
    (place.out / "something").write_text("else")


def no_folder(place: Place, _: pytest.MonkeyPatch) -> None:
    (place.root / "work" / "file").write_text("no folder")
    place.out = place.root / "work" / "file" / "out"


def another_job(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.interrupt(monkeypatch)
    place.args[1] = "0.25"


def damaged(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.interrupt(monkeypatch)
    with (partial_of(place.out) / "model.safetensors").open("r+b") as file:
        file.write(b"damage")


def full(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 20))


def memory(place: Place, _: pytest.MonkeyPatch) -> None:
    place.args += ["--max-ram", "10MiB"]


@pytest.mark.parametrize(
    ("prepare", "code"),
    [(zeros, 3), (in_the_way, 6), (no_folder, 6), (another_job, 6), (damaged, 7), (full, 5), (memory, 5)],
)
def test_refusals_are_those_of_the_job(
    place: Place, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Place, pytest.MonkeyPatch], None], code: int
) -> None:
    prepare(place, monkeypatch)
    dry, real = place.dry(), place.run()
    assert dry[:2] == (code, "") and len(dry[2].splitlines()) == 1
    assert (real[0], real[2].splitlines()[-1:]) == (code, dry[2].splitlines())


def test_another_run_holds_the_lock(place: Place) -> None:
    with Lock(lock_of(place.out)):
        code, _, err = place.dry()
    assert code == 75 and f"another run (process {os.getpid()})" in err
    assert place.status() == "would begin"
