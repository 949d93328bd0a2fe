"""When lists are compiled: before a configuration is used, and when their text changes while the server runs.

In: a configuration. Out: compiled files that all workers take (lists.py). A `Preparation` is done when every list is
there in its present version, or ends with the first ListError, and nothing was published then that is not whole. A
`Watcher`, which the supervisor has, looks at the text files once a second; a file that has changed, and then not for a
second, is compiled. Both are asked in the supervisor's rounds: 10,000,000 lines take 10 seconds, and nobody waits.
What is wrong is logged once, with file and line; the version before stays in force. So it does when a list has lost
over half of its entries: somebody may be writing it still, and what is missing would be refused for good. Compiled
files of lists that the configuration in force does not name are removed: at the start, and when a reload has come true.
All is done in forked processes, as the user that the workers are: whoever forks them has one thread. fork(2).
Not here: what is read and written (list_compile.py).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeAlias, get_args

from . import log as logs
from ._shared import die_with_parent
from .config import Config, InFile
from .list_compile import compile_list
from .lists import Kind, ListError, ListFile, Stamp, read_header, stamp_of
from .toml_lines import Place

FOLDER = "lists"  # in data_dir
SECONDS = 1.0  # between two looks
SMALL = 20  # entries: a list that has fewer may lose any number


Become: TypeAlias = Callable[[], None] | None  # None: it stays who it is
Said: TypeAlias = dict[str, int | str]  # what a process answers

# What stands in the folder: compiled lists, and those that a process has begun
_COMPILED = re.compile(rf"(?:{'|'.join(get_args(Kind))})-[0-9a-f]{{16}}(?:\.(\d+)\.tmp)?")


def lists_of(config: Config) -> Iterator[tuple[Place, ListFile]]:
    """The lists that a configuration names, and where."""
    for i, domain in enumerate(config.domain):
        if isinstance(domain.recipients, InFile):
            kind: Kind = "mailboxes-case" if domain.case_sensitive else "mailboxes"
            yield ("domain", i, "recipients"), ListFile(kind, domain.recipients.path)
        if domain.aliases is not None:
            yield ("domain", i, "aliases"), ListFile("aliases", domain.aliases)
    if config.alias.file is not None:
        yield ("alias", "file"), ListFile("aliases", config.alias.file)
    if isinstance(config.inbound.exceptions, InFile):
        yield ("inbound", "exceptions"), ListFile("networks", config.inbound.exceptions.path)
    for i, rule in enumerate(config.rule):
        parts: tuple[tuple[str, object, Kind], ...] = (
            ("client", rule.client, "networks"),
            ("helo", rule.helo, "names"),
            ("sender", rule.sender, "addresses"),
            ("recipient", rule.recipient, "addresses"),
        )
        for key, value, what in parts:
            if isinstance(value, InFile):
                yield ("rule", i, key), ListFile(what, value.path)


def files_of(config: Config) -> list[ListFile]:
    return list(dict.fromkeys(file for _, file in lists_of(config)))


def folder_of(config: Config) -> Path:
    return config.data_dir / FOLDER


def check_lists(config: Config) -> Iterator[tuple[Place, str]]:
    """What is wrong with lists that are not compiled yet; nothing is written."""
    for place, file in lists_of(config):
        if not _is_current(file, folder_of(config)):
            try:
                compile_list(file, None)
            except ListError as error:
                yield place, str(error)


def _is_current(file: ListFile, folder: Path) -> bool:
    header = read_header(file.compiled(folder))
    try:
        return header is not None and header.kind == file.kind and header.stamp == stamp_of(file.path.stat())
    except OSError:
        return False


def _others(config: Config) -> list[Path]:
    """Compiled files of lists that a configuration does not name, and what killed processes have left of such."""
    folder = folder_of(config)
    named = {file.compiled(folder).name for file in files_of(config)}
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        ours = _COMPILED.fullmatch(path.name)
        writes = ours is not None and ours[1] is not None and Path("/proc", ours[1]).exists()
        if ours is not None and path.name.partition(".")[0] not in named and not writes:
            found.append(path)
    return found


def _half_of(file: ListFile, folder: Path) -> int:
    """Of the entries that are in force; 0: of a small list."""
    header = read_header(file.compiled(folder))
    return (header.total + 1) // 2 if header is not None and header.total >= SMALL else 0


class _Child(NamedTuple):
    """A process that compiles, and the memory that it answers in."""

    pid: int
    answer: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.answer)


def _fork(work: Callable[[], Said], become: Become) -> _Child:
    answer = os.memfd_create("list")
    try:
        pid = os.fork()
    except OSError:
        os.close(answer)
        raise
    if pid == 0:
        _work_and_exit(work, become, answer)
    return _Child(pid, answer)


def _work_and_exit(work: Callable[[], Said], become: Become, answer: int) -> NoReturn:
    """The child: it keeps nothing open of its parent's, or clients would wait at a socket that nobody accepts from."""
    code = 1
    try:
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (0, 1, 2, answer):
                try:
                    os.close(int(name))
                except OSError:
                    pass  # the folder itself
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        if become is not None:
            become()
        die_with_parent(signal.SIGKILL)
        os.nice(5)
        os.write(answer, json.dumps(work()).encode())
        code = 0
    finally:
        os._exit(code)


