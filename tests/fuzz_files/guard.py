# SPDX-License-Identifier: MIT
"""What a case may not do: run what a file says, write outside its folder, start programs, speak to the network."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz.runner import Outcome

from dalle_fast.errors import UserError

CANARY = "canary-has-run"
LONGEST = 4000  # characters of an error that people are to read

_WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
           "os.chown", "shutil.rmtree", "shutil.move", "os.setxattr"}  # fmt: skip
_NEVER = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen",
          "socket.connect", "socket.getaddrinfo", "urllib.Request", "ctypes.dlopen"}  # fmt: skip


class Canary:
    """Whoever unpickles it leaves a file in the working folder."""

    def __reduce__(self) -> tuple:
        return open, (CANARY, "w")


def canary_pickle(protocol: int = 2) -> bytes:
    """Bytes that leave a trace when they are unpickled."""
    return pickle.dumps(Canary(), protocol)


class _Watch:
    """An audit hook cannot be taken off again: one for the process, at work while a case runs."""

    def __init__(self) -> None:
        self.roots: tuple[str, ...] = ()
        self.breaches: list[str] = []
        self.installed = False

    @contextlib.contextmanager
    def over(self, *roots: Path) -> Iterator[list[str]]:
        if not self.installed:
            sys.addaudithook(self._event)
            self.installed = True
        self.breaches = []
        self.roots = tuple(os.path.realpath(root) for root in roots) + ("/dev/null", "/dev/tty")
        try:
            yield self.breaches
        finally:
            self.roots = ()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """While a case lays out its files."""
        roots, self.roots = self.roots, ()
        try:
            yield
        finally:
            self.roots = roots

    def _event(self, name: str, args: tuple) -> None:
        if not self.roots:
            return
        if name in _NEVER and not (name == "ctypes.dlopen" and args[0] is None):
            self._stop(f"{name} {args!r}"[:300])
        elif name == "open":
            path, mode, flags = args
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and isinstance(path, (str, bytes, os.PathLike)):
                self._path(f"open {mode}", path)
        elif name in _WRITES:
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    self._path(name, path)

    def _path(self, what: str, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path))
        if not any(real == root or real.startswith(root + "/") for root in self.roots):
            self._stop(f"{what} {real}")

    def _stop(self, breach: str) -> None:
        """Tells of it, and keeps it from happening: this machine is still needed."""
        self.breaches.append(breach)
        raise PermissionError(errno.EPERM, "kept from it by the fuzzer", breach)


WATCH = _Watch()


def judged(act: Callable[[Path], str | None], names: Callable[[str, Path], bool] | None = None) -> Outcome:
    """Runs `act` in an empty folder, which is the working folder meanwhile.

    Args:
        act: returns what is wrong, or None. A UserError is a refusal, of one line; any other exception is wrong.
        names: whether the text of a refusal says where the mistake is; None: it has to name a path in the folder.

    Returns:
        "right", "refused", or "raw", "words", "wrong", "breach", "canary".
    """
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        folder = root / "case"  # .. is still ours
        folder.mkdir()
        before = os.getcwd()
        os.chdir(folder)
        stack.callback(os.chdir, before)
        with WATCH.over(root) as breaches:
            outcome = _called(act, folder)
        if outcome.kind == "refused" and not (names(outcome.text, folder) if names else str(folder) in outcome.text):
            outcome = Outcome("words", f"does not say where: {outcome.text}")
        if (folder / CANARY).exists() or any("pickle" in breach for breach in breaches):
            return Outcome("canary", f"a file's code was run; {breaches}")
        if breaches:
            return Outcome("breach", f"{breaches[:3]}; {outcome}")
        return outcome


def _called(act: Callable[[Path], str | None], folder: Path) -> Outcome:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = act(folder)
    except UserError as error:
        return refusal(str(error))
    except BaseException:
        return Outcome("raw", _short_trace())
    return Outcome("wrong", wrong) if wrong else Outcome("right")


def refusal(text: str) -> Outcome:
    """A message for people is one line."""
    if not text.strip() or "\n" in text.strip() or len(text) > LONGEST:
        return Outcome("words", f"{len(text)} characters, {text.count(chr(10))} line breaks: {text[:300]!r}")
    return Outcome("refused", text)


def _short_trace() -> str:
    lines = traceback.format_exc().strip().splitlines()
    return "\n".join(lines[-14:])[-1500:]
