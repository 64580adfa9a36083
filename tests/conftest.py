"""Small models made on the spot, and a text: what most tests start from. Nothing is downloaded."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, save_model, save_tokenizer, tiny_config

__all__ = ["VOCAB", "save_model", "save_tokenizer", "tiny_config"]

pytest.register_assert_rewrite("whole_model")

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what `eval` caches within the tests' own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread: cores that others keep busy do not slow small models down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def load_tool() -> Iterator[Callable[[str], ModuleType]]:
    """load_tool(name) -> tools/NAME.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
        yield importlib.import_module


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
