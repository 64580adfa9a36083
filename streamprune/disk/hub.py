"""MODEL as the user names it: a folder, or a model on the Hugging Face hub, fetched into the hub's own cache.

Of a hub model, only safetensors weights and side files are fetched. HF_HUB_OFFLINE=1 uses the cache alone.
huggingface_hub is imported only when a hub name is resolved.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from streamprune.disk.folder import WEIGHT_PATTERNS
from streamprune.disk.header import show
from streamprune.errors import CheckpointError, HubError, ResourceError, StateError, UsageError

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)
OTHER_WEIGHTS = [p for p in WEIGHT_PATTERNS if "safetensors" not in p] + ["original/*", "onnx/*"]


def resolve_model(name: str | Path, *, revision: str | None = None, quiet: bool = False) -> Path:
    """The folder of the model that `name` means.

    An existing folder takes precedence. Otherwise `model` and `org/model` are hub names, but not a Path object, or a
    string that begins with `/`, `.` or `~`, has more than one slash, or whose first part is an existing folder.
    `revision` is a branch, tag or commit of a hub model. `quiet` hides the progress bars of a download.

    Raises:
        UsageError: `revision` is given for a folder.
        CheckpointError: there is no such folder, and the hub has no such model or revision, or does not let this user
            read it, or HF_HUB_OFFLINE is set and its cache lacks the model.
        HubError: the hub cannot be reached, and its cache lacks the model.
        ResourceError: the disk is full.
        StateError: the hub's cache cannot be written.
    """
    path = as_folder(name)
    if path is None:
        return _download(str(name), revision, quiet)
    if revision is not None:
        raise UsageError(f"--revision belongs to a hub model, but {path} is a folder; leave it out")
    return path


def as_folder(name: str | Path) -> Path | None:
    """The folder that `name` means; None for a name on the hub. Raises CheckpointError if it can be neither."""
    text = str(name)
    path = Path(text)
    with contextlib.suppress(RuntimeError):  # the home of an unknown user
        path = path.expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{show(path)}: cannot be read: {error.strerror}") from None
    if is_folder:
        return path
    if exists:
        raise CheckpointError(f"{path} is not a folder; pass the folder that holds the checkpoint")
    if isinstance(name, Path) or not _HUB_NAME.fullmatch(text):
        raise CheckpointError(f"no such folder: {path}; pass a folder with safetensors or a hub name")
    if len(path.parts) > 1 and Path(path.parts[0]).is_dir():
        raise CheckpointError(
            f"no such folder: {path}; the folder {path.parts[0]} exists, so this is no hub name; "
            "mend the name, or run from another folder"
        )
    return None


def is_offline() -> bool:
    """Whether the environment forbids connections to the hub, in the way that huggingface_hub reads it."""
    told = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return told.upper() in ("1", "ON", "YES", "TRUE")


def is_hub_name(name: str) -> bool:
    """Whether `name` can be that of a model on the hub: `model` or `org/model`."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_name(folder: Path) -> tuple[str, str] | None:
    """The name on the hub and the commit of a folder in the hub's cache; None for any other folder."""
    place = folder.resolve()
    kind, _, name = place.parent.parent.name.partition("--")
    if place.parent.name != "snapshots" or kind != "models" or not _HUB_NAME.fullmatch(name.replace("--", "/")):
        return None
    return name.replace("--", "/"), place.name


def _download(name: str, revision: str | None, quiet: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide, offline, unreachable = quiet and not are_progress_bars_disabled(), bool(constants.HF_HUB_OFFLINE), False
    if hide:
        disable_progress_bars()
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=OTHER_WEIGHTS))
    except HFValidationError:
        why = "neither a folder nor a name that the hub allows; pass a folder with safetensors weights"
    except (OSError, HTTPError, RuntimeError) as error:  # RuntimeError: its own download client
        where, code = constants.HF_HUB_CACHE, error.errno if isinstance(error, OSError) else None
        if code == errno.ENOSPC:
            raise ResourceError(f"{name}: the disk of {where} is full; make room, or set HF_HUB_CACHE") from None
        if code in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = f"the hub's cache {where} cannot be written; set HF_HUB_CACHE to a folder that can"
            raise StateError(f"{name}: {why}") from None
        why = _explain(error, offline)
        unreachable = not (offline or is_refused(error))
    finally:
        if hide:
            enable_progress_bars()
    at = f" at revision {show(revision)}" if revision else ""
    raise (HubError if unreachable else CheckpointError)(f"{show(name)}{at}: {why}")


def is_refused(error: Exception) -> bool:
    """Whether the hub has no such model, or does not let this user read it."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError | HFValidationError)


def explain(error: Exception) -> str:
    """What the hub or the network refused, in a few words, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids connections; unset it"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return explain(error.__cause__)
    if isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError):
        return "no such model on the hub (a private one needs `hf auth login`)"
    response = getattr(error, "response", None)
    code = getattr(response, "status_code", None)
    if code in (401, 403):
        return f"the hub does not allow this ({code}); log in with `hf auth login`, with a token that may do it"
    first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{type(error).__name__} {show(first_line)}; check the network"


def _explain(error: Exception, offline: bool) -> str:
    """What went wrong with a download, and what to do, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "the hub restricts access to this model; accept its terms there, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder, and no such model on the hub (a private one needs `hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has the model but not this revision; see its branches and tags there"
    if isinstance(error, errors.IncompleteSnapshotError):
        why = "its copy in the hub cache is incomplete"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        why = "no such folder, and not in the hub cache"
    else:
        first_line = next(iter(str(error).splitlines()), "")
        why = f"the download failed: {type(error).__name__} {show(first_line)}"
    if offline:
        return f"{why}, and HF_HUB_OFFLINE forbids downloading it; unset it, or pass a folder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        why += ", and the hub cannot be reached"
    return f"{why}; check the network and run again, or pass a folder"
