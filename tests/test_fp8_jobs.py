"""Jobs that quantise, from end to end on tiny models: what is written, that transformers computes with it as
compressed-tensors says, and that `eval` sees the same model.

What is written is compared with an unquantised job's output, rounded by torch's own conversion.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import evaluate, plan, prune
from safetensors import safe_open
from test_crash import Crasher
from test_planning import EVEN
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.errors import CheckpointError, StreampruneError, UnsupportedError, UsageError
from streamprune.methods.fp8 import dequantise, quantise
from streamprune.methods.recipes import RECIPES
from streamprune.pruning.job import JobResult

Models = Callable[..., Path]
FP8 = torch.float8_e4m3fn
GIVEN: dict[str, Any] = {"samples": 6, "seqlen": 32, "seed": 3, "propagate": "dense"}

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as f:
            assert not found.keys() & set(f.keys())
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - no mapping
    return found


def dense(model: nn.Module, written: dict[str, Tensor], rounds: bool = True) -> nn.Module:
    """The model with scale · codes for weights, computed here; with `rounds`, inputs of these linears are rounded."""
    for name, module in model.named_modules():
        scale = written.get(f"{name}.weight_scale")
        if scale is None:
            continue
        assert isinstance(module, nn.Linear)
        module.weight = nn.Parameter(written[f"{name}.weight"].float() * scale.float())

        def forward(x: Tensor, module: nn.Linear = module) -> Tensor:
            if rounds:
                own = x.abs().amax(-1, keepdim=True) / 448
                own = torch.where(own == 0, 1.0, own)
                x = (x / own).to(FP8).to(x.dtype) * own
            return F.linear(x, module.weight, module.bias)

        module.forward = forward
    return model


def unquantised(folder: Path, source: Path, to: Path) -> Path:
    """A folder that loads as the source's model with the output's plain tensors."""
    shutil.copytree(folder, to)
    shutil.copy(source / "config.json", to / "config.json")
    return to


@pytest.fixture
def job(models: Models, text: Path, tmp_path: Path) -> Callable[..., JobResult]:
    def run(out: str = "out", kind: str = "llama", stored: str = "bfloat16", **changed: Any) -> JobResult:
        return prune(models(kind, dtype=stored), tmp_path / out, calib=text, **{**GIVEN, **changed})

    return run


def test_codes_are_the_pruned_weights_rounded(job: Callable[..., JobResult], models: Models) -> None:
    plain = tensors(job("plain", pattern="2:4").out)
    result = job(method="hwpq", pattern="2:4")
    written = tensors(result.out)
    linears = {n for n, t in written.items() if t.dtype == FP8}
    assert linears == {f"{x['name']}.weight" for x in result.report["linears"]} and len(linears) == 21
    assert set(written) == set(plain) | {f"{n}_scale" for n in linears}
    for name, was in plain.items():
        if name not in linears:
            assert torch.equal(written[name], was), name
            continue
        scale, codes = written[f"{name}_scale"], written[name]
        assert scale.shape == (was.shape[0], 1) and scale.dtype == torch.bfloat16
        largest = was.float().abs().amax(1, keepdim=True)
        exact = largest / 448
        assert bool((scale.float() >= exact).all() and (scale.float() <= exact * (1 + 2**-7)).all())
        expected = (was.float() / scale.float()).to(FP8)
        bits = expected.view(torch.uint8)
        bits[bits == 0x80] = 0
        assert torch.equal(codes.view(torch.uint8), bits), name
    for linear in result.report["linears"]:
        assert 0 < linear["rounding_error"] < 2**-8  # half a step of three bits, squared
        assert linear["sparsity"] == 0.5
    assert result.recipe == "hwpq" and result.report["job"]["quantize"] == "fp8"


def test_description_in_config_and_index(job: Callable[..., JobResult], models: Models) -> None:
    out = job(method="hwpq", pattern="2:4", shard_size=1).out
    before = json.loads((models("llama") / "config.json").read_text())
    after = json.loads((out / "config.json").read_text())
    found = after.pop("quantization_config")
    assert after == before
    assert found["quant_method"] == "compressed-tensors" and found["format"] == "float-quantized"
    assert found["ignore"] == ["lm_head"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    written = tensors(out)
    assert set(index["weight_map"]) == set(written)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    for name, shard in index["weight_map"].items():
        with safe_open(out / shard, "pt") as f:
            assert name in f.keys()  # noqa: SIM118
    for ref in open_checkpoint(out).tensors.values():
        assert ref.begin % {"BF16": 2, "F8_E4M3": 1}[ref.dtype] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transformers_computes_with_it(models: Models, text: Path, tmp_path: Path, dtype: str) -> None:
    """Loads without a missing or an unexpected tensor; logits are those of scale · codes on rounded inputs."""
    source, out = models("llama", dtype=dtype), tmp_path / "out"
    prune(source, out, method="hwpq", pattern="2:4", calib=text, **GIVEN)
    written = tensors(out)
    assert {t.dtype for n, t in written.items() if n.endswith("_scale")} == {getattr(torch, dtype)}
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ids = torch.randint(0, 199, (2, 24), generator=torch.Generator().manual_seed(0))
    reference = dense(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), written)
    with torch.no_grad():
        for name, tensor in written.items():
            if not name.endswith("_scale") and tensor.dtype != FP8:
                assert torch.equal(reference.get_parameter(name), tensor.float())
        loaded, expected = model.eval()(ids).logits, reference.eval()(ids).logits
        plain = dense(copy.deepcopy(reference), written, rounds=False).eval()(ids).logits
    assert float((loaded - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 1e-3 * float(expected.abs().max()), "rounding of inputs shows"
    generated = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (1, 8)


def whole_perplexity(folder: Path, text: Path, seqlen: int, model: nn.Module | None = None) -> float:
    """Of the whole model in memory, loaded from a folder unless given."""
    whole: Any = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()])
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    with torch.no_grad():
        logits = whole.eval()(windows, use_cache=False).logits[:, :-1]
    return math.exp(float(F.cross_entropy(logits.reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1))))


@pytest.mark.parametrize("inputs", [True, False], ids=["rounded inputs", "inputs as they are"])
def test_eval_is_the_whole_models(job: Callable[..., JobResult], text: Path, inputs: bool) -> None:
    out = job(stored="float32", method="hwpq", sparsity=0.5).out
    if not inputs:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
        (out / "config.json").write_text(json.dumps(config))
    found = evaluate(out, text, seqlen=32, dtype="float32")
    assert found.perplexity == pytest.approx(whole_perplexity(out, text, 32), rel=1e-5)
    same = evaluate(out, text, seqlen=32, dtype="float32", reference=out)
    assert same.kl == pytest.approx(0, abs=1e-9) and same.perplexity == found.perplexity


@pytest.mark.parametrize(
    ("shape", "together"), [((2, 12), (-1,)), ((24,), (0, 1)), ((2, 3, 4), (2, 3))], ids=["three", "two", "four"]
)
def test_compressed_tensors_goes_by_the_shape_of_inputs(
    job: Callable[..., JobResult], shape: tuple[int, ...], together: tuple[int, ...]
) -> None:
    """Its scales are a token's where there are three dimensions, else those of all (two), or of a sequence (four).

    `eval` always takes a token's, and so does vLLM. Where this fails, README and family_checks.py say too much.
    """
    out = job(stored="float32", method="hwpq", sparsity=0.5).out
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    linear, written = model.model.layers[1].mlp.up_proj, tensors(out)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = written[name].float() * written[f"{name}_scale"].float()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(24, weight.shape[1], generator=generator) * torch.logspace(-2, 1, 24)[:, None]
    x = tokens.view(*shape, -1)
    with torch.no_grad():
        model(torch.arange(3, 9)[None])  # the first pass makes weights of codes
        found = linear(x)

    def rounded(own: Tensor) -> Tensor:
        return F.linear((x / own).to(FP8).float() * own, weight)

    torch.testing.assert_close(found, rounded(x.abs().amax(together, keepdim=True) / 448), rtol=1e-4, atol=1e-5)
    far = float((found - rounded(x.abs().amax(-1, keepdim=True) / 448)).abs().max())
    assert (far <= 1e-5) == (len(shape) == 2), far


def _casting(self: Any, x: Tensor) -> Tensor:
    inner = self.act_fn(self.gate_proj(x.to(self.gate_proj.weight.dtype))) * self.up_proj(x)
    out: Tensor = self.down_proj(inner)
    return out


def _taking_values(self: Any, x: Tensor) -> Tensor:
    inner = self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x)
    out: Tensor = self.down_proj(inner)
    return out


def test_models_that_look_at_the_weight(
    job: Callable[..., JobResult], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear's weight has the dtype that is computed in, for casts of inputs. Its values are NaN: their use fails."""
    out = job(stored="float32", method="hwpq", sparsity=0.5).out
    plain = evaluate(out, text, seqlen=32, dtype="float32").perplexity
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", _casting)
    assert evaluate(out, text, seqlen=32, dtype="float32").perplexity == plain
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", _taking_values)
    with pytest.raises(StreampruneError, match="not finite"):
        evaluate(out, text, seqlen=32, dtype="float32")


