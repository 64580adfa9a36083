"""The model card of an output: what it says, that the hub reads it, and that the source's own is kept beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from calls import calibrate, prune
from huggingface_hub import ModelCard
from mixtures import save_mixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune.disk.hub import hub_name
from streamprune.evaluation.evaluate import evaluate
from streamprune.inspection.inspect import inspect
from streamprune.packing.job import pack, unpack
from streamprune.pruning.card import _scalar, kept_as, metadata_of

Models = Callable[..., Path]
FAST: dict[str, Any] = {"sparsity": 0.5, "method": "magnitude"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(models: Models, tmp_path: Path) -> Path:
    """A model that may be changed."""
    return Path(shutil.copytree(models("llama", 2), tmp_path / "tiny-llama"))


def card_in(out: Path) -> ModelCard:
    """As the hub's own library reads it."""
    return ModelCard.load(out / "README.md")


def test_without_a_card_of_its_own(source: Path, text: Path, tmp_path: Path) -> None:
    how = {"pattern": "2:4", "calib": text, "samples": 4, "seqlen": 16}
    out = prune(source, tmp_path / "out", **how).out
    card = card_in(out)
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["streamprune", "pruned", "sparse", "2:4"],
    }  # fmt: skip
    for words in (
        "# tiny-llama, pruned", "2 of every 4 consecutive inputs are kept", "50.00 % of", "unchanged, bit for bit",
        "python -m streamprune prune tiny-llama OUT --pattern 2:4 --calib TEXT --samples 4 --seqlen 16",
        "4 windows of 16 tokens", "AutoModelForCausalLM.from_pretrained", "names a licence", "vllm serve", "torch 2",
    ):  # fmt: skip
        assert words in card.text, words
    assert "README.source" not in card.text and not (out / "README.source.md").exists()
    report = json.loads((out / "streamprune.json").read_text())
    assert "README.md" in {file["name"] for file in report["files"]} and "base_model" not in report


def test_what_the_text_is_called_does_not_matter(source: Path, text: Path, tmp_path: Path) -> None:
    """Equal words under another name give equal outputs, card included; the report has the name."""
    other = tmp_path / "other-name.txt"
    other.write_bytes(text.read_bytes())
    how = {"pattern": "2:4", "samples": 4, "seqlen": 16}
    one, two = (prune(source, tmp_path / path.stem, calib=path, **how).out for path in (text, other))
    assert (one / "README.md").read_bytes() == (two / "README.md").read_bytes()
    assert "other-name.txt" in (two / "streamprune.json").read_text()


def test_of_a_model_on_the_hub(source: Path, tmp_path: Path) -> None:
    """A folder in the hub's cache tells the model's name; its card the rest."""
    snapshot = tmp_path / "hub" / "models--some-org--tiny-llama" / "snapshots" / ("0123abcd" * 5)
    shutil.copytree(source, snapshot)
    theirs = (
        "\ufeff---\r\nlicense: other\r\nlicense_name: tiny\r\nlanguage: [en, no]\r\nbase_model: older/one\r\n"
        "base_model_relation: merge\r\ntags: [a]\r\n---\r\n# Theirs\r\n"
    ).encode()
    (snapshot / "README.md").write_bytes(theirs)
    out = prune(snapshot, tmp_path / "out", **FAST, quantize="fp8").out
    card = card_in(out)
    assert card.data.to_dict() == {
        "license": "other", "license_name": "tiny", "language": ["en", "no"], "base_model": "some-org/tiny-llama",
        "base_model_relation": "quantized", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["streamprune", "pruned", "sparse", "fp8", "compressed-tensors"],
    }  # fmt: skip
    assert "# some-org/tiny-llama, pruned" in card.text and "0123abcd" in card.text
    assert "pip install compressed-tensors" in card.text and "names a licence" not in card.text
    assert (out / "README.source.md").read_bytes() == theirs and "(README.source.md)" in card.text
    assert json.loads((out / "streamprune.json").read_text())["base_model"] == "some-org/tiny-llama"


