"""Plays scripts of what a host says against the client dialogue, without a network.

| line | meaning |
|---|---|
| `S: text`, `S< octets` | the host says this line, these octets as they are |
| `C: text`, `C< octets` | and then we must say this, all of it |
| `terms: word word` | first, where not plain: lmtp starttls= login= eight_bit= bare= ignore= recipients= |
| `channel: secure trusted` | TLS from the start; credentials may be given |
| `mail: <from> <to> <to>` | a delivery; its octets in lines of `|` and `|<`, else `Hi` |
| | behind an address NOTIFY= ORCPT=, behind all RET= ENVID= utf8 binary requiretls probe |
| `tls: trusted`, `tls: unverified`, `tls: failed` | what came of the handshake |
| `hang-up`, `time-out`, `quit` | what befalls the session |
| `outcome: failed 5.1.1 recipient next-host` | the next recipient's result, status, scope, next try, `relayed` |
| `said: text` | the reply in the outcome before |
| `ready`, `closed` | the dialogue's state |
| `reads: as written` | cut elsewhere the octets would mean something else |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fastsmtp.address import NULL, Address, parse_address
from fastsmtp.delivery import Delivery, Outcome, Retry
from fastsmtp.delivery.dialogue import Dialogue, Step
from fastsmtp.delivery.login import Credentials
from fastsmtp.delivery.offers import Terms
from fastsmtp.message import Content, Envelope, Message, Recipient

RETRIES = {Retry.SAME_HOST: " same-host", Retry.NEXT_HOST: " next-host", Retry.LATER: ""}
_ESCAPE = re.compile(rb"\\(r|n|0|\\|x[0-9a-f]{2})")
_REPEAT = re.compile(rb"\{(\d+)\*([^}]*)\}")


def expand(text: str, escapes: bool) -> bytes:
    raw = text.encode()
    if escapes:
        plain = {b"r": b"\r", b"n": b"\n", b"0": b"\0", b"\\": b"\\"}
        raw = _ESCAPE.sub(lambda match: plain.get(match[1]) or bytes([int(match[1][1:], 16)]), raw)
    return _REPEAT.sub(lambda match: match[2] * int(match[1]), raw)


def make_message(
    reverse_path: Address, recipients: list[Recipient], octets: bytes = b"Hi\r\n", prefix: bytes = b""
) -> Message:
    """Its Content as the parser would find it."""
    envelope = Envelope(reverse_path)
    envelope.id = "made"
    envelope.recipients = recipients
    content = Content.NONE
    header, _, body = octets.partition(b"\r\n\r\n")
    if not header.isascii():
        content |= Content.EIGHT_BIT_HEADER
    if not body.isascii():
        content |= Content.EIGHT_BIT
    if re.search(rb"\r(?!\n)|(?<!\r)\n", octets):
        content |= Content.BARE
    return Message(envelope, prefix, [octets], len(octets), len(header), content, 0.0)


def make_address(text: str) -> Address:
    return parse_address(text) if text else NULL


def make_delivery(words: str, octets: bytes) -> tuple[Delivery, bool]:
    """A delivery by the words behind `mail:`, and whether it requires TLS."""
    addresses = re.findall(r"<([^>]*)>((?: (?:NOTIFY|ORCPT)=\S+)*)", words)
    recipients = []
    for text, parameters in addresses[1:]:
        values = dict(word.split("=", 1) for word in parameters.split())
        recipients.append(Recipient(make_address(text), values.get("NOTIFY", ""), values.get("ORCPT", "")))
    message = make_message(make_address(addresses[0][0]), recipients, octets)
    flags = words.split()
    message.envelope.utf8 = "utf8" in flags
    for word in flags:
        if word.startswith("RET="):
            message.envelope.ret = word[4:]
        elif word.startswith("ENVID="):
            message.envelope.envid = word[6:]
    if "binary" in flags:
        message.content |= Content.BINARY
    return Delivery(message, recipients, list(range(len(recipients))), "probe" in flags), "requiretls" in flags


def make_terms(words: str) -> Terms:
    made: dict[str, Any] = {}
    for word in words.split():
        name, _, value = word.partition("=")
        if name == "lmtp":
            made["lmtp"] = True
        elif name == "login":
            made["credentials"] = Credentials("ann", "secret", tuple(value.split(",")))
        elif name == "ignore":
            made["ignore"] = frozenset(value.split(","))
        elif name == "recipients":
            made["recipients"] = int(value)
        else:
            assert name in ("starttls", "eight_bit", "bare"), word
            made[name] = value
    return Terms("me.test", **made)


class Script(NamedTuple):
    name: str
    as_written_only: bool
    lines: list[tuple[str, str]]


def parse_scripts(text: str) -> Iterator[Script]:
    for part in re.split(r"(?m)^=== ", text)[1:]:
        name, _, body = part.partition("\n")
        lines = []
        for line in body.splitlines():
            if line and not line.startswith("#"):
                word, _, rest = line.partition(" ")
                lines.append((word, rest))
        as_written = ("reads:", "as written") in lines
        yield Script(name, as_written, [line for line in lines if line[0] != "reads:"])


def describe(outcome: Outcome) -> str:
    relayed = " relayed" if outcome.relayed else ""
    return f"{outcome.result.value} {outcome.status} {outcome.scope.value}{RETRIES[outcome.retry]}{relayed}"


class Player:
    """One dialogue, and what it has said since it was last looked at."""

    def __init__(self, terms: Terms, channel: str = "") -> None:
        words = channel.split()
        self.dialogue = Dialogue(terms, "mx.test", secure="secure" in words, trusted="trusted" in words)
        self.said = b""
        self.step = Step.WAIT
        self.runs: list[int] = [0]  # octets that the host said at once

    def took(self, step: Step) -> None:
        """Writes and pumps, as a transport does."""
        dialogue = self.dialogue
        self.said += b"".join(dialogue.take_output())
        while step is Step.BODY:
            body = dialogue.body
            assert body is not None
            step = dialogue.send_piece(body.read())
            self.said += b"".join(dialogue.take_output())
        self.step = step
        assert (step is Step.CLOSE) == dialogue.closed
        if not dialogue.closed:
            assert dialogue.patience > 0


def play(script: Script, cut: int | None, at: int = 0) -> Player:
    """`cut`: octets in a read; None: all that the host says at once. `at`: the first read's octets, where not 0."""
    lines = list(script.lines)
    terms = make_terms(lines.pop(0)[1] if lines[0][0] == "terms:" else "")
    channel = lines.pop(0)[1] if lines[0][0] == "channel:" else ""
    player = Player(terms, channel)
    dialogue = player.dialogue
    outcomes: list[Outcome] = []
    last: Outcome | None = None
    while lines:
        word, rest = lines.pop(0)
        if word in ("S:", "S<"):
            octets = expand(rest, word == "S<") + (b"\r\n" if word == "S:" else b"")
            while lines and lines[0][0] in ("S:", "S<"):
                word, rest = lines.pop(0)
                octets += expand(rest, word == "S<") + (b"\r\n" if word == "S:" else b"")
            player.runs.append(len(octets))
            first = min(at, len(octets))
            size = cut or max(len(octets), 1)
            reads = [octets[:first]] if first else []
            reads += [octets[start : start + size] for start in range(first, len(octets), size)]
            for read in reads:
                player.took(dialogue.feed(read))
            outcomes = list(dialogue.outcomes)
        elif word in ("C:", "C<"):
            wanted = expand(rest, word == "C<") + (b"\r\n" if word == "C:" else b"")
            while lines and lines[0][0] in ("C:", "C<"):
                word, rest = lines.pop(0)
                wanted += expand(rest, word == "C<") + (b"\r\n" if word == "C:" else b"")
            assert player.said == wanted
            player.said = b""
        elif word == "mail:":
            assert outcomes == []
            octets = b""
            while lines and lines[0][0] in ("|", "|<"):
                mark, text = lines.pop(0)
                octets += expand(text, mark == "|<") + (b"\r\n" if mark == "|" else b"")
            delivery, require_tls = make_delivery(rest, octets or b"Hi\r\n")
            player.took(dialogue.send(delivery, require_tls=require_tls))
            outcomes = list(dialogue.outcomes)
        elif word == "tls:":
            step = (
                dialogue.tls_failed("bad certificate") if rest == "failed" else dialogue.tls_started(rest == "trusted")
            )
            player.took(step)
            outcomes = list(dialogue.outcomes)
        elif word in ("hang-up", "time-out"):
            player.took(dialogue.lost() if word == "hang-up" else dialogue.timed_out())
            outcomes = list(dialogue.outcomes)
        elif word == "outcome:":
            assert outcomes, f"no outcome, expected {rest}"
            last = outcomes.pop(0)
            assert describe(last) == rest, last.text
        elif word == "said:":
            assert last is not None
            assert last.reply == rest
        elif word == "quit":
            player.took(dialogue.quit())
        elif word == "ready":
            assert player.step is Step.READY
            assert dialogue.reusable
        elif word == "closed":
            assert dialogue.closed
        else:
            raise AssertionError(f"{word} {rest}")
    assert player.said == b""
    assert outcomes == []
    assert dialogue.closed == (script.lines[-1][0] == "closed")
    return player
