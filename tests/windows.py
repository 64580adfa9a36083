"""Windows of a text as plain arrays, for tests that compare with them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from streamprune.calibration.texts import Text
from streamprune.calibration.windows import Source, cut_windows, draw_windows
from streamprune.disk.scratch import ScratchTokens


def source(path: Path | None, model: Path, vocab: int, bos: str = "auto", **config: Any) -> Source:
    return Source(Text(path), model, config, vocab, bos)


def drawn(path: Path | None, model: Path, vocab: int, samples: int, seqlen: int, seed: int, **more: Any) -> np.ndarray:
    """Calibration windows."""
    opened = source(path, model, vocab, **more).begin(seqlen, samples)
    return draw_windows(opened, seed, Path(tempfile.gettempdir()))


def cut(path: Path, model: Path, vocab: int, seqlen: int, most: int | None = None, **more: Any) -> np.ndarray:
    """Evaluation windows."""
    with ScratchTokens(Path(tempfile.gettempdir())) as ids:
        return cut_windows(source(path, model, vocab, **more), seqlen, ids, most)[:]
