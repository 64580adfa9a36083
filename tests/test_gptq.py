"""Checkpoints in the formats of GPTQ and AWQ: what codes stand for, what is pruned of them, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, evaluate, plan, prune
from gptq_files import awq, gptq, less_one, words_of
from mixtures import save_mixture
from quantised_files import each_once, quantise, rewritten
from refusals import refused
from safetensors.torch import save_file
from test_quantised_sources import check_numbers, described, weights
from whole_model import in_memory, stored

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.encoded import EncodedRef
from streamprune.disk.header import TensorRef
from streamprune.disk.mapping import ShardMaps
from streamprune.disk.quantised import plain
from streamprune.errors import CheckpointError, UnsupportedError
from streamprune.inspection.inspect import inspect
from streamprune.model.decoded import maps_of

GIVEN: dict[str, Any] = {"samples": 4, "seqlen": 24, "seed": 3, "dtype": "float32", "pattern": "2:4"}

FORMATS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "gptq": gptq,
    "gptq, no format, no g_idx": lambda: gptq(form=None, g_idx=False),
    "gptq, order": lambda: gptq(size=8, desc_act=True),
    "gptq, zeros": lambda: gptq(sym=False),
    "gptq, order, zeros, v2": lambda: gptq(size=8, sym=False, desc_act=True, form="gptq_v2"),
    "gptq, channel, zeros": lambda: gptq(size=-1, sym=False, desc_act=True),
    "gptq, 8 bits, zeros": lambda: gptq(8, sym=False, scales=torch.float16),
    "gptq, 8 bits, channel, v2": lambda: gptq(8, -1, form="gptq_v2"),
    "gptq, float16 scales, a last group": lambda: gptq(size=24, scales=torch.float16),
    "gptq, float32 scales": lambda: gptq(sym=False, scales=torch.float32),
    "awq": awq,
    "awq, channel": lambda: awq(-1),
    "awq, float16 scales": lambda: awq(8, torch.float16),
}

Models = Callable[..., Path]
Both = tuple[Path, Path]
Tensors = dict[str, torch.Tensor]
Q = "model.layers.1.self_attn.q_proj"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Both]:
    """made(format) -> a quantised llama, and the dense one that it stands for. Do not write there."""
    return each_once(models("llama", layers=2), FORMATS, lambda: tmp_path_factory.mktemp("coded"))


# ---- numbers


@pytest.mark.parametrize("at_once", [200, 1 << 20])
@pytest.mark.parametrize("form", FORMATS)
def test_numbers_are_those_of_the_formula(
    form: str, at_once: int, made: Callable[[str], Both], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in rows, and as bytes; and the rest of the checkpoint is as it was."""
    monkeypatch.setattr("streamprune.model.decoded._AT_ONCE", at_once)
    check_numbers(*made(form))


def one_linear(folder: Path, tensors: Tensors, **description: Any) -> torch.Tensor:
    """The weight of a checkpoint with one linear, in float32."""
    folder.mkdir(exist_ok=True)
    save_file({f"a.{leaf}": t for leaf, t in tensors.items()}, folder / "model.safetensors")
    config = {"dtype": "float32", "quantization_config": description}
    (folder / "config.json").write_text(json.dumps(config))
    view = plain(open_checkpoint(folder))
    with maps_of(view) as maps:
        return maps.tensor(view.tensors["a.weight"]).clone()


def words(*values: int) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.uint32).view(np.int32))


GPTQ4 = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}


def test_a_word_of_gptq(tmp_path: Path) -> None:
    """Written out: eight inputs, eight outputs; the lowest bits are the first input's, and the first zero point's."""
    tensors = {
        "qweight": words(0x76543210, *([0xFFFFFFFF] * 7)).reshape(1, 8),
        "qzeros": words(0x6543217F).reshape(1, 1),  # zero points 0, 9 - 1 + 1 with a borrow, …
        "scales": torch.arange(1, 9).reshape(1, 8).half() / 4,
    }
    found = one_linear(tmp_path, tensors, **GPTQ4)
    zeros = torch.tensor([0, 9, 2, 3, 4, 5, 6, 7])
    assert torch.equal(found[0], torch.arange(8) / 4)
    assert torch.equal(found[1:], ((15 - zeros[1:]) * torch.arange(2, 9) / 4)[:, None].expand(7, 8))
    again = tensors | {"qzeros": words(0x76543290).reshape(1, 1)}
    assert torch.equal(one_linear(tmp_path, again, **GPTQ4, checkpoint_format="gptq_v2"), found)


