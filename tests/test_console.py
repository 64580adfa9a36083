"""Output to streams that are closed, full or gone, and characters that an encoding lacks."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamprune import cli
from streamprune.cli import main
from streamprune.process import console
from streamprune.process.output import print_json

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNE = f"{sys.executable} -m streamprune prune"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command of a shell that tells how each part of a pipe ended."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, check=False, env={**os.environ, **environment}
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "where",
    ["2>&-", pytest.param("2>/dev/full", marks=SLOW), pytest.param("2>&1 >&- | head -n 1", marks=SLOW),
     "2>&1 | head -n 1"],
)  # fmt: skip
def test_progress_that_cannot_be_shown(models: Models, text: Path, tmp_path: Path, where: str) -> None:
    if "full" in where and not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    out = tmp_path / "out"
    done = shell(f"{PRUNE} {models()} {out} --pattern 2:4 --calib {text} --samples 2 --seqlen 8 {where}")
    assert done.returncode == 0 and (out / "streamprune.json").is_file()
    if "|" not in where:
        assert done.stdout.startswith(str(out).encode() + b": done (")
        assert len(done.stdout.splitlines()) == 1 and done.stderr == b""


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full", "2>&1 | true"])
def test_errors_still_set_the_exit_code(tmp_path: Path, where: str) -> None:
    done = shell(f"{PRUNE} {tmp_path} {tmp_path / 'out'} --pattern 2:4 {where}")
    assert (done.returncode, done.stdout) == (3, b"")


def test_json_stands_alone_when_stderr_is_closed(models: Models, text: Path, tmp_path: Path) -> None:
    """Python prints to stdout what is meant for a stderr that is not there."""
    done = shell(f"{PRUNE} {models()} {tmp_path / 'out'} --sparsity 0.5 --json --samples 2 --seqlen 8 "
                 f"--calib {text} 2>&-")  # fmt: skip
    assert json.loads(done.stdout)["status"] == "done"


@pytest.mark.parametrize("broken", ["none", "full", "closed"])
def test_print_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"none": None, "full": Full(), "closed": closed}[broken])
    console.print_stderr("nobody hears it")
    assert main(["plan", "/no/such/model"]) == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("latin-1", marks=pytest.mark.slow)])
def test_letters_that_an_encoding_lacks(models: Models, text: Path, tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "modèle…"
    folder.symlink_to(models())
    out = folder.with_name("sortie é")
    command = (
        f"{sys.executable} -m streamprune plan '{folder}' --samples 2 --seqlen 8 && "
        f"{PRUNE} --help && {PRUNE} '{folder}' '{out}' --pattern 2:4 --calib {text} --samples 2 --seqlen 8 && "
        f"{PRUNE} '{folder}' '{out}' --pattern 2:4 --calib {text} --samples 2 --seqlen 8 --json"
    )
    done = shell(command, PYTHONIOENCODING=encoding, LC_ALL="C.UTF-8")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    assert "layer 0 ... 2" in shown and "0 <= S < 1" in shown
    assert ("mod\\xe8le..." if encoding == "ascii" else "modèle...") in shown
    assert json.loads(shown[shown.rindex("{\n") :])["out"] == str(out)


def test_json_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a path may hold: letters, and bytes that are no text."""
    value: dict[str, Any] = {"out": "sortie é…", "bytes": os.fsdecode(b"\xff")}
    for encoding in ("ascii", "latin-1", "utf-8"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        print_json(value)
        assert json.loads(raw.getvalue().decode(encoding)) == value


CODE = """
print("hello from the checkpoint's code")
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        print("made")
        super().__init__(config)
"""


@pytest.mark.parametrize("verb", ["prune", "calibrate", "eval", "plan"])
def test_code_that_prints(
    models: Models, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:  # fmt: skip
    """stdout is for the result."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = Path(shutil.copytree(models(), tmp_path / f"model_{verb}"))
    (source / "own.py").write_text(CODE)
    config = json.loads((source / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own_llama", "auto_map": classes}
    (source / "config.json").write_text(json.dumps(config))
    window = ["--samples", "2", "--seqlen", "8"]
    args = {
        "prune": [tmp_path / "out", "--pattern", "2:4", "--calib", text, *window],
        "calibrate": [tmp_path / "out", "--calib", text, *window],
        "eval": ["--text", text, "--seqlen", "32", "--work", tmp_path],
        "plan": window,
    }[verb]
    assert main([verb, str(source), *map(str, args), "--json", "--trust-remote-code"]) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict)
    assert "hello from the checkpoint's code" in err and "made" in err


@pytest.mark.parametrize(
    ("how", "named"),
    [("PYTHONOPTIMIZE=2", "PYTHONOPTIMIZE"), ("NUMBA_DISABLE_JIT=1", "NUMBA_DISABLE_JIT"), ("", "working directory")],
)
def test_environments_that_libraries_fail_in(models: Models, tmp_path: Path, how: str, named: str) -> None:
    (tmp_path / "gone").mkdir()
    elsewhere = "" if how else f"cd {tmp_path}/gone && rmdir ../gone && "
    path = Path(cli.__file__).parents[1]
    done = shell(f"{elsewhere}{how} {PRUNE} {models()} {tmp_path}/out --pattern 2:4", PYTHONPATH=str(path))
    assert done.returncode == 2 and named in done.stderr.decode() and len(done.stderr.splitlines()) == 1
