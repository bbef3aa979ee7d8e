"""A stand-in for the Hugging Face hub on loopback: what huggingface_hub, transformers and datasets ask of the
real one, and its faults.

    with Hub() as hub:
        hub.add("owner/name", {"config.json": b"{}", "model.safetensors": Path(...)}, kind="model")
        hub.add("owner/gated", {"README.md": b""}, kind="dataset", gated=True)
        hub.fail("503", "model.safetensors", times=2)
        subprocess.run(..., env=hub.environment(tmp_path))

    hub.repos["model", "owner/name"].files         # what was uploaded: create_repo, create_commit

As there: a commit hash for every repo, listings by page of the tree, HEAD and GET of files with ETag, size
and Range; large files (LARGE) by a redirect to a storage host of its own, which must never see a token
(`hub.leaks`). `hub.asked` lists the requests. Written from what the clients send; nothing here imports
them.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".zst")
BODY = ("cut", "reset", "corrupt")
TOKEN = "hf_StandInTokenOfTheTests0123456789"  # the one that may read gated repos
DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class File:
    content: bytes | Path
    size: int
    etag: str
    large: bool

    def read(self, start: int, end: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:end]
        with self.content.open("rb") as f:
            f.seek(start)
            return f.read(end - start)


@dataclass
class Repo:
    name: str
    kind: str
    gated: bool
    commit: str
    files: dict[str, File]
    private: bool = False

    def info(self) -> dict:
        return {
            "_id": self.commit[:24],
            "id": self.name,
            "sha": self.commit,
            "private": self.private,
            "disabled": False,
            "gated": "auto" if self.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": DATE,
            "lastModified": DATE,
            "siblings": [{"rfilename": f} for f in self.files],
        }

    def entry(self, path: str) -> dict | None:
        """What listings say about a file or folder."""
        if path in self.files:
            f = self.files[path]
            lfs = {"lfs": {"oid": f.etag, "size": f.size, "pointerSize": 134}} if f.large else {}
            return {
                "type": "file",
                "path": path,
                "size": f.size,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
            } | lfs
        if any(f.startswith(path + "/") for f in self.files):
            return {
                "type": "directory",
                "path": path,
                "size": 0,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
            }
        return None

    def tree(self, under: str, recursive: bool) -> list[dict]:
        prefix = under + "/" if under else ""
        found = {}
        for path in self.files:
            if path.startswith(prefix):
                parts = path[len(prefix) :].split("/")
                for n in range(1, (len(parts) if recursive else 1) + 1):
                    found.setdefault(prefix + "/".join(parts[:n]))
        return [entry for path in found if (entry := self.entry(path))]


@dataclass
class Fault:
    """`kind` is 503, 429, hang (no answer), or one of BODY: cut (half of the body, then the end), reset
    (the same, the hard way), corrupt (a byte is wrong). It meets the next `times` requests of `methods`
    whose address holds `match`; one of BODY, those that are answered with a file. A `deaf` one ignores
    where a body is to go on."""

    kind: str
    match: str
    times: int
    methods: tuple[str, ...]
    retry_after: int | None
    deaf: bool


@dataclass
class Hub:
    page: int = 1000  # entries of a listing on one page
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # "GET /path"
    leaks: list[str] = field(default_factory=list)  # requests that brought a token to the storage host
    uploaded: dict[str, bytes] = field(default_factory=dict)  # large files without a commit yet, by sha256

    def __enter__(self) -> "Hub":
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.servers = [
            Server(("127.0.0.1", 0), partial(Handler, self, storage)) for storage in (False, True)
        ]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(
        self, name: str, files: dict[str, bytes | Path], kind: str = "model", gated: bool = False
    ) -> Repo:
        kept, whole = {}, hashlib.sha1(name.encode())
        for path, content in files.items():
            large = path.endswith(LARGE)
            digest = hashlib.sha256() if large else hashlib.sha1()
            if isinstance(content, bytes):
                digest.update(content)
            else:
                with content.open("rb") as f:
                    digest = hashlib.file_digest(f, digest.name)
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            kept[path] = File(content, size, digest.hexdigest(), large)
            whole.update(path.encode() + digest.digest())
        self.repos[kind, name] = Repo(name, kind, gated, whole.hexdigest(), kept)
        return self.repos[kind, name]

    def fail(
        self,
        kind: str,
        match: str,
        times: int = 1,
        methods: tuple[str, ...] = ("GET", "HEAD"),
        retry_after: int | None = None,
        deaf: bool = False,
    ):
        self.faults.append(Fault(kind, match, times, methods, retry_after, deaf))

    def fault(self, method: str, path: str, body: bool) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if (
                    fault.times > 0
                    and method in fault.methods
                    and fault.match in path
                    and (fault.kind in BODY) == body
                ):
                    fault.times -= 1
                    return fault
        return None

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Environment of a process that takes this for the hub, keeps all it gets under `home`, and waits
        2 s for an answer."""
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and k.lower() not in ("http_proxy", "https_proxy", "all_proxy")
        }
        return (
            kept
            | {
                "HF_ENDPOINT": self.url,
                "HF_HOME": str(home),
                "XDG_CACHE_HOME": str(home / "cache"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_UPDATE_DOWNLOAD_COUNTS": "0",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DOWNLOAD_TIMEOUT": "2",
                "HF_HUB_ETAG_TIMEOUT": "2",
            }
            | changes
        )


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub, or for its storage."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, storage: bool, *connection):
        self.hub, self.storage = hub, storage
        super().__init__(*connection)  # which answers at once

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        fault = self.hub.fault(self.command, path, body=False)
        if fault and fault.kind == "hang":
            self.hub.closing.wait(60)
            self.close_connection = True
        elif fault:
            self.say(
                int(fault.kind),
                b"busy",
                {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)},
            )
        elif self.storage and self.command == "PUT":
            self.store(path, sent)
        elif self.storage:
            self.stored(path)
        elif self.command in ("POST", "PUT") and self.written(path, sent):
            pass
        elif match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?",
            path,
        ):
            kind, name, what, revision, under = match.groups()
            self.api(kind[:-1], name, what, revision, (under or "").strip("/"), sent.decode())
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file("dataset" if match[1] else "model", match[2], match[3], match[4])
        else:
            self.say(404, b"no such page")

    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def say(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, commit: str | None = None):
        self.say(
            status,
            b"",
            {"X-Error-Code": code, "X-Error-Message": message}
            | ({"X-Repo-Commit": commit} if commit else {}),
        )

    def repo(self, kind: str, name: str, revision: str | None) -> Repo | None:
        """The repo, or None when the request was refused."""
        repo = self.hub.repos.get((kind, name))
        if repo is None or repo.private and self.token() != TOKEN:
            (
                self.refuse(404, "RepoNotFound", "Repository not found")
                if self.token()
                else self.refuse(401, "", "Invalid username or password.")
            )
            return None
        elif revision not in (None, "main", repo.commit):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def api(self, kind: str, name: str, what: str | None, revision: str | None, under: str, sent: str):
        repo = self.repo(kind, name, revision)
        if repo is None:
            return
        if what in (None, "revision"):
            return self.json(repo.info())
        if what == "paths-info":
            asked = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent).get("paths", [])
            return self.json([entry for path in asked if (entry := repo.entry(path))])
        query = parse_qs(urlsplit(self.path).query)
        found = repo.tree(under, query.get("recursive", ["false"])[0].lower() == "true")
        if not found:
            return self.refuse(404, "EntryNotFound", f"{under} does not exist on {revision}")
        start = int(query.get("cursor", ["0"])[0])
        more = (
            f"<{self.hub.url}{urlsplit(self.path).path}?recursive={query.get('recursive', ['false'])[0]}"
            f'&cursor={start + self.hub.page}>; rel="next"'
        )
        self.json(
            found[start : start + self.hub.page], {"Link": more} if start + self.hub.page < len(found) else {}
        )

    def json(self, value, headers: dict[str, str] | None = None):
        self.say(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def file(self, kind: str, name: str, revision: str, path: str):
        repo = self.repo(kind, name, revision)
        if repo is None:
            return
        if repo.gated and self.token() is None:
            return self.refuse(
                401,
                "GatedRepo",
                f"Access to {kind} {name} is restricted. You must be authenticated to access it. Please"
                " log in.",
            )
        if repo.gated and self.token() == "hf_expired":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo.gated and self.token() != TOKEN:
            return self.refuse(
                403,
                "GatedRepo",
                f"Access to {kind} {name} is restricted and you are not in the authorized list.",
            )
        file = repo.files.get(path)
        if file is None:
            return self.refuse(404, "EntryNotFound", "Entry not found", repo.commit)
        about = {"X-Repo-Commit": repo.commit, "Accept-Ranges": "bytes"}
        if not file.large:
            return self.send_file(file, about | {"ETag": f'"{file.etag}"'})
        where = f"{self.hub.storage_url}/{file.etag}/{path.split('/')[-1]}?Signature=signed-for-this-request"
        self.say(
            302,
            b"",
            about
            | {
                "X-Linked-Size": str(file.size),
                "X-Linked-Etag": f'"{file.etag}"',
                "Location": where,
            },
        )

    def written(self, path: str, sent: bytes) -> bool:
        """Answer a request that writes, if it is one: to make a repo, change its settings, or commit."""
        repo = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(settings|preupload/main|commit/main)", path)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif not (repo or batch or path in ("/api/repos/create", "/verify")):
            return False
        elif self.token() != TOKEN:
            self.refuse(403 if self.token() else 401, "", "You don't have the rights to write here.")
        elif batch:
            self.upload_actions(json.loads(sent))
        elif path == "/verify":
            self.json({})
        elif repo is None:
            self.create(json.loads(sent))
        elif (found := self.repo("model", repo[1], None)) is not None:
            WRITES[repo[2]](self, found, sent)
        return True

    def create(self, asked: dict):
        name = f"{asked['organization']}/{asked['name']}"
        if ("model", name) in self.hub.repos:
            return self.refuse(409, "", "You already created this model repo")
        self.hub.add(name, {}).private = asked.get("visibility") == "private"
        self.json({"url": f"{self.hub.url}/{name}"})

    def change_settings(self, repo: Repo, sent: bytes):
        repo.private = json.loads(sent)["visibility"] == "private"
        self.json({})

    def preupload(self, repo: Repo, sent: bytes):
        """How each file is to come, and what is there by its name."""
        files = []
        for path in (asked["path"] for asked in json.loads(sent)["files"]):
            there, mode = repo.files.get(path), "lfs" if path.endswith(LARGE) else "regular"
            oid = there and (there.etag if there.large else blob_sha(there.read(0, there.size)))
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": files})

    def upload_actions(self, asked: dict):
        """Where large files go: by address alone, with a signature and without a token."""
        objects = []
        for about in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.storage_url}/{about['oid']}?Signature=signed-for-this-upload"},
                "verify": {"href": f"{self.hub.url}/verify"},
            }
            objects.append(about | {"authenticated": True, "actions": actions})
        self.json({"transfer": "basic", "objects": objects})

    def store(self, path: str, sent: bytes):
        if self.headers.get("Authorization"):
            self.hub.leaks.append(path)
        if hashlib.sha256(sent).hexdigest() != path.strip("/"):
            return self.say(400, b"other bytes than were announced")
        self.hub.uploaded[path.strip("/")] = sent
        self.say(200)

    def commit(self, repo: Repo, sent: bytes):
        contents = {path: file.content for path, file in repo.files.items()}
        header, *lines = map(json.loads, sent.splitlines())
        if header["value"].get("parentCommit") not in (None, repo.commit):
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines:
            key, about = line["key"], line["value"]
            if key == "deletedFile":
                del contents[about["path"]]
            else:
                large = key == "lfsFile"
                content = self.hub.uploaded[about["oid"]] if large else base64.b64decode(about["content"])
                contents[about["path"]] = content
        new = self.hub.add(repo.name, contents, repo.kind, repo.gated)
        new.private = repo.private
        self.json({"commitUrl": f"{self.hub.url}/{repo.name}/commit/{new.commit}", "commitOid": new.commit})

    def stored(self, path: str):
        if self.headers.get("Authorization"):
            self.hub.leaks.append(path)
        for repo in self.hub.repos.values():
            for file in repo.files.values():
                if file.large and file.etag == path.split("/")[1]:
                    return self.send_file(file, {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"})
        self.say(404)

    def send_file(self, file: File, headers: dict[str, str]):
        fault = (
            self.hub.fault("GET", unquote(urlsplit(self.path).path), body=True)
            if self.command == "GET"
            else None
        )
        start, end, status = 0, file.size, 200
        if not (fault and fault.deaf) and (
            asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        ):
            start, end, status = (
                int(asked[1]),
                min(int(asked[2] or file.size) + bool(asked[2]), file.size),
                206,
            )
            if start >= file.size:
                return self.say(416, b"", {"Content-Range": f"bytes */{file.size}"})
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{file.size}"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(end - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind != "corrupt":
            self.wfile.write(file.read(start, start + (end - start) // 2))
            self.wfile.flush()
            self.close_connection = True
            if fault.kind == "reset":
                time.sleep(0.1)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        for at in range(start, end, 2**22):
            part = bytearray(file.read(at, min(at + 2**22, end)))
            if fault and at == start:
                part[len(part) // 2] ^= 0xFF
            self.wfile.write(part)


def blob_sha(content: bytes) -> str:
    """What git names a file by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


WRITES = {
    "settings": Handler.change_settings,
    "preupload/main": Handler.preupload,
    "commit/main": Handler.commit,
}
