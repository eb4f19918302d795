"""`--base REF`: the same cases at another revision, by a second process that takes its turn after each measurement.

The revision is checked out into a temporary `git worktree`; the process imports `opensora_kernels` from there and this
bench from here, and answers one line of JSON for each line that asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[1]


class Base:
    """A context manager; `measure` never raises, and says why it has no time."""

    def __init__(self, revision: str, *, device: str, dtype: str, seconds: float | None, copies: int) -> None:
        """Raises ValueError when git does not know `revision`."""
        found = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
        if found.returncode:
            raise ValueError(f"--base: git knows no revision {revision!r} in {ROOT}")
        self.revision, self.commit = revision, found.stdout.strip()
        self._common = {"device": device, "dtype": dtype, "seconds": seconds, "copies": copies}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Base:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-base-")
        tree, packages = Path(self._folder.name, "tree"), Path(self._folder.name, "packages")
        made = _git("worktree", "add", "--detach", str(tree), self.commit)
        if made.returncode:
            self._folder.cleanup()
            raise ValueError(f"--base: git worktree failed: {made.stderr.strip()}")
        packages.mkdir()
        # of that revision this package alone: the bench is ours
        (packages / "opensora_kernels").symlink_to(tree / "opensora_kernels", target_is_directory=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (packages, ROOT)))}
        self._log = Path(self._folder.name, "log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.base"],
            cwd=packages,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is ours to answer
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._log.close()
        _git("worktree", "remove", "--force", str(Path(self._folder.name, "tree")))
        self._folder.cleanup()

    def measure(self, **question: Any) -> dict[str, Any]:
        """`median` and more, or `skipped`, `wrong` or `failed` with the reason."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({**self._common, **question}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        return json.loads(answer) if answer else {"failed": f"{self.revision} does not run: {self._last_words()}"}

    def _last_words(self) -> str:
        self._log.seek(0)
        return (self._log.read().strip().splitlines() or ["it ended without a word"])[-1]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    from bench.cases import DTYPES, chosen_cases
    from bench.measure import Ceilings
    from bench.workload import Workload, of_backend
    from opensora_kernels import backends

    op, name, device = question["op"], question["case"], question["device"]
    if op not in backends.ops():
        return {"skipped": f"there was no operator {op}"}
    cases = chosen_cases(op, [name], device)
    if not cases:
        return {"skipped": f"{op} had no case {name}"}
    if question["backend"] not in backends.backends_of(op):
        return {"skipped": f"{op} had no backend {question['backend']}"}
    dtype, direction = DTYPES[question["dtype"]], question["direction"]
    workload = Workload(op, cases[0], dtype, device, direction, most_copies=question["copies"])
    reason = workload.why_not(question["backend"])
    if reason is not None:
        return {"skipped": reason}
    # floors are computed by who asks
    found = workload.measure(of_backend(op, question["backend"]), Ceilings(1.0, 1.0), seconds=question["seconds"])
    if found.get("bytes", question["bytes"]) != question["bytes"]:
        return {"skipped": f"the case moved {found['bytes']} bytes there, {question['bytes']} here"}
    return found


def main(lines: Sequence[str] | None = None) -> None:
    talk, sys.stdout = sys.stdout, sys.stderr  # whoever prints below does not disturb the answers
    for text in sys.stdin if lines is None else lines:
        try:
            found = answer(json.loads(text))
        except Exception as error:  # an older revision may fail in any way, and the next question may not
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(found), file=talk, flush=True)


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    main()