def test_a_word_of_awq(tmp_path: Path) -> None:
    """Outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on."""
    tensors = {
        "qweight": words(0x75316420, 0xFFFFFFFF).reshape(2, 1),
        "qzeros": words(0x75316421).reshape(1, 1),
        "scales": torch.full((1, 8), 0.5).half(),
    }
    found = one_linear(tmp_path, tensors, quant_method="awq", bits=4, group_size=2, version="GEMM")
    zeros = torch.tensor([1, 1, 2, 3, 4, 5, 6, 7])
    assert torch.equal(found, torch.stack(((torch.arange(8) - zeros) / 2, (15 - zeros) / 2), 1))


def test_zero_points_less_one(tmp_path: Path) -> None:
    """Without a 0 among them, they are what each is less one; a 0 borrows, as GPTQModel writes it."""
    zeros = np.arange(1, 9)[None]
    assert np.array_equal(less_one(words_of(zeros, 4), 4), words_of(zeros - 1, 4))
    for bits in (4, 8):
        drawn = np.random.default_rng(0).integers(0, 2**bits, (1, 32))
        stored_as = torch.from_numpy(less_one(words_of(drawn, bits), bits))
        inputs = 32 // bits
        tensors = {
            "qweight": torch.zeros(1, 32, dtype=torch.int32), "qzeros": stored_as, "scales": torch.ones(1, 32).half(),
        }  # fmt: skip
        found = one_linear(tmp_path, tensors, **GPTQ4 | {"bits": bits})
        assert np.array_equal(found.numpy(), np.repeat(-drawn.T, inputs, 1))


@pytest.mark.parametrize("form", ["awq", "awq, float16 scales"])
def test_awq_is_what_compressed_tensors_makes_of_it(form: str, made: Callable[[str], Both]) -> None:
    """It converts such checkpoints to pack-quantized."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    coded, dense = made(form)
    size = FORMATS[form]()[1]["group_size"]
    arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, "symmetric": False}
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    tensors = {name: t for name, t in stored(coded).items() if name.startswith(f"{Q}.")}
    made_of_it = converters.AutoAWQConverter(group_size=size).process(tensors)
    parts = {name.removeprefix(f"{Q}."): tensor for name, tensor in made_of_it.items()}
    found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    assert torch.equal(found.to(torch.bfloat16), stored(dense)[f"{Q}.weight"])


def test_symmetric_codes_whose_zero_points_are_not_less_one(made: Callable[[str], Both], tmp_path: Path) -> None:
    """Written by some programs under the name of the first format; with `sym`, it is clear what they mean."""
    coded, dense = made("gptq")

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("qzeros")]:
            assert set(tensors[name].unique().tolist()) == {0x77777777}
            tensors[name] = torch.full_like(tensors[name], 0x88888888 - (1 << 32))

    check_numbers(rewritten(coded, tmp_path / "model", change), dense)


def test_scales_of_zero_where_all_codes_are(made: Callable[[str], Both], tmp_path: Path) -> None:
    """They lose nothing. In any other place they are reported, see below."""
    coded, _ = made("gptq")

    def change(tensors: Tensors) -> None:
        tensors[f"{Q}.qweight"][:2, 3] = words(0x88888888)
        tensors[f"{Q}.scales"][0, 3] = 0

    view = plain(open_checkpoint(rewritten(coded, tmp_path / "model", change)))
    with maps_of(view) as maps:
        found = maps.tensor(view.tensors[f"{Q}.weight"])
    assert not found[3, :16].any() and found[3, 16:].any() and found[4, :16].any()


@pytest.mark.parametrize("form", ["gptq, order, zeros, v2", "awq"])
def test_pages_of_codes_are_given_back(form: str, made: Callable[[str], Both], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, however few rows are read, and a few at a time."""
    released: list[TensorRef] = []

    def release(self: ShardMaps, refs: Any, *, drop_cache: bool = False) -> None:
        released.extend(refs)

    monkeypatch.setattr(ShardMaps, "release", release)
    monkeypatch.setattr("streamprune.model.decoded._MAPPED", 256)
    view = plain(open_checkpoint(made(form)[0]))
    ref = view.tensors[f"{Q}.weight"]
    assert isinstance(ref, EncodedRef)
    with maps_of(view) as maps:
        maps.rows(ref, 5, 7)
    codes = ref.encoding.codes
    assert [part.begin for part in released] == [codes.begin, *(part.end for part in released[:-1])]
    assert released[-1].end == codes.end and max(part.nbytes for part in released) <= 256 < codes.nbytes


