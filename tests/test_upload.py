"""A folder becomes a repository: the Hub is a loopback server that keeps what it is sent, or refuses."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from distill.errors import RecipeError, ResourceError
from distill.export.__main__ import main
from distill.export.upload import Upload, push

FILES = {
    "README.md": b"# a student\n",
    "modules.json": b"[]",
    "model.safetensors": b"safe weights" * 100,
    "1_Pooling/config.json": b"{}",
    "onnx/student.onnx": b"graph",
    "notes.py": b"print()",
    ".cache/modules.json": b"[]",
}
SENT = set(FILES) - {"notes.py", ".cache/modules.json"}
LARGE = (".safetensors", ".onnx")  # what the Hub wants beside git, by the protocol of git-lfs


class FakeHub(ThreadingHTTPServer):
    """Repositories with their branches; `status` maps a part of a path to the answer that it gets instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.status: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0].strip("/")
        self.server.requests.append(path)
        self.server.tokens.add(self.headers.get("authorization"))
        for part, status in self.server.status.items():
            if part in path:
                return self.answer({"error": "no"}, status)
        if path == "api/repos/create":
            return self.create(json.loads(body))
        if path.endswith("info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        owner, repo, action, *rest = path.removeprefix("api/models/").split("/")
        branches = self.server.repos[f"{owner}/{repo}"]["branches"]
        if action == "branch":
            branches[rest[0]] = {}
            return self.answer({})
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        return self.commit(f"{owner}/{repo}", branches[rest[0]], body)

    def create(self, request: dict) -> None:
        name = f"{request['organization']}/{request['name']}"
        if name in self.server.repos:
            return self.answer({"url": f"{self.server.url}/{name}"}, 409)
        visibility = request.get("visibility") or ("private" if request.get("private") else "public")
        self.server.repos[name] = {"visibility": visibility, "branches": {"main": {}}}
        return self.answer({"url": f"{self.server.url}/{name}"})

    def batch(self, request: dict) -> None:
        objects = [
            {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.server.url}/{one['oid']}"}}}
            for one in request["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.strip("/")] = content
        self.answer({})

    def commit(self, repo: str, files: dict, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        digest = hashlib.sha1(body).hexdigest()
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{digest}", "commitOid": digest, "success": True})

    def answer(self, value: dict, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its client talks to a server of its own
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_bytes(content)
    return tmp_path / "student"


def test_a_folder_becomes_a_private_repository(server: FakeHub, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(folder), "--push-to-hub", "org/mine"]) == 0
    repo = server.repos["org/mine"]
    assert repo["visibility"] == "private"
    assert repo["branches"]["main"] == {name: FILES[name] for name in SENT}
    assert server.tokens - {None} == {"Bearer hf_secret"}
    assert f"{server.url}/org/mine/commit/" in capsys.readouterr().out


def test_a_branch_is_made_and_a_public_one_is_asked_for(server: FakeHub, folder: Path) -> None:
    push(Upload(folder=folder, repo="org/mine", revision="v2", public=True), token="hf_other")
    repo = server.repos["org/mine"]
    assert (repo["visibility"], set(repo["branches"]), repo["branches"]["main"]) == ("public", {"main", "v2"}, {})
    assert set(repo["branches"]["v2"]) == SENT
    assert "Bearer hf_other" in server.tokens
    push(Upload(folder=folder, repo="org/mine", revision="v2"))  # once more, into what is there now
    assert repo["visibility"] == "public"


def test_a_dry_run_says_what_would_go_and_touches_no_network(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(folder), "--push-to-hub", "org/mine", "--revision", "v2", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert server.requests == []
    for part in ("org/mine", "v2", "private", "model.safetensors", "1,200 bytes", "5 files", "Nothing was sent"):
        assert part in told
    assert "notes.py" not in told


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("repos/create", 401, "HF_TOKEN to a token that may write"),
        ("repos/create", 403, "HF_TOKEN to a token that may write"),
        ("preupload", 403, "HF_TOKEN to a token that may write"),
        ("commit", 400, "status 400"),
        ("commit", 413, "status 413"),
        ("create", 429, "429"),
    ],
)
def test_what_the_hub_refuses_is_one_message_and_exit_code_6(
    server: FakeHub, folder: Path, capsys: pytest.CaptureFixture, where: str, status: int, words: str
) -> None:
    server.status[where] = status
    assert main([str(folder), "--push-to-hub", "org/mine"]) == 6
    told = capsys.readouterr().err.splitlines()[-1]  # behind the hub's own bars
    assert told.startswith("error: ")
    assert words in told


def test_no_hub_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ResourceError, match="could not be reached"):
        push(Upload(folder=folder, repo="org/mine"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match="unset it"):
        push(Upload(folder=folder, repo="org/mine"))


@pytest.mark.parametrize("name", ["mine", "a/b/c", "-/x", "", "org/"])
def test_a_name_is_of_an_owner_and_a_repository(folder: Path, name: str) -> None:
    with pytest.raises(RecipeError, match="ORG/NAME"):
        Upload(folder=folder, repo=name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to do"),
        (["--dry-run"], "nothing to do"),
        (["--truncate-dim", "4", "--public"], "belong to --push-to-hub"),
        (["--push-to-hub", "org/mine", "--int8"], "belong to --onnx"),
    ],
)
def test_flags_that_do_not_belong_together(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list, words: str
) -> None:
    assert main([str(folder), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_student(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "nowhere"), "--push-to-hub", "org/mine"]) == 2
    assert "no modules.json" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "words"), [("0", "is 1..32"), ("1000", "is 1..32"), ("8", "add --onnx")])
def test_a_width_that_cannot_be_is_refused_before_the_files_of_another(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture, width: str, words: str
) -> None:
    student = Path(shutil.copytree(tiny_bert, tmp_path / "student"))
    (student / "onnx").mkdir()
    assert main([str(student), "--truncate-dim", width]) == 2
    assert words in capsys.readouterr().err
