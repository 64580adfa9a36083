"""Small models made on the spot, and a text: what most tests start from. Nothing is downloaded."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB = 199


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what `eval` caches within the tests' own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


def tiny_config(kind: str, layers: int = 3) -> Any:
    """A configuration of a few thousand parameters."""
    from transformers import AutoConfig

    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    more: dict[str, dict[str, Any]] = {
        "llama": {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64},
        "gpt_neox": {"intermediate_size": 64, "max_position_embeddings": 64},
        "gpt2": {"n_positions": 64},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "bloom": {},
        "gemma2": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        "falcon": {},
        "mixtral": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    }
    return AutoConfig.for_model(kind, **common, **special, **more[kind])


def save_model(folder: Path, kind: str = "llama", layers: int = 3, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """A random model with uneven feature scales and a word-level tokenizer; returns its folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, layers), dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)  # far from the initial near-identity, so that layers matter
            elif "norm" in name and name.endswith("weight"):
                parameter.mul_(torch.exp(torch.randn(parameter.shape)).to(parameter.dtype))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token a word: `w0` … `w198`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """models(kind, layers=3, dtype="bfloat16") -> folder of a checkpoint, made once a session. Do not write there."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(kind: str = "llama", layers: int = 3, dtype: str = "bfloat16") -> Path:
        key = (kind, layers, dtype)
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(f"{kind}-{layers}-{dtype}") / "model", kind, layers, dtype)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 3000 words, 25 a line."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(7).integers(0, VOCAB, (120, 25))
    path.write_text("\n".join(" ".join(f"w{i}" for i in line) for line in words) + "\n")
    return path


@pytest.fixture(autouse=True, scope="session")
def _interrupts_are_heard() -> None:
    """A shell ignores Ctrl-C for what it starts in the background, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
