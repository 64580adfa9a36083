"""What is pruned of a model, known from its headers: order, sizes, and what a sparsity may come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune
from safetensors.torch import load_file, save_file

from streamprune.methods.allocation import Curve, by_error, least_share, levels_around, owl
from streamprune.pruning.describe import describe_prune, open_model
from streamprune.pruning.setup import Setup
from streamprune.pruning.target import Target
from streamprune.settings import Calibration, Resources

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def target_of(source: Path, recipe: str = "swiftprune", **more: Any) -> Target:
    checkpoint = open_model(source)
    given: dict[str, Any] = {"stats": None, "save_stats": None, "propagate": None, "only": None, "skip": None} | more
    settings: dict[str, Any] = {"calibration": Calibration(), "resources": Resources(device="cpu")}
    spec = describe_prune(checkpoint, Path("out"), 0.5, recipe, **settings, **given)
    target = Setup.of(spec, checkpoint).target
    assert target is not None
    return target


@pytest.fixture
def mixed(models: Models, tmp_path: Path) -> Path:
    """One of each layer's linears is wider than the others, so a shard holds it first, whatever its name."""
    source = Path(shutil.copytree(models(), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    changed = {n: t.float() if "up_proj" in n else t for n, t in tensors.items()}
    save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("recipe", ["swiftprune", "hwpq", "obs-admm"])
def test_linears_come_in_the_order_of_their_shard(mixed: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    """Grams are freed and weights fetched in this order; the shard asks for them in its own."""
    target = target_of(mixed, recipe)
    how = {"sparsity": 0.5, "method": recipe, "samples": 2, "seqlen": 16, "propagate": "dense", "shard_size": 1}
    result = prune(mixed, tmp_path / "out", calib=text, **how)
    written = [linear["name"] for linear in result.report["linears"]]
    for stage in target.skeleton.layer_stages:
        ordered = list(target.linears_of(stage))
        assert ordered == [name for name in written if name.startswith(stage.prefix + ".")]
        data = (tmp_path / "out" / f"model-{stage.index + 2:05d}-of-00005.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        place = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
        assert ordered == sorted(ordered, key=lambda name: place[f"{name}.weight"])
        assert "up_proj" in ordered[0] or recipe == "hwpq"


def test_output_bytes(mixed: Path, text: Path, tmp_path: Path) -> None:
    for recipe in ("swiftprune", "hwpq"):
        out = prune(mixed, tmp_path / recipe, sparsity=0.5, method=recipe, calib=text, samples=2, seqlen=16).out
        tensors = [t for path in out.glob("*.safetensors") for t in load_file(path).values()]
        assert target_of(mixed, recipe).output_bytes == sum(t.nbytes for t in tensors)


def test_other_shares(models: Models) -> None:
    target = target_of(models())
    name = next(iter(target.selected))
    shared = target.sharing({name: 0.75})
    assert shared.of(name).sparsity == 0.75 and target.of(name).sparsity == 0.5
    assert {shared.of(other).sparsity for other in target.selected - {name}} == {0.5}
    assert target.least_of(name) == target.of(name), "nothing is going to be shared out"


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_no_layer_prunes_less_than_the_least(sparsity: float) -> None:
    """Memory is planned by it before anything has been shared out."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        sizes = torch.randint(1, 100, (6,), generator=generator).tolist()
        outliers = torch.rand(6, generator=generator).pow(4).tolist()
        assert min(owl(outliers, sizes, sparsity)) >= least_share("owl", sparsity) - 1e-9
        levels = levels_around(sparsity)
        errors = torch.rand(6, len(levels), generator=generator).pow(3).cumsum(1).tolist()
        curves = {str(i): Curve(size, levels, error) for i, (size, error) in enumerate(zip(sizes, errors, strict=True))}
        assert min(by_error(curves, sparsity).values()) >= least_share("error", sparsity) - 1e-9
