"""streamprune as a model of lm-eval, on tasks in local files: the numbers of its own `hf` model, from one pass."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import evaluate_tasks, prune
from families import VOCAB
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import streamprune
from streamprune.cli import main
from streamprune.errors import UsageError
from streamprune.evaluation import tasks as module
from streamprune.evaluation.tasks import TaskEvaluation

Models = Callable[..., Path]
PLACE = Path(streamprune.__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")
with_lm_eval = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="takes lm_eval: pip install '.[tasks]'"),
    pytest.mark.filterwarnings("default"),
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}", train: "{file}"}}}}
output_type: {kind}
test_split: test
fewshot_split: train
doc_to_text: context
metric_list: [{metrics}]
"""
CHOICE = "doc_to_choice: choices\ndoc_to_target: gold\n"
ACC = "{metric: acc, aggregation: mean, higher_is_better: true}"
NORM = "{metric: acc_norm, aggregation: mean, higher_is_better: true}"
GROUP = "group: mine\ntask: [choose, letters]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of each kind: choices of some words and of one, a last word, whole texts, and generated ones."""
    place = tmp_path_factory.mktemp("tasks")
    draw = np.random.default_rng(1)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(3, VOCAB, draw.integers(low, high)))

    def task(name: str, kind: str, documents: list[dict[str, Any]], metrics: str, more: str) -> None:
        (place / f"{name}.json").write_text("\n".join(map(json.dumps, documents)))
        text = TASK.format(name=name, file=place / f"{name}.json", kind=kind, metrics=metrics)
        (place / f"{name}.yaml").write_text(text + more)

    for name, count, longest in (("choose", 15, 6), ("letters", 9, 2)):
        documents = [
            {"context": words(1, 40), "choices": [words(1, longest) for _ in range(4)], "gold": int(draw.integers(4))}
            for _ in range(count)
        ]
        task(name, "multiple_choice", documents, f"{ACC}, {NORM}", CHOICE)
    documents = [{"context": words(1, 30), "end": f" {words(1, 3)}"} for _ in range(8)]
    task("last", "loglikelihood", documents, f"{{metric: perplexity}}, {ACC}", "doc_to_target: end\n")
    documents = [{"page": words(*size)} for size in ((5, 9), (60, 64), (150, 190))]
    task("pages", "loglikelihood_rolling", documents, "{metric: word_perplexity}", "doc_to_target: page\n")
    (place / "pages.yaml").write_text(
        (place / "pages.yaml").read_text().replace("doc_to_text: context", 'doc_to_text: ""')
    )
    task("write", "generate_until", documents, "{metric: exact_match}", "doc_to_target: page\n")
    (place / "group.yaml").write_text(GROUP)
    return place


