"""`--fetch stream`: a model on the hub is pruned shard by shard, and never whole on the disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import calibrate, plan, prune
from gptq_files import gptq
from hub_stand_in import COMMIT, Hub, Repository
from quantised_files import blocks_of, quantise
from safetensors.torch import load_file, save_file
from stand_in import Card, plugged_in

from streamprune.cli import main
from streamprune.disk import remote, spool
from streamprune.disk.remote import RemoteCheckpoint, open_remote
from streamprune.disk.spool import Spool, at_once
from streamprune.errors import CheckpointError, HubError, UsageError
from streamprune.model.budget import Layout

Models = Callable[..., Path]
HOW: dict[str, Any] = {"samples": 3, "seqlen": 16}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sharded(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual model in a shard for each layer, which all also have a part of the next one."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(models(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return split(folder, tensors)


def split(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    def place(name: str) -> int:
        found = re.search(r"layers\.(\d+)\.", name)
        layer = int(found[1]) if found else (-1 if "embed" in name else 3)
        early = "self_attn" in name and not name.endswith("_scale_inv")
        return max(0, layer - 1) if early else max(0, min(layer, 2))

    files: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        files.setdefault(place(name), {})[name] = tensor
    names = {i: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in files}
    for i, part in files.items():
        save_file(part, folder / names[i], {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: names[place(n)] for n in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: Path) -> Iterator[Hub]:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(spool, "_SMALL", 100)  # norms alone
    with Hub() as server:
        server.serve(monkeypatch, tmp_path / "cache")
        server.models["org/model"] = Repository.of(sharded)
        yield server


def weights(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"}


def whole(hub: Hub) -> list[str]:
    """The shards that were fetched, in order; headers and samples are short."""
    found = [re.search(r"(model-\d+)\S* bytes=0-$", request) for request in hub.log]
    return [match[1] for match in found if match]


@pytest.mark.parametrize("method", ["swiftprune", "obs-admm"])
def test_the_same_bytes_as_from_a_folder(
    hub: Hub, sharded: Path, text: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = prune(sharded, tmp_path / "a", pattern="2:4", calib=text, method=method, replace_tokens=None, **HOW).out
    args = ["prune", "org/model", tmp_path / "b", "--pattern", "2:4", "--calib", text, "--method", method,
            "--samples", 3, "--seqlen", 16, "--fetch", "stream"]  # fmt: skip
    assert main(list(map(str, args))) == 0
    assert "prune: org/model: llama, " in capsys.readouterr().err
    assert weights(tmp_path / "b") == weights(wanted)
    assert whole(hub) == ["model-00001", "model-00002", "model-00003"], "each once, in order"
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "none is kept in the hub's cache"
    assert json.loads((tmp_path / "b" / "streamprune.json").read_text())["base_model"] == "org/model"
    assert f"at commit `{COMMIT}`" in (tmp_path / "b" / "README.md").read_text()
    before = len(hub.log)
    assert main(list(map(str, args))) == 0
    assert "up-to-date" in capsys.readouterr().out and len(whole(hub)) == 3 and len(hub.log) > before


def test_no_more_than_two_shards_are_there(
    hub: Hub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[int] = []
    upcoming = Spool.upcoming

    def look(self: Spool, stages: Any, at_work: int) -> list[str]:
        gone = upcoming(self, stages, at_work)
        there.append(len(self._fetches))
        return gone

    monkeypatch.setattr(Spool, "upcoming", look)
    prune("org/model", tmp_path / "out", sparsity=0.5, calib=text, fetch="stream", **HOW)
    assert there == [2, 2, 2, 2, 1]
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["out"]


def test_a_job_that_was_killed_goes_on(hub: Hub, sharded: Path, text: Path, tmp_path: Path) -> None:
    wanted = prune(sharded, tmp_path / "a", pattern="2:4", calib=text, **HOW).out

    def stop(step: Any) -> None:
        if step.name == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune("org/model", tmp_path / "b", pattern="2:4", calib=text, fetch="stream", progress=stop, **HOW)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b.partial", "cache"}
    hub.log.clear()
    prune("org/model", tmp_path / "b", pattern="2:4", calib=text, fetch="stream", **HOW)
    assert weights(tmp_path / "b") == weights(wanted)
    assert whole(hub) == ["model-00001", "model-00002", "model-00003"], "the first one has the embedding"


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, text: Path, tmp_path: Path) -> None:
    breaks = iter([100, 2000, 0])
    hub.cut = lambda path, content: content[: next(breaks, None)] if hub.log[-1].endswith("-") else content
    prune("org/model", tmp_path / "out", sparsity=0.5, calib=text, fetch="stream", **HOW)
    assert hub.asked("model-00001.* bytes=100-$") and hub.asked("model-00001.* bytes=2100-$")


def test_a_hub_that_is_gone(hub: Hub, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unfinished work is kept, and goes on when it is there again."""
    hub.refuse = lambda request: 503 if request.endswith("00003-of-00003.safetensors bytes=0-") else None
    args = ["prune", "org/model", str(tmp_path / "out"), "--sparsity", "0.5", "--calib", str(text), "--samples", "3",
            "--seqlen", "16", "--fetch", "stream", "-q"]  # fmt: skip
    assert main(args) == 69
    (line,) = capsys.readouterr().err.splitlines()
    assert "org/model: model-00003-of-00003.safetensors: " in line and "the same command goes on" in line
    assert (tmp_path / "out.partial").is_dir()
    hub.refuse = lambda request: None
    assert main(args) == 0


