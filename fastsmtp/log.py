"""The log: one line for each event that an operator needs; the events stand here, with their help texts.

In: `write(EVENT, *values)`, which only puts a tuple on a bounded list. `flush()`, called by a timer, renders
what waits (JSON, or aligned text for people) and hands it to a thread that writes, so that the caller never
waits for a reader. What is not read fast enough is dropped and counted, and one line says how many. Nothing
that a peer sent gets out raw: values are escaped and cut, in both forms. A line is at most PIPE_BUF octets
and written whole, so the lines of several processes on one pipe never mix. One Log per process, made after
the fork, used by one thread. Errors of the descriptor are not raised: their lines count as dropped. Which
values may be logged is not decided here.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from enum import Enum
from json.encoder import encode_basestring_ascii as quote_json
from math import isfinite
from pathlib import Path
from traceback import extract_tb

from ._files import render_line
from .outlet import Outlet, ThreadOutlet, is_file


class Level(Enum):
    """How much attention an event asks for, and its colour on a terminal (SGR parameter)."""

    INFO = "0"
    WARNING = "33"
    ERROR = "31"


class Event:
    """A kind of line: its name, the names of its values in the order of `Log.write`, and what it tells."""

    __slots__ = ("fields", "help", "json", "level", "name", "pieces")

    def __init__(self, name: str, fields: str, help_text: str, level: Level = Level.INFO) -> None:
        self.name = name
        self.fields = fields.split()
        self.help = help_text
        self.level = level
        # The line is one `%` away from its values: a dict and json.dumps cost three times as much.
        members = "".join(f',"{field}":%s' for field in self.fields)
        self.json = f'{{"time":"%s","level":"{level.name.lower()}","event":"{name}"{members}}}\n'
        self.pieces = tuple([piece.encode() for piece in self.json.split("%s")])


# Addresses stand as in SMTP, without brackets; the null reverse-path is "<>". Seconds are durations.

START = Event("start", "hostname workers data_dir addresses", "The server accepts mail.")
STOP = Event("stop", "signal", "The server was told to stop and accepts nothing more.")
STOPPED = Event("stopped", "seconds killed", "The server has ended; so many workers had to be killed.")
CANNOT_START = Event("cannot-start", "why", "The server or a worker cannot start.", Level.ERROR)
WORKER_DIED = Event(
    "worker-died",
    "worker pid why sessions restart",
    "A worker ended unasked, with so many sessions open; it is started again in `restart` seconds.",
    Level.ERROR,
)
WORKER_STUCK = Event(
    "worker-stuck", "worker pid seconds", "A worker's heartbeat stood still; it is killed.", Level.ERROR
)
RUNNER_DIED = Event(
    "runner-died", "why", "The process that runs commands of pipe transports ended; it is started again.", Level.ERROR
)

SESSION = Event(
    "session",
    "client port listener helo tls user messages seconds end",
    "A session ended; `end` is why: quit, eof, timeout, ...",
)
TLS_FAILED = Event("tls-failed", "client port listener why", "A TLS handshake did not succeed.")
TURNED_AWAY = Event(
    "turned-away",
    "client reason connections seconds",
    "In so many seconds so many connections of a client over its limits were closed at once; no client: of many.",
)
LOOKUP_FAILED = Event(
    "lookup-failed",
    "source to why answer failures",
    "Whether an address is a mailbox could not be found out, so often since the last such line; it was deferred, or "
    "accepted where the configuration says so.",
    Level.WARNING,
)
REFUSED = Event(
    "refused",
    "client stage reason reply from to",
    "A client, sender, recipient or message was refused; `from` is null where no sender was heard.",
)
AUTH_FAILED = Event(
    "auth-failed",
    "client port listener mechanism user reason reply",
    "A client could not prove who it is; `user` is who it said it was.",
)
ACCEPTED = Event("accepted", "id client user from to size", "A message is kept and was answered 250.")

DELIVERED = Event("delivered", "id to transport seconds", "One recipient has it, `seconds` after it arrived.")
RELAYED = Event("relayed", "id to transport host reply seconds", "The next host took one recipient's mail.")
DEFERRED = Event(
    "deferred",
    "id to transport status why attempts retry",
    "A delivery failed for now, or was not tried because its destination is dead or busy (`attempts` are those made); "
    "it is tried again in `retry` seconds.",
    Level.WARNING,
)
FAILED = Event("failed", "id to transport status why attempts", "A recipient was given up.", Level.WARNING)
REPORTED = Event("reported", "id action recipients report to", "A message's sender is told what became of it.")
UNREPORTED = Event(
    "unreported",
    "id to status why",
    "A recipient of a message without a sender, such as a report, was given up: nobody is told.",
    Level.WARNING,
)
UNREACHABLE = Event(
    "unreachable",
    "transport destination status why failures retry",
    "Nothing that was tried reached a destination; nothing is sent there for `retry` seconds.",
    Level.WARNING,
)
REACHABLE = Event("reachable", "transport destination", "A destination that was dead can be reached.")

AUTH_TROUBLE = Event(
    "auth-trouble", "store why", "Users cannot be asked about; they hear 454 until they can.", Level.ERROR
)
AUTH_WELL = Event("auth-well", "store", "Users can be asked about again.")
QUEUE_RUN = Event("queue-run", "client node messages", "A client had the queue run for its domains (ETRN).")
TURNED = Event("turned", "client domains seconds end", "A client's server was sent what waited for it (ATRN).")

TLS_GIVEN_UP = Event(
    "tls-given-up", "host address why",
    "TLS, where it is only opportunistic, failed with a host; it is spoken to in clear for an hour.", Level.WARNING,
)  # fmt: skip

SPOOL_OPENED = Event("spool-opened", "spool messages", "A spool was opened; so many messages lay in it.")
SPOOL_TROUBLE = Event("spool-trouble", "spool where why", "The spool cannot keep mail; it is refused.", Level.ERROR)
SPOOL_WELL = Event("spool-well", "spool seconds", "The spool keeps mail again, after `seconds` of trouble.")
SPOOL_WARNING = Event(
    "spool-warning", "spool where why", "The spool keeps mail, but something wants a look.", Level.WARNING
)
SET_ASIDE = Event("set-aside", "id why path", "A message found damaged was set aside, undelivered.", Level.ERROR)

OPERATED = Event(
    "operated",
    "uid order what messages recipients under_way",
    "An operator changed the queue: so many messages, some of which were under way at that moment.",
)

ACCEPT_PAUSED = Event("accept-paused", "why", "New connections wait until there is room.", Level.WARNING)
ACCEPT_RESUMED = Event("accept-resumed", "seconds", "New connections are accepted again.")
RELOADED = Event(
    "reloaded",
    "by file changed restart",
    "New sessions are served by a new configuration. What of it needs a restart is named, and was left as it was.",
)
RELOAD_REFUSED = Event(
    "reload-refused", "by file errors", "A new configuration cannot be used; nothing was changed.", Level.ERROR
)
CERTIFICATES_RENEWED = Event(
    "certs-renewed", "files days", "Certificates were exchanged; the first of them expires in so many days."
)
CERTIFICATES_KEPT = Event(
    "certs-kept", "files why", "Changed certificates cannot be used; those before are.", Level.WARNING
)
LIST_PUBLISHED = Event("list-published", "file entries seconds", "A list's text has changed, and holds from now on.")
LIST_KEPT = Event(
    "list-kept", "file line why", "A list's text has changed and is wrong; the list before stays in force.", Level.ERROR
)
LINES_DROPPED = Event("lines-dropped", "lines", "So many lines before this were dropped.", Level.WARNING)
BUG = Event("bug", "where exception trace", "The program erred: please report this line.", Level.ERROR)


WAITING_LIMIT = 20_000  # lines that wait for a flush
OUTSTANDING_LIMIT = 1 << 20  # octets that wait for the descriptor
CLOSE_SECONDS = 2.0
# Characters of a value; of a list a sixteenth as many items are shown. A line that is longer than PIPE_BUF
# (escapes take up to twelve octets a character) is made with the next width; with the last it always fits.
WIDTHS = (512, 64, 16)


class Log:
    """Writes lines to the descriptor `fd`, which stays the caller's.

    `human`: text instead of JSON, in colour if `fd` is a terminal. `clock` gives seconds since the epoch.
    `threaded=False` is for a process that will fork: `flush` then writes itself, what there is room for.
    """

    __slots__ = (
        "_chunk", "_clock", "_colour", "_dropped", "_lines", "_millisecond", "_outlet", "_render", "_second",
        "_stamp", "_untold",
    )  # fmt: skip

    def __init__(self, fd: int, human: bool, clock: Callable[[], float], threaded: bool = True) -> None:
        self._clock = clock
        self._render = self._render_text if human else self._render_json
        self._colour = human and os.isatty(fd)
        self._lines: list[tuple[float, Event, tuple[object, ...]]] = []
        self._dropped = 0  # since the last flush
        self._untold = 0  # dropped, and no line has said so
        self._outlet: Outlet | ThreadOutlet = ThreadOutlet(fd) if threaded else Outlet(fd)
        self._chunk = OUTSTANDING_LIMIT if is_file(fd) else select.PIPE_BUF
        self._millisecond = -1
        self._second = ""
        self._stamp = ""

    def write(self, event: Event, *values: object) -> None:
        """Takes the values (str, int, float, None, tuple of str) of the event's fields, in their order."""
        lines = self._lines
        if len(lines) < WAITING_LIMIT:
            lines.append((self._clock(), event, values))
        else:
            self._dropped += 1

    @property
    def waiting(self) -> int:
        """Lines that wait for `flush`, which takes about 2 µs for each."""
        return len(self._lines)

    def flush(self) -> int:
        """Hands on what there is room for, never waiting; how many lines were dropped since the last call."""
        return self._hand_on(OUTSTANDING_LIMIT - self._outlet.outstanding())

    def close(self) -> None:
        """Writes the rest; what is not taken within 2 s is lost."""
        self._hand_on(sys.maxsize)
        self._outlet.close(CLOSE_SECONDS)

    def _hand_on(self, room: int) -> int:
        lines = self._lines
        dropped, self._dropped = self._dropped + self._outlet.take_lost(), 0
        self._untold += dropped
        if self._untold and room > 0:
            lines.append((self._clock(), LINES_DROPPED, (self._untold,)))
            self._untold = 0
        number = 0
        size = 0
        chunk: list[bytes] = []
        for number, (when, event, values) in enumerate(lines, 1):
            if room <= 0:
                number -= 1
                break
            try:
                line = self._render(when, event, values)
            except (TypeError, ValueError):  # as many values as fields: a bug elsewhere, which must not stop the log
                line = self._render(when, BUG, ("log", f"{event.name} with {len(values)} values", None))
            room -= len(line)
            size += len(line)
            if size > self._chunk:
                self._outlet.put(b"".join(chunk), len(chunk))
                chunk = []
                size = len(line)
            chunk.append(line)
        if chunk:
            self._outlet.put(b"".join(chunk), len(chunk))
        self._lines = lines[number:]
        return dropped

    def _render_time(self, when: float) -> str:
        """ISO 8601, UTC. A busy server logs many lines in a millisecond: the last stamp is kept."""
        millisecond = int(when * 1000)
        if millisecond != self._millisecond:
            if millisecond // 1000 != self._millisecond // 1000:
                self._second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(millisecond // 1000))
            self._millisecond = millisecond
            self._stamp = f"{self._second}.{millisecond % 1000:03d}Z"
        return self._stamp

    def _render_json(self, when: float, event: Event, values: tuple[object, ...]) -> bytes:
        stamp = self._render_time(when)
        line = render_line(event.pieces, stamp, values)
        return _render_with_care(event, stamp, values) if line is None else line

    def _render_text(self, when: float, event: Event, values: tuple[object, ...]) -> bytes:
        stamp = self._render_time(when)
        name = f"{event.name:<14}"
        if self._colour and event.level is not Level.INFO:
            name = f"\x1b[{event.level.value}m{name}\x1b[0m"
        pairs = [(field, value) for field, value in zip(event.fields, values, strict=True) if value is not None]
        line = b""
        for width in WIDTHS:
            shown = "".join([f" {field}={_text(value, width)}" for field, value in pairs])
            line = f"{stamp} {name}{shown}\n".encode()
            if len(line) <= select.PIPE_BUF:
                break
        return line


def open_log(form: str, threaded: bool = True) -> Log:
    """A process's log on standard output. `form`: human, json, or auto (human on a terminal)."""
    return Log(1, form == "human" or (form == "auto" and os.isatty(1)), time.time, threaded)


def trace(error: BaseException) -> tuple[str, ...]:
    """Where an exception came from, for `BUG`: file, line and function, innermost first."""
    frames = reversed(extract_tb(error.__traceback__))
    return tuple(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)


def _cut(value: str, width: int) -> str:
    return value if len(value) <= width else value[: width - 1] + "…"


def _cut_items(values: tuple[object, ...], width: int) -> list[str]:
    most = width // 16
    items = [_cut(str(value), width) for value in values[:most]]
    return items if len(values) <= most else [*items, f"and {len(values) - most} more"]


def _render_with_care(event: Event, stamp: str, values: tuple[object, ...]) -> bytes:
    """In JSON, whatever the values are; plain ones as `render_line` does it."""
    line = ""
    for width in WIDTHS:
        line = event.json % (stamp, *[_json(value, width) for value in values])
        if len(line) <= select.PIPE_BUF:
            break
    return line.encode()


def _json(value: object, width: int) -> str:
    """The escapes are ASCII throughout: no control character of any kind is left."""
    if type(value) is int:
        return str(value)
    if isinstance(value, tuple):
        return "[" + ",".join([quote_json(item) for item in _cut_items(value, width)]) + "]"
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.3f}" if isfinite(value) else "null"
    return quote_json(_cut(str(value), width))


def _text(value: object, width: int) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, tuple):
        return ",".join([_quote_text(item) for item in _cut_items(value, width)]) or "-"
    return _quote_text(_cut(str(value), width))


def _quote_text(value: str) -> str:
    """In quotes, unless it can be taken for nothing else. What is not printable is escaped: controls of all
    kinds (C0, DEL, C1, bidi), line separators, surrogates, any space but U+0020."""
    if value and value.isprintable() and not _AMBIGUOUS.intersection(value):
        return value
    return '"' + "".join([_escape(character) for character in value]) + '"'


_AMBIGUOUS = frozenset(' "\\,')


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{{{ord(character):x}}}"
