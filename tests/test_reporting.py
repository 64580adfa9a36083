"""The page that `report` makes: what it says, what it refuses, and that it is safe, whole and the same every time."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from calls import prune
from safetensors.torch import load_file

import streamprune
import streamprune.pruning.job as job
from streamprune.arguments import make_parser
from streamprune.cli import main
from streamprune.errors import CheckpointError, CorruptStateError, StateError, UsageError
from streamprune.evaluation.scores import TaskScore
from streamprune.evaluation.tasks import TaskEvaluation
from streamprune.packing.job import pack
from streamprune.pruning.command import command_of
from streamprune.pruning.spec import JobSpec
from streamprune.reporting import page as page_module
from streamprune.reporting.facts import Spread, place_of, plain, read_facts
from streamprune.reporting.figures import labels_of
from streamprune.reporting.page import report
from streamprune.reporting.scales import with_scales

pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = "<script>alert('1')</script>\"&amp;$x_{$ \ud800\0 --> "

Report = dict[str, Any]


def linear(name: str, error: float, **more: Any) -> Report:
    return {"name": name, "rows": 4, "in_features": 8, "pruned": 16, "sparsity": 0.5, "removed_score": 0.1,
            "error_mask": 2 * error, "error": error, "damping": 0.2} | more  # fmt: skip


def made(layers: int = 3, experts: int = 2) -> Report:
    """A report as prune writes it, of a model with experts; those of layer i have errors from (i + 1) / 100 on."""
    linears = []
    for i in range(layers):
        linears += [linear(f"model.layers.{i}.self_attn.{k}_proj", 0.05) for k in "kq"]
        linears += [
            linear(f"model.layers.{i}.mlp.experts.{e}.down_proj", (i + 1) / 100 * (1 + e / experts))
            for e in range(experts)
        ]
    names = ["embed", *(f"layer {i}" for i in range(layers)), "head"]
    return {
        "format": "streamprune-report", "version": 1, "recipe": "obs-admm", "sparsity": 0.5, "seconds": 12.5,
        "startup_seconds": 1.5, "peak_rss_bytes": 700 << 20,
        "job": {"verb": "prune", "score": "lscore", "selector": "exact", "refit": "obs-admm", "sparsity": 0.5,
                "pattern": None, "calib": "1", "samples": 16, "seqlen": 64, "propagate": "auto"},
        "calibration": {"text": "c4.txt", "samples": 16, "seqlen": 64, "propagate": "asymmetric"},
        "linears": linears, "versions": {"python": "3.12.1", "torch": "2.7"},
        "stages": [{"name": n, "seconds": 2.0 + (n == "layer 1"), "peak_rss_bytes": 600 << 20} for n in names],
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(report, name="out") -> a folder with it."""

    def put(content: Report, name: str = "out") -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "streamprune.json").write_text(json.dumps(content))
        return tmp_path / name

    return put


class Reader(HTMLParser):
    """Reads a page: text, tags with their attributes; every element must be closed where it belongs."""

    EMPTY = ("meta", "br", "path", "use", "image")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(tmp_path: Path, *outs: Path, **more: Any) -> Reader:
    report(outs, tmp_path / "page.html", **more)
    return Reader((tmp_path / "page.html").read_text())


# ---- what it says


@pytest.mark.parametrize(("name", "place"), [
    ("model.layers.12.self_attn.q_proj", (12, "self_attn.q_proj")),
    ("model.layers.3.mlp.experts.255.gate_up_proj", (3, "mlp.experts.*.gate_up_proj")),
    ("transformer.h.0.attn.c_attn", (0, "attn.c_attn")),
    ("model.language_model.layers.1.experts.7.w1", (1, "experts.*.w1")),
    ("lm_head", (None, "lm_head")),
])  # fmt: skip
def test_place_of_a_linear(name: str, place: tuple[int | None, str]) -> None:
    assert place_of(name) == place


