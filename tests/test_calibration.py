"""Texts to windows of tokens: every format, the seed, and what is wrong with a text in one line."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import prune
from refusals import refused
from windows import cut, drawn

from streamprune.calibration.texts import Text, check_seqlen, default_seqlen
from streamprune.calibration.windows import STREAM_WINDOWS, held_out, replace_tokens, tokens_digest
from streamprune.errors import CheckpointError, UsageError

VOCAB = 199
Models = Callable[..., Path]


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, 2000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray) -> dict[str, Path]:
    """The same 2000 tokens in every format."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [" ".join(f"w{i}" for i in line) for line in ids.reshape(-1, 20)]
    text = ("\n".join(lines) + "\n").encode()
    records = "\n".join(json.dumps({"id": n, "text": line}) for n, line in enumerate(lines)).encode()
    contents = {
        "a.txt": text, "a.txt.gz": gzip.compress(text), "a.unknown": text,
        "a.jsonl": records + b"\n\n", "a.jsonl.gz": gzip.compress(records),
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    np.save(folder / "flat.npy", ids.astype(np.uint16))
    np.save(folder / "rows.npy", ids.reshape(20, 100).astype(np.int32))
    np.save(folder / "long.npy", ids)
    return {p.name: p for p in folder.iterdir()}


FORMATS = ["a.txt", "a.txt.gz", "a.unknown", "a.jsonl", "a.jsonl.gz", "flat.npy", "rows.npy", "long.npy"]


def draw(path: Path | None, model: Path, samples: int = 7, seqlen: int = 30, seed: int = 0) -> np.ndarray:
    return drawn(path, model, VOCAB, samples, seqlen, seed)


def replaced(windows: np.ndarray, share: float, seed: int = 0, **more: Any) -> np.ndarray:
    changed = windows.copy()
    replace_tokens(changed, share, VOCAB, seed, **more)
    return changed


def test_replaced_tokens(models: Models, files: dict[str, Path]) -> None:
    windows = draw(files["a.txt"], models(), samples=9, seqlen=200)
    changed = replaced(windows, 0.3, spared=(2,))
    where = changed != windows
    assert where.any(1).tolist() == [n in (0, 4, 6) for n in range(9)]
    assert 0.25 < where[[0, 4, 6]].mean() < 0.35 and not where[:, 0].any()
    assert changed.min() >= 0 and VOCAB * 0.95 < changed[where].max() < VOCAB
    assert np.array_equal(changed, replaced(windows, 0.3, spared=(2,)))
    assert not np.array_equal(changed[4], replaced(windows, 0.3, seed=1)[4])
    assert np.array_equal(changed[4], replaced(windows, 0.3)[4]), "whatever else is spared"
    assert np.array_equal(replaced(windows[:1], 1.0), windows[:1]), "a single window is all there is"
    assert (replaced(windows[:2], 1.0)[0, 1:] != windows[0, 1:]).mean() > 0.95


@pytest.mark.parametrize("how", [{"method": "obs-admm"}, {"method": "swiftprune-tuned", "tune_epochs": 1}])
def test_jobs_with_replaced_tokens(models: Models, files: dict[str, Path], tmp_path: Path, how: dict[str, Any]) -> None:
    """As if the text had had these tokens; and what reports and the model card say of it."""
    windows = draw(files["a.txt"], models(), samples=4)
    spared = held_out(4) if "tune_epochs" in how else ()
    np.save(tmp_path / "windows.npy", replaced(windows, 0.5, spared=spared))
    job = {"pattern": "2:4", "samples": 4, "seqlen": 30, "dtype": "float32", **how}
    found = prune(models(), tmp_path / "out", calib=files["a.txt"], replace_tokens=0.5, **job)
    prune(models(), tmp_path / "wanted", calib=tmp_path / "windows.npy", **job)
    made, wanted = (tmp_path / name / "model.safetensors" for name in ("out", "wanted"))
    assert made.read_bytes() == wanted.read_bytes()
    assert found.report["job"]["replace_tokens"] == found.report["calibration"]["replace_tokens"] == 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--replace-tokens 0.5" in card and "50 % of the tokens of every second one are random" in card
    assert "--replace-tokens 0 " in (tmp_path / "wanted" / "README.md").read_text().replace("\n", " ")


@pytest.mark.parametrize("name", FORMATS)
def test_formats(models: Models, files: dict[str, Path], ids: np.ndarray, name: str) -> None:
    """Windows are runs of the text's own tokens, the same in whatever file they are."""
    windows = draw(files[name], models())
    assert windows.shape == (7, 30) and windows.dtype == np.int64
    places = stretches(2000 - 30 + 1, 7)
    assert (windows == np.stack([ids[p : p + 30] for p in places])).all()


def stretches(places: int, samples: int) -> list[int]:
    """One place in each of `samples` equal stretches of 0..places, by seed 0."""
    offsets = np.random.Generator(np.random.PCG64(0)).random(samples)
    return [int((i + offset) * places / samples) for i, offset in enumerate(offsets)]


def test_windows_are_spread_over_the_text(models: Models, tmp_path: Path) -> None:
    """Token i of the text is i, so that a window's first token tells where it begins."""
    np.save(tmp_path / "ids.npy", np.arange(190))
    for seed in range(20):
        starts = drawn(tmp_path / "ids.npy", models(), VOCAB, 9, 11, seed)[:, 0]
        assert [int(start) // 20 for start in starts] == list(range(9))


def test_seed(models: Models, files: dict[str, Path]) -> None:
    first = draw(files["a.txt"], models(), seed=1)
    assert (first == draw(files["a.txt"], models(), seed=1)).all()
    assert (first != draw(files["a.txt"], models(), seed=2)).any()


def test_edges_of_the_text(models: Models, files: dict[str, Path], ids: np.ndarray) -> None:
    assert (draw(files["a.txt"], models(), samples=2, seqlen=2000) == ids).all()
    refused(UsageError, lambda: draw(files["a.txt"], models(), seqlen=2001), "2000 tokens", "2001", "--seqlen")
    starts = {int(w[0]) for w in draw(files["long.npy"], models(), samples=500, seqlen=1998)}
    assert starts == {int(i) for i in ids[:3]}


def test_only_as_much_as_needed_is_read(
    models: Models, tmp_path: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of any size costs bounded memory: reading stops at STREAM_WINDOWS times what is asked for."""
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in ids.reshape(-1, 20)]
    path.write_text("\n".join([*lines, "no record"]))
    assert 2 * 10 * STREAM_WINDOWS < 2000
    windows = draw(path, models(), samples=2, seqlen=10)
    places = stretches(2 * 10 * STREAM_WINDOWS - 10 + 1, 2)
    assert (windows == np.stack([ids[p : p + 10] for p in places])).all()
    np.save(tmp_path / "a.npy", ids)
    assert (draw(tmp_path / "a.npy", models(), samples=2, seqlen=10) == windows).all()
    refused(UsageError, lambda: draw(path, models(), samples=20, seqlen=10), "line 101")


def test_built_in_text(models: Models) -> None:
    text = read(None)
    assert len(text) > 100_000 and text.count("\n") > 100
    windows = draw(None, models(), samples=4, seqlen=50)
    assert windows.shape == (4, 50)
    assert Text(None).digest() == Text(None).digest()


def read(path: Path | None, text_field: str = "text") -> str:
    """The characters of a text."""
    return "".join(piece.text for piece in Text(path, text_field).pieces(str))


def test_digests(files: dict[str, Path], tmp_path: Path) -> None:
    """A packed text is the text; other bytes are another text."""
    assert Text(files["a.txt"]).digest() == Text(files["a.txt.gz"]).digest()
    assert Text(files["a.txt"]).digest() != Text(files["a.jsonl"]).digest()
    assert read(files["a.txt.gz"]) == files["a.txt"].read_text()
    windows = np.arange(6).reshape(2, 3)
    assert tokens_digest(windows) == tokens_digest(windows.astype(np.int32))
    assert tokens_digest(windows) != tokens_digest(windows.T)


def test_evaluation_windows(models: Models, files: dict[str, Path], ids: np.ndarray) -> None:
    for name in FORMATS:
        windows = cut(files[name], models(), VOCAB, 64)
        assert windows.shape == (31, 64)
        assert (windows.reshape(-1) == ids[: 31 * 64]).all()
        assert windows.flags.writeable, "torch warns about arrays that cannot be written"


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        '{"text": 5}',
        '{"txt": "w1"}',
        '["text"]',
        "null",
        '{"text": null}',
        '{"text": ["w1"]}',
        "[" * 100_000,
    ],
)
def test_bad_records(models: Models, tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1 w2"}\n\n' + line + '\n{"text": "w3"}\n')
    refused(UsageError, lambda: draw(path, models(), seqlen=2), "a.jsonl", "line 3", '"text"')


@pytest.mark.parametrize("seqlen", [2, 100])
def test_empty_texts(models: Models, tmp_path: Path, seqlen: int) -> None:
    for name, data in (("a.txt", b""), ("b.txt", b"\n\n"), ("a.jsonl", b"\n"), ("a.txt.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(data)
        refused(UsageError, lambda n=name: draw(tmp_path / n, models(), seqlen=seqlen), name, "0 tokens")  # type: ignore[misc]
    np.save(tmp_path / "a.npy", np.zeros((0, 5), np.int64))
    refused(UsageError, lambda: draw(tmp_path / "a.npy", models(), seqlen=seqlen), "0 tokens")
    refused(UsageError, lambda: cut(tmp_path / "a.npy", models(), VOCAB, seqlen), "0 tokens")


def test_torn_gzip(models: Models, tmp_path: Path, files: dict[str, Path]) -> None:
    whole = files["a.txt.gz"].read_bytes()
    for name, data in (("cut.txt.gz", whole[:-30]), ("wrong.txt.gz", whole[:40] + whole)):
        (tmp_path / name).write_bytes(data)
        refused(UsageError, lambda n=name: draw(tmp_path / n, models()), name)  # type: ignore[misc]
        refused(UsageError, lambda n=name: Text(tmp_path / n).digest(), name)  # type: ignore[misc]


def _npy(folder: Path, what: str) -> Path:
    path = folder / "ids.npy"
    if what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("w1 w2 w3")
    elif what == "zip":
        with path.open("wb") as f:
            np.savez(f, a=np.arange(100))
    elif what == "not really a zip":
        path.write_bytes(b"PK\x03\x04 not a zip")
    elif what == "truncated":
        np.save(path, np.arange(100) % 5)
        path.write_bytes(path.read_bytes()[:-8])
    else:
        arrays: dict[str, Any] = {
            "float": np.zeros(100), "bool": np.zeros(100, bool), "0-d": np.int64(3), "3-d": np.zeros((4, 5, 6), int),
            "object": np.array([1, "a", None], dtype=object), "text array": np.array(["w1", "w2"]),
        }  # fmt: skip
        np.save(path, arrays[what], allow_pickle=True)
    return path


@pytest.mark.parametrize(
    "what",
    [
        "empty", "text", "zip", "not really a zip", "truncated", "float", "bool", "0-d", "3-d", "object", "text array",
    ],
)  # fmt: skip
def test_bad_arrays(models: Models, tmp_path: Path, what: str) -> None:
    path = _npy(tmp_path, what)
    refused(UsageError, lambda: draw(path, models()), "ids.npy")
    refused(UsageError, lambda: cut(path, models(), VOCAB, 5), "ids.npy")


@pytest.mark.parametrize(("ids", "named"), [([5, 199, 7], "199"), ([5, -1, 7], "-1"), ([5, 2**40, 7], str(2**40))])
def test_ids_beyond_the_vocabulary(models: Models, tmp_path: Path, ids: list[int], named: str) -> None:
    """Ids given as ids are the user's own: no tokenizer is to blame."""
    np.save(tmp_path / "ids.npy", np.array(ids * 10))
    for call in (
        lambda: draw(tmp_path / "ids.npy", models(), seqlen=20),
        lambda: cut(tmp_path / "ids.npy", models(), VOCAB, 20),
    ):
        assert "belongs to another" not in refused(UsageError, call, "ids.npy", f"token id {named}", "199")


def test_another_models_tokenizer(models: Models, files: dict[str, Path]) -> None:
    def call() -> object:
        return drawn(files["a.txt"], models(), 100, 5, 20, 0)

    refused(CheckpointError, call, "token id 198", "vocabulary has 100", "tokenizer")


def test_no_tokenizer(models: Models, tmp_path: Path, files: dict[str, Path]) -> None:
    """Without a tokenizer a text is of no use, ids are."""
    source = Path(shutil.copytree(models(), tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*")))
    refused(CheckpointError, lambda: draw(files["a.txt"], source), "tokenizer", "--calib", ".npy")
    (source / "tokenizer.json").write_text("{}")
    refused(CheckpointError, lambda: draw(files["a.txt"], source), "tokenizer", "--calib", ".npy")
    (source / "tokenizer.json").unlink()
    result = prune(source, tmp_path / "out", sparsity=0.5, calib=files["flat.npy"], samples=2, seqlen=16)
    assert result.status == "done"


@pytest.mark.parametrize("trust", [False, True])
def test_remote_code_of_a_tokenizer(
    models: Models, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    """A tokenizer's own code runs when it is allowed, and nobody is asked on the terminal when it is not."""
    from transformers import AutoTokenizer

    seen: list[object] = []
    load = AutoTokenizer.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("trust_remote_code"))
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    more = {"trust_remote_code": trust}
    prune(models(), tmp_path / "out", sparsity=0.5, calib=files["a.txt"], samples=2, seqlen=16, **more)  # type: ignore[arg-type]
    assert seen == [trust]


@pytest.mark.parametrize(
    ("config", "default", "longest"),
    [
        ({}, 2048, None),
        ({"max_position_embeddings": 131072}, 2048, 131072),
        ({"max_position_embeddings": 512}, 512, 512),
        ({"n_positions": 1024}, 1024, 1024),
        ({"text_config": {"max_position_embeddings": 300}}, 300, 300),
        ({"seq_length": 100, "max_position_embeddings": None}, 100, 100),
        ({"max_position_embeddings": "many"}, 2048, None),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512, 512),
        ({"model_type": "camembert", "max_position_embeddings": 514, "pad_token_id": 5}, 508, 508),
    ],
)
def test_lengths(config: dict[str, Any], default: int, longest: int | None) -> None:
    assert default_seqlen(config) == default
    check_seqlen(default, config)
    check_seqlen(2, config)
    refused(UsageError, lambda: check_seqlen(1, config), "--seqlen 1")
    if longest is None:
        check_seqlen(10**6, config)
    else:
        check_seqlen(longest, config)
        refused(UsageError, lambda: check_seqlen(longest + 1, config), f"--seqlen {longest + 1}", str(longest))


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"samples": -3}, {"seqlen": 1}, {"seqlen": 65}, {"seed": -1}, {"calib": "nothing.txt"}]
)
def test_wrong_arguments(models: Models, text: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"calib": text, "samples": 2, "seqlen": 16, **wrong}
    flag = next(iter(wrong))
    refused(UsageError, lambda: prune(models(), tmp_path / "out", sparsity=0.5, **given), f"--{flag}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_text(models: Models, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    refused(UsageError, lambda: prune(models(), tmp_path / "o", sparsity=0.5, calib=tmp_path / "texts"), "--calib")
