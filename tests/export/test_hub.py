"""What is pushed arrives byte for byte, at a stand-in of the hub on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from huggingface_hub import constants

from commands import contents, make_source, smelt
from llama import needs_gguf
from smelt import api


class Hub(ThreadingHTTPServer):
    """The few calls of the hub that an upload makes: repositories, in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.token = "hf_right"
        self.commits = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Calls(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def log_message(self, *words: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        data, name = self.body(), self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == name
        self.server.objects[name] = data
        self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":  # the head of a README
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(data))
        repo = "/".join(path.split("/")[3:5])
        if path.endswith("/preupload/main"):
            files = json.loads(data)["files"]
            return self.answer({"files": [self.mode(file["path"]) for file in files]})
        if path.endswith("/commit/main"):
            return self.commit(repo, [json.loads(line) for line in data.splitlines()])
        return self.answer({"error": path}, 404)

    def create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        repo = f"{owner}/{asked['name']}"
        if repo in self.server.repos:
            return self.answer({"error": "exists", "url": f"{self.server.address}/{repo}"}, 409)
        self.server.repos[repo] = {}
        self.server.private[repo] = (
            bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        return self.answer({"url": f"{self.server.address}/{repo}", "name": repo})

    def mode(self, path: str) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".gguf"))
        return {
            "path": path,
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
        }

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **one,
                "actions": {"upload": {"href": f"{self.server.address}/objects/{one['oid']}"}},
            }
            for one in asked["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                assert len(files[value["path"]]) == value["size"]
        self.server.commits += 1
        url = f"{self.server.address}/{repo}/commit/main"
        self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has the older way
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    yield server
    server.shutdown()
    server.server_close()


def test_every_file_of_a_folder_arrives_byte_for_byte(hub, tmp_path):
    folder = make_source(tmp_path / "model")
    (folder / "smelt").mkdir()
    (folder / "smelt" / "plan.json").write_text("{}")
    (folder / "README.md").write_text("# A model\n")
    done = smelt("push", folder, "me/small", "--private")
    assert done.code == 0, done.err
    assert f"{hub.address}/me/small" in done.out
    arrived = {n: hashlib.sha256(d).hexdigest() for n, d in hub.repos["me/small"].items()}
    arrived.pop(".gitattributes", None)
    assert arrived == contents(folder)
    assert hub.commits == 1 and hub.private["me/small"]


@needs_gguf
def test_a_gguf_file_arrives_beside_what_is_there(hub, tmp_path):
    folder = make_source(tmp_path / "model")
    path = api.export_gguf(folder, tmp_path / "model.gguf").path
    assert smelt("push", folder, "me/small").code == 0
    assert smelt("push", path, "me/small").code == 0
    assert hub.repos["me/small"]["model.gguf"] == path.read_bytes()
    assert "config.json" in hub.repos["me/small"]


def refused(*words: object, says: str) -> None:
    done = smelt("push", *words)
    lines = [line for line in done.err.splitlines() if line.startswith("smelt: error: ")]
    assert done.code == 2 and len(lines) == 1 and "Traceback" not in done.err, done.err
    assert says in lines[0], lines[0]


def test_without_a_token_nothing_is_asked_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    refused(make_source(tmp_path / "model"), "me/small", says="No token for the hub")
    assert not hub.repos


def test_a_token_that_the_hub_does_not_know_is_said(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(make_source(tmp_path / "model"), "me/small", says="does not let this token write")
    assert not hub.repos


def test_what_is_no_checkpoint_is_not_pushed(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "me/small", says="no config.json")
    refused(tmp_path / "none", "me/small", says="neither a checkpoint folder nor a GGUF file")
    folder = make_source(tmp_path / "model")
    refused(folder, "small", says="Give user/name")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    refused(folder, "me/small", says="truncated")
    assert not hub.repos


def test_a_hub_that_is_switched_off_is_said(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(make_source(tmp_path / "model"), "me/small", says="HF_HUB_OFFLINE")


def test_a_hub_that_does_not_answer_is_said(tmp_path, monkeypatch, hub):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(make_source(tmp_path / "model"), "me/small", says="did not take it")
