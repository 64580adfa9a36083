"""Text to token ids, in bounded memory: the same ids as if each document were tokenised in one piece.

A long document is tokenised in overlapping pieces. Two pieces are joined within their overlap, where both have cut the
same characters into the same RUN tokens one after the other; from there on the second one's count. Where they never
agree, or the tokenizer is a slow one, which does not tell where its tokens begin, the pieces are tokenised one by one:
then a word at the border may become other tokens.
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

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


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


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor what it is a part of
        return False


def bos_of(tokenizer: Any, mode: str) -> int | None:
    """The BOS token that windows begin with; None for none.

    `mode` is "auto" (where the tokenizer puts one before a text by itself), "always" or "never". Raises UsageError for
    "always" where the tokenizer has none.
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
    """Whether windows of the checkpoint's text begin with a BOS token; with "auto" not without a tokenizer."""
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
    """A function that writes messages out with the tokenizer's chat template; it raises UsageError without one."""

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as e:
            why = " ".join(str(e).split())[:200]
            raise UsageError(f"{model}: its chat template cannot write these messages: {why}") from e

    return render


@dataclass(frozen=True)
class _Encoded:
    """Tokens of `text`: their ids, and where each begins and ends in it."""

    text: str
    ids: Ids
    spans: list[tuple[int, int]]

    def since(self, token: int) -> _Encoded:
        return _Encoded(self.text, self.ids[token:], self.spans[token:])


def encode(tokenizer: Any, pieces: Iterable[Piece]) -> Iterator[Ids]:
    """The ids of documents, in order, block by block. No special tokens are added."""
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
            meeting = _meeting(held, following, len(tail))
            if meeting is None:
                yield held.ids
                held = _with_spans(tokenizer, text)
            else:
                yield held.ids[: meeting[0]]
                held = following.since(meeting[1])
        if ends:
            yield held.ids
            held = None


def _meeting(first: _Encoded, second: _Encoded, shared: int) -> tuple[int, int] | None:
    """The first token of each from which on both are the same for RUN tokens, well within the `shared` characters."""
    base = len(first.text) - shared
    low, high = shared // 4, shared - shared // 8
    tokens = enumerate(zip(second.spans, second.ids.tolist(), strict=True))
    theirs = {(*span, token): at for at, (span, token) in tokens if low <= span[0] <= high}
    run = 0
    before = -1
    for at in range(len(first.ids) - 1, -1, -1):  # from behind: the last run that is long enough, and its beginning
        begin, end = first.spans[at]
        if begin - base < low:
            break
        found = theirs.get((begin - base, end - base, int(first.ids[at])))
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
    """Pieces that end at a line's end or a space where they can."""
    held = ""
    for text, ends in pieces:
        held += text
        cut = len(held) if ends else 1 + max(held.rfind("\n"), held.rfind(" "))
        if cut == 0 and len(held) > 1 << 20:
            cut = len(held)
        yield held[:cut]
        held = held[cut:]
    yield held
