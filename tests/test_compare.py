"""The comparison: its tables and files, what it does again and what not. Only the slow test is in earnest."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from streamprune.disk import journal
from streamprune.methods import recipes

MODEL = Path(str(importlib.resources.files("streamprune"))) / "demo_model"
PNG = b"\x89PNG\r\n\x1a\n"
LOSS = {"swiftprune": 2.0, "wanda": 1.5, "magnitude": 20.0, "wanda+cg": 1.0}
HARM = {"0.5": 1.0, "0.7": 3.0, "2:4": 2.0, "4:8": 1.5}


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("compare")


class Stub:
    """Stands for streamprune in processes of its own: writes what a prune would, and says made-up figures.

    The dense perplexity is 10, that of a pruned model 10 + loss × harm. `fails` maps (command, method, amount) to an
    error; the command number `interrupt` does not end.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.fails: dict[tuple[str, str, str], str] = {}
        self.interrupt: int | None = None
        self.rig = importlib.import_module("bench_rig")

    def __call__(self, *words: str) -> Any:
        self.calls.append(words)
        if len(self.calls) == self.interrupt:
            raise KeyboardInterrupt
        given = dict(pairwise((*words, "")))
        out = Path(words[2]) if words[0] != "eval" else Path(words[1])
        method, amount = self.cell(words, given, out)
        if error := self.fails.get((words[0], method, amount)):
            return self.rig.Ran(2, 1.0, None, "", f"streamprune: error: {error}\n")
        found = getattr(self, words[0])(out, given, LOSS.get(method, 0) * HARM.get(amount, 0))
        return self.rig.Ran(0, 1.0, None, json.dumps(found), "")

    @staticmethod
    def cell(words: tuple[str, ...], given: dict[str, str], out: Path) -> tuple[str, str]:
        if words[0] == "prune":
            refit = f"+{given['--refit']}" if "--refit" in given else ""
            return given["--method"] + refit, given.get("--sparsity") or given["--pattern"]
        method, _, amount = out.name.rpartition("-")[0].rpartition("-") if out.parent.name == "models" else ("",) * 3
        return method, amount.replace("of", ":")

    @staticmethod
    def prune(out: Path, given: dict[str, str], harm: float) -> dict[str, Any]:
        if "--stats" in given:
            assert Path(given["--stats"]).read_text() == "statistics"
        out.mkdir()
        found = {"seconds": 7.25, "peak_rss_bytes": 500 << 20, "sparsity": 0.5, "recipe": "r", "startup_seconds": 1.5}
        journal.write_json(out / "streamprune.json", "report", found)
        return {"status": "done", "out": str(out), "seconds": 0.01, "peak_rss_bytes": 1}

    @staticmethod
    def calibrate(out: Path, given: dict[str, str], harm: float) -> dict[str, Any]:
        assert not out.exists()
        out.write_text("statistics")
        return {"status": "done", "out": str(out), "seconds": 33.4, "peak_rss_bytes": 600 << 20}

    @staticmethod
    def eval(out: Path, given: dict[str, str], harm: float) -> dict[str, Any]:
        assert (out / "config.json").exists() or (out / "streamprune.json").exists()
        windows = min(np.load(given["--text"]).size // 16, int(given.get("--windows", 1 << 20)))
        found = {"perplexity": 10 + harm, "nll": math.log(10 + harm), "tokens": 15 * windows, "windows": windows}
        found |= {"seqlen": 16, "seconds": 2.0, "peak_rss_bytes": 400 << 20}
        if out.name.endswith("-1"):  # seed 1 is a little worse, and window 0 is harder than the others
            found["perplexity"] += 0.5
        if "--by-window" in given:
            found["window_nll"] = [found["nll"] + 0.01 * harm * (w == 0) for w in range(windows)]
        if "--reference" in given:
            found |= {"kl": harm / 10, "kl_stderr": harm / 1000, "top1_agreement": 1 / (1 + harm)}
            found["reference_perplexity"] = 10.0
        return {"model": str(out), "text": given["--text"], **found}

    def of(self, command: str) -> list[tuple[str, ...]]:
        return [words for words in self.calls if words[0] == command]


class Place:
    """A folder with texts, and a way to run the tool there with the stub."""

    def __init__(self, tool: ModuleType, stub: Stub, folder: Path) -> None:
        self.tool, self.stub, self.out = tool, stub, folder / "out"
        self.calib, self.text, self.other = folder / "calib.npy", folder / "text.npy", folder / "other.npy"
        np.save(self.calib, np.arange(640) % 100)
        np.save(self.text, np.arange(330) % 97)
        np.save(self.other, np.arange(50) % 89)

    def run(self, *more: str, methods: str = "swiftprune,wanda", amounts: str = "0.5,2:4") -> int:
        texts = ["--calib", str(self.calib), "--text", str(self.text), "--out", str(self.out)]
        words = [*texts, "--seqlen", "16", "--samples", "4", "--methods", methods, "--amounts", amounts]
        models = [word for word in more if Path(word).is_dir()]
        rest = [word for word in more if word not in models]
        code: int = self.tool.main([str(MODEL), *models, *words, *rest], self.stub)
        return code

    @property
    def results(self) -> dict[str, Any]:
        return journal.read_json(self.out / "comparison.json", "comparison")

    @property
    def markdown(self) -> str:
        return (self.out / "comparison.md").read_text()

    def cell(self, method: str, amount: str) -> dict[str, Any]:
        (found,) = [c for c in self.results["cells"] if (c["method"], c["amount"]) == (method, amount)]
        return dict(found)


@pytest.fixture
def stub(tool: ModuleType) -> Stub:
    return Stub()


@pytest.fixture
def place(tool: ModuleType, stub: Stub, tmp_path: Path) -> Place:
    return Place(tool, stub, tmp_path)


def tables(markdown: str) -> list[list[list[str]]]:
    """The cells of every table."""
    found = re.findall(r"(?:^\|.*\|\n)+", markdown + "\n", re.MULTILINE)
    return [[[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()] for table in found]


# ---- what it finds


def test_tables(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run("--kl-windows", "0", methods="swiftprune,wanda+cg,magnitude", amounts="2:4,0.7,0.50,4:8") == 0
    perplexity, kl, cost, apart = tables(place.markdown)
    head = ["", "50 %", "70 %", "2:4", "4:8"]
    assert perplexity == [
        head,
        ["---", "---:", "---:", "---:", "---:"],
        ["dense", "10.00", "10.00", "10.00", "10.00"],
        ["`swiftprune`", "12.00", "16.00", "14.00", "13.00"],
        ["`wanda+cg`", "**11.00**", "**13.00**", "**12.00**", "**11.50**"],
        ["`magnitude`", "30.00", "70.00", "50.00", "40.00"],
    ]
    assert kl[0] == head and kl[2][:2] == ["`swiftprune`", "0.2000 / 33.3 %"]
    assert kl[3][1:3] == ["**0.1000** / **50.0 %**", "**0.3000** / **25.0 %**"] and kl[4][2] == "6.000 / 1.6 %"
    assert cost[2:] == [[name, *["7.2 s / 500 MiB"] * 4] for name in ("`swiftprune`", "`wanda+cg` †", "`magnitude`")]
    text = place.markdown
    nats = f"{math.log(12 / 11) + 0.01 * (2 - 1) / 20:+.4f} ± {0.01 / 20:.4f}"
    assert apart[0] == head and apart[2][1] == nats and apart[3][1:] == ["best"] * 4
    assert "gathered once a seed in 33.4 s (600 MiB)" in text and "of all 300 predicted tokens in 20 windows" in text
    assert "on the whole text: 300 tokens in 20 windows; standard error of KL at most 1.0 % of it" in text
    assert "python tools/compare.py" in text and "cores" in text and "torch" in text and "[1]" not in text
    out, errors = capsys.readouterr()
    assert out == text and sum(": perplexity" in line for line in errors.splitlines()) == 12
    assert "12/12 magnitude 4:8 seed 0: perplexity 40.00, 7.2 s" in errors


def test_json_has_every_figure(place: Place) -> None:
    assert place.run("--seeds", "3", "--device", "cpu") == 0
    found = place.results
    assert found["dense"] == {
        "perplexity": 10.0, "nll": math.log(10), "tokens": 300, "windows": 20, "seqlen": 16, "seconds": 2.0,
        "peak_rss_bytes": 400 << 20,
    }  # fmt: skip
    job, (run,) = found["job"], found["runs"]
    assert job["samples"] == 4 and job["device"] == "cpu" and job["kl"] == {"windows": 64}
    assert job["model"]["name"] == "demo_model" and len(job["model"]["sample"]) == 32
    assert job["text"]["name"] == "text.npy" and len(job["calib"]["xxh3_128"]) == 32
    assert {"processor", "ram_bytes", "commit"} <= run["machine"].keys() and job["machine"]["cores"] > 0
    assert run["command"].startswith(f"python tools/compare.py {MODEL} --calib") and run["date"][:2] == "20"
    cell = place.cell("wanda", "2:4")
    nats = cell.pop("window_nll")
    assert len(nats) == 20 and nats[1] == math.log(13)
    assert cell.pop("date") and cell == {
        "method": "wanda", "amount": "2:4", "seed": 3, "calibration": "shared", "recipe": "r", "sparsity": 0.5,
        "startup_seconds": 1.5, "peak_rss_bytes": 500 << 20, "prune_seconds": 7.25, "perplexity": 13.0,
        "nll": math.log(13), "tokens": 300, "windows": 20, "seqlen": 16, "eval_seconds": 2.0,
        "eval_peak_rss_bytes": 400 << 20, "kl": 0.3, "kl_stderr": 0.003, "top1_agreement": 0.25,
        "reference_perplexity": 10.0, "kl_tokens": 300, "kl_windows": 20,
    }  # fmt: skip


def test_who_calibrates(place: Place, stub: Stub) -> None:
    """Statistics are gathered once for masks alone, a refit has a pass of its own, magnitude needs nothing."""
    assert place.run("--device", "cpu", methods="magnitude,swiftprune,wanda,wanda+cg") == 0
    (calibrate,) = stub.of("calibrate")
    window = ["--calib", str(place.calib), "--samples", "4", "--seed", "0", "--seqlen", "16"]
    assert list(calibrate) == ["calibrate", str(MODEL), calibrate[2], *window, "--device", "cpu"]
    given = {place.out / "models" / f"{m}-{a}-0": [] for m in LOSS for a in ("0.5", "2of4")}
    given |= {out: ["--stats", calibrate[2]] for out in given if out.name.startswith(("swiftprune-", "wanda-"))}
    given |= {out: window for out in given if "+cg-" in out.name}
    pruned = {Path(words[2]): words for words in stub.of("prune")}
    assert pruned.keys() == given.keys()
    for out, expected in given.items():
        amount = next(at for at, word in enumerate(pruned[out]) if word in ("--sparsity", "--pattern"))
        assert list(pruned[out][amount + 2 : -2]) == expected
    assert all(("--refit" in words) == ("+cg-" in words[2]) for words in stub.of("prune"))
    assert all(words[-2:] == ("--device", "cpu") for words in stub.calls)
    left = {p.name for p in place.out.iterdir()} - {"comparison.png"}  # which needs matplotlib
    assert left == {"comparison.json", "comparison.md"}


def test_methods(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe that there is gets compared; what refits or tunes calibrates itself, and nothing else does."""
    parse = importlib.import_module("compare_run").parse_methods
    monkeypatch.setitem(recipes.RECIPES, "new-one", recipes.Recipe("magnitude", "exact", "cg"))
    found = {method.name: method.calibration for method in parse(None)}
    assert list(found) == list(recipes.RECIPES)
    assert (found["wanda"], found["magnitude"], found["new-one"]) == ("shared", "none", "own")
    assert all((found[name] == "own") == recipe.aims for name, recipe in recipes.RECIPES.items())
    cg, none, _ = parse("magnitude+cg,new-one+none,wanda,magnitude+cg")
    assert (cg.name, cg.recipe, cg.refit, cg.calibration) == ("magnitude+cg", "magnitude", "cg", "own")
    assert (none.recipe, none.refit, none.calibration) == ("new-one", "none", "none")
    small, both, plain = parse("wanda+fp8,wanda+cg+fp8,hwpq+none")
    assert (small.recipe, small.refit, small.quantize, small.calibration) == ("wanda", None, "fp8", "shared")
    assert (both.recipe, both.refit, both.quantize, both.calibration) == ("wanda", "cg", "fp8", "own")
    assert (plain.refit, plain.quantize, plain.calibration) == ("none", None, "shared")
    tuned, all_three, named = parse("wanda+tune,wanda+cg+tune,swiftprune-tuned")
    assert (tuned.recipe, tuned.refit, tuned.tune, tuned.calibration) == ("wanda", None, "block", "own")
    assert (all_three.refit, all_three.tune, named.tune, named.calibration) == ("cg", "block", None, "own")
    for wrong in ("wanda+tune+cg", "wanda+fp4", "wanda+fp8+cg", "wanda+cg+cg", "fp8", "wanda+"):
        with pytest.raises(importlib.import_module("bench_rig").BenchError):
            parse(wrong)


def test_kl_on_the_first_windows(place: Place, stub: Stub) -> None:
    assert place.run("--kl-windows", "3", methods="wanda", amounts="0.5") == 0
    dense, whole, beside = stub.of("eval")
    assert "--reference" not in (*dense, *whole) and beside[beside.index("--reference") + 1] == str(MODEL)
    assert beside[beside.index("--windows") + 1] == "3" and "--windows" not in (*dense, *whole)
    assert place.cell("wanda", "0.5")["kl_windows"] == 3 and place.cell("wanda", "0.5")["windows"] == 20
    assert "on the text's first windows only: 45 tokens in 3 windows" in place.markdown


def test_kl_on_another_text(place: Place, stub: Stub) -> None:
    assert place.run("--reference-text", str(place.other), methods="wanda", amounts="0.5") == 0
    assert [words[3] for words in stub.of("eval")] == [str(place.text), str(place.text), str(place.other)]
    assert "on `other.npy` (xxh3 " in place.markdown and "45 tokens in 3 windows" in place.markdown


def test_keep(place: Place, stub: Stub) -> None:
    assert place.run("--keep") == 0
    kept = {f"{method}-{amount}-0" for method in ("swiftprune", "wanda") for amount in ("0.5", "2of4")}
    assert {p.name for p in (place.out / "models").iterdir()} == kept and not (place.out / "work").exists()


def test_seeds(place: Place, stub: Stub) -> None:
    """Means and standard deviations; statistics once a seed, what needs no calibration once; seeds can be added."""
    assert place.run("--seeds", "0", methods="swiftprune,magnitude", amounts="0.5") == 0
    before = len(stub.of("prune"))
    assert place.run("--seeds", "0,1", methods="swiftprune,magnitude", amounts="0.5") == 0
    assert len(stub.of("prune")) == before + 1 and len(stub.of("calibrate")) == 2
    assert [words[words.index("--seed") + 1] for words in stub.of("calibrate")] == ["0", "1"]
    perplexity, kl, *_ = tables(place.markdown)
    assert perplexity[3] == ["`swiftprune`", "**12.25** ± 0.35"] and perplexity[4] == ["`magnitude`", "30.00"]
    assert kl[2][1] == "**0.2000** ± 0.0000 / **33.3 %** ± 0.0 %"
    assert "means of seeds 0, 1 ± their standard deviation" in place.markdown
    assert len(place.results["cells"]) == 3 and place.results["calibration"].keys() == {"0", "1"}


def test_several_models(place: Place, stub: Stub, tmp_path: Path) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    assert place.run(str(other), methods="wanda", amounts="0.5") == 0
    assert {p.name for p in place.out.iterdir()} == {"comparison-demo_model", "comparison-other"}
    assert {words[1] for words in stub.of("prune")} == {str(MODEL), str(other)}


@pytest.mark.parametrize("seeds", ["a", "-1", "0,", "1.5"])
def test_wrong_seeds(place: Place, seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run(f"--seeds={seeds}") == 2
    assert "--seeds" in capsys.readouterr().err


# ---- what it does again, and what not


def test_a_finished_comparison_is_recognised_and_grows(place: Place, stub: Stub) -> None:
    assert place.run() == 0
    before, text = place.results, place.markdown
    stub.calls.clear()
    assert place.run(amounts="0.5") == 0
    assert stub.calls == [] and place.results == before and place.markdown == text
    assert place.run(methods="wanda,magnitude", amounts="4:8,2:4") == 0
    asked = [(words[words.index("--method") + 1], words[words.index("--pattern") + 1]) for words in stub.of("prune")]
    assert asked == [("wanda", "4:8"), ("magnitude", "4:8"), ("magnitude", "2:4")]
    assert len(stub.of("eval")) == 3 and len(stub.of("calibrate")) == 1 and len(place.results["runs"]) == 2
    assert tables(place.markdown)[0][-1] == ["`magnitude`", "", "50.00", "40.00"]
    assert place.results["cells"][:4] == before["cells"]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 6, 10])
def test_interrupted_anywhere_it_goes_on(
    place: Place, stub: Stub, at: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the dense evaluation, calibration, a prune, an evaluation, halfway, and in the last of ten."""
    stub.interrupt = at
    assert place.run() == 130
    assert capsys.readouterr().err.splitlines()[-1] == "compare: error: interrupted; the same command goes on"
    done = len(place.results["cells"])
    assert done == max(0, (at - 3) // 2) and not list(place.out.glob("*.png"))
    stub.interrupt = None
    stub.calls.clear()
    stub.prune = lambda out, given, harm: {} if out.exists() else Stub.prune(out, given, harm)  # type: ignore[method-assign]
    assert place.run() == 0
    assert len(stub.of("prune")) == 4 - done and len(stub.of("calibrate")) == (at < 3)
    other = Place(place.tool, Stub(), tmp_path)
    other.out = tmp_path / "straight"
    assert other.run() == 0 and tables(other.markdown) == tables(place.markdown)


def test_a_failing_cell(place: Place, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.fails = {
        ("prune", "wanda", "4:8"): "in_features 44 is no multiple of 8",
        ("prune", "swiftprune", "4:8"): "in_features 44 is no multiple of 8",
        ("eval", "wanda", "0.5"): "not finite",
    }
    assert place.run("--keep", amounts="0.5,4:8") == 1
    perplexity, kl, cost, _ = tables(place.markdown)
    assert perplexity[3:] == [["`swiftprune`", "**12.00**", "– [1]"], ["`wanda`", "– [2]", "– [1]"]]
    assert kl[3][1:] == ["– [2]", "– [1]"] and cost[3][1:] == ["7.2 s / 500 MiB [2]", "– [1]"]
    assert "[1] in_features 44 is no multiple of 8  \n[2] not finite  \n" in place.markdown
    assert place.cell("wanda", "0.5")["error"] == "not finite" and "perplexity" not in place.cell("wanda", "4:8")
    assert "wanda 50 % seed 0: not finite" in capsys.readouterr().err
    assert [p.name for p in (place.out / "models").iterdir()] == ["swiftprune-0.5-0"]
    stub.fails, stub.calls = {}, []
    assert place.run("--keep", amounts="0.5,4:8") == 0 and "[1]" not in place.markdown
    assert len(stub.of("prune")) == 3 and len(place.results["cells"]) == 4


def test_a_failed_evaluation_keeps_the_perplexity(place: Place, stub: Stub) -> None:
    def evaluate(out: Path, given: dict[str, str], harm: float) -> dict[str, Any]:
        given.pop("--reference", None)
        return Stub.eval(out, given, harm)

    stub.eval = evaluate  # type: ignore[method-assign]
    assert place.run("--kl-windows", "3", methods="wanda", amounts="0.5") == 1
    perplexity, kl, *_ = tables(place.markdown)
    assert perplexity[3][1] == "**11.50** [1]" and kl[2][1] == "– [1]"
    assert "[1] eval --reference did not say kl, kl_stderr, top1_agreement, reference_perplexity" in place.markdown


def test_another_comparison_is_refused(place: Place, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.run() == 0
    before = place.results
    stub.calls.clear()
    np.save(place.text, np.arange(330) % 98)
    assert place.run("--samples", "5") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "holds a comparison with another text, samples;" in error and "--restart" in error
    assert stub.calls == [] and place.results == before
    assert place.run("--samples", "5", "--restart") == 0
    assert len(stub.of("prune")) == 4 and len(place.results["runs"]) == 1 and place.results["job"]["samples"] == 5


def test_changed_files_of_the_package_are_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compare_run.source_digest", lambda: "other")
    assert place.run(methods="wanda", amounts="0.5") == 0
    assert "files were changed before these were finished: wanda 50 %." in place.markdown
    monkeypatch.setattr("compare_state.source_digest", lambda: "other")
    assert place.run() == 2 and "with another versions" in capsys.readouterr().err


def test_a_foreign_folder_stays_as_it_is(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.out / "models").mkdir(parents=True)
    (place.out / "models" / "mine").write_text("mine")
    for more in ([], ["--restart"]):
        assert place.run(*more) == 2 and "holds models and no comparison" in capsys.readouterr().err
    assert (place.out / "models" / "mine").read_text() == "mine" and len(list(place.out.rglob("*"))) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "nothing"], "--methods nothing: write RECIPE, RECIPE+REFIT, or either with +fp8 or +tune"),
        (["--methods", "wanda+"], "--methods wanda+"),
        (["--methods", "wanda+../x"], "--methods wanda+../x"),
        (["--amounts", "1.0"], "--amounts 1.0: write a sparsity in [0, 1) or a pattern N:M"),
        (["--amounts", "half"], "--amounts half"),
        (["--amounts", "nan"], "--amounts nan"),
        (["--amounts", "4:2"], "did you mean 2:4?"),
        (["--kl-windows", "-1"], "--kl-windows -1"),
        (["--kl-windows", "3", "--reference-text", "x"], "not allowed with"),
        (["--text", "/nowhere"], "/nowhere"),
        (["--out", str(MODEL / "x")], "lies within MODEL"),
        (["--nothing"], "--nothing"),
    ],
)
def test_errors_are_one_line(
    place: Place, stub: Stub, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert place.run(*words) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("compare: error: ") and errors.count("\n") == 1
    assert stub.calls == [] and not place.out.exists()


def test_a_dense_model_that_fails_ends_it(place: Place, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.fails = {("eval", "", ""): "no usable tokenizer"}
    assert place.run() == 2 and capsys.readouterr().err == "compare: error: no usable tokenizer\n"
    assert len(stub.calls) == 1


# ---- the plot


def test_plot(place: Place) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    pyplot = "matplotlib.pyplot" in sys.modules
    for amounts in ("0.5,0.7,2:4,4:8", "0.5", "2:4"):
        assert place.run("--restart", methods="swiftprune,wanda,wanda+cg,magnitude", amounts=amounts) == 0
        written = (place.out / "comparison.png").read_bytes()
        width, height = (int.from_bytes(written[at : at + 4], "big") for at in (16, 20))
        assert written[:8] == PNG and width > 1000 and height > 600
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == pyplot


def test_without_matplotlib(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert place.run() == 0
    assert sorted(p.name for p in place.out.iterdir()) == ["comparison.json", "comparison.md"]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "plot" in line] == [
        "compare: no plot, matplotlib is missing: pip install 'matplotlib>=3.8' and run the same command again"
    ]


def test_no_perplexity_no_plot(place: Place, stub: Stub) -> None:
    stub.fails = {("prune", "wanda", "0.5"): "no"}
    assert place.run(methods="wanda", amounts="0.5") == 1
    assert not (place.out / "comparison.png").exists() and tables(place.markdown)[0][3] == ["`wanda`", "– [1]"]


# ---- in earnest


@pytest.mark.slow
def test_on_the_demo_model(tool: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every figure is finite and that of separate commands; statistics that are shared change nothing."""
    import gzip

    rig = importlib.import_module("bench_rig")
    source = MODEL.parent / "text"
    text, calib, out = tmp_path / "text.txt", source / "calibration.txt.gz", tmp_path / "out"
    text.write_bytes(b"\n".join(gzip.decompress((source / "heldout.txt.gz").read_bytes())[:12_000].split(b"\n")[:-1]))
    few = ["--samples", "8", "--seqlen", "64"]
    words = [str(MODEL), "--calib", str(calib), "--text", str(text), *few, "--kl-windows", "20", "--out", str(out)]
    assert tool.main([*words, "--methods", "wanda,magnitude", "--amounts", "0.5,2:4", "--keep"]) == 0
    assert capfd.readouterr().out == (out / "comparison.md").read_text()
    found = journal.read_json(out / "comparison.json", "comparison")
    cells = {(c["method"], c["amount"]): c for c in found["cells"]}
    assert len(cells) == 4

    def evaluate(model: Path, on: Path, *more: str) -> dict[str, Any]:
        ran = rig.streamprune("eval", str(model), "--text", str(on), "--seqlen", "64", *more)
        return dict(ran.result)

    assert found["dense"]["perplexity"] == evaluate(MODEL, text)["perplexity"]
    for (method, amount), cell in cells.items():
        assert all(math.isfinite(v) for v in cell.values() if isinstance(v, float))
        assert cell["perplexity"] > found["dense"]["perplexity"] and cell["kl"] > 5 * cell["kl_stderr"] > 0
        assert 0 < cell["top1_agreement"] < 1 and cell["sparsity"] == 0.5 and cell["kl_windows"] == 20
        assert cell["peak_rss_bytes"] > 100 << 20 and cell["prune_seconds"] > 0
        model = out / "models" / f"{method}-{amount.replace(':', 'of')}"
        assert cell["perplexity"] == evaluate(model, text)["perplexity"]
        beside = evaluate(model, text, "--windows", "20", "--reference", str(MODEL))
        assert {key: cell[key] for key in ("kl", "top1_agreement")} == {
            key: beside[key] for key in ("kl", "top1_agreement")
        }
    again = tmp_path / "again"
    asked = ["--method", "wanda", "--pattern", "2:4", "--calib", str(calib), *few]
    assert rig.streamprune("prune", str(MODEL), str(again), *asked).code == 0
    for shard in again.glob("*.safetensors"):
        assert shard.read_bytes() == (out / "models" / "wanda-2of4" / shard.name).read_bytes()
    shutil.rmtree(out / "models")
    assert tool.main([*words, "--methods", "wanda,magnitude", "--amounts", "0.5,2:4"]) == 0
