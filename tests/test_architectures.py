"""Architectures: each family's tiny model, streamed and whole; models that see; old names; own code; refusals."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, evaluate, plan, prune
from families import DENSE, LINKED, RECURRENT, REFUSED, SEEING, save_model
from family_checks import CHECKS, MixtureTrial, Trial, check_fp8, check_refit, write_tokens
from mixtures import EVERY
from safetensors.torch import load_file, save_file
from whole_model import in_memory, linears_of, perplexity, round_states, stored

from streamprune.errors import UnsupportedError
from streamprune.model.prunable import left_dense
from streamprune.progress import Progress
from streamprune.pruning.report import notes_of

FITTING = [*DENSE, *RECURRENT, *SEEING, *LINKED]
REFITTED = {"gpt2", "phi3", "mpt", "falcon_h1", "qwen3_vl"}
"""Each by another way of storing weights or of calling layers. Refits and FP8 of the others are marked slow."""
ALIKE = {
    "ministral", "vaultgemma", "cwm", "seed_oss", "hunyuan_v1_dense", "ernie4_5", "helium", "arcee", "qwen2_5_vl",
    "llava_onevision", "idefics3", "falcon_mamba", "mamba2", "gemma4_text", "gemma4_unified_text",
}  # fmt: skip
"""Made of the parts that others are made of: marked slow throughout."""
MIXED = {
    "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v32", "hunyuan_v1_moe", "granitemoe", "gpt_oss", "nemotron_h",
    "flint", "gemma4", "llama4_text", "dbrx",
}  # fmt: skip
"""Mixtures by ways of their own; the others are marked slow, and so are refits of all."""
FOUND = "voxtral"
"""A model that hears, of those with no configuration of their own (shrunk.py); tools/families.py tries the others."""
CALIBRATION = {"samples": 4, "seqlen": 16, "dtype": "float32"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Nothing here asks what a power loss leaves, so nobody waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trial]:
    """The trial of a family; one at a time is kept."""
    kept: dict[str, Trial] = {}

    def get(kind: str) -> Trial:
        if kind not in kept:
            for old in kept.values():
                shutil.rmtree(old.folder)
            kept.clear()
            kept[kind] = (MixtureTrial if kind in EVERY else Trial)(kind, tmp_path_factory.mktemp("trial"))
        return kept[kind]

    return get


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.npy")


# ---- the matrix


def _cells() -> Iterator[Any]:
    for kind in FITTING:
        for name, check in CHECKS.items():
            slow = kind in ALIKE or (check in (check_refit, check_fp8) and kind not in REFITTED)
            yield pytest.param(kind, name, id=f"{kind}-{name}", marks=[pytest.mark.slow] if slow else [])
    for name in ("masks", "inspect", "eval"):
        yield pytest.param(FOUND, name, id=f"{FOUND}-{name}")
    for kind in EVERY:
        for name, check in CHECKS.items():
            slow = kind not in MIXED or check is check_refit
            yield pytest.param(kind, name, id=f"{kind}-{name}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("kind", "check"), list(_cells()))
def test_family(trials: Callable[[str], Trial], kind: str, check: str) -> None:
    CHECKS[check](trials(kind))


def test_a_wrong_reference_would_show(trials: Callable[[str], Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons can fail: other statistics, a model that is not the output, inputs that are not rounded."""
    trial = trials("llama")
    dense, name = trial.statistics, next(iter(trial.statistics))
    count, total, squares = dense[name]
    trial.statistics = {**dense, name: (count, total, squares.flip(0))}
    for check in ("masks", "statistics"):
        with pytest.raises(AssertionError):
            CHECKS[check](trial)
    trial.statistics = dense
    trial.remember(trial.half, trial.whole)
    with pytest.raises(AssertionError):
        CHECKS["eval"](trial)
    assert CHECKS["FP8"](trial) == "yes"
    monkeypatch.setattr("streamprune.model.binding.rounded", lambda x: x)
    with pytest.raises(AssertionError):
        CHECKS["FP8"](trial)


