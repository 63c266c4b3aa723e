"""Programs in processes forked from one that has imported all they need: tenths of a second each in place of several.

For runs that are many and short. What a program leaves in its process still ends with it.
"""

import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class Forks:
    """A process that has imported what some scripts import, and forks for each run. Threads may call it; they take turns."""

    def __init__(self, scripts: Sequence[Path], environment: Mapping[str, str]):
        command = [sys.executable, __file__, *map(str, scripts)]
        self._said, self._turn = TemporaryDirectory(), threading.Lock()
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: Path, arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
        """Exit code, output and errors of `python script arguments` in `folder`."""
        files = {name: Path(self._said.name, name) for name in ("out", "err")}
        places = {"folder": str(folder)} | {name: str(path) for name, path in files.items()}
        with self._turn:
            assert self._server.stdin
            assert self._server.stdout
            self._server.stdin.write(json.dumps({"argv": [str(script), *arguments], **places}) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            return code, files["out"].read_text(), files["err"].read_text()

    def close(self) -> None:
        self._server.communicate()
        self._said.cleanup()


def serve(scripts: Sequence[str]) -> None:
    import datasets  # noqa: F401
    import tyro  # noqa: F401

    for script in scripts:
        runpy.run_path(script, run_name="imported")
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            _live(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _live(job: dict[str, Any]) -> None:
    code = 1
    try:
        for descriptor, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(job["folder"])
        sys.argv = job["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1:])