# ---- jobs


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("gptq, order", {}),
        ("gptq, 8 bits, zeros", {"method": "wanda", "refit": "cg"}),
        ("awq", {}),
    ],
)
def test_pruned_as_the_dense_model_is(
    form: str, more: dict[str, Any], made: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    """Byte for byte; and the output is a plain checkpoint, which transformers loads."""
    coded, dense = made(form)
    outs = [prune(model, tmp_path / str(i), calib=text, **GIVEN, **more).out for i, model in enumerate((coded, dense))]
    assert weights(outs[0]) == weights(outs[1])
    assert json.loads((outs[0] / "config.json").read_text()) == json.loads((dense / "config.json").read_text())
    in_memory(outs[0])


def test_experts_are_pruned_as_the_dense_ones_are(tmp_path: Path) -> None:
    source = save_mixture(tmp_path / "source", "deepseek_v3", "bfloat16")
    both = quantise(source, tmp_path, *awq(8))
    check_numbers(*both)
    outs = [prune(m, tmp_path / f"out {m.name}", method="magnitude", pattern="2:4").out for m in both]
    assert weights(outs[0]) == weights(outs[1])


def test_the_other_verbs(made: Callable[[str], Both], text: Path, tmp_path: Path) -> None:
    """They see the dense model; sizes are those of what is stored."""
    coded, dense = made("gptq, order")
    given = {k: v for k, v in GIVEN.items() if k != "pattern"}
    for model in (coded, dense):
        calibrate(model, tmp_path / f"{model.name}.safetensors", calib=text, **given)
    done = prune(coded, tmp_path / "out", pattern="2:4", stats=tmp_path / "coded.safetensors")
    same = prune(dense, tmp_path / "same", pattern="2:4", stats=tmp_path / "dense.safetensors").out
    assert weights(done.out) == weights(same)
    assert done.report["dequantised"] == "gptq" and any("(gptq)" in note for note in done.notes)
    planned = plan(coded, method="magnitude", pattern="2:4")
    assert planned.output_bytes == sum(t.nbytes for t in stored(done.out).values())
    found = [evaluate(m, text, seqlen=24, windows=4, dtype="float32") for m in (coded, dense)]
    assert found[0].nll == found[1].nll and math.isfinite(found[0].nll)
    seen, plainly = inspect(coded), inspect(dense)
    assert [(n.name, n.shape, n.zeros) for n in seen.linears] == [(n.name, n.shape, n.zeros) for n in plainly.linears]
    assert seen.totals.zeros == plainly.totals.zeros
    parts = [t for name, t in stored(coded).items() if name.startswith(f"{Q}.")]
    assert next(n for n in seen.linears if n.name == Q).nbytes == sum(t.nbytes for t in parts)
    against = inspect(done.out, against=coded, expect="2:4")
    assert against.ok, against.failures
    assert {n.difference.kept_changed for n in against.linears if n.difference} == {0}


def test_further_descriptions_are_left_behind(made: Callable[[str], Both], tmp_path: Path) -> None:
    """What loads GPTQ or AWQ looks for them in a folder, and would take the output for a quantised model."""
    model = rewritten(made("awq")[0], tmp_path / "model", lambda tensors: None)
    for name in ("quantize_config.json", "quant_config.json"):
        (model / name).write_text("{}")
    done = prune(model, tmp_path / "out", method="magnitude", pattern="2:4")
    assert not list(done.out.glob("quant*"))
    assert done.report["left_behind"] == ["quant_config.json", "quantize_config.json"]


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_codes_are_not_kept(form: str, made: Callable[[str], Both], tmp_path: Path) -> None:
    def kept() -> None:
        prune(made(form)[0], tmp_path / "out", method="magnitude", pattern="2:4", quantize="keep")

    refused(UnsupportedError, kept, "--quantize keep works for FP8", f"not for {form}")


# ---- what is refused


def _set(name: str, place: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][place] = value

    return change


def _as(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("form", "change", "needles"),
    [
        ("gptq", lambda t: t.pop(f"{Q}.scales"), (f"{Q}.qweight", "without", f"{Q}.scales")),
        ("gptq", lambda t: t.pop(f"{Q}.qzeros"), (f"{Q}.qweight", "without", f"{Q}.qzeros")),
        ("gptq", lambda t: t.pop(f"{Q}.qweight"), ("without", f"{Q}.qweight")),
        ("gptq, order", lambda t: t.pop(f"{Q}.g_idx"), ("without", f"{Q}.g_idx")),
        ("awq", lambda t: t.pop(f"{Q}.scales"), ("without", f"{Q}.scales")),
        ("awq", lambda t: t.pop(f"{Q}.qzeros"), ("without", f"{Q}.qzeros")),
        ("gptq", _as(f"{Q}.qweight", lambda t: t.short()), ("I16 [4, 32]", "in x bits / 32")),
        ("awq", _as(f"{Q}.qweight", lambda t: t[None]), ("I32 [1, 32, 4]", "out x bits / 32")),
        ("gptq", _as(f"{Q}.qweight", lambda t: t[:0]), ("I32 [0, 32]",)),
        ("gptq", _as(f"{Q}.qweight", lambda t: t[:3]), (f"{Q}.g_idx is I32 [32]", "I32 [24]")),
        ("gptq", _as(f"{Q}.scales", lambda t: t[:1]), ("[1, 32]", "[1, 2, 32]", "16 x 1 weights")),
        ("gptq", _as(f"{Q}.scales", lambda t: t.double()), ("F64", "no scales")),
        ("gptq", _as(f"{Q}.scales", lambda t: t.t()), ("[32, 2]", "no scales")),
        ("gptq", _as(f"{Q}.qzeros", lambda t: t[:, :3]), (f"{Q}.qzeros is I32 [2, 3]", "I32 [2, 4]")),
        ("gptq", _as(f"{Q}.qzeros", lambda t: t.long()), (f"{Q}.qzeros is I64",)),
        ("gptq", _as(f"{Q}.g_idx", lambda t: t[1:]), (f"{Q}.g_idx is I32 [31]", "I32 [32]")),
        ("gptq", _as(f"{Q}.g_idx", lambda t: t.float()), (f"{Q}.g_idx is F32",)),
        ("gptq", _set(f"{Q}.g_idx", (9,), 2), (f"{Q}.g_idx", "input 9", "group 2", "0 to 1")),
        ("gptq", _set(f"{Q}.g_idx", (31,), -1), (f"{Q}.g_idx", "input 31", "group -1")),
        ("gptq", _set(f"{Q}.scales", (1, 5), math.nan), (f"{Q}.scales is nan", "row 1, column 5")),
        ("gptq", _set(f"{Q}.scales", (0, 31), math.inf), (f"{Q}.scales is inf", "row 0, column 31")),
        ("gptq", _set(f"{Q}.scales", (1, 6), 0), (f"{Q}.scales is zero", "row 1, column 6")),
        ("gptq, zeros", _set(f"{Q}.scales", (1, 6), -1), (f"{Q}.scales is -1.0", "row 1, column 6")),
        ("awq", _set(f"{Q}.scales", (1, 6), -1), (f"{Q}.scales is -1.0", "row 1, column 6")),
        ("awq", _set(f"{Q}.scales", (0, 7), 0), (f"{Q}.scales is zero", "row 0, column 7")),
        ("gptq", _set(f"{Q}.qzeros", (1, 2), 0x77777677), (f"{Q}.qzeros has 6", "group 1, output 18", "sym")),
        ("gptq", lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), ("both quantised and as",)),
    ],
)  # fmt: skip
def test_damaged(form: str, change: Any, needles: tuple[str, ...], made: Callable[[str], Both], tmp_path: Path) -> None:
    def changed(tensors: Tensors) -> None:
        tensors.update({name: tensor.clone() for name, tensor in tensors.items() if name.startswith(Q)})
        change(tensors)

    model = rewritten(made(form)[0], tmp_path / "model", changed)
    said = refused(CheckpointError, lambda: prune(model, tmp_path / "out", method="magnitude", pattern="2:4"), *needles)
    assert "model.safetensors" in said and CheckpointError.exit_code == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "change", "needles"),
    [
        ("gptq", {"group_size": 8}, ("[1, 8, 32], one for 8 x 1 weights, as config.json has it",)),
        ("gptq", {"group_size": -1}, ("[1, 1, 32]",)),
        ("gptq", {"bits": 8}, ("one for 16 x 1 weights",)),
        ("gptq, channel, zeros", {"bits": 8}, ("qzeros is I32 [1, 4]", "for 8 bits, as config.json has it")),
        ("gptq, zeros", {"sym": True}, ("qzeros has", "correct config.json")),
        ("awq", {"group_size": 32}, ("[1, 2, 32], one for 32 x 1 weights",)),
        ("gptq", {"quant_method": "awq"}, ("no scales of",)),
        ("awq", {"quant_method": "gptq"}, ("no scales of",)),
        ("gptq", {"quant_method": "mxfp4"}, ("(mxfp4), and no tensor is",)),
    ],
)
def test_configurations_of_other_weights(
    form: str, change: dict[str, Any], needles: tuple[str, ...], made: Callable[[str], Both], text: Path, tmp_path: Path
) -> None:
    model = rewritten(made(form)[0], tmp_path / "model", lambda tensors: None)
    described(model, lambda config: config["quantization_config"].update(change))
    for call in (
        lambda: prune(model, tmp_path / "out", method="magnitude", pattern="2:4"),
        lambda: evaluate(model, text, seqlen=24),
    ):
        refused(CheckpointError, call, *needles)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_said_to_be_quantised_and_is_not(form: str, made: Callable[[str], Both], tmp_path: Path) -> None:
    coded, dense = made(form)
    model = rewritten(dense, tmp_path / "model", lambda tensors: None)
    (model / "config.json").write_bytes((coded / "config.json").read_bytes())
    refused(CheckpointError, lambda: plan(model, pattern="2:4"), f"({form}), and no tensor is", "config.json")
    assert inspect(model).totals == inspect(dense).totals


