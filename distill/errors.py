"""What can go wrong at a boundary, each kind with the exit code that a recipe ends with.

Losses and similarities raise plain ValueError and TypeError. The classes below are for what comes from outside: recipes,
texts, stores, the hub. A message says what was expected, what came, where, and the one command or change that mends it.
"""

import errno
import sys
from collections.abc import Callable

FULL = {errno.ENOSPC, errno.EDQUOT}
OF_THE_DISK = FULL | {errno.EACCES, errno.EPERM, errno.EROFS}


class DistillError(Exception):
    """Base of the errors that a recipe reports in one message, without a traceback."""

    exit_code = 1


class RecipeError(DistillError, ValueError):
    """A recipe, flag or combination of options that cannot run."""

    exit_code = 2


class DataError(DistillError, ValueError):
    """Texts, pairs or labels that cannot be used; the message names file, row and column."""

    exit_code = 3


class IntegrityError(DistillError):
    """A store, checkpoint or model folder that is damaged or belongs to something else."""

    exit_code = 4


class NumericsError(DistillError, ArithmeticError):
    """A loss, gradient or vector that is not finite, or a teacher whose vectors carry no information."""

    exit_code = 5


class ResourceError(DistillError, OSError):
    """The machine or the hub said no: disk, permission, network."""

    exit_code = 6


class GateMissed(DistillError):
    """A run that is done and written, whose scores do not reach what a --gate asks."""

    exit_code = 7


class Stopped(BaseException):
    """The run was asked to stop (Ctrl-C: 130, SIGTERM: 143); its state is saved and it can be resumed.

    No `except Exception` on the way may take it for a failure of what was being done.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message, exit_code)  # both, so that it can be sent to other processes
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def explained(error: OSError) -> str:
    """What the system said, and of which file: of two, as where one takes another's place, the second."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        reason += "; free some space there"
    name = error.filename2 or error.filename
    return f"{name}: {reason}." if name else f"{reason}."


def disk_reason(error: OSError) -> str:
    """Why something cannot be written, as part of a sentence."""
    if error.errno in FULL:
        return f"the disk is full ({error.strerror})"
    if error.errno in OF_THE_DISK:
        return f"no permission to write ({error.filename2 or error.filename or error.strerror})"
    return str(error)


def reported(main: Callable[[], int]) -> int:
    """The exit code that `main` returns, or that of its error, which is said on stderr in one message."""
    try:
        return main()
    except DistillError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        code, message = ResourceError.exit_code, explained(error)
    print(f"error: {message}", file=sys.stderr)
    return code