def _compile(file: ListFile, folder: Path, fewest: int = 0) -> Said:
    try:
        return {"entries": compile_list(file, folder, fewest)}
    except ListError as error:
        return {"line": error.line, "error": error.message}
    except OSError as error:
        return {"line": 0, "error": f"its compiled form cannot be written to {folder}: {error.strerror}"}


def _remove(files: Sequence[Path]) -> Said:
    for file in files:
        file.unlink(missing_ok=True)
    return {}


def _take_answer(child: _Child, file: ListFile, *, wait: bool) -> int | None:
    """How many entries the list has; None: it is not compiled yet. Raises ListError."""
    pid, status = os.waitpid(child.pid, 0 if wait else os.WNOHANG)
    if not pid:
        return None
    said = os.pread(child.answer, 1 << 16, 0)
    os.close(child.answer)
    if not said:
        raise ListError(file.path, 0, f"the process that compiles it ended with {os.waitstatus_to_exitcode(status)}")
    answer = json.loads(said)
    if "error" in answer:
        raise ListError(file.path, answer["line"], answer["error"])
    return int(answer["entries"])


class Preparation:
    """Compiles what of a configuration is not there, or of another version than its text; elsewhere where a `folder` is
    named. `become` makes the processes that do it, one after the other, the user who serves."""

    def __init__(self, config: Config, become: Become = None, folder: Path | None = None) -> None:
        self._folder = folder or folder_of(config)
        self._become = become
        self._left = [file for file in files_of(config) if not _is_current(file, self._folder)]
        self._child: _Child | None = None  # compiles the first that is left

    def advance(self, *, wait: bool = False) -> bool:
        """Whether every list is there. Raises ListError, and OSError when there is no process: it is over then."""
        while self._left:
            file = self._left[0]
            child = self._child or _fork(partial(_compile, file, self._folder), self._become)
            self._child = None
            if _take_answer(child, file, wait=wait) is None:
                self._child = child
                return False
            del self._left[0]
        return True

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class Watcher:
    """Compiles lists whose text has changed. `become` as for `Preparation`; nothing here waits. `on_kept` is called
    when a list stays as it was, because it is wrong now."""

    def __init__(self, log: logs.Log, become: Become = None) -> None:
        self._log = log
        self.on_kept: Callable[[], None] = lambda: None
        self._become = become
        self._child: tuple[_Child, ListFile, float] | None = None  # and when it began
        self._done: dict[ListFile, Stamp | None] = {}  # published, or found wrong
        self._missed: dict[ListFile, Stamp | None] = {}  # compiled again, because what was compiled was gone
        self._seen: dict[ListFile, Stamp | None] = {}  # when it was last looked at
        self._looked = 0.0

    def look_after(self, config: Config, now: float) -> None:
        """Called often; `now` is monotonic."""
        if self._child is not None:
            self._end(*self._child)
        elif now - self._looked >= SECONDS:
            self._looked = now
            self._look(files_of(config), folder_of(config), now)

    def remove_others(self, config: Config) -> None:
        """Removes compiled files of lists that a configuration in force does not name. Never while a reload is under
        way, which may name them. What cannot be removed is left for the next time."""
        try:
            if others := _others(config):
                child = _fork(partial(_remove, others), self._become)
                os.waitpid(child.pid, 0)
                os.close(child.answer)
        except OSError:
            pass

    def close(self) -> None:
        if self._child is not None:
            self._child[0].kill()
            self._child = None

    def _look(self, files: Sequence[ListFile], folder: Path, now: float) -> None:
        for file in files:
            try:
                stamp: Stamp | None = stamp_of(file.path.stat())
            except OSError:
                stamp = None
            if file not in self._done:
                header = read_header(file.compiled(folder))
                self._done[file] = header.stamp if header is not None else None
            elif self._missed.get(file) != stamp and not file.compiled(folder).exists():
                self._missed[file] = stamp  # somebody has removed it: a worker could not start again
                self._done[file] = None
            seen = self._seen.get(file, stamp)
            self._seen[file] = stamp
            if stamp == seen and stamp != self._done[file]:
                self._done[file] = stamp
                if _is_current(file, folder):  # a reload has done it
                    continue
                try:
                    work = partial(_compile, file, folder, _half_of(file, folder))
                    self._child = (_fork(work, self._become), file, now)
                except OSError as error:
                    self._log.write(logs.LIST_KEPT, str(file.path), 0, f"no process compiles it: {error.strerror}")
                return

    def _end(self, child: _Child, file: ListFile, began: float) -> None:
        try:
            entries = _take_answer(child, file, wait=False)
            if entries is None:
                return
            self._missed.pop(file, None)
            self._log.write(logs.LIST_PUBLISHED, str(file.path), entries, time.monotonic() - began)
        except ListError as error:
            self._log.write(logs.LIST_KEPT, error.file, error.line, error.message)
            self.on_kept()
        self._child = None
