"""The house rules that a machine can check: imports go down, files stay small, names say something."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import streamprune

ROOT = Path(streamprune.__file__).parent
FILES = {
    ".".join(("streamprune", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
    for p in sorted(ROOT.rglob("*.py"))
}

HOUSE: dict[str, list[str]] = {
    "errors": [],
    "process": [
        "background completion console environment imports interrupts load memory versions",
        "ranks",
        "share torchrun",
        "output",
    ],
    "progress": [],
    "settings": [],
    "disk": [
        "direct header os_errors room",
        "durable folder",
        "checkpoint hub journal lock places scratch shards",
        "cache claims encoded linears remote report",
        "spool state",
        "mapped",
        "mapping read_ahead",
        "compressed gptq packed",
        "float_quantized",
        "quantised",
    ],
    "kernels": [
        "jit lanes torch_fp8 torch_ops",
        "cpu_bitmask cpu_compare cpu_eliminate cpu_pairs cpu_select cpu_stats cpu_tiles",
        "cpu_groups cpu_moving",
        "cpu_alternate cpu_rows",
        "cpu_arrays",
        "cpu",
        "cpu_fp8",
    ],
    "methods": [
        "allocation bitmask counting inverse recipes stats tuning",
        "gram scores selection",
        "admm sparsegpt",
        "conjugate",
        "fp8 refits",
        "decoding",
    ],
    "calibration": [
        "collector gram_sums statistics_header text_files",
        "grams records statistics",
        "texts",
        "tokens",
        "windows",
    ],
    "model": [
        "calls configuration copies damage decoded expert_forms extra_memory pairs panels prunable routed_inputs",
        "experts",
        "stages",
        "arithmetic array_checks further outline shared",
        "device",
        "activations between loader",
        "finite naming",
        "skeleton",
        "pass_memory recorders residual routed shapes zeros",
        "ends",
        "bound_experts frozen_experts",
        "binding budget",
        "streamed",
        "blank_layer passes",
        "differentiable tracing",
    ],
    "packing": ["files rows", "survey", "shards", "work", "job"],
    "inspection": ["pruned stored", "scales", "difference", "report", "count", "inspect"],
    "evaluation": [
        "requests scores two_models",
        "one_model result",
        "evaluate",
        "likelihoods",
        "harness",
        "lm_eval tasks",
    ],
    "pruning": [
        "codes expert_codes kept_codes linears records refit spec",
        "checks command describe quantise report shared target tuning windows",
        "array_shard card expert_tuning forward output pruned_linears setup",
        "allocate finish memory paired refitted_ahead tuned_shard",
        "prepare shard",
        "coded_later committed inputs means sharing",
        "announce run",
        "rehearse",
        "job",
    ],
    "planning": ["refit_cost", "work refits", "cost", "ranks speeds", "plan"],
    "reporting": ["facts figures", "evaluations markup scales", "sections", "comparison", "page"],
    "publishing": ["upload"],
    "arguments": [],
    "tables": [],
    "demo": [],
    "commands": [],
    "cli": [],
    "__main__": [],
}
"""The house from the bottom up: a module may import what stands above it, here and in its own folder's list.

Modules on one line do not import each other; neither do the verbs, with three exceptions: planning asks pruning what a
job does, reporting asks it what a report means, and inspection reads packed tensors as packing does.
"""
VERBS = {"packing", "inspection", "evaluation", "pruning", "planning", "publishing", "reporting"}
BETWEEN_VERBS = {("planning", "pruning"), ("reporting", "pruning"), ("inspection", "packing")}
UNKNOWN_TO = {"methods": {"disk"}}
"""Folders that lie below, and still must not be imported: the mathematics knows no files."""
NO_TORCH = [
    "errors",
    "cli",
    "commands",
    "__main__",
    "progress",
    "process.imports",
    "process.memory",
    "process.interrupts",
    "process.console",
    "process.output",
    "process.ranks",
    "process.torchrun",
]
NO_TORCH += [
    "methods.recipes",
    "pruning.spec",
    "pruning.job",
    "pruning.checks",
    "pruning.describe",
    "pruning.report",
    "settings",
    "calibration.texts",
]
NO_TORCH += [
    "disk.durable",
    "disk.header",
    "disk.checkpoint",
    "disk.hub",
    "disk.journal",
    "disk.report",
    "disk.state",
    "disk.shards",
]
NO_TORCH += [
    "disk.lock",
    "disk.direct",
    "disk.os_errors",
    "disk.room",
    "disk.linears",
    "disk.packed",
    "packing.job",
    "packing.files",
]
NO_TORCH += ["reporting.page", "publishing.upload"]

LIBRARIES = {"torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"}
NO_TENSORS = ["pruning.array_shard", "pruning.means", "pruning.prepare", "pruning.run", "model.array_checks"]
"""What prunes from a statistics file may import numpy and numba, but takes three times as long to start with torch."""


def place(module: str) -> tuple[int, int]:
    """(floor of the house, line within the folder); a folder's __init__ lies below its files."""
    name = module.removeprefix("streamprune.")
    folder, _, file = name.partition(".")
    assert folder in HOUSE, f"{module} has no place in HOUSE"
    lines = [line.split() for line in HOUSE[folder]]
    found = [i for i, line in enumerate(lines) if file in line] if file else [-1]
    assert len(found) == 1, f"{module} has no place in HOUSE[{folder!r}]"
    return list(HOUSE).index(folder), found[0]


