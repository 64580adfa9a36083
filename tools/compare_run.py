"""The cells of a comparison, one after the other: prune, evaluate, record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_rig import BenchError, Ran, say
from compare_report import amount_label, number
from compare_state import Results, amount_name, source_digest

INTERRUPTED = 130
FORWARDED = ("device", "dtype", "max_ram", "max_vram")
BESIDE = ("kl", "kl_stderr", "top1_agreement", "reference_perplexity")
"""What eval says of a model beside its reference."""

Cell = dict[str, Any]
Runner = Callable[..., Ran]
"""Runs `python -m streamprune ARGUMENTS --json --quiet` to its end."""


@dataclass(frozen=True)
class Method:
    """A recipe, perhaps with another refit or quantised; `calibration` is "none", "shared" (by --stats) or "own"."""

    name: str
    recipe: str
    refit: str | None
    quantize: str | None
    tune: str | None
    calibration: str


Todo = tuple[Method, str, int]
"""A cell to fill: method, amount, seed."""


def parse_methods(text: str | None) -> list[Method]:
    """What --methods names, all recipes without it. Raises BenchError for a recipe or refit that is not there."""
    from streamprune.errors import UsageError
    from streamprune.methods.recipes import RECIPES, REFITS, Recipe

    found = {}
    for name in text.split(",") if text is not None else RECIPES:
        base, *more = name.split("+")
        tune = "block" if more and more[-1] == "tune" and more.pop() else None
        quantize = more.pop() if more and more[-1] == "fp8" else None
        refit = more.pop() if more else None
        try:
            recipe = Recipe.named(base if not more else name, refit=refit, quantize=quantize, tune=tune)
        except UsageError as e:
            there = f"recipes are {', '.join(RECIPES)}, refits {', '.join(REFITS)}"
            raise BenchError(
                f"--methods {name}: write RECIPE, RECIPE+REFIT, or either with +fp8 or +tune; {there}"
            ) from e
        calibration = "own" if recipe.aims else "shared" if recipe.needs_statistics else "none"
        found[name] = Method(name, base, refit, quantize, tune, calibration)
    return list(found.values())


def parse_amounts(text: str) -> list[str]:
    """What --amounts names, each as prune takes it. Raises BenchError or UsageError for one that is wrong."""
    from streamprune.methods.selection import parse_pattern

    found = []
    for word in text.split(","):
        if ":" in word:
            parse_pattern(word)
            found.append(word)
            continue
        try:
            share = float(word)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise BenchError(f"--amounts {word}: write a sparsity in [0, 1) or a pattern N:M")
        found.append(repr(share))
    return list(dict.fromkeys(found))


def parse_seeds(text: str) -> list[int]:
    """What --seeds names. Raises BenchError for what is no number, or negative."""
    found = []
    for word in text.split(","):
        if not (word.strip().isascii() and word.strip().isdigit()):
            raise BenchError(f"--seeds {word}: write whole numbers, such as 0,1,2")
        found.append(int(word))
    return list(dict.fromkeys(found))


def cells_of(methods: Sequence[Method], amounts: Sequence[str], seeds: Sequence[int]) -> list[Todo]:
    """All cells, seed after seed; a method that needs no calibration has one seed only."""
    return [
        (method, amount, seed)
        for seed in seeds
        for method in methods
        for amount in amounts
        if method.calibration != "none" or seed == seeds[0]
    ]


class Comparison:
    """One comparison under way: `run` starts streamprune, `results` keeps what is found."""

    def __init__(self, arguments: argparse.Namespace, results: Results, run: Runner) -> None:
        self.arguments, self.results, self.run = arguments, results, run
        self.model = arguments.model
        self.work, self.models = results.folder / "work", results.folder / "models"
        self.resources = [w for flag in FORWARDED if (given := getattr(arguments, flag)) for w in (_flag(flag), given)]

    def calibration(self, seed: int) -> list[str]:
        """What a command that calibrates is given."""
        drawn = ["--samples", str(self.arguments.samples), "--seed", str(seed)]
        return ["--calib", self.arguments.calib, *drawn, *self.length]

    @property
    def length(self) -> list[str]:
        return ["--seqlen", str(self.arguments.seqlen)] if self.arguments.seqlen is not None else []

    def fill(self, todo: Sequence[Todo]) -> None:
        """Fills these cells, one after the other; a cell that fails is recorded, too."""
        if self.results.dense is None:
            say("dense model")
            self.results.keep_dense(self.evaluate(self.model, self.arguments.text))
        for position, (method, amount, seed) in enumerate(todo, 1):
            name = f"{position}/{len(todo)} {method.name} {amount_label(amount)} seed {seed}"
            say(name)
            if method.calibration == "shared":
                self.gather(seed)
            cell = self.cell(method, amount, seed)
            if source_digest() != self.results.value["job"]["versions"]["source"]:
                cell["source_changed"] = True
            self.results.keep(cell)
            say("")
            found = cell.get("error") or f"perplexity {number(cell['perplexity'])}, {cell['prune_seconds']:.1f} s"
            print(f"compare: {name}: {found}", file=sys.stderr)

    def stats(self, seed: int) -> Path:
        """Where the statistics of a seed's windows are."""
        return self.work / f"statistics-{seed}.safetensors"

    def gather(self, seed: int) -> None:
        """Statistics for all recipes that only need a mask, once a seed."""
        from streamprune.disk import durable

        stats = self.stats(seed)
        if str(seed) in self.results.calibration and stats.is_file():
            return
        durable.remove(stats)  # finished, but what it took was not recorded
        found = self.streamprune("calibrate", self.model, str(stats), *self.calibration(seed), *self.resources)
        self.results.keep_calibration(seed, {key: found[key] for key in ("seconds", "peak_rss_bytes")})

    def cell(self, method: Method, amount: str, seed: int) -> Cell:
        """Prunes, evaluates, removes the pruned model. A failure's one line becomes `error`, with what was found."""
        from streamprune.disk import durable, journal
        from streamprune.disk.report import REPORT
        from streamprune.disk.state import partial_of

        out = self.models / f"{method.name}-{amount_name(amount)}-{seed}"
        cell: Cell = {"method": method.name, "amount": amount, "seed": seed, "calibration": method.calibration}
        given = ["--method", method.recipe, *(["--refit", method.refit] if method.refit else [])]
        given += ["--quantize", method.quantize] if method.quantize else []
        given += ["--tune", method.tune] if method.tune else []
        given += ["--pattern" if ":" in amount else "--sparsity", amount]
        given += {
            "none": [], "shared": ["--stats", str(self.stats(seed))], "own": self.calibration(seed),
        }[method.calibration]  # fmt: skip
        durable.make_folder(self.models)
        try:
            self.streamprune("prune", self.model, str(out), *given, *self.resources)
            report = journal.read_json(out / REPORT, "report")
            cell |= {key: report.get(key) for key in ("recipe", "sparsity", "startup_seconds", "peak_rss_bytes")}
            cell["prune_seconds"] = report["seconds"]
            self.figures(out, cell)
        except BenchError as e:
            cell["error"] = str(e)
        if "error" in cell or not self.arguments.keep:
            durable.clear(out)
            durable.clear(partial_of(out))
        return cell | {"date": now()}

    def figures(self, out: Path, cell: Cell) -> None:
        """Adds perplexity of the whole text to a cell, and what only a comparison with the dense model tells."""
        other, few = self.arguments.reference_text, self._few()
        text = other or self.arguments.text
        beside = ["--reference", self.model]
        whole = self.evaluate(str(out), self.arguments.text, "--by-window", *([] if other or few else beside))
        cell |= {key: whole[key] for key in ("perplexity", "nll", "tokens", "windows", "seqlen", "window_nll")}
        cell |= {"eval_seconds": whole["seconds"], "eval_peak_rss_bytes": whole["peak_rss_bytes"]}
        found = self.evaluate(str(out), text, *few, *beside) if other or few else whole
        if missing := [key for key in BESIDE if key not in found]:
            raise BenchError(f"eval --reference did not say {', '.join(missing)}")
        cell |= {key: found[key] for key in BESIDE} | {"kl_tokens": found["tokens"], "kl_windows": found["windows"]}

    def _few(self) -> list[str]:
        """What keeps the comparison with the dense model to the text's first windows."""
        assert self.results.dense is not None
        windows, wanted = self.results.dense["windows"], self.arguments.kl_windows
        few = self.arguments.reference_text is None and 0 < wanted < windows
        return ["--windows", str(wanted)] if few else []

    def evaluate(self, model: str, text: str, *more: str) -> dict[str, Any]:
        """What eval says of a model."""
        place = ["--work", str(self.work)]
        return self.streamprune("eval", model, "--text", text, *self.length, *more, *place, *self.resources)

    def streamprune(self, *words: str) -> dict[str, Any]:
        """Runs one command. Raises BenchError with its one line when it fails."""
        ran = self.run(*words)
        if ran.code == INTERRUPTED:
            raise KeyboardInterrupt
        return ran.result


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
