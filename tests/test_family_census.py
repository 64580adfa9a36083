"""tools/family_census.py: every family of transformers is listed once, a new one as not tried."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "tools"))

import family_census
from families import DENSE, LINKED, RECURRENT, REFUSED, SEEING
from mixtures import EVERY

TRIED = [*DENSE, *RECURRENT, *SEEING, *LINKED, *EVERY, *REFUSED]


def test_every_family_is_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"llama": "LlamaForCausalLM", "copied": "LlamaForCausalLM", "bart": "BartForCausalLM", "new": "NewModel"}
    known["marian"] = "MarianForCausalLM"
    monkeypatch.setattr(family_census, "class_names", lambda: known)
    found = family_census.census(["llama", "bart", "t5"])
    assert found.every == ("bart", "copied", "llama", "marian", "new", "t5")
    assert found.alike == {"copied": "llama"} and found.refused == ("marian",) and found.unknown == ("new",)
    text = "\n".join(family_census.lines(found, ["llama", "bart", "t5"]))
    assert (
        "Of the 6 model types" in text and "3 were tried, 1 more have" in text and "1 more are encoder-decoder" in text
    )
    assert "and 1 were not tried" in text and "`copied` (llama)" in text and "is known: `new`" in text
    assert "and 0 were not tried" in "\n".join(family_census.lines(found, ["llama", "bart", "t5", "new"]))


def test_what_is_tried_is_known_to_transformers() -> None:
    """Whatever has a tiny configuration is a model type of its tables, or an encoder-decoder."""
    assert set(TRIED) - family_census.class_names().keys() <= {"t5"}
