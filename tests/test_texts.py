"""Texts as people have them: names, packings, encodings, records; and tokens that do not depend on how it is read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, plan, prune
from refusals import refused
from test_calibration import read
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from whole_model import in_memory, perplexity
from windows import cut, drawn

from streamprune.calibration.text_files import BLOCK
from streamprune.calibration.texts import Piece, Text
from streamprune.calibration.tokens import OVERLAP, encode
from streamprune.errors import UsageError
from streamprune.pruning.report import notes_of

Models = Callable[..., Path]

TEXTS = ["w1 w2 w3", "w4\nw5", "w6 é w7"]
LINES = "\n".join(json.dumps({"url": "https://example.org", "text": t}) for t in TEXTS)
ARRAY = json.dumps([{"text": t} for t in TEXTS])
INDENTED = json.dumps([{"text": t, "more": {"text": "no"}} for t in TEXTS], indent=2)
ONE_BY_ONE = "\n".join(json.dumps({"text": t, "a": [1, 2]}, indent=1) for t in TEXTS)
WANTED = "".join(t + "\n" for t in TEXTS)


@pytest.mark.parametrize("content", [LINES, ARRAY, INDENTED, ONE_BY_ONE], ids=["lines", "array", "indented", "objects"])
@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json", "a.JSONL", "a.ndjson", "a.jsonl", "a"])
def test_records_whatever_their_name(tmp_path: Path, name: str, content: str) -> None:
    if content == ONE_BY_ONE and name == "a":
        pytest.skip("braces that are spread over lines are no records without a name that says so")
    for path, data in ((tmp_path / name, content.encode()), (tmp_path / f"{name}.gz", gzip.compress(content.encode()))):
        path.write_bytes(data)
        assert read(path) == WANTED
    assert Text(tmp_path / name).digest() == Text(tmp_path / f"{name}.gz").digest()


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_packed_whatever_its_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for name in ("a.txt", "a.gz", "a.bin"):
        (tmp_path / name).write_bytes(pack(b"w1 w2\nw3\n"))
        assert read(tmp_path / name) == "w1 w2\nw3\n"


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress(part) for part in (LINES[:50].encode(), LINES[50:].encode())]
    path.write_bytes(b"".join(frames))
    assert read(path) == WANTED
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    refused(UsageError, lambda: read(path), "a.jsonl.zst", "pip install zstandard")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), path)
    assert read(path) == WANTED
    refused(UsageError, lambda: read(path, "content"), "a.parquet", "no column content", "text, n", "--text-field")
    refused(UsageError, lambda: read(path, "n"), "row 1", '"n"')
    (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-9])
    refused(UsageError, lambda: read(tmp_path / "b.parquet"), "b.parquet", "Parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused(UsageError, lambda: read(path), "a.parquet", "pip install pyarrow")


def test_arrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"n": list(range(len(TEXTS))), "text": TEXTS})
    folder = tmp_path / "saved"
    folder.mkdir()
    for name, opened in (("a.arrow", pyarrow.ipc.new_stream), ("b.arrow", pyarrow.ipc.new_file)):
        with opened(str(folder / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        assert read(folder / name) == WANTED
    (folder / "state.json").write_text('{"_data_files": []}')
    (folder / "dataset_info.json").write_text('{"features": {}}')
    assert read(folder) == 2 * WANTED
    refused(UsageError, lambda: read(folder / "a.arrow", "body"), "no column body", "n, text")


def test_separated_values(tmp_path: Path) -> None:
    quoted = [f'{n},"{t}",x' for n, t in enumerate(TEXTS)]
    (tmp_path / "a.csv").write_text("\n".join(["id,text,more", *quoted]) + "\n")
    (tmp_path / "a.TSV.gz").write_bytes(gzip.compress(b"id\ttext\n1\tw1 w2\n2\t\n"))
    assert read(tmp_path / "a.csv") == WANTED
    assert read(tmp_path / "a.TSV.gz") == "w1 w2\n\n"
    refused(UsageError, lambda: read(tmp_path / "a.csv", "body"), "no column body", "id, text, more")


@pytest.mark.parametrize(
    ("begin", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>503</body></html>" + b" w1" * 999, "HTML page"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"model.weight":{}}' * 99, "NUL bytes"),
    ],
)
def test_what_stands_in_for_a_text(tmp_path: Path, begin: bytes, named: str) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(begin)
        refused(UsageError, lambda n=name: read(tmp_path / n), name, named)  # type: ignore[misc]
    (tmp_path / "page.html").write_bytes(b"<html>w1</html>")
    assert read(tmp_path / "page.html") == "<html>w1</html>"


def test_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "w1", "text": "w2"}\n')
    assert read(path, "content") == "w1\n"
    assert len({Text(path, name).digest() for name in ("content", "text")}) == 2
    refused(UsageError, lambda: read(path, "body"), "line 1", '"body"', "content, text", "--text-field")


def test_messages_go_through_the_chat_template(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models(), tmp_path / "model"))
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(20)))

    def call() -> np.ndarray:
        from windows import source as source_of

        from streamprune.calibration.windows import Source

        plain = source_of(path, source, 199)
        return np.concatenate(list(Source(Text(path, "messages"), source, plain.config, 199).begin(8).blocks))

    refused(UsageError, call, "chat template")
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}w{{ 100 if m.role == 'user' else 101 }} {{ m.content }} {% endfor %}"
    )
    assert call()[:5].tolist() == [100, 1, 2, 101, 3]
    refused(UsageError, lambda: read(path), "messages", "--text-field")


@pytest.mark.parametrize(
    ("data", "wanted", "replaced"),
    [
        (b"\xef\xbb\xbfw1 w2\r\nw3\r\n", "w1 w2\nw3\n", 0),
        ("\ufeffw1 é\n".encode("utf-16-le"), "w1 é\n", 0),
        ("\ufeffw1 é\n".encode("utf-16-be"), "w1 é\n", 0),
        ("\ufeffw1 é\n".encode("utf-32-le"), "w1 é\n", 0),
        (b"w1 w2 w3 w4\nw5 \xff w6\n", "w1 w2 w3 w4\nw5 \ufffd w6\n", 1),
        ("w1 w2 w3 w4 \ufffd w5 w6\n".encode(), "w1 w2 w3 w4 \ufffd w5 w6\n", 0),
    ],
)
def test_encodings(tmp_path: Path, data: bytes, wanted: str, replaced: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    text = Text(path)
    assert "".join(piece.text for piece in text.pieces(str)) == wanted and text.tally.replaced == replaced


def test_characters_across_blocks(tmp_path: Path) -> None:
    """Blocks end anywhere, also within a character, a genuine U+FFFD and a CRLF."""
    path = tmp_path / "a.txt"
    for shift in range(4):
        wanted = "x" * shift + "é\ufffd漢\n" * 20_000
        path.write_bytes(wanted.replace("\n", "\r\n").encode())
        text = Text(path)
        assert "".join(piece.text for piece in text.pieces(str)) == wanted and text.tally.replaced == 0


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a"])
def test_what_is_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    refused(UsageError, lambda: read(path), name, "is not text")


def test_half_a_surrogate_pair(tmp_path: Path, models: Models) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "bad \\ud83d end"}\n{"text": "good \\ud83d\\ude00"}\n' * 3)
    text = Text(path)
    assert "".join(piece.text for piece in text.pieces(str)) == "bad \ufffd end\ngood 😀\n" * 3
    assert text.tally.replaced == 3
    report = prune(models(), tmp_path / "out", sparsity=0.5, calib=path, samples=2, seqlen=4).report
    assert report["calibration"]["replaced"] == 3
    assert any("3 bytes" in note for note in notes_of(report))
    assert evaluate(models(), path, seqlen=4, work=tmp_path).replaced == 3


def test_records_among_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a title\n" + LINES)
    refused(UsageError, lambda: read(path), "a.txt", "line 1", "records")
    path.write_text('w1 w2\n{"text": 1}\nw3\nw4\n')
    assert read(path).startswith("w1 w2\n{")
    path.write_text(LINES + "\nthe end\n")
    refused(UsageError, lambda: read(path), "line 4", "record")
    for bad in ("[1, 2]", '[{"text": "w1"}, 5]', '[{"text": "w1"}', '{"text": "w1"} {"te'):
        (tmp_path / "a.json").write_text(bad)
        refused(UsageError, lambda: read(tmp_path / "a.json"), "a.json", "record")


def test_a_record_of_many_blocks(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(40_000))
    record = {"text": words}
    for name, content in (("a.jsonl", json.dumps(record)), ("a.json", json.dumps([record], indent=1))):
        (tmp_path / name).write_text(content)
        pieces = list(Text(tmp_path / name).pieces(str))
        assert "".join(p.text for p in pieces) == words + "\n"
        assert len(pieces) > 2 and [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]


def test_small_records_after_a_long_one(tmp_path: Path) -> None:
    """What has been read ahead for a long record belongs to those that follow; each comes once, in order."""
    path = tmp_path / "a.json"
    short = [{"text": f"w{i % 9}"} for i in range(20_000)]
    path.write_text(json.dumps([{"text": "w " * 300_000}, *short]))
    pieces = [piece.text for piece in Text(path).pieces(str)]
    assert pieces[-20_000:] == [record["text"] + "\n" for record in short]


def test_folders_and_patterns(tmp_path: Path, models: Models) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    refused(UsageError, lambda: read(folder), "--calib", "holds no texts")
    (folder / "b.jsonl").write_text('{"text": "w3"}\n')
    (folder / "a.txt").write_text("w1 w2\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    for path in (folder, folder / "*.[tj]*"):
        assert read(path) == "w1 w2\nw3\n"
    refused(UsageError, lambda: read(folder / "*.csv"), "no such file")
    assert Text(folder).digest() not in {Text(folder / name).digest() for name in ("a.txt", "b.jsonl")}
    np.save(folder / "c.npy", np.arange(9))
    refused(UsageError, lambda: Text(folder / "*[tlny]").ids, "c.npy", "token ids")


def test_the_same_text_by_another_name_is_the_same_job(models: Models, tmp_path: Path) -> None:
    content = "\n".join(json.dumps({"text": "w1 w2 w3 w4", "b": f"w{i} w{i}"}) for i in range(30))
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text(content)
    job = {"sparsity": 0.5, "samples": 2, "seqlen": 8}
    made = [prune(models(), tmp_path / "out", calib=tmp_path / n, **job).status for n in ("a.txt", "b.jsonl")]  # type: ignore[arg-type]
    assert made == ["done", "up-to-date"]
    from streamprune.errors import StateError

    def other() -> object:
        return prune(models(), tmp_path / "out", calib=tmp_path / "a.txt", text_field="b", **job)  # type: ignore[arg-type]

    refused(StateError, other, "calib")


def test_a_text_that_is_too_short_for_windows_apart(models: Models, text: Path, tmp_path: Path) -> None:
    """3000 tokens are 46 windows of 64; of more, windows overlap, and the user hears of it."""
    for samples, apart in ((46, True), (47, False)):
        out = tmp_path / str(samples)
        report = prune(models(), out, sparsity=0.5, calib=text, samples=samples, seqlen=64).report
        assert report["calibration"].get("text_tokens") == (None if apart else 3000)
        assert any("overlap" in note for note in notes_of(report)) is not apart


# ---- tokens


def _trained(pre: Any, decoder: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>"], show_progress=False)
    tokenizer.train_from_iterator([_prose(seed) for seed in range(20)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def _prose(seed: int, length: int = 400) -> str:
    generator = np.random.default_rng(seed)
    words = ["the", "stream", "of", "layers", "isn't", "pruned", "naïve", "漢字", "😀", "2026", "...", "\n", "  "]
    return " ".join(words[i] for i in generator.integers(0, len(words), length))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        "byte level": _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
        "metaspace": _trained(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()),
        "one word": _trained(pre_tokenizers.Split("never ever", "isolated"), decoders.Fuse(), normalizers.NFKC()),
    }


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "one word"])
@pytest.mark.parametrize("length", [OVERLAP + 1, 5000, 9973])
def test_pieces_give_the_tokens_of_the_whole(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, length: int
) -> None:
    tokenizer, text = tokenizers[kind], _prose(99, 9000)
    pieces = [Piece(text[at : at + length], False) for at in range(0, len(text), length)]
    found = np.concatenate(list(encode(tokenizer, [*pieces, Piece("", True), Piece("of the", True)])))
    whole = [i for part in (text, "of the") for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert len(pieces) > 2 and found.tolist() == whole


def test_a_tokenizer_that_does_not_tell_where_its_tokens_begin() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert len(text) <= (1 << 20) + BLOCK
            return {"input_ids": [len(word) for word in text.split()]}

    text = _prose(5, 30_000)
    pieces: Iterator[Piece] = (Piece(text[at : at + 1000], False) for at in range(0, len(text), 1000))
    found = np.concatenate(list(encode(Slow(), pieces)))
    assert found.tolist() == [len(word) for word in text.split()]
    assert sum(len(ids) for ids in encode(Slow(), [Piece("x" * BLOCK, False)] * 60)) == 4


# ---- BOS


def _with_bos(model: Path, folder: Path, adds: bool, bos: str | None = "<s>") -> Path:
    """A copy of `model` whose tokenizer has a BOS token, of id 0, and puts it before a text by itself or not."""
    copy = Path(shutil.copytree(model, folder))
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    first = tokenizer.id_to_token(0)
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"bos_token": first} if bos else {}))
    fast.save_pretrained(copy)
    return copy


def test_bos(models: Models, text: Path, tmp_path: Path) -> None:
    adds, has, none = (
        _with_bos(models(), tmp_path / name, *how)
        for name, how in (("adds", (True,)), ("has", (False,)), ("none", (False, None)))
    )
    ids = cut(text, none, 199, 16)
    flat = ids.reshape(-1)
    for model, mode, bos in ((adds, "auto", True), (adds, "never", False), (has, "auto", False), (has, "always", True)):
        found = cut(text, model, 199, 16, bos=mode)
        assert found.shape == (len(ids), 16 + bos)
        assert (found[:, bos:] == ids).all() and (not bos or (found[:, 0] == 0).all())
        drawn_ids = drawn(text, model, 199, 3, 16, 0, bos=mode)
        assert drawn_ids.shape == (3, 16 + bos) and (not bos or (drawn_ids[:, 0] == 0).all())
        assert any((drawn_ids[0, bos:] == flat[at : at + 16]).all() for at in range(len(flat) - 16))
    refused(UsageError, lambda: cut(text, none, 199, 16, bos="always"), "--bos always", "no BOS token")
    limit = {"max_position_embeddings": 16}
    from dataclasses import replace

    from windows import source

    from streamprune.calibration.windows import cut_windows
    from streamprune.disk.scratch import ScratchTokens

    with ScratchTokens(tmp_path) as scratch:  # no window is longer than the model's context
        at_the_limit = cut_windows(replace(source(text, adds, 199), config=limit), 16, scratch)
        assert at_the_limit.shape == (3000 // 15, 16) and (at_the_limit[:1][0, 1:] == flat[:15]).all()


def test_ids_get_a_bos_only_when_asked(models: Models, tmp_path: Path) -> None:
    adds = _with_bos(models(), tmp_path / "adds", adds=True)
    np.save(tmp_path / "ids.npy", np.arange(1, 190))
    assert cut(tmp_path / "ids.npy", adds, 199, 9).shape == (21, 9)
    assert cut(tmp_path / "ids.npy", adds, 199, 9, bos="always").shape == (21, 10)


def test_rows_of_ids_are_windows_already(models: Models, tmp_path: Path) -> None:
    """Where they are as long as windows, and there are enough of them; otherwise they are one text."""
    rows, path = np.random.default_rng(0).integers(0, 199, (7, 9)).astype(np.int32), tmp_path / "ids.npy"
    np.save(path, rows)
    for seed in (0, 1):
        assert (drawn(path, models(), 199, 7, 9, seed) == rows).all()
        three = drawn(path, models(), 199, 3, 9, seed).tolist()
        places = [rows.tolist().index(row) for row in three]
        assert all(begin - 1 < place < begin + 7 / 3 for begin, place in zip((0, 7 / 3, 14 / 3), places, strict=True))
    adds = _with_bos(models(), tmp_path / "adds", adds=True)
    assert (drawn(path, adds, 199, 7, 9, 0, bos="always")[:, 1:] == rows).all()
    flat = tmp_path / "flat.npy"
    np.save(flat, rows.reshape(-1))
    for samples, seqlen in ((8, 9), (3, 8)):
        assert (drawn(path, models(), 199, samples, seqlen, 0) == drawn(flat, models(), 199, samples, seqlen, 0)).all()
    refused(UsageError, lambda: drawn(path, models(), int(rows.max()), 7, 9, 0), "ids.npy holds token id")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_bos_in_jobs(models: Models, text: Path, tmp_path: Path, kind: str) -> None:
    """Both verbs say whether windows began with BOS, each mode is a job of its own, and predictions are one more."""
    adds = _with_bos(models(kind), tmp_path / "adds", adds=True)
    job: dict[str, Any] = {"sparsity": 0.5, "calib": text, "samples": 2, "seqlen": 16}
    report = prune(adds, tmp_path / "out", **job).report
    assert report["calibration"]["bos"] is True and report["job"]["bos"] == "auto"
    assert prune(adds, tmp_path / "out", **job).status == "up-to-date"
    from streamprune.errors import StateError

    refused(StateError, lambda: prune(adds, tmp_path / "out", bos="never", **job), "bos is auto there and never here")
    assert prune(adds, tmp_path / "never", bos="never", **job).report["calibration"]["bos"] is False
    found, without = (evaluate(adds, text, seqlen=16, bos=mode, work=tmp_path) for mode in ("auto", "never"))
    assert found.bos and found.tokens == 16 * found.windows and found.perplexity != without.perplexity
    assert not without.bos and without.tokens == 15 * without.windows
    ids = np.insert(cut(text, adds, 199, 16, bos="never"), 0, 0, axis=1)
    whole = perplexity(in_memory(adds), torch.from_numpy(ids))
    assert found.perplexity == pytest.approx(whole, rel=0.02)  # of the whole model in memory, whose dtype may differ
    compared = evaluate(adds, text, reference=adds, seqlen=16, windows=5, work=tmp_path)
    assert compared.kl == pytest.approx(0, abs=1e-9) and compared.windows == 5 and compared.tokens == 80
    flops = [plan(adds, samples=4, seqlen=16, bos=mode, device="cpu").flops for mode in ("auto", "never", "always")]
    assert flops[0] == flops[2] > flops[1]
    refused(UsageError, lambda: evaluate(adds, text, bos="sometimes"), "--bos sometimes")
