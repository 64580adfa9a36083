"""Caches without a home: where one can write, the user's alone, and never in the working directory."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest
from refusals import refused

from streamprune.disk.places import cache_folder, settle_hub_caches
from streamprune.errors import ResourceError
from streamprune.kernels import jit

Models = Callable[..., Path]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither a home nor a cache of the user's: only a temporary folder."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tmp"


def test_the_users_own_goes_first(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("kernels") == tmp_path / "home" / ".cache" / "streamprune" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "streamprune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert cache_folder() == tmp_path / "home" / ".cache" / "streamprune"


@pytest.mark.parametrize("home", ["/proc/none", "", None, "relative", "~"])
def test_without_a_home(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if home is None:
        monkeypatch.setattr(Path, "home", unknown)
    else:
        monkeypatch.setenv("HOME", home)
        if home == "":
            monkeypatch.setattr(Path, "home", lambda: Path())
    private = bare / f"streamprune-{os.getuid()}"
    assert cache_folder("kernels") == private / "kernels"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert [p.name for p in tmp_path.iterdir()] == ["tmp"]


def test_a_home_that_belongs_to_another_user(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME is still root's, as under `docker run --user` and `sudo -u`: this user may not even look into it."""
    home, look = tmp_path / "home", os.stat
    home.mkdir()

    def stat_outside(path: str | Path, **how: Any) -> os.stat_result:
        if home in Path(str(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **how)

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "stat", stat_outside)
    monkeypatch.setattr(os, "access", lambda path, mode: home not in (Path(path), *Path(path).parents))
    private = bare / f"streamprune-{os.getuid()}"
    assert cache_folder("kernels") == private / "kernels"
    found: dict[str, str] = {}
    settle_hub_caches(found)
    assert found == {"HF_HOME": str(private / "huggingface")}


def test_nothing_can_be_written(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file system is read-only."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    refused(ResourceError, cache_folder, "no temporary one", "XDG_CACHE_HOME")


def test_a_folder_that_others_can_write_is_left_alone(bare: Path) -> None:
    private = bare / f"streamprune-{os.getuid()}"
    private.mkdir()
    private.chmod(0o777)
    refused(ResourceError, cache_folder, "XDG_CACHE_HOME", str(private))
    assert list(private.iterdir()) == []
    private.rmdir()
    (bare / "elsewhere").mkdir(0o700)
    private.symlink_to(bare / "elsewhere")
    refused(ResourceError, cache_folder, str(private))


def test_the_hubs_caches(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = bare / f"streamprune-{os.getuid()}"
    found: dict[str, str] = {}
    settle_hub_caches(found)
    assert found == {"HF_HOME": str(private / "huggingface")}
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ({}, {"HF_HOME": str(tmp_path / "mine")}):
        found = dict(given)
        settle_hub_caches(found)
        assert found == given
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: "huggingface" not in str(path))
    found = {}
    settle_hub_caches(found)  # models are there to be read, but code cannot be put there
    assert found == {"HF_MODULES_CACHE": str(tmp_path / ".cache" / "streamprune" / "modules")}


def test_compiled_kernels(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package cannot be written, as one that another user has installed."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    jit._choose_cache.cache_clear()
    jit._choose_cache()
    assert numba.config.CACHE_DIR == ""
    own = Path(jit.__file__).parent
    monkeypatch.setattr(os, "access", lambda path, mode: own not in (Path(path), *Path(path).parents))
    jit._choose_cache.cache_clear()
    jit._choose_cache()
    assert Path(numba.config.CACHE_DIR) == bare / f"streamprune-{os.getuid()}" / "kernels"


def test_eval_in_a_bare_environment(models: Models, text: Path, tmp_path: Path) -> None:
    """As in a container or a cron job; and stderr is closed, as some of these have it."""
    temporary, here = tmp_path / "tmp", tmp_path / "here"
    temporary.mkdir()
    here.mkdir()
    done = subprocess.run(
        [f"exec {sys.executable} -m streamprune eval {models()} --text {text} --seqlen 32 --json 2>&-"],
        shell=True, cwd=here, stdout=subprocess.PIPE, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": "/proc/none", "TMPDIR": str(temporary),
             "PYTHONPATH": str(Path(jit.__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("{"), done.stdout
    assert not list(here.iterdir()) and (temporary / f"streamprune-{os.getuid()}").is_dir()
