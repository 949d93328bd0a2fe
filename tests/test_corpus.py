"""Real messages, sent by DATA and by BDAT, and found again octet by octet.

The corpus stands beside the project; without it these tests are skipped. Line ends are made CRLF to send, and are LF
in the Maildir. A message that mixes line ends, or holds a bare CR, is sent as it is: DATA refuses it, BDAT keeps every
octet. Some messages have lines of more than 998 octets, NULs, no header, or are no mail at all: nothing of that is
changed. Not here: what the messages mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from peer import Peer, stuff
from servers import Server, files, read_mail, running, toml

CORPUS = Path(__file__).parents[2] / "shared" / "corpus"
CONNECTIONS = 3

_BARE = re.compile(rb"(?<!\r)\n|\r(?!\n)")


class Letter(NamedTuple):
    """A message of the corpus as it is sent, and the local-part it is for."""

    path: Path
    octets: bytes
    local: str

    @property
    def is_bare(self) -> bool:
        return _BARE.search(self.octets) is not None


def read_corpus() -> list[Letter]:
    letters = []
    for number, path in enumerate(sorted(path for path in CORPUS.glob("*/**/*") if path.is_file())):
        octets = path.read_bytes()
        letters.append(Letter(path, octets if b"\r" in octets else octets.replace(b"\n", b"\r\n"), f"m{number}"))
    return letters


@pytest.fixture(scope="module")
def letters() -> list[Letter]:
    if not CORPUS.is_dir():
        pytest.skip(f"needs the corpus of real messages in {CORPUS}")
    found = read_corpus()
    assert len(found) > 900
    assert sum(letter.is_bare for letter in found) >= 5
    assert any(b"\0" in letter.octets for letter in found)
    assert any(len(line) > 998 for letter in found for line in letter.octets.split(b"\r\n"))
    assert any(not letter.octets.endswith(b"\r\n") for letter in found)
    assert any(b"\r\n." in letter.octets for letter in found)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("corpus")
    with running(folder, toml(folder, workers=2)) as found:
        yield found


def envelope(letter: Letter, domain: str) -> bytes:
    return f"MAIL FROM:<s@client.test>\r\nRCPT TO:<{letter.local}@{domain}>\r\n".encode()


def send_data(peer: Peer, letters: Sequence[Letter]) -> list[str]:
    """The replies to each end of data; the next envelope goes with it."""
    replies = []
    peer.send(envelope(letters[0], "data.test") + b"DATA\r\n")
    for letter, following in zip(letters, [*letters[1:], None], strict=True):
        assert [reply[:3] for reply in peer.replies(3)] == ["250", "250", "354"]
        peer.send(stuff(letter.octets) + (envelope(following, "data.test") + b"DATA\r\n" if following else b""))
        replies.append(peer.reply())
    return replies


def send_bdat(peer: Peer, letters: Sequence[Letter]) -> list[str]:
    """The replies to each last chunk; several messages leave in one write, in chunks of two thirds."""
    replies = []
    for start in range(0, len(letters), 10):
        group = letters[start : start + 10]
        out = b""
        for letter in group:
            cut = len(letter.octets) * 2 // 3
            first, last = letter.octets[:cut], letter.octets[cut:]
            out += envelope(letter, "bdat.test")
            out += b"BDAT %d\r\n%sBDAT %d LAST\r\n%s" % (len(first), first, len(last), last)
        peer.send(out)
        for _ in group:
            *before, last_reply = peer.replies(4)
            assert [reply[:3] for reply in before] == ["250", "250", "250"]
            replies.append(last_reply)
    return replies


def send(server: Server, how: str, letters: Sequence[Letter]) -> dict[str, str]:
    """The reply to each message, by its local-part; over some connections that stay open."""
    answered = {}
    for number in range(CONNECTIONS):
        share = letters[number::CONNECTIONS]
        with Peer(server.address) as peer:
            replies = send_data(peer, share) if how == "data" else send_bdat(peer, share)
            answered.update({letter.local: reply for letter, reply in zip(share, replies, strict=True)})
            assert peer.ask("QUIT").startswith("221 ")
    return answered


def found_in(server: Server, domain: str) -> dict[str, bytes]:
    """The sender's octets of each message, by its local-part."""
    found: dict[str, bytes] = {}
    for path in files(server.mail):
        folder = path.parent.parent
        if folder.parent.name == domain:
            assert folder.name not in found, f"{path} is the second"
            mail = read_mail(path)
            assert mail.recipient == f"{folder.name}@{domain}"
            found[folder.name] = mail.body
    return found


def differing(letters: Sequence[Letter], expected: dict[str, bytes], found: dict[str, bytes]) -> list[Path]:
    return [letter.path for letter in letters if found.get(letter.local) != expected.get(letter.local)]


def test_by_data(server: Server, letters: list[Letter]) -> None:
    answered = send(server, "data", letters)
    expected = {}
    for letter in letters:
        reply = answered[letter.local]
        if letter.is_bare:
            assert reply.startswith("550 5.5.2 "), (letter.path, reply)
            continue
        assert reply.startswith("250 2.0.0 "), (letter.path, reply)
        end = b"" if letter.octets.endswith(b"\r\n") or not letter.octets else b"\r\n"
        expected[letter.local] = (letter.octets + end).replace(b"\r\n", b"\n")
    server.wait(lambda: len(list(server.mail.glob("data.test/*/new/*"))) >= len(expected), "all messages")
    assert differing(letters, expected, found_in(server, "data.test")) == []


def test_by_bdat(server: Server, letters: list[Letter]) -> None:
    answered = send(server, "bdat", letters)
    for letter in letters:
        assert answered[letter.local].startswith("250 2.0.0 "), (letter.path, answered[letter.local])
    expected = {
        letter.local: letter.octets if letter.is_bare else letter.octets.replace(b"\r\n", b"\n") for letter in letters
    }
    server.wait(lambda: len(list(server.mail.glob("bdat.test/*/new/*"))) >= len(expected), "all messages")
    assert differing(letters, expected, found_in(server, "bdat.test")) == []
