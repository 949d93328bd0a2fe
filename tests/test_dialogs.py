"""Plays dialogs/*.smtp on a fake transport and on real sockets; dialogs/README.md says how they are written."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvloop
from users import Users
from wire import R554, Bench, RecordingKeeper, bench, make_service

from fastsmtp.connection import Connection
from fastsmtp.policy.senders import Senders
from fastsmtp.reply import R250_QUEUE_RUN, R450_ATRN_REFUSED, R453_NO_MAIL, R459_NODE_REFUSED, Reply
from fastsmtp.rights import Rights
from fastsmtp.submission import Handling
from fastsmtp.verdict import STORED, Ask, NextHop, Refused, Stage, Verdict

FOLDER = Path(__file__).parent / "dialogs"
SECONDS = 10.0  # that a reply over a socket may take
READS = ("whole", "bytes", "as written")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


class ScriptError(Exception):
    """A dialog is not written as the README says."""


class Send(NamedTuple):
    """Octets, read by read."""

    reads: list[bytes]


class Expect(NamedTuple):
    """Patterns of the reply lines that come next; a pattern that ends in `-*` is a whole reply."""

    patterns: list[str]


class StoredMessage(NamedTuple):
    """None: nothing more was kept."""

    envelope: list[str] | None
    octets: bytes


class Closed(NamedTuple):
    pass


class Store(NamedTuple):
    what: str


Step = Send | Expect | StoredMessage | Closed | Store


class Dialog(NamedTuple):
    name: str
    options: dict[str, str]
    as_written_only: bool
    steps: list[Step]


ESCAPES = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}


def expand(text: str, escapes: bool) -> bytes:
    """The octets of a line of the script."""

    def unescape(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[2], 16)]) if match[2] else ESCAPES[match[1].decode()]

    def repeat(match: re.Match[bytes]) -> bytes:
        return int(match[1]) * match[2]

    octets = text.encode()
    if escapes:
        octets = re.sub(rb"\\(?:([rnt0\\])|x([0-9a-f]{2}))", unescape, octets)
    return re.sub(rb"(?s)\{(\d+)\*(.+?)\}", repeat, octets)


def parse(text: str) -> Iterator[Dialog]:
    """The dialogs of a file."""
    for part in re.split(r"(?m)^=== ", text)[1:]:
        name, _, body = part.partition("\n")
        yield parse_dialog(name.strip(), body)


def parse_dialog(name: str, body: str) -> Dialog:
    options: dict[str, str] = {}
    as_written_only = False
    steps: list[Step] = []
    for line in body.splitlines():
        word, _, rest = line.partition(" ")
        last = steps[-1] if steps else None
        if not line or line.startswith("#"):
            continue
        if word in ("C:", "C<"):
            if not isinstance(last, Send):
                last = Send([b""])
                steps.append(last)
            last.reads[-1] += expand(rest, word == "C<") + (b"\r\n" if word == "C:" else b"")
        elif line == "--" and isinstance(last, Send):
            last.reads.append(b"")
        elif word in ("S:", "S~"):
            if not isinstance(last, Expect):
                last = Expect([])
                steps.append(last)
            # Words are whole: 250 2.0 is not the beginning of 250 2.0.0.
            is_plain = word == "S:" and not rest.endswith("-*")
            last.patterns.append(rf"{re.escape(rest)}(?: .*)?" if is_plain else rest)
        elif line == "silence":
            steps.append(Expect([]))
        elif word == "stored:":
            steps.append(StoredMessage(None if rest == "nothing" else rest.split(), b""))
        elif word in ("|", "|<") and isinstance(last, StoredMessage):
            octets = expand(rest, word == "|<") + (b"\r\n" if word == "|" else b"")
            steps[-1] = last._replace(octets=last.octets + octets)
        elif line == "closed":
            steps.append(Closed())
        elif word == "store:":
            steps.append(Store(rest))
        elif word == "listener:":
            for pair in rest.split():
                option, _, options[option] = pair.partition("=")
        elif line == "reads: as written":
            as_written_only = True
        else:
            raise ScriptError(f"{name}: {line}")
    return Dialog(name, options, as_written_only, steps)


class RefuseClient:
    """A policy that refuses everyone."""

    stage = Stage.CONNECT

    def __call__(self, ask: Ask) -> Verdict:
        return Verdict("refused", R554)


class Answer:
    """What ETRN and ATRN are answered: here.test is the client's, and there is no mail for it."""

    def __init__(self, stage: Stage, granted: Reply, refused: Reply) -> None:
        self.stage = stage
        self.granted = granted
        self.refused = refused

    def __call__(self, ask: Ask) -> Verdict:
        ours = all(node in ("here.test", "@here.test", "#here") for node in ask.nodes)
        return Verdict("answered", self.granted if ours else self.refused)


