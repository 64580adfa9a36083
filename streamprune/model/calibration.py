"""Text to tokens: the windows that calibration and evaluation run on.

Calibration reads a stream of tokens and draws `samples` windows of `seqlen` from it: the stream is divided into as
many equal stretches, and in each a window begins at a place chosen by a seed (NumPy's PCG64). Spread like this, the
statistics vary less with the seed than with independent places. The stream is the text in pieces of whole lines,
each tokenised by itself and joined; a .jsonl record is a piece. No special tokens are added. No more than
STREAM_WINDOWS times the tokens that are asked for are read, so a text of any size costs bounded memory and time.

Evaluation tokenises the whole file in one piece, cuts it into windows without overlap and drops the rest.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.errors import CheckpointError, UsageError
from streamprune.model.texts import open_text, text_pieces

STREAM_WINDOWS = 64
"""The stream is read until it holds this many times samples × seqlen tokens."""

Tokens = NDArray[np.int64]


def load_tokenizer(model: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError when it is missing or cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as e:
        open_checkpoint(model).side_files()  # names a pointer in place of a file
        lacking = [name for name, module in _SENTENCEPIECE.items() if not _is_installed(module)]
        if lacking and not (model / "tokenizer.json").exists() and any(model.glob("*.model")):
            raise CheckpointError(
                f"{model}: its tokenizer takes the packages sentencepiece and protobuf, and {' and '.join(lacking)} is "
                "not here: pip install 'streamprune[tokenizers]', or pass token ids with --calib FILE.npy"
            ) from e
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(
            f"{model}: no usable tokenizer ({why}); add its files, or pass token ids with --calib FILE.npy"
        ) from e
    tokenizer.model_max_length = 1 << 40  # windows are cut here; no warning about long texts
    return tokenizer


_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor what it is a part of
        return False


def _encode(tokenizer: Any, text: str) -> Tokens:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def draw_windows(
    path: Path | None, model: Path, vocab_size: int, samples: int, seqlen: int, seed: int, *,
    trust_remote_code: bool = False,
) -> Tokens:  # fmt: skip
    """Calibration windows (samples, seqlen) int64. See the module's docstring for how they are drawn.

    Raises UsageError when the text is missing or shorter than one window, CheckpointError when the tokenizer
    is missing or its ids do not fit the vocabulary.
    """
    stream = _token_stream(path, model, samples * seqlen * STREAM_WINDOWS, trust_remote_code)
    name = path or "the built-in text"
    if len(stream) < seqlen:
        raise UsageError(
            f"{name} has {len(stream)} tokens, one window needs {seqlen}; lower --seqlen or give more text"
        )
    _check_range(stream, vocab_size, path)
    generator = np.random.Generator(np.random.PCG64(seed))
    starts = ((np.arange(samples) + generator.random(samples)) * (len(stream) - seqlen + 1) / samples).astype(np.int64)
    windows: Tokens = stream[starts[:, None] + np.arange(seqlen)]
    return windows


def _token_stream(path: Path | None, model: Path, limit: int, trust_remote_code: bool) -> Tokens:
    if path is not None and path.suffix == ".npy":
        return _load_ids(path, limit)
    tokenizer = load_tokenizer(model, trust_remote_code)
    pieces, count = [], 0
    for text in text_pieces(path):
        pieces.append(_encode(tokenizer, text))
        count += len(pieces[-1])
        if count >= limit:
            break
    return np.concatenate(pieces)[:limit] if pieces else np.zeros(0, np.int64)


def _load_ids(path: Path, limit: int | None = None) -> Tokens:
    try:
        ids = np.lib.format.open_memmap(path, mode="r")  # np.load would open archives, too
    except (OSError, ValueError) as e:
        raise UsageError(f"{path}: cannot be read as an array of token ids ({e})") from e
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise UsageError(f"{path}: token ids must be integers in one or two dimensions, not {ids.dtype} {ids.shape}")
    return np.array(ids.reshape(-1)[:limit], dtype=np.int64)


def _check_range(ids: Tokens, vocab_size: int, path: Path | None) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and high < vocab_size:
        return
    what = f"token id {high if high >= vocab_size else low}, the model's vocabulary has {vocab_size}"
    if path is not None and path.suffix == ".npy":
        raise UsageError(f"{path} holds {what}; make the ids with this model's tokenizer")
    raise CheckpointError(f"{path or 'the built-in text'} gives {what}; the tokenizer belongs to another model")


def cut_windows(path: Path, model: Path, vocab_size: int, seqlen: int, *, trust_remote_code: bool = False) -> Tokens:
    """Evaluation windows (n, seqlen) int64: the whole text's tokens, without overlap, the rest dropped.

    Raises as draw_windows does.
    """
    if path.suffix == ".npy":
        ids = _load_ids(path)
    else:
        with open_text(path) as f:
            raw = f.read()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UsageError(f"{path}: byte {e.start} is not UTF-8 text") from e
        ids = _encode(load_tokenizer(model, trust_remote_code), text)
    count = len(ids) // seqlen
    if count == 0:
        raise UsageError(f"{path} has {len(ids)} tokens, one window needs {seqlen}; lower --seqlen or give more text")
    windows = ids[: count * seqlen].reshape(count, seqlen)
    _check_range(windows, vocab_size, path)
    return windows


def tokens_digest(windows: Tokens) -> str:
    """xxh3_128 of the windows' ids, little-endian int64."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(windows, dtype="<i8").data)
