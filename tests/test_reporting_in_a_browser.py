"""The page of `report` in a real browser, light and dark, on a phone: colours, widths, and that no label is cut off."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_reporting import linear, made

from streamprune.reporting.page import report

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")

_MEASURE = """<script>addEventListener("load", () => {
  const cut = [], over = [], box = e => e.getBoundingClientRect();
  for (const svg of document.querySelectorAll("svg")) for (const label of svg.querySelectorAll("text")) {
    const inner = box(label), outer = box(svg);
    for (const next of svg.querySelectorAll("text")) {
      const other = box(next), width = Math.min(inner.right, other.right) - Math.max(inner.left, other.left);
      const height = Math.min(inner.bottom, other.bottom) - Math.max(inner.top, other.top);
      if (next !== label && width > 3 && height > 5) over.push(`${label.textContent} and ${next.textContent}`);
    }
    if (inner.left < outer.left - 2 || inner.right > outer.right + 2 || inner.top < outer.top - 2 ||
        inner.bottom > outer.bottom + 2) cut.push(label.textContent);
  }
  const small = [...document.querySelectorAll("svg text")].map(label => box(label).height);
  const style = getComputedStyle(document.body);
  document.title = JSON.stringify({ cut, over, wide: document.documentElement.scrollWidth, window: innerWidth,
    drawn: document.querySelectorAll("svg").length, small: Math.min(...small), paper: style.backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill });
})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model of 40 layers, with names of kinds as long as they get, and of a second one."""
    folder = tmp_path_factory.mktemp("pages")
    content = made(40, 4)
    content["linears"][0] |= {"error": 0.0035, "removed_score": 0.0125}
    content["linears"] += [linear(f"model.layers.{i}.mlp.shared_experts.gate_up_proj", 0.01, damping=None)
                           for i in range(40)]  # fmt: skip
    few = made(6, 1)
    for name, given in (("a-model-with-a-name-that-is-rather-long-2of4", content), ("short", few)):
        (folder / name).mkdir()
        (folder / name / "streamprune.json").write_text(json.dumps(given))
    report([folder / "a-model-with-a-name-that-is-rather-long-2of4", folder / "short"], folder / "page.html")
    return folder / "page.html"


def look(page: Path, profile: Path, width: int, dark: bool) -> dict[str, Any]:
    """What the browser makes of a page, which is given a script that measures it."""
    shown = profile / "measured.html"
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    shown.write_text(text.replace("</head>", f"{_MEASURE}</head>"))
    settings = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    done = subprocess.run(
        [str(BROWSER), *settings, scheme, f"--user-data-dir={profile}/profile", f"--window-size={width},900",
         shown.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stdout[:500]
    return dict(json.loads(html.unescape(found[1])))


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_in_a_browser(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    found = look(page, tmp_path, width, dark)
    assert found["drawn"] > 15
    assert found["wide"] <= found["window"], "the page itself does not scroll sideways"
    assert found["cut"] == [] and found["over"] == []
    assert found["small"] > 9, "the smallest label, in CSS pixels"
    paper, ink = (sum(map(int, re.findall(r"\d+", found[k])[:3])) / 3 for k in ("paper", "ink"))
    assert (paper < 60 and ink > 180) if dark else (paper > 230 and ink < 60)