FETCHING = [
    Answer(Stage.ETRN, R250_QUEUE_RUN, R459_NODE_REFUSED),
    Answer(Stage.ATRN, R453_NO_MAIL, R450_ATRN_REFUSED),
]
TRUST: dict[str, Callable[[str], bool]] = {"yes": lambda ip: True, "no": lambda ip: False}
HANDLING = {"refuse": Handling(), "add_sender": Handling("add_sender"), "off": Handling("off")}
NUMBERS = {
    "size": "message_size",
    "sessions": "session_limit",
    **{name: name for name in ("recipients", "hops", "errors", "useless", "command_line", "text_line", "header")},
}


def service_options(options: dict[str, str]) -> dict[str, Any]:
    """The arguments of make_service for the words behind `listener:`."""
    made: dict[str, Any] = {}
    for word, value in options.items():
        if word in NUMBERS:
            made[NUMBERS[word]] = int(value)
        elif word in ("role", "bare", "postmaster"):
            made[word] = value
        elif word in ("brackets", "any_octets", "bare_bdat"):
            made[word] = value == "yes"
        elif word == "early":
            made["early_refused"] = value == "refuse"
        elif word == "withheld":
            made["withheld"] = frozenset(value.split(","))
        elif word == "refused":
            made["checks"] = [RefuseClient()]
        elif word == "trusted":
            made["trusts"] = TRUST[value]
        elif word == "fetches":
            made["fetches"] = TRUST[value]
            made["checks"] = FETCHING
        elif word == "users":
            made["users"] = Users()
            made["auth_clear"] = value == "clear"
        elif word == "handling":
            made["handling"] = HANDLING[value]
            made["checks"] = [Senders(lambda _: Rights(frozenset({"ann@here.test"})))]
        elif word == "soft":
            made["soft"] = value == "yes"
        elif word == "dsn":
            made["reports"] = value
        elif word == "hop":
            size, *cannot = value.split(",")
            made["next_hop"] = NextHop(int(size), "8bit" not in cannot, "utf8" not in cannot)
        else:
            raise ScriptError(f"listener: {word}")
    return made


def set_store(keeper: RecordingKeeper, what: str) -> None:
    keeper.free, keeper.healthy, keeper.result = 1 << 40, True, STORED
    if what == "full":
        keeper.free = -1
    elif what == "sick":
        keeper.healthy = False
    elif what == "silent":
        keeper.result = Refused("unknown", None)
    elif what != "well":
        code, enhanced, text = what.split(" ", 2)
        keeper.result = Refused("refused", Reply(int(code), enhanced, text))


class Lines:
    """Holds what the server said against what it must say."""

    def __init__(self, text: bytes) -> None:
        assert text == b"" or text.endswith(b"\r\n")
        self.left = text.decode().split("\r\n")[:-1]

    def match(self, pattern: str) -> None:
        assert self.left, f"nothing was said, expected {pattern}"
        line = self.left.pop(0)
        if pattern.endswith("-*"):
            code = pattern[:-2]
            while line.startswith(f"{code}-"):
                line = self.left.pop(0)
            assert line.startswith(f"{code} "), line
        else:
            assert re.fullmatch(pattern, line), f"{line!r}, expected {pattern}"


def check_stored(step: StoredMessage, keeper: RecordingKeeper, number: int) -> int:
    """Checks the message `number` (counted from 0); the number of the next."""
    if step.envelope is None:
        assert len(keeper.kept) == number
        return number
    assert len(keeper.kept) > number, "nothing was stored"
    kept = keeper.kept[number]
    assert [kept.reverse_path, *kept.recipients] == step.envelope
    edges = [0, *(edge for cut in kept.message.cuts for edge in cut), kept.message.size]
    assert b"".join(kept.body[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)) == step.octets
    assert kept.message.size == len(kept.body)
    return number + 1


def play(dialog: Dialog, reads: str, made: Bench) -> None:
    """Without a network."""
    player = made.connect()
    stored = 0
    sent = 1  # reads since the server last had to speak; the connection itself is one
    for step in dialog.steps:
        if isinstance(step, Send):
            whole = b"".join(step.reads)
            if reads == "whole":
                pieces = [whole]
            elif reads == "bytes":
                pieces = [whole[at : at + 1] for at in range(len(whole))]
            else:
                pieces = step.reads
            for piece in pieces:
                player.send(piece)
            sent = len(pieces)
        elif isinstance(step, Expect):
            writes = player.take_writes()
            assert len(writes) <= sent, "replies of one read left in several writes"
            lines = Lines(b"".join(writes))
            for pattern in step.patterns:
                lines.match(pattern)
            assert lines.left == []
        elif isinstance(step, StoredMessage):
            stored = check_stored(step, made.keeper, stored)
        elif isinstance(step, Closed):
            assert player.transport.ended
        else:
            set_store(made.keeper, step.what)
    assert player.take() == b""
    assert player.transport.ended == any(isinstance(step, Closed) for step in dialog.steps)
    assert len(made.keeper.kept) == stored
    player.vanish()
    assert made.keeper.leaked == []
    assert made.service.connections() == []