@pytest.fixture(scope="module")
def speaking(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """speaking(kind, adds=False): a model whose tokenizer has BOS and EOS, and may put BOS before every text."""
    made: dict[tuple[str, bool], Path] = {}

    def get(kind: str = "llama", adds: bool = False) -> Path:
        if (kind, adds) not in made:
            folder = tmp_path_factory.mktemp("speaking") / "model"
            shutil.copytree(models(kind, layers=2, dtype="float32"), folder)
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            if adds:
                tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
            tokenizer.save(str(folder / "tokenizer.json"))
            config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w1", "eos_token": "w2"}
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
            made[kind, adds] = folder
        return made[kind, adds]

    return get


class OfHf:
    """What lm-eval itself finds, with its `hf` model on the CPU."""

    def __init__(self, model: Path, folder: Path, tasks: list[str], **more: Any) -> None:
        import lm_eval

        given = {"pretrained": str(model), "dtype": "float32", **more}
        found = lm_eval.simple_evaluate(
            "hf", given, tasks=tasks, device="cpu", batch_size=4, bootstrap_iters=10,
            task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        )  # fmt: skip
        self.results, self.samples = found["results"], found["samples"]

    def check(self, found: TaskEvaluation) -> None:
        """The same values; and the errors of means, where lm-eval has no bootstrap."""
        assert found.scores
        for s in found.scores:
            theirs = self.results[s.task]
            assert s.value == pytest.approx(theirs[f"{s.metric},{s.filter}"], rel=1e-4), s
            if s.stderr is not None and s.task != "mine":
                assert s.stderr == pytest.approx(theirs[f"{s.metric}_stderr,{s.filter}"], rel=1e-6), s


def scores_of(found: TaskEvaluation) -> dict[tuple[str, str], Any]:
    return {(s.task, s.metric): s for s in found.scores}


class TestWithLmEval:
    pytestmark = with_lm_eval

    @pytest.mark.parametrize(
        ("kind", "adds", "bos"), [("llama", False, "auto"), ("gpt2", True, "auto"), ("mixtral", True, "never")]
    )
    def test_equals_lm_evals_own_model(
        self, speaking: Models, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        kind: str, adds: bool, bos: str,
    ) -> None:  # fmt: skip
        """All kinds of requests in one pass; contexts that are too long, and documents of many windows, too."""
        from streamprune.evaluation import harness

        passes: list[list[Any]] = []
        likelihoods = harness.likelihoods

        def watched(model: Path, requests: list[Any], **more: Any) -> Any:
            passes.append(requests)
            return likelihoods(model, requests, **more)

        monkeypatch.setattr(harness, "likelihoods", watched)
        model, names = speaking(kind, adds), ["mine", "last", "pages"]
        wanted = OfHf(model, folder, names, **({"add_bos_token": False} if bos == "never" else {}))
        found = evaluate_tasks(model, names, include_path=folder, dtype="float32", bos=bos, work=tmp_path)
        wanted.check(found)
        assert {s.task for s in found.scores} == {"mine", "choose", "letters", "last", "pages"}
        assert len(passes) == 1 and found.requests == len(passes[0]) and found.sequences < found.requests
        assert scores_of(found)["mine", "acc"].stderr is not None
        assert scores_of(found)["last", "perplexity"].stderr is None
        assert list(tmp_path.iterdir()) == []

    def test_each_requests_likelihood(self, speaking: Models, folder: Path, tmp_path: Path) -> None:
        """Not only what metrics make of them."""
        from lm_eval.api.instance import Instance

        from streamprune.evaluation.harness import StreampruneLM

        model = speaking()
        samples = OfHf(model, folder, ["choose", "last"]).samples
        lm = StreampruneLM(model, dtype="float32", work=tmp_path)
        for of_task in samples.values():
            for sample in of_task:
                asked = [Instance("loglikelihood", {}, tuple(a), 0) for a in sample["arguments"]]
                for ours, (theirs,) in zip(lm.loglikelihood(asked), sample["resps"], strict=True):
                    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[1] == theirs[1]

    def test_texts_that_begin_with_bos(self, speaking: Models, tmp_path: Path) -> None:
        """By themselves, because the tokenizer puts it there, or because it is asked for; never twice."""
        from streamprune.evaluation.harness import StreampruneLM

        for adds, flag, wanted in [
            (False, None, [7, 8]), (True, None, [1, 7, 8]), (False, True, [1, 7, 8]), (True, True, [1, 7, 8]),
            (False, False, [7, 8]), (True, False, [7, 8]),
        ]:  # fmt: skip
            lm = StreampruneLM(speaking(adds=adds), add_bos_token=flag, work=tmp_path)
            assert lm.tok_encode("w7 w8") == wanted
            assert lm.tok_encode("w1 w7 w8") == [1, 7, 8]
            assert lm.tok_encode("w7 w8", add_special_tokens=False) == [7, 8]

    def test_examples_and_limits(self, speaking: Models, folder: Path, tmp_path: Path) -> None:
        """Examples before each document, the same every time."""
        model = speaking()
        given: dict[str, Any] = {"include_path": folder, "dtype": "float32", "work": tmp_path}
        shots = [evaluate_tasks(model, "letters", num_fewshot=2, limit=0.5, **given).scores for _ in range(2)]
        assert shots[0] == shots[1] and {(s.num_fewshot, s.documents) for s in shots[0]} == {(2, 5)}
        few = evaluate_tasks(model, "letters,choose", limit=3, **given)
        assert {s.documents for s in few.scores} == {3}

    def test_difference_to_a_reference(self, speaking: Models, folder: Path, text: Path, tmp_path: Path) -> None:
        dense = speaking()
        prune(dense, tmp_path / "out", sparsity=0.5, calib=text, samples=4, seqlen=24)
        given: dict[str, Any] = {"include_path": folder, "dtype": "float32", "work": tmp_path / "work"}
        names: list[str] = []
        found = evaluate_tasks(
            tmp_path / "out", "mine,pages", reference=dense, progress=lambda s: names.append(s.name), **given
        )
        assert names == [w + s for w in ("", "reference ") for s in ("embed", "layer 0", "layer 1", "head")]
        here, there = (scores_of(evaluate_tasks(m, "mine,pages", **given)) for m in (tmp_path / "out", dense))
        for key, s in scores_of(found).items():
            assert (s.value, s.stderr) == (here[key].value, here[key].stderr)
            assert (s.reference, s.reference_stderr) == (there[key].value, there[key].stderr)
            assert s.difference == pytest.approx(s.value - s.reference)
            assert (s.difference_stderr is None) == (key[0] == "pages")
        same = evaluate_tasks(dense, "mine,pages", reference=dense, **given)
        assert {(s.difference, s.difference_stderr) for s in same.scores} == {(0.0, 0.0), (0.0, None)}

    def test_what_is_refused(self, speaking: Models, folder: Path, tmp_path: Path) -> None:
        model = speaking()
        for names, more, why in [
            ("chose", {}, "knows no such task; did you mean choose"),
            ("choose,write", {}, "write: asks for generated text"),
            ("choose", {"include_path": folder / "nothing"}, "no such folder"),
            (" , ", {}, "--tasks names no task"),
            ("choose", {"limit": 0.0}, "--limit 0 leaves no document"),
            ("choose", {"bos": "perhaps"}, "--bos perhaps"),
            ("choose", {"seqlen": 65}, "--seqlen 65"),
        ]:
            with pytest.raises(UsageError, match=why):
                evaluate_tasks(model, names, **{"include_path": folder, "work": tmp_path / "work", **more})
        (tmp_path / "broken.yaml").write_text(
            TASK.format(name="broken", file="/nowhere", kind="loglikelihood", metrics=ACC)
        )
        with pytest.raises(UsageError, match="--tasks broken: lm_eval cannot load them: FileNotFoundError"):
            evaluate_tasks(model, "broken", include_path=tmp_path, work=tmp_path / "work")
        assert not (tmp_path / "work").exists()

    def test_by_the_command_line(
        self, speaking: Models, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Nothing of lm-eval's own is printed."""
        given = ["--include-path", str(folder), "--work", str(tmp_path), "--tasks", "letters", "--quiet"]
        model = str(speaking())
        capsys.readouterr()
        assert main(["eval", model, *given]) == 0
        shown = capsys.readouterr()
        assert re.search(r"^letters +acc +0\.\d{4} ± 0\.\d{4} +9$", shown.out, re.MULTILINE) and shown.err == ""
        assert main(["eval", model, *given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found) == [
            "model", "scores", "requests", "sequences", "tokens", "truncated", "seconds", "peak_rss_bytes", "lm_eval",
        ]  # fmt: skip
        assert list(found["scores"][0]) == [
            "task", "metric", "filter", "value", "stderr", "documents", "num_fewshot", "higher_is_better",
        ]  # fmt: skip

    def test_by_lm_evals_command_line(self, speaking: Models, folder: Path, tmp_path: Path) -> None:
        """Releases that look for no models of others are told by ours; and generating is refused with a word."""
        out = tmp_path / "out"
        model = f"pretrained={speaking()},max_ram=4GiB,dtype=float32,work={tmp_path / 'work'}"
        words = [
            sys.executable,
            "-m",
            "streamprune.evaluation.lm_eval",
            "--model",
            "streamprune",
            "--model_args",
            model,
        ]
        words += ["--include_path", str(folder), "--output_path", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(PLACE), "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [*words, "--tasks", "choose,pages"], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        (result,) = out.rglob("results_*.json")
        found = json.loads(result.read_text())["results"]
        expected = evaluate_tasks(speaking(), "choose,pages", include_path=folder, dtype="float32")
        for s in expected.scores:
            assert found[s.task][f"{s.metric},{s.filter}"] == pytest.approx(s.value, rel=1e-6)
        assert list((tmp_path / "work").iterdir()) == []
        done = subprocess.run(
            [*words, "--tasks", "write"], capture_output=True, text=True, check=False, env=environment
        )
        assert (
            done.returncode != 0 and "write: asks for generated text, and streamprune only scores text" in done.stderr
        )

    def test_its_entry_point(self) -> None:
        """What later releases of lm-eval look for."""
        from lm_eval.api.registry import get_model

        from streamprune.evaluation.harness import StreampruneLM

        project = tomllib.loads((PLACE / "pyproject.toml").read_text())["project"]
        place, _, name = project["entry-points"]["lm_eval.models"]["streamprune"].partition(":")
        assert getattr(importlib.import_module(place), name) is StreampruneLM is get_model("streamprune")
        assert get_model("dummy")  # theirs are still found


def test_without_lm_eval(models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    model = models("llama", layers=2)
    capsys.readouterr()
    assert main(["eval", str(model), "--tasks", "hellaswag"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("takes the package lm_eval, which is not here: pip install 'streamprune[tasks]'")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tasks", "a", "--windows", "3"], "--windows is for --text"),
        (["--tasks", "a", "--by-window"], "--by-window is for --text"),
        (["--tasks", "a", "--text-field", "body"], "--text-field is for --text"),
        (["--text", "a", "--by-window"], "--by-window adds to what --json prints"),
        (["--text", "a", "--limit", "3"], "--limit is for --tasks"),
        (["--text", "a", "--num-fewshot", "0"], "--num-fewshot is for --tasks"),
        (["--text", "a", "--include-path", "x"], "--include-path is for --tasks"),
        (["--text", "a", "--tasks", "x"], "not allowed with"),
        ([], "one of the arguments --text --tasks is required"),
    ],
)
def test_what_does_not_go_together(
    models: Models, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    try:
        code = main(["eval", str(models("llama", layers=2)), *words])
    except SystemExit as e:
        code = int(str(e.code))
    assert code == 2 and why in capsys.readouterr().err
