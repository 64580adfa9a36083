"""The demo model and the texts in the package: present, small, consistent, and trained.

Remade by ``tools/train_demo.py``; these tests read only what ships.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import streamprune

PACKAGE = Path(streamprune.__path__[0])
HOME = PACKAGE / "demo_model"
TEXT = PACKAGE / "text"
INDEX = "model.safetensors.index.json"


def read_text(name: str) -> str:
    return gzip.decompress((TEXT / name).read_bytes()).decode()


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    """Shape of every tensor, by name, from the shards that the index names."""
    weight_map = json.loads((HOME / INDEX).read_text())["weight_map"]
    found = {}
    for shard in sorted(set(weight_map.values())):
        with safe_open(HOME / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                assert weight_map[name] == shard
                assert file.get_slice(name).get_dtype() == "BF16"
                found[name] = file.get_slice(name).get_shape()
    assert found.keys() == weight_map.keys()
    return found


def test_files_are_present_and_small() -> None:
    names = {path.name for path in HOME.iterdir()}
    shards = set(json.loads((HOME / INDEX).read_text())["weight_map"].values())
    assert len(shards) > 1, "the demo is to show a sharded checkpoint"
    others = {INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == shards | others | {"README.md", "LICENSE-TEXT"}
    assert {path.name for path in TEXT.iterdir()} == {"calibration.txt.gz", "heldout.txt.gz"}
    files = [*HOME.iterdir(), *TEXT.iterdir()]
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files), "readable by everybody"


def test_texts_carry_no_time_of_making() -> None:
    for path in TEXT.iterdir():
        assert path.read_bytes()[4:8] == bytes(4), path.name


def test_config_fits_the_tensors(shapes: dict[str, list[int]]) -> None:
    config = AutoConfig.from_pretrained(HOME)
    assert not json.loads((HOME / "config.json").read_text()).get("_name_or_path")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert wanted.pop("lm_head.weight") == wanted["model.embed_tokens.weight"], "tied"
    assert shapes == wanted
    linears = [shape for name, shape in shapes.items() if name.endswith("_proj.weight")]
    assert linears
    assert all(columns % 32 == 0 for _, columns in linears)


def test_tokenizer_is_lossless_and_adds_nothing() -> None:
    tokenizer = AutoTokenizer.from_pretrained(HOME)
    assert len(tokenizer) == AutoConfig.from_pretrained(HOME).vocab_size
    for text in ("", "a", "  two\n\n\n\tspaces ", "naïve → 日本語 🙂", read_text("heldout.txt.gz")[:20_000]):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]


def test_held_out_text_is_not_in_the_calibration_text() -> None:
    calibration, held_out = read_text("calibration.txt.gz"), read_text("heldout.txt.gz")
    assert 300_000 < len(calibration) < 400_000
    assert 120_000 < len(held_out) < 200_000
    assert not set(calibration.strip().split("\n\n\n")) & set(held_out.strip().split("\n\n\n"))
    long = {p for p in held_out.split("\n\n") if len(" ".join(p.split())) >= 40}
    assert len(long) > 500
    assert not long & set(calibration.split("\n\n"))


@torch.no_grad()
def test_model_is_trained() -> None:
    model = AutoModelForCausalLM.from_pretrained(HOME, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(HOME)(read_text("heldout.txt.gz")[:16_000], return_tensors="pt")
    windows = ids["input_ids"][0][: 16 * 256].view(16, 256)
    logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert math.exp(loss) < model.config.vocab_size / 10
