"""Text to token ids in bounded memory, with the same ids as if each document were tokenised in one piece.

A long document is tokenised in overlapping pieces. Two pieces are joined inside their overlap, at a place where both
have the same RUN consecutive tokens for the same characters: ids come from the first piece up to there, from the second
piece after it. Where there is no such place, or with a slow tokenizer, which does not report where tokens begin, pieces
are tokenised separately; a word at the border of two pieces may then be tokenised differently.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamprune.calibration.texts import Piece
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.errors import CheckpointError, UsageError

Ids = NDArray[np.uint32]

OVERLAP = 2048
"""Characters that a piece shares with the one before it."""
RUN = 8
"""Consecutive equal tokens that are needed to join two pieces."""

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def load_tokenizer(model: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer. Raises CheckpointError when it is missing or cannot be read."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as e:
        open_checkpoint(model).side_files()  # raises a better error for a Git LFS pointer in place of a file
        missing = [name for name, module in _SENTENCEPIECE.items() if not _is_installed(module)]
        if missing and not (model / "tokenizer.json").exists() and any(model.glob("*.model")):
            raise CheckpointError(
                f"{model}: its tokenizer needs the packages sentencepiece and protobuf ({' and '.join(missing)} not "
                "installed): pip install 'streamprune[tokenizers]', or pass token ids with --calib FILE.npy"
            ) from e
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(
            f"{model}: no usable tokenizer ({why}); add its files, or pass token ids with --calib FILE.npy"
        ) from e
    tokenizer.model_max_length = 1 << 40  # avoids a warning about long texts, which are cut into windows later
    return tokenizer


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed either
        return False


def bos_of(tokenizer: Any, mode: str) -> int | None:
    """The BOS token that windows begin with, or None.

    `mode` is "auto" (if the tokenizer adds one to a text by itself), "always" or "never". Raises UsageError for
    "always" when the tokenizer has no BOS token.
    """
    bos = tokenizer.bos_token_id
    if mode == "never":
        return None
    if mode == "always":
        if bos is None:
            raise UsageError("--bos always: the tokenizer has no BOS token; leave it out")
        return int(bos)
    given, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    adds = bos is not None and given[:1] == [bos] and given[1 : 1 + len(plain)] == plain
    return int(bos) if adds else None


def has_bos(model: Path, mode: str, trust_remote_code: bool) -> bool:
    """Whether windows begin with a BOS token, see bos_of; with "auto", not if there is no usable tokenizer."""
    if mode == "never":
        return False
    try:
        tokenizer = load_tokenizer(model, trust_remote_code)
    except CheckpointError:
        if mode == "always":
            raise
        return False
    return bos_of(tokenizer, mode) is not None


def render_with(tokenizer: Any, model: Path) -> Any:
    """A function that formats messages with the tokenizer's chat template; raises UsageError when that fails."""

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as e:
            why = " ".join(str(e).split())[:200]
            raise UsageError(f"{model}: its chat template cannot format these messages: {why}") from e

    return render


@dataclass(frozen=True)
class _Encoded:
    """A tokenised `text`: ids, and the span of characters (begin, end) of each."""

    text: str
    ids: Ids
    spans: list[tuple[int, int]]

    def from_token(self, token: int) -> _Encoded:
        return _Encoded(self.text, self.ids[token:], self.spans[token:])


def encode(tokenizer: Any, pieces: Iterable[Piece]) -> Iterator[Ids]:
    """The ids of documents, in order, in blocks. No special tokens are added: windows.py puts BOS before windows."""
    if not tokenizer.is_fast:
        yield from (_plain(tokenizer, text) for text in _at_spaces(pieces) if text)
        return
    held: _Encoded | None = None
    for text, ends in pieces:
        if held is None and ends:
            if text:
                yield _plain(tokenizer, text)
            continue
        if held is None:
            held = _with_spans(tokenizer, text)
        elif text:
            tail = held.text[-OVERLAP:]
            following = _with_spans(tokenizer, tail + text)
            joint = _joint(held, following, len(tail))
            if joint is None:
                yield held.ids
                held = _with_spans(tokenizer, text)
            else:
                yield held.ids[: joint[0]]
                held = following.from_token(joint[1])
        if ends:
            yield held.ids
            held = None


def _joint(first: _Encoded, second: _Encoded, shared: int) -> tuple[int, int] | None:
    """Where to join two pieces: indices of a token in each from which on RUN tokens are equal, or None.

    Tokens near either end of the `shared` characters do not count, for they may be cut differently.
    """
    base = len(first.text) - shared
    low, high = shared // 4, shared - shared // 8
    tokens = enumerate(zip(second.spans, second.ids.tolist(), strict=True))
    candidates = {(*span, token): at for at, (span, token) in tokens if low <= span[0] <= high}
    run = 0
    before = -1
    for at in range(len(first.ids) - 1, -1, -1):  # backwards: the last run of RUN tokens
        begin, end = first.spans[at]
        if begin - base < low:
            break
        found = candidates.get((begin - base, end - base, int(first.ids[at])))
        run = run + 1 if found is not None and (run == 0 or found == before - 1) else int(found is not None)
        before = -1 if found is None else found
        if run >= RUN:
            return at, before
    return None


def _plain(tokenizer: Any, text: str) -> Ids:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint32)


def _with_spans(tokenizer: Any, text: str) -> _Encoded:
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _Encoded(text, np.asarray(found["input_ids"], dtype=np.uint32), found["offset_mapping"])


def _at_spaces(pieces: Iterable[Piece]) -> Iterator[str]:
    """Pieces re-cut to end at a line break or a space where possible."""
    held = ""
    for text, ends in pieces:
        held += text
        cut = len(held) if ends else 1 + max(held.rfind("\n"), held.rfind(" "))
        if cut == 0 and len(held) > 1 << 20:
            cut = len(held)
        yield held[:cut]
        held = held[cut:]
    yield held
