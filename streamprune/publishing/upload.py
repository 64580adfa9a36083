"""`upload`: a finished output to the Hugging Face hub.

Everything is checked before anything is sent: the files are those of the output, with the content that the report
names, and a repository that exists holds no others. What the hub has already is not sent again, so that the same
command resumes an upload that was interrupted.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamprune.disk.header import show
from streamprune.disk.hub import explain, is_hub_name
from streamprune.disk.report import CARD, REPORT, check_files, file_digest, read_report
from streamprune.disk.state import partial_of
from streamprune.errors import CheckpointError, CorruptStateError, HubError, StateError, UsageError

_MADE_BY_THE_HUB = {".gitattributes"}


@dataclass(frozen=True)
class Upload:
    """What `upload` has sent, or would send with `dry_run`."""

    name: str
    """The name on the hub, with its owner where that is known."""
    url: str | None
    """Where it can be seen; None if nothing was sent."""
    files: tuple[str, ...]
    bytes: int
    left_out: tuple[str, ...]
    """Files in the folder that are no part of the output, and are not sent."""
    exists: bool
    """Whether the repository was there already."""


def upload(out: str | Path, name: str, *, private: bool = False, dry_run: bool = False) -> Upload:
    """Uploads the finished output `out` of prune, pack or unpack to the hub as `name`: `org/model`, or `model`.

    A new repository is made public unless `private`. `dry_run` makes all checks and sends nothing.

    Raises:
        UsageError: `name` is no name; its repository holds other files, or is public although `private`; the hub would
            refuse the metadata of the card.
        CheckpointError: there is no such folder.
        StateError: it is not a finished output.
        CorruptStateError: files of it are missing, or are not what was written.
        HubError: the hub cannot be reached, or refuses.
    """
    folder = Path(out)
    _check_name(name)
    files = _files_of(folder)
    there = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    left_out = tuple(n for n in there if n not in files and not n.startswith("."))
    size = sum((folder / file).stat().st_size for file in files)
    with _hub_errors(name):
        from huggingface_hub import HfApi

        api = HfApi()
        full, exists = _check_repository(api, name, files, private)
        if CARD in files:
            _check_card(api, folder / CARD)
        if dry_run:
            return Upload(full, None, files, size, left_out, exists)
        if not exists:
            full = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=full, folder_path=folder, allow_patterns=[glob.escape(file) for file in files],
            commit_message="Upload a model pruned with streamprune",
        )  # fmt: skip
        return Upload(full, f"{api.endpoint}/{full}", files, size, left_out, exists)


def _check_name(name: str) -> None:
    """Raises UsageError for what cannot be a name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        allowed = is_hub_name(name)
        validate_repo_id(name)
    except HFValidationError:
        allowed = False
    if not allowed:
        raise UsageError(f"{show(name)} is no name on the hub; choose one such as org/model")


def _files_of(folder: Path) -> tuple[str, ...]:
    """The files of a finished output, its report last."""
    if not folder.is_dir():
        more = f"; {partial_of(folder)} is unfinished" if folder.name and partial_of(folder).is_dir() else ""
        raise CheckpointError(f"no such folder: {show(folder)}; pass an OUT of prune, pack or unpack{more}")
    if (folder / ".streamprune").exists():
        raise StateError(f"{show(folder)} is unfinished; the command that it was made with finishes it")
    if not (folder / REPORT).is_file():
        raise StateError(f"{show(folder)} holds no {REPORT}, so it is not a finished output; pass an OUT of prune")
    report = read_report(folder)
    check_files(folder, report)
    for file in report.get("files", []):
        if file["name"] != CARD and "xxh3_128" in file and file_digest(folder / file["name"]) != file["xxh3_128"]:
            raise CorruptStateError(f"{folder / file['name']} has changed since it was written; make {folder} again")
    names = [file["name"] for file in report.get("files", [])]
    if not names:
        raise StateError(f"{folder / REPORT} names no files, so it is not that of an output; pass an OUT of prune")
    return (*(name for name in names if (folder / name).is_file()), REPORT)


def _check_repository(api: Any, name: str, files: tuple[str, ...], private: bool) -> tuple[str, bool]:
    """The full name of the repository, and whether it exists. Raises UsageError if it is not fit for these files."""
    from huggingface_hub.errors import RepositoryNotFoundError

    user = api.whoami()["name"]  # whoever may not write anyway is told before anything is sent, in a dry run as well
    full = name if "/" in name else f"{user}/{name}"
    try:
        found = api.model_info(full)
    except RepositoryNotFoundError:
        return full, False
    others = sorted({s.rfilename for s in found.siblings or ()} - {*files, *_MADE_BY_THE_HUB})
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"{full} on the hub holds other files: {', '.join(map(show, others[:3]))}{more}; choose another name, or "
            "delete them there"
        )
    if private and found.private is False:
        raise UsageError(f"{full} on the hub is public; choose another name, or make it private there")
    return full, True


def _check_card(api: Any, card: Path) -> None:
    """Raises UsageError where the hub would refuse the card: its metadata may be those of the source, or a person's."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    try:
        text = card.read_bytes().decode()
    except UnicodeDecodeError:
        raise UsageError(f"{card} is not UTF-8; save it as UTF-8") from None
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml", json={"content": text, "repoType": "model"}, headers=build_hf_headers()
    )
    if response.status_code == 400:
        found = [str(error.get("message")) for error in response.json().get("errors", ())]
        why = show(" ".join("; ".join(found).split())) if found else "no reason given"
        raise UsageError(f"{card}: the hub does not accept its metadata ({why}); mend them in that file")
    hf_raise_for_status(response)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into HubError."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        raise HubError(f"{show(name)}: {explain(error)}; the same command goes on") from error
