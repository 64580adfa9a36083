"""What the documents say can be done: command lines that parse, links that lead somewhere, Python that runs."""

from __future__ import annotations

import gzip
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import streamprune
from streamprune.cli import build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("streamprune/*/README.md"),
                    *ROOT.glob("tools/README.md")])  # fmt: skip


def of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str = "") -> list[str]:
    """What stands between fences."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Words of each command line of ours, those that go on in another line joined."""
    found = []
    for block in blocks(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = line.removeprefix("$ ").split("#")[0]
            if words.startswith("python -m streamprune "):
                found.append(shlex.split(words)[3:])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=of)
def test_commands_parse(path: Path) -> None:
    for words in commands(path.read_text()):
        build_parser().parse_args(words)


def test_there_are_commands() -> None:
    assert sum(len(commands(path.read_text())) for path in DOCUMENTS) >= 6
    with pytest.raises(SystemExit):
        build_parser().parse_args(["prune", "a", "b", "--no-such-option"])


def test_command_lines_of_earlier_readmes_parse() -> None:
    """tests/data/command_lines.txt has the commands of the READMEs of earlier versions; lines are only ever added."""
    lines = (ROOT / "tests" / "data" / "command_lines.txt").read_text().splitlines()
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "streamprune"], line
        build_parser().parse_args(words[3:])  # exits with 2 if a command or a flag is gone


@pytest.mark.parametrize("path", DOCUMENTS, ids=of)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = target.partition("#")
        if not place:
            assert heading in headings, target
        elif not re.match(r"[a-z]+:", place):
            assert (path.parent / place).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    """On the embedded model and texts, and fewer windows."""
    package = Path(streamprune.__file__).parent
    (tmp_path / "tiny-llama").symlink_to(package / "demo_model")
    for name, text in (("c4.txt", "calibration.txt.gz"), ("wikitext2-test.txt", "heldout.txt.gz")):
        content = gzip.decompress((package / "text" / text).read_bytes())
        (tmp_path / name).write_bytes(content[: content.index(b"\n", 20_000)])
    [code] = blocks((ROOT / "README.md").read_text(), "python")
    code = code.replace("samples=64, seqlen=512", "samples=4, seqlen=64").replace("seqlen=512", "seqlen=64")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sparsity, perplexity, divergence = map(float, done.stdout.split())
    assert sparsity == 0.5 and perplexity > 1 and divergence > 0