@pytest.mark.parametrize(
    ("form", "change", "needle"),
    [
        ("gptq", {"bits": 3}, "gptq with bits 3"),
        ("gptq", {"bits": 2}, "gptq with bits 2"),
        ("gptq", {"bits": True}, "gptq with bits True"),
        ("gptq", {"bits": "4"}, "gptq with bits 4"),
        ("gptq", {"group_size": 0}, "gptq with group_size 0"),
        ("gptq", {"group_size": 16.0}, "gptq with group_size 16.0"),
        ("gptq", {"group_size": None}, "gptq with group_size None"),
        ("gptq", {"checkpoint_format": "marlin"}, "gptq in the format marlin"),
        ("gptq", {"checkpoint_format": None, "format": "bitblas"}, "gptq in the format bitblas"),
        ("gptq", {"is_marlin_format": True}, "gptq in the format marlin"),
        ("gptq", {"pack_dtype": "int16"}, "words of int16"),
        ("gptq", {"dynamic": {"+:.*q_proj": {"bits": 8}}}, "(dynamic)"),
        ("awq", {"version": "gemv"}, "awq in the format gemv"),
        ("awq", {"version": "GEMV_fast"}, "awq in the format gemv_fast"),
        ("awq", {"version": "marlin"}, "awq in the format marlin"),
        ("awq", {"bits": 8}, "awq with bits 8"),
        ("awq", {"zero_point": False}, "awq without zero points"),
        ("gptq", {"quant_method": "auto-round"}, "(auto-round)"),
    ],
)
def test_what_is_not_known_is_refused_by_name(
    form: str, change: dict[str, Any], needle: str, made: Callable[[str], Both], tmp_path: Path
) -> None:
    model = rewritten(made(form)[0], tmp_path / "model", lambda tensors: None)
    described(model, lambda config: config["quantization_config"].update(change))
    said = refused(UnsupportedError, lambda: plan(model, pattern="2:4"), "config.json", needle)
    assert "GPTQ (gptq and gptq_v2, 4 or 8 bits)" in said and UnsupportedError.exit_code == 4


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("gptq", {"dynamic": {"-:.*lm_head": {}}, "pack_dtype": "int32", "format": "gptq", "checkpoint_format": None}),
        ("gptq", {"checkpoint_format": "GPTQ", "sym": None}),
        ("gptq, channel, zeros", {"group_size": 10**30}),
        ("awq", {"bits": None, "w_bit": 4, "group_size": None, "q_group_size": 16, "version": None}),
    ],
)
def test_other_ways_to_say_the_same(
    form: str, change: dict[str, Any], made: Callable[[str], Both], tmp_path: Path
) -> None:
    coded, dense = made(form)
    positive = rewritten(coded, tmp_path / "model", lambda tensors: None)
    described(positive, lambda config: config["quantization_config"].update(change))
    if change.get("sym", True) is None:  # then negative scales are damage
        refused(CheckpointError, lambda: inspect(positive), "scales is -")
        return
    check_numbers(positive, dense)