def test_experts_share_a_cell(write: Callable[..., Path]) -> None:
    facts = read_facts(write(made(experts=4)))
    cell = facts.cells[1, "mlp.experts.*.down_proj"]
    assert (cell.linears, cell.weights, cell.pruned, cell.sparsity) == (4, 128, 64, 0.5)
    assert cell.spreads["error"] == Spread(0.02, pytest.approx(0.0275), pytest.approx(0.035), 4)
    assert facts.kinds == (*(f"self_attn.{k}_proj" for k in "qk"), "mlp.experts.*.down_proj")
    assert facts.layers == (0, 1, 2)


def test_what_a_page_says(write: Callable[..., Path], tmp_path: Path) -> None:
    content = made()
    content["stages"][2] |= {"pooled": ["a", "b"], "tune": {"held_out_error_before": 0.0625, "held_out_error": 0.03125}}
    page = page_of(tmp_path, write(content))
    for words in (
        "obs-admm", "Every linear lost 50.00 % of its weights", "c4.txt: 16 windows of 64 tokens", "python 3.12.1",
        "prune MODEL out --sparsity 0.5 --method obs-admm --replace-tokens 0 --calib c4.txt --samples 16 --seqlen 64",
        "It peaked in stage embed, at 600 MiB; finishing took it to 700 MiB.", "Layer 1 took longest, 3.0 s.",
        "0.0625", "0.0312", "Experts that saw too few tokens", "0.0375 (0.03 – 0.045)", "damping",
    ):  # fmt: skip
        assert words in page.text, words
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(region["tabindex"] == "0" for region in page.all("div") if region.get("role") == "region")


def test_sparsities_that_differ_have_a_map(write: Callable[..., Path], tmp_path: Path) -> None:
    content = made()
    assert "sparsity by layer (rows)" not in page_of(tmp_path, write(content)).text
    content["linears"][0] |= {"sparsity": 0.25, "pruned": 8}
    page = page_of(tmp_path, write(content))
    assert "sparsity by layer (rows)" in page.text and "Least 25.00 % (layer 0, self_attn.k_proj)" in page.text


@pytest.mark.parametrize("more", [{"error_fp8": 0.07}, {"rounding_error": 0.07}])
def test_fp8(write: Callable[..., Path], tmp_path: Path, more: Report) -> None:
    content = made()
    for each in content["linears"]:
        each |= more
    page = page_of(tmp_path, write(content))
    assert "0.07 everywhere." in page.text


def test_several_side_by_side(write: Callable[..., Path], tmp_path: Path) -> None:
    other = made() | {"recipe": "admm"}
    for each in other["linears"]:
        each["error"] *= 2
    first, second = write(made(), "first"), write(other, "second")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps({
        "model": str(first), "text": "wiki.txt", "perplexity": 12.3456, "kl": 0.25, "kl_stderr": 0.01,
        "top1_agreement": 0.75, "reference": "dense", "reference_perplexity": 10.5, "windows": 3, "seqlen": 64,
        "tasks": {"arc_easy": {"alias": "arc", "acc,none": 0.61, "acc_stderr,none": 0.02}, "copa": 0.5},
    }))  # fmt: skip
    two.write_text(json.dumps({"model": "elsewhere/second", "perplexity": 9.5}))
    page = page_of(tmp_path, first, second, eval=[one, two])
    for words in ("12.346", "0.25 ± 0.01", "75.00 %", "10.500", "arc_easy: acc", "0.61 ± 0.02", "copa", "9.500"):
        assert words in page.text, words
    links = [link["href"] for link in page.all("a")]
    assert links == ["#out-1", "#out-2", "#out-1", "#out-2", "#out-1"]
    assert [s["id"] for s in page.all("h2") if "id" in s] == ["out-1", "out-2"]
    assert "Error by layer" in page.text


def test_outs_of_the_same_name_are_told_apart(write: Callable[..., Path], tmp_path: Path) -> None:
    for folder in ("one/deep", "two/deep", "one/other"):
        (tmp_path / folder).mkdir(parents=True)
    outs = [write(made(), f"{folder}/out") for folder in ("one/deep", "two/deep", "one/other")]
    page = page_of(tmp_path, *outs, write(made(), "alone"), outs[0])
    linked = re.findall(r'<a href="#out-\d">([^<]*)</a>', (tmp_path / "page.html").read_text())[:5]
    assert linked == ["one/deep/out", "two/deep/out", "one/other/out", "alone", "one/deep/out"]
    assert page.text.count("two/deep/out") > 3


