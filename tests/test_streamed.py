"""The skeleton and the walk: stages, exact states, and models that cannot be streamed layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import calibrate, evaluate, prune
from conftest import VOCAB, tiny_config
from mixtures import save_mixture
from refusals import refused
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from whole_model import in_memory, perplexity
from windows import cut

from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.mapping import ShardMaps
from streamprune.errors import CheckpointError, StreampruneError, UnsupportedError
from streamprune.model import panels
from streamprune.model.binding import bound
from streamprune.model.loader import WeightLoader
from streamprune.model.prunable import is_linear
from streamprune.model.skeleton import Skeleton, build_skeleton, stored_dtype
from streamprune.model.streamed import StreamedModel

Models = Callable[..., Path]
KINDS = ["llama", "gpt_neox", "gpt2", "opt", "bloom", "gemma2", "falcon"]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(0, VOCAB, (6, 20)))


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return build_skeleton(open_checkpoint(folder), dtype)


def walked(folder: Path, batches: list[torch.Tensor], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits of each batch, through every stage in memory."""
    checkpoint = open_checkpoint(folder)
    with ShardMaps(checkpoint) as maps:
        streamed = StreamedModel(build_skeleton(checkpoint, dtype), WeightLoader(maps, CPU), dtype)
        states = list(streamed.embed(batches))
        for stage in streamed.skeleton.layer_stages:
            with streamed.layer(stage) as layer:
                states = [layer(s) for s in states]
        with streamed.head() as head:
            return [torch.stack([head(sample) for sample in batch]) for batch in states]


# ---- skeleton


@pytest.mark.parametrize("kind", KINDS)
def test_stages(models: Models, kind: str) -> None:
    """Every stored tensor is in exactly one stage; parameters are meta, buffers are real."""
    skeleton = skeleton_of(models(kind))
    stored = load_file(models(kind) / "model.safetensors")
    names = [ref.name for stage in skeleton.stages for ref in stage.tensors]
    assert sorted(names) == sorted(stored)
    assert [s.name for s in skeleton.stages] == ["embed", "layer 0", "layer 1", "layer 2", "head"]
    assert [s.index for s in skeleton.stages] == [-1, 0, 1, 2, -1]
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())
    assert all(b.device.type == "cpu" for b in skeleton.model.buffers())
    assert (skeleton.hidden_size, skeleton.vocab_size, skeleton.dtype) == (32, VOCAB, torch.bfloat16)
    for stage in skeleton.layer_stages:
        assert all(n.startswith(stage.prefix + ".") for n in stage.linears)
        assert all(ref in stage.tensors for ref in stage.linears.values())
        assert stage.nbytes == sum(ref.nbytes for ref in stage.tensors)
        wanted = {n for n, m in skeleton.model.get_submodule(stage.prefix).named_modules() if is_linear(m)}
        assert {n.removeprefix(stage.prefix + ".") for n in stage.linears} == wanted and len(wanted) >= 4
    assert bool(skeleton.transposed) == (kind == "gpt2")
    before = torch.nn.Module.register_parameter
    assert before.__name__ == "register_parameter"  # put back as it was


