"""A student's folder as a repository on the Hub: what would be sent, and the sending."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from distill import hub, hub_errors
from distill.errors import RecipeError, ResourceError


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Files of a folder that go to a repository ORG/NAME on the Hub, into one commit of the branch `revision`.

    Hidden files stay at home, and so does every file that is no part of a model folder by its kind. A repository that is not
    there yet is made, private unless `public`; one that is there keeps its visibility, and the files that have other names.
    """

    folder: Path
    repo: str
    revision: str = "main"
    public: bool = False
    files: dict[str, int] = field(init=False)
    """Bytes of each file, by its path in the repository."""

    def __post_init__(self) -> None:
        if not hub.HUB_NAME.fullmatch(self.repo) or "/" not in self.repo:
            raise RecipeError(f"a repository on the Hub is named ORG/NAME, got {self.repo!r}.")
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        names = {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}
        sent = {name: size for name, size in names.items() if Path(name).suffix in SENT and not _hidden(name)}
        if "modules.json" not in sent:
            raise RecipeError(
                f"{self.folder} is no student: it holds no modules.json. Give the folder that a recipe wrote."
            )
        object.__setattr__(self, "files", sent)

    def __str__(self) -> str:
        width = max(map(len, self.files))
        lines = [f"  {name:{width}}  {size:>13,} bytes" for name, size in self.files.items()]
        kind = "public" if self.public else "private"
        head = f"{self.folder} -> {self.repo}, branch {self.revision} ({kind}, if it has to be made):"
        return "\n".join([head, *lines, f"  {len(lines)} files, {sum(self.files.values()) / 1e6:,.1f} MB"])


SENT = {".json", ".md", ".safetensors", ".txt", ".model", ".onnx"}


def push(upload: Upload, *, token: str | None = None) -> str:
    """Make the repository and the branch where they are not there, send the files, and give the address of the commit.

    HF_ENDPOINT and HF_TOKEN are obeyed. ResourceError with the reason and the way out for all that the Hub or the network refuses.
    """
    from huggingface_hub import HfApi

    if hub.is_offline():
        raise ResourceError("HF_HUB_OFFLINE forbids asking the Hub; unset it to upload.")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    try:
        api.create_repo(upload.repo, private=not upload.public, exist_ok=True)
        if upload.revision != "main":
            api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            revision=upload.revision,
            commit_message="Upload a student made by distill",
        )
    except Exception as error:  # whatever the hub's stack raises is sorted in hub_errors.reason
        raise ResourceError(
            f"{upload.folder} is not on the Hub as {upload.repo}: {hub_errors.reason(error, 'write')}. "
            "The same command goes on from what was sent."
        ) from error
    return str(commit.commit_url)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
