"""Cuts tokens into windows, which calibration and evaluation run on.

Calibration draws `samples` windows of `seqlen` tokens from the text's tokens: these are divided into `samples` equal
stretches, and in each one window begins at a random place (NumPy's PCG64, seeded). Results vary less with the seed than
with independent places. At most STREAM_WINDOWS times the requested tokens are read. Evaluation cuts the whole text into
windows without overlap and drops the remainder.

Token ids in rows of just that many tokens, at least `samples` rows of them, are windows already: then one row of each
stretch of rows is drawn, and all rows, in their order, if there are as many as windows.

A refit or tuning learns what the calibration's tokens need, and little of what a vocabulary's many rare tokens do. So
in every second of its windows, some tokens are replaced by random ones: what the dense model makes of these shows what
is to be made of them, whether or not anyone would write them (replace_tokens).

Each window begins with a BOS token if the model's tokenizer adds one to a text by itself (tokens.bos_of): a model that
was trained with it predicts much worse without. Text given as token ids gets one only on request. Calibration's tokens
and evaluation's windows are on disk, 4 bytes a token, so that a text of any size takes bounded memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from streamprune.calibration.texts import Text, positions
from streamprune.calibration.tokens import Ids, bos_of, encode, load_tokenizer, render_with
from streamprune.disk.scratch import ScratchTokens
from streamprune.errors import CheckpointError, UsageError

STREAM_WINDOWS = 64
"""At most this many times samples × seqlen tokens are read."""

_BLOCK = 1 << 20
_HELD = 16

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Where windows come from: a text, and the model whose tokenizer is used (its folder, config.json, vocabulary)."""

    text: Text
    model: Path
    config: Mapping[str, Any]
    vocab_size: int
    bos: str = "auto"
    """Whether windows begin with a BOS token: "auto", "always" or "never", see tokens.bos_of."""
    trust_remote_code: bool = False

    def begin(self, seqlen: int, samples: int = 0) -> Opened:
        """Loads the tokenizer and opens the text for `samples` windows of `seqlen` tokens; 0 means all there are.

        Raises UsageError when the text is missing or invalid, CheckpointError when the tokenizer is.
        """
        if path := self.text.ids:
            bos = bos_of(load_tokenizer(self.model, self.trust_remote_code), self.bos) if self.bos == "always" else None
            blocks = (self._checked(block) for block in _load_ids(path))
        else:
            tokenizer = load_tokenizer(self.model, self.trust_remote_code)
            bos = bos_of(tokenizer, self.bos)
            ids = encode(tokenizer, self.text.pieces(render_with(tokenizer, self.model)))
            blocks = (self._checked(block) for block in ids)
        return Opened(self, blocks, bos, seqlen, (samples, positions(seqlen, bos is not None, self.config)))

    def rows_of(self, width: int) -> NDArray[Any] | None:
        """The token ids in rows of `width`, mapped; None if the text is something else."""
        array = _mapped_ids(self.text.ids) if self.text.ids else None
        return array if array is not None and array.ndim == 2 and array.shape[1] == width else None

    def _checked(self, ids: Tokens | Ids) -> Ids:
        self.check(ids)
        return ids.astype(np.uint32)

    def check(self, ids: Tokens | Ids) -> None:
        """Raises UsageError or CheckpointError for ids that are not in the vocabulary."""
        if len(ids) and not 0 <= (low := int(ids.min())) <= (high := int(ids.max())) < self.vocab_size:
            name = self.text.path or "the built-in text"
            what = f"token id {low if low < 0 else high}, the model's vocabulary has {self.vocab_size}"
            if self.text.ids:
                raise UsageError(f"{name} holds {what}; make the ids with this model's tokenizer")
            raise CheckpointError(f"{name} gives {what}; the tokenizer belongs to another model")


@dataclass(frozen=True)
class Opened:
    """A text opened for reading: `blocks` yields its ids, `bos` is the token that windows begin with.

    `shape` is (windows, tokens in each); `seqlen` is the number of the text's tokens that were requested for each.
    """

    source: Source
    blocks: Iterator[Ids]
    bos: int | None
    seqlen: int
    shape: tuple[int, int]

    @property
    def inside(self) -> int:
        """Tokens of the text in each window."""
        return self.shape[1] - (self.bos is not None)

    def check(self, count: int) -> None:
        """Raises UsageError when `count` tokens do not fill one window."""
        if count < self.inside:
            name = self.source.text.path or "the built-in text"
            advice = "lower --seqlen or give more text"
            raise UsageError(f"{name} has {count} tokens, one window needs {self.inside}; {advice}")


