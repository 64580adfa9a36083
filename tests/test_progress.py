"""Progress: how long it still takes, and a bar on a terminal and in a notebook."""

from __future__ import annotations

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from streamprune.progress import Progress, TimeLeft, format_duration, show_progress


def after(left: TimeLeft, *seconds: float, total: int = 10) -> list[float | None]:
    return [left.after(Progress(f"layer {i}", i, total, taken)) for i, taken in enumerate(seconds, 1)]


def test_time_left() -> None:
    left = TimeLeft()
    assert after(left, 100.0, 50.0, 2.0, 2.0, 4.0) == [None, None, 2.0 * 7, 2.0 * 6, 2.0 * 5]
    assert after(left, 100.0, 1.0, 1.0) == [None, None, 7.0], "another series begins anew"
    assert after(left, 1.0, 1.0, 3.0, total=3) == [None, None, 0.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (12, "12 s"), (600, "10 min"), (11100, "3 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_say_how_long_it_still_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("prune") as progress:
        progress.say("hello")
        for done, seconds in enumerate((1.0, 30.0, 30.0), 1):
            progress(Progress("layer", done, 5, seconds))
        progress(Progress("head", 5, 5, 1.0))
    assert capsys.readouterr().err.splitlines() == [
        "prune: hello", "prune: 1/5 layer 1.0 s", "prune: 2/5 layer 30.0 s", "prune: 3/5 layer 30.0 s, about 60 s left",
        "prune: 5/5 head 1.0 s",
    ]  # fmt: skip


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("prune", quiet=True) as progress:
        progress.say("hello")
        progress(Progress("layer", 1, 5, 1.0))
    assert capsys.readouterr() == ("", "")


def test_a_line_does_not_tear_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, a line takes the bar's place, which comes again below."""
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    with show_progress("prune") as progress:
        progress(Progress("layer 0", 1, 5, 1.0))
        progress.say("hello")
        progress(Progress("layer 1", 2, 5, 1.0))
    before, after_it = screen.getvalue().split("prune: hello\n")
    assert before.endswith("\r") and "prune:" in after_it and "layer 1" not in before


NOTEBOOK = """
import sys, types, warnings
warnings.simplefilter("error")
kernel = types.SimpleNamespace(config={"IPKernelApp": {}})
ipython = sys.modules["IPython"] = types.ModuleType("IPython")
ipython.get_ipython = lambda: kernel
sys.modules["ipywidgets"] = None
from streamprune.progress import Progress, show_progress
with show_progress("prune") as progress:
    progress.say("hello")
    progress(Progress("layer 0", 3, 5, 1.0))
print(type(progress).__name__)
"""


def test_a_bar_in_a_notebook() -> None:
    """Made of text where ipywidgets is missing, and without a warning."""
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "_Bar\n"), done.stderr
    assert "prune: hello" in done.stderr and "3/5" in done.stderr
    assert "IProgress" not in done.stderr and "Warning" not in done.stderr


def test_a_shell_of_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={}))
    monkeypatch.setitem(sys.modules, "IPython", shell)  # type: ignore[arg-type]
    with show_progress("prune") as progress:
        progress.say("hello")
    assert capsys.readouterr().err == "prune: hello\n"
