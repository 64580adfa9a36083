"""Programs that serve models take what prune writes, and say the same of it as `eval`: each in its own environment.

The slow tests install what they need from the package index, and skip what is not there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

PROGRAMS = ["transformers", "vLLM", "OpenVINO", "llama.cpp"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def serving(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("serving")


@pytest.fixture(scope="module")
def made(serving: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return serving.embedded(tmp_path_factory.mktemp("models"))


@pytest.fixture
def environments(tmp_path: Path) -> Iterator[Path]:
    """A folder for environments of some GB, removed at once."""
    yield tmp_path / "environments"
    shutil.rmtree(tmp_path / "environments", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_it_loads_and_has_the_same_perplexity(
    serving: ModuleType, made: Any, environments: Path, tmp_path: Path, program: str
) -> None:
    """And its speed can be measured, dense and pruned in turn."""
    try:
        found = serving.perplexities(program, made, environments, tmp_path)
    except serving.NotHereError as e:
        pytest.skip(str(e))
    for name in ("dense", "pruned"):
        assert found[name] == pytest.approx(serving.ours(getattr(made, name), made.ids), rel=1e-3), found
    timed = serving.speeds(program, made, environments, tmp_path)
    assert timed["version"] == found["version"] and min(*timed["new"], *timed["prompt"]) > 0


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


CHILD = """
import json, sys
print(json.dumps({"version": "x 1.0"}), flush=True)
for number, line in enumerate(sys.stdin):
    if number == 2:
        sys.exit("it is " + sys.argv[2].rpartition("/")[2])
    print(json.dumps({"new": number + 1.0, "prompt": 10.0}), flush=True)
"""


def test_models_take_turns(serving: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is loaded once and measures when it is asked; what it says when it fails is not lost."""
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    monkeypatch.setattr(serving, "CHILD", child)
    with serving.loaded("x", Path(sys.executable), tmp_path / "big", tmp_path) as (version, measure):
        assert (version, measure(), measure()) == ("x 1.0", {"new": 1, "prompt": 10}, {"new": 2, "prompt": 10})
        with pytest.raises(RuntimeError, match="x does not serve big: it is big"):
            measure()


def test_tables(serving: ModuleType) -> None:
    rows = [{"version": f"x {number}.0", "dense": 10.0, "pruned": 20.0} for number in (1, 2)]
    assert serving.table_of_perplexities(*rows[:1], rows[1:]).splitlines()[2:] == [
        "| x 1.0 | 10.000 | 20.000 |", "| x 2.0 | 10.000 | 20.000 |",
    ]  # fmt: skip
    same = {"version": "x 1.0", "new": [10.0, 20.0, 10.1], "prompt": [10.0, 10.0, 10.0]}
    same |= {"new_ratios": [1.0, 2.0, 3.0], "prompt_ratios": [0.9, 1.0, 1.1]}
    same |= {"new_control": [0.9, 1.0, 1.2], "prompt_control": [1.0, 1.0, 1.0]}
    *_, row, _, verdict = serving.table_of_speeds([same]).splitlines()
    assert row == ("| x 1.0 | 10.0 → 20.0 | 1.00 to 3.00 | 0.90 to 1.20 | 10.0 → 10.0 | 0.90 to 1.10 | 1.00 to 1.00 |")
    assert verdict.endswith(": none."), "one round was not faster"
    assert serving.table_of_speeds([same | {"new_ratios": [1.1, 1.2, 3.0]}]).endswith(": none."), (
        "the control is as fast"
    )
    assert serving.table_of_speeds([same | {"new_ratios": [1.3, 1.3, 3.0]}]).endswith(": x 1.0 (new tokens).")
