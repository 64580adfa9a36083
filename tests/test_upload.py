"""`upload`: a finished output to the hub, which a server of our own stands in for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calls import prune
from hub_stand_in import Hub, Repository

from streamprune.cli import main
from streamprune.errors import CheckpointError, CorruptStateError, HubError, StateError, UsageError
from streamprune.packing.job import pack
from streamprune.publishing.upload import upload

Models = Callable[..., Path]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning"),  # huggingface_hub's own
]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        server.serve(monkeypatch, tmp_path / "cache")
        yield server


@pytest.fixture
def out(models: Models, tmp_path: Path) -> Path:
    """An output of several shards."""
    return prune(models(), tmp_path / "out", pattern="2:4", method="magnitude", shard_size=30_000).out


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_all_of_it_arrives(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = files_of(out)
    (out / "notes.txt").write_text("mine")
    assert main(["upload", str(out), "org/pruned"]) == 0
    said = capsys.readouterr()
    assert hub.models["org/pruned"] == Repository(wanted, private=False, commits=1)
    assert said.out.startswith(f"{hub.url}/org/pruned: {len(wanted)} files, ")
    assert "streamprune: note: files not sent, as they are no part of the output: notes.txt\n" in said.err
    assert files_of(out) == wanted | {"notes.txt": b"mine"}, "nothing is left in OUT"


def test_what_is_there_is_not_sent_again(hub: Hub, out: Path) -> None:
    """An upload that failed half-way is resumed by the same command."""
    shards = [p.name for p in out.glob("*.safetensors")]
    assert len(shards) > 2
    hub.refuse = lambda request: 400 if request.startswith("PUT") and len(hub.asked("^PUT")) > 1 else None
    with pytest.raises(HubError, match=r"org/pruned: .*the same command goes on"):
        upload(out, "org/pruned")
    assert not hub.models["org/pruned"].files and len(hub.large) == 1
    hub.refuse, hub.log = (lambda request: None), []
    done = upload(out, "org/pruned")
    assert len(hub.asked("^PUT")) == len(shards) - 1 and done.exists
    assert hub.models["org/pruned"].files == files_of(out)


def test_a_name_of_ones_own_and_private(hub: Hub, out: Path) -> None:
    done = upload(out, "pruned", private=True)
    assert done.name == "me/pruned" and done.url == f"{hub.url}/me/pruned" and hub.models["me/pruned"].private
    hub.models["org/public"] = Repository()
    with pytest.raises(UsageError, match="org/public on the hub is public"):
        upload(out, "org/public", private=True)


def test_dry_run(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", str(out), "pruned", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "me/pruned" and found["url"] is None and not found["exists"]
    assert found["bytes"] == sum(len(content) for content in files_of(out).values())
    assert hub.models == {} and hub.asked("^(POST|PUT)") == ["POST /api/validate-yaml"]


def test_a_card_that_was_written_in(hub: Hub, out: Path) -> None:
    with (out / "README.md").open("a") as card:
        card.write("\nMine.\n")
    upload(out, "org/pruned")
    assert hub.models["org/pruned"].files["README.md"].endswith(b"\nMine.\n")


def test_a_packed_output(hub: Hub, out: Path, tmp_path: Path) -> None:
    packed = pack(out, tmp_path / "packed").out
    upload(packed, "org/packed")
    assert hub.models["org/packed"].files == files_of(packed)


def test_other_files_of_a_repository(hub: Hub, out: Path) -> None:
    hub.models["org/used"] = Repository({"model.safetensors": b"x", ".gitattributes": b""})
    with pytest.raises(UsageError, match=r"org/used on the hub holds other files: model\.safetensors; choose another"):
        upload(out, "org/used")
    hub.models["org/used"].files.pop("model.safetensors")
    upload(out, "org/used")


def test_what_is_not_a_finished_output(hub: Hub, out: Path, models: Models, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        upload(tmp_path / "nothing", "org/x")
    with pytest.raises(StateError, match=r"holds no streamprune\.json"):
        upload(models(), "org/x")
    (out / ".streamprune").mkdir()
    with pytest.raises(StateError, match="is unfinished"):
        upload(out, "org/x")
    (out / ".streamprune").rmdir()
    shard = next(out.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptStateError, match=f"{shard.name} has changed since it was written"):
        upload(out, "org/x")
    shard.unlink()
    with pytest.raises(CorruptStateError, match=f"{shard.name} is missing"):
        upload(out, "org/x")
    assert not hub.log


def test_metadata_that_the_hub_does_not_accept(hub: Hub, out: Path) -> None:
    """It is said before anything is made there, in a dry run as well."""
    (out / "README.md").write_text("---\nlicense: mine\nlanguage: english\n---\n")
    hub.metadata = lambda card: ["license must be\none of []"] if "mine" in card else []
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"README\.md: the hub does not accept its metadata .*must be one of \[\]"):
            upload(out, "org/pruned", dry_run=dry_run)
    (out / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xe9")
    with pytest.raises(UsageError, match=r"README\.md is not UTF-8"):
        upload(out, "org/pruned")
    assert hub.models == {}
    (out / "README.md").write_text("---\nlicense: mit\n---\n")
    upload(out, "org/pruned")


def test_unfinished_work(hub: Hub, out: Path, tmp_path: Path) -> None:
    partial = out.rename(tmp_path / "out.partial")
    (partial / ".streamprune").mkdir()
    (partial / "streamprune.json").unlink()
    with pytest.raises(StateError, match=r"out\.partial is unfinished; the command that it was made with finishes it"):
        upload(partial, "org/x")
    with pytest.raises(CheckpointError, match=r"no such folder: .*out\.partial is unfinished"):
        upload(out, "org/x")


@pytest.mark.parametrize("name", ["a/b/c", "", "with space", "../x", "/x", "org/a--b", "org/a..b", "org/.a", 97 * "a"])
def test_names(hub: Hub, out: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name on the hub"):
        upload(out, name)


@pytest.mark.parametrize("name", ["org/pruned", "pruned"])
def test_nobody_is_logged_in(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=f"^{name}: nobody is logged in to the hub; run `hf auth login`"):
        upload(out, name, dry_run=True)


def test_a_hub_that_refuses(hub: Hub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuse = lambda request: 403 if "create" in request else None
    assert main(["upload", str(out), "org/pruned"]) == 69
    (line,) = capsys.readouterr().err.splitlines()
    assert "org/pruned: the hub does not allow this (403); log in with `hf auth login`" in line