async def play_on_socket(dialog: Dialog) -> None:
    loop = asyncio.get_running_loop()
    made = make_service(loop, **service_options(dialog.options))
    made.keeper.defer = lambda answer: loop.call_soon(answer)
    server = await loop.create_server(lambda: Connection(made.service), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=1 << 22)
    stored = 0
    try:
        for step in dialog.steps:
            if isinstance(step, Send):
                for number, piece in enumerate(step.reads):
                    if number:
                        await asyncio.sleep(0.01)
                    writer.write(piece)
            elif isinstance(step, Expect):
                for pattern in step.patterns:
                    line = await read_reply(reader, pattern.endswith("-*"))
                    lines = Lines(line)
                    lines.match(pattern)
                    assert lines.left == []
            elif isinstance(step, StoredMessage):
                stored = check_stored(step, made.keeper, stored)
            elif isinstance(step, Store):
                set_store(made.keeper, step.what)
        if writer.can_write_eof():
            writer.write_eof()
        assert await rest(reader) == b""
    finally:
        writer.close()
        server.close()
        for _ in range(500):
            if not made.service.connections():
                break
            await asyncio.sleep(0.01)
    made.check_bugs(0)
    assert made.service.connections() == []
    assert len(made.keeper.kept) == stored
    assert made.keeper.leaked == []


async def read_reply(reader: asyncio.StreamReader, whole: bool) -> bytes:
    """A reply line, or all lines of a reply."""
    reply = b""
    while True:
        line = await asyncio.wait_for(reader.readline(), SECONDS)
        assert line, "closed, and something was expected"
        reply += line
        if not whole or line[3:4] == b" ":
            return reply


async def rest(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes."""
    try:
        return await asyncio.wait_for(reader.read(), SECONDS)
    except ConnectionResetError:
        return b""


DIALOGS = [
    pytest.param(dialog, id=f"{file.stem}: {dialog.name}")
    for file in sorted(FOLDER.glob("*.smtp"))
    for dialog in parse(file.read_text())
]


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("dialog", DIALOGS)
def test_dialog(dialog: Dialog, reads: str) -> None:
    if dialog.as_written_only:
        reads = "as written"
    with bench(**service_options(dialog.options)) as made:
        play(dialog, reads, made)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dialog", DIALOGS)
def test_dialog_on_a_socket(dialog: Dialog, loop: str) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(play_on_socket(dialog))


# The player itself: each of these is wrong in one place.
WRONG = {
    "a reply that does not come": "S: 220\nC: NOOP\nS: 250\nS: 250\n",
    "a reply that is not expected": "S: 220\nC: NOOP\nC: NOOP\nS: 250\n",
    "a reply that is not expected at the end": "S: 220\nC: NOOP\n",
    "a code that is another": "S: 220\nC: NOOP\nS: 251\n",
    "half an enhanced code": "S: 220\nC: NOOP\nS: 250 2.0\n",
    "a regular expression": "S: 220\nC: NOOP\nS~ 250 OK\n",
    "a connection that is open": "S: 220\nC: NOOP\nS: 250\nclosed\n",
    "a connection that is closed": "S: 220\nC: QUIT\nS: 221\n",
    "a message that was not kept": "S: 220\nstored: <> <ann@here.test>\n| x\n",
    "a message that is not named": "S: 220\n{mail}",
    "another body": "S: 220\n{mail}stored: <> <ann@here.test>\n| y\n",
    "another envelope": "S: 220\n{mail}stored: <> <bob@here.test>\n| x\n",
    "a message too many": "S: 220\n{mail}stored: nothing\n",
}
MAIL = (
    "C: HELO c\nS: 250\nC: MAIL FROM:<>\nC: RCPT TO:<ann@here.test>\nC: DATA\nS: 250\nS: 250\nS: 354\n"
    "C: x\nC: .\nS: 250\n"
)


@pytest.mark.parametrize("script", WRONG.values(), ids=WRONG)
def test_the_player_finds_what_is_wrong(script: str) -> None:
    dialog = parse_dialog("wrong", script.replace("{mail}", MAIL))
    with bench() as made, pytest.raises((AssertionError, IndexError)):
        play(dialog, "whole", made)


def test_a_line_that_means_nothing_is_an_error() -> None:
    with pytest.raises(ScriptError):
        parse_dialog("wrong", "X: what\n")
    with pytest.raises(ScriptError):
        service_options({"colour": "blue"})


def test_octets_of_a_script() -> None:
    assert expand(r"a\r\n\0\xff\\", True) == b"a\r\n\0\xff\\"
    assert expand(r"a\r", False) == b"a\\r"
    assert expand("{3*ab}c{2*d}", False) == b"abababcdd"
