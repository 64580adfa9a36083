"""OUT, OUT.partial and --work belong to one job: what can be resumed, what is refused, what is never changed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refusals
from calls import calibrate, prune
from conftest import VOCAB
from crashing import NoSync, Tree, replace_os, restore, tree_of
from safetensors.torch import load_file, save_file

from streamprune.disk import durable
from streamprune.disk.report import REPORT
from streamprune.disk.state import lock_of, partial_of
from streamprune.errors import CorruptStateError, ResourceError, StateError, StreampruneError, UsageError
from streamprune.evaluation.evaluate import _scratch
from streamprune.progress import Progress
from streamprune.pruning.job import JobResult

Prune = Callable[..., JobResult]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, np.random.default_rng(3).integers(0, VOCAB, 500))
    return path


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces fsync, which takes most of the time: these tests are not about power failures."""
    replace_os(monkeypatch, NoSync())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


@pytest.fixture
def job(models: Callable[..., Path], tokens: Path, out: Path) -> Prune:
    """`prune` with the arguments that all these tests share, unless they are overridden."""

    def run(**changes: Any) -> JobResult:
        usual = {"model": models("llama", 2), "out": out, "calib": tokens, "samples": 4, "seqlen": 16}
        if "pattern" not in changes:
            usual["sparsity"] = 0.5
        return prune(**(usual | changes))

    return run


def stop_after(stages: int) -> Callable[[Progress], None]:
    def progress(step: Progress) -> None:
        if step.done == stages:
            raise KeyboardInterrupt

    return progress


def leave_unfinished(job: Prune, stages: int = 2, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        job(progress=stop_after(stages), **changes)


def weights(folder: Path) -> Tree:
    """All files but the report."""
    return {n: c for n, c in tree_of(folder).items() if n != REPORT}


def refused(run: Callable[[], object], place: Path, kind: type[StreampruneError], *needles: str) -> str:
    """Expects a one-line error, and that nothing in a folder has changed."""
    before = {p: p.lstat().st_mtime_ns for p in sorted(place.rglob("*"))}
    message = refusals.refused(kind, run, *needles)
    after = {p: p.lstat().st_mtime_ns for p in sorted(place.rglob("*"))}
    assert {p: t for p, t in after.items() if not p.is_dir()} == {p: t for p, t in before.items() if not p.is_dir()}
    assert after.keys() == before.keys()
    return message


# ---- another job in the way


def _other_text(tmp_path: Path) -> dict[str, Any]:
    np.save(tmp_path / "other.npy", np.arange(400) % VOCAB)
    return {"calib": tmp_path / "other.npy"}


FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sparsity": ("sparsity is 0.5 there and 0.6 here", {"sparsity": 0.6}),
    "pattern": ("pattern is not set there and 2:4 here", {"pattern": "2:4"}),
    "seed": ("seed is 0 there and 7 here", {"seed": 7}),
    "samples": ("samples is 4 there and 5 here", {"samples": 5}),
    "seqlen": ("seqlen is 16 there and 8 here", {"seqlen": 8}),
    "score": ("score is lscore there and wanda here", {"score": "wanda"}),
    "method": ("score is lscore there and magnitude here", {"method": "magnitude"}),
    "selector": ("selector is ewma there and exact here", {"selector": "exact"}),
    "only": ("only is not set there and mlp here", {"only": "mlp"}),
    "skip": ("skip is not set there and q_proj here", {"skip": "q_proj"}),
    "propagate": ("propagate is dense there and pruned here", {"propagate": "pruned"}),
    "dtype": ("dtype is auto there and float32 here", {"dtype": "float32"}),
    "device": ("device is auto there and cpu here", {"device": "cpu"}),
}


