"""The Hugging Face hub's HTTP API, as far as downloads and uploads of models need it, on a port of this machine.

    with Hub() as hub:
        hub.models["org/model"] = Repository({"config.json": b"{}"})

Large files (safetensors) go by git LFS, as on the hub; its own storage, Xet, is turned off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """One model: its files, and whether it is private."""

    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    commits: int = 0

    @classmethod
    def of(cls, folder: Path) -> Repository:
        """With the files of a folder."""
        return cls({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


class Hub:
    """The server. `log` has "METHOD /path" of every request, with the range that was asked for."""

    def __init__(self) -> None:
        self.models: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[str] = []
        self.refuse: Callable[[str], int | None] = lambda request: None
        """Called with "METHOD /path"; may return the status to answer with, or raise to end the connection."""
        self.cut: Callable[[str, bytes], bytes] = lambda path, content: content
        """Called with the path and the content of a download; what it returns is sent in its place."""
        self.metadata: Callable[[str], list[str]] = lambda card: []
        """Called with a card; returns what is wrong with its metadata."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        enable_progress_bars()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """Makes huggingface_hub use this server, and an empty cache."""
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.setenv("HF_TOKEN", "hf_of_nobody")
        disable_progress_bars()
        close_session()

    def asked(self, pattern: str) -> list[str]:
        """The requests that match."""
        return [request for request in self.log if re.search(pattern, request)]


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    large = {"lfs": {"sha256": _sha256(content), "oid": _sha256(content), "size": len(content), "pointerSize": 1}}
    return {"rfilename": name, "size": len(content), "blobId": _blob(content)} | (large if _is_large(name) else {})


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def _answer(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range")
            hub.log.append(f"{self.command} {path}{f' {asked}' if asked else ''}")
            status = hub.refuse(hub.log[-1])
            if status is not None:
                self._send(status, b"refused")
            elif path == "/api/whoami-v2":
                self._json({"name": "me", "type": "user", "orgs": []})
            elif path == "/api/repos/create":
                self._create()
            elif path == "/api/validate-yaml":
                wrong = hub.metadata(json.loads(self.body)["content"])
                errors = [{"message": message} for message in wrong]
                self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
            elif found := re.fullmatch(r"/lfs/(\w+)", path):
                self._put(found[1])
            elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                self._batch()
            elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/[\w.-]+)?)?", path):
                self._of_model(found[1], found[2] or "revision")
            elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/(.+)", path):
                self._download(found[1], found[2])
            else:
                self._send(404, b"no such page")

        def _create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in hub.models
            private = asked.get("private", asked.get("visibility") == "private")
            hub.models.setdefault(name, Repository(private=bool(private)))
            self._json({"url": f"{hub.url}/{name}", "name": name, "id": "1"}, 409 if there else 200)

        def _of_model(self, name: str, what: str) -> None:
            model = hub.models.get(name)
            if model is None:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif what == "revision":
                siblings = [_entry(*item) for item in model.files.items()]
                self._json({"id": name, "sha": COMMIT, "private": model.private, "siblings": siblings})
            elif what == "tree":
                keys = {"rfilename": "path", "blobId": "oid"}
                entries = [{keys.get(k, k): v for k, v in _entry(*item).items()} for item in model.files.items()]
                self._json([{"type": "file", **entry} for entry in entries])
            elif what == "preupload":
                files = [f["path"] for f in json.loads(self.body)["files"]]
                modes = [
                    {"path": f, "uploadMode": "lfs" if _is_large(f) else "regular", "shouldIgnore": False}
                    for f in files
                ]
                self._json({"files": modes})
            elif what == "commit":
                for line in self.body.splitlines():
                    part = json.loads(line)
                    if part["key"] == "file":
                        model.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
                    elif part["key"] == "lfsFile":
                        model.files[part["value"]["path"]] = hub.large[part["value"]["oid"]]
                model.commits += 1
                self._json({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def _batch(self) -> None:
            objects = []
            for one in json.loads(self.body)["objects"]:
                new = {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                objects.append(one if one["oid"] in hub.large else {**one, **new})
            self._json({"transfer": "basic", "objects": objects})

        def _put(self, oid: str) -> None:
            assert _sha256(self.body) == oid
            hub.large[oid] = self.body
            self._send(200, b"")

        def _download(self, name: str, file: str) -> None:
            content = hub.models[name].files.get(file) if name in hub.models else None
            if content is None:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            tag = _sha256(content) if _is_large(file) else _blob(content)
            more = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if _is_large(file):
                more |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content))}
            status, part = 200, content
            if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                begin, end = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
                status, part = 206, content[begin:end]
                more["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            self._send(status, part, more, hub.cut(file, part))

        def _json(self, value: object, status: int = 200) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send(
            self, status: int, content: bytes, more: dict[str, str] | None = None, sent: bytes | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(more or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content if sent is None else sent)
                if sent is not None and len(sent) < len(content):
                    self.close_connection = True  # as if the network had gone

    return Handler
