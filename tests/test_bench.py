"""The benchmarks: what they print, that figures and ratios fit together, what they leave behind. No time is judged."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamprune import cli
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.quantised import computable
from streamprune.inspection.inspect import inspect

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TINY = ["--hidden", "64", "--intermediate", "128", "--heads", "4", "--kv-heads", "2", "--vocab", "2048"]
FEW = ["--samples", "3", "--seqlen", "32"]
KERNELS = {"ewma", "exact", "2:4", "4:8", "8:16", "16:32", "accumulate"}

Rows = list[dict[str, Any]]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("bench")


@pytest.fixture
def children(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Child processes run in this one, where everything is imported already; returns what was started."""
    rig, child = importlib.import_module("bench_rig"), importlib.import_module("bench_child")
    started: list[tuple[str, ...]] = []

    def run(*command: str) -> Any:
        started.append(command)
        out, errors, begun = io.StringIO(), io.StringIO(), time.perf_counter()
        with redirect_stdout(out), redirect_stderr(errors), monkeypatch.context() as patch:
            if command[:2] == ("-m", "streamprune"):
                code = cli.main(command[2:])
            elif command[0] == "-c":
                code = 0
            else:
                assert command[0] == str(TOOLS / "bench_child.py")
                patch.setattr(sys, "argv", list(command))
                patch.setattr("streamprune.__main__._steady_heap", lambda: None)
                code = child.main()
        return rig.Ran(code, time.perf_counter() - begun, 123 << 20, out.getvalue(), errors.getvalue())

    monkeypatch.setattr(rig, "run", run)
    return started


def rows_of(tool: ModuleType, capsys: pytest.CaptureFixture[str], *words: str) -> Rows:
    """The rows of a benchmark that succeeds, checked for what all of them have in common; the machine left out."""
    code = tool.main([*words, "--json"])
    out, errors = capsys.readouterr()
    assert (code, errors) == (0, "")
    here, *rows = [json.loads(line) for line in out.splitlines()]
    assert here["processor"] and here["threads"] == 1 and here["torch"] == torch.__version__ and "commit" in here
    assert rows
    for row in rows:
        check(row)
    return rows


def check(row: dict[str, Any]) -> None:
    """Figures are positive and finite, the ratio is that of the printed medians and lies within its spread."""
    numbers = ["value", "min", "max", "baseline_value", "ratio", "ratio_min", "ratio_max"]
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in numbers), row
    assert row["min"] <= row["value"] <= row["max"]
    assert row["ratio_min"] * 0.9999 <= row["ratio"] <= row["ratio_max"] * 1.0001
    assert row["ratio"] == pytest.approx(row["value"] / row["baseline_value"], rel=1e-4)
    assert row["runs"] >= 1 and row["unit"] in ("ms", "s", "MiB")
    if row["case"] == row["baseline"]:
        assert row["ratio"] == row["ratio_min"] == row["ratio_max"] == 1


def by_case(rows: Rows) -> dict[str, dict[str, Any]]:
    found = {row["case"]: row for row in rows}
    assert len(found) == len(rows), "a case stands there twice"
    return found


# ---- the five


