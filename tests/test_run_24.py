"""The 2:4 example without a GPU: which linears it would convert, its tables, its refusals. No time is judged.

Torch's own conversion for CUTLASS is plain Torch and runs here: it shows that what `takes` lets through survives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import save_tokenizer, tiny_config
from torch import Tensor, nn
from torch.sparse import _semi_structured_conversions as conversions
from transformers import AutoModelForCausalLM

from streamprune.errors import ResourceError, UsageError

BACKENDS = ["cusparselt", "cutlass"]
QUICK = ["--device", "cpu", "--repeat", "2", "--seconds", "0.0001"]
NAMES = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("run_24")


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tool itself has it where stderr is no terminal."""
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)


@pytest.fixture(scope="module")
def convert_module(tool: ModuleType) -> ModuleType:
    """tools/run_24_convert.py, which the tool has imported."""
    return sys.modules["run_24_convert"]


def sparse_24(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A random weight without zeros but for the first and third of every four, which alternate by row."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).sign().mul(2).to(dtype)
    weight += torch.arange(columns) % 64 / 64
    weight[0::2, 0::4], weight[0::2, 2::4] = 0, 0
    weight[1::2, 1::4], weight[1::2, 2::4] = 0, 0
    return weight


def round_trip(weight: Tensor) -> Tensor:
    """Through Torch's compressed form for CUTLASS and back."""
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    return conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of two layers whose linears are 2:4; that of the head is not, nor is its size a multiple of 16."""
    folder = tmp_path_factory.mktemp("run-24") / "model"
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(tiny_config("llama", 2), dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in llama.model.layers.parameters():
            if weight.ndim == 2:
                weight.mul_((sparse_24(*weight.shape) != 0) * 8)
    llama.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


# ---- what the kernels take


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_takes(convert_module: ModuleType, backend: str, dtype: torch.dtype) -> None:
    """Torch's own tables decide on shapes; the docstring names them."""
    rows, columns = {"cusparselt": (16, 16), "cutlass": (32, 64)}[backend]
    assert convert_module.least_shape(dtype, backend) == (rows, columns)
    assert convert_module.takes(sparse_24(rows, columns, dtype), backend) is None
    assert convert_module.takes(sparse_24(3 * rows, 5 * columns, dtype), backend) is None
    assert convert_module.takes(torch.zeros(rows, columns, dtype=dtype), backend) is None
    for shape in [(rows // 2, columns), (rows, columns // 2), (rows + 8, columns), (rows, columns + 8), (0, columns)]:
        assert "no multiple of" in convert_module.takes(sparse_24(*shape, dtype), backend), shape


def test_what_it_does_not_take(convert_module: ModuleType) -> None:
    assert convert_module.takes(sparse_24(32, 64).float()) == "float32"
    assert convert_module.takes(sparse_24(32, 64).to(torch.float8_e4m3fn)) == "float8_e4m3fn"
    assert convert_module.takes(sparse_24(32, 64)[None]) == "3 dimensions"
    assert convert_module.takes(sparse_24(32, 64).T) == "not contiguous"
    assert convert_module.takes(torch.ones(32, 64, dtype=torch.half)) == "not 2:4"


@pytest.mark.parametrize("row", [0, 17, 63])
def test_one_number_too_many(convert_module: ModuleType, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """A third number in one group of four is found in any chunk of rows; a negative zero is none."""
    monkeypatch.setattr(convert_module, "_CHUNK", 5 * 64)
    weight = sparse_24(64, 64)
    weight[row, 62] = -0.0
    assert convert_module.takes(weight) is None
    weight[row, 62] = 1e-30
    assert convert_module.takes(weight) == "not 2:4"


def test_what_is_taken_survives_and_what_is_not_would_not() -> None:
    """Torch compresses anything of the right shape; only 2:4 comes back as it was."""
    weight = sparse_24(64, 128)
    assert torch.equal(round_trip(weight), weight)
    weight[3, 6] = 4
    assert int((weight[3, 4:8] != 0).sum()) == 3
    assert not torch.equal(round_trip(weight), weight)


def test_conversion_by_torch(convert_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend is passed on, the prototype's warning is not, and Torch itself refuses the CPU."""
    kind = torch.sparse.SparseSemiStructuredTensor
    with pytest.raises(RuntimeError, match="CUDA"):
        convert_module.to_sparse(sparse_24(32, 64), "cusparselt")
    seen = []

    def compress(weight: Tensor) -> Tensor:
        torch.sparse.semi_structured.warnings.warn("a prototype", UserWarning, stacklevel=1)
        seen.append(kind._FORCE_CUTLASS)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)
    monkeypatch.setattr(kind, "_FORCE_CUTLASS", False)
    for backend in BACKENDS:
        assert not convert_module.to_sparse(nn.Parameter(sparse_24(32, 64)), backend).requires_grad
    assert seen == [False, True]


# ---- which GPU


def test_backends(convert_module: ModuleType) -> None:
    """cuSPARSELt where Torch has it; CUTLASS is for 8.x only, by a check of its own."""
    for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)]:
        assert convert_module.choose_backend(capability, True) == "cusparselt"
    assert convert_module.choose_backend((8, 6), False) == "cutlass"
    with pytest.raises(ResourceError, match=r"9\.0.*cuSPARSELt"):
        convert_module.choose_backend((9, 0), False)
    with pytest.raises(ResourceError, match=r"7\.5.*8\.0 or more"):
        convert_module.choose_backend((7, 5), True)


def test_without_a_gpu(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and exit code 5, before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["nowhere"], ["--linears-only", "4096x4096"]):
        assert tool.main(words) == 5
        out, errors = capsys.readouterr()
        assert out == "" and errors.count("\n") == 1
        assert errors.startswith("run_24: error: no CUDA GPU") and "8.0 or more" in errors


def test_devices(convert_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {"cuda": (8, 0), "cuda:1": (7, 0)}[device])
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert convert_module.find_gpu("cuda") == "cusparselt"
    with pytest.raises(ResourceError, match=r"7\.0"):
        convert_module.find_gpu("cuda:1")
    with pytest.raises(ResourceError, match="only 2 GPUs"):
        convert_module.find_gpu("cuda:2")
    for device in ("cpu", "cuda:x", "mps"):
        with pytest.raises(UsageError, match="--device"):
            convert_module.find_gpu(device)


# ---- the conversion of a model


def test_linears_of_a_model(convert_module: ModuleType, model: Path) -> None:
    """All linears of layers but one that is not 2:4 are converted, the head is not; outputs stay what they were."""
    llama = AutoModelForCausalLM.from_pretrained(model)
    odd = llama.model.layers[1].mlp.up_proj
    ids = torch.arange(3, 19).reshape(2, 8)
    with torch.inference_mode():
        odd.weight[5] = 1
        before = llama(ids).logits
        made: list[Tensor] = []

        def convert(weight: Tensor, backend: str) -> Tensor:
            assert backend == "cusparselt"
            made.append(weight.clone())
            return made[-1]

        found = convert_module.convert_linears(llama, "cusparselt", convert)
        assert torch.equal(llama(ids).logits, before)
    expected = {f"model.layers.{i}.{name}" for i in range(2) for name in NAMES} - {"model.layers.1.mlp.up_proj"}
    assert set(found.converted) == expected and len(found.converted) == len(made) == 13
    weights = {llama.get_submodule(name).weight.data_ptr() for name in found.converted}
    assert weights == {weight.data_ptr() for weight in made}
    assert found.skipped == {
        "model.layers.1.mlp.up_proj": "not 2:4",
        "lm_head": "199x32: no multiple of 16x16",
    }
    assert str(found).startswith("13 of 15 linears run in 2:4; left dense: ")
    assert "1 not 2:4" in str(found) and "1 199x32: no multiple" in str(found)
    assert set(found.examples) == {"32x32", "16x32", "64x32", "32x64"}
    assert all(f"{w.shape[0]}x{w.shape[1]}" == shape for shape, (_, w) in found.examples.items())


def test_compressed_linears_compute_the_same(convert_module: ModuleType) -> None:
    """Weights that went through Torch's compressed form, in a model with one that cannot."""
    stack = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 64, bias=False)).half()
    with torch.inference_mode():
        for module in stack:
            module.weight.mul_(sparse_24(*module.weight.shape) != 0)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).half()
        before = stack(x)
        found = convert_module.convert_linears(stack, "cutlass", lambda weight, backend: round_trip(weight))
        assert found.converted == ("0", "2") and found.skipped == {"1": "64x32: no multiple of 32x64"}
        assert torch.equal(stack(x), before)


