"""Programs that serve models take what prune writes, and say the same of it as `eval`: each in its own environment.

The slow tests install what they need from the package index, and skip what is not there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

PROGRAMS = ["transformers", "vLLM", "OpenVINO"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def serving(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("serving")


@pytest.fixture(scope="module")
def made(serving: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return serving.models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def environments(tmp_path: Path) -> Iterator[Path]:
    """A folder for environments of some GB, removed at once."""
    yield tmp_path / "environments"
    shutil.rmtree(tmp_path / "environments", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_loads_and_has_the_same_perplexity(serving: ModuleType, made: Any, environments: Path, program: str) -> None:
    try:
        python = serving.environment(program, environments)
    except serving.NotHereError as e:
        pytest.skip(str(e))
    for model in (made.dense, made.pruned):
        found = serving.served(program, python, model, made.ids)
        assert found["perplexity"] == pytest.approx(serving.ours(model, made.ids), rel=1e-3), found
        assert found["prompt_tokens_per_second"] > 0 and found["new_tokens_per_second"] > 0


@pytest.mark.slow
def test_the_converter_of_llama_cpp_takes_it(
    serving: ModuleType, made: Any, environments: Path, tmp_path: Path
) -> None:
    """All weights arrive, with their zeros."""
    try:
        python = serving.environment(serving.CONVERTER, environments)
    except serving.NotHereError as e:
        pytest.skip(str(e))
    serving.converted(python, made.pruned, tmp_path / "model.gguf")
    found = gguf.GGUFReader(tmp_path / "model.gguf").tensors
    stored = [tensor for path in made.pruned.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(t.n_elements for t in found) == sum(t.numel() for t in stored)
    assert sum(int((t.data == 0).sum()) for t in found) == sum(int((t == 0).sum()) for t in stored) > 0


def test_every_program_has_packages_and_a_child(serving: ModuleType, load_tool: Callable[[str], ModuleType]) -> None:
    assert list(serving.PACKAGES) == PROGRAMS == list(load_tool("serving_child").PROGRAMS)


def test_losses(load_tool: Callable[[str], ModuleType]) -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    ids = [3, 1, 10, 0, 7, 7]
    wanted = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    found = load_tool("serving_child").losses_of(logits.numpy(), ids)
    assert found == pytest.approx(wanted.tolist(), rel=1e-6)
    assert not np.isnan(found).any()


def test_the_table(serving: ModuleType) -> None:
    row = {"program": "x", "version": "x 1.0"}
    for name, factor in (("dense", 1.0), ("pruned", 2.0)):
        row |= {f"{name}_{what}": 10.0 * factor for what in ("perplexity", "ours", "prompt", "new")}
    assert serving.markdown([row]).splitlines()[2] == (
        "| x 1.0 | 10.0000 (10.0000) | 20.0000 (20.0000) | 10 → 20 (2.00 ×) | 10 → 20 (2.00 ×) |"
    )
