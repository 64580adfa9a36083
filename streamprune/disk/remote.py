"""A checkpoint on the Hugging Face hub whose shards stay there: headers and samples are read by range requests.

Side files are fetched into the hub's cache. Everything is read at one commit. Shards are fetched one by one when their
tensors are needed (disk/spool.py), and compared with the hub's hashes: sha256, or git's own for files outside LFS.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from streamprune.disk.checkpoint import Checkpoint, open_checkpoint
from streamprune.disk.folder import list_folder
from streamprune.disk.header import Shard, shard_in, show
from streamprune.disk.hub import OTHER_WEIGHTS, as_folder, explain, is_refused
from streamprune.errors import CheckpointError, HubError, UsageError

_HEAD_BYTES = 1 << 16
WAITS = (1.0, 2.0, 5.0, 15.0, 30.0)
"""Seconds before each further attempt at what broke off; a download that has got further starts anew with them."""
_SECONDS = 20
"""How long a connection may be silent."""


@dataclass(frozen=True)
class RemoteCheckpoint(Checkpoint):
    """A checkpoint of which only the side files are in `path`."""

    repository: str = field(kw_only=True)
    commit: str = field(kw_only=True)
    hashes: Mapping[str, str] = field(kw_only=True)
    """Of each shard: "sha256:…" or "git:…", as the hub names it."""

    @property
    def streamed(self) -> bool:
        return True

    def fingerprint(self) -> dict[str, str]:
        """As Checkpoint.fingerprint, with the shards' hashes in place of their times."""
        return super().fingerprint() | {"shards": self.content()}

    def content(self) -> str:
        """A hash of the names, sizes and hashes of all shards."""
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(json.dumps([shard, self.shard_stats[shard][0], self.hashes[shard]]).encode())
        return digest.hexdigest()

    @contextmanager
    def reading(self, shard: str) -> Iterator[Callable[[int, int], bytes]]:
        """As Checkpoint.reading. Raises HubError."""
        yield lambda begin, size: _read(self.repository, self.commit, shard, begin, size)

    def pieces(self, shard: str, begin: int) -> Iterator[bytes]:
        """The bytes of a shard from `begin` on. Raises HubError; what it has in `__cause__` may pass by itself."""
        with _opened(self.repository, self.commit, shard, begin, None) as response:
            yield from response.iter_bytes()  # as they come: nothing is lost when it breaks off

    def hasher(self, shard: str) -> Hasher:
        """Computes the hash of a shard from its bytes, one after the other."""
        return Hasher(self.hashes[shard], self.shard_stats[shard][0])


class Hasher:
    """The hash of a file, in the way that the hub has hashed it."""

    def __init__(self, wanted: str, size: int) -> None:
        self._kind, _, self._wanted = wanted.partition(":")
        self._hash = hashlib.sha256() if self._kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)

    def update(self, data: bytes) -> None:
        """Takes the next bytes."""
        self._hash.update(data)

    @property
    def fits(self) -> bool:
        """Whether it is the hash that the hub names."""
        return self._hash.hexdigest() == self._wanted


def open_remote(name: str, *, follow_links: bool = False) -> RemoteCheckpoint:
    """The checkpoint of the model `name` on the hub, at its newest commit.

    Raises:
        UsageError: `name` is a folder.
        CheckpointError: it is no model of the hub, or malformed; UnsupportedError as open_checkpoint.
        HubError: the hub cannot be reached.
    """
    if (there := as_folder(name)) is not None:
        raise UsageError(f"--fetch stream is for a model on the hub, but {show(there)} is a folder; leave it out")
    commit, found = _files(name)
    path = _side_files(name, commit)
    names = sorted({*list_folder(path), *(n for n in found if "/" not in n)})

    def read(shard: str) -> Shard:
        if shard not in found:
            raise CheckpointError(f"{name}: {show(shard)} is missing on the hub, but the index names it")
        size = found[shard][0]
        head = _read(name, commit, shard, 0, min(_HEAD_BYTES, size))
        length = 8 + int.from_bytes(head[:8], "little")
        if len(head) < length <= size:
            head += _read(name, commit, shard, len(head), length - len(head))
        return shard_in(io.BytesIO(head), Path(shard), size, 0)

    opened = open_checkpoint(path, follow_links=follow_links, names=names, read=read)
    own = {f.name: getattr(opened, f.name) for f in fields(Checkpoint)}
    hashes = {shard: found[shard][1] for shard in opened.shards}
    return RemoteCheckpoint(**own, repository=name, commit=commit, hashes=hashes)


def _files(name: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The newest commit of a model, and (size, hash) of each of its safetensors files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        info: Any = HfApi().model_info(name, files_metadata=True)
    except (OSError, HTTPError, ValueError) as error:
        if is_refused(error):
            raise CheckpointError(f"{show(name)}: {explain(error)}") from error
        raise HubError(f"{show(name)}: {explain(error)}") from error
    found = {}
    for file in info.siblings or ():
        if file.rfilename.endswith(".safetensors") and file.size is not None:
            digest = f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            found[str(file.rfilename)] = (int(file.size), digest)
    return str(info.sha), found


def _side_files(name: str, commit: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        weights = [*OTHER_WEIGHTS, "*.safetensors"]
        return Path(huggingface_hub.snapshot_download(name, revision=commit, ignore_patterns=weights))
    except (OSError, HTTPError, RuntimeError) as error:
        raise HubError(f"{show(name)}: {explain(error)}") from error


def _read(name: str, commit: str, file: str, begin: int, size: int) -> bytes:
    for wait in (*WAITS, None):
        try:
            with _opened(name, commit, file, begin, begin + size) as response:
                data: bytes = response.read()
            if len(data) != size:
                raise HubError(f"{name}: {file}: {len(data)} bytes came, not {size}; run the same command again")
            return data
        except HubError as e:
            if wait is None or not is_passing(e):
                raise
            time.sleep(wait)
    raise AssertionError


def is_passing(error: HubError) -> bool:
    """Whether what a download broke off with may pass by itself: not where the hub refuses."""
    response = getattr(error.__cause__, "response", None)
    code = getattr(response, "status_code", None)
    return code is None or code == 429 or code >= 500


@contextmanager
def _opened(name: str, commit: str, file: str, begin: int, end: int | None) -> Iterator[Any]:
    """The hub's answer with bytes `begin` to `end` of a file. Errors of the network become HubError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if begin == end:
        yield io.BytesIO()
        return
    asked = f"bytes={begin}-{'' if end is None else end - 1}"
    headers = {**build_hf_headers(), "Range": asked, "Accept-Encoding": "identity"}
    try:
        url = hf_hub_url(name, file, revision=commit)
        with get_session().stream("GET", url, headers=headers, timeout=_SECONDS, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise OSError("the server does not send parts of files")
            yield response
    except (OSError, HTTPError, RuntimeError) as error:
        raise HubError(f"{name}: {file}: {explain(error)}; the same command goes on") from error
