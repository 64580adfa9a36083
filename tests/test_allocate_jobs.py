"""Jobs whose sparsity is shared out among the layers: what is gathered first, the amounts, what is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, prune
from safetensors import safe_open

from streamprune.calibration.collector import Collector
from streamprune.calibration.statistics import StatisticsFile
from streamprune.cli import main
from streamprune.errors import StateError, UsageError
from streamprune.model.stages import Stage
from streamprune.progress import Progress
from streamprune.pruning.forward import CalibrationPass

GIVEN: dict[str, Any] = {"samples": 4, "seqlen": 32, "dtype": "float32"}


def zeros_of(out: Path, name: str) -> list[int]:
    """Zeros in each row of a linear."""
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            if f"{name}.weight" in f.keys():  # noqa: SIM118
                return list((f.get_tensor(f"{name}.weight") == 0).sum(1).tolist())
    raise AssertionError(name)


def layer_of(name: str) -> str:
    return name.split(".")[2]


@pytest.mark.parametrize("method", ["swiftprune", "magnitude", "obs-admm"])
@pytest.mark.parametrize("how", ["owl", "error"])
def test_layers_differ_and_the_whole_is_what_was_asked(
    models: Callable[..., Path], text: Path, tmp_path: Path, how: str, method: str
) -> None:
    out = tmp_path / "out"
    result = prune(models("llama", 4), out, sparsity=0.6, allocate=how, method=method, calib=text, **GIVEN)
    linears = result.report["linears"]
    rounding = max(0.5 / n["in_features"] for n in linears)
    assert result.sparsity == pytest.approx(0.6, abs=rounding)
    shares: dict[str, list[float]] = {}
    for n in linears:
        assert n["sparsity"] * n["in_features"] == pytest.approx(n["pruned"] / n["rows"])
        assert zeros_of(out, n["name"]) == [n["pruned"] // n["rows"]] * n["rows"]
        shares.setdefault(layer_of(n["name"]), []).append(n["sparsity"])
    for layer in shares.values():
        assert max(layer) - min(layer) <= 2 * rounding, "a layer is of one sparsity"
    means = [sum(layer) / len(layer) for layer in shares.values()]
    assert max(means) - min(means) > 2 * rounding, "and layers differ"
    assert {p.name for p in tmp_path.iterdir()} == {"out"}, "what was gathered for it is gone"
    assert result.report["job"]["allocate"] == how and result.report["resolved"]["allocation"].keys() == {
        n["name"] for n in linears
    }
    again = prune(models("llama", 4), out, sparsity=0.6, allocate=how, method=method, calib=text, **GIVEN)
    assert again.status == "up-to-date" and {p.name for p in tmp_path.iterdir()} == {"out"}


def test_given_statistics_lead_to_the_same(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    source = models("gpt2", 3)
    calibrate(source, tmp_path / "s", calib=text, **GIVEN)
    mine = prune(source, tmp_path / "a", sparsity=0.5, allocate="error", stats=tmp_path / "s", dtype="float32")
    theirs = prune(source, tmp_path / "b", sparsity=0.5, allocate="error", calib=text, **GIVEN)
    assert mine.report["resolved"]["allocation"] == theirs.report["resolved"]["allocation"]
    for file in mine.report["files"]:
        if file["name"] == "README.md":  # which says where the statistics come from
            continue
        assert (tmp_path / "a" / file["name"]).read_bytes() == (tmp_path / "b" / file["name"]).read_bytes()
    assert (tmp_path / "s").is_file(), "that one is the user's"


def test_what_is_wrong_is_refused_before_anything_is_gathered(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    steps: list[Progress] = []
    for dry in (True, False):
        with pytest.raises(UsageError, match="leave no linear to prune"):
            prune(models("llama", 2), tmp_path / "out", sparsity=0.5, allocate="owl", only="nothing", calib=text,
                  dry_run=dry, progress=steps.append, **GIVEN)  # fmt: skip
    assert not steps and not any(tmp_path.iterdir())


def test_what_is_gathered_can_be_saved(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pass more; also when that is asked for only after the job has begun."""
    source, real, passed = models("llama", 2), CalibrationPass.layer, list[str]()

    def layer(self: Any, stage: Stage, *args: Any, **more: Any) -> Collector:
        passed.append(stage.name)
        return real(self, stage, *args, **more)

    monkeypatch.setattr(CalibrationPass, "layer", layer)
    calibrate(source, tmp_path / "s", calib=text, **GIVEN)
    job: dict[str, Any] = {"sparsity": 0.5, "allocate": "error", "calib": text, **GIVEN}
    prune(source, tmp_path / "a", save_stats=tmp_path / "saved-a", **job)
    with pytest.raises(StoppedError):  # 3 stages gather, 2 layers are weighed up, then there are 4 stages
        prune(source, tmp_path / "b", progress=stop_at(7), **job)
    prune(source, tmp_path / "b", save_stats=tmp_path / "saved-b", **job)
    assert passed == 3 * ["layer 0", "layer 1"]
    plain, *saved = (StatisticsFile(tmp_path / name).metadata for name in ("s", "saved-a", "saved-b"))
    for found in saved:
        assert found.keys() == plain.keys()
        assert all(found[key] == plain[key] for key in plain if key != "calibration")
        assert "job" not in json.loads(found["calibration"])