def test_eval_reads_one_scale_a_tensor(job: Callable[..., JobResult], text: Path, tmp_path: Path) -> None:
    """As other tools write them: `strategy` tensor, a scale of shape (1,), float32."""
    from safetensors.torch import save_file

    out = job(stored="float32", method="hwpq", sparsity=0.5).out
    plain, found = {}, tensors(out)
    for name, tensor in found.items():
        if name.endswith("_scale"):
            weight = found[name.removesuffix("_scale")].float() * tensor.float()
            scale = (weight.abs().max() / 448).reshape(1)
            plain[name.removesuffix("_scale")] = (weight / scale).to(FP8)
            plain[name] = scale
        elif tensor.dtype != FP8:
            plain[name] = tensor
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
    other = tmp_path / "other"
    other.mkdir()
    save_file(plain, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text(json.dumps(config))
    shutil.copy(out / "tokenizer.json", other / "tokenizer.json")
    shutil.copy(out / "tokenizer_config.json", other / "tokenizer_config.json")
    found_here = evaluate(other, text, seqlen=32, dtype="float32").perplexity
    assert found_here == pytest.approx(whole_perplexity(other, text, 32), rel=1e-5)


def test_eval_takes_counted_zeros_for_no_packing(job: Callable[..., JobResult], text: Path) -> None:
    """Other programs describe the sparsity of FP8 checkpoints whose tensors are plain."""
    out = job(method="hwpq", sparsity=0.5).out
    expected = evaluate(out, text, seqlen=32).perplexity
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["sparsity_config"] = {"format": "dense", "global_sparsity": 0.5, "targets": []}
    (out / "config.json").write_text(json.dumps(config))
    assert evaluate(out, text, seqlen=32).perplexity == expected


def test_weights_whose_codes_would_overflow_are_refused() -> None:
    """65504 / 448 is rounded up to 146.25, and 448 · 146.25 is infinite in float16."""
    weight = torch.full((3, 64), 0.5, dtype=torch.float16)
    weight[1, 7] = -65504
    with pytest.raises(UsageError, match=r"65504 is too large.*--skip"):
        quantise(weight, torch.float16)
    weight[1, 7] = -65408
    found = quantise(weight, torch.float16)
    assert torch.isfinite(dequantise(found.codes, found.scale, torch.float16)).all()


def test_what_is_skipped_stays_and_is_named(job: Callable[..., JobResult], models: Models) -> None:
    out = job(method="hwpq", pattern="2:4", skip="mlp|layers.0.").out
    written, source = tensors(out), tensors(models("llama"))
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert sum(t.dtype == FP8 for t in written.values()) == 8
    for name, tensor in source.items():
        if "mlp" in name or ".layers.0." in name:
            assert torch.equal(written[name], tensor)
            assert ("proj" in name) == (name.removesuffix(".weight") in ignore)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("method", ["obs-admm", "sparsegpt", "gradual-cg"])
def test_rounding_is_compensated_for_in_a_refit(job: Callable[..., JobResult], method: str) -> None:
    nearest = job("nearest", method=method, quantize="fp8", fp8_rounding="nearest", sparsity=0.5)
    result = job("out", method=method, quantize="fp8", sparsity=0.5)
    assert result.report["job"]["fp8_rounding"] == "compensate"
    lower = 0
    for with_it, without in zip(result.report["linears"], nearest.report["linears"], strict=True):
        assert with_it["error"] == without["error"], "the refit before is the same"
        assert with_it["error_fp8"] <= without["error_fp8"] * (1 + 1e-6)
        lower += with_it["error_fp8"] < without["error_fp8"] * 0.9999
    assert lower > 10
    plain = tensors(job("plain", method=method, sparsity=0.5).out)
    for name, tensor in tensors(result.out).items():
        if tensor.dtype == FP8:
            assert bool((tensor.float()[plain[name] == 0] == 0).all()), "what is pruned stays zero"


def test_least_squares_scales(job: Callable[..., JobResult]) -> None:
    amax = job("amax", method="hwpq", sparsity=0.5).report["linears"]
    mse = job("mse", method="hwpq", sparsity=0.5, fp8_scale="mse").report["linears"]
    assert all(m["rounding_error"] <= a["rounding_error"] for m, a in zip(mse, amax, strict=True))
    assert sum(m["rounding_error"] for m in mse) < 0.99 * sum(a["rounding_error"] for a in amax)


def test_every_recipe_can_quantise(job: Callable[..., JobResult], text: Path) -> None:
    for method, recipe in RECIPES.items():
        epochs = {} if recipe.tune is None else {"tune_epochs": 1}
        out = job(method, method=method, quantize="fp8", pattern="2:4", **epochs).out
        assert sum(t.dtype == FP8 for t in tensors(out).values()) == 21, method
    plain = job("none", method="hwpq", quantize="none", pattern="2:4")
    assert plain.recipe == "swiftprune" and not any(t.dtype == FP8 for t in tensors(plain.out).values())


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "bloom", "gemma2", "falcon"])
def test_architectures(job: Callable[..., JobResult], models: Models, text: Path, kind: str) -> None:
    """Fused projections, biases, tied heads, linears of other classes: all load, and `eval` is right.

    Made here: compressed-tensors takes the rows of OPT's flattened inputs for something else than tokens.
    """
    out = job(kind=kind, stored="float32", method="hwpq", sparsity=0.5).out
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    whole = AutoModelForCausalLM.from_pretrained(models(kind, dtype="float32"), dtype=torch.float32)
    found = evaluate(out, text, seqlen=32, dtype="float32")
    assert found.perplexity == pytest.approx(
        whole_perplexity(out, text, 32, dense(whole, with_plain(whole, out))), rel=1e-4
    )


