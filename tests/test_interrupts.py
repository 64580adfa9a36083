"""Ctrl-C and SIGTERM at any moment: exit code 130 and one line, and nothing that a library swallows is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streamprune.cli import main
from streamprune.process import interrupts
from streamprune.pruning import run as run_module

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")

PROGRAM = Path(__file__).with_name("interrupted.py")


@pytest.mark.parametrize(
    ("step", "most", "number"),
    [(0.1, 24, signal.SIGINT), pytest.param(0.012, 200, signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_start_up_is_interruptible_at_every_moment(
    models: Models, text: Path, tmp_path: Path, step: float, most: int, number: int
) -> None:
    """At many moments of a start-up, with all its imports, a copy of the process is sent a signal (interrupted.py)."""
    seen = tmp_path / "seen"
    seen.mkdir()
    args = ["prune", models(), tmp_path / "out", "--pattern", "2:4", "--calib", text, "--samples", "2", "--seqlen", "8"]
    subprocess.run(
        [sys.executable, "-W", "ignore", PROGRAM, seen, str(step), str(most), str(int(number)), *args],
        check=True, capture_output=True,
    )  # fmt: skip
    told = {
        "streamprune: error: interrupted\n",
        "streamprune: error: interrupted; run the same command again to resume\n",
    }
    found = sorted(seen.glob("*.json"))
    assert len(found) > 8
    for path in found:
        ended = json.loads(path.read_text())
        printed = (path.with_suffix(".out").read_text(), path.with_suffix(".err").read_text())
        assert ended["status"] == 130 << 8, (ended, printed)
        assert printed[0] == "" and printed[1] in told, (ended, printed)
    assert not (tmp_path / "out").exists() or len(found) < most


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_swallowed_is_heard_all_the_same(
    models: Models, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:  # fmt: skip
    """In a __del__, as of some library's object, an exception goes nowhere; the job ends at its next step."""

    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    steps: list[str] = []

    def line(text: str) -> None:
        if re.match(r"prune: \d+/", text):
            steps.append(text)

    def begin(*args: object) -> None:
        Swallows()

    monkeypatch.setattr("streamprune.progress.print_stderr", line)
    monkeypatch.setattr(run_module, "remove_leftovers", begin)
    code = main(["prune", str(models()), str(tmp_path / "out"), "--pattern", "2:4", "--calib", str(text),
                 "--samples", "2", "--seqlen", "8"])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 130
    assert printed.err == "streamprune: error: interrupted; run the same command again to resume\n"
    assert not steps and not (tmp_path / "out").exists()


def test_an_error_that_an_interrupt_became_is_an_interrupt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    def plan(*args: object, **more: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("a callback has failed") from None

    monkeypatch.setattr("streamprune.planning.plan.plan", plan)
    assert main(["plan", str(models())]) == 130
    assert capsys.readouterr().err == "streamprune: error: interrupted\n"


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook, sys.excepthook
    with interrupts.listening(program=False):
        assert signal.getsignal(signal.SIGINT) is not before[0][0]
    assert (
        [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        sys.unraisablehook,
        sys.excepthook,
    ) == before


def test_what_is_ignored_stays_ignored() -> None:
    """As behind nohup, or in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.listening(program=False):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