def test_base_model_of_a_folder_is_its_cards(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nbase_model: [a/b, c/d]\nbase_model_relation: merge\n---\n")
    config = json.loads((source / "config.json").read_text()) | {"license": "apache-2.0"}
    (source / "config.json").write_text(json.dumps(config))
    data = card_in(prune(source, tmp_path / "out", **FAST).out).data
    assert (data.base_model, data.base_model_relation, data.license) == (["a/b", "c/d"], "merge", "apache-2.0")


def test_with_statistics_from_a_file(source: Path, text: Path, tmp_path: Path) -> None:
    """The card says what they are of, and is that of a job that calibrates by itself."""
    calibrate(source, tmp_path / "s", calib=text, samples=4, seqlen=16)
    card = card_in(prune(source, tmp_path / "out", sparsity=0.5, stats=tmp_path / "s", only="mlp").out)
    assert "| calibrated on | 4 windows of 16 tokens, seed 0 |" in card.text and "| only linears | `mlp` |" in card.text
    made = "prune tiny-llama OUT --sparsity 0.5 --only mlp --calib TEXT --samples 4 --seqlen 16"
    assert made in card.text, "the command of a job that calibrates by itself, which gives the same"


def test_pruned_twice(source: Path, tmp_path: Path) -> None:
    """The first source's card keeps its name, ours of the first time gets another one; base model and licence stay."""
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: a/b\n---\nThe first.\n")
    once = prune(source, tmp_path / "once", **FAST).out
    twice = prune(once, tmp_path / "twice", sparsity=0.6, method="magnitude").out
    assert (twice / "README.source.md").read_bytes() == (source / "README.md").read_bytes()
    assert (twice / "README.source-2.md").read_bytes() == (once / "README.md").read_bytes()
    card = card_in(twice)
    assert "(README.source-2.md)" in card.text
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == ("mit", "a/b", "finetune")


@pytest.mark.parametrize(("carried", "kept"), [
    (["a.md"], {}), (["README.md"], {"README.md": "README.source.md"}),
    (["Readme.MD", "README.md"], {"README.md": "README.source.md", "Readme.MD": "README.source-2.md"}),
    (["readme.md", "readme.source.MD", "README.source-2.md/a"], {"readme.md": "README.source-3.md"}),
    (["README.md/a", "README.md/b", "docs/README.md"],
     {"README.md/a": "README.source.md/a", "README.md/b": "README.source.md/b"}),
])  # fmt: skip
def test_what_is_in_the_way_is_renamed(carried: list[str], kept: dict[str, str]) -> None:
    assert kept_as(carried) == kept


@pytest.mark.parametrize("front", [
    b"---\nlicense: [\n---\n", b"---\n- a\n---\n", b"---\n{{{\n---\n", b"---\n" + b"[" * 5000 + b"\n---\n",
    b"---\nlicense: mit\nlicense: mit\n: : :\n  - x\n---\n",
])  # fmt: skip
def test_a_card_that_cannot_be_read(source: Path, tmp_path: Path, front: bytes) -> None:
    """It says so, and is kept as it is."""
    (source / "README.md").write_bytes(front)
    out = prune(source, tmp_path / "out", **FAST).out
    assert "Its metadata could not be read" in card_in(out).text
    assert (out / "README.source.md").read_bytes() == front


@pytest.mark.parametrize(("text", "found"), [
    ("", {}), ("# No metadata\n---\nlicense: mit\n---\n", {}), ("---\n---\n", {}), ("---\nlicense: mit", {}),
    ("---\nlicense: no\nlanguage: [no, 2020-01-01]\n---\n", {"license": "no", "language": ["no", "2020-01-01"]}),
    ("---\nlicense: {a: b}\nlanguage: [[en]]\nbase_model: ''\n---\n", {}),
    ("---\nbase_model: ./llama\nbase_model_relation: merge\nlicense: mit\n---\n", {"license": "mit"}),
    ("---\nbase_model: [a/b, C:/c]\n---\n", {}), ("---\nbase_model: [a/b, c]\n---\n", {"base_model": ["a/b", "c"]}),
    ("---\nlicense: \"a\\0b\"\npipeline_tag: " + 400 * "x" + "\n---\n", {}),
])  # fmt: skip
def test_what_is_taken_from_a_card(tmp_path: Path, text: str, found: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text(text)
    assert metadata_of(tmp_path / "README.md") == found


@pytest.mark.parametrize(
    "value", ["mit", "no", "2:4", "a/b", "a: b", "- a", "#", "'", '"', "\\", "null", "1e3", "ü", "a "]
)
def test_scalars_are_themselves_in_yaml(value: str) -> None:
    assert yaml.safe_load(f"key: {_scalar(value)}\n") == {"key": value}


def test_names_cannot_break_the_card(source: Path, tmp_path: Path) -> None:
    odd = source.rename(tmp_path / "a `b`\n---\n# <script> | $(c)")
    card = card_in(prune(odd, tmp_path / "out", **FAST).out)
    assert len(card.data.to_dict()) == 3
    assert "\n# <script>" not in card.text and "```\npython -m streamprune prune 'a `b`?---?# <script>" in card.text


@pytest.mark.parametrize(("place", "name"), [
    ("models--org--name/snapshots/0a", ("org/name", "0a")), ("models--gpt2/snapshots/0a", ("gpt2", "0a")),
    ("models--org--name/refs/0a", None), ("datasets--org--name/snapshots/0a", None), ("org--name/snapshots/0a", None),
    ("models--org--name--x/snapshots/0a", None), ("models--/snapshots/0a", None),
])  # fmt: skip
def test_hub_name(tmp_path: Path, place: str, name: tuple[str, str] | None) -> None:
    assert hub_name(tmp_path / place) == name


def test_nobody_minds(source: Path, text: Path, tmp_path: Path) -> None:
    """eval, inspect, transformers, pack and unpack do not, nor the same command after a person has edited the card."""
    (source / "README.md").write_text("---\nlicense: mit\n---\nTheirs.\n")
    done = prune(source, tmp_path / "out", **FAST)
    assert evaluate(done.out, text, seqlen=16, windows=2).perplexity > 1
    assert inspect(done.out).totals.sparsity == pytest.approx(0.5, abs=0.01)
    AutoModelForCausalLM.from_pretrained(done.out)
    AutoTokenizer.from_pretrained(done.out)
    before = {p.name: p.read_bytes() for p in done.out.iterdir()}
    again = unpack(pack(done.out, tmp_path / "packed").out, tmp_path / "again").out
    assert {p.name: p.read_bytes() for p in again.iterdir()} == before
    assert (tmp_path / "packed" / "README.md").read_bytes() == before["README.md"]
    (done.out / "README.md").write_text("All my own words.\n")
    assert prune(source, tmp_path / "out", **FAST).status == "up-to-date"
    (done.out / "README.md").unlink()
    assert prune(source, tmp_path / "out", **FAST).status == "up-to-date"


def test_of_a_model_that_sees_and_of_one_with_code(tmp_path: Path) -> None:
    """The class that loads it is named, and the task is the source's."""
    source = save_mixture(tmp_path / "source", "qwen3_moe")
    (source / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["SomeForConditionalGeneration"], "auto_map": {"AutoConfig": "a.B"}}
    (source / "config.json").write_text(json.dumps(config))
    card = card_in(prune(source, tmp_path / "out", **FAST, device="cpu").out)
    assert 'AutoModelForImageTextToText.from_pretrained("OUT", dtype="auto", trust_remote_code=True)' in card.text
    assert card.data.pipeline_tag == "image-text-to-text"
