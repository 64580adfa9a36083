"""The command line as a user meets it: transcripts, JSON, progress, exit codes, help, and how little it imports."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, prune

from streamprune import arguments
from streamprune.cli import build_parser, main
from streamprune.disk.cache import CacheReader
from streamprune.errors import UsageError
from streamprune.pruning import job
from streamprune.pruning.announce import next_steps

Models = Callable[..., Path]
WINDOW = ["--samples", "3", "--seqlen", "16"]

pytestmark = pytest.mark.usefixtures("one_thread")


class Run:
    """One command's exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *args: object) -> None:
        capsys.readouterr()
        self.code = main([str(a) for a in args])
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    return lambda *args: Run(capsys, *args)


# ---- transcripts


def test_prune(models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    args = ["prune", models(), tmp_path / "out", "--pattern", "2:4", "--calib", text, *WINDOW]
    first = run(*args)
    assert first.code == 0
    assert re.fullmatch(
        r"\S+/out: done \(swiftprune, 50\.00 % of the weights in pruned linears, [\d.]+ s, peak [\d.]+ [MG]iB\)\n",
        first.out,
    )
    names = ["embed", "layer 0", "layer 1", "layer 2", "head"]
    lines = first.err.splitlines()
    assert [re.sub(r" [\d.]+ s(, about .* left)?$", "", line) for line in lines[4:-3]] == [
        f"prune: {i}/5 {n}" for i, n in enumerate(names, 1)
    ]
    assert re.fullmatch(
        rf"prune: {models()}: llama, [\d.]+ k parameters, 21 linears to prune in 3 layers\n"
        r"prune: swiftprune, 2:4\n"
        rf"prune: calibrated on 3 windows of 16 tokens of {text.name}, with inputs of the dense model\n"
        r"prune: bfloat16 on cpu, 3 windows at a time; about [\d.]+ [MG]iB of memory; "
        r"[\d.]+ KiB of disk for the output, 6 KiB for activations meanwhile",
        "\n".join(lines[:4]),
    ), lines[:4]  # fmt: skip
    assert lines[-3:] == [
        f"prune: measure it: python -m streamprune eval {tmp_path}/out --text FILE --reference {models()}",
        f"prune: look into it: python -m streamprune inspect {tmp_path}/out --expect 2:4",
        f"prune: load it: transformers.AutoModelForCausalLM.from_pretrained('{tmp_path}/out', dtype=\"auto\")",
    ]
    second = run(*args)
    assert (second.code, second.err) == (0, "")
    assert second.out == f"{tmp_path}/out: up-to-date (swiftprune, 50.00 % of the weights in pruned linears)\n"


def test_what_to_do_next_can_be_pasted_into_a_shell() -> None:
    """Whatever the folders are called."""
    lines = next_steps("-model", Path("-my out"), {"pattern": "2:4"})
    commands = [shlex.split(line.partition("python -m streamprune ")[2]) for line in lines[:2]]
    for words in commands:
        assert build_parser().parse_args(words).model == "./-my out"
    assert build_parser().parse_args(commands[0]).reference == "./-model"


def test_prune_json(models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    args = ["prune", models(), tmp_path / "out", "--sparsity", "0.25", "--method", "wanda", "--calib", text, *WINDOW]
    first = run(*args, "--json").json
    assert list(first) == ["status", "out", "recipe", "sparsity", "seconds", "peak_rss_bytes"]
    report = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert first == {
        "status": "done", "out": str(tmp_path / "out"), "recipe": "wanda", "sparsity": 0.25,
        "seconds": report["seconds"], "peak_rss_bytes": report["peak_rss_bytes"],
    }  # fmt: skip
    second = run(*args, "--json", "--quiet")
    assert second.err == ""
    assert second.json["status"] == "up-to-date" and second.json["sparsity"] == 0.25


def test_calibrate(models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    args = ["calibrate", models(), tmp_path / "stats", "--calib", text, *WINDOW]
    first = run(*args)
    assert first.code == 0
    assert re.fullmatch(r"\S+/stats: done \([\d.]+ s, peak [\d.]+ [MG]iB\)\n", first.out)
    assert [line.split()[1] for line in first.err.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    assert run(*args).out == f"{tmp_path}/stats: up-to-date\n"
    again = run(*args, "--json").json
    assert list(again) == ["status", "out", "seconds", "peak_rss_bytes"]
    assert again["status"] == "up-to-date"
    used = run("prune", models(), tmp_path / "out", "--sparsity", "0.5", "--stats", tmp_path / "stats", "--json")
    assert used.json["status"] == "done"


def test_eval(models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    args = ["eval", models(), "--text", text, "--seqlen", "32", "--work", tmp_path]
    shown = run(*args)
    assert shown.code == 0
    assert re.fullmatch(
        r"perplexity [\d.]+  \(2883 tokens in 93 windows of 32, [\d.]+ s, peak [\d.]+ [MG]iB\)\n", shown.out
    )
    *stages, last = shown.err.splitlines()
    assert last == f"eval: {models()}: dense (it has no streamprune.json)"
    assert [line.split()[0:2] for line in stages] == [["eval:", f"{i}/5"] for i in range(1, 6)]
    found = run(*args, "--json", "--quiet")
    assert found.err == ""
    assert {"perplexity", "tokens", "seconds", "peak_rss_bytes", "model", "text"} <= found.json.keys()
    assert found.json["tokens"] == 2883
    assert f"{found.json['perplexity']:.3f}" == shown.out.split()[1]


def test_eval_says_what_was_done_to_a_model(
    models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    prune(models(), out, sparsity=0.25, method="magnitude")
    common = ["--text", text, "--seqlen", "32", "--windows", "1"]
    shown = run("eval", out, "--reference", models(), *common).err.splitlines()
    assert shown[-2:] == [
        f"eval: {out}: magnitude, 25 % of each row, 25.00 % of the weights in pruned linears",
        f"eval: {models()}: dense (it has no streamprune.json)",
    ]
    assert run("eval", out, *common, "--quiet").err == ""
    for damaged, said in (("{", "cannot be read"), ('{"format": "streamprune-report", "version": 1}', "")):
        (out / "streamprune.json").write_text(damaged)
        found = run("eval", out, *common)
        assert found.code == 0 and found.err.splitlines()[-1].startswith(f"eval: {out}: its streamprune.json {said}")


def test_a_selector_beside_a_pattern(models: Models, tmp_path: Path, run: Callable[..., Run]) -> None:
    """It selects nothing there, and that is said."""
    args = ["prune", models(), tmp_path / "out", "--method", "magnitude", "--pattern", "2:4"]
    note = "streamprune: note: --pattern 2:4 keeps the highest scores of each group, whatever the selector is, so that "
    assert f"{note}--selector ewma made no difference\n" in run(*args, "--selector", "ewma").err
    assert "selector" not in run(*args).err
    assert run(*args, "--selector", "ewma", "--quiet").err == ""
    assert "selector" not in run("plan", models(), "--sparsity", "0.5", "--selector", "exact").err


def test_a_pass_whose_results_nothing_would_use(models: Models, tmp_path: Path, run: Callable[..., Run]) -> None:
    args = ["plan", models(), "--method", "magnitude", "--propagate"]
    found = run(*args, "pruned")
    assert found.code == 2 and "--propagate pruned is about calibration, and magnitude needs none" in found.err
    for more in (["dense"], ["pruned", "--refit", "cg"], ["pruned", "--quantize", "fp8", "--fp8-scale", "mse"]):
        assert run(*args, *more).code == 0


@pytest.mark.parametrize(
    ("amount", "said"),
    [(1.5, "sparsity 1.5 is not a fraction"), (50, "did you mean 0.5?"), (None, "sparsity None is not a number")],
)
def test_amounts_that_are_none(models: Models, tmp_path: Path, amount: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        job.prune(models(), tmp_path / "out", amount)


def test_resumed_work_is_told(
    models: Models, text: Path, tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["prune", models(), tmp_path / "out", "--sparsity", "0.5", "--calib", text, *WINDOW]
    with monkeypatch.context() as patch:
        patch.setattr("streamprune.progress._Lines.__call__", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert run(*args).code == 130
    assert re.search(r"^prune: [1-4] of 5 stages are done already$", run(*args).err, re.MULTILINE)


def test_inspect(models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    dense = run("inspect", models())
    assert dense.code == 0 and dense.err == ""
    assert dense.out.startswith("linear ") and "model.layers.2.mlp.down_proj" in dense.out
    wrong = run("inspect", models(), "--expect", "2:4")
    assert wrong.code == 2 and wrong.out.endswith("expected 2:4: NO\n")
    assert 1 <= len(wrong.err.splitlines()) <= 10
    prune(models(), tmp_path / "out", pattern="2:4", calib=text, samples=2, seqlen=16)
    right = run("inspect", tmp_path / "out", "--expect", "2:4", "--json")
    assert (right.code, right.err) == (0, "")
    assert right.json["ok"] is True and right.json["totals"]["sparsity"] == 0.5
    quiet = run("inspect", tmp_path / "out", "--expect", "2:4", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_plan(models: Models, tmp_path: Path, run: Callable[..., Run]) -> None:
    shown = run("plan", models(), *WINDOW)
    assert (shown.code, shown.err) == (0, "")
    for word in ("llama", "layer 0 … 2", "peak RAM", "disk", "arithmetic", "time  "):
        assert word in shown.out
    found = run("plan", models(), *WINDOW, "--json").json
    assert {"stages", "peak_ram_bytes", "vram_bytes", "disk_bytes", "seconds", "least_ram_bytes"} <= found.keys()
    assert run("plan", models(), "--quiet").out == ""


def test_demo(run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo as it is, on a short text and few samples."""
    from streamprune import demo

    text = tmp_path / "short.txt"
    text.write_text("The demo runs on a short text here, and says what it found. " * 20)
    evaluate = demo.evaluate
    monkeypatch.setattr(demo, "SAMPLES", 2)
    monkeypatch.setattr(demo, "SEQLEN", 32)
    monkeypatch.setattr(demo, "evaluate", lambda model, _, **more: evaluate(model, text, **more))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    found = run("demo", "--json", "--quiet")
    assert (found.code, found.err) == (0, "")
    rows = json.loads(found.out)
    assert isinstance(rows, dict), "one JSON object, as of every command"
    models = rows["models"]
    assert [m["sparsity"] for m in models] == pytest.approx([0, 0.5, 0.5, 0.5], abs=0.01)
    assert models[2]["pattern"] == "2:4"
    assert all(m["perplexity"] > 1 and m["peak_rss_bytes"] > 1 << 20 for m in models)


def test_quiet_says_nothing(models: Models, text: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    common = ["--calib", text, *WINDOW, "--quiet"]
    for args in (
        ["prune", models(), tmp_path / "out", "--sparsity", "0.5", *common],
        ["prune", models(), tmp_path / "out", "--sparsity", "0.5", *common],
        ["calibrate", models(), tmp_path / "stats", *common],
    ):
        done = run(*args)
        assert (done.code, done.out, done.err) == (0, "", "")
    shown = run("eval", models(), "--text", text, "--seqlen", "32", "--quiet")
    assert shown.err == "" and shown.out.startswith("perplexity ")  # the result is no summary


def test_a_bar_on_a_terminal(
    models: Models, text: Path, tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = run("calibrate", models(), tmp_path / "stats", "--calib", text, *WINDOW)
    assert done.code == 0
    assert "calibrate" in done.err and "\r" in done.err and "prune: 1/" not in done.err
    quiet = run("calibrate", models(), tmp_path / "more", "--calib", text, *WINDOW, "--quiet")
    assert quiet.err == ""


# ---- help


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def test_commands() -> None:
    names = "prune calibrate eval inspect plan report pack unpack upload demo"
    assert list(commands()) == names.split()


@pytest.mark.parametrize("name", commands())
def test_help_of_every_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = commands()[name]
    for action in parser._actions:
        assert action.help and action.help != argparse.SUPPRESS, f"{name} {action.option_strings or action.dest}"
        assert action.option_strings or action.metavar
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {"--json", "--quiet", "--debug", "--help"} <= flags
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for flag in flags:
        assert flag in shown
    for code in (0, 1, 2, 3, 4, 5, 6, 7, 75, 130):
        assert re.search(rf"^  {code}\s+\S", shown, re.MULTILINE), code


def test_help_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name, parser in commands().items():
        assert re.search(rf"^\s+{name}\s+\S", shown, re.MULTILINE)
        assert parser.description
    assert "exit codes:" in shown


def test_exit_codes_are_those_of_the_errors() -> None:
    from streamprune import errors

    listed = {int(line.split()[0]) for line in arguments.EXIT_CODES.splitlines()[1:] if line.strip()[:1].isdigit()}
    tree = {kind.exit_code for kind in errors.StreampruneError.__subclasses__()}
    assert listed == tree | {0, 1, errors.INTERRUPTED}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"streamprune \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "args", [[], ["prune"], ["nonsense"], ["prune", "a"], ["eval", "a"], ["plan", "a", "--json=1"]]
)
def test_wrong_usage_is_one_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert shown.err.startswith("streamprune: error: ") and "--help" in shown.err


def test_abbreviated_flags_are_refused_or_unique(run: Callable[..., Run], models: Models) -> None:
    """--s could be seven flags."""
    with pytest.raises(SystemExit) as stop:
        run("prune", models(), "out", "--s", "0.5")
    assert stop.value.code == 2


# ---- ends


@pytest.mark.parametrize("verb", ["prune", "eval"])
def test_interrupt(
    verb: str, models: Models, text: Path, tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM and Ctrl-C end with 130 and one line; the same command resumes."""

    read = CacheReader.__getitem__

    def stop(reader: CacheReader, chunk: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(reader, chunk)

    before = signal.getsignal(signal.SIGTERM)
    args: list[object] = ["eval", models(), "--text", text, "--seqlen", "32", "--work", tmp_path]
    if verb == "prune":
        args = ["prune", models(), tmp_path / "out", "--sparsity", "0.5", "--calib", text, *WINDOW]
    with monkeypatch.context() as patch:
        patch.setattr(CacheReader, "__getitem__", stop)
        done = run(*args, "--quiet")
    assert done.code == 130 and done.out == ""
    assert len(done.err.splitlines()) == 1 and done.err.startswith("streamprune: error: interrupted")
    assert ("resume" in done.err) == (verb == "prune")
    assert signal.getsignal(signal.SIGTERM) is before
    if verb == "prune":
        assert (tmp_path / "out.partial").is_dir()
        assert run(*args, "--json", "--quiet").json["status"] == "done"
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away(models: Models, text: Path) -> None:
    """`streamprune inspect MODEL | head -1`: no traceback."""
    done = subprocess.run(
        f"'{sys.executable}' -m streamprune inspect '{models()}' | true",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [("inspect", ""), ("inspect --json", "1"), ("--help", ""), ("--version", "")]
)
def test_output_onto_a_full_disk(models: Models, arguments: str, unbuffered: str) -> None:
    """One line that says what is wrong, and the code of what there is not enough of."""
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    model = [str(models())] if "inspect" in arguments else []
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "streamprune", *arguments.split(), *model], stdout=full, stderr=subprocess.PIPE,
            text=True, check=False, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    said = "streamprune: error: the output cannot be written: No space left on device; send it elsewhere\n"
    assert (done.returncode, done.stderr) == (5, said)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_for_a_reader_that_has_gone_away(option: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "streamprune", option], stdout=writing, stderr=subprocess.PIPE, text=True,
            check=False, env={**os.environ, "PYTHONUNBUFFERED": ""},
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.stderr == ""


# ---- what is imported

LOOK = "print([m for m in ('torch', 'transformers', 'numba', 'numpy', 'huggingface_hub') if m in sys.modules])"


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, streamprune.__main__ as m\ntry:\n    m.run()\nexcept SystemExit:\n    {LOOK}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: streamprune") and done.stdout.endswith("[]\n")


def test_a_finished_job_imports_nothing_heavy(models: Models, text: Path, tmp_path: Path) -> None:
    """Whoever runs a finished job again has the answer at once, not after torch has been loaded."""
    how = {"calib": text, "samples": 2, "seqlen": 16}
    prune(models(), tmp_path / "half", sparsity=0.5, **how)  # type: ignore[arg-type]
    calibrate(models(), tmp_path / "stats", **how)  # type: ignore[arg-type]
    prune(models(), tmp_path / "given", sparsity=0.5, stats=tmp_path / "stats")
    prune(models(), tmp_path / "2of4", pattern="2:4", **how)  # type: ignore[arg-type]
    window = ["--calib", str(text), "--samples", "2", "--seqlen", "16"]
    runs = [
        ["prune", str(models()), str(tmp_path / "half"), "--sparsity", "0.5", *window],
        ["prune", str(models()), str(tmp_path / "given"), "--sparsity", "0.5", "--stats", str(tmp_path / "stats")],
        ["prune", str(models()), str(tmp_path / "2of4"), "--pattern", "2:4", *window],
        ["calibrate", str(models()), str(tmp_path / "stats"), *window],
    ]
    code = (
        f"import sys\nfrom streamprune.cli import main\nfor args in {runs!r}:\n    assert main(args) == 0\n    {LOOK}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert all("up-to-date" in line for line in lines[::2]) and len(lines) == 8
    assert lines[1::2] == ["[]"] * 4


# ---- memory


@pytest.mark.slow
def test_memory_does_not_grow_with_layers(models: Models, text: Path, tmp_path: Path) -> None:
    """Eight layers take no more memory than two: their weights, 24 MiB a layer, come and go."""
    from transformers import AutoConfig, AutoModelForCausalLM

    prune(
        models(dtype="float32"), tmp_path / "warm", sparsity=0.5, calib=text, samples=2, seqlen=16
    )  # compiles kernels
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 1000, 5000))
    peaks = []
    for layers in (2, 8):
        config = AutoConfig.for_model(
            "llama", vocab_size=1000, hidden_size=512, intermediate_size=3072, num_hidden_layers=layers,
            num_attention_heads=8, max_position_embeddings=256,
        )  # fmt: skip
        model = tmp_path / f"model{layers}"
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
        done = subprocess.run(
            [
                sys.executable, "-m", "streamprune", "prune", model, tmp_path / f"out{layers}", "--sparsity", "0.5",
                "--calib", ids, "--samples", "4", "--seqlen", "128", "--json", "--quiet",
            ],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(json.loads(done.stdout)["peak_rss_bytes"])
    weights = 6 * 4 * (4 * 512 * 512 + 3 * 512 * 3072)
    assert weights > 2 * (48 << 20)
    assert peaks[1] - peaks[0] < 48 << 20, peaks


def test_from_a_source_tree_that_is_not_installed(
    models: Models, tmp_path: Path, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No job fails at its end because nobody knows the program's version."""
    from importlib.metadata import PackageNotFoundError, version

    def known(package: str) -> str:
        if package == "streamprune":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr("streamprune.process.versions.version", known)
    assert run("prune", models(layers=1), tmp_path / "out", "--pattern", "2:4", "--method", "magnitude").code == 0
    assert run("pack", tmp_path / "out", tmp_path / "packed").code == 0
    for folder in ("out", "packed"):
        versions = json.loads((tmp_path / folder / "streamprune.json").read_text())["versions"]
        assert versions["streamprune"] == "not installed"
    assert arguments._version() == "not installed"