def with_plain(whole: nn.Module, out: Path) -> dict[str, Tensor]:
    """The written tensors, by today's module names; tied and unquantised ones are left as they are."""
    written = tensors(out)
    prefix = next(p for p in ("", "model.", "transformer.") if any(f"{p}{n}" in whole.state_dict() for n in written))
    return {f"{prefix}{name}": tensor for name, tensor in written.items()}


def test_pruned_activations_are_those_of_the_fp8_layer(job: Callable[..., JobResult]) -> None:
    dense_stats = tensors(job("dense", method="hwpq", sparsity=0.5).out)
    pruned = tensors(job("pruned", method="hwpq", sparsity=0.5, propagate="pruned").out)
    plain = job("plain", sparsity=0.5, propagate="pruned")
    first = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dense_stats[first].view(torch.uint8), pruned[first].view(torch.uint8))
    last = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(dense_stats[last].view(torch.uint8), pruned[last].view(torch.uint8))
    assert plain.report["linears"][-1]["removed_score"] != pruned_score(job, "pruned")


def pruned_score(job: Callable[..., JobResult], out: str) -> float:
    """Of the last linear, from the report of a finished job."""
    result = job(out, method="hwpq", sparsity=0.5, propagate="pruned")
    assert result.status == "up-to-date"
    score: float = result.report["linears"][-1]["removed_score"]
    return score