def test_conv1d_is_pruned_along_its_inputs(trials: Callable[[str], Trial]) -> None:
    """Stored (in, out): groups of four and rows lie along the first dimension there."""
    trial = trials("gpt2")
    half, groups = stored(trial.half), stored(trial.two_four)
    for name in linears_of(trial.whole, "gpt2"):
        weight = half[f"{name}.weight"]
        assert weight.shape[0] in (32, 128) and bool(((weight == 0).sum(0) == weight.shape[0] // 2).all())
        assert bool(((groups[f"{name}.weight"] == 0).unflatten(0, (-1, 4)).sum(1) == 2).all())
        assert not bool(((weight == 0).sum(1) == weight.shape[1] // 2).all())


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_everything_but_the_text_model_is_carried_over(trials: Callable[[str], Trial], kind: str) -> None:
    trial = trials(kind)
    before, after = stored(trial.source), stored(trial.half)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(changed) == len(linears_of(trial.whole, kind)) == 14
    towers = {name for name in before if "vision" in name or "visual" in name}
    assert towers and not towers & changed


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma"])
def test_what_stays_dense_is_named(trials: Callable[[str], Trial], kind: str) -> None:
    """In the report and in a note: dt_proj, which is not called, and gates that are no linears."""
    trial = trials(kind)
    report = json.loads((trial.half / "streamprune.json").read_text())
    before, after = stored(trial.source), stored(trial.half)
    leaf = {"mamba": "dt_proj.weight", "recurrent_gemma": "input_gate_weight"}[kind]
    assert any(name.endswith(leaf) for name in report["left_dense"])
    assert all(torch.equal(before[name], after[name]) for name in report["left_dense"])
    assert any("stay dense" in note and next(iter(report["left_dense"])) in note for note in notes_of(report))
    assert "left_dense" not in json.loads((trials("llama").half / "streamprune.json").read_text())


def test_a_weight_that_is_not_called_is_converted(tokens: Path, tmp_path: Path) -> None:
    """Of a bf16 model computed in float32, linears are converted while they are used; dt_proj before."""
    source = save_model(tmp_path / "model", "mamba", 2, "bfloat16")
    found = evaluate(source, tokens, seqlen=16, dtype="float32", work=tmp_path).perplexity
    ids = torch.from_numpy(np.load(tokens))
    model = in_memory(source, "mamba", torch.float32)
    round_states(model, "mamba", torch.bfloat16)
    wanted = perplexity(model, ids[: len(ids) // 16 * 16].view(-1, 16))
    assert abs(found - wanted) <= 1e-3 * wanted


def test_weights_that_layers_share(tokens: Path, tmp_path: Path) -> None:
    """Pruned with the last layer that uses them, also by a run that goes on; not refitted, and that is said."""
    source = save_model(tmp_path / "model", "zamba2", 2, "float32")
    job = {"pattern": "2:4", "method": "obs-admm", "calib": tokens, **CALIBRATION}
    whole = prune(source, tmp_path / "whole", **job)

    def stop(progress: Progress) -> None:
        if progress.name == "layer 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", progress=stop, **job)
    assert prune(source, tmp_path / "out", **job).status == "done"
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "out")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    name = "model.layers.3.shared_transformer.self_attn.q_proj"
    assert whole.report["shared"][name] == [name.replace("3", "1")]
    reported = {entry["name"]: entry for entry in whole.report["linears"]}
    assert "error" not in reported[name] and name.replace("3", "1") not in reported
    assert any("several layers use" in note and "layers.3" in note for note in notes_of(whole.report))
    for more in ({"propagate": "pruned"}, {"quantize": "fp8"}, {"tune": "block", "method": "swiftprune"}):
        with pytest.raises(UnsupportedError, match="is used in layer 1, too"):
            prune(source, tmp_path / "no", **{**job, **more})
    assert not (tmp_path / "no").exists()


def test_halved_states(tokens: Path, tmp_path: Path) -> None:
    """RWKV halves states every few layers, and some weights with them, which changes nothing."""
    source = save_model(tmp_path / "model", "rwkv", 3, "float32")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rescale_every": 1}))
    found = evaluate(source, tokens, seqlen=16, dtype="float32", work=tmp_path).perplexity
    ids = torch.from_numpy(np.load(tokens))
    model = in_memory(source, "rwkv")
    assert model.config.rescale_every == 1
    wanted = perplexity(model, ids[: len(ids) // 16 * 16].view(-1, 16))
    assert abs(found - wanted) <= 1e-5 * wanted


def test_layers_that_would_stay_dense_are_refused() -> None:
    """By name, where most of their weights are of kinds that cannot be pruned; a smaller part is named."""

    def layers(size: int) -> torch.nn.ModuleList:
        layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
        layer.mixing = torch.nn.Parameter(torch.zeros(2, size, 8))
        return torch.nn.ModuleList([layer])

    assert list(left_dense("own", 8, "model.layers", layers(4), ())) == ["model.layers.0.mixing"]
    with pytest.raises(UnsupportedError, match=r"^own: 64 % of its layers' weights .*model.layers.0.mixing, .* 3 dim"):
        left_dense("own", 8, "model.layers", layers(8), ())


@pytest.mark.slow
def test_the_table(tmp_path: Path) -> None:
    """`tools/families.py` prints a row for each family, one for what is refused, and fails where a cell is no."""
    tool = Path(__file__).parent.parent / "tools" / "families.py"
    done = subprocess.run([sys.executable, tool, "gpt2", "mixtral", "t5"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["gpt2", "mixtral", "t5"]
    assert lines[0].count("| yes") == 6 and "| refused |" in lines[0] and "encoder-decoder" in lines[2]
    assert lines[1].count("| yes") == 7 and "each, fused" in lines[1]
    assert done.returncode == 0


def test_the_table_needs_what_loads_fp8() -> None:
    """Without it a table would say that FP8 does not work."""
    without = (
        "import importlib.util as util, runpy, sys; find = util.find_spec; sys.argv = sys.argv[1:]; "
        "util.find_spec = lambda name, *rest: None if name == 'compressed_tensors' else find(name, *rest); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    tool = Path(__file__).parent.parent / "tools" / "families.py"
    done = subprocess.run([sys.executable, "-c", without, tool, "mixtral"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout and "needs compressed-tensors" in done.stderr


# ---- names of old checkpoints


def _renamed(source: Path, out: Path, old: Callable[[str], str]) -> Path:
    """A copy of a checkpoint with its tensors under other names."""
    shutil.copytree(source, out)
    tensors = load_file(source / "model.safetensors")
    save_file({old(n): t for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    assert load_file(out / "model.safetensors").keys() != tensors.keys()
    return out


def _gamma(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


OLD: dict[str, tuple[str, Callable[[str], str]]] = {
    "without the model's prefix": ("bloom", lambda name: name.removeprefix("transformer.")),
    "without a prefix that is no module's": ("opt", lambda name: name.removeprefix("model.")),
    "gamma and beta": ("bert", _gamma),
}


@pytest.mark.parametrize("what", OLD)
def test_old_names(tokens: Path, tmp_path: Path, what: str) -> None:
    """Found under today's names, written back under their own, with the same weights."""
    kind, old = OLD[what]
    today = save_model(tmp_path / "today", kind, 2, "float32")
    source = _renamed(today, tmp_path / "old", old)
    job = {"pattern": "2:4", "calib": tokens, **CALIBRATION}
    outs = [prune(folder, tmp_path / f"out-{folder.name}", **job).out for folder in (today, source)]
    wanted, found = stored(outs[0]), stored(outs[1])
    assert found.keys() == load_file(source / "model.safetensors").keys()
    assert all(torch.equal(found[old(name)], tensor) for name, tensor in wanted.items())
    loaded = in_memory(outs[1], kind).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in in_memory(outs[0], kind).state_dict().items())


# ---- refused


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(tokens: Path, tmp_path: Path, kind: str) -> None:
    """With the assumption that does not hold, and nothing left behind."""
    source = save_model(tmp_path / "model", kind, 2, "float32")
    for out, call in {"out": prune, "statistics": calibrate}.items():
        with pytest.raises(UnsupportedError) as caught:
            call(source, tmp_path / out, calib=tokens, **CALIBRATION, **({"sparsity": 0.5} if call is prune else {}))
        message = str(caught.value)
        assert kind in message and REFUSED[kind].notes in message and len(message.splitlines()) == 1, message
        assert caught.value.exit_code == 4
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- code that comes with a checkpoint

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = {kind!r}


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def _with_code(folder: Path, marker: Path, kind: str) -> Path:
    """A llama checkpoint of model type `kind` with code that touches `marker` when it is imported."""
    save_model(folder, "llama", 2, "float32")
    (folder / "own.py").write_text(CODE.format(marker=str(marker), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_is_not_run_unasked(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    marker, out = tmp_path / "imported", tmp_path / "out"
    source = _with_code(tmp_path / "model", marker, "own")
    verbs: dict[str, Callable[..., Any]] = {
        "prune": lambda **more: prune(source, out, sparsity=0.5, calib=tokens, **CALIBRATION, **more),
        "calibrate": lambda **more: calibrate(source, tmp_path / "s", calib=tokens, **CALIBRATION, **more),
        "eval": lambda **more: evaluate(source, tokens, seqlen=16, work=tmp_path / "work", **more),
        "plan": lambda **more: plan(source, seqlen=16, **more),
    }
    for verb in verbs.values():
        with pytest.raises(UnsupportedError, match=r"'own'.*--trust-remote-code"):
            verb()
    assert not marker.exists() and not out.exists()
    verbs["prune"](trust_remote_code=True)
    assert marker.exists() and (out / "own.py").is_file()


def test_code_beside_a_known_model_is_not_run(tokens: Path, tmp_path: Path) -> None:
    source = _with_code(tmp_path / "model", tmp_path / "imported", "llama")
    assert prune(source, tmp_path / "out", sparsity=0.5, calib=tokens, **CALIBRATION).status == "done"
    assert not (tmp_path / "imported").exists()


class _Touch:
    """Pickled, it touches a file on being unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tokens: Path, tmp_path: Path) -> None:
    """Weights that are pickles are refused where there are no others, and left out where there are."""
    source, marker = save_model(tmp_path / "model", "llama", 2, "float32"), tmp_path / "unpickled"
    poison = pickle.dumps(_Touch(marker))
    pickle.loads(poison)
    assert marker.exists()
    marker.unlink()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (source / name).write_bytes(poison)
    out = prune(source, tmp_path / "out", sparsity=0.5, calib=tokens, **CALIBRATION).out
    assert not marker.exists() and not (out / "pytorch_model.bin").exists()
    (source / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match="holds no safetensors"):
        prune(source, tmp_path / "other", sparsity=0.5, calib=tokens, **CALIBRATION)
    assert not marker.exists() and not (tmp_path / "other").exists()
