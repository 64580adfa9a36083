"""tools/gpu_check.py without a GPU: its sections in miniature on the CPU, and what a run that is cut off leaves."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("gpu_check")


@pytest.fixture(scope="module")
def sections(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("gpu_sections")


def section(tool: ModuleType, code: str, share: float = 1.0) -> Any:
    return tool.Section("Title", share, ("-c", code), by_device=False)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return found


# ---- what it comes to


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--out", str(tmp_path / "out")]) == 5
    assert capsys.readouterr().err == "gpu_check: error: no GPU that torch can use (cuda); nothing was measured\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--only", "kernels,colours"], "--only colours: there are environment, tests"),
        (["--wheels", "{}"], "no wheels there"),
        (["--fast"], "unrecognized arguments: --fast; see"),
    ],
)
def test_bad_arguments(
    tool: ModuleType, tmp_path: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([word.format(tmp_path) for word in given]) == 2
    assert message in capsys.readouterr().err


def test_wheels_come_before_what_is_installed(tool: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "tqdm-99-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tqdm/__init__.py", "__version__ = '99'")
    environment = tool.environment_with(tmp_path, tmp_path / "there")
    asked = [sys.executable, "-c", "import tqdm, streamprune; print(tqdm.__version__, streamprune.__file__)"]
    said = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.split() == ["99", str(TOOLS.parent / "streamprune/__init__.py")]
    (tmp_path / "torn.whl").write_bytes(b"PK")
    with pytest.raises(tool.CheckError, match=r"torn\.whl cannot be unpacked"):
        tool.environment_with(tmp_path, tmp_path / "there")


def test_a_package_that_is_too_old_is_named(tool: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "transformers-4.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("transformers-4.0.dist-info/METADATA", "Name: transformers\nVersion: 4.0\n")
    with pytest.raises(tool.CheckError, match=r"transformers 4\.0 is older than 5\.[0-9]+; see --wheels"):
        tool.require_device("cpu", tool.environment_with(tmp_path, tmp_path / "there"))


def test_results_are_there_after_each_section(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes too long is ended, with what it had found; the next has its share; one that fails is kept."""
    tests = """print('{"ms": 3}'), print('test PASSED [ 9%]'), print('test FAILED [10%]'); raise SystemExit(7)"""
    monkeypatch.setattr(tool, "SECTIONS", {
        "first": section(tool, "print('{\"ms\": 1.5}'); print('some words')"),
        "slow": section(tool, "print('{\"ms\": 2}', flush=True); import time; time.sleep(60)"),
        "third": section(tool, tests, 3.0),
    })  # fmt: skip
    monkeypatch.setattr(tool, "require_device", lambda *_: None)
    begun = time.monotonic()
    assert tool.main(["--minutes", "0.1", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - begun < 30
    found = read(tmp_path)
    assert [f["status"] for f in found.values()] == ["done", "cut off", "failed with 7"]
    assert [f["rows"] for f in found.values()] == [[{"ms": 1.5}], [{"ms": 2}], [{"ms": 3}]]
    assert found["third"]["passed"] == 1 and found["third"]["text"] == ["test FAILED [10%]"]
    page = (tmp_path / "gpu_check.md").read_text()
    assert "| ms |\n| --- |\n| 1.5 |" in page and "some words" in page and "slow: cut off" in page


def test_a_run_that_is_killed_leaves_what_was_done(tool: ModuleType, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(TOOLS)!r})
import gpu_check as tool
run = lambda code: tool.Section("Title", 1.0, ("-c", code), by_device=False)
tool.SECTIONS = {{"first": run("print('[1]')"), "second": run("import time; time.sleep(20)")}}
tool.require_device = lambda *_: None
tool.main(["--minutes", "5", "--out", {str(tmp_path)!r}])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        while "second" not in process.stdout.readline():
            pass
        process.kill()
    found = read(tmp_path)
    assert [f["status"] for f in found.values()] == ["done", "not reached"]
    assert found["first"]["text"] == ["[1]"]


def test_commands_are_those_of_other_tools(tool: ModuleType, load_tool: Callable[[str], ModuleType]) -> None:
    """Each is understood by what it calls: full and small."""
    bench, sections = load_tool("bench"), load_tool("gpu_sections")
    for small in ([], ["--small"]):
        arguments = tool.parse(["--device", "cpu", *small])
        for name in tool.SECTIONS:
            _, script, *words = tool.command_of(name, arguments)
            if script == "tools/bench.py":
                assert bench.make_parser(words[0]).parse_args(words).json
            elif script == "tools/gpu_sections.py":
                assert words[0] in sections.SECTIONS and ("--small" in words) == bool(small)
            else:
                assert (TOOLS.parent / "tests/test_on_a_gpu.py").exists() and "tests/test_on_a_gpu.py" in words


def test_tests_of_sections_are_found(tool: ModuleType) -> None:
    """Every test is in one of the two, and only what is for a card. Both are asked at once: collecting takes time."""
    commands = [tool.command_of(name, tool.parse([])) for name in ("tests", "processes")]
    *start, first = commands[0]
    both = f"({first}) or ({commands[1][-1]})"
    assert start == commands[1][:-1] and start[-1] == "-k" and "not (killed or" in first
    said = subprocess.run(
        [*start, both, "--collect-only", "-q"], capture_output=True, text=True, check=True, cwd=TOOLS.parent
    ).stdout
    found = [line for line in said.splitlines() if "::" in line]
    assert len(found) > 100 and not [name for name in found if "stand-in" in name or "cpu" in name]
    functions = {name.split("::")[1].split("[")[0] for name in found}
    assert functions == set(re.findall(r"^def (test_\w+)", (TOOLS.parent / "tests/test_on_a_gpu.py").read_text(), re.M))


# ---- sections in miniature


@pytest.fixture
def here(sections: ModuleType, load_tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """What sections start as processes happens in this one."""
    from bench_rig import Ran

    from streamprune.cli import main

    def said(work: Callable[[], object]) -> Ran:
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            code = work()
        return Ran(int(code or 0), 1.0, 1 << 20, out.getvalue(), errors.getvalue())

    def with_arguments(work: Callable[[], object], *words: str) -> Ran:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["it", *words])
            return said(work)

    child = load_tool("bench_child")
    monkeypatch.setattr(sections, "streamprune", lambda *words: said(lambda: main([*words, "--json", "--quiet"])))
    monkeypatch.setattr(
        sections, "child", lambda verb, **given: with_arguments(child.main, verb, json.dumps(given)).result
    )
    monkeypatch.setattr(sections, "run", lambda _, code, *words: with_arguments(lambda: exec(code, {}), *words))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["environment", "end-to-end", "large", "refits", "tuning", "fp8", "two-four"])
def test_sections(sections: ModuleType, name: str) -> None:
    rows = [json.loads(json.dumps(row)) for row in sections.SECTIONS[name](CPU, True)]
    if name == "environment":
        assert rows[0]["torch"] == torch.__version__ and rows[1]["value"] > 0
    elif name in ("end-to-end", "large"):
        names = [row["what"] for row in rows]
        assert {"prune, s", "prune ÷ floor", "plan said, s"} <= set(names) and sum("floor:" in n for n in names) == 4
    elif name == "refits":
        assert [row["refit"] for row in rows] == ["obs-admm", "obs-admm", "sparsegpt", "gradual-cg"]
    elif name == "tuning":
        assert all(row["s"] > 0 and row["after"] <= row["held-out error before"] for row in rows) and len(rows) == 2
    elif name == "fp8":
        ours, theirs = (row["value"] for row in rows if row["what"].startswith("nll"))
        assert theirs == pytest.approx(ours, rel=1e-2)
    else:
        assert [row.get("tokens") for row in rows] == [1, 16, None] and "not possible here" in rows[2]
