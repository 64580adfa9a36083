"""The journal: what is torn is redone, what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from calls import prune
from conftest import VOCAB
from crashing import NoSync, recorded, replace_os, restore, tree_of
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprune.disk import durable, journal
from streamprune.errors import CorruptStateError
from streamprune.pruning.job import JobResult

RECORDS: list[dict[str, Any]] = [
    {"stage": "embed", "n": 1},
    {"stage": "layer 0", "text": "line\nbreak \r and \x85 \u2028"},
    {"stage": "head", "list": [{"a": None}]},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    for record in RECORDS:
        journal.append(path, record)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "v"} for record in journal.read(path)]


def test_round_trip(path: Path) -> None:
    assert read(path) == RECORDS
    assert path.read_bytes().count(b"\n") == 3
    assert journal.read(path.with_name("none")) == []


def test_a_torn_tail_of_any_length_is_cut_off(path: Path) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = len(whole) - len(lines[-1])
    for length in range(kept, len(whole)):
        path.write_bytes(whole[:length])
        assert read(path) == RECORDS[:2]
        assert path.read_bytes() == whole[:kept]
        journal.append(path, RECORDS[2])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\xff" * 7, b"0123456789abcdef {}", b"0123456789abcdef {}\n"])
def test_a_tail_of_rubbish_is_cut_off(path: Path, tail: bytes) -> None:
    """A power failure may leave a file that is longer than what was written to it."""
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert read(path) == RECORDS
    assert path.read_bytes() == whole


def test_damage_in_the_middle(path: Path) -> None:
    """Only a line's end that is lost cannot be told from a torn tail: then less is read, never something else."""
    whole = path.read_bytes()
    last = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for place in range(last - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptStateError, match=rf"{path.name}: line \d is damaged; .*--restart"):
            journal.read(path)
    path.write_bytes(whole[: last - 1] + b"#" + whole[last:])
    assert read(path) == RECORDS[:1]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever happens to the file, what is read is a beginning of what was written, or an error."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    records: list[dict[str, Any]] = [{"n": i, "x": "y" * i} for i in range(4)]
    for record in records:
        journal.append(path, record)
    whole = path.read_bytes()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    path.write_bytes(whole[:begin] + data.draw(st.binary(max_size=20)) + whole[end:])
    try:
        found = read(path)
    except CorruptStateError:
        return
    kept = [r for r in records if r in found]
    assert found == kept and (found == records[: len(found)] or begin < end)


def test_unknown_version(path: Path) -> None:
    body = json.dumps({"v": 3, "stage": "from the future"}).encode()
    durable.append_line(path, xxhash.xxh3_64_hexdigest(body).encode() + b" " + body)
    with pytest.raises(CorruptStateError, match=r"line 4 has version 3, this program knows 2.*--restart"):
        journal.read(path)


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        journal.append(tmp_path / "journal", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_documents(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    journal.write_json(path, "report", {"a": 1})
    assert journal.read_json(path, "report")["a"] == 1
    whole = path.read_text()
    for content in ("", "[]", "null", "{", whole[:-4], whole.replace("-report", "-job"), "\ud800", "[" * 100_000):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(CorruptStateError, match=path.name):
            journal.read_json(path, "report")
    path.write_text(whole.replace('"version": 1', '"version": 2'))
    with pytest.raises(CorruptStateError, match="has version 2, this program knows 1"):
        journal.read_json(path, "report")
    with pytest.raises(CorruptStateError, match="none"):
        journal.read_json(tmp_path / "none", "report")


def test_a_sealed_document(tmp_path: Path) -> None:
    """Any damage is found, not only that which JSON shows."""
    path, value = tmp_path / "job.json", {"a": 1, "b": [1.5, None, "\u00e4\ud800"], "c": {"d": 1e-320, "e": {}}}
    journal.write_json(path, "job", value)
    assert {k: v for k, v in journal.read_json(path, "job").items() if k in value} == value
    whole = path.read_text()
    for old, new in (
        ('"a": 1', '"a": 2'),
        ("1.5", "1.25"),
        ('"d"', '"f"'),
        ("{}", "[]"),
        ('"xxh3_64": "', '"seal": "'),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(CorruptStateError, match=r"job\.json is damaged; start again with --restart"):
            journal.read_json(path, "job")


# ---- within a job


@pytest.fixture
def job(models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobResult]:
    np.save(tmp_path / "tokens.npy", np.random.default_rng(3).integers(0, VOCAB, 500))
    (tmp_path / "root").mkdir()

    replace_os(monkeypatch, NoSync())
    usual = {"model": models("llama", 2), "calib": tmp_path / "tokens.npy", "samples": 4, "seqlen": 16}
    return lambda **more: prune(out=tmp_path / "root" / "out", sparsity=0.5, **usual, **more)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_torn_record_means_that_its_stage_is_done_again(
    job: Callable[..., JobResult], tmp_path: Path, stage: int
) -> None:
    root = tmp_path / "root"
    with recorded(root) as disk:
        job()
    whole = {n: c for n, c in tree_of(root).items() if n != "out/streamprune.json"}
    appends = [o for o in disk.operations if o.endswith("write journal")]
    tree = disk.states["killed"][f"after {appends[stage]}"]
    name = "out.partial/.streamprune/journal"
    content = tree[name] or b""
    start = content[:-1].rfind(b"\n") + 1
    for length in (0, 1, 17, 18, (len(content) - start) // 2, len(content) - start - 1):
        restore(root, {**tree, name: content[: start + length]})
        seen: list[str] = []
        assert job(progress=lambda step, seen=seen: seen.append(step.name)).status == "done"
        assert len(seen) == 4 - stage
        assert {n: c for n, c in tree_of(root).items() if n != "out/streamprune.json"} == whole


@pytest.mark.parametrize("harm", ["flip", "drop the first line", "version"])
def test_a_damaged_journal_stops_the_job(job: Callable[..., JobResult], tmp_path: Path, harm: str) -> None:
    def stop(step: Any) -> None:
        if step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job(progress=stop)
    path = tmp_path / "root" / "out.partial" / ".streamprune" / "journal"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    if harm == "flip":
        lines[0] = lines[0][:30] + b"#" + lines[0][31:]
    elif harm == "version":
        body = lines[1][17:-1].replace(b'"v":2', b'"v":9')
        lines[1] = xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"
    else:
        del lines[0]
    path.write_bytes(b"".join(lines))
    with pytest.raises(CorruptStateError, match="--restart"):
        job()
    assert path.exists()
    assert job(restart=True).status == "done"
    assert not path.exists()
