"""Two machines, as network namespaces: each with an address of its own, and folders that the other does not see."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rank_jobs import environment, files, report

Models = Callable[..., Path]

pytestmark = pytest.mark.slow

JOBS = {
    "refitted": ["--sparsity", "0.6", "--method", "obs-admm"],
    "tuned": ["--pattern", "2:4", "--tune", "block", "--tune-epochs", "1"],
}


@dataclass(frozen=True)
class Machine:
    """A network namespace, whose processes see `folder` and not `hidden`, that of the other machine."""

    name: str
    link: str
    address: str
    folder: Path
    hidden: Path

    def start(self, *words: object) -> subprocess.Popen[str]:
        """A program on this machine; what it leaves in the other's folder, as seen from here, is listed in `left`."""
        hide = 'mount -t tmpfs none "$HIDDEN" && "$@"; code=$?; find "$HIDDEN" -mindepth 1 > "$LEFT"; exit $code'
        told = {"GLOO_SOCKET_IFNAME": self.link, "HIDDEN": str(self.hidden), "LEFT": str(self.folder / "left")}
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, "sh", "-c", hide, "sh", *map(str, words)],
            env=environment() | told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two, with a cable between them. Skips where they cannot be made."""
    own = os.getpid()
    folders = [tmp_path / "first", tmp_path / "second"]
    made = [
        Machine(f"machine-{own}-{i}", f"m{own % 10**8}{'ab'[i]}", f"10.213.7.{i + 1}", folders[i], folders[1 - i])
        for i in range(2)
    ]
    for folder in folders:
        folder.mkdir()
    try:
        for machine in made:
            _ip("netns", "add", machine.name)
        first, second = made
        _ip("link", "add", first.link, "netns", first.name, "type", "veth",
            "peer", "name", second.link, "netns", second.name)  # fmt: skip
        for machine in made:
            _ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.link)
            for link in (machine.link, "lo"):
                _ip("-n", machine.name, "link", "set", link, "up")
        yield made
    finally:
        for machine in made:
            if shutil.which("ip"):
                subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    if not shutil.which("ip"):
        pytest.skip("there is no program `ip` to make network namespaces with")
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no network namespaces on this machine: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.mark.parametrize("name", JOBS)
def test_machines_without_a_shared_folder(machines: list[Machine], models: Models, text: Path, name: str) -> None:
    """The output is on the first machine, and is that of a single process; the second one is left as it was."""
    given = [*JOBS[name], "--samples", "160", "--seqlen", "64", "--device", "cpu", "--json"]
    running = []
    for number, machine in enumerate(machines):
        model = shutil.copytree(models("llama", 2), machine.folder / "model")
        words = shutil.copy(text, machine.folder / "text.txt")
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", number,
                    "--master-addr", machines[0].address, "--master-port", "29500"]  # fmt: skip
        job = ["-m", "streamprune", "prune", model, machine.folder / "out", "--calib", words, *given]
        running.append(machine.start(sys.executable, *torchrun, *job))
    told = [run.communicate(timeout=600) for run in running]
    assert [run.returncode for run in running] == [0, 0], [errors[-2000:] for _, errors in told]
    assert json.loads(told[0][0])["status"] == "done" and told[1][0] == ""
    first, second = machines
    one = ["-m", "streamprune", "prune", first.folder / "model", first.folder / "one", "--calib", text, *given]
    subprocess.run([sys.executable, *map(str, one)], env=environment(), capture_output=True, check=True)
    assert files(first.folder / "out") == files(first.folder / "one")
    assert [bool(rank["windows"]) for rank in report(first.folder / "out")["ranks"]] == [True, True]
    assert sorted(path.name for path in second.folder.iterdir()) == ["left", "model", "text.txt"]
    assert [(machine.folder / "left").read_text() for machine in machines] == ["", ""]
