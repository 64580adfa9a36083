"""Parts of a layer that end with a linear: which are found, and that running the linear alone changes no bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_device_path import weights_of
from test_refit_jobs import run

from streamprune.calibration.gram_sums import GramCollector
from streamprune.model.ends import End, confirmed, replayed

Models = Callable[..., Path]
END = End("part.last", "part", 6)

pytestmark = pytest.mark.usefixtures("one_thread")


class Part(torch.nn.Module):
    """Attention's shape without its arithmetic; `more` is added to what the last linear makes, `calls` times."""

    def __init__(self, more: float, calls: int) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
        self.more, self.calls, self.ran = more, calls, 0

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        self.ran += 1
        for _ in range(self.calls):
            made = self.last(self.first(x)) + self.more
        return made, 7


class Layer(torch.nn.Module):
    def __init__(self, more: float = 0.0, calls: int = 1) -> None:
        super().__init__()
        self.part = Part(more, calls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = x + self.part(x)[0]
        return made


def test_a_part_that_is_replayed_does_not_run() -> None:
    layer, x = Layer(), torch.randn(2, 3, 4)
    skeleton: Any = SimpleNamespace(model=layer)
    (end,) = confirmed(skeleton, [END], layer, x)
    assert end == END._replace(returned=2)
    wanted, layer.part.ran = layer(x), 0
    kept = layer.part.first(x)
    with replayed(skeleton, {end: kept}):
        assert torch.equal(layer(x), wanted)
        with torch.no_grad():
            layer.part.last.weight.zero_()
            layer.part.last.bias.fill_(2.0)
        assert torch.equal(layer(x), x + 2.0), "the linear has other weights by now"
    assert layer.part.ran == 0
    assert torch.equal(layer(x), x + 2.0) and layer.part.ran == 1, "it runs again afterwards"


@pytest.mark.parametrize("layer", [Layer(more=0.5), Layer(calls=2)], ids=["adds something", "runs it twice"])
def test_what_only_seems_to_end_a_part(layer: Layer) -> None:
    skeleton: Any = SimpleNamespace(model=layer)
    assert confirmed(skeleton, [END], layer, torch.randn(2, 3, 4)) == []


@pytest.mark.parametrize(
    ("kind", "refit", "quantize"),
    [
        *((kind, "obs-admm", "none") for kind in ("llama", "gpt2", "gpt_neox", "gemma2", "falcon", "bloom", "qwen3")),
        *((kind, "gradual-cg", "none") for kind in ("llama", "gpt_neox", "falcon")),
        *((kind, "obs-admm", "fp8") for kind in ("llama", "qwen3")),
    ],
)
def test_no_bit_depends_on_it(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, refit: str, quantize: str
) -> None:  # fmt: skip
    """Also what is added to each Gram, so that it is not by chance. With FP8, inputs are rounded once all is stored."""
    added: list[torch.Tensor] = []
    watch = GramCollector.watch_pair

    def see(self: Any, name: str, *inputs: torch.Tensor | None) -> None:
        added.extend(x.clone() for x in inputs if x is not None)
        watch(self, name, *inputs)  # type: ignore[arg-type]

    tried: list[list[End]] = []

    def seen(*args: Any) -> list[End]:
        tried.append(confirmed(*args))
        return tried[-1]

    monkeypatch.setattr(GramCollector, "watch_pair", see)
    monkeypatch.setattr("streamprune.pruning.paired.confirmed", seen)
    how = {"refit": refit, "sparsity": 0.5, "propagate": "asymmetric", "damping": 0.05, "quantize": quantize}
    source = models(kind, 2)
    ours = run(source, tmp_path / "ours", text, **how)
    assert all(tried) == (kind != "bloom"), "attention that adds the residual stream by itself runs again"
    mine, added = added, []
    monkeypatch.setattr("streamprune.pruning.paired.ends_of", lambda *_: [])
    plain = run(source, tmp_path / "plain", text, **how)
    assert len(mine) == len(added) and all(torch.equal(a, b) for a, b in zip(mine, added, strict=True))
    assert weights_of(tmp_path / "ours") == weights_of(tmp_path / "plain")
    assert ours.report["linears"] == plain.report["linears"]