def test_backends_write_the_same(job: Callable[..., JobResult]) -> None:
    for name, given in {"amax": {}, "mse": {"fp8_scale": "mse"}}.items():
        one = tensors(job(f"{name}-numba", method="hwpq", selector="exact", sparsity=0.5, backend="numba", **given).out)
        two = tensors(job(f"{name}-torch", method="hwpq", selector="exact", sparsity=0.5, backend="torch", **given).out)
        for tensor in one:
            assert torch.equal(one[tensor].view(torch.uint8), two[tensor].view(torch.uint8)), tensor


REFUSED: dict[str, tuple[dict[str, Any], type[StreampruneError], str]] = {
    "Conv1D": ({"kind": "gpt2", "method": "hwpq"}, UnsupportedError, "Conv1D.*--quantize none"),
    "scale without": ({"fp8_scale": "mse"}, UsageError, "--quantize fp8"),
    "rounding without": ({"fp8_rounding": "nearest"}, UsageError, "--quantize fp8"),
    "compensate without": ({"method": "hwpq", "fp8_rounding": "compensate"}, UsageError, "--refit"),
    "unknown": ({"quantize": "int4"}, UsageError, "int4"),
    "unknown scale": ({"quantize": "fp8", "fp8_scale": "max"}, UsageError, "amax or mse"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(job: Callable[..., JobResult], tmp_path: Path, case: str) -> None:
    given, error, needle = REFUSED[case]
    with pytest.raises(error, match=needle):
        job(sparsity=0.5, **given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def damaged(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    from safetensors.torch import save_file

    to.mkdir()
    found = tensors(folder)
    change(found)
    save_file(found, to / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, to / name)
    return to


def test_eval_refuses_damaged_codes_and_scales(job: Callable[..., JobResult], text: Path, tmp_path: Path) -> None:
    out = job(method="hwpq", sparsity=0.5).out
    name = "model.layers.1.self_attn.k_proj.weight"

    def nan(found: dict[str, Tensor]) -> None:
        codes = found[name].view(torch.uint8).clone()
        codes[3, 5] = 0xFF
        found[name] = codes.view(FP8)

    with pytest.raises(CheckpointError, match=r"k_proj.weight is nan at \[3, 5\]"):
        evaluate(damaged(out, tmp_path / "nan", nan), text, seqlen=32)
    with pytest.raises(CheckpointError, match="weight_scale is missing"):
        evaluate(damaged(out, tmp_path / "none", lambda found: found.pop(f"{name}_scale")), text, seqlen=32)

    def wide(found: dict[str, Tensor]) -> None:
        found[f"{name}_scale"] = found[f"{name}_scale"].repeat(1, 2)

    with pytest.raises(CheckpointError, match="no scale of"):
        evaluate(damaged(out, tmp_path / "wide", wide), text, seqlen=32)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}}}, "num_bits"),
        ({"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}}}, "block"),
        ({"config_groups": {}}, "config_groups"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "unpack"),
    ],
)
def test_eval_refuses_what_it_does_not_know(
    job: Callable[..., JobResult], text: Path, change: dict[str, Any], needle: str
) -> None:
    out = job(method="hwpq", sparsity=0.5).out
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=needle):
        evaluate(out, text, seqlen=32)