def test_other_content_than_the_hub_names(hub: Hub, text: Path, tmp_path: Path) -> None:
    hub.cut = lambda path, content: content[:-1] + b"\xff" if len(content) > 10_000 else content
    with pytest.raises(HubError, match="is not what the hub says it holds"):
        prune("org/model", tmp_path / "out", sparsity=0.5, calib=text, fetch="stream", **HOW)


def test_statistics_of_a_folder_and_of_the_hub(hub: Hub, sharded: Path, text: Path, tmp_path: Path) -> None:
    """Both are of the same model."""
    local, from_hub = tmp_path / "local", tmp_path / "remote"
    calibrate(sharded, local, calib=text, **HOW)
    calibrate("org/model", from_hub, calib=text, fetch="stream", **HOW)
    a = prune(sharded, tmp_path / "a", pattern="2:4", stats=from_hub).out
    b = prune("org/model", tmp_path / "b", pattern="2:4", stats=local, fetch="stream").out
    assert weights(a) == weights(b)


def test_plan_and_dry_run(
    hub: Hub, sharded: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = sorted(p.stat().st_size for p in sharded.glob("*.safetensors"))
    found = plan("org/model", fetch="stream", **HOW)
    assert found.spool_bytes in (sum(sizes[-2:]), sizes[0] + sizes[-1]) and not whole(hub)
    assert found.disk_bytes == found.output_bytes + found.cache_bytes + found.spool_bytes + (64 << 20)
    assert plan(sharded, **HOW).spool_bytes == 0
    args = ["prune", "org/model", str(tmp_path / "out"), "--pattern", "2:4", "--calib", str(text), "--samples", "3",
            "--seqlen", "16", "--fetch", "stream", "--dry-run"]  # fmt: skip
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "shards from the hub at once" in out and "would begin" in out
    assert [p.name for p in tmp_path.iterdir()] == ["cache"] and not whole(hub)


def test_there_must_be_room(hub: Hub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan("org/model", sparsity=0.5, calib=text, fetch="stream", **HOW)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=found.disk_bytes - 1))
    with pytest.raises(Exception, match="for shards from the hub"):
        prune("org/model", tmp_path / "out", sparsity=0.5, calib=text, fetch="stream", **HOW)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=found.disk_bytes))
    prune("org/model", tmp_path / "out", sparsity=0.5, calib=text, fetch="stream", **HOW)