def test_unfinished_work(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / ".streamprune").mkdir(parents=True)
    with pytest.raises(StateError, match=r"out\.partial holds no .*; it is unfinished, the same command goes on"):
        report(tmp_path / "out.partial", tmp_path / "page.html")
    with pytest.raises(CheckpointError, match=r"no such folder: .*out\.partial is unfinished, the same command"):
        report(tmp_path / "out", tmp_path / "page.html")


def test_tasks_that_eval_measured(write: Callable[..., Path], tmp_path: Path) -> None:
    """What `eval --tasks --json` writes, with a reference and without, and the file of lm-eval's own command line."""
    out = write(made(), "first")
    score = TaskScore("arc_easy", "acc", "none", 0.61, 0.02, 100, 0, True, 0.64, 0.03, -0.0312, 0.0104)
    strict = TaskScore("gsm8k", "exact_match", "strict-match", 0.3, None, 100, 0, True)
    measured = TaskEvaluation((score, strict), 9, 8, 70, 0, 1.0, 5, "0.4.13")
    files = [tmp_path / name for name in ("pair.json", "alone.json", "harness.json")]
    files[0].write_text(json.dumps(measured.to_json(out, "dense")))
    files[1].write_text(json.dumps(measured.to_json("elsewhere")))
    both = {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match,flexible-extract": 0.75}
    files[2].write_text(json.dumps({"results": {"gsm8k": both}, "model_source": "hf", "model_name": "theirs"}))
    page = page_of(tmp_path, out, eval=files)
    heads = ("arc_easy: acc", "arc_easy: acc, the reference", "arc_easy: acc, difference from it",
             "gsm8k: exact_match, strict-match", "gsm8k: exact_match, flexible-extract")  # fmt: skip
    rows = "first0.61 ± 0.020.64 ± 0.03-0.0312 ± 0.010.3–", "elsewhere0.61 ± 0.02––0.3–", "theirs–––0.250.75"
    assert "".join(("model", *heads, *rows)) in page.text.replace("\n", "")


def test_what_differs_is_told(write: Callable[..., Path], tmp_path: Path) -> None:
    other = made()
    other |= {"recipe": "admm", "versions": {"python": "3.12.1", "torch": "2.8"}, "content": "f" * 32}
    other["job"] |= {"score": "wanda", "only": "mlp"}
    other["calibration"] = other["calibration"] | {"samples": 32}
    for each in other["linears"]:
        each["error"] *= 1 if "attn" in each["name"] else 3
    outs = write(made(), "first"), write(other, "second")
    page = page_of(tmp_path, outs[0], against=[outs[1]])
    told = page.text[page.text.index("What differs") : page.text.index("Error by kind")]
    for words in ("recipeobs-admmadmm", "scorelscorewanda", "only–mlp", "samples1632", "torch2.72.8", "ffff…"):
        assert words in told, words
    for same in ("refit", "seqlen", "python", "c4.txt"):
        assert same not in told
    assert "mlp.experts.*.down_proj0.02270.0681 (3 ×)" in page.text
    assert "self_attn.q_proj0.050.05 (1 ×)" in page.text
    same = page_of(tmp_path, outs[0], write(made(), "third"))
    assert "All were made with the same settings" in same.text and "What differs" not in same.text


def test_of_a_real_run(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """From prune through pack to the page; nothing but the page changes."""
    out = prune(
        models("llama", 2), tmp_path / "out", sparsity=0.5, method="obs-admm", calib=text, samples=4, seqlen=16
    ).out
    packed = pack(out, tmp_path / "packed").out
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main(["report", str(out), "--against", str(packed), "-o", str(tmp_path / "page.html"), "-q"]) == 0
    found = json.loads((out / "streamprune.json").read_text())
    page = Reader((tmp_path / "page.html").read_text())
    assert page.text.count(f"{found['linears'][0]['error']:.3g}") >= 2
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "page.html"} == before


def test_scales_are_read_where_the_weights_are(models: Callable[..., Path], tmp_path: Path) -> None:
    out = prune(models("llama", 2), tmp_path / "out", pattern="2:4", method="magnitude", quantize="fp8").out
    stored = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items() if k.endswith("_scale")}
    facts = with_scales(read_facts(out))
    for (layer, kind), cell in facts.cells.items():
        scales = stored[f"model.layers.{layer}.{kind}.weight_scale"].float()
        assert (cell.spreads["scale"].least, cell.spreads["scale"].most) == (scales.min().item(), scales.max().item())
    assert len(facts.cells) == len(stored) and "FP8 scale by layer" in page_of(tmp_path, out).text
    for path in out.glob("*.safetensors"):
        path.unlink()
    page = page_of(tmp_path, out)
    assert "FP8 scale by layer" not in page.text and "The scales of its FP8 weights are not shown: " in page.text


