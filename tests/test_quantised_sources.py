"""Quantised checkpoints: what codes stand for, what is pruned of it, and what is refused.

The reference is what transformers and compressed-tensors make of the same files (quantised_files.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, evaluate, plan, prune
from mixtures import save_mixture
from quantised_files import FP8, FUSED, LINEARS, blocks_of, compressed, each_once, pairs_of, quantise, rewritten
from refusals import refused
from safetensors.torch import save_file
from stand_in import Card, plugged_in
from whole_model import in_memory, stored

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.encoded import EncodedRef
from streamprune.disk.quantised import PlainView, plain
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.evaluation.likelihoods import likelihoods
from streamprune.evaluation.requests import Request
from streamprune.inspection.inspect import inspect
from streamprune.model.budget import Layout
from streamprune.model.decoded import maps_of
from streamprune.settings import Resources

GIVEN: dict[str, Any] = {"samples": 4, "seqlen": 24, "seed": 3, "dtype": "float32", "pattern": "2:4"}

Models = Callable[..., Path]
Both = tuple[Path, Path]

FORMATS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "float channel": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float tensor": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "int channel": lambda: compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    "naive group, zeros": lambda: compressed(
        "naive-quantized", num_bits=8, type="int", strategy="group", group_size=16, symmetric=False
    ),
    "packed 4, groups": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=16, symmetric=True
    ),
    "packed 4, zeros": lambda: compressed(
        "pack-quantized", num_bits=4, type="int", strategy="group", group_size=8, symmetric=False
    ),
    "packed 8, channel": lambda: compressed(
        "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "blocks": blocks_of,
    "blocks, powers": lambda: blocks_of((8, 16), torch.float8_e8m0fnu),
    "blocks, bf16": lambda: blocks_of((16, 32), torch.bfloat16),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """made(format) -> a quantised llama, and the dense one that it stands for. Do not write there."""
    return each_once(models("llama", layers=2), FORMATS, lambda: tmp_path_factory.mktemp("coded"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """experts(kind) -> a quantised mixture, and the dense one. Do not write there."""
    known: dict[str, Both] = {}

    def get(kind: str) -> Both:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            if kind == "gpt_oss":
                source = save_mixture(folder / "source", kind, "bfloat16", hidden_size=64, intermediate_size=96)
                known[kind] = quantise(source, folder, *pairs_of(), FUSED)
            else:
                source = save_mixture(folder / "source", kind, "bfloat16")
                known[kind] = quantise(source, folder, *blocks_of((8, 16)))
        return known[kind]

    return get


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


# ---- numbers


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_are_those_of_the_libraries(form: str, made: Callable[[str], Both]) -> None:
    """Whole, in rows, and as bytes; and the rest of the checkpoint is as it was."""
    coded, dense = made(form)
    check_numbers(coded, dense)


def check_numbers(coded: Path, dense: Path) -> None:
    wanted, view = stored(dense), plain(open_checkpoint(coded))
    assert isinstance(view, PlainView) and set(view.tensors) == set(wanted)
    assert "quantization_config" not in view.config
    decoded = 0
    with maps_of(view) as maps:
        for name, ref in view.tensors.items():
            assert same_tensor(maps.tensor(ref), wanted[name]), name
            if not isinstance(ref, EncodedRef):
                continue
            decoded += 1
            some = slice(1, ref.shape[0] - 1)
            assert same_tensor(maps.rows(ref, some.start, some.stop), wanted[name][some]), name
            assert bytes(maps.raw(ref)) == wanted[name].view(torch.uint8).numpy().tobytes()
    assert decoded


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_numbers_of_experts(kind: str, experts: Callable[[str], Both], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprune.model.decoded._AT_ONCE", 200)  # a few rows at a time
    check_numbers(*experts(kind))


@pytest.mark.parametrize("shape", [(40, 50), (3, 40, 50)])
@pytest.mark.parametrize("at_once", [1, 333, 1 << 20])
def test_blocks_that_do_not_divide_the_weight(
    shape: tuple[int, ...], at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in DeepSeek's 576 rows: the last block is smaller. transformers refuses these, so float64 is the reference."""
    monkeypatch.setattr("streamprune.model.decoded._AT_ONCE", at_once)
    torch.manual_seed(0)
    codes, scale = torch.randn(shape).to(FP8), torch.rand(*shape[:-2], 3, 4) + 0.5
    save_file({"a.weight": codes, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    config = {"dtype": "float32", "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    by = scale.double().repeat_interleave(16, -2).repeat_interleave(16, -1)[..., :40, :50]
    view = plain(open_checkpoint(tmp_path))
    with maps_of(view) as maps:
        found = maps.tensor(view.tensors["a.weight"])
        assert found.dtype == torch.float32
        assert torch.equal(found, (codes.double() * by).float())
        data = maps.raw(view.tensors["a.weight"])
        assert bytes(data) == found.numpy().tobytes()


def test_all_numbers_of_mxfp4(tmp_path: Path) -> None:
    """Every byte with every exponent but NaN's, as transformers has it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    scales = torch.arange(255, dtype=torch.uint8).repeat_interleave(16).view(1, 255, 16)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255).view(1, 255, 16, 16)
    save_file({"a_blocks": blocks, "a_scales": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    view = plain(open_checkpoint(tmp_path))
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    with maps_of(view) as maps:
        ref = view.tensors["a"]
        assert same_tensor(maps.tensor(ref), wanted)
        for begin, end in ((0, 1), (31, 33), (200, 512), (5, 5)):
            part = maps.rows(
                EncodedRef(ref.name, ref.shard, ref.dtype, ref.shape[1:], 0, ref.nbytes, ref.encoding), begin, end
            )
            assert same_tensor(part, wanted[0, begin:end])


def test_pages_are_given_back(made: Callable[[str], Both]) -> None:
    """What decoding has read is released, and releasing a view's tensors releases what they are made of."""
    view = plain(open_checkpoint(made("blocks")[0]))
    ref = next(r for r in view.tensors.values() if isinstance(r, EncodedRef))
    released = [part.name for part in ref.stored]
    assert released == [ref.name, f"{ref.name}_scale_inv"]
    half = replace(ref, begin=ref.nbytes // 2)
    codes = next(iter(half.stored))
    assert codes.nbytes == ref.encoding.codes.nbytes // 2 and codes.end == ref.encoding.codes.end
    with maps_of(view) as maps:
        maps.release([half])
        maps.prefetch([half])


# ---- jobs


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("blocks", {}),
        ("packed 4, zeros", {}),
        ("naive group, zeros", {}),
        ("float channel", {"method": "swiftprune-tuned"}),
        ("blocks", {"method": "wanda", "refit": "cg"}),
    ],
)
def test_pruned_as_the_dense_model_is(
    form: str, more: dict[str, Any], made: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    """Byte for byte; and the output is a plain checkpoint, which transformers loads."""
    coded, dense = made(form)
    outs = [prune(model, tmp_path / str(i), calib=text, **GIVEN, **more).out for i, model in enumerate((coded, dense))]
    assert weights(outs[0]) == weights(outs[1])
    config = json.loads((outs[0] / "config.json").read_text())
    assert config == json.loads((dense / "config.json").read_text())
    in_memory(outs[0])


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("more", [{}, {"method": "wanda", "refit": "sparsegpt"}], ids=["mask", "refit"])
def test_experts_are_pruned_as_the_dense_ones_are(
    kind: str, more: dict[str, Any], experts: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    coded, dense = experts(kind)
    outs = [prune(m, tmp_path / str(i), calib=text, **GIVEN, **more).out for i, m in enumerate((coded, dense))]
    assert weights(outs[0]) == weights(outs[1])
    assert stored(outs[0]).keys() == stored(dense).keys()


def test_our_own_fp8_is_pruned_again(models: Models, text: Path, tmp_path: Path) -> None:
    """To 2:4 and FP8, and that to 2:4 again, in bf16 and in FP8: as its dense model would be, and the zeros stay."""
    source = models("llama", layers=2)
    first = prune(source, tmp_path / "first", calib=text, **GIVEN, quantize="fp8").out

    def decode(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name, t in tensors.items() if t.dtype == FP8]:
            tensors[name] = tensors[name].to(torch.bfloat16) * tensors.pop(f"{name}_scale")

    (tmp_path / "one").mkdir()
    one = rewritten(first, tmp_path / "one" / "model", decode)
    for file in one.glob("model-*"):
        file.unlink()
    (one / "model.safetensors.index.json").unlink(missing_ok=True)
    (one / "config.json").write_bytes((source / "config.json").read_bytes())
    for how in ("none", "fp8"):
        outs = [prune(m, tmp_path / f"{how} {m.name}", calib=text, **GIVEN, quantize=how).out for m in (first, one)]
        assert weights(outs[0]) == weights(outs[1])
        kept = stored(outs[0])
        for name, tensor in stored(one).items():
            assert torch.equal(kept[name].float() == 0, tensor == 0) or not LINEARS.search(name), name
    assert [t.dtype for t in kept.values()] == [t.dtype for t in stored(first).values()]
    assert json.loads((outs[0] / "config.json").read_text())["quantization_config"]["format"] == "float-quantized"


def test_statistics_plan_and_eval(made: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """The other verbs see the dense model."""
    coded, dense = made("blocks")
    given = {k: v for k, v in GIVEN.items() if k != "pattern"}
    for model in (coded, dense):
        calibrate(model, tmp_path / f"{model.name}.safetensors", calib=text, **given)
    out = prune(coded, tmp_path / "out", pattern="2:4", stats=tmp_path / "coded.safetensors").out
    same = prune(dense, tmp_path / "same", pattern="2:4", stats=tmp_path / "dense.safetensors").out
    assert weights(out) == weights(same)
    planned = plan(coded, method="magnitude", pattern="2:4")
    assert planned.output_bytes == sum(t.nbytes for t in stored(out).values())
    found = [evaluate(m, text, seqlen=24, windows=4, dtype="float32") for m in (coded, dense)]
    assert found[0].nll == found[1].nll
    apart = evaluate(dense, text, reference=coded, seqlen=24, windows=4, dtype="float32")
    assert apart.kl == 0


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_eval_of_experts(kind: str, experts: Callable[[str], Both], text: Path) -> None:
    found = [evaluate(m, text, seqlen=24, windows=4, dtype="bfloat16") for m in experts(kind)]
    assert found[0].nll == found[1].nll and math.isfinite(found[0].nll)


def test_likelihoods(made: Callable[[str], Both]) -> None:
    requests = [Request(np.arange(5, 15 + i), 3) for i in range(3)]
    found = [likelihoods(model, requests, seqlen=24, resources=Resources(dtype="float32")) for model in made("blocks")]
    assert np.array_equal(found[0].logprobs, found[1].logprobs) and np.isfinite(found[0].logprobs).all()


def test_resumes(made: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """Stopped after a stage, the job goes on with the rest."""
    coded, dense = made("blocks")
    whole = prune(dense, tmp_path / "whole", calib=text, **GIVEN).out

    class Stopped(Exception):  # noqa: N818
        pass

    def stop(progress: Any) -> None:
        if progress.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        prune(coded, tmp_path / "out", calib=text, **GIVEN, progress=stop)
    assert not (tmp_path / "out").exists()
    stages: list[str] = []
    done = prune(coded, tmp_path / "out", calib=text, **GIVEN, progress=lambda p: stages.append(p.name))
    assert 0 < len(stages) < 4
    assert weights(done.out) == weights(whole)
    assert prune(coded, tmp_path / "out", calib=text, **GIVEN).status == "up-to-date"


def test_layers_that_no_model_has_are_decoded_too(experts: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """Those that predict further tokens are carried over, as what they stand for."""
    coded, dense = experts("deepseek_v3")
    name = "model.layers.2.mlp.gate_proj.weight"
    encode, _ = blocks_of((8, 16))
    parts, stands_for = encode(name, torch.randn(32, 64).to(torch.bfloat16))
    more = []
    for model, tensors in ((coded, parts), (dense, {name: stands_for})):
        more.append(rewritten(model, tmp_path / model.name, lambda found, tensors=tensors: found.update(tensors)))
        config = json.loads((model / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
        (more[-1] / "config.json").write_text(json.dumps(config))
    outs = [prune(model, tmp_path / f"out {model.name}", method="magnitude", pattern="2:4").out for model in more]
    assert weights(outs[0]) == weights(outs[1])
    assert same_tensor(stored(outs[0])[name], stands_for)


def test_the_report_says_what_the_source_was(made: Callable[[str], Both], tmp_path: Path) -> None:
    done = prune(made("blocks")[0], tmp_path / "out", method="magnitude", pattern="2:4")
    assert done.report["dequantised"] == "fp8"
    assert any("(fp8)" in note for note in done.notes), done.notes
    done = prune(made("blocks")[1], tmp_path / "plain", method="magnitude", pattern="2:4")
    assert "dequantised" not in done.report and not done.notes


@pytest.mark.parametrize("form", ["float channel", "blocks", "packed 4, zeros"])
def test_inspected(form: str, made: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """As much is zero as in the dense model, and what was pruned kept its values."""
    coded, dense = made(form)
    found, plainly = inspect(coded), inspect(dense)
    assert [(n.name, n.shape, n.zeros) for n in found.linears] == [(n.name, n.shape, n.zeros) for n in plainly.linears]
    assert sum(n.nbytes for n in found.linears) < 0.7 * sum(n.nbytes for n in plainly.linears)
    out = prune(coded, tmp_path / "out", method="magnitude", pattern="2:4").out
    against = inspect(out, against=coded, expect="2:4")
    assert against.ok, against.failures
    assert {n.difference.kept_changed for n in against.linears if n.difference} == {0}


def test_experts_are_inspected(experts: Callable[[str], Both]) -> None:
    for kind in ("deepseek_v3", "gpt_oss"):
        found, plainly = (inspect(model) for model in experts(kind))
        assert [(n.name, n.zeros) for n in found.linears] == [(n.name, n.zeros) for n in plainly.linears]


# ---- what is refused

Tensors = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj"


def _spoil(name: str, place: int, value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        flat = tensors[name].clone()
        if flat.dtype == FP8:
            flat.view(torch.uint8).view(-1)[place] = int(value)
        else:
            flat.view(-1)[place] = value
        tensors[name] = flat

    return change


@pytest.mark.parametrize(
    ("form", "change", "needles"),
    [
        ("blocks", lambda t: t.pop(f"{Q}.weight_scale_inv"), (f"{Q}.weight_scale_inv", "without")),
        ("blocks", lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 3)}), ("[2, 3]", "[1, 2, 2]")),
        ("blocks", lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 2).double()}), ("F64", "no scales")),
        ("blocks", _spoil(f"{Q}.weight_scale_inv", 2, math.nan), (f"{Q}.weight_scale_inv is nan", "row 1, column 0")),
        ("blocks", _spoil(f"{Q}.weight_scale_inv", 0, math.inf), (f"{Q}.weight_scale_inv is inf",)),
        ("blocks", _spoil(f"{Q}.weight_scale_inv", 3, -1), (f"{Q}.weight_scale_inv is -1.0", "row 1, column 1")),
        ("blocks", _spoil(f"{Q}.weight_scale_inv", 3, 0), (f"{Q}.weight_scale_inv is zero", "row 1, column 1")),
        ("blocks", _spoil(f"{Q}.weight", 33, 0x7F), (f"{Q}.weight is nan at [1, 1]",)),
        ("blocks", _spoil(f"{Q}.weight", 33, 0xFF), (f"{Q}.weight is nan at [1, 1]",)),
        ("float channel", lambda t: t.pop(f"{Q}.weight_scale"), (f"{Q}.weight_scale", "without")),
        ("float channel", lambda t: t.update({f"{Q}.weight_scale": torch.ones(31, 1)}), ("[31, 1]", "no scales")),
        ("packed 4, zeros", lambda t: t.pop(f"{Q}.weight_shape"), (f"{Q}.weight_shape", "without")),
        ("packed 4, zeros", lambda t: t.update({f"{Q}.weight_shape": torch.tensor([32, -1])}), ("which is no shape",)),
        ("packed 4, zeros", lambda t: t.update({f"{Q}.weight_shape": torch.tensor([32, 64])}), ("[32, 64]",)),
        ("packed 4, zeros", lambda t: t.update({f"{Q}.weight_zero_point": torch.ones(3, 4).int()}), ("zero points",)),
        ("packed 4, zeros", lambda t: t.pop(f"{Q}.weight_zero_point"), (f"{Q}.weight_zero_point", "without")),
        ("float channel", _spoil(f"{Q}.weight_scale", 5, -2), (f"{Q}.weight_scale is -2.0", "row 5, column 0")),
        ("int channel", _spoil(f"{Q}.weight_scale", 5, 0), (f"{Q}.weight_scale is zero", "row 5, column 0")),
        ("packed 4, zeros", _spoil(f"{Q}.weight_scale", 5, 0), (f"{Q}.weight_scale is zero", "row 1, column 1")),
        ("packed 4, zeros", _spoil(f"{Q}.weight_scale", 5, math.nan), (f"{Q}.weight_scale is nan", "row 1, column 1")),
    ],
)
def test_damaged(
    form: str, change: Any, needles: tuple[str, ...], made: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    model = rewritten(made(form)[0], tmp_path / "model", change)
    said = refused(CheckpointError, lambda: prune(model, tmp_path / "out", calib=text, **GIVEN), *needles)
    assert "model.safetensors" in said
    assert CheckpointError.exit_code == 3
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


E0 = "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "needles"),
    [
        (lambda t: t.pop(f"{E0}_scales"), (f"{E0}_scales", "without")),
        (lambda t: t.pop(f"{E0}_blocks"), (f"{E0}_blocks", "without")),
        (lambda t: t.update({f"{E0}_scales": t[f"{E0}_scales"][:, 1:].clone()}), ("no scales",)),
        (lambda t: t.update({f"{E0}_blocks": t[f"{E0}_blocks"].short()}), ("I16", "blocks are U8")),
        (_spoil(f"{E0}_scales", 7, 255), (f"{E0}_scales is nan", "row 2, column 1")),
        (lambda t: t.update({E0: torch.ones(2)}), ("both quantised and as",)),
    ],
)
def test_damaged_mxfp4(
    change: Any, needles: tuple[str, ...], experts: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    model = rewritten(experts("gpt_oss")[0], tmp_path / "model", change)
    refused(CheckpointError, lambda: prune(model, tmp_path / "out", calib=text, **GIVEN), *needles)


def described(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes config.json."""
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "change", "needles"),
    [
        ("blocks", lambda c: c["quantization_config"].update(weight_block_size=[64, 64]), ("one for 64 x 64 weights",)),
        ("blocks", lambda c: c["quantization_config"].pop("weight_block_size"), ("as config.json has it",)),
        (
            "packed 4, groups",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=8),
            ("one for 1 x 8 weights",),
        ),
        (
            "blocks",
            lambda c: c.update(compression_config={"quant_method": "compressed-tensors"}),
            ("quantization_config and compression_config contradict each other", "fp8, compressed-tensors"),
        ),
        (
            "blocks",
            lambda c: c.update(text_config={"quantization_config": {"weight_block_size": [32, 16]}}),
            ("and text_config.quantization_config contradict each other", "[16, 16], [32, 16]"),
        ),
        ("blocks", lambda c: c.update(text_config={"quantization_config": "awq"}), ("contradict", "awq")),
        ("blocks", lambda c: c.update(quantization_config={"quant_method": "mxfp4"}), ("(mxfp4), and no tensor is",)),
    ],
)
def test_configurations_of_other_weights(
    form: str, change: Any, needles: tuple[str, ...], made: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    model = rewritten(made(form)[0], tmp_path / "model", lambda tensors: None)
    described(model, change)
    _refused_by_all(model, text, tmp_path, *needles)


def _refused_by_all(model: Path, text: Path, tmp_path: Path, *needles: str) -> None:
    for call in (
        lambda: prune(model, tmp_path / "out", calib=text, **GIVEN),
        lambda: prune(model, tmp_path / "out", method="magnitude", pattern="2:4", quantize="keep"),
        lambda: evaluate(model, text, seqlen=24),
        lambda: plan(model, pattern="2:4"),
    ):
        refused(CheckpointError, call, *needles)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["blocks", "float channel", "packed 4, zeros"])
def test_said_to_be_quantised_and_is_not(form: str, made: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """As after dequantising with a script that leaves config.json as it was; `inspect` reads what is there."""
    coded, dense = made(form)
    model = rewritten(dense, tmp_path / "model", lambda tensors: None)
    (model / "config.json").write_bytes((coded / "config.json").read_bytes())
    _refused_by_all(model, text, tmp_path, "config.json", "no tensor is", "remove quantization_config")
    assert inspect(model).totals == inspect(dense).totals


def test_the_same_said_twice(made: Callable[[str], Both], tmp_path: Path) -> None:
    coded, dense = made("blocks")
    model = rewritten(coded, tmp_path / "model", lambda tensors: None)
    described(model, lambda c: c.update(text_config={"quantization_config": {"quant_method": "fp8", "ignored": 1}}))
    check_numbers(model, dense)


def test_scales_of_zero_where_all_codes_are(made: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """They lose nothing: the weights are zeros. `eval` computes with such codes as they are."""

    def zeros(leaf: str, of: tuple[int, ...], rows: int) -> Callable[[Tensors], None]:
        def change(tensors: Tensors) -> None:
            codes, scale = tensors[f"{Q}.weight"].clone(), tensors[f"{Q}.{leaf}"].clone()
            codes.view(torch.uint8)[:rows, :16], scale[of] = 0x80, 0
            codes.view(torch.uint8)[0] = 0
            tensors |= {f"{Q}.weight": codes, f"{Q}.{leaf}": scale}

        return change

    model = rewritten(made("blocks")[0], tmp_path / "blocks", zeros("weight_scale_inv", (0, 0), 16))
    view = plain(open_checkpoint(model))
    with maps_of(view) as maps:
        found = maps.tensor(view.tensors[f"{Q}.weight"])
    assert not found[:16, :16].any() and found[1:16, 16:].all(1).any()
    assert prune(model, tmp_path / "out", method="magnitude", pattern="2:4").status == "done"
    channels = rewritten(made("float channel")[0], tmp_path / "channels", zeros("weight_scale", (0, 0), 1))
    assert math.isfinite(evaluate(channels, text, seqlen=24, windows=2).nll)


@pytest.mark.parametrize(("value", "says"), [(-1.0, "is -1.0"), (0.0, "is 0.0"), (math.nan, "is nan")])
def test_bad_scales_of_codes_that_are_computed_with(
    value: float, says: str, made: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    model = rewritten(made("float channel")[0], tmp_path / "model", _spoil(f"{Q}.weight_scale", 3, value))
    refused(CheckpointError, lambda: evaluate(model, text, seqlen=24), f"{Q}.weight_scale {says}")


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}


@pytest.mark.parametrize(
    ("description", "needle"),
    [
        ("awq", "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups"),
        ({"format": "nvfp4-pack-quantized", "config_groups": {"g": {"weights": WEIGHTS}}}, "nvfp4-pack-quantized"),
        ({"format": "pack-quantized", "config_groups": {"g": {"weights": WEIGHTS | {"num_bits": 3}}}}, "num_bits 3"),
        ({"format": "pack-quantized", "config_groups": {"g": {"weights": WEIGHTS | {"group_size": 0}}}}, "groups of 0"),
        (
            {"format": "pack-quantized", "config_groups": {"g": {"weights": WEIGHTS}}, "transform_config": {"a": 1}},
            "rotated",
        ),
        ({"format": "pack-quantized", "config_groups": {"g": {}}}, "weights as None"),
        (
            {
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"symmetric": False}}},
            },
            "with zero points and without",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "unpack"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    description: Any, needle: str, models: Models, text: Path, tmp_path: Path
) -> None:
    model = rewritten(models("llama", layers=2), tmp_path / "model", lambda t: None)
    if isinstance(description, dict):
        description = {"quant_method": "compressed-tensors", **description}
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": description}
    (model / "config.json").write_text(json.dumps(config))
    for call in (
        lambda: prune(model, tmp_path / "out", calib=text, **GIVEN),
        lambda: evaluate(model, text, seqlen=24),
        lambda: plan(model, pattern="2:4"),
    ):
        refused(UnsupportedError, call, "config.json", needle)


def test_an_order_of_columns_is_refused(made: Callable[[str], Both], tmp_path: Path) -> None:
    order = {f"{Q}.weight_g_idx": torch.arange(32, dtype=torch.int32)}
    model = rewritten(made("packed 4, groups")[0], tmp_path / "model", lambda t: t.update(order))
    refused(UnsupportedError, lambda: prune(model, tmp_path / "out", method="magnitude", pattern="2:4"), "weight_g_idx")


@pytest.mark.parametrize("kind", ["deepseek_v3", "gpt_oss"])
def test_on_a_device(
    kind: str, experts: Callable[[str], Both], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded weights travel to a device, in pieces, as stored ones do."""
    layout = Layout(2, 2, True, 0)
    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    monkeypatch.setattr("streamprune.model.loader._PIECE_BYTES", 1000)
    given = {**GIVEN, "calib": text, "device": "cuda:0", "backend": "torch"}
    with plugged_in(Card()):
        outs = [prune(m, tmp_path / str(i), **given).out for i, m in enumerate(experts(kind))]
    assert weights(outs[0]) == weights(outs[1])
