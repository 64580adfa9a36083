"""Layers that are tuned and stored in FP8 by one command: as by two, and nothing is left of what lies between."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune
from mixtures import save_mixture
from quantised_files import blocks_of, quantise
from test_crash import Crasher, show
from test_device_path import LAYOUTS, weights_of
from test_tuning import tensors_of
from transformers import AutoModelForCausalLM

from streamprune.errors import UsageError
from streamprune.model.budget import Layout
from streamprune.model.loader import WeightLoader
from streamprune.progress import Progress
from streamprune.pruning.job import JobResult
from streamprune.pruning.tuning import BlockTuner

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(source: Path, out: Path, text: Path, **job: Any) -> JobResult:
    given: dict[str, Any] = {"calib": text, "samples": 8, "seqlen": 16, "pattern": "2:4", "tune": "block"}
    given |= {"tune_epochs": 1, "quantize": "fp8", "expert_tokens": 16}
    return prune(source, out, **{**given, **job})


def one_and_two(source: Path, folder: Path, text: Path, **how: Any) -> JobResult:
    """The one command, to `out`, and the two, to `both`, with inputs from the dense model."""
    found = run(source, folder / "out", text, propagate="dense", **how)
    run(source, folder / "tuned", text, propagate="dense", **{**how, "quantize": None})
    prune(folder / "tuned", folder / "both", method="magnitude", sparsity=0.0, quantize="fp8", skip=how.get("skip"))
    assert (folder / "out" / "config.json").read_text() == (folder / "both" / "config.json").read_text()
    assert not [path for path in (folder / "out").rglob("*") if path.is_dir()]
    return found


@pytest.mark.parametrize("how", [{}, {"method": "obs-admm"}, {"tune_lr": 0.0}, {"sparsity": 0.5, "pattern": None}])
def test_one_command_does_what_two_do(models: Models, text: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    """A layer that tuning leaves as it was, as with a rate of 0, becomes codes as well."""
    found = one_and_two(models("llama", 2), tmp_path, text, **how)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "both")
    reports = found.report["linears"]
    assert len(reports) == 14 and {each["sparsity"] for each in reports} == {0.5}
    assert all(0 < each["rounding_error"] < 0.01 for each in reports)
    assert all(("error" in each) == (how.get("method") == "obs-admm") for each in reports)
    left = [stage["tune"].get("left_as_it_was", False) for stage in found.report["stages"] if "tune" in stage]
    assert len(left) == 2 and all(left) == ("tune_lr" in how)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text"])
def test_experts(text: Path, tmp_path: Path, kind: str) -> None:
    """Each in its own tensor, or all in one. Sums may differ in their last bit, as weights lie elsewhere in a file."""
    found = one_and_two(save_mixture(tmp_path / "model", kind), tmp_path, text)
    one, both = ({n: t.float() for n, t in tensors_of(tmp_path / out).items()} for out in ("out", "both"))
    assert one.keys() == both.keys()
    differing = sum(int((tensor != both[name]).sum()) for name, tensor in one.items())
    assert differing <= 1e-3 * sum(tensor.numel() for tensor in one.values())
    assert all(torch.allclose(tensor, both[name], rtol=0.13) for name, tensor in one.items()), "one code, at most"
    names = {each["name"] for each in found.report["linears"]}
    assert names == {name.removesuffix(".weight_scale") for name in one if name.endswith("_scale")}


def test_later_layers_make_up_for_rounding(models: Models, text: Path, tmp_path: Path) -> None:
    """They are given what the layers before make of their codes, so the first is tuned alike and the second is not."""
    coded = run(models("llama", 2), tmp_path / "out", text)
    plain = run(models("llama", 2), tmp_path / "plain", text, quantize=None)
    of = [[stage["tune"]["held_out_error"] for stage in each.report["stages"] if "tune" in stage]
          for each in (coded, plain)]  # fmt: skip
    assert of[0][0] == of[1][0] and of[0][1] != of[1][1]
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert coded.report["job"]["fp8_rounding"] == "nearest"


def test_a_quantised_source(models: Models, text: Path, tmp_path: Path) -> None:
    """What its codes stand for is tuned, and becomes other codes."""
    coded, dense = quantise(models("llama", 2), tmp_path, *blocks_of())
    for source, out in ((coded, "out"), (dense, "plain")):
        run(source, tmp_path / out, text, method="obs-admm")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")


def test_linears_that_are_not_pruned(models: Models, text: Path, tmp_path: Path) -> None:
    """A layer of none goes straight to the output; others keep theirs."""
    one_and_two(models("llama", 2), tmp_path, text, skip=r"layers\.0\.|q_proj")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "both")


@pytest.mark.parametrize("layers_resident", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers_resident: tuple[int, bool]
) -> None:
    run(models(), tmp_path / "plain", text, backend="torch")
    layout = Layout(2, *layers_resident, 0, windows=1)
    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    for place in ("model.loader", "pruning.forward", "pruning.coded_later"):
        monkeypatch.setattr(f"streamprune.{place}.WeightLoader", functools.partial(WeightLoader, copies=True))
    run(models(), tmp_path / "out", text, backend="torch")
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_resumed_at_any_stage(models: Models, text: Path, tmp_path: Path, at: int) -> None:
    run(models(), tmp_path / "whole", text)

    def stop(step: Progress) -> None:
        if step.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(models(), tmp_path / "out", text, progress=stop)
    run(models(), tmp_path / "out", text)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_interrupted_within_a_layer(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the layer was before it was tuned is dropped, and none of it is in the output."""
    run(models(), tmp_path / "whole", text)

    def stop(self: BlockTuner, *args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockTuner, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            run(models(), tmp_path / "out", text)
    waiting = list((tmp_path / "out.partial").rglob("not-coded/*"))
    assert len(waiting) == 1
    work = waiting[0].parent

    def begun(step: Progress) -> None:
        assert not list(work.iterdir()), "nothing is left of it when a stage is done"

    run(models(), tmp_path / "out", text, progress=begun)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["killed", "lost", "emptied"])
def test_no_crash_does_harm(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    crasher = Crasher(root, lambda: run(models("llama", 2), root / "out", text, samples=4), ("out",))
    show(crasher.failures(kind, 0.08))


def test_what_cannot_be(models: Models, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--fp8-rounding compensate would undo what --tune has learnt"):
        run(models(), tmp_path / "out", text, method="obs-admm", fp8_rounding="compensate")
    assert not list(tmp_path.iterdir())