def test_one_file_outside_lfs(hub: Hub, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in a single file, with git's own hash."""
    monkeypatch.setattr("hub_stand_in._is_large", lambda name: False)
    hub.models["org/small"] = Repository.of(models())
    wanted = prune(models(), tmp_path / "a", sparsity=0.5, method="magnitude").out
    found = prune("org/small", tmp_path / "b", sparsity=0.5, method="magnitude", fetch="stream").out
    assert weights(found) == weights(wanted)


@pytest.mark.parametrize("form", [blocks_of, gptq])
def test_a_quantised_model(form: Any, hub: Hub, models: Models, text: Path, tmp_path: Path) -> None:
    """Scales may be in another shard than their codes."""
    coded, _ = quantise(models(), tmp_path / "q", *form())
    tensors = load_file(coded / "model.safetensors")
    (coded / "model.safetensors").unlink()
    hub.models["org/coded"] = Repository.of(split(coded, tensors))
    wanted = prune(coded, tmp_path / "a", pattern="2:4", calib=text, **HOW).out
    found = prune("org/coded", tmp_path / "b", pattern="2:4", calib=text, fetch="stream", **HOW).out
    assert weights(found) == weights(wanted)
    assert whole(hub) == ["model-00001", "model-00002", "model-00003"]


@pytest.mark.parametrize("layers", [1, 3])
def test_on_a_device(
    hub: Hub, sharded: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """With three layers there at once, one is written while the next one computes."""
    layout = Layout(2, layers, layers > 1, 0)
    monkeypatch.setattr("streamprune.pruning.memory.layout_of", lambda *args: layout)
    how = {"pattern": "2:4", "calib": text, "device": "cuda:0", "backend": "torch", **HOW}
    with plugged_in(Card()):
        wanted = prune(sharded, tmp_path / "a", **how).out
        found = prune("org/model", tmp_path / "b", fetch="stream", **how).out
    assert weights(found) == weights(wanted)
    assert whole(hub) == ["model-00001", "model-00002", "model-00003"]


def test_refusals(hub: Hub, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--fetch stream is for a model on the hub"):
        prune(sharded, out, sparsity=0.5, fetch="stream")
    with pytest.raises(UsageError, match="--allocate owl reads all weights several times"):
        prune("org/model", out, sparsity=0.5, allocate="owl", fetch="stream")
    with pytest.raises(UsageError, match="--fetch all: choose whole or stream"):
        prune("org/model", out, sparsity=0.5, fetch="all")
    with pytest.raises(CheckpointError, match="org/nothing: no such model on the hub"):
        prune("org/nothing", out, sparsity=0.5, fetch="stream")
    del hub.models["org/model"].files["model-00002-of-00003.safetensors"]
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing on the hub"):
        prune("org/model", out, sparsity=0.5, fetch="stream")


def test_what_identifies_it(hub: Hub) -> None:
    """Times do not; other weights do."""
    first, again = open_remote("org/model"), open_remote("org/model")
    assert isinstance(first, RemoteCheckpoint) and first.streamed
    assert first.fingerprint() == again.fingerprint() and first.content() == again.content()
    files = hub.models["org/model"].files
    name = "model-00002-of-00003.safetensors"
    files[name] = files[name][:-1] + b"\x01"
    other = open_remote("org/model")
    assert other.content() != first.content() and other.fingerprint()["shards"] != first.fingerprint()["shards"]
    assert other.fingerprint()["config"] == first.fingerprint()["config"]


@pytest.mark.parametrize(
    ("stages", "shards"),
    [
        ([], []), ([{"a"}], ["a"]), ([{"a"}, {"a", "b"}, {"c"}], ["a", "b"]), ([{"b"}, {"c"}, {"a"}], ["b", "c"]),
        ([{"a", "b", "c"}, {"d"}], ["a", "b", "c"]),
    ],
)  # fmt: skip
def test_which_shards_are_there_at_once(stages: list[set[str]], shards: list[str]) -> None:
    assert at_once(stages) == shards


def test_stages_that_are_at_work_at_once() -> None:
    stages = [{"a"}, {"a", "b"}, {"b", "c"}, {"d"}]
    assert at_once(stages, 2) == ["a", "b"] and at_once(stages, 3) == ["a", "b", "c"]