# ---- that it is whole, safe and small


def test_it_needs_nothing_else(write: Callable[..., Path], tmp_path: Path) -> None:
    page = page_of(tmp_path, write(made()))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,")), attributes
        assert not any(name.startswith("on") for name in attributes)
    raw = (tmp_path / "page.html").read_text()
    assert set(re.findall(r"https?://[^\"' <]+", raw)) == {"http://www.w3.org/1999/xlink"}
    assert "@import" not in raw and "prefers-color-scheme: dark" in raw and 'name="viewport"' in raw


def test_figures_can_be_read_without_colour_and_in_any(write: Callable[..., Path], tmp_path: Path) -> None:
    page = page_of(tmp_path, write(made()))
    raw = (tmp_path / "page.html").read_text()
    drawings = re.findall(r"<svg .*?</svg>", raw, re.DOTALL)
    assert len(drawings) == len(page.all("figure")) > 6
    ids: list[str] = []
    for drawing in drawings:
        assert re.search(r'role="img".*?><title>\w.*?</title><desc>\w', drawing)
        assert "currentColor" in drawing and not re.search(r"#[0-9a-f]{6}\b", drawing)
        ids += set(re.findall(r' id="([^"]+)"', drawing))
        assert set(re.findall(r"url\(#([^)]+)", drawing)) <= set(re.findall(r' id="([^"]+)"', drawing))
    pair = next(drawing for drawing in drawings if "self_attn.q_proj" in drawing)
    assert pair.count("stroke-dasharray") >= 1  # mask and refit differ in more than colour


def test_the_same_bytes_every_time(write: Callable[..., Path], tmp_path: Path) -> None:
    out = write(made())
    report(out, tmp_path / "a.html")
    report(out, tmp_path / "a.html")  # replaced
    report(str(out), tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"out", "a.html", "b.html"}


def test_more_experts_are_not_more_page(write: Callable[..., Path], tmp_path: Path) -> None:
    few = report(write(made(126, 2), "few"), tmp_path / "few.html").bytes
    many = report(write(made(126, 32), "many"), tmp_path / "many.html").bytes
    assert many < 1.1 * few < 1e6


def test_many_kinds(write: Callable[..., Path], tmp_path: Path) -> None:
    """A model of which every linear is called something else still makes a page; figures say what they leave out."""
    content = made() | {"linears": [linear(f"layers.{i % 2}.part{i}", 0.01) for i in range(60)]}
    assert "first 24 of 60 kinds" in page_of(tmp_path, write(content)).text


def test_nothing_from_a_file_is_markup(write: Callable[..., Path], tmp_path: Path) -> None:
    content = made() | {"recipe": EVIL, "left_behind": [EVIL], "base_model": EVIL}
    content["job"] |= {"only": EVIL, "score": EVIL}
    content["calibration"]["text"] = EVIL
    content["versions"][EVIL] = EVIL
    content["stages"][0]["name"] = content["stages"][1]["name"] = EVIL
    content["linears"].append(linear(f"layers.0.{EVIL}", 0.1))
    content["linears"].append(linear(EVIL, 0.1))
    measured = tmp_path / "eval.json"
    measured.write_text(json.dumps({"model": EVIL, "text": EVIL, "perplexity": 2, "tasks": {EVIL: {EVIL: 1}}}))
    page = page_of(tmp_path, write(content, "out <b>"), eval=[measured])
    assert not page.all("script") and not page.all("b")[len(page.all("figure")) :]
    shown = plain(EVIL)
    assert "\0" not in page.text and page.text.count(shown) >= 12