def test_old_names(models: Models, tmp_path: Path) -> None:
    """A checkpoint may name its tensors without the model's own prefix, as gpt2's does on the hub."""
    source = Path(shutil.copytree(models("gpt2"), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    short = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    assert short.keys() != tensors.keys()
    save_file(short, source / "model.safetensors", metadata={"format": "pt"})
    skeleton = skeleton_of(source)
    assert [len(s.tensors) for s in skeleton.stages] == [len(s.tensors) for s in skeleton_of(models("gpt2")).stages]
    prune(source, tmp_path / "a", pattern="2:4", method="magnitude")
    prune(models("gpt2"), tmp_path / "b", pattern="2:4", method="magnitude")
    made = [
        {n: t for f in sorted((tmp_path / name).glob("*.safetensors")) for n, t in load_file(f).items()}
        for name in "ab"
    ]
    assert made[0].keys() == short.keys()
    assert all(torch.equal(made[0][n.removeprefix("transformer.")], t) for n, t in made[1].items())
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_stored_dtype(models: Models) -> None:
    for name in ("bfloat16", "float32", "float16"):
        assert stored_dtype(open_checkpoint(models(dtype=name))) is getattr(torch, name)


def test_no_layers_at_all(models: Models, tmp_path: Path) -> None:
    import json

    source = Path(shutil.copytree(models(), tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    refused(UnsupportedError, lambda: skeleton_of(source), "decoder layers")


# ---- binding


def test_bound_and_unbound(models: Models) -> None:
    """Within the context the layer's weights are the file's; afterwards they are on the meta device again."""
    checkpoint = open_checkpoint(models())
    skeleton = build_skeleton(checkpoint, torch.float32)
    stored = load_file(models() / "model.safetensors")
    layer = skeleton.layers[1]
    with ShardMaps(checkpoint) as maps:
        before = {n: id(p) for n, p in layer.named_parameters()}
        with bound(skeleton, "model.layers.1", WeightLoader(maps, CPU), torch.float32):
            for name, parameter in layer.named_parameters():
                assert torch.equal(parameter.float(), stored[f"model.layers.1.{name}"].float()), name
            assert all(p.device.type == "meta" for p in skeleton.layers[0].parameters())
            assert "forward" in layer.mlp.up_proj.__dict__
        assert {n: id(p) for n, p in layer.named_parameters()} == before
        assert "forward" not in layer.mlp.up_proj.__dict__
        with pytest.raises(RuntimeError, match="stop"), bound(skeleton, None, WeightLoader(maps, CPU), torch.float32):
            assert not any(p.device.type == "meta" for p in skeleton.model.model.norm.parameters())  # type: ignore[union-attr]
            assert all(p.device.type == "meta" for p in layer.parameters())
            raise RuntimeError("stop")
        assert all(p.device.type == "meta" for p in skeleton.model.parameters())
        embedding = skeleton.model.get_input_embeddings()  # type: ignore[operator]
        assert not embedding._forward_pre_hooks


def test_nothing_is_copied_where_dtypes_agree(models: Models) -> None:
    checkpoint = open_checkpoint(models(dtype="float32"))
    skeleton = build_skeleton(checkpoint, torch.float32)
    with ShardMaps(checkpoint) as maps, bound(skeleton, "model.layers.0", WeightLoader(maps, CPU), torch.float32):
        for name, parameter in skeleton.layers[0].named_parameters():
            mapped = maps.tensor(skeleton.sources[f"model.layers.0.{name}"])
            assert parameter.data_ptr() == mapped.data_ptr(), name


@pytest.mark.parametrize("rows", [1, 5, 10**6])
def test_panels(models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Linears converted a few rows at a time: the same result however few."""
    for kind in ("llama", "opt"):  # without and with biases
        model = AutoModelForCausalLM.from_pretrained(models(kind), dtype=torch.float32).eval()
        monkeypatch.setattr(panels, "_PANEL_BYTES", rows * 32 * 4)
        (found,) = walked(models(kind), [ids])
        with torch.no_grad():
            torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


# ---- walk


@pytest.mark.parametrize("kind", KINDS)
def test_exact(models: Models, ids: torch.Tensor, kind: str) -> None:
    """Stage after stage gives the whole model's logits; batches of different sizes go together."""
    model = AutoModelForCausalLM.from_pretrained(models(kind, dtype="float32")).eval()
    batches = [ids[:4], ids[4:]]
    for batch, found in zip(batches, walked(models(kind, dtype="float32"), batches), strict=True):
        with torch.no_grad():
            wanted = model(input_ids=batch, use_cache=False).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_padding_token_is_a_token(models: Models, tmp_path: Path) -> None:
    """Looking up few rows must not move the embedding's padding row; its gradient is nobody's business here."""
    ids = torch.tensor([[0, 5, 0, 198, 7, 0]])
    for dtype in ("bfloat16", "float32"):
        model = AutoModelForCausalLM.from_pretrained(models("llama", dtype=dtype), dtype=torch.float32).eval()
        (found,) = walked(models("llama", dtype=dtype), [ids])
        with torch.no_grad():
            torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_sliding_windows_reach_their_layers(models: Models, ids: torch.Tensor) -> None:
    """gemma2 alternates two kinds of mask; each layer is called with its own."""
    checkpoint = open_checkpoint(models("gemma2", dtype="float32"))
    with ShardMaps(checkpoint) as maps:
        streamed = StreamedModel(build_skeleton(checkpoint, torch.float32), WeightLoader(maps, CPU), torch.float32)
        list(streamed.embed([ids]))
        masks = [call.kwargs.get("attention_mask") for call in streamed.calls_of(len(ids))]
    assert len(masks) == 3
    assert any((masks[0] is None) != (m is None) or (m is not None and not torch.equal(m, masks[0])) for m in masks[1:])


def test_a_walk_that_begins_in_the_middle(models: Models, ids: torch.Tensor) -> None:
    """What a resumed run knows of the layers' arguments is what the first run knew."""
    checkpoint = open_checkpoint(models("falcon", dtype="float32"))
    batches = [ids[:4], ids[4:]]
    with ShardMaps(checkpoint) as maps:
        first, second = (
            StreamedModel(build_skeleton(checkpoint, torch.float32), WeightLoader(maps, CPU), torch.float32)
            for _ in range(2)
        )
        states = list(first.embed(batches))
        second.learn_calls(batches)
        for streamed in (first, second):
            with streamed.layer(streamed.skeleton.layer_stages[1]) as layer:
                states.extend(layer(s) for s in states[:2])
    assert torch.equal(states[2], states[4]) and torch.equal(states[3], states[5])


def test_watch_sees_every_linear(models: Models, ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(models("gpt2", dtype="float32"))
    with ShardMaps(checkpoint) as maps:
        streamed = StreamedModel(build_skeleton(checkpoint, torch.float32), WeightLoader(maps, CPU), torch.float32)
        (states,) = streamed.embed([ids])
        stage = streamed.skeleton.layer_stages[0]
        seen: dict[str, torch.Size] = {}
        with streamed.layer(stage, watch=lambda name, x: seen.update({name: x.shape})) as layer:
            layer(states)
        assert {n: s[-1] for n, s in seen.items()} == {n: ref.shape[0] for n, ref in stage.linears.items()}
        with streamed.layer(stage) as layer:
            seen.clear()
            layer(states)
        assert not seen, "hooks are gone"


# ---- what cannot be streamed


def forward_with(between: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], **arguments: Any) -> Any:
    """A Llama's forward pass that does something between its layers, or gives them further arguments."""

    def forward(self: Any, input_ids: torch.Tensor, **more: Any) -> BaseModelOutputWithPast:
        states = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(states, position_ids=positions)
        given = {name: make(input_ids) for name, make in arguments.items()}
        for i, layer in enumerate(self.layers):
            out = layer(states, attention_mask=None, position_ids=positions, position_embeddings=rotary, **given)
            states = between(out, input_ids, i)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))

    return forward


def nothing(states: torch.Tensor, ids: torch.Tensor, i: int) -> torch.Tensor:
    return states


def test_plain_forward(models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in below is sound where it does nothing."""
    monkeypatch.setattr(LlamaModel, "forward", forward_with(nothing))
    assert len(walked(models(dtype="float32"), [ids])) == 1


BETWEEN: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "scaled": lambda states, ids, i: states * 1.5,
    "scaled after the second": lambda states, ids, i: states * 1.5 if i == 1 else states,
    "in place": lambda states, ids, i: states.mul_(1.5),
    "in place after the first": lambda states, ids, i: states.mul_(1.5) if i == 0 else states,
    "in place after the last": lambda states, ids, i: states.mul_(1.5) if i == 2 else states,
    "shape": lambda states, ids, i: states[:, :10] if i == 0 else states,
}


@pytest.mark.parametrize("what", BETWEEN)
def test_something_between_layers(
    models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Computing on without it would be silently wrong. After the last layer it is the head's own business."""
    monkeypatch.setattr(LlamaModel, "forward", forward_with(BETWEEN[what]))
    folder = models(dtype="float32")
    if what == "in place after the last":
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
        torch.testing.assert_close(walked(folder, [ids])[0], wanted, rtol=1e-4, atol=1e-4)
    else:
        refused(UnsupportedError, lambda: walked(folder, [ids]), "llama", "between its decoder layers")


def test_layers_out_of_order(models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: torch.Tensor, **more: Any) -> BaseModelOutputWithPast:
        states = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(states, position_ids=torch.arange(input_ids.shape[1])[None])
        for layer in self.layers[:2]:
            states = layer(states, position_embeddings=rotary)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))

    monkeypatch.setattr(LlamaModel, "forward", forward)
    refused(UnsupportedError, lambda: walked(models(dtype="float32"), [ids]), "decoder layers")


ARGUMENTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a tensor": lambda ids: ids[:, :1].float(),
    "a number": lambda ids: int(ids.sum()),
    "a float": lambda ids: float(ids.sum()),
    "a list": lambda ids: [int(n) for n in ids[:, 0]],
    "a nested tensor": lambda ids: {"a": (None, ids)},
    "none or a tensor": lambda ids: ids if int(ids[0, 0]) == 7 else None,
}


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_depend_on_the_tokens(
    models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A layer is replayed with the first batch's arguments: they must be every batch's."""
    monkeypatch.setattr(LlamaModel, "forward", forward_with(nothing, hint=ARGUMENTS[what]))
    ids[0, 0], ids[3, 0] = 7, 8
    folder = models(dtype="float32")
    refused(UnsupportedError, lambda: walked(folder, [ids[:3], ids[3:]]), "llama", "depend on the tokens")
    monkeypatch.setattr(LlamaModel, "forward", forward_with(nothing, hint=lambda ids: (1, 2.5, "x", None)))
    assert len(walked(folder, [ids[:3], ids[3:]])) == 2


def test_refusals_reach_the_user_and_leave_nothing(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaModel, "forward", forward_with(BETWEEN["scaled"]))
    how: dict[str, Any] = {"samples": 2, "seqlen": 16, "calib": text}
    refused(UnsupportedError, lambda: prune(models(), tmp_path / "out", sparsity=0.5, **how), "between")
    refused(UnsupportedError, lambda: calibrate(models(), tmp_path / "stats", **how), "between")
    refused(UnsupportedError, lambda: evaluate(models(), text, seqlen=16, work=tmp_path), "between")
    assert list(tmp_path.iterdir()) == []
    prune(models(), tmp_path / "out", sparsity=0.5, method="magnitude")  # needs no pass


def test_linears_that_the_pass_does_not_use(
    models: Models, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A linear without statistics cannot be pruned by them: named, with what mends it."""

    def forward(self: Any, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    how: dict[str, Any] = {"samples": 2, "seqlen": 16, "calib": text, "sparsity": 0.5}
    with pytest.raises(StreampruneError, match=r"model\.layers\.0\.self_attn\.\w+ was not called.*--skip"):
        prune(models(), tmp_path / "out", **how)
    assert list(tmp_path.iterdir()) == []
    assert prune(models(), tmp_path / "out", skip="self_attn", **how).status == "done"


def test_layers_that_are_called_by_keyword(models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = walked(models(dtype="float32"), [ids])[0]

    def forward(self: Any, input_ids: torch.Tensor, **more: Any) -> BaseModelOutputWithPast:
        states = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(states, position_ids=torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            states = layer(hidden_states=states, position_embeddings=rotary)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(states))

    monkeypatch.setattr(LlamaModel, "forward", forward)
    torch.testing.assert_close(walked(models(dtype="float32"), [ids])[0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "phi", "phi3", "olmo2", "stablelm", "starcoder2"])
def test_further_architectures(tmp_path: Path, ids: torch.Tensor, kind: str) -> None:
    """Families that the other tests do not build; each is streamed exactly."""
    from transformers import AutoConfig

    torch.manual_seed(1)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2 if kind not in ("phi", "stablelm") else 4, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **({"head_dim": 8} if kind == "qwen3" else {}),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    (found,) = walked(tmp_path / "model", [ids])
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_tensor_that_is_missing_or_of_another_shape(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models(), tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    one = tensors.pop("model.layers.2.post_attention_layernorm.weight")
    save_file(tensors, source / "model.safetensors")
    refused(CheckpointError, lambda: skeleton_of(source), "model.layers.2.post_attention_layernorm.weight is missing")
    save_file(tensors | {"model.layers.2.post_attention_layernorm.weight": one[:5]}, source / "model.safetensors")
    refused(CheckpointError, lambda: skeleton_of(source), "shape [5]", "[32]")


def test_tiny_configurations_are_what_they_say() -> None:
    assert tiny_config("gemma2").sliding_window == 8


@pytest.mark.parametrize("version", ["2.7", "2.8"])
def test_a_failing_device_says_nothing_about_the_model(
    models: Models, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """An UnsupportedError would throw unfinished work away. torch before 2.8 has no type for it."""
    if version == "2.7":
        monkeypatch.delattr(torch, "AcceleratorError")

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LlamaModel, "forward", failing)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        walked(models(), [ids])


def test_ids_that_follow_the_embedding(tmp_path: Path) -> None:
    """Llama 4 moves token ids to where its embedding is, which in another dtype is bound only row by row."""
    source = save_mixture(tmp_path / "model", "llama4_text", "bfloat16")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(5, 150, 64))
    found = evaluate(source, tmp_path / "ids.npy", seqlen=16, dtype="float32").perplexity
    held = torch.from_numpy(cut(tmp_path / "ids.npy", source, VOCAB, 16).astype(np.int64))
    wanted = perplexity(in_memory(source), held)
    assert abs(found - wanted) < 2e-3 * wanted, "states are kept in bfloat16"
