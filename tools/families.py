"""Tests which families of architectures work, and prints the results as Markdown tables.

    python tools/families.py                     every family
    python tools/families.py llama mixtral t5    some
    python tools/families.py --list              what transformers has beside them; tries nothing

Each family is a random model of a few thousand parameters (tests/families.py; tests/mixtures.py has those of experts),
pruned layer by layer and compared with the whole model in memory (tests/family_checks.py): masks, all statistics,
`inspect`, loading and generating with transformers, perplexity, new values by obs-admm, FP8. What transformers has
beside these (family_census.py) is tried with its default configuration made tiny (tests/shrunk.py) where that gives a
model that runs, and the others are listed. Exit code 1 when something does not do what it should.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests"), str(_ROOT / "tools")]
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import family_census  # noqa: E402
import shrunk  # noqa: E402
from families import DENSE, LINKED, RECURRENT, REFUSED, SEEING, Family, save_model  # noqa: E402
from mixtures import EVERY, Mixture  # noqa: E402

HEAD = "| model type | for example | pruned | statistics | `inspect` | loads | `eval` | refit | FP8 | |"
Group = Mapping[str, Family] | Mapping[str, Mixture]
TABLES: list[dict[str, Group]] = [
    {
        "": {**DENSE, **LINKED},
        "recurrent layers": RECURRENT,
        "text model of a vision-language model": SEEING,
    },
    {"": EVERY},
]
"""Each is a table: note -> families with that note."""
KINDS = list(dict.fromkeys(kind for group in [*TABLES[0].values(), EVERY, REFUSED] for kind in group))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(kind: str, family: Family | Mixture, group: str, folder: Path) -> str:
    """The row of a family; a failed check is "**no**", with the error on stderr."""
    from family_checks import CHECKS, MixtureTrial, Trial

    trial = MixtureTrial(kind, folder) if isinstance(family, Mixture) else Trial(kind, folder)
    cells = []
    for name, check in CHECKS.items():
        try:
            cells.append(check(trial))
        except Exception as e:  # noqa: BLE001
            say(f"{kind}: {name}: {type(e).__name__}: {e}")
            cells.append("**no**")
    held = "" if not isinstance(family, Mixture) else "each, fused" if family.apart else "fused"
    notes = "; ".join(filter(None, (held, family.notes, "tied embeddings" if "tied" in cells else "", group)))
    shown = ["yes" if cell == "tied" else cell for cell in cells]
    return f"| `{kind}` | {' | '.join([family.examples, *shown, notes])} |"


def refusal(kind: str, folder: Path) -> str:
    """The program's error for a family that it refuses; "" for one that it does not."""
    from family_checks import HALF, write_tokens
    from whole_model import SAMPLES, SEQLEN

    from streamprune.errors import StreampruneError
    from streamprune.pruning.job import prune
    from streamprune.settings import Calibration

    folder.mkdir(exist_ok=True)
    save_model(folder / "model", kind, 2, "float32")
    try:
        calibration = Calibration(write_tokens(folder / "tokens.npy"), samples=SAMPLES, seqlen=SEQLEN)
        prune(folder / "model", folder / "out", HALF["sparsity"], calibration=calibration)
    except StreampruneError as e:
        return str(e)
    return ""


def tables(kinds: list[str]) -> Iterator[str]:
    """The lines of all tables, an empty one between two."""
    found = {kind: family for kind in kinds if kind not in KINDS and (family := shrunk.found(kind))}
    refused = {kind: REFUSED[kind] for kind in REFUSED if kind in kinds}
    for groups in [*TABLES, {"": found}]:
        wanted = [(kind, group) for group, families in groups.items() for kind in families if kind in kinds]
        if wanted:
            yield HEAD
            yield "|---" * (HEAD.count("|") - 1) + "|"
        for kind, group in wanted:
            say(kind)
            with tempfile.TemporaryDirectory() as folder:
                if kind in found and refusal(kind, Path(folder) / "tried"):
                    refused[kind] = found[kind]
                else:
                    yield row(kind, groups[group][kind], group, Path(folder))
        if wanted:
            yield ""
    if refused:
        yield "| refused | for example | because |\n|---|---|---|"
    for kind, family in refused.items():
        say(kind)
        with tempfile.TemporaryDirectory() as folder:
            yield f"| `{kind}` | {family.examples} | {refusal(kind, Path(folder)) or '**not refused**'} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE", help="families to try (default: all)")
    parser.add_argument("--list", action="store_true", help="only list what transformers has and who is tried")
    given = parser.parse_args()
    if find_spec("compressed_tensors") is None and not given.list:  # or FP8 would look as if it did not work
        parser.error("transformers needs compressed-tensors to load FP8: pip install -e '.[fp8]', or tools/test")
    census = family_census.census(KINDS)
    kinds = given.kinds or [*KINDS, *census.unknown]
    if unknown := [k for k in kinds if k not in KINDS and k not in census.unknown]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join([*KINDS, *census.unknown])}")
    if given.list:
        print("\n".join(beside(census)))
        return 0
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    failed = False
    with mock.patch("os.fsync"), warnings.catch_warnings():  # no power loss is survived here, so none is waited for
        warnings.simplefilter("ignore")
        for line in tables(kinds):
            failed |= "**no" in line  # or **not refused**
            print(line, flush=True)
    if not given.kinds:
        print("\n".join(["", *beside(census)]))
    return int(failed)


def beside(census: family_census.Census) -> list[str]:
    """What transformers has, beside the families with a configuration of their own and those found by themselves."""
    return family_census.lines(census, [*KINDS, *(kind for kind in census.unknown if shrunk.found(kind))])


if __name__ == "__main__":
    raise SystemExit(main())