# ---- the whole tool


def run(tool: ModuleType, *words: str, convert: Any = lambda weight, backend: weight.clone()) -> int:
    code: int = tool.main([*words, *QUICK], gpu=lambda device: "cusparselt", convert=convert)
    return code


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_a_model(tool: ModuleType, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each shape and batch, then the whole model's."""
    assert run(tool, str(model), "--batches", "1,4,16", "--seqlen", "8") == 0
    out = capsys.readouterr().out
    assert out.startswith("cpu, torch ") and "14 of 15 linears run in 2:4; left dense: 1 199x32" in out
    head, rule, *rows = rows_of(out)
    assert head[1:5] == ["tokens per forward", "dense, tokens/s", "2:4, tokens/s", "2:4 ÷ dense"]
    assert set(rule[1:]) == {"---:"}
    where = ["linear 32x32", "linear 16x32", "linear 64x32", "linear 32x64", "whole model"]
    assert [r[:2] for r in rows] == [[label, tokens] for label in where for tokens in ("1", "4", "16")]
    assert all(float(r[2]) > 0 and float(r[3]) > 0 for r in rows)


def test_linears_only(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tool, "--linears-only", "32x64,64x16", "--batches", "1,5", "--dtype", "float16") == 0
    assert [r[:2] for r in rows_of(capsys.readouterr().out)[2:]] == [
        ["linear 32x64", "1"], ["linear 32x64", "5"], ["linear 64x16", "1"], ["linear 64x16", "5"]
    ]  # fmt: skip
    assert run(tool, "--linears-only", "32x24") == 2
    assert "--linears-only 32x24" in capsys.readouterr().err
    assert run(tool, "--linears-only", "32x30") == 2


def test_wrong_outputs(tool: ModuleType, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speed of kernels that compute something else is not reported."""
    for words in ([str(model), "--batches", "4"], ["--linears-only", "32x32"]):
        for wrong in (lambda w, backend: w.flip(0), lambda w, backend: torch.full_like(w, torch.nan)):
            assert run(tool, *words, convert=wrong) == 1
            out, errors = capsys.readouterr()
            assert "differ from dense ones" in errors and errors.count("\n") == 1 and not rows_of(out)


def test_models_that_cannot(tool: ModuleType, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not 2:4, quantised, missing, or too short for --seqlen: one line that says so."""
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_config(tiny_config("llama", 1), dtype=torch.bfloat16).save_pretrained(dense)
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (quantised / "config.json").write_text(json.dumps(config))
    cases: list[tuple[list[str], int, str]] = [
        ([str(dense), "--batches", "2"], 2, "prune it with --pattern 2:4"),
        ([str(quantised)], 4, "is quantised"),
        ([str(tmp_path / "nowhere")], 3, "nowhere"),
        ([str(model), "--seqlen", "65"], 2, "64 tokens at most"),
        ([str(model), "--batches", "100"], 2, "multiple of --seqlen 64"),
    ]
    capsys.readouterr()
    for words, code, said in cases:
        assert run(tool, *words) == code, words
        errors = capsys.readouterr().err
        assert said in errors and errors.count("\n") == 1, errors


def test_memory_and_interrupts(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in [(torch.OutOfMemoryError("of\nmany"), 5), (KeyboardInterrupt(), 130), (RuntimeError("a\nb"), 2)]:

        def fail(weight: Tensor, backend: str, error: BaseException = error) -> Tensor:
            raise error

        assert run(tool, "--linears-only", "32x32", convert=fail) == code
        assert capsys.readouterr().err.count("\n") == 1


# ---- arguments and the table


def test_arguments(tool: ModuleType) -> None:
    found = tool.parse(["MODEL"])
    assert found.batches == [1, 16, 64, 256, 1024, 4096] and found.dtype == "bfloat16" and found.device == "cuda"
    assert tool.parse(["MODEL", "--batches", "8,1,8"]).batches == [8, 1]
    assert tool.parse(["--linears-only", "4096x128,32x64"]).linears_only == [(4096, 128), (32, 64)]


@pytest.mark.parametrize(
    "words",
    [
        "", "MODEL OTHER", "MODEL --linears-only 32x32", "MODEL --batches 1,0", "MODEL --batches 1;2", "MODEL --colour",
        "--linears-only 32", "--linears-only 32x32x32", "MODEL --dtype float32", "MODEL --repeat 0",
        "MODEL --seconds nan", "MODEL --seqlen -1",
    ],
)  # fmt: skip
def test_arguments_that_are_refused(tool: ModuleType, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--help"):
        tool.parse(words.split())
    assert tool.main(words.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_table(tool: ModuleType) -> None:
    """From runs in tokens per second: medians, their ratio, and ratios of runs in pairs."""
    rows = [
        tool._row("linear 4x4", 1, [50.0, 60.0, 40.0], [100.0, 120.0, 50.0]),
        tool._row("whole model", 4096, [123456.0], [98765.4]),
    ]
    assert tool.markdown(rows).splitlines() == [
        "|  | tokens per forward | dense, tokens/s | 2:4, tokens/s | 2:4 ÷ dense | min … max |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| linear 4x4 | 1 | 100 | 50 | 0.50 | 0.50 … 0.80 |",
        "| whole model | 4096 | 98765 | 123456 | 1.25 | 1.25 … 1.25 |",
    ]


def test_windows(tool: ModuleType) -> None:
    """(sequences, length): one sequence as far as it goes, whole ones above that."""
    assert tool.window(1, None, 4096) == (1, 1) and tool.window(256, None, 4096) == (1, 256)
    assert tool.window(4096, None, 8192) == (4, 1024) and tool.window(4096, 2048, 4096) == (2, 2048)
    assert tool.window(128, None, 64) == (2, 64)
