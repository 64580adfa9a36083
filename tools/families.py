"""Which families of architectures work, tried on the spot: a Markdown table.

    python tools/families.py                   every family
    python tools/families.py llama gemma3 t5   some

Each family is a random model of a few thousand parameters (tests/families.py), pruned layer by layer and compared with
the whole model in memory (tests/family_checks.py): masks, all statistics, `inspect`, loading and generating with
transformers, perplexity, new values by obs-admm, FP8. Exit code 1 when something does not do what it should.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

from families import DENSE, FAMILIES, RECURRENT, REFUSED, SEEING, save_model  # noqa: E402

HEAD = "| model type | for example | pruned | statistics | `inspect` | loads | `eval` | refit | FP8 | |"
GROUPS = {
    "Decoders": DENSE,
    "Attention and recurrent layers": RECURRENT,
    "Text models within models that see": SEEING,
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(kind: str, folder: Path) -> Iterator[str]:
    """The cells of a family's checks; what fails is "**no**", and said on stderr."""
    from family_checks import CHECKS, Trial

    trial = Trial(kind, folder)
    for name, check in CHECKS.items():
        try:
            yield check(trial)
        except Exception as e:  # noqa: BLE001
            say(f"{kind}: {name}: {type(e).__name__}: {e}")
            yield "**no**"


def refusal(kind: str, folder: Path) -> str:
    """What the program says of a family that it refuses."""
    from family_checks import HALF, write_tokens

    from streamprune.errors import UnsupportedError
    from streamprune.job import prune

    save_model(folder / "model", kind, 2, "float32")
    try:
        prune(folder / "model", folder / "out", sparsity=HALF["sparsity"], calib=write_tokens(folder / "tokens.npy"))
    except UnsupportedError as e:
        return str(e)
    say(f"{kind} was not refused")
    return "**not refused**"


def table(kinds: list[str]) -> Iterator[str]:
    """The lines of both tables."""
    yield HEAD
    yield "|---" * (HEAD.count("|") - 1) + "|"
    for group, families in GROUPS.items():
        for kind in (k for k in families if k in kinds):
            say(kind)
            with tempfile.TemporaryDirectory() as folder:
                cells = list(row(kind, Path(folder)))
            tied = "tied embeddings" if "tied" in cells else ""
            notes = "; ".join(filter(None, (families[kind].notes, tied, "" if group == "Decoders" else group.lower())))
            shown = ["yes" if cell == "tied" else cell for cell in cells]
            yield f"| `{kind}` | {' | '.join([families[kind].examples, *shown, notes])} |"
    if any(kind in REFUSED for kind in kinds):
        yield "\n| refused | for example | because |\n|---|---|---|"
    for kind in (k for k in REFUSED if k in kinds):
        say(kind)
        with tempfile.TemporaryDirectory() as folder:
            yield f"| `{kind}` | {REFUSED[kind].examples} | {refusal(kind, Path(folder))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE", help="families to try (default: all)")
    kinds = parser.parse_args().kinds or list(FAMILIES)
    if unknown := [k for k in kinds if k not in FAMILIES]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    failed = False
    with mock.patch("os.fsync"), warnings.catch_warnings():  # no power loss is survived here, so none is waited for
        warnings.simplefilter("ignore")
        for line in table(kinds):
            failed |= "**no" in line
            print(line, flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
