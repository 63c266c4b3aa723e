"""A model's name -> a local folder: a path, the Hub at a pinned commit, or an installed weight package, in this order.

A branch or tag is looked up once: the commit it stood at is written to `pins.json` in the cache, and later runs use that
commit although the branch has moved. Asking for a `revision` by name looks it up anew. Where the Hub cannot be reached and
a weight package is installed, the package is pinned in the same way, so that one project never mixes two sources.
Beside the pins, `downloads.json` lists the files of each commit from before its download begins: one that broke off is
never taken for the model. A snapshot of another tool, which is not listed, is completed, or used as it is where the Hub
is out of reach, if it has all files that it names itself.
Nothing is unpickled: safetensors, JSON and text are all that is ever fetched or unpacked.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from filelock import FileLock

from distill.errors import ResourceError
from distill.files import write_json
from distill.hub_errors import explain, few, is_unknown, reason
from distill.model_files import UNWANTED, WANTED, check_files, check_folder, is_wanted, missing_files
from distill.packages import PACKAGES, is_installed, package_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's files lie. `commit` is known for what came from the Hub alone."""

    path: Path
    name: str
    commit: str | None
    origin: Literal["folder", "hub", "package"]


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    offline: bool | None = None,
) -> ModelSource:
    """The local folder of a model given by path or by name ("all-mpnet-base-v2" is short for "sentence-transformers/...").

    `revision` (branch, tag or commit) is looked up anew; without it the pinned commit is used, or `main` becomes the pin.
    `cache_dir` holds pins, unpacked packages and Hub files; by default the first two lie in `cache_home()` and the last in
    huggingface_hub's own cache (HF_HOME). `offline` defaults to HF_HUB_OFFLINE; `token` to HF_TOKEN or the saved login.
    Every failure is a ResourceError that names the ways out; a damaged package is an IntegrityError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
        return ModelSource(path=folder.resolve(), name=name, commit=None, origin="folder")
    if not HUB_NAME.fullmatch(name) or not all(map(_may_be_on_the_hub, _names(name))):
        raise ResourceError(
            f"There is no folder {name!r} (looked at {folder.absolute()}), and it is no Hub name (ORG/NAME) either."
        )
    hub = _Hub(token=token, cache_dir=cache_dir, offline=is_offline() if offline is None else offline)
    names = _names(name)
    for candidate in names:
        if found := _pinned(hub, candidate, revision):
            return found
    return _looked_up(hub, names, revision)


def _names(name: str) -> list[str]:
    """What a name may stand for on the Hub."""
    return [name] if "/" in name else [f"sentence-transformers/{name}", name]


def _may_be_on_the_hub(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def dataset_commit(name: str, *, revision: str | None = None, token: str | None = None) -> str | None:
    """The commit that a Hub data set's branch stands at, or None where HF_HUB_OFFLINE forbids asking.

    Asked before `datasets` is: it retries for half a minute before it admits that there is no network.
    """
    from huggingface_hub import HfApi, constants

    if is_offline():
        return None
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    seconds = constants.HF_HUB_ETAG_TIMEOUT
    try:
        return _within(seconds, lambda: api.dataset_info(name, revision=revision, timeout=seconds)).sha
    except Exception as error:  # whatever the hub's stack raises is sorted in `reason`
        raise ResourceError(
            f"Cannot get the data set {name}: {reason(error)}. Ways out: give the path of a local file; "
            "HF_HUB_OFFLINE=1 uses what was downloaded before."
        ) from error


def cache_home() -> Path:
    """$DISTILL_HOME, else $XDG_CACHE_HOME/distill, else ~/.cache/distill."""
    if home := os.environ.get("DISTILL_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distill"


# Pins


def _pinned(hub: "_Hub", name: str, revision: str | None) -> ModelSource | None:
    """What an earlier run settled on, if all of it is known to be on this machine: no network is touched."""
    if revision and COMMIT.fullmatch(revision):
        return hub.cached(name, revision, listed=not hub.offline)
    pin = hub.pins().get(f"{name}@{revision or 'main'}", {})
    if "package" in pin and not revision:
        return _from_package(name, hub)
    # An explicit branch or tag is looked up again, unless the Hub is out of bounds.
    if "commit" not in pin or (revision and not hub.offline):
        return None
    if found := hub.cached(name, pin["commit"], listed=not hub.offline):
        log.info("%s: commit %s, pinned on first use; revision='main' moves to the newest", name, pin["commit"])
    return found


def _looked_up(hub: "_Hub", names: Sequence[str], revision: str | None) -> ModelSource:
    """Ask the Hub; where it says no, fall back on its cache, then on an installed package."""
    failure: Exception | None = None
    lacking: list[str] = []
    for name in [] if hub.offline else names:
        try:
            # A pinned commit whose files are gone is fetched again; a revision asked for by name is looked up.
            found = hub.download(name, revision or hub.pinned_commit(name) or "main", quick=is_installed(name))
        except ResourceError:
            raise
        except Exception as error:  # whatever the hub's stack raises is sorted in `reason`
            failure = error
            if not is_unknown(error):
                break
        else:
            return hub.pin(found, revision)
    for name in names:
        at = hub.pinned_commit(name, revision) or revision or "main"
        lacking += hub.lacking(name, at)
        if snapshot := hub.cached(name, at):
            log.warning("%s: without an answer from the Hub, the cached commit %s is used", name, snapshot.commit)
            return hub.pin(snapshot, revision)
        if not revision and (package := _from_package(name, hub)):
            if commit := hub.pinned_commit(name):
                log.warning("%s: the pinned commit %s is out of reach; the installed package is used", name, commit)
            return hub.pin(package, revision)
    raise ResourceError(explain(failure, names, revision, lacking)) from failure


def _from_package(name: str, hub: "_Hub") -> ModelSource | None:
    path = package_folder(name, hub.root)
    return ModelSource(path=path, name=name, commit=None, origin="package") if path else None


class _Hub:
    """The Hub with its cache, and the pins beside it."""

    def __init__(self, *, token: str | None, cache_dir: Path | None, offline: bool) -> None:
        self.offline = offline
        self.root = cache_dir or cache_home()
        self.cache = cache_dir
        self.begun: dict[str, list[str]] = {}
        # The environment is read now: huggingface_hub itself reads it once, when it is first imported.
        self.access: dict[str, Any] = {"endpoint": os.environ.get("HF_ENDPOINT") or None, "token": token}

    def pins(self) -> dict[str, dict[str, str]]:
        """What each "name@revision" stands for: a commit, or a package by its sha256."""
        return self._read("pins.json", "names are then looked up anew")

    def downloads(self) -> dict[str, list[str]]:
        """The wanted files of each "name@commit" of which a download was begun."""
        return self._read("downloads.json", "models are then looked up anew") | self.begun

    def _read(self, file: str, then: str) -> dict[str, Any]:
        path = self.root / file
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ResourceError(f"{path} cannot be read ({error}). Delete it; {then}.") from error

    def pinned_commit(self, name: str, revision: str | None = None) -> str | None:
        return self.pins().get(f"{name}@{revision or 'main'}", {}).get("commit")

    def pin(self, found: ModelSource, revision: str | None) -> ModelSource:
        """Record what a name stands for. Of several processes the first one wins, unless a revision was asked for."""
        if revision and COMMIT.fullmatch(revision):
            return found
        key = f"{found.name}@{revision or 'main'}"
        entry = {"commit": found.commit} if found.commit else {"package": PACKAGES[found.name].sha256}
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / "pins.lock"):
                pins = self.pins()
                earlier = pins.setdefault(key, entry)
                if revision or earlier == entry:
                    write_json(self.root / "pins.json", pins | {key: entry})
                    return found
        except OSError as error:
            if isinstance(error, ResourceError):
                raise
            log.warning("%s is not pinned, because %s cannot be written: %s", found.name, self.root, error)
            return found
        return _pinned(self, found.name, revision) or found

    def cached(self, name: str, revision: str, *, listed: bool = False) -> ModelSource | None:
        """The snapshot of a commit or branch, if it lacks no file; `listed`: only one whose files were listed."""
        path, missing = self._snapshot(name, revision)
        if path is None or missing:
            return None
        if f"{name}@{path.name}" not in self.downloads():
            if listed:
                return None
            log.warning("%s: another tool fetched commit %s, and whether it is whole is not known", name, path.name)
        return ModelSource(path=path, name=name, commit=path.name, origin="hub")

    def lacking(self, name: str, revision: str) -> list[str]:
        """The files that are missing from a snapshot; none if there is no snapshot."""
        return self._snapshot(name, revision)[1]

    def _snapshot(self, name: str, revision: str) -> tuple[Path | None, list[str]]:
        """A snapshot's folder, if there is one, and what is missing from it."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        options: dict[str, Any] = {"revision": revision, "cache_dir": self.cache, "local_files_only": True}
        unlisted: list[str] = []
        try:
            path = Path(snapshot_download(name, **options, allow_patterns=WANTED, ignore_patterns=UNWANTED))
        except (LocalEntryNotFoundError, OSError) as error:
            if not (found := getattr(error, "snapshot_path", None)):
                return None, []
            path, unlisted = Path(found), ["a file that huggingface_hub lists"]
        return path, missing_files(path, self.downloads().get(f"{name}@{path.name}")) or unlisted

    def _list(self, name: str, commit: str, files: list[str]) -> None:
        """Write down which files a commit has."""
        key = f"{name}@{commit}"
        if self.downloads().get(key) == files:
            return
        self.begun[key] = files
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / "pins.lock"):
                write_json(self.root / "downloads.json", self.downloads())
        except OSError as error:
            if isinstance(error, ResourceError):
                raise
            log.warning("the files of %s are not listed, because %s cannot be written: %s", name, self.root, error)

    def download(self, name: str, revision: str, *, quick: bool) -> ModelSource:
        """Fetch a revision's wanted files. `quick`: something else stands by, so two seconds without an answer are enough."""
        from huggingface_hub import HfApi, constants, snapshot_download

        seconds = 2 if quick else constants.HF_HUB_ETAG_TIMEOUT
        info = _within(
            seconds, lambda: HfApi(**self.access).model_info(name, revision=revision, timeout=max(1, seconds - 0.5))
        )
        files = [file.rfilename for file in info.siblings or []]
        check_files(files, where=f"{name} on the Hub")
        wanted = [file for file in files if is_wanted(file)]
        self._list(name, str(info.sha), wanted)
        path = snapshot_download(
            name,
            revision=info.sha,
            cache_dir=self.cache,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            **self.access,
        )
        if missing := missing_files(Path(path), wanted):  # the Hub went away before it was asked for them
            raise ConnectionError(f"{few(missing)} did not come")
        return ModelSource(path=Path(path), name=name, commit=info.sha, origin="hub")


def _within(seconds: int, call: Callable[[], T]) -> T:
    """`call()`, or TimeoutError. In a thread, because looking up a host name obeys no HTTP time-out."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = call()
        except Exception as error:  # handed to the caller below
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer within {seconds} s")
    return outcome["value"]


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE says that the Hub is not to be asked."""
    from huggingface_hub import constants

    flags = (os.environ.get("HF_HUB_OFFLINE"), os.environ.get("TRANSFORMERS_OFFLINE"))
    return constants.HF_HUB_OFFLINE or any((flag or "").upper() in {"1", "ON", "YES", "TRUE"} for flag in flags)
