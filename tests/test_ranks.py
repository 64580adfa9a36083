"""Two ranks: the same bytes as one, and an end for both when one of them fails. More ranks: test_more_ranks.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from rank_jobs import GIVEN, REFITTED, Job, Run, do, files, report, told

from streamprune.disk.state import partial_of
from streamprune.process.ranks import Ranks
from streamprune.process.share import Share
from streamprune.process.torchrun import started_together

Models = Callable[..., Path]

PRUNED: dict[str, dict[str, Any]] = {
    "saved": {"pattern": "2:4", "propagate": "pruned"},
    "refitted": REFITTED,
    "dealt": {"pattern": "2:4", "shard_size": 40_000},
    "tuned": {"pattern": "2:4", "tune": "block", "tune_epochs": 2, "replace_tokens": 0.3},
    "allocated": {"sparsity": 0.5, "allocate": "error"},
    "experts": {"sparsity": 0.5, "method": "obs-admm", "expert_tokens": 16, "tune": "block", "tune_epochs": 1},
}


@pytest.fixture(scope="module")
def folder(models: Models, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs NAME-N of N ranks, and what each rank told of its jobs."""
    root, model = tmp_path_factory.mktemp("ranks"), models("llama", 2)
    of = dict.fromkeys(PRUNED, model) | {"experts": models("mixtral", 2)}
    given = GIVEN | {"calib": str(text)}
    (other := root / "other.txt").write_text(text.read_text()[::-1])
    (short := root / "short.txt").write_text(text.read_text()[:4000])
    elsewhere = shutil.copytree(model, root / "elsewhere" / "model")
    there = {"1": [str(elsewhere), str(root / "elsewhere" / "out")]}

    def pruning(out: str, *, of: Path = model, amount: dict[str, Any] = REFITTED, **more: Any) -> Job:
        drawn = {"device": "cpu"} if "stats" in amount else given
        return Job("prune", of, root / out, given=drawn | amount, **more)

    def jobs(size: int) -> list[Job]:
        keeps = {
            "saved": {"save_stats": str(root / f"statistics-{size}")},
            "dealt": {"stats": str(root / "statistics-1")},
        }
        found = [pruning(f"{name}-{size}", of=of[name], amount=a | keeps.get(name, {})) for name, a in PRUNED.items()]
        against = {"reference": str(model), "seqlen": 16, "device": "cpu", "windows": 22}
        return [*found, Job("evaluate", root / "saved-1", text, given=against)]

    shared_out = [
        pruning("unshared-allocated", amount=PRUNED["allocated"], places=there),
        pruning("pondered", amount=PRUNED["allocated"], wrong={"0": "ponder"}, timeout=4),
    ]
    wrong = [
        pruning("other", other={"1": {"calib": str(other)}}),
        pruning("few", amount=REFITTED | {"samples": 2}),
        pruning("full", wrong={"1": "full"}),
        pruning("short", wrong={"0": "memory"}, timeout=20),
        pruning("exchange", wrong={"1": "exchange"}),
        pruning("interrupted", wrong={"1": "interrupt"}),
        pruning("full elsewhere", wrong={"1": "disk"}, places={"1": [str(elsewhere), str(root / "apart" / "out")]}),
        pruning("tuned on one rank", other={"1": {"tune": "block", "tune_epochs": 1}}),
        Job("evaluate", model, short, given={"seqlen": 16, "device": "cpu"}, other={"1": {"dtype": "float32"}}),
        pruning("slow", wrong={"1": "sleep"}, timeout=4),
        pruning("stopped", wrong={"1": "kill"}),
    ]
    going_on = [pruning("stopped"), pruning("resumed"), pruning("saved-1", amount=PRUNED["saved"] | {
        "save_stats": str(root / "statistics-1")})]  # fmt: skip
    copies = {partial_of(root / "stopped"): partial_of(root / "alone")}
    do(root, [
        Run("one", 1, [*jobs(1), pruning("resumed", wrong={"0": "stop"})]),
        Run("two", 2, [*jobs(2), pruning("unshared", places=there), *shared_out, *wrong]),
        Run("again", 2, going_on, copies),
        Run("after", 1, [pruning("alone")]),
    ])  # fmt: skip
    return root


