"""Shell completion: a script for each shell, and one line where shtab is missing."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streamprune.cli import build_parser, main
from streamprune.process.completion import SHELLS, name_paths


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab", reason="shtab is not installed")
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_it(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = script(shell, capsys)
    for word in ("prune", "calibrate", "unpack", "--sparsity", "--expect", "swiftprune" if shell == "zsh" else "--by-"):
        assert word in found


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands, options and their choices; folders only where MODEL stands."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    (tmp_path / "completion").write_text(script("bash", capsys))
    (tmp_path / "model").mkdir()
    lines = {"pru": "prune", "prune --patt": "--pattern", "prune --propagate asy": "asymmetric", "prune mod": "model"}
    ask = "source completion\n" + "".join(
        f"COMP_WORDS=(streamprune {typed}); COMP_CWORD={len(typed.split())}; COMPREPLY=(); _shtab_streamprune; "
        'echo "${COMPREPLY[@]}"\n'
        for typed in lines
    )
    done = subprocess.run([bash, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.strip() for line in done.stdout.splitlines()] == list(lines.values())


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr() == (
        "",
        "streamprune: error: --print-completion needs shtab, which is not installed: "
        "pip install 'streamprune[completion]'\n",
    )


def test_files_and_folders_are_told_apart() -> None:
    parser = build_parser()
    name_paths(parser, "file", "folder")
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    of = {
        (name, action.dest): action.complete
        for name, command in commands.items()
        for action in command._actions
        if hasattr(action, "complete")
    }
    assert {of["prune", name] for name in ("model", "out", "work")} == {"folder"}
    assert {of["prune", "text"], of["prune", "stats"], of["calibrate", "out"], of["report", "output"]} == {"file"}
    assert of["eval", "reference"] == of["inspect", "against"] == "folder" and ("prune", "pattern") not in of