def test_kernels(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    cases = by_case(rows_of(tool, capsys, "kernels", "--shape", "64x128", "--repeat", "3", "--device", "cpu"))
    groups = {f"{pattern} topk per group (Wanda)" for pattern in ("2:4", "4:8", "8:16", "16:32")}
    sort, topk = "torch.sort + scatter (Wanda)", "torch.topk + scatter"
    assert KERNELS | groups | {"memcpy", sort, topk, "numpy.partition", "first_nonfinite", "fp8 mse"} <= cases.keys()
    assert {row["baseline"] for row in cases.values()} == {"memcpy"} and {row["runs"] for row in cases.values()} == {3}
    for name in KERNELS - {"accumulate"}:
        assert cases[name]["sort_over_it"] == pytest.approx(cases[sort]["value"] / cases[name]["value"], rel=1e-4)
        assert cases[name]["topk_over_it"] == pytest.approx(cases[topk]["value"] / cases[name]["value"], rel=1e-4)
        assert ("group_topk_over_it" in cases[name]) == (":" in name)
    other = cases["4:8 topk per group (Wanda)"]
    assert cases["4:8"]["group_topk_over_it"] == pytest.approx(other["value"] / cases["4:8"]["value"], rel=1e-4)
    assert "sort_over_it" not in cases["accumulate"]


def test_kernel_baselines_prune_what_they_should(tool: ModuleType) -> None:
    kernels = importlib.import_module("bench_kernels")
    torch.manual_seed(1)
    w, f = torch.randn(8, 64), torch.rand(64) + 0.1
    lowest = (w.abs() * f).sort(dim=1)[1]
    expected = w.scatter(1, lowest[:, :32], 0)
    for prune in (kernels.wanda_sort, kernels.topk_scatter, kernels.numpy_partition):
        assert torch.equal(prune(w, f, 32), expected), prune.__name__
    of_groups = (w.abs() * f).reshape(8, 16, 4).sort(dim=2)[1]
    expected = w.reshape(8, 16, 4).scatter(2, of_groups[..., :2], 0).reshape(8, 64)
    for prune in (kernels.wanda_groups, kernels.topk_all_groups):
        assert torch.equal(prune(w, f, 2, 4), expected), prune.__name__


@pytest.mark.parametrize("more", [["--pattern", "2:4"], ["--sparsity", "0.5", "--cold"]])
def test_stats(
    tool: ModuleType,
    children: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
) -> None:
    words = ["stats", *TINY, "--layers", "2", "--repeat", "2", "--work", str(tmp_path), *more]
    cases = by_case(rows_of(tool, capsys, *words))
    assert cases.keys() == {"cp -r + fsync", "prune --stats, work", "prune --stats, whole process"}
    assert cases["prune --stats, work"]["min"] < cases["prune --stats, whole process"]["max"]
    on = cases["cp -r + fsync"]["on"]
    assert " ".join(more[:2]) in on and ("not in the page cache" in on) == ("--cold" in more)
    size = {row["gb_per_s"] * row["value"] for row in cases.values()}
    assert max(size) == pytest.approx(min(size), rel=1e-4)
    prunes = [c for c in children if c[2] == "prune"]
    assert len(prunes) == 3 and all("--stats" in c and more[1] in c for c in prunes)
    assert list(tmp_path.iterdir()) == []


def test_startup(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cases = by_case(rows_of(tool, capsys, "startup", "--repeat", "1", "--work", str(tmp_path)))
    assert next(iter(cases)) == "import torch, numba" and len(cases) == 5
    assert all(row["value"] > 0 and row["baseline"] == "import torch, numba" for row in cases.values())
    assert {c[2] for c in children if c[0] == "-m"} == {"calibrate", "eval", "prune"} and list(tmp_path.iterdir()) == []


def test_stats_of_a_given_checkpoint(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    maker = importlib.import_module("make_checkpoint")
    model, work = tmp_path / "model", tmp_path / "work"
    maker.write_checkpoint(model, 0, maker.Shape(64, 128, 1, 4, 2, 2048))
    work.mkdir()
    before = {path: path.read_bytes() for path in model.iterdir()}
    rows = rows_of(tool, capsys, "stats", "--checkpoint", str(model), "--repeat", "1", "--work", str(work))
    assert "1 layers of width 64" in rows[0]["on"] and all(c[3] == str(model) for c in children)
    assert list(work.iterdir()) == [] and {path: path.read_bytes() for path in model.iterdir()} == before


def test_calibration(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["calibration", *TINY, "--layers", "3", *FEW, "--repeat", "2", "--device", "cpu", "--work", str(tmp_path)]
    cases = by_case(rows_of(tool, capsys, *words))
    assert cases.keys() == {"bare forward", "streamed calibration"}
    tokens, linears = 3 * 32, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    for row in cases.values():
        assert row["tflop_per_s"] * row["value"] == pytest.approx(2e-12 * tokens * (linears + 32 * 64), rel=1e-4)
        assert row["percent_of_bare"] == pytest.approx(100 / row["ratio"], rel=1e-4)
        assert "3 x 32 tokens, 3 at a time" in row["on"]
    assert [c[1] for c in children] == ["calibrate"] * 3 and list(tmp_path.iterdir()) == []


def test_tuning(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["tuning", *TINY, "--samples", "4", "--seqlen", "32", "--repeat", "2", "--work", str(tmp_path)]
    cases = by_case(rows_of(tool, capsys, *words, "--device", "cpu"))
    assert cases.keys() == {"bare forward and backward", "an epoch of tuning"}
    assert all(row["percent_of_bare"] == pytest.approx(100 / row["ratio"], rel=1e-4) for row in cases.values())
    assert all("3 x 32 tokens, 1 at a time" in row["on"] for row in cases.values()), "one of four is held out"
    assert [c[1] for c in children] == ["prune"] * 3 and list(tmp_path.iterdir()) == []


def test_bare_layer_is_the_models_own(tool: ModuleType, tmp_path: Path) -> None:
    """Its output on the embeddings is what the whole model says of its first layer; the last batch is smaller."""
    from transformers import AutoModelForCausalLM

    maker, forward = importlib.import_module("make_checkpoint"), importlib.import_module("bench_forward")
    maker.write_checkpoint(tmp_path / "model", 0, maker.Shape(64, 128, 2, 4, 2, 2048))
    bare = forward.BareLayer(tmp_path / "model", forward.Batches(3, 16, 2, "float32", "cpu"))
    assert sorted(bare.states) == [1, 2] and bare.batches.sizes == [2, 1] and bare.seconds() > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        states = model(torch.arange(32).reshape(2, 16), output_hidden_states=True).hidden_states
        args, kwargs = bare.calls[2]
        assert args[0].shape == states[0].shape
        found = bare.layer(states[0], *args[1:], **kwargs)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, states[1])


def test_memory(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["memory", *TINY, "--layers", "2", "1", "--limits", "2", *FEW, "--repeat", "1", "--device", "cpu"]
    rows = rows_of(tool, capsys, *words, "--work", str(tmp_path))
    assert [row["case"] for row in rows[:2]] == ["1 layer", "2 layers"]
    assert {row["baseline"] for row in rows[:2]} == {"1 layer"} and rows[0]["checkpoint_mib"] < rows[1][
        "checkpoint_mib"
    ]
    limits = rows[2:]
    assert len(limits) == 2 and {row["baseline"] for row in limits} == {"the limit"}
    for row in limits:
        assert row["case"] == f"--max-ram {row['baseline_value']:.0f}MiB"
    assert limits[0]["baseline_value"] < limits[1]["baseline_value"] and limits[0]["batch"] <= limits[1]["batch"]
    assert all(row["unit"] == "MiB" and row["vmhwm_mib"] == 123 and row["seconds"] > 0 for row in rows)
    given = [c[c.index("--max-ram") + 1] for c in children if "--max-ram" in c]
    assert given[0] == "1MiB" and int(given[1]) < int(given[-1]) and list(tmp_path.iterdir()) == []


def test_a_real_child_process(tool: ModuleType, tmp_path: Path) -> None:
    """Seen from outside, a fresh process takes as much memory as it says, whatever this process holds."""
    ballast = torch.ones(1 << 28)  # 1 GiB, which getrusage would count as the child's
    arguments = ["--layers", "1", "--limits", "0", "--repeat", "1", *FEW, "--work", str(tmp_path), "--device", "cpu"]
    rig, jobs = importlib.import_module("bench_rig"), importlib.import_module("bench_jobs")
    (row,) = jobs.memory(tool.make_parser("memory").parse_args(["memory", *TINY, *arguments]))
    del ballast
    check(row)
    assert 100 < row["value"] < 1000 and row["vmhwm_mib"] == pytest.approx(row["value"], rel=0.02)
    assert list(tmp_path.iterdir()) == []
    ran = rig.run("-c", "import sys; sys.stderr.write('one\\ntwo\\n'); sys.exit(7)")
    assert ran.code == 7 and ran.seconds > 0
    with pytest.raises(rig.BenchError, match=r"^two$"):
        print(ran.result)


def test_end_to_end(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["end-to-end", *TINY, "--layers", "2", *FEW, "--repeat", "2", "--device", "cpu", "--work", str(tmp_path)]
    cases = by_case(rows_of(tool, capsys, *words))
    floor = "bare forward x 2 + cp"
    assert cases.keys() == {floor, "plan's prediction", "prune, work", "prune, whole process"}
    for row in cases.values():
        assert row["baseline"] == floor
        assert row["over_prune"] == pytest.approx(row["value"] / cases["prune, work"]["value"], rel=1e-4)
    assert cases["prune, work"]["peak_mib"] > 100 and cases["plan's prediction"]["peak_mib"] > 100
    assert [c[2] for c in children] == ["prune", "plan", "prune", "prune", "plan"]  # the second round backwards
    assert list(tmp_path.iterdir()) == []


def test_memory_of_a_gpu(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a GPU's answers in its place: from the least that the refusal names to what a free run takes."""
    jobs = importlib.import_module("bench_jobs")
    given: list[int | None] = []

    def call(verb: str, **arguments: Any) -> dict[str, Any]:
        limit = arguments["resources"].get("max_vram")
        given.append(limit)
        if limit == 1:
            raise jobs.BenchError("--max-vram 1 B is not enough: this job needs --max-vram 700MiB")
        Path(arguments["out"]).mkdir()
        return {"vram_bytes": {"reserved": 350 << 20, "allocated": 300 << 20, "device": 900 << 20}}

    monkeypatch.setattr(jobs, "call", call)
    words = ["memory", *TINY, "--limits", "3", "--repeat", "2", "--device", "cuda"]
    rows = list(jobs._by_vram(tool.make_parser("memory").parse_args(words), tmp_path, tmp_path / "model"))
    assert [row["case"] for row in rows] == ["--max-vram 700MiB", "--max-vram 800MiB", "--max-vram 900MiB"]
    assert given == [None, 1, *(mib << 20 for mib in (700, 700, 800, 800, 900, 900))]
    assert rows[0]["ratio"] == 0.5 and {row["device_mib"] for row in rows} == {900} and not list(tmp_path.iterdir())
    for row in rows:
        check(row)


def test_refits(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from streamprune.methods.refits import METHODS

    cases = by_case(rows_of(tool, capsys, "refits", "--shape", "8x64", "--repeat", "2", "--device", "cpu"))
    parts = {f"{name}, {part}" for name in METHODS for part in ("prepare", "rows")}
    assert cases.keys() == {"one product, float32", *parts}
    assert all(row["value"] > 0 and row["runs"] == 2 for row in cases.values())


def test_kernels_of_a_gpu(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels and its timer, both on the CPU: every case runs, times are those between two events."""
    from streamprune.kernels import torch_ops

    kernels = importlib.import_module("bench_kernels")
    recorded: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            recorded.append(len(recorded))
            self.at = recorded[-1]

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr("streamprune.kernels.cpu", torch_ops)
    timed = kernels._gpu_timer(torch.device("cpu"))
    cases = kernels.kernel_cases(8, 64, torch.bfloat16, torch.device("cpu"), True)
    assert cases.keys() >= KERNELS and [timed(work) for work in cases.values()] == [1.0] * len(cases)


def test_eval(
    tool: ModuleType, children: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Both take the same windows, or the benchmark refuses."""
    words = ["eval", *TINY, "--layers", "2", *FEW, "--repeat", "2", "--device", "cpu", "--work", str(tmp_path)]
    cases = by_case(rows_of(tool, capsys, *words))
    assert list(cases) == ["transformers, whole", "transformers, its pass", "eval"]
    assert all("3 windows of 32" in row["on"] and row["runs"] == 2 for row in cases.values())
    assert cases["eval"]["percent_of_theirs"] == pytest.approx(100 / cases["eval"]["ratio"], rel=1e-3)
    assert [c[2] for c in children] == ["eval"] * 3 and list(tmp_path.iterdir()) == []


# ---- all of them, and how results look


def test_peers(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another program, here one that copies the model, is given the windows that ours calibrates on."""
    peer = tmp_path / "python"
    peer.write_text(
        f"#!{sys.executable}\nimport json, shutil, sys\nimport numpy as np\njob = json.loads(sys.argv[2])\n"
        "assert np.load(job['ids']).shape == (4, 32) and job['method'] == 'sparsegpt'\n"
        "shutil.copytree(job['model'], job['out'])\n"
    )
    peer.chmod(0o755)
    words = ["peers", "--samples", "4", "--seqlen", "32", "--repeat", "1", "--json", "--work", str(tmp_path)]
    text = tmp_path / "text.txt"
    text.write_text(200 * "Some words to read. ")
    more = ["--peer", str(peer), "--methods", "obs-admm", "--text", str(text)]
    assert tool.main([*words, *more]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row["case"] for row in rows] == ["obs-admm, beside sparsegpt"] * 3
    assert [row["unit"] for row in rows] == ["s", "MiB", "perplexity"]
    assert all(row["ratio"] > 0 for row in rows)
    for wrong in (["--peer", "nowhere"], ["--peer", str(peer), "--methods", "magic"]):
        assert tool.main([*words, *wrong]) == 2


def test_all_runs_the_five(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every subcommand gets its small or quick shape, and the options that are common to all."""
    seen: dict[str, Any] = {}

    def stub(name: str) -> Any:
        def measured(arguments: Any) -> Iterator[dict[str, Any]]:
            seen[name] = arguments
            yield {"case": name}

        return measured

    for name, command in tool.COMMANDS.items():
        monkeypatch.setattr(importlib.import_module(command.module), command.measure, stub(name))
    for words in (["all"], ["all", "--quick"], ["all", "--repeat", "4", "--work", "/w", "--device", "cpu"]):
        seen.clear()
        rows = list(tool.measure(tool.make_parser("all").parse_args(words)))
        alone = [name for name in tool.COMMANDS if name not in tool.APART]
        assert [row["benchmark"] for row in rows] == [row["case"] for row in rows] == alone
        if "--repeat" in words:
            assert {(a.repeat, a.work, a.device) for a in seen.values()} == {(4, "/w", "cpu")}
    assert list(tool.COMMANDS) == [
        "kernels", "refits", "stats", "startup", "calibration", "tuning", "eval", "memory", "end-to-end", "ranks",
        "peers",
    ]  # fmt: skip


def test_tables(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["kernels", "--shape", "32x64", "--quick", "--repeat", "1", "--device", "cpu"]
    assert tool.main(words) == 0
    here, blank, title, _, head, line, *cases = capsys.readouterr().out.splitlines()
    assert "1 threads" in here and blank == "" and title == "kernels: 32x64 bfloat16 on cpu"
    assert head.split() == ["ms", "min", "…", "max", "÷", "memcpy", "min", "…", "max"]  # no empty columns
    assert set(line) == {"-", " "} and {case.split("  ")[0] for case in cases} >= KERNELS
    assert tool.main([*words, "--markdown"]) == 0
    _, _, title, _, head, line, *cases = capsys.readouterr().out.splitlines()
    assert title == "**kernels: 32x64 bfloat16 on cpu**" and head == "|  | ms | min … max | ÷ memcpy | min … max |"
    assert line == "| --- | ---: | ---: | ---: | ---: |" and all(case.count("|") == 6 for case in cases)


def test_figures_are_medians_and_ratios_of_rounds(tool: ModuleType) -> None:
    rig = importlib.import_module("bench_rig")
    row = rig.figure("a", [1.0, 9.0, 4.0], "b", [2.0, 3.0, 1.0], unit="s")
    assert (row["value"], row["min"], row["max"], row["baseline_value"], row["ratio"]) == (4, 1, 9, 2, 2)
    assert (row["ratio_min"], row["ratio_max"], row["runs"]) == (0.5, 4, 3)
    order: list[str] = []

    def measure(name: str) -> Any:
        return lambda: order.append(name) or {name: float(len(order))}  # type: ignore[func-returns-value]

    assert rig.interleaved([measure("x"), measure("y")], 3) == {"x": [1, 4, 5], "y": [2, 3, 6]}
    assert order == ["x", "y", "y", "x", "x", "y"]


# ---- what goes wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernels", "--shape", "64"], "--shape 64: write it as ROWSxINPUTS"),
        (["kernels", "--shape", "8x33"], "multiple of 32"),
        (["kernels", "--repeat", "0"], "--repeat 0: at least 1"),
        (["kernels", "--device", "nowhere"], "--device nowhere cannot be used"),
        (["stats", "--work", "/nowhere"], "--work /nowhere: no such folder"),
        (["stats", "--checkpoint", "/nowhere"], "--checkpoint /nowhere: its config.json"),
        (["stats", "--heads", "3"], "--hidden 2048 is not"),
        (["stats", *TINY, "--layers", "1", "--pattern", "4:2"], "4:2"),
        (["calibration", *TINY, "--layers", "1", *FEW], "--layers 2 or more"),
        (["ranks", "--ranks", "1"], "--ranks takes numbers from 2"),
        (["memory", "--layers", "0"], "--layers takes numbers from 1"),
        (["stats", "--no-such"], "--no-such"),
        (["nothing"], "nothing"),
    ],
)
def test_errors_are_one_line(
    tool: ModuleType,
    children: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    place = [] if {"--work", "--no-such", "nothing"} & set(words) else ["--work", str(tmp_path)]
    assert tool.main([*words, *place]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("bench: error: ") and errors.count("\n") == 1
    assert "Traceback" not in errors and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_met_before_anything_is_made(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    maker = importlib.import_module("bench_rig")
    monkeypatch.setattr(maker, "write_checkpoint", lambda *_: pytest.fail("a checkpoint was made"))
    for command in ("stats", "calibration", "end-to-end"):
        assert tool.main([command, *TINY, "--layers", "2", "--work", str(tmp_path)]) == 2
        errors = capsys.readouterr().err
        assert "0.00105 GB free" in errors and "--work DIR" in errors and errors.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    words = ["stats", *TINY, "--layers", "2", "--work", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOLS / "bench.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/checkpoint/*.index.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode()) == (130, "bench: error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


# ---- tools/make_checkpoint.py


def test_presets(tool: ModuleType, tmp_path: Path) -> None:
    maker = importlib.import_module("make_checkpoint")
    assert {"1b", "7b", "8b", "70b", "70b-layer"} <= maker.PRESETS.keys()
    layer, whole = maker.PRESETS["70b-layer"], maker.PRESETS["70b"]
    assert (layer.hidden, layer.intermediate, layer.heads, layer.kv_heads) == (8192, 28672, 64, 8)
    assert (layer.layers, layer.vocab) == (1, 32000) and layer.stages()[1] == whole.stages()[1]
    assert maker.PRESETS["7b"].nbytes == pytest.approx(2 * 6.74e9, rel=0.01)
    shape = maker.Shape(64, 128, 2, 4, 2, 2048)
    assert maker.write_checkpoint(tmp_path / "model", 0, shape) == shape.nbytes
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == 4 and shape.nbytes < sum(s.stat().st_size for s in shards) < shape.nbytes + 4 * 2048


def test_mixtures(tool: ModuleType, tmp_path: Path) -> None:
    maker = importlib.import_module("make_checkpoint")
    assert maker.PRESETS["8x7b"].nbytes == pytest.approx(2 * 46.7e9, rel=0.01)
    assert 22e9 < maker.PRESETS["256-experts"].nbytes < 24e9
    maker.write_checkpoint(tmp_path / "model", 0, maker.Shape(64, 128, 2, 4, 2, 2048, experts=3, routed=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_local_experts == 3 and model.config.num_experts_per_tok == 2
    found = inspect(tmp_path / "model").linears
    assert sum("experts" in linear.name for linear in found) == 2 * 3 * 3 and len(found) == 2 * (4 + 9)


def test_fp8(tool: ModuleType, tmp_path: Path) -> None:
    """Linears of layers, but no routers, in FP8 with block scales, of the values that bf16 would have had."""
    maker = importlib.import_module("make_checkpoint")
    shape = maker.Shape(128, 256, 1, 4, 2, 2048, experts=2, routed=1)
    made = {fp8: maker.write_checkpoint(tmp_path / str(fp8), 0, shape, fp8=fp8) for fp8 in (False, True)}
    assert made[False] > 1.15 * made[True]
    plain, quantised = (open_checkpoint(tmp_path / name) for name in ("False", "True"))
    coded = {ref.name for ref in quantised.tensors.values() if ref.dtype == "F8_E4M3"}
    assert len(coded) == 4 + 2 * 3 and not any("gate" in name or "embed" in name for name in coded)
    assert computable(quantised).tensors.keys() == plain.tensors.keys()
    found = [inspect(tmp_path / str(fp8)).linears for fp8 in (False, True)]
    assert [linear.shape for linear in found[0]] == [linear.shape for linear in found[1]]


def test_shapes_that_do_not_fit(
    tool: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = importlib.import_module("make_checkpoint")
    for wrong in (
        ["--layers", "0"],
        ["--heads", "3"],
        ["--kv-heads", "3"],
        ["--vocab", "100"],
        ["--experts", "-1"],
        ["--routed", "3", "--experts", "2"],
    ):
        monkeypatch.setattr(sys, "argv", ["make_checkpoint", str(tmp_path / "model"), *wrong])
        assert maker.main() == 2
        errors = capsys.readouterr().err
        assert wrong[0] in errors and errors.count("\n") == 1 and list(tmp_path.iterdir()) == []
