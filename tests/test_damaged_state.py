"""What streamprune wrote itself and finds damaged: one line and exit code 7, for every field and every kind of job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import calibrate, prune
from conftest import VOCAB
from crashing import NoSync, replace_os
from test_packed import two_four
from test_packing import LEGACY, save

from streamprune.errors import CorruptStateError, StreampruneError
from streamprune.packing.job import pack, unpack
from streamprune.progress import Progress

Job = Callable[..., Any]
Place = tuple[str | int, ...]

VALUES: list[Any] = [None, [], {}, "x", 7, -0.5, True, [{}], {"x": []}]


def stop(step: Progress) -> None:
    if not step.name.startswith("allocate"):  # when nothing has been written yet
        raise KeyboardInterrupt


def places(value: object, path: Place = ()) -> Iterator[Place]:
    """The places of all values within a JSON document; of a list, of its first item."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def harmed(document: object, place: Place, value: object) -> Any:
    """A copy of a document with another value at one place."""
    copy = json.loads(json.dumps(document))
    at = copy
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return copy


@pytest.fixture(params=["prune", "calibrate", "allocate", "pack", "unpack"])
def job(
    request: pytest.FixtureRequest, models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Job:
    """A job of each kind, with OUT = tmp_path / "out"."""
    replace_os(monkeypatch, NoSync())
    out = tmp_path / "out"
    if request.param == "pack":
        bits = [{f"model.layers.{i}.fc.weight": ("BF16", two_four(16, 1024, np.uint16, i))} for i in range(2)]
        model = save(tmp_path / "model", *bits)
        return lambda **more: pack(model, out, **more)
    if request.param == "unpack":
        return lambda **more: unpack(LEGACY / "two-four", out, **more)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(0, VOCAB, 500))
    usual: dict[str, Any] = {"model": models("llama", 2), "calib": tmp_path / "tokens.npy", "samples": 4, "seqlen": 16}
    if request.param == "calibrate":
        return lambda **more: calibrate(out=out, **usual, **more)
    allocate = "owl" if request.param == "allocate" else "uniform"
    return lambda **more: prune(out=out, sparsity=0.5, allocate=allocate, work=tmp_path, **usual, **more)


def wrong(run: Job, *needles: str) -> str:
    """Runs what must end with a CorruptStateError of one line; says what else it does, or nothing."""
    try:
        run()
    except StreampruneError as e:
        message = str(e)
        fine = type(e) is CorruptStateError and "\n" not in message and all(needle in message for needle in needles)
        return "" if fine else f"{type(e).__name__}: {message}"
    except Exception as e:  # noqa: BLE001 - reported with its place
        return f"unexpected {type(e).__name__}: {e}"
    return "nothing"


def harm_all(path: Path, run: Job, *needles: str) -> None:
    """Puts wrong values at every place of a JSON file, one at a time; wants an error for each."""
    whole = path.read_bytes()
    document = json.loads(whole)
    found = []
    for place in places(document):
        for value in VALUES:
            text = json.dumps(harmed(document, place, value))
            if text != json.dumps(document):
                path.write_text(text)
                if why := wrong(run, path.name, *needles):
                    found.append(f"{place} = {value!r}: {why}")
    path.write_bytes(whole)
    assert not found, "\n".join(found)


def test_every_field_of_job_json(job: Job, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    while not partial.exists():  # `allocate` has a job of its own before it
        with pytest.raises(KeyboardInterrupt):
            job(progress=stop)
        harm_all(next(tmp_path.glob("*.partial/.streamprune/job.json")), job)
    job()
    assert (tmp_path / "out").exists() and not partial.exists()


@pytest.mark.parametrize("cache", [7, "precious"])
def test_restart_removes_nothing_that_damage_names(job: Job, tmp_path: Path, cache: object) -> None:
    (tmp_path / "precious").mkdir()
    with pytest.raises(KeyboardInterrupt):
        job(progress=stop)
    path = next(tmp_path.glob("*.partial/.streamprune/job.json"))
    value = str(tmp_path / cache) if isinstance(cache, str) else cache
    path.write_text(json.dumps(harmed(json.loads(path.read_bytes()), ("cache",), value)))
    assert wrong(job, "--restart") == ""
    job(restart=True)
    assert (tmp_path / "out").exists() and (tmp_path / "precious").exists() and not path.exists()


def test_every_field_of_a_report(job: Job, tmp_path: Path) -> None:
    """Some do not matter, and with some it is another job's; none is a surprise."""
    job()
    path = tmp_path / "out" / "streamprune.json"
    if not path.exists():
        return
    whole = path.read_bytes()
    document = json.loads(whole)
    found = []
    for place in places(document):
        for value in VALUES:
            path.write_text(json.dumps(harmed(document, place, value)))
            if "unexpected" in (why := wrong(job)):
                found.append(f"{place} = {value!r}: {why}")
    assert not found, "\n".join(found)