class Windows:
    """Evaluation windows on disk: `shape` is (windows, length), a slice is an array (n, length) int64."""

    def __init__(self, ids: ScratchTokens, seqlen: int, length: int, has_bos: bool) -> None:
        self._ids, self.seqlen, self.has_bos = ids, seqlen, has_bos
        self.shape = (len(ids) // length, length)
        self.size = self.shape[0] * length

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice) -> Tokens:
        begin, end, step = which.indices(len(self))
        if step != 1:
            raise IndexError("only slices with step 1 can be read")
        ids = self._ids.read(begin * self.shape[1], max(end, begin) * self.shape[1])
        return ids.astype(np.int64).reshape(-1, self.shape[1])


def draw_windows(opened: Opened, seed: int, folder: Path) -> Tokens:
    """Calibration windows (samples, tokens in a window) int64, drawn as the module's docstring says.

    The text's tokens are in a temporary file in `folder` meanwhile. Raises UsageError when the text is missing or
    shorter than one window, CheckpointError when the tokenizer's ids exceed the vocabulary.
    """
    inside, (samples, length) = opened.inside, opened.shape
    generator = np.random.Generator(np.random.PCG64(seed))
    at = np.arange(samples) + generator.random(samples)  # in which stretch, and where in it
    windows = np.full(opened.shape, opened.bos or 0, dtype=np.int64)
    rows = opened.source.rows_of(inside)
    if rows is not None and len(rows) >= samples:
        opened.source.text.tally.tokens = rows.size
        windows[:, length - inside :] = rows[np.minimum(at * len(rows) / samples, len(rows) - 1).astype(np.int64)]
        opened.source.check(windows[:, length - inside :])
        return windows
    limit = samples * opened.seqlen * STREAM_WINDOWS
    with ScratchTokens(folder) as stream:
        for block in opened.blocks:
            stream.append(block[: limit - len(stream)])
            if len(stream) >= limit:
                break
        opened.check(len(stream))
        opened.source.text.tally.tokens = len(stream)
        places = at * (len(stream) - inside + 1) / samples
        for window, start in zip(windows, places.astype(np.int64).tolist(), strict=True):
            window[length - inside :] = stream.read(start, start + inside)
    return windows


def held_out(samples: int) -> range:
    """Calibration windows that are kept out of tuning, one in _HELD, to judge it. Of a single one, it."""
    count = max(1, samples // _HELD)
    return range(samples // count - 1, samples, samples // count)[:count]


def replace_tokens(windows: Tokens, share: float, vocab_size: int, seed: int, spared: Collection[int] = ()) -> None:
    """Replaces this share of the tokens in every second window of `windows` (samples, length), in place.

    New ids are drawn from the whole vocabulary, all alike. Left as they are: each window's first token, windows that
    are `spared`, and the last one, as that of a single window would be all there is.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    for number in range(0, len(windows) - 1, 2):
        window = windows[number, 1:]
        replaced, others = generator.random(window.size) < share, generator.integers(0, vocab_size, window.size)
        if number not in spared:
            window[replaced] = others[replaced]


def cut_windows(source: Source, seqlen: int, ids: ScratchTokens, max_windows: int | None = None) -> Windows:
    """Evaluation windows: the whole text without overlap, its remainder dropped; they are stored in `ids`.

    With `max_windows`, only the first ones. Raises as draw_windows does.
    """
    opened = source.begin(seqlen)
    length, inside, bos = opened.shape[1], opened.inside, opened.bos
    rest, count = np.zeros(0, np.uint32), 0
    for block in opened.blocks:
        count += len(block)
        rest = np.concatenate([rest, block])
        rows = rest[: len(rest) // inside * inside].reshape(-1, inside)
        rest = rest[rows.size :]
        if bos is not None:
            rows = np.insert(rows, 0, bos, axis=1)
        ids.append(rows[: None if max_windows is None else max_windows - len(ids) // length].reshape(-1))
        if max_windows is not None and len(ids) >= max_windows * length:
            break
    opened.check(count)
    return Windows(ids, seqlen, length, bos is not None)


def _load_ids(path: Path) -> Iterator[Tokens]:
    at = 0
    while at < (ids := _mapped_ids(path)).size:  # mapped for each block: unmaps pages that were read
        yield np.array(ids.reshape(-1)[at : at + _BLOCK], dtype=np.int64)
        at += _BLOCK


def _mapped_ids(path: Path) -> NDArray[Any]:
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as e:
        raise UsageError(f"{path}: cannot be read as an array of token ids ({e})") from e
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        what = f"{ids.dtype} {ids.shape}"
        raise UsageError(f"{path}: token ids must be integers in one or two dimensions, not {what}")
    return ids


def tokens_digest(windows: Tokens | Windows) -> str:
    """xxh3_128 of the windows' ids as little-endian int64."""
    digest = xxhash.xxh3_128()
    step = max(1, _BLOCK // windows.shape[1])
    for at in range(0, len(windows), step):
        digest.update(np.ascontiguousarray(windows[at : at + step], dtype="<i8").data)
    return digest.hexdigest()
