"""What a command imports, and what a statistics file tells of the model so that a prune from it needs not build one."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from calls import calibrate, plan, prune
from mixtures import save_mixture

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.errors import CorruptStateError, UsageError
from streamprune.model import arithmetic, skeleton
from streamprune.model.outline import from_json, to_json
from streamprune.model.skeleton import build_skeleton
from streamprune.model.stages import Outline
from streamprune.process.imports import many_imports, without_compiler

Models = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("one_thread")

HOW: dict[str, Any] = {"samples": 4, "seqlen": 24}

REPORTING = """
import sys
from streamprune.cli import main
assert main(sys.argv[1:]) == 0
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def imported(*args: object) -> set[str]:
    """The packages that a process has imported once it has run a command."""
    command = [sys.executable, "-c", REPORTING, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.fixture(scope="module")
def given(models: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """given(kind) -> a model and its statistics, made once. Do not write there."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            mixture = kind in ("qwen3_moe", "gpt_oss")
            source = save_mixture(folder / "model", kind) if mixture else models(kind)
            made[kind] = (source, folder / "stats")
            calibrate(*made[kind], calib=text, **HOW)
        return made[kind]

    return get


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints of the models that are built."""
    seen: list[Path] = []

    def build(checkpoint: Checkpoint, *args: Any, **more: Any) -> Any:
        seen.append(checkpoint.path)
        return build_skeleton(checkpoint, *args, **more)

    monkeypatch.setattr(skeleton, "build_skeleton", build)
    return seen


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "streamprune.json"}


# ---- what is imported


@pytest.mark.skipif(not arithmetic.is_cpu("auto"), reason="where there may be a GPU, torch is asked for it")
def test_a_prune_from_statistics_needs_no_torch(given: Any, tmp_path: Path) -> None:
    source, stats = given("llama")
    args = ("prune", source, tmp_path / "out", "--pattern", "2:4", "--stats", stats, "--quiet")
    packages = imported(*args)
    assert packages >= {"streamprune", "numba", "numpy"}
    assert not packages & {"torch", "transformers", "safetensors", "tokenizers", "huggingface_hub"}
    assert not imported(*args) & {"torch", "transformers", "numba", "numpy"}  # it finds its work done


def test_fp8_from_statistics_needs_no_transformers(given: Any, tmp_path: Path) -> None:
    source, stats = given("llama")
    packages = imported("prune", source, tmp_path / "out", "--sparsity", "0.5", "--quantize", "fp8", "--stats", stats)
    assert "torch" in packages and not packages & {"transformers", "tokenizers", "huggingface_hub"}


# ---- the outline of a model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "qwen3_moe", "gpt_oss"])
def test_an_outline_is_the_model_again(given: Any, kind: str) -> None:
    """Also after it has been JSON; Conv1D, tied weights, experts in one tensor or in many."""
    import torch

    checkpoint = open_checkpoint(given(kind)[0])
    model = build_skeleton(checkpoint, torch.float32)
    found = from_json(json.loads(json.dumps(to_json(model))), checkpoint)
    parts = (model.stages, model.used, model.transposed, model.modules, model.dense, model.shared, model.streams)
    assert found == Outline(*parts)
    assert bool(found.transposed) == (kind in ("gpt2", "gpt_oss")) and found.has_experts == (
        kind in ("qwen3_moe", "gpt_oss")
    )
    for mine, theirs in zip(found.stages, model.stages, strict=True):
        assert (mine.name, mine.resident, list(mine.linears)) == (theirs.name, theirs.resident, list(theirs.linears))


JOBS: list[dict[str, Any]] = [
    {"sparsity": 0.6},
    {"pattern": "2:4", "skip": "0"},
    {"sparsity": 0.5, "method": "wanda", "only": "down|c_proj"},
    {"sparsity": 0.5, "allocate": "error"},
    {"sparsity": 0.5, "backend": "torch"},
]


@pytest.mark.parametrize("job", JOBS, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_the_same_bytes_as_with_the_model(
    given: Any, tmp_path: Path, built: list[Path], kind: str, job: dict[str, Any]
) -> None:
    """A file without an outline, as earlier versions wrote it, gives the same output by way of the model."""
    source, stats = given(kind)
    earlier = without_outline(stats, tmp_path / "earlier")
    one = prune(source, tmp_path / "one", stats=stats, **job)
    assert not built
    two = prune(source, tmp_path / "two", stats=earlier, **job)
    assert built
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert one.report["linears"] == two.report["linears"] and one.report["resolved"] == two.report["resolved"]


def test_fp8_lists_the_same_linears(given: Any, tmp_path: Path, built: list[Path]) -> None:
    """config.json names what is not quantised, in the order of the model."""
    source, stats = given("llama")
    job = {"pattern": "2:4", "method": "hwpq", "skip": "q_proj"}
    prune(source, tmp_path / "one", stats=stats, **job)
    assert not built
    prune(source, tmp_path / "two", stats=without_outline(stats, tmp_path / "earlier"), **job)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_plan_and_prune_agree_on_statistics(given: Any) -> None:
    source, stats = given("llama")
    assert plan(source, stats=stats, pattern="2:4").cache_bytes == 0
    with pytest.raises(UsageError, match="another model"):
        plan(given("gpt2")[0], stats=stats, pattern="2:4")


# ---- damage


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_header(path: Path, header: dict[str, Any], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def without_outline(stats: Path, path: Path) -> Path:
    header, data = header_of(stats)
    del header["__metadata__"]["outline"], header["__metadata__"]["outline_digest"]
    return put_header(path, header, data)


def _drop_tensor(outline: Any) -> None:
    outline["stages"][1][2].pop()


def _repeat_tensor(outline: Any) -> None:
    outline["stages"][-1][2].append(outline["stages"][0][2][0])


def _unknown_tensor(outline: Any) -> None:
    outline["stages"][-1][2].append("model.nobody.weight")


def _swap_stages(outline: Any) -> None:
    outline["stages"].reverse()


def _steal_linear(outline: Any) -> None:
    outline["stages"][1][3] |= {"x": f"{next(iter(outline['stages'][2][3]))}.weight"}


def _linear_of_a_norm(outline: Any) -> None:
    outline["stages"][1][3]["x"] = "model.layers.0.input_layernorm.weight"


def _part_beyond(outline: Any) -> None:
    outline["stages"][1][3]["x"] = ["model.layers.0.input_layernorm.weight", 32, 1, 32]


def _linear_in_the_head(outline: Any) -> None:
    outline["stages"][-1][3]["lm_head"] = outline["stages"][-1][2][0]


def _no_modules(outline: Any) -> None:
    del outline["modules"]


def _transposed_nobody(outline: Any) -> None:
    outline["transposed"] = ["nobody"]


def _experts_of_nobody(outline: Any) -> None:
    outline["stages"][1][4] = [["experts", [[0]], [1000]]]


def _experts_before_the_first(outline: Any) -> None:
    outline["stages"][1][4] = [["experts", [[0]], [-1]]]


def _unlike_experts(outline: Any) -> None:
    outline["stages"][1][4] = [["experts", [[0], [1]], [2]]]


DAMAGES = [
    _drop_tensor, _repeat_tensor, _unknown_tensor, _swap_stages, _steal_linear, _linear_of_a_norm, _part_beyond,
    _linear_in_the_head, _no_modules, _transposed_nobody, _experts_of_nobody, _experts_before_the_first,
    _unlike_experts,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.strip("_"))
def test_a_wrong_outline_is_refused(given: Any, damage: Callable[[Any], None]) -> None:
    checkpoint = open_checkpoint(given("llama")[0])
    outline = json.loads(header_of(given("llama")[1])[0]["__metadata__"]["outline"])
    assert from_json(outline, checkpoint)
    damage(outline)
    with pytest.raises(ValueError):
        from_json(outline, checkpoint)


@pytest.mark.parametrize(
    "value", [None, [], {}, {"stages": 3}, {"stages": [[]], "unused": [], "transposed": []}], ids=str
)
def test_what_is_no_outline(given: Any, value: Any) -> None:
    with pytest.raises(ValueError):
        from_json(value, open_checkpoint(given("llama")[0]))


def test_a_changed_outline_is_refused(given: Any, tmp_path: Path) -> None:
    """By its digest where it still fits the model, else by what it says; in one line that says what mends it."""
    source, stats = given("llama")
    header, data = header_of(stats)
    meta = header["__metadata__"]
    whole = dict(meta)
    for key, value in (
        ("outline", meta["outline"].replace("layers.1", "layers.0", 1)),
        ("outline", "{"),
        ("outline_digest", "0" * 32),
        ("model", meta["model"] + " "),
    ):
        header["__metadata__"] = whole | {key: value}
        with pytest.raises(CorruptStateError, match=r"outline of the model is damaged .*again with `calibrate`"):
            prune(source, tmp_path / "out", stats=put_header(tmp_path / "s", header, data), sparsity=0.5)
    header["__metadata__"] = {k: v for k, v in whole.items() if k != "outline_digest"}
    with pytest.raises(CorruptStateError, match="outline"):
        prune(source, tmp_path / "out", stats=put_header(tmp_path / "s", header, data), sparsity=0.5)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_lend_no_outline(given: Any, tmp_path: Path, built: list[Path]) -> None:
    """Magnitudes need no statistics, so a file of another model is let through, but never asked about this one."""
    source = Path(shutil.copytree(given("llama")[0], tmp_path / "other"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    prune(source, tmp_path / "out", stats=given("llama")[1], method="magnitude", sparsity=0.5)
    assert built == [source]


# ---- the device


@pytest.mark.parametrize(
    ("asked", "there", "expected"),
    [("cpu", True, True), ("cuda", False, False), ("auto", False, True), ("auto", True, False)],
)
def test_whether_it_must_be_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str, there: bool, expected: bool
) -> None:
    """Without torch the drivers' files in /dev decide; with it, torch does."""
    monkeypatch.setattr(arithmetic, "_DEVICES", tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    if there:
        (tmp_path / "nvidiactl").touch()
    import torch

    monkeypatch.delitem(sys.modules, "torch")
    assert arithmetic.is_cpu(asked) == expected
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert arithmetic.is_cpu(asked) == expected


# ---- faster imports


def test_the_program_imports_no_compiler(models: Models, text: Path, tmp_path: Path) -> None:
    """transformers imports torch._dynamo to mark functions; it is there as soon as it is used."""
    script = """
import sys
from streamprune.process.imports import own_process
own_process()
from streamprune.cli import main
assert main(sys.argv[1:]) == 0
assert "torch._dynamo" in sys.modules and "torch._dynamo.eval_frame" not in sys.modules
import torch
assert torch._dynamo.disable(len) is len and torch._dynamo.disable(recursive=False)(len) is len
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2)).tolist() == [2, 2]
assert "torch._dynamo.eval_frame" in sys.modules and torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo.disable(len) is not len
"""
    args = [
        "calibrate",
        models("llama"),
        tmp_path / "s",
        "--calib",
        text,
        "--samples",
        "2",
        "--seqlen",
        "16",
        "--quiet",
    ]
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `standing` that can be imported, with a submodule `inner`."""
    folder = tmp_path / "standing"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from standing.inner import FOUND\nimport standing.late\ndef disable(f):\n    return FOUND\nother = 5\n"
    )
    (folder / "inner.py").write_text("FOUND = object()\n")
    (folder / "late.py").write_text("import standing\nassert standing.FOUND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in ("standing", "standing.inner", "standing.late"):
        sys.modules.pop(name, None)


def test_a_stand_in_makes_way(package: Path) -> None:
    without_compiler("standing", ["standing.inner"])
    standing: Any = importlib.import_module("standing")
    assert standing.disable(len) is len and "standing.inner" not in sys.modules
    inner: Any = importlib.import_module("standing.inner")
    assert sys.modules["standing"] is standing
    assert standing.other == 5
    real: Any = sys.modules["standing"]
    assert real is not standing and real.inner is inner and real.other == 5
    assert standing.disable(len) is real.disable(len) is inner.FOUND


def test_a_stand_in_makes_way_for_a_submodule(package: Path) -> None:
    """One that needs the package is imported once, by the package; its spec stays its own."""
    without_compiler("standing", ["standing.inner"])
    standing: Any = importlib.import_module("standing")
    inner: Any = importlib.import_module("standing.inner")
    late: Any = importlib.import_module("standing.late")
    real: Any = sys.modules["standing"]
    assert real is not standing and real.late is late is sys.modules["standing.late"] and real.inner is inner
    assert late.__spec__.origin == str(package / "late.py")


def test_a_package_that_cannot_be_imported(package: Path) -> None:
    (package / "__init__.py").write_text("raise OSError('broken')\n")
    without_compiler("standing")
    standing: Any = importlib.import_module("standing")
    for _ in range(2):
        with pytest.raises(OSError, match="broken"):
            _ = standing.other
    without_compiler("no_such_package")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_imports(collects: bool) -> None:
    before = gc.isenabled(), gc.get_freeze_count()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(KeyError), many_imports():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before[0] else gc.disable)()
    assert gc.get_freeze_count() == before[1]  # this process is not the program's alone
