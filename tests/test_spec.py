"""What a job is: which fields make it another job, and the small parsers of arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamprune.disk.linears import compile_filter
from streamprune.errors import UsageError
from streamprune.methods.recipes import FP8_SCALES, RECIPES, REFITS, SCORE_NAMES, SELECTORS, Recipe
from streamprune.process.memory import format_bytes, parse_bytes
from streamprune.pruning.spec import DrawnText, JobSpec
from streamprune.settings import Calibration, Resources

SPEC = JobSpec(
    verb="prune", model={"config": "c", "shards": "s"}, recipe=RECIPES["swiftprune"], sparsity=0.5, pattern=None,
    only=None, skip=None, propagate="dense", calibration=DrawnText(Path("a.txt"), "d1", 128, 2048, 0), stats=None,
    source=Path("model"), out=Path("out"),
)  # fmt: skip

FIXED: list[tuple[dict[str, Any], str]] = [
    ({"verb": "calibrate"}, "verb"),
    ({"model": {"config": "other", "shards": "s"}}, "model config"),
    ({"recipe": RECIPES["wanda"]}, "score"),
    ({"recipe": replace(RECIPES["swiftprune"], selector="exact")}, "selector"),
    ({"recipe": replace(RECIPES["swiftprune"], refit="cg")}, "refit"),
    ({"recipe": RECIPES["hwpq"]}, "quantize"),
    ({"recipe": Recipe.named("hwpq", fp8_scale="mse").filled()}, "fp8_scale"),
    ({"recipe": Recipe.named("hwpq", fp8_rounding="nearest").filled()}, "fp8_rounding"),
    ({"recipe": Recipe.named("obs-admm", damping="absolute").filled()}, "damping"),
    ({"recipe": RECIPES["swiftprune-tuned"]}, "tune"),
    ({"recipe": Recipe.named("swiftprune-tuned", tune_epochs=3).filled()}, "tune_epochs"),
    ({"recipe": Recipe.named("swiftprune-tuned", tune_lr=0.01).filled()}, "tune_lr"),
    ({"recipe": Recipe.named("swiftprune", allocate="owl").filled()}, "allocate"),
    ({"recipe": None}, "score"),
    ({"sparsity": 0.6}, "sparsity"),
    ({"sparsity": None, "pattern": "2:4"}, "pattern"),
    ({"only": "mlp"}, "only"),
    ({"skip": "mlp"}, "skip"),
    ({"propagate": "pruned"}, "propagate"),
    ({"calibration": None}, "calib"),
    ({"calibration": DrawnText(Path("a.txt"), "d2", 128, 2048, 0)}, "calib"),
    ({"calibration": DrawnText(Path("a.txt"), "d1", 64, 2048, 0)}, "samples"),
    ({"calibration": DrawnText(Path("a.txt"), "d1", 128, 1024, 0)}, "seqlen"),
    ({"calibration": DrawnText(Path("a.txt"), "d1", 128, 2048, 1)}, "seed"),
    ({"expert_stats": "routed"}, "expert_stats"),
    ({"expert_tokens": 8}, "expert_tokens"),
    ({"stats": "digest"}, "stats"),
    ({"resources": Resources(device="cpu")}, "device"),
    ({"resources": Resources(dtype="float32")}, "dtype"),
    ({"resources": Resources(backend="torch")}, "backend"),
]
CHANGEABLE: list[dict[str, Any]] = [
    {"source": Path("moved")}, {"out": Path("other")}, {"resources": Resources(max_ram=1 << 30)},
    {"resources": Resources(max_vram="1GiB")},
    {"save_stats": Path("s")}, {"resources": Resources(work="w")}, {"restart": True}, {"trust_remote_code": True},
    {"stats_path": Path("s")}, {"allow_zeros": True}, {"shard_bytes": 9}, {"content": str},
    {"notes": ["told at the end"]},
    {"calibration": DrawnText(Path("renamed.txt"), "d1", 128, 2048, 0)},
]  # fmt: skip


@pytest.mark.parametrize(("change", "field"), FIXED, ids=str)
def test_fixed(change: dict[str, Any], field: str) -> None:
    other = replace(SPEC, **change)
    assert SPEC.fixed() != other.fixed()
    said = other.differences(SPEC.fixed())
    assert f"{field} is " in said and " there and " in said and said.endswith(" here")
    assert "None" not in said


@pytest.mark.parametrize("change", CHANGEABLE, ids=str)
def test_changeable(change: dict[str, Any]) -> None:
    assert replace(SPEC, **change).fixed() == SPEC.fixed()
    assert replace(SPEC, **change).differences(SPEC.fixed()) == ""


def test_every_field_is_one_or_the_other() -> None:
    from dataclasses import fields

    tried = {k for change in [c for c, _ in FIXED] + CHANGEABLE for k in change}
    assert tried == {f.name for f in fields(JobSpec)}


def test_differences_in_words() -> None:
    said = SPEC.differences(replace(SPEC, sparsity=None, pattern="2:4", only="x").fixed())
    assert "sparsity is not set there and 0.5 here" in said
    assert "pattern is 2:4 there and not set here" in said
    assert "only is x there and not set here" in said
    assert SPEC.differences(SPEC.fixed() | {"new field": 3}) == "new field is 3 there and not set here"
    assert SPEC.differences({k: v for k, v in SPEC.fixed().items() if k != "seed"}) == (
        "seed is not set there and 0 here"
    )


def test_what_was_asked_for_is_no_default_of_an_earlier_version() -> None:
    """6 epochs were the default once, with a rate of 0.02."""
    recipe = Recipe.named("swiftprune-tuned")
    assert recipe.filled({"tune_epochs": 6, "tune_lr": 0.015, "replace_tokens": 0.3}) == recipe.filled()
    assert recipe.filled({"tune_epochs": 6, "tune_lr": 0.02}).tune_epochs == 6
    assert replace(recipe, tune_epochs=3).filled({"tune_epochs": 3, "tune_lr": 0.02}).tune_lr == 0.02


@pytest.mark.parametrize(
    ("method", "share"),
    [("swiftprune", None), ("sparsegpt", 0.0), ("admm", 0.0), ("obs-admm", 0.3), ("swiftprune-tuned", 0.3)],
)
def test_tokens_are_replaced_where_new_values_are_ours(method: str, share: float | None) -> None:
    recipe = Recipe.named(method)
    assert recipe.filled().replace_tokens == share
    assert replace(recipe, replace_tokens=0).filled().replace_tokens == (0.0 if recipe.aims else None)
    assert replace(recipe, replace_tokens=0).filled({"samples": 4}).replace_tokens is None
    assert recipe.filled({"samples": 4}).replace_tokens is None, "a job of a version that replaced none"
    if recipe.aims:
        assert replace(recipe, replace_tokens=0.5).filled({"replace_tokens": 0.3}).replace_tokens == 0.5
        assert recipe.filled({"replace_tokens": 0.0}).replace_tokens == share, "none was asked for then, not now"


def test_a_pattern_needs_no_selector() -> None:
    """With a pattern, the selector has nothing to choose, so it makes no other job."""
    one = replace(SPEC, sparsity=None, pattern="2:4")
    two = replace(one, recipe=replace(RECIPES["swiftprune"], selector="exact"))
    assert one.fixed() == two.fixed()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30), ("8 GiB", 8 << 30), ("8G", 8 << 30), ("8g", 8 << 30), ("500MB", 500_000_000),
        ("500 mb", 500_000_000), ("1.5e9", 1_500_000_000), ("1024", 1024), ("7B", 7), ("0.5GiB", 1 << 29),
        (".5 KiB", 512), ("2T", 2 << 40), ("  3M  ", 3 << 20), ("1e3KB", 1_000_000),
    ],
)  # fmt: skip
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", "much", "0", "0GiB", "-1GiB", "1XB", "GiB", "1 GiB 2", "nan", "inf", "1e400", "1e400GiB", "1,5GB", "0x10",
        "0.5",
    ],
)  # fmt: skip
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="8GiB"):
        parse_bytes(text)


@given(st.integers(1, 10**15))
def test_bytes_for_people_are_near(count: int) -> None:
    shown = format_bytes(count)
    assert abs(parse_bytes(shown) - count) <= 0.006 * count + 1
    assert len(shown) <= 8


def test_format_bytes() -> None:
    shown = [format_bytes(n) for n in (0, 1023, 1024, 712 << 20, 1.43 * 2**30, 3 << 40)]
    assert shown == ["0 B", "1023 B", "1 KiB", "712 MiB", "1.43 GiB", "3 TiB"]


def test_filters() -> None:
    assert compile_filter("--only", None) is None
    found = compile_filter("--only", r"mlp\.up")
    assert found is not None and found.search("model.layers.3.mlp.up_proj")
    with pytest.raises(UsageError, match=r"--skip '\(' is not a regular expression"):
        compile_filter("--skip", "(")


def test_recipes() -> None:
    assert Recipe.named("swiftprune") == RECIPES["swiftprune"]
    mixed = Recipe.named("swiftprune", score="wanda")
    assert (mixed.score, mixed.selector, mixed.name) == ("wanda", "ewma", "wanda+ewma")
    assert Recipe.named("magnitude", score="wanda").name == "wanda"
    assert Recipe.named("hwpq", quantize="none", allocate="uniform") == RECIPES["swiftprune"]
    assert Recipe.named("obs-admm", damping=0.1, allocate="owl").name == "obs-admm", "settings make no other recipe"
    with pytest.raises(UsageError, match="--method x"):
        Recipe.named("x")


@pytest.mark.parametrize("name", RECIPES)
def test_filling_in_twice_changes_nothing(name: str) -> None:
    once = RECIPES[name].filled()
    assert once.filled() == once and once.name == name
    assert (once.damping is None) == (once.refit is None)
    assert (once.fp8_scale is None) == (once.fp8_rounding is None) == (once.quantize is None)
    assert (once.tune_epochs is None) == (once.tune_lr is None) == (once.tune is None)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"score": "x"}, "--score x"), ({"selector": "x"}, "--selector x"), ({"refit": "x"}, "--refit x"),
        ({"allocate": "x"}, "--allocate x"), ({"damping": 0.1}, "--damping"), ({"tune_lr": 0.1}, "--tune-lr"),
        ({"refit": "cg", "damping": "-1"}, "--damping -1"), ({"fp8_scale": "mse"}, "--fp8-scale"),
        ({"quantize": "fp8", "fp8_rounding": "compensate"}, "--fp8-rounding compensate"),
        ({"refit": "cg", "quantize": "fp8", "tune": "block", "fp8_rounding": "compensate"}, "--fp8-rounding"),
        ({"replace_tokens": 1.5, "tune": "block"}, "--replace-tokens 1.5"),
        ({"replace_tokens": 0.3}, "--replace-tokens is for a refit"),
        ({"tune": "block", "tune_epochs": 0}, "--tune-epochs 0"),
    ],
)  # fmt: skip
def test_recipes_refuse(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UsageError, match=re.escape(flag)):
        Recipe(**changes)


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: Calibration(samples=0), "--samples"), (lambda: Calibration(seed=-1), "--seed"),
        (lambda: Calibration(bos="yes"), "--bos yes"), (lambda: Calibration(expert_stats="all"), "--expert-stats all"),
        (lambda: Calibration(expert_tokens=0), "--expert-tokens"), (lambda: Calibration(samples=10**9), "--samples"),
        (lambda: Resources(dtype="int8"), "--dtype int8"), (lambda: Resources(backend="jax"), "--backend jax"),
        (lambda: Resources(max_ram="much"), "much"), (lambda: Resources(max_vram="0"), "0"),
    ],
)  # fmt: skip
def test_settings_refuse(make: Callable[[], object], flag: str) -> None:
    with pytest.raises(UsageError, match=re.escape(flag)):
        make()


def test_names_of_the_parts_agree() -> None:
    """recipes.py names, without importing torch, what the modules beside it implement."""
    from streamprune.kernels import cpu, torch_ops
    from streamprune.methods import fp8, refits, scores

    assert tuple(scores.SCORES) == SCORE_NAMES
    assert all(hasattr(kernels, f"prune_{selector}") for selector in SELECTORS for kernels in (cpu, torch_ops))
    assert {"none", *refits.METHODS} == set(REFITS)
    assert tuple(fp8._FACTORS) == FP8_SCALES
    without = {name for name in SCORE_NAMES if not Recipe.named("wanda", score=name).needs_statistics}
    assert without == scores.WITHOUT_STATISTICS
