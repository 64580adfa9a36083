"""What config.json may say: how it was run elsewhere, and sizes that the checkpoint does not have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import evaluate, plan, prune
from families import DENSE, OTHERS, SEEING, tiny_config, whole_class
from refusals import refused

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.claims import check_claims
from streamprune.disk.header import TensorRef
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.model.skeleton import build_skeleton

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def configured(source: Path, folder: Path, section: str = "", **more: Any) -> Path:
    """A copy of a checkpoint whose config.json, or a section of it, says more."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config).update(more)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "kernels-community/flash-attn3", "flex_attention", "no_such"])
def test_attention_of_another_machine(models: Models, tmp_path: Path, name: str, value: str) -> None:
    source = configured(models(), tmp_path / "model", **{name: value})
    skeleton = build_skeleton(open_checkpoint(source), torch.float32)
    assert skeleton.model.config._attn_implementation == "sdpa"


def test_attention_of_a_part(models: Models, tmp_path: Path) -> None:
    """Of the text model within one that sees, or by a mapping of parts to kernels."""
    for number, (section, value) in enumerate([
        ("text_config", "flash_attention_2"), ("", "flash_attention_2"),
        ("", {"": "flash_attention_2", "text_config": "flash_attention_3"}),
    ]):  # fmt: skip
        source = configured(models("gemma3"), tmp_path / str(number), section, _attn_implementation=value)
        skeleton = build_skeleton(open_checkpoint(source), torch.float32)
        assert skeleton.model.config.get_text_config()._attn_implementation == "sdpa"


def test_eager_attention_is_done(models: Models, tmp_path: Path) -> None:
    source = configured(models(), tmp_path / "model", _attn_implementation="eager")
    assert build_skeleton(open_checkpoint(source), torch.float32).model.config._attn_implementation == "eager"


def test_the_file_is_carried_as_it_is(models: Models, text: Path, tmp_path: Path) -> None:
    plain = evaluate(models(), text, seqlen=16, work=tmp_path).perplexity
    source = configured(models(), tmp_path / "model", _attn_implementation="flash_attention_2", attn_implementation="x")
    assert evaluate(source, text, seqlen=16, work=tmp_path).perplexity == plain
    prune(source, tmp_path / "out", pattern="2:4", calib=text, samples=2, seqlen=8)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


CLAIMS = [
    ("llama", "", "num_hidden_layers"), ("llama", "", "vocab_size"), ("llama", "", "hidden_size"),
    ("llama", "", "intermediate_size"), ("llama", "", "num_attention_heads"), ("gpt2", "", "n_layer"),
    ("gpt2", "", "n_embd"), ("mixtral", "", "num_local_experts"), ("gemma3", "text_config", "num_hidden_layers"),
    ("gemma3", "vision_config", "num_hidden_layers"), ("gemma3", "text_config", "vocab_size"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "section", "name"), CLAIMS)
@pytest.mark.parametrize("value", [10**9, 10**12, 1e300])
def test_what_no_checkpoint_holds(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, section: str, name: str,
    value: float,
) -> None:  # fmt: skip
    """Refused by the headers, before anything is built: layers by the billion would take for ever."""
    source = configured(models(kind), tmp_path / "model", section, **{name: value})

    def never(*args: object, **more: object) -> None:
        raise AssertionError("something is built")

    for module in ("model.skeleton", "evaluation.evaluate"):
        monkeypatch.setattr(f"streamprune.{module}.build_skeleton", never)
    needles = ("config.json", name, "download the checkpoint again")
    refused(CheckpointError, lambda: prune(source, tmp_path / "out", pattern="2:4", calib=text), *needles)
    refused(CheckpointError, lambda: plan(source), *needles)
    refused(CheckpointError, lambda: evaluate(source, text, seqlen=16), *needles)
    refused(CheckpointError, lambda: evaluate(models(kind), text, reference=source, seqlen=16), *needles)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_allocators_message_is_not_passed_on(models: Models, tmp_path: Path) -> None:
    source = configured(models("gpt2"), tmp_path / "model", n_positions=10**13)
    refused(
        CheckpointError, lambda: plan(source), "does not describe a gpt2 model: its weights would exceed all memory"
    )


@pytest.mark.parametrize("kind", [*DENSE, *OTHERS, *SEEING])
def test_what_every_architecture_claims_is_true(kind: str) -> None:
    """By the shapes of its model, whatever the names in its configuration mean."""
    config = tiny_config(kind, 2)
    with torch.device("meta"):
        model = whole_class(kind).from_config(config)
    refs = {n: TensorRef(n, "s", "F32", tuple(p.shape), 0, 4 * p.numel()) for n, p in model.named_parameters()}
    check_claims(Checkpoint(Path(), refs, ("s",), config.to_dict(), {}, {}, {}))


def test_a_package_that_is_not_there_is_named(models: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a vision tower comes from another package: nothing is wrong with the checkpoint."""
    from transformers import AutoModelForCausalLM

    def needing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("TimmWrapperModel requires the timm library but it was not found")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", needing)
    with pytest.raises(UnsupportedError, match=r"llama needs a package that is not installed: .*timm"):
        build_skeleton(open_checkpoint(models("llama")), torch.float32)
