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

# From the bottom up; a module may import what stands above it in this table, and its own folder's modules as
# far as no circle arises. A name is a module, or a folder for those of its modules that are not named.
ORDER: list[set[str]] = [
    {"errors", "interrupts", "console"},
    {"memory"},
    {"methods.recipes"},
    {"spec"},
    {"disk"},
    {"kernels"},
    {"methods"},
    {"model"},
    {"choosing", "refitting", "quantising", "tuning"},
    {"target"},
    {"stage_writer", "report"},
    {
        "allocating",
        "job_checks",
        "job_windows",
        "job_prepare",
        "job_pass",
        "job_paired",
        "job_tune",
        "job_finish",
        "comparison",
        "planning_refits",
        "evaluation_pass",
    },
    {"job_run", "job", "evaluation", "planning", "inspection", "packing"},
    {"arguments", "tables", "progress", "demo", "cli", "__main__"},
]
WITHIN_A_LEVEL = {
    ("job_prepare", "job_pass"),
    ("job_prepare", "job_paired"),
    ("job_paired", "job_pass"),
    ("job_tune", "job_pass"),
    ("job", "job_run"),
    ("evaluation_pass", "comparison"),
    ("cli", "arguments"),
    ("__main__", "cli"),
    ("cli", "demo"),
    ("cli", "progress"),
    ("cli", "tables"),
}
NO_TORCH = ["errors", "memory", "methods.recipes", "spec", "job", "job_checks", "cli", "__main__", "progress", "report"]
NO_TORCH += ["interrupts", "console"]
NO_TORCH += ["disk.durable", "disk.header", "disk.checkpoint", "disk.hub", "disk.journal", "disk.state", "disk.shards"]
NO_TORCH += ["disk.lock", "model.texts", "disk.direct", "disk.linears", "disk.packed", "packing", "packing.files"]


OWN = {"streamprune.disk.durable", "streamprune.disk.lock", "streamprune.disk.scratch"}
"""May change the disk. A lock's file says nothing, and that of scratch has no name: neither has to survive a crash."""


def level(module: str) -> int:
    name = module.removeprefix("streamprune.")
    for candidate in (name, name.split(".")[0]):
        for i, names in enumerate(ORDER):
            if candidate in names:
                return i
    raise AssertionError(f"{module} has no place in ORDER")


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
    name = module.removeprefix("streamprune.")
    for other in own_imports(module) - {"streamprune"}:
        short = other.removeprefix("streamprune.")
        if FILES[other].name == "__init__.py" and level(other) <= level(module):
            continue
        same_folder = level(other) == level(module) and "." in short and short.split(".")[0] == name.split(".")[0]
        lower = level(other) < level(module)
        assert lower or same_folder or (name, short) in WITHIN_A_LEVEL, f"{module} imports {other}"


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
    assert len(done) == len(FILES) > 30


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    """A run that finds its work done must not wait for torch: these import it within functions only, or not at all."""
    heavy = {"torch", "transformers", "numba", "numpy", "safetensors", "tokenizers", "huggingface_hub"}
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


def test_only_durable_changes_the_disk() -> None:
    """No write, rename or removal elsewhere: one place knows the order of writes."""
    changing = {
        "write_text", "write_bytes", "mkdir", "makedirs", "rename", "unlink", "rmdir", "rmtree", "touch",
        "symlink_to", "hardlink_to", "copyfile", "copytree", "copy2", "move", "ftruncate", "fsync", "save_file",
        "save_pretrained", "mkstemp", "NamedTemporaryFile",
    }  # fmt: skip
    for module, path in FILES.items():
        if module in OWN:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            assert called not in changing, f"{module}:{node.lineno} calls {called}"
            if called == "open":
                modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                assert not any(set(m) & set("wax+") and len(m) < 4 for m in modes), f"{module}:{node.lineno}"