def test_rows_are_read_once_and_in_pieces(
    job: Callable[..., JobResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Chunks of a few rows write what whole linears do."""
    whole = tensors(job("whole", method="hwpq", pattern="2:4").out)
    monkeypatch.setattr("streamprune.pruning.pruned_linears.CHUNK_BYTES", 5 * 64)
    parts = tensors(job("parts", method="hwpq", pattern="2:4").out)
    for name, tensor in whole.items():
        assert np.array_equal(tensor.view(torch.uint8).numpy(), parts[name].view(torch.uint8).numpy()), name


@pytest.mark.parametrize(
    "case",
    [{"method": "hwpq", "propagate": "pruned"}, {"method": "swiftprune", "refit": "cg", "quantize": "fp8"}],
    ids=str,
)
def test_some_moments_of_a_crash(models: Models, text: Path, tmp_path: Path, case: dict[str, Any]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    given = {"calib": text, "samples": 4, "seqlen": 16, "pattern": "2:4", **case}
    crasher = Crasher(root, lambda: prune(models("llama", 2), root / "out", **given), ("out",))
    assert any(n.endswith("config.json") for n in crasher.whole)
    for kind in crasher.disk.states:
        assert not crasher.failures(kind, share=0.06)


def test_plan_says_how_large_it_becomes(job: Callable[..., JobResult], models: Models) -> None:
    out = job(method="hwpq", pattern="2:4", skip="o_proj").out
    written = sum(t.nbytes for t in tensors(out).values())
    source = models("llama")
    assert plan(source, method="hwpq", skip="o_proj", seqlen=32, speeds=EVEN).output_bytes == written
    assert plan(source, quantize="fp8", skip="o_proj", seqlen=32, speeds=EVEN).output_bytes == written
    assert plan(source, skip="o_proj", seqlen=32, speeds=EVEN).output_bytes > written
    with pytest.raises(UnsupportedError, match="Conv1D"):
        plan(models("gpt2"), method="hwpq", speeds=EVEN)