def test_the_same_statistics(folder: Path) -> None:
    assert (folder / "statistics-2").read_bytes() == (folder / "statistics-1").read_bytes()


@pytest.mark.parametrize("name", PRUNED)
def test_the_same_checkpoint(folder: Path, name: str) -> None:
    """And the same figures about its linears, on all ranks."""
    assert files(folder / f"{name}-2") == files(folder / f"{name}-1")
    one = report(folder / f"{name}-1")
    for found in told(folder, "two", f"{name}-2"):
        assert found["report"]["linears"] == one["linears"] and found["report"]["resolved"] == one["resolved"]


def test_the_same_evaluation(folder: Path, text: Path) -> None:
    (one,) = told(folder, "one", text.name)
    for found in told(folder, "two", text.name):
        for name in ("perplexity", "reference_perplexity", "kl", "kl_stderr", "top1_agreement", "tokens", "windows"):
            assert found["report"][name] == one["report"][name]
        assert found["report"]["window_nll"] == one["report"]["window_nll"]


@pytest.mark.parametrize("out", ["stopped", "resumed", "alone"])
def test_any_number_of_ranks_resumes(folder: Path, out: str) -> None:
    """What two ranks began, of which one was killed; what one began; what two began, by one."""
    assert files(folder / out) == files(folder / "refitted-1")
    assert not partial_of(folder / out).exists()