def imports(module: str, top_level_only: bool = False) -> set[str]:
    """Every module that a file imports, within functions and under TYPE_CHECKING too (or at run time only)."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
    return found


def own_imports(module: str) -> set[str]:
    return {n for n in imports(module) if n in FILES} - {module}


@pytest.mark.parametrize("module", [m for m in FILES if m != "streamprune"])
def test_imports_only_go_down(module: str) -> None:
    folder = module.split(".")[1]
    for other in own_imports(module) - {"streamprune"}:
        assert place(other) < place(module), f"{module} imports {other}"
        below = other.split(".")[1]
        assert below not in UNKNOWN_TO.get(folder, set()), f"{module} imports {other}"
        if folder in VERBS and below in VERBS - {folder}:
            assert (folder, below) in BETWEEN_VERBS, f"{module} imports {other}"


def test_the_house_is_as_it_is_drawn() -> None:
    """HOUSE names no file that is gone, and the root stays small enough to be seen at a glance."""
    for folder, lines in HOUSE.items():
        for file in " ".join(lines).split():
            assert f"streamprune.{folder}.{file}" in FILES
    assert len(list(ROOT.glob("*.py"))) <= 10


def test_there_is_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in own_imports(module) - {"streamprune"}:
                visit(other, (*path, module))
            done.add(module)

    for module in FILES:
        visit(module, ())
    assert len(done) == len(FILES) > 100


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    """A run that finds its work done must not wait for torch: these import it within functions only, or not at all."""
    assert_without(name, {"numba", "numpy", *LIBRARIES})


@pytest.mark.parametrize("name", NO_TENSORS)
def test_pruning_from_statistics_imports_no_torch(name: str) -> None:
    assert_without(name, LIBRARIES)


def assert_without(name: str, heavy: set[str]) -> None:
    """Neither the module nor what it imports at its top level imports one of these packages there."""
    seen: set[str] = set()
    waiting = [f"streamprune.{name}"]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for other in imports(module, top_level_only=True):
            assert other.split(".")[0] not in heavy, f"streamprune.{name} leads to {module}, which imports {other}"
            if other in FILES:
                waiting.append(other)


@pytest.mark.parametrize("module", FILES)
def test_file(module: str) -> None:
    path = FILES[module]
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 340
    assert ast.get_docstring(tree), "a file says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
        if isinstance(node, ast.Assert):
            assert _narrows(node.test), f"line {node.lineno}: assert only tells the type checker what is known"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 75, f"{node.name} is too long"
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != "*" for a in node.names), f"line {node.lineno}: a star import"
        assert not isinstance(node, ast.Global), f"line {node.lineno}: global state"


def _narrows(test: ast.expr) -> bool:
    """`x is not None` or `isinstance(x, …)`."""
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def test_names() -> None:
    for module in FILES:
        assert not set(module.split(".")) & {"utils", "util", "common", "helpers", "misc", "tools"}, module


def test_public_things_are_documented() -> None:
    """Every public class, and every public function of more than one line."""
    for module, path in FILES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                one_line = isinstance(node, ast.FunctionDef) and len(node.body) == 1
                assert one_line or ast.get_docstring(node), f"{module}.{node.name}"