def test_uniform_is_no_allocation(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    result = prune(models("llama", 2), tmp_path / "out", sparsity=0.5, allocate="uniform", calib=text, **GIVEN)
    assert "allocation" not in result.report["resolved"] and result.report["job"]["allocate"] is None
    with pytest.raises(StateError, match="allocate is not set there and owl here"):
        prune(models("llama", 2), tmp_path / "out", sparsity=0.5, allocate="owl", calib=text, **GIVEN)


def test_only_what_is_pruned_shares(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    result = prune(
        models("llama", 3), tmp_path / "out", sparsity=0.5, allocate="error", only=r"layers\.[02].*mlp", calib=text,
        **GIVEN,
    )  # fmt: skip
    assert {layer_of(n["name"]) for n in result.report["linears"]} == {"0", "2"} and result.sparsity == pytest.approx(
        0.5, abs=1 / 32
    )


def test_statistics_without_updates_are_refused(
    models: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `calibrate` wrote them before it looked at what layers add."""
    source = models("llama", 2)
    monkeypatch.setattr(Collector, "update", (0.0, 0.0))
    calibrate(source, tmp_path / "s", calib=text, **GIVEN)
    with pytest.raises(UsageError, match=r"lacks the size of what .*calibrate"):
        prune(source, tmp_path / "out", sparsity=0.5, allocate="error", stats=tmp_path / "s", dtype="float32")
    assert prune(source, tmp_path / "out", sparsity=0.5, allocate="owl", stats=tmp_path / "s", dtype="float32")


def test_updates_are_those_of_the_states(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from windows import drawn

    source = models("llama", 2)
    calibrate(source, tmp_path / "s", calib=text, **GIVEN)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.from_numpy(drawn(text, source, 199, 4, 32, 0))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        model(ids)
    found = StatisticsFile(tmp_path / "s").updates
    for i, (before, after) in enumerate(pairwise(seen)):
        parts = (after - before).square().sum(-1) / after.square().sum(-1)
        wanted = (parts.numel(), float(parts.sum()))
        assert found[f"model.layers.{i}"] == pytest.approx(wanted, rel=2e-2), "the cache rounds states to bf16"


def test_a_massive_activation_does_not_own_an_update() -> None:
    """One token a thousand times the others, which a layer does not touch, changes little."""
    collector = Collector(lambda *_: None)
    states = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    after = states + 0.5 * torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    collector.flow(states, after)
    tokens, plain = collector.update
    states[0, 0], after[0, 0] = 1e3, 1e3
    massive = Collector(lambda *_: None)
    massive.flow(states, after)
    assert tokens == massive.update[0] == 100 and massive.update[1] == pytest.approx(plain, rel=0.05)
    nothing = Collector(lambda *_: None)
    nothing.flow(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
    assert nothing.update == (3, 0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--pattern", "2:4", "--allocate", "owl"],
            "--allocate owl distributes a --sparsity among layers, and --pattern 2:4 fixes it",
        ),
        (["--sparsity", "0.5", "--allocate", "best"], "--allocate best: choose uniform, owl, error"),
    ],
)
def test_what_cannot_be(
    models: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["prune", str(models("llama", 2)), str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_seconds_count_what_was_gathered_first(
    models: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--sparsity",
        "0.5",
        "--allocate",
        "owl",
        "--calib",
        str(text),
        "--samples",
        "4",
        "--seqlen",
        "32",
        "--json",
    ]
    assert main(["prune", str(models("llama", 3)), str(tmp_path / "out"), *words, "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    assert said["seconds"] > sum(stage["seconds"] for stage in report["stages"])


class StoppedError(Exception):
    """What ends a run on purpose."""


def stop_at(step: int) -> Callable[[Progress], None]:
    """A callback that ends a run after so many stages."""
    seen: list[Progress] = []

    def told(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == step:
            raise StoppedError

    return told


def test_a_resumed_job_counts_what_was_gathered_before(models: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"sparsity": 0.5, "allocate": "owl", "calib": text, **GIVEN}
    out = tmp_path / "out"
    with pytest.raises(StoppedError):  # 4 stages gather, 3 layers are weighed up, then there are 5 stages
        prune(models("llama", 3), out, progress=stop_at(9), **job)
    spent = json.loads((tmp_path / "out.partial" / ".streamprune" / "job.json").read_text())["spent"]
    report = prune(models("llama", 3), out, **job).report
    assert spent > 0 and report["seconds"] > spent + sum(stage["seconds"] for stage in report["stages"]) - 0.01
    assert "job" not in report["calibration"]


def test_statistics_of_another_calibration_are_thrown_away_when_asked(
    models: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    job: dict[str, Any] = {"sparsity": 0.5, "allocate": "owl", "calib": text, **GIVEN}
    out = tmp_path / "out"
    with pytest.raises(StoppedError):  # all is gathered, nothing is pruned
        prune(models("llama", 3), out, progress=stop_at(5), **job)
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert (tmp_path / ".out.statistics").is_file()
    with pytest.raises(StateError, match=r"samples is 4 there and 5 here.*--restart"):
        prune(models("llama", 3), out, **(job | {"samples": 5}))
    assert prune(models("llama", 3), out, restart=True, **(job | {"samples": 5})).status == "done"