@pytest.mark.parametrize("change", [
    {"linears": []}, {"stages": []}, {"versions": None, "calibration": {}, "resolved": []}, {"recipe": None},
    {"linears": [linear("layers.1.q", 0.0)]}, {"linears": [linear("layers.1.q", 1e308), linear("layers.2.q", 1e-300)]},
    {"linears": [linear("layers.999999999.q", 0.1), linear("layers.0.q", 0.2)]},
    {"linears": [{"name": "layers.0.q", "rows": 0, "in_features": 0, "pruned": 0}]},
    {"linears": [linear("layers.0.q", float("inf"), removed_score=None, damping=None)]},
    {"linears": [linear("head", 0.1)]},
])  # fmt: skip
def test_odd_reports(write: Callable[..., Path], tmp_path: Path, change: Report) -> None:
    page_of(tmp_path, write(made() | change), write(made(), "other"))


def test_labels_tell_kinds_apart() -> None:
    assert labels_of(["a.q", "b.q", "b.k"]) == {"a.q": "a.q", "b.q": "b.q", "b.k": "k"}


# ---- what it refuses


@pytest.mark.parametrize(("change", "which"), [
    ({"linears": {}}, "linears"), ({"linears": [1]}, "linears"), ({"linears": [{"name": 1}]}, "linears"),
    ({"linears": [{"name": "a", "rows": "4"}]}, "rows"), ({"linears": [linear("a", 1, pruned=-1)]}, "pruned"),
    ({"linears": [linear("a", 1, in_features=10**400)]}, "in_features"), ({"seconds": True}, "seconds"),
    ({"job": []}, "job"), ({"stages": [None]}, "stages"), ({"stages": None}, "stages"), ({"sparsity": "x"}, "sparsity"),
    ({"stages": [{"name": 1, "seconds": 1, "peak_rss_bytes": 1, "pooled": 3}]}, "pooled"),
    ({"left_behind": 7}, "notes"), ({"calibration": 3}, "notes"),
])  # fmt: skip
def test_damaged_fields(write: Callable[..., Path], tmp_path: Path, change: Report, which: str) -> None:
    out = write(made() | change)
    with pytest.raises(CorruptStateError, match=rf"streamprune.json is damaged \(.*{which}.*\); leave .*out out") as e:
        report(out, tmp_path / "page.html")
    assert "\n" not in str(e.value) and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("content", "error", "words"), [
    (None, StateError, "holds no streamprune.json"), (b"{", CorruptStateError, "cannot be read"),
    (b"[]", CorruptStateError, "is not a streamprune report file"), (b"\xff" * 9, CorruptStateError, "cannot be read"),
    (b'{"format": "streamprune-report", "version": 9}', CorruptStateError, "has version 9"),
    (b'{"format": "streamprune-report", "version": 1}', CorruptStateError, "says nothing of pruning"),
    (b'{"format": "streamprune-report", "version": 1, "packed": {"original": {}}}', CorruptStateError, "packed model"),
    (b"[" * 100_000, CorruptStateError, "cannot be read"),
])  # fmt: skip
def test_reports_of_others(tmp_path: Path, content: bytes | None, error: type[Exception], words: str) -> None:
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / "out" / "streamprune.json").write_bytes(content)
    with pytest.raises(error, match=words) as e:
        report(tmp_path / "out", tmp_path / "page.html")
    assert "--restart" not in str(e.value) and "\n" not in str(e.value)


