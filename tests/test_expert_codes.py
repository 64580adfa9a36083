"""FP8 for experts that are in one tensor: the same as for experts that somebody stored one by one before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, prune
from mixtures import EVERY, save_mixture
from safetensors.torch import save_file
from torch import Tensor
from whole_model import in_memory, perplexity, stored
from windows import cut

from streamprune.errors import UnsupportedError
from streamprune.inspection.inspect import inspect
from streamprune.pruning.expert_codes import IN_TRANSFORMERS, IN_VLLM

pytestmark = pytest.mark.usefixtures("one_thread")

SEQLEN = 16
TURNED = {"llama4_text"}
"""Families whose experts are stored (in, out)."""
FUSED = re.compile(r"(.*?)\.(?:experts\.)?(gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)$")
UPS = ("gate_up_proj", "input_linear.weight")


def one_by_one(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with experts' as llm-compressor stores them: (out, in), gate and up apart."""
    found = {}
    for name, tensor in tensors.items():
        match = FUSED.match(name)
        if match is None or tensor.dim() != 3:
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            matrix = matrix.t() if kind in TURNED else matrix
            parts = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True) if match[2] in UPS else [
                ("down_proj", matrix)
            ]  # fmt: skip
            for leaf, part in parts:
                found[f"{match[1]}.experts.{e}.{leaf}.weight"] = part.contiguous()
    return found


def together(kind: str, like: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What one_by_one has taken apart, put together as in `like`."""
    found = {}
    for name, wanted in like.items():
        match = FUSED.match(name)
        if match is None or wanted.dim() != 3:
            found[name] = tensors[name]
            continue
        leaves = ("gate_proj", "up_proj") if match[2] in UPS else ("down_proj",)
        matrices = [
            torch.cat([tensors[f"{match[1]}.experts.{e}.{leaf}.weight"] for leaf in leaves]) for e in range(len(wanted))
        ]
        found[name] = torch.stack([m.t() if kind in TURNED else m for m in matrices]).contiguous()
    return found


def rewritten(source: Path, to: Path, tensors: dict[str, Tensor]) -> Path:
    shutil.copytree(source, to)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(3).integers(5, 150, 600))
    return path


Sources = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A mixture with its experts in one tensor, and the same with its experts one by one."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            fused = save_mixture(folder / "fused", kind, "bfloat16", fused=kind == "qwen3_moe")
            made[kind] = fused, rewritten(fused, folder / "apart", one_by_one(kind, stored(fused)))
            assert len(stored(made[kind][1])) > len(stored(fused))
        return made[kind]

    return make


def run(model: Path, out: Path, tokens: Path, **more: Any) -> Path:
    given: dict[str, Any] = {"pattern": "2:4", "method": "hwpq", "calib": tokens, "samples": 8, "seqlen": SEQLEN}
    prune(model, out, **{**given, **more})
    return out


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.view(torch.uint8) for name, tensor in stored(folder).items() if tensor.dim()}


JOBS = [
    ("llama4_text", {}),
    ("granitemoe", {}),
    ("qwen3_moe", {}),
    ("llama4_text", {"propagate": "pruned"}),
    ("llama4_text", {"method": "obs-admm", "quantize": "fp8"}),
]


@pytest.mark.parametrize(("kind", "more"), JOBS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_as_if_they_had_been_apart(
    sources: Sources, tokens: Path, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    fused, apart = sources(kind)
    found = tensors_of(run(fused, tmp_path / "out", tokens, **more))
    wanted = tensors_of(run(apart, tmp_path / "apart", tokens, **more))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert not any(FUSED.match(name) and ".experts." not in name for name in found)
    told, expected = (
        {linear["name"]: (linear["rows"], linear["pruned"]) for linear in json.loads(path.read_text())["linears"]}
        for path in (tmp_path / "out" / "streamprune.json", tmp_path / "apart" / "streamprune.json")
    )
    assert told == expected
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert not any(re.search(r"experts\.\d", name) for name in ignored)
    report = inspect(tmp_path / "out", expect="2:4")
    assert report.ok


@pytest.mark.parametrize("kind", ["granitemoehybrid", "granitemoe"])
def test_what_is_evaluated(tokens: Path, tmp_path: Path, kind: str) -> None:
    """Against transformers' whole model with the dequantised experts; of other linears the inputs would be rounded.

    Of families whose FP8 transformers does not load. For the others see test_architectures.py.
    """
    fused = save_mixture(tmp_path / "fused", kind)
    out = run(fused, tmp_path / "out", tokens, only=r"experts\.\d+\.")
    after = stored(out)
    dense = {
        name: tensor.float() * after[f"{name}_scale"].float() if f"{name}_scale" in after else tensor
        for name, tensor in after.items()
        if not name.endswith("_scale")
    }
    whole = rewritten(fused, tmp_path / "whole", together(kind, stored(fused), dense))
    held = cut(tokens, fused, 199, SEQLEN)
    model = in_memory(whole, EVERY[kind].like)
    wanted = perplexity(model, torch.from_numpy(held.astype(np.int64)))
    found = evaluate(out, tokens, seqlen=SEQLEN, work=tmp_path).perplexity
    assert abs(found - wanted) < 1e-5 * wanted, (found, wanted)


def test_a_single_expert(tokens: Path, tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "model", "llama4_text", "bfloat16", num_local_experts=1)
    after = stored(run(source, tmp_path / "out", tokens))
    assert after["model.layers.0.feed_forward.experts.0.gate_proj.weight"].dtype == torch.float8_e4m3fn


def test_pruned_again(sources: Sources, tokens: Path, tmp_path: Path) -> None:
    out = run(sources("llama4_text")[0], tmp_path / "out", tokens)
    again = stored(run(out, tmp_path / "again", tokens, method="wanda"))
    assert {t.dtype for n, t in again.items() if "experts" in n} == {torch.bfloat16}
    assert not any(n.endswith("_scale") for n in again)


def test_those_that_nobody_loads(sources: Sources, tokens: Path, tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "aria_text", "bfloat16")
    with pytest.raises(UnsupportedError, match="neither transformers nor vLLM is known to load experts of aria_text"):
        run(model, tmp_path / "out", tokens)
    with pytest.raises(UnsupportedError, match="all of a layer's experts"):
        run(sources("llama4_text")[0], tmp_path / "out", tokens, skip=r"experts\.3\.")
    with pytest.raises(UnsupportedError, match="all of a layer's experts"):
        run(sources("llama4_text")[0], tmp_path / "out", tokens, only="gate_up_proj")
    with pytest.raises(UnsupportedError, match="all of a layer's experts"):  # transformers would make linears of them
        run(sources("llama4_text")[0], tmp_path / "out", tokens, skip=r"\.experts\.")
    assert not (tmp_path / "out").exists()
    skipped = stored(run(sources("qwen3_moe")[0], tmp_path / "out", tokens, skip=r"\.experts\."))
    assert skipped["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16


def test_families_are_those_of_transformers() -> None:
    """Of the tested families, those whose experts transformers merges by these names; and none of vLLM's."""
    leaves = ({"gate_proj", "up_proj", "down_proj"}, {"up_proj", "down_proj"})
    found = set()
    for kind, mixture in EVERY.items():
        if not mixture.apart or kind == "longcat_flash":  # some of whose experts have no use for their weights
            continue
        if {*mixture.up, mixture.down} in leaves:
            found.add(kind)
    assert found | {"llama4", "llama4_text"} == IN_TRANSFORMERS
    assert not IN_VLLM & found