def test_machines_that_share_no_folder(folder: Path) -> None:
    """Rank 1 has a copy of the model, and is sent the pruned layers; nothing stays there."""
    assert files(folder / "unshared") == files(folder / "refitted-1")
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["model"]
    ranks = report(folder / "unshared")["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1] and sum(rank["windows"] for rank in ranks) == GIVEN["samples"]


@pytest.mark.parametrize("out", ["unshared-allocated", "pondered"])
def test_a_sparsity_that_is_shared_out(folder: Path, out: str) -> None:
    """Rank 1 does not see the statistics that rank 0 does so by; it waits for longer than any message may take."""
    assert files(folder / out) == files(folder / "allocated-1")
    assert [path.name for path in (folder / "elsewhere").iterdir()] == ["model"]


def test_shards_that_are_dealt_out(folder: Path) -> None:
    """From a statistics file, each rank writes whole shards, and rank 0 the journal."""
    wrote = [rank["stages"] for rank in report(folder / "dealt-2")["ranks"]]
    assert sum(wrote) == 4 and min(wrote) > 0 and len(list((folder / "dealt-2").glob("*.safetensors"))) > 1


def test_tuned_layers(folder: Path) -> None:
    """Layers were tuned, and came out better."""
    one, two = (report(folder / f"tuned-{size}") for size in (1, 2))
    for alone, shared in zip(one["stages"], two["stages"], strict=True):
        found = {key: value for key, value in shared.get("tune", {}).items() if key != "seconds"}
        assert found == {key: value for key, value in alone.get("tune", {}).items() if key != "seconds"}
    assert sum(stage["tune"]["held_out_error"] < stage["tune"]["held_out_error_before"]
               for stage in one["stages"] if "tune" in stage) == 2  # fmt: skip


def test_a_finished_job_is_known(folder: Path) -> None:
    assert all("report" in found for found in told(folder, "again", "saved-1"))


def test_a_rank_that_is_killed(folder: Path) -> None:
    """The other one says so."""
    (first,) = told(folder, "two", "stopped")
    assert first["code"] == 5 and "has died or cannot be reached; run the same command" in first["message"]


def test_a_rank_that_sleeps(folder: Path) -> None:
    found = told(folder, "two", "slow")
    assert [each["code"] for each in found] == [5, 5]
    assert sorted(each["error"] for each in found) == ["ElsewhereError", "ResourceError"]
    assert any("did not answer in time" in each["message"] for each in found)


def test_a_rank_that_fails_says_why(folder: Path) -> None:
    found = told(folder, "two", "full")
    assert [each["error"] for each in found] == ["ElsewhereError", "ResourceError"]
    assert [each["code"] for each in found] == [5, 5] and found[1]["message"] == "no space left"


def test_a_rank_that_runs_out_of_memory(folder: Path) -> None:
    """It does not repeat what it exchanges with others, and nobody's work is thrown away."""
    found = told(folder, "two", "short")
    assert [each["error"] for each in found] == ["ResourceError", "ElsewhereError"]
    assert found[0]["message"].startswith("cpu ran out of memory: ") and found[1]["code"] == 5
    assert partial_of(folder / "short").is_dir()


def test_a_rank_that_runs_out_of_memory_while_it_sends(folder: Path) -> None:
    """It is not taken for one whose connection broke."""
    found = told(folder, "two", "exchange")
    assert [each["error"] for each in found] == ["ElsewhereError", "ResourceError"]
    assert found[1]["message"].startswith("rank 1 ran out of memory while it exchanged") and found[0]["code"] == 5


def test_a_rank_that_is_interrupted_while_it_sends(folder: Path) -> None:
    """The other one ends with the same exit code."""
    found = told(folder, "two", "interrupted")
    assert [each["error"] for each in found] == ["ElsewhereError", "KeyboardInterrupt"] and found[0]["code"] == 130


def test_a_disk_that_is_full_where_a_layer_is_sent_to(folder: Path) -> None:
    found = told(folder, "two", "full elsewhere")
    assert [each["error"] for each in found] == ["ElsewhereError", "ResourceError"] and found[0]["code"] == 5
    assert found[1]["message"].startswith("no space left while writing ")
    assert str(folder / "apart") in found[1]["message"]


@pytest.mark.parametrize(("out", "setting"), [("tuned on one rank", "tune"), ("short.txt", "dtype")])
def test_a_rank_with_another_setting(folder: Path, out: str, setting: str) -> None:
    found = told(folder, "two", out)
    assert [each["error"] for each in found] == ["ElsewhereError", "UsageError"]
    assert found[1]["message"].startswith(f"rank 1 is given another job than rank 0: {setting} is ")


def test_a_rank_with_another_text(folder: Path) -> None:
    found = told(folder, "two", "other")
    assert [each["error"] for each in found] == ["ElsewhereError", "UsageError"]
    assert found[1]["message"].startswith("rank 1 is given another job than rank 0: calib is ")
    assert [each["code"] for each in found] == [2, 2] and not partial_of(folder / "other").exists()


def test_too_few_batches(folder: Path) -> None:
    found = told(folder, "two", "few")
    assert [each["code"] for each in found] == [2, 2]
    assert any("2 windows are 1 batches, too few for 2 ranks" in each["message"] for each in found)


def test_what_makes_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that exports WORLD_SIZE alone makes none; what torchrun sets does."""
    found = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name in found:
        monkeypatch.delenv(name, raising=False)
    for name, value in found.items():
        assert not started_together()
        monkeypatch.setenv(name, value)
    assert started_together()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not started_together()


class _Rank(Ranks):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("windows", "batch", "group"), [(22, 4, 1), (20, 4, 2), (5, 1, 1), (17, 2, 3)])
def test_each_batch_has_one_rank(windows: int, batch: int, group: int, size: int) -> None:
    shares = [Share(_Rank(rank, size), windows, batch, group) for rank in range(size)]
    numbers = [list(share.numbers()) for share in shares]
    assert sorted(chain(*numbers)) == list(range(-(-windows // batch)))
    for share, own in zip(shares, numbers, strict=True):
        assert [share.number(i) for i in range(len(share))] == own
    assert sum(shares[0].size(n) for n in range(shares[0].batches)) == windows
    if group == 1:
        rounds = max(map(len, numbers))
        assert shares[0].last_round == sum(len(own) == rounds for own in numbers)