def test_refusals_of_arguments(write: Callable[..., Path], tmp_path: Path) -> None:
    out = write(made())
    with pytest.raises(CheckpointError, match="no such folder"):
        report(tmp_path / "nowhere", tmp_path / "page.html")
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(CheckpointError, match=r"begun.partial is unfinished"):
        report(tmp_path / "begun", tmp_path / "page.html")
    for given, words in (([], "an OUT"), ([out], "is a folder")):
        with pytest.raises(UsageError, match=words):
            report(given, out)
    before = (out / "streamprune.json").read_bytes()
    with pytest.raises(UsageError, match="what the page is made of"):
        report(out, out / "streamprune.json")
    assert (out / "streamprune.json").read_bytes() == before
    with pytest.raises(StateError, match="cannot write"):
        report(out, tmp_path / "no" / "page.html")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"model": "a"}', b'{"perplexity": 3}', b"\xff", b"[" * 100_000]
)
def test_files_that_eval_did_not_write(write: Callable[..., Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "eval.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"--eval .*eval.json: .*make it with"):
        report(write(made()), tmp_path / "page.html", eval=[tmp_path / "eval.json"])
    with pytest.raises(UsageError, match="cannot be read"):
        report(tmp_path / "out", tmp_path / "page.html", eval=[tmp_path])


def test_without_matplotlib(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(write(made())), "-o", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr()
    assert said.err == "streamprune: error: a report takes one more package: pip install 'streamprune[report]'\n"
    assert said.out == "" and not (tmp_path / "page.html").exists()


def test_matplotlib_is_not_heard(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It warns where it has no home folder, and when it looks for fonts."""

    def warning(*given: object) -> str:
        logging.getLogger("matplotlib.font_manager").warning("Matplotlib is building the font cache")
        return ""

    monkeypatch.setattr(page_module, "page_of", warning)
    report(write(made()), tmp_path / "page.html")
    assert not caplog.records
    warning()
    assert caplog.records


def test_on_the_command_line(write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(write(made())), "--output", str(page)]) == 0
    assert capsys.readouterr().out.startswith(f"{page}: 1 model, ")
    assert main(["report", str(tmp_path / "out"), "-o", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(page), "models": 1, "bytes": page.stat().st_size}
    assert main(["report", str(tmp_path), "-o", str(page)]) == 6
    assert main(["report", str(tmp_path / "no"), "-o", str(page)]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert "report" in streamprune.__all__


def test_settings_of_others_do_not_matter(write: Callable[..., Path], tmp_path: Path) -> None:
    import matplotlib

    out = write(made())
    report(out, tmp_path / "a.html")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": True, "lines.linewidth": 9}):
        report(out, tmp_path / "b.html")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


# ---- the command


@pytest.mark.parametrize("flags", [
    "--sparsity 0.5", "--pattern 2:4 --method hwpq", "--sparsity 0.6 --method obs-admm --damping 0.1 --seed 3",
    "--sparsity 0.5 --method wanda --refit cg --quantize fp8 --fp8-scale mse --fp8-rounding nearest",
    "--pattern 4:8 --method sparsegpt", "--sparsity 0.5 --refit sparsegpt --selector exact --propagate dense",
    "--sparsity 0.5 --method magnitude", "--sparsity 0.5 --allocate owl --only 'mlp.*' --skip up_proj --bos never",
    "--pattern 2:4 --method swiftprune-tuned --tune-epochs 2 --tune-lr 0.5 --expert-tokens 3 --expert-stats routed",
    "--sparsity 0.5 --score lscore-isotropic --propagate pruned --samples 3 --device cpu --dtype float32",
    "--sparsity 0.5 --method hwpq --quantize none --tune block", "--pattern 2:4 --backend torch",
])  # fmt: skip
def test_the_command_is_that_of_the_job(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """What is read from a job's fields makes that job again."""
    import shlex

    seen: list[JobSpec] = []

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(spec: JobSpec, *_: object) -> None:
        seen.append(spec)
        raise Stopped

    monkeypatch.setattr(job, "_carry_out", stop)
    model = models("llama", 2)
    command = ["python", "-m", "streamprune", "prune", str(model), "OUT", *shlex.split(flags), "--calib", str(text)]
    for _ in range(2):
        args = vars(make_parser(defaultdict(lambda: lambda _: 0)).parse_args(command[3:]))
        left_out = {"command", "handler", "json", "quiet", "debug", "max_ram", "max_vram"}
        with pytest.raises(Stopped):
            prune(**{k: v for k, v in args.items() if k not in left_out})
        command = shlex.split(command_of(seen[-1].fixed(), str(text), str(model)))
    if "magnitude" not in flags:  # which does not read the text
        assert "--calib" in command
    assert seen[0].fixed() == seen[1].fixed()
    assert len(command) <= 8 + len(shlex.split(flags)) + 2