@pytest.fixture(scope="module")
def trees(
    models: Callable[..., Path], tokens: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """A folder with an unfinished OUT, one with a finished OUT, and a copy of the model that they were made from."""
    base = tmp_path_factory.mktemp("trees")
    shutil.copytree(models("llama", 2), base / "model")
    for name in ("unfinished", "finished"):
        usual = {"model": base / "model", "out": base / name / "out", "calib": tokens, "samples": 4, "seqlen": 16}
        if name == "unfinished":
            with pytest.raises(KeyboardInterrupt):
                prune(sparsity=0.5, progress=stop_after(2), **usual)
        else:
            prune(sparsity=0.5, **usual)
    yield {name: base / name for name in ("unfinished", "finished", "model")}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_each_fixed_field_is_named(trees: dict[str, Path], tokens: Path, state: str, field: str) -> None:
    message, change = FIELDS[field]
    usual: dict[str, Any] = {"model": trees["model"], "calib": tokens, "samples": 4, "seqlen": 16, "sparsity": 0.5}
    if "pattern" in change:
        del usual["sparsity"]
    run = {**usual, **change, "out": trees[state] / "out"}
    words = "finished output of another job" if state == "finished" else "unfinished work of another job"
    refused(lambda: prune(**run), trees[state], StateError, message, words, "another OUT")


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_a_changed_text_is_named(trees: dict[str, Path], tmp_path: Path, state: str) -> None:
    run: dict[str, Any] = {"model": trees["model"], "samples": 4, "seqlen": 16, "sparsity": 0.5}
    refused(lambda: prune(out=trees[state] / "out", **run, **_other_text(tmp_path)), trees[state], StateError, "calib")


@pytest.mark.parametrize("state", ["unfinished", "finished"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_model_is_named(
    trees: dict[str, Path], tokens: Path, tmp_path: Path, state: str, file: str, job: Prune
) -> None:
    shutil.copytree(trees["model"], tmp_path / "model")  # not the same mtime
    if file == "model.safetensors":
        tensors = load_file(tmp_path / "model" / file)
        tensors["model.norm.weight"] += 1  # files that were only touched are the same model: test_folders.py
        save_file(tensors, tmp_path / "model" / file, metadata={"format": "pt"})
    else:
        shutil.copystat(trees["model"] / "model.safetensors", tmp_path / "model" / "model.safetensors")
        with (tmp_path / "model" / file).open("a") as f:
            f.write("\n")
    part = {"model.safetensors": "model shards", "config.json": "model config", "tokenizer.json": "model tokenizer"}
    message = refused(
        lambda: job(model=tmp_path / "model", out=trees[state] / "out"), trees[state], StateError, part[file]
    )
    assert message.count(" here") == 1


def test_prune_and_calibrate_do_not_mix(job: Prune, out: Path, models: Callable[..., Path], tokens: Path) -> None:
    leave_unfinished(job)
    run = {"model": models("llama", 2), "out": out, "calib": tokens, "samples": 4, "seqlen": 16}
    refused(lambda: calibrate(**run), out.parent, StateError, "verb is prune there and calibrate here")
    job()
    refused(lambda: calibrate(**run), out.parent, StateError, "not a statistics file")


# ---- resume and --restart


def test_resume_repeats_no_stage(job: Prune, out: Path) -> None:
    seen: list[str] = []
    leave_unfinished(job, 2)
    assert not out.exists()
    result = job(progress=lambda step: seen.append(step.name))
    assert (result.status, len(seen)) == ("done", 2)
    again = job(progress=lambda step: seen.append(step.name))
    assert (again.status, len(seen)) == ("up-to-date", 2)
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_resume_removes_what_a_crash_left(job: Prune, out: Path) -> None:
    """Removes an old cache and half-written files before the first stage is done."""
    leave_unfinished(job)
    folder = partial_of(out) / ".streamprune"
    for name in ("cache/0000.bin", "cache/0000.json", "cache/.0002.bin.tmp", ".statistics-0001.safetensors.tmp"):
        (folder / name).write_bytes(b"rubbish")
    (partial_of(out) / ".model-00003-of-00004.safetensors.tmp").write_bytes(b"rubbish")
    left: list[str] = []

    def look(step: Progress) -> None:
        if step.name == "layer 1":
            left.extend(p.name for p in partial_of(out).rglob("*") if p.is_file() and p.read_bytes() == b"rubbish")
            left.extend(p.name for p in (folder / "cache").iterdir())

    job(progress=look)
    assert not left


def test_restart_throws_unfinished_work_away(job: Prune, out: Path) -> None:
    leave_unfinished(job, sparsity=0.6)
    seen: list[str] = []
    assert job(restart=True, progress=lambda step: seen.append(step.name)).status == "done"
    assert len(seen) == 4
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_restart_never_touches_a_finished_output(job: Prune, out: Path) -> None:
    job()
    refused(lambda: job(restart=True, sparsity=0.6), out.parent, StateError, "finished output")
    before = tree_of(out)
    assert job(restart=True).status == "up-to-date"
    assert tree_of(out) == before


def complete_but_for_the_name(job: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(durable, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            job()


def test_only_the_rename_is_missing(job: Prune, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete_but_for_the_name(job, monkeypatch)
    assert not out.exists()
    refused(lambda: job(sparsity=0.6), out.parent, StateError, "sparsity is 0.5 there and 0.6 here")
    seen: list[str] = []
    assert job(progress=lambda step: seen.append(step.name)).status == "done"
    assert not seen
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_complete_partial_that_lost_a_file_is_not_published(
    job: Prune, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete_but_for_the_name(job, monkeypatch)
    shard = next(partial_of(out).glob("*.safetensors"))
    shard.unlink()
    refused(job, out.parent, CorruptStateError, shard.name)
    assert not out.exists()


def test_restart_does_not_delete_a_finished_output_that_is_called_partial(job: Prune, out: Path) -> None:
    other = partial_of(out)
    job(out=other)
    refused(lambda: job(restart=True, sparsity=0.6), out.parent, StateError, str(other))


def test_restart_does_not_delete_the_model(job: Prune, out: Path) -> None:
    model = partial_of(out)
    job(out=model)
    shutil.copy(next(p for p in model.glob("*.safetensors")), out.parent / "kept")
    before = tree_of(model)
    with pytest.raises((StateError, UsageError)):
        job(model=model, restart=True)
    assert tree_of(model) == before


def test_restart_mends_a_damaged_report_of_an_unfinished_output(job: Prune, out: Path) -> None:
    leave_unfinished(job)
    (partial_of(out) / REPORT).write_text("{")
    refused(job, out.parent, CorruptStateError, "--restart")
    assert job(restart=True).status == "done"


def test_a_damaged_report_of_a_finished_output(job: Prune, out: Path) -> None:
    job()
    (out / REPORT).write_text("{")
    message = refused(job, out.parent, CorruptStateError, str(out / REPORT))
    assert "--restart" not in message, "which would not help: it never touches a finished output"


@pytest.mark.parametrize("harm", ["delete", "truncate"])
def test_up_to_date_means_that_files_are_there(job: Prune, out: Path, harm: str) -> None:
    job()
    [shard] = out.glob("*.safetensors")
    if harm == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    refused(job, out.parent, CorruptStateError, shard.name, f"remove {out}")


@pytest.mark.parametrize("harm", ["delete", "truncate"])
def test_a_shard_of_unfinished_work_is_gone(job: Prune, out: Path, harm: str) -> None:
    job()
    whole = weights(out)
    shutil.rmtree(out)
    leave_unfinished(job)
    [shard] = partial_of(out).glob("*.safetensors")
    if harm == "delete":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptStateError, match=rf"{shard.name}.*--restart"):
        job()
    assert job(restart=True).status == "done"
    assert weights(out) == whole


@pytest.mark.parametrize("name", ["tokens.npy", "job.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100])
def test_damaged_state_files(job: Prune, out: Path, name: str, content: bytes) -> None:
    leave_unfinished(job)
    (partial_of(out) / ".streamprune" / name).write_bytes(content)
    refused(job, out.parent, CorruptStateError, name, "--restart")
    assert job(restart=True).status == "done"
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_unknown_version_of_job_json(job: Prune, out: Path) -> None:
    leave_unfinished(job)
    path = partial_of(out) / ".streamprune" / "job.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 99'))
    refused(job, out.parent, CorruptStateError, "99", "--restart")
    assert job(restart=True).status == "done"


def test_lost_statistics_do_not_cost_the_other_work(job: Prune, out: Path, tmp_path: Path) -> None:
    save = tmp_path / "stats.safetensors"
    leave_unfinished(job, 3, save_stats=save)
    folder = partial_of(out) / ".streamprune"
    (folder / "statistics-0000.safetensors").unlink()
    with pytest.raises(CorruptStateError, match=r"statistics-0000.*--restart"):
        job(save_stats=save)
    assert (folder / "job.json").is_file(), "unfinished work is kept"
    assert not save.exists()


def test_missing_job_json_is_not_ours_to_judge(job: Prune, out: Path) -> None:
    leave_unfinished(job)
    (partial_of(out) / ".streamprune" / "job.json").unlink()
    refused(job, out.parent, StateError, str(partial_of(out)))
    refused(lambda: job(restart=True), out.parent, StateError, str(partial_of(out)))


# ---- what is not ours


def _file(path: Path) -> None:
    path.write_text("mine")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def _link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    (path.parent / "elsewhere" / "mine.txt").write_text("mine")
    path.symlink_to(path.parent / "elsewhere")


def _link_to_file(path: Path) -> None:
    (path.parent / "elsewhere").write_text("mine")
    path.symlink_to(path.parent / "elsewhere")


def _empty_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def _dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


FOREIGN = [_file, _folder, _link, _link_to_file, _empty_link, _dangling]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("make", FOREIGN)
def test_a_foreign_output_is_left_alone(job: Prune, out: Path, make: Callable[[Path], None], restart: bool) -> None:
    make(out)
    refused(lambda: job(restart=restart), out.parent, StateError, str(out))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("make", FOREIGN)
def test_foreign_partial_is_left_alone(job: Prune, out: Path, make: Callable[[Path], None], restart: bool) -> None:
    make(partial_of(out))
    refused(lambda: job(restart=restart), out.parent, StateError, str(partial_of(out)))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("make", [*FOREIGN, lambda path: path.mkdir()])
def test_calibrate_leaves_a_foreign_file_alone(
    models: Callable[..., Path], tokens: Path, out: Path, make: Callable[[Path], None], restart: bool
) -> None:
    make(out)
    run = {"model": models("llama", 2), "calib": tokens, "samples": 4, "seqlen": 16, "restart": restart}
    refused(lambda: calibrate(out=out, **run), out.parent, StateError, str(out))


def test_foreign_hidden_folder_in_partial(job: Prune, out: Path) -> None:
    folder = partial_of(out) / ".streamprune"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    refused(lambda: job(restart=True), out.parent, StateError, str(partial_of(out)))


def test_leftovers_of_a_job_that_died_at_birth(job: Prune, out: Path) -> None:
    for names in ([], [".streamprune"], [".streamprune/cache"], [".streamprune/.job.json.tmp"]):
        partial_of(out).mkdir()
        for name in names:
            if name.endswith(".tmp"):
                (partial_of(out) / ".streamprune").mkdir()
                (partial_of(out) / name).write_text("{")
            else:
                (partial_of(out) / name).mkdir(parents=True)
        assert job().status == "done"
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)


def test_an_empty_folder_is_accepted(job: Prune, out: Path) -> None:
    out.mkdir()
    assert job().status == "done"
    assert (out / REPORT).is_file()


def test_folders_on_the_way_are_made(job: Prune, out: Path) -> None:
    deep = out / "not" / "there" / "yet"
    assert job(out=deep).status == "done"
    assert (deep / REPORT).is_file()


# ---- places


@pytest.mark.parametrize("where", [".", "inside", "deep/inside"])
def test_out_within_model(job: Prune, tmp_path: Path, models: Callable[..., Path], where: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("llama", 2), model)
    refused(lambda: job(model=model, out=model / where), model, UsageError, "lies within MODEL")
    (tmp_path / "alias").symlink_to(model)
    refused(lambda: job(model=model, out=tmp_path / "alias" / where), model, UsageError, "lies within MODEL")
    refused(lambda: job(model=model, work=model / where), model, UsageError, "--work")
    refused(lambda: job(model=model, save_stats=model / where / "s"), model, UsageError, "--save-stats")


@pytest.mark.parametrize("place", [".", "inside", "out.partial/inside"])
def test_model_within_out(job: Prune, tmp_path: Path, models: Callable[..., Path], place: str) -> None:
    folder = tmp_path / "place" / ("out" if "partial" not in place else "") / place
    shutil.copytree(models("llama", 2), folder)
    needles = "lies within MODEL" if place == "." else "lies within OUT"
    refused(lambda: job(model=folder, out=tmp_path / "place" / "out"), folder, UsageError, needles)


def test_out_that_cannot_be_looked_at(job: Prune, tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for out in (tmp_path / ("n" * 300), tmp_path / "circle"):
        refused(lambda out=out: job(out=out), tmp_path, UsageError, "another OUT")


def test_out_that_is_a_mount_point(job: Prune, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    refused(job, tmp_path, UsageError, "mount point")


@pytest.mark.parametrize("name", ["", ".", "..", "/", "../.."])
def test_out_without_a_name(job: Prune, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: job(out=name), tmp_path, UsageError, "OUT")


@pytest.mark.parametrize("flag", ["work", "save_stats"])
@pytest.mark.parametrize("name", ["out", "out.partial", "out.partial/.streamprune", "out/inside"])
def test_work_and_statistics_keep_out_of_out(job: Prune, out: Path, flag: str, name: str) -> None:
    refused(lambda: job(**{flag: out.parent / name}), out.parent, UsageError, flag.replace("_", "-"))


def test_statistics_do_not_replace_the_calibration_text(job: Prune, tokens: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(tokens, tmp_path / "text.npy"))
    refused(lambda: job(calib=copy, save_stats=copy), tmp_path, UsageError, "--save-stats")


def test_relative_names_mean_the_same_from_another_folder(
    job: Prune, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state must not record --work relative to the working directory of the first run."""
    job()
    whole = weights(out)
    shutil.rmtree(out)
    monkeypatch.chdir(out.parent)
    leave_unfinished(job, out="out")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert job(out=out).status == "done"
    assert not list((tmp_path / "other").iterdir())
    assert weights(out) == whole


def test_unfinished_work_can_be_moved(job: Prune, out: Path) -> None:
    leave_unfinished(job)
    moved = out.parent.with_name("moved")
    out.parent.rename(moved)
    seen: list[str] = []
    assert job(out=moved / "out", progress=lambda step: seen.append(step.name)).status == "done"
    assert len(seen) == 2
    assert not out.parent.exists()


# ---- --work


def test_work_is_remembered(job: Prune, out: Path, tmp_path: Path) -> None:
    leave_unfinished(job, work=tmp_path / "a")
    assert len(list((tmp_path / "a").iterdir())) == 1
    refused(lambda: job(work=tmp_path / "b"), out.parent, StateError, str(tmp_path / "a"), "--work")
    assert job().status == "done"
    assert not list((tmp_path / "a").iterdir())


def test_work_that_comes_later_is_refused_with_advice_that_works(job: Prune, out: Path, tmp_path: Path) -> None:
    leave_unfinished(job)
    message = refused(lambda: job(work=tmp_path / "b"), out.parent, StateError, "--work", "--restart")
    assert "pass --work with that" not in message, "the state's own folder is no --work"
    assert job(work=tmp_path / "b", restart=True).status == "done"


def test_work_that_vanished(job: Prune, out: Path, tmp_path: Path) -> None:
    leave_unfinished(job, work=tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(CorruptStateError, match="--restart"):
        job(work=tmp_path / "a")
    assert job(work=tmp_path / "a", restart=True).status == "done"


def test_two_jobs_share_a_work_folder(job: Prune, out: Path, tmp_path: Path) -> None:
    other = out.with_name("other") / "out"
    leave_unfinished(job, work=tmp_path / "a")
    leave_unfinished(job, work=tmp_path / "a", out=other)
    assert len(list((tmp_path / "a").iterdir())) == 2
    assert job(restart=True, work=tmp_path / "a").status == "done"
    assert job(out=other).status == "done"
    assert weights(out) == weights(other)


def test_evaluation_clears_up_only_its_own(tmp_path: Path) -> None:
    mine = {"eval-results/a.txt", "eval-results.lock", "notes.txt"}
    (tmp_path / "eval-results").mkdir()
    for name in mine:
        (tmp_path / name).write_text("mine")
    dead = tmp_path / "eval-123-17ab"
    dead.mkdir()
    (dead / "0000.bin").write_bytes(b"x")
    dead.with_name(dead.name + ".lock").write_text("123\n")
    with _scratch(tmp_path) as folder, _scratch(tmp_path) as second:
        assert folder.is_dir() and second.is_dir() and folder != second
        assert not dead.exists()
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == mine


# ---- disk and modes


def test_too_little_disk_is_noticed_before_anything_is_written(
    job: Prune, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 << 20))
        refused(job, out.parent, ResourceError, "10 MiB free", "--work")
    assert job().status == "done"


def test_too_little_disk_keeps_unfinished_work(job: Prune, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unfinished(job)
    usage = shutil.disk_usage(out.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10 << 20))
        refused(job, out.parent, ResourceError, "10 MiB free")
    assert job().status == "done"


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask(job: Prune, out: Path, tmp_path: Path, models: Callable[..., Path], mask: int) -> None:
    model = tmp_path / "model"
    shutil.copytree(models("llama", 2), model)
    (model / "sub" / "deeper").mkdir(parents=True)
    (model / "sub" / "deeper" / "extra.py").write_text("x = 1\n")
    (model / "LICENSE").write_text("free")
    (model / "LICENSE").chmod(0o400)
    before = os.umask(mask)
    try:
        job(model=model, save_stats=tmp_path / "stats.safetensors")
    finally:
        os.umask(before)
    assert (out / "sub" / "deeper" / "extra.py").read_text() == "x = 1\n"
    for path in (out, *out.rglob("*"), tmp_path / "stats.safetensors"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_restored_trees_resume(job: Prune, out: Path) -> None:
    """A job can be resumed in a copy of the whole folder, such as a backup."""
    leave_unfinished(job)
    tree = tree_of(out.parent)
    restore(out.parent, tree)
    assert job().status == "done"


def test_a_lock_file_that_was_left_is_no_obstacle(job: Prune, out: Path) -> None:
    lock_of(out).write_text("99999\n")
    assert job().status == "done"
    assert not lock_of(out).exists()
