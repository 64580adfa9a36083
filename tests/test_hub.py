"""What a model's name means: a folder, or a model of the hub; without network here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoint_files import make
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled

from streamprune.cli import main
from streamprune.disk.checkpoint import open_checkpoint
from streamprune.disk.hub import _explain, resolve_model
from streamprune.errors import CheckpointError, HubError, ResourceError, StateError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(root: Path, name: str) -> Path:
    """The hub's cache with one model: links in snapshots, files in blobs; returns the snapshot."""
    model = root / f"models--{name.replace('/', '--')}"
    source = make(root / "source")
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for file in source.iterdir():
        (model / "blobs" / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return snapshot


def test_a_cached_model_is_found_offline(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path / "cache", "org/name")
    code = (
        "import sys; from streamprune.disk.hub import resolve_model\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "print(resolve_model('org/name')); print(resolve_model('org/name', revision=sys.argv[1], quiet=True))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-c", code, COMMIT],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [str(snapshot)] * 2
    assert open_checkpoint(snapshot).nbytes == 19


def test_a_model_that_is_not_cached(tmp_path: Path) -> None:
    code = (
        "from streamprune.disk.hub import resolve_model; from streamprune.errors import CheckpointError\n"
        "try: resolve_model('org/other')\n"
        "except CheckpointError as error: print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.stderr == ""
    assert len(ran.stdout.splitlines()) == 1
    assert "org/other: no such folder" in ran.stdout
    assert "HF_HUB_OFFLINE" in ran.stdout
    assert "pass a folder" in ran.stdout


def test_folders_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model("org") == Path("org")
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model("~/org") == tmp_path / "org"
    with pytest.raises(UsageError, match="--revision"):
        resolve_model("org/name", revision="main")


@pytest.mark.parametrize(
    "name",
    [
        "/no/where",
        "./org",
        "../org",
        "~/org",
        "~nobody-at-all/x",
        ".",
        "a/b/c",
        "org/",
        "-x",
        "",
        "a b",
        "é/x",
        "a\nb",
    ],
)
def test_paths_are_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fetch(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if name in ("", "."):  # the current folder
        assert resolve_model(name) == Path()
        return
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(name)
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_model(Path("org/name"))


def test_a_folder_of_that_name_keeps_the_hub_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="the folder out exists"):
        resolve_model("out/prunned")
    with pytest.raises(CheckpointError, match="file is not a folder"):
        resolve_model("file")
    with pytest.raises(CheckpointError, match="name too long"):
        resolve_model("x" * 300)


def raising(error: Exception, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Make the download raise; the list gets whether progress bars were hidden during each call."""
    hidden: list[bool] = []

    def fetch(name: str, **kwargs: Any) -> str:
        hidden.append(are_progress_bars_disabled())
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return hidden


def test_quiet_hides_progress_bars_for_the_download_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = raising(errors.LocalEntryNotFoundError("x"), monkeypatch)
    before = are_progress_bars_disabled()
    for quiet in (False, True):
        with pytest.raises(CheckpointError):
            resolve_model("org/name", quiet=quiet)
    assert hidden == [before, True]
    assert are_progress_bars_disabled() == before


def test_names_that_the_hub_refuses() -> None:
    with pytest.raises(CheckpointError, match="a name that the hub allows"):
        resolve_model("a--b")


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(OSError(28, "No space left on device"), monkeypatch)
    with pytest.raises(ResourceError, match="HF_HUB_CACHE"):
        resolve_model("org/name")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is not to blame."""
    raising(PermissionError(13, "Permission denied", "/cache/models--org--name"), monkeypatch)
    with pytest.raises(StateError, match="set HF_HUB_CACHE to a folder that can") as caught:
        resolve_model("org/name")
    assert "network" not in str(caught.value)


@pytest.mark.parametrize(("more", "offline"), [([], ""), (["-q"], ""), ([], "1")])
def test_a_download_is_announced(
    more: list[str], offline: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may take hours. Not where connections are forbidden."""
    raising(http_error(errors.RepositoryNotFoundError), monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    assert main(["inspect", "org/name", *more]) == 3
    told, *rest = capsys.readouterr().err.splitlines()
    if not more and not offline:
        assert told == "inspect: downloads org/name from the Hugging Face hub, unless its cache has it"
        (told,) = rest
    assert told.startswith("streamprune: error: org/name: ")


def http_error(kind: type[Exception]) -> Exception:
    return kind.__new__(kind)  # their constructors want the response of a server


@pytest.mark.parametrize(
    ("kind", "ours", "needle"),
    [
        (errors.GatedRepoError, CheckpointError, "hf auth login"),
        (errors.RepositoryNotFoundError, CheckpointError, "no such model on the hub"),
        (errors.RevisionNotFoundError, CheckpointError, "not this revision"),
        (errors.IncompleteSnapshotError, HubError, "incomplete"),
        (errors.LocalEntryNotFoundError, HubError, "cannot be reached"),
        (errors.HfHubHTTPError, HubError, "the download failed: HfHubHTTPError"),
    ],
)
def test_each_failure_has_its_own_line(
    kind: type[Exception], ours: type[Exception], needle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an exit code that tells whether to try again: a hub that is away is no bad checkpoint."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    raising(http_error(kind), monkeypatch)
    with pytest.raises(ours, match=needle) as caught:
        resolve_model("org/name", revision="v1")
    assert str(caught.value).startswith("org/name at revision v1: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_long_failure_becomes_one_line() -> None:
    assert len(_explain(RuntimeError("first\nsecond"), False).splitlines()) == 1


def test_only_safetensors_and_side_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fetch(name: str, **kwargs: Any) -> str:
        seen.update(kwargs)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("org/name", revision="v1") == tmp_path
    assert seen["revision"] == "v1"
    keep = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "m.py",
    ]
    drop = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "original/params.json",
        "consolidated.safetensors",
        "m.gguf",
        "onnx/model.onnx_data",
        "sub/x.pth",
        "tf_model.h5",
        "flax_model.msgpack",
    ]
    left = huggingface_hub.utils.filter_repo_objects(keep + drop, ignore_patterns=seen["ignore_patterns"])
    assert list(left) == keep
