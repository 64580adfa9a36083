"""`inspect --expect` of an output of prune: linears that its report says were left dense do not fail it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import prune
from mixtures import save_mixture
from quantised_files import rewritten
from test_further import beside

from streamprune.cli import main
from streamprune.disk.report import REPORT
from streamprune.inspection.inspect import inspect
from streamprune.inspection.pruned import find_pruned
from streamprune.packing.job import pack

DENSE, PRUNED = "model.layers.46.mlp.experts.0.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
FURTHER = 4 + 3 * 8 + 3 + 1
"""Linears of the layer for multi-token prediction, eh_proj included."""

Said = tuple[int, str, str]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a layer for multi-token prediction, which stays dense. Do not write there."""
    folder = tmp_path_factory.mktemp("further")
    model = rewritten(save_mixture(folder / "source", "glm4_moe", "bfloat16"), folder / "model", beside)
    return prune(model, folder / "out", method="magnitude", pattern="2:4", mtp="dense").out


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The exit code, stdout and stderr of `inspect`."""

    def call(*arguments: object) -> Said:
        code = main(["inspect", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def spoilt(out: Path, to: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    return rewritten(out, to, lambda tensors: tensors.update({name: change(tensors[name])}))


def test_what_was_left_dense_is_counted_and_not_judged(out: Path, said: Callable[..., Said]) -> None:
    code, told, errors = said(out, "--expect", "2:4")
    assert (code, errors) == (0, "")
    judged = len(inspect(out).linears) - FURTHER
    assert told.splitlines()[-1] == (
        f"expected 2:4: yes ({judged} linears; {FURTHER} more were left dense, as streamprune.json says)"
    )
    found = json.loads(said(out, "--expect", "2:4", "--json")[1])
    assert found["ok"] and len(found["left_dense"]) == FURTHER and DENSE.removesuffix(".weight") in found["left_dense"]
    assert inspect(out).left_dense == ()


def test_without_a_report_all_are_judged(out: Path, tmp_path: Path, said: Callable[..., Said]) -> None:
    shutil.copytree(out, tmp_path / "bare")
    (tmp_path / "bare" / REPORT).unlink()
    code, told, errors = said(tmp_path / "bare", "--expect", "2:4")
    assert code == 2 and told.endswith("expected 2:4: NO\n") and "model.layers.46." in errors


def test_what_the_report_says_was_pruned_must_be(out: Path, tmp_path: Path, said: Callable[..., Said]) -> None:
    model = spoilt(out, tmp_path / "model", PRUNED, torch.ones_like)
    code, told, errors = said(model, "--expect", "2:4")
    assert code == 2 and "expected 2:4: NO (" in told
    assert errors.startswith(f"streamprune: {PRUNED.removesuffix('.weight')}: row 0") and len(errors.splitlines()) == 1


def test_faults_fail_it_wherever_they_are(out: Path, tmp_path: Path) -> None:
    """But -0.0, which only matters where zeros are wanted."""
    for value, ok in ((-0.0, True), (float("nan"), False)):
        model = spoilt(out, tmp_path / str(value), DENSE, lambda t, v=value: torch.full_like(t, v))
        found = inspect(model, expect=["2:4", "0.5"])
        assert found.ok is ok and all(DENSE.removesuffix(".weight") in why for why in found.failures)


def test_if_none_was_pruned_it_fails(out: Path, said: Callable[..., Said]) -> None:
    code, _, errors = said(out, "--expect", "2:4", "--only", r"layers\.46\.")
    assert code == 2 and errors.splitlines() == [
        f"streamprune: none of these linears was pruned ({FURTHER}), says {out / REPORT}"
    ]


def test_what_skip_left_and_packed(models: Callable[..., Path], tmp_path: Path, said: Callable[..., Said]) -> None:
    done = prune(models(), tmp_path / "out", method="magnitude", pattern="2:4", skip=r"layers\.0\.|q_proj")
    for folder in (done.out, pack(done.out, tmp_path / "packed").out):
        found = inspect(folder, expect="2:4")
        assert found.ok and len(found.left_dense) == 7 + 2
        chosen = inspect(folder, expect="2:4", skip="q_proj")
        assert chosen.ok and len(chosen.left_dense) == 6
    (tmp_path / "out" / REPORT).write_text('{"format": "streamprune-report", "version": 1, "linears": [{}]}')
    assert said(done.out)[0] == 0
    code, _, errors = said(done.out, "--expect", "2:4")
    assert code == 7 and "damaged (linears)" in errors and len(errors.splitlines()) == 1


def test_packed_without_a_report(models: Callable[..., Path], tmp_path: Path) -> None:
    done = prune(models(), tmp_path / "out", method="magnitude", pattern="2:4", skip="q_proj")
    (done.out / REPORT).unlink()
    assert inspect(pack(done.out, tmp_path / "packed").out, expect="2:4").ok is False


@pytest.mark.parametrize(
    ("stored", "reported", "left"),
    [
        ("backbone.layers.0.mixer.q", "model.layers.0.mixer.q", "backbone.layers.0.mixer.k"),
        ("language_model.model.layers.0.q", "model.language_model.layers.0.q", "language_model.model.layers.0.o"),
        ("model.layers.0.block_sparse_moe.w1", "model.layers.0.mlp.experts.w1", "model.layers.0.self_attn.q#"),
        ("model.layers.0.mlp.experts.1.input_linear", "model.layers.0.mlp.1.input_linear", "model.layers.1.mlp.w"),
        ("model.layers.0.q", "model.layers.0.q", "mtp.layers.0.q"),
        ("model.layers.0.w1", "model.layers.0.up", None),
    ],
)
def test_names_that_differ(stored: str, reported: str, left: str | None, tmp_path: Path) -> None:
    """Linears are known again, and where that is not certain, they count as pruned; # stands for another shape."""
    other = left or "model.layers.0.w2"
    linears = {stored: (16, 8), other: (9 if other.endswith("#") else 8, 16)}  # as a Conv1D has it
    said: list[Any] = [{"name": reported, "rows": 8, "in_features": 16}]
    (tmp_path / REPORT).write_text(json.dumps({"format": "streamprune-report", "version": 1, "linears": said}))
    found = find_pruned(tmp_path, linears)
    assert found == ({stored} if left else linears.keys())


def test_shared_weights_have_several_names(tmp_path: Path) -> None:
    last, first = "model.layers.3.shared.q", "model.layers.1.shared.q"
    report = {"linears": [{"name": last, "rows": 8, "in_features": 16}], "shared": {last: [first]}}
    (tmp_path / REPORT).write_text(json.dumps({"format": "streamprune-report", "version": 1, **report}))
    assert find_pruned(tmp_path, {first: (8, 16), "model.layers.1.k": (8, 16)}) == {first}
