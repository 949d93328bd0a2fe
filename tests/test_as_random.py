"""`check --as` and a running server are one: for random envelopes, of every kind that has fooled a mail server, both
say the same, word for word, and the log has the reasons that `check --as` has told.

The server knows mailboxes from a file, from SQL, from a server that is asked and from one that is down; it has aliases,
a list, catch-all, details and rules of every stage. The clients come from addresses of the loopback network.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import apsw
from peer import Peer
from servers import running

from fastsmtp.as_command import Decision, parse_wishes, play
from fastsmtp.config import load

CONFIGURATION = """\
hostname = "mx.here.test"
data_dir = "data"
workers = 1
postmaster = "ann@listed.test"

[[listener]]
address = ["127.0.0.1:0", "[::1]:0"]
early_talker = "allow"

[limits]
errors = 1000
useless = 1000

[relay]
networks = ["127.9.0.0/16"]
transport = "out"

[inbound]
messages = "100000/m"
exceptions = {{file = "free"}}

[[rule]]
client = ["127.66.0.0/16"]
helo = ["friend.test"]
action = "allow"

[[rule]]
name = "blocked"
client = {{file = "blocked"}}
action = "refuse"

[[rule]]
name = "dynamic"
helo = ["*.dyn.test", "*.xn--dyn-hoa.test"]
action = "defer"

[[rule]]
name = "forged"
sender = ["listed.test", "<>"]
recipient = ["bob@listed.test", "*.sub.test"]
action = "refuse"

[[rule]]
name = "slow"
sender = {{file = "slow"}}
action = "defer"

[[domain]]
name = "listed.test"
recipients = {{file = "mailboxes"}}
detail = "+"
transport = "boxes"

[[domain]]
name = "*.sub.test"
recipients = {{file = "mailboxes-case"}}
case_sensitive = true
transport = "boxes"

[[domain]]
name = "sql.test"
recipients = {{sql = "users", query = "SELECT 1 FROM box WHERE local = :local AND domain = :domain"}}
catch_all = "rest@listed.test"
transport = "boxes"

[[domain]]
name = "wrong.test"
recipients = {{sql = "users", query = "SELECT 1 FROM nothing WHERE local = :local"}}
catch_all = "rest@listed.test"
transport = "boxes"

[[domain]]
name = "asked.test"
recipients = {{ask = "asked"}}
detail = "-"
transport = "asked"

[[domain]]
name = "down.test"
recipients = {{ask = "down"}}
catch_all = "rest@listed.test"
transport = "down"

[[domain]]
name = "bücher.test"
recipients = ["ann", "jörg"]
catch_all = "team@listed.test"
transport = "boxes"

[[domain]]
name = "[127.0.0.1]"
recipients = "any"
transport = "boxes"

[sql.users]
database = "users.db"

[alias]
file = "aliases"
members = 3

[transport.boxes]
type = "maildir"
path = "mail/{{domain}}/{{local}}"

[transport.out]
type = "discard"

[transport.asked]
type = "lmtp"
address = "unix:{folder}/asked"

[transport.down]
type = "lmtp"
address = "unix:{folder}/nobody"
"""

ALIASES = """\
info: ann@listed.test
team@listed.test: ann, bob, eve@sql.test
owner-team@listed.test: ann
many: a@else.test, b@else.test, c@else.test, d@else.test
abroad@sql.test: a@else.test
ghost@listed.test: nobody@listed.test
"keep"@listed.test: keep@listed.test, ann
"""
ANSWERS = {
    "ann": "250 2.1.5 ok", "later": "450 4.2.1 later", "no": "550 5.1.1 nobody", "policy": "554 5.7.1 you may not",
    "silent": "", "odd": "299 what", "garbage": "\x00\xff garbage",
}  # fmt: skip

LOCALS = (
    "ann", "ANN", "Bob", "no", "eve", "rest", "keep", "info", "team", "owner-team", "many", "abroad", "ghost", "later",
    "policy", "silent", "odd", "garbage", "ann+x", "ann-x", "info+x", "team+x", "+x", "ann+", "postmaster",
    "PostMaster", "abuse", "ann%else.test", "else.test!ann", '"ann"', '"ann@else.test"', '"a\\nn"', '"@"', '""',
    "a" * 64, "a" * 65, "jörg", "JÖRG", "ａｎｎ", "аnn", ".ann", "ann.", "a..n", "case", "Case", "*", "'--", "%",
    "_", "\\ann",
)  # fmt: skip
DOMAINS = (
    "listed.test", "LISTED.Test", "listed.test.", "listed..test", "x.sub.test", "sub.test", "a.b.sub.test", "sql.test",
    "wrong.test", "asked.test", "down.test", "bücher.test", "xn--bcher-kva.test", "BÜCHER.test", "else.test",
    "listed.test.else.test", "else.test@listed.test", "[127.0.0.1]", "[IPv6:::ffff:127.0.0.1]", "[127.0.0.2]",
    "mx.here.test", "ｌisted.test", "l" * 64 + ".test", "listed.test\u3002", "-x.test", "", "1.2.3.4", "test",
)  # fmt: skip
SENDERS = (
    "", "a@c.test", "slow@c.test", "x@slow.test", "ann@listed.test", "a@@b", "jörg@c.test", "@a.test:b@c.test",
    "a@[192.0.2.1]", '"a\\"b"@c.test', "a@c.test.",
)  # fmt: skip
HELLOS = (
    "c.test",
    "friend.test",
    "x.dyn.test",
    "X.DYN.TEST.",
    "[127.0.0.1]",
    "bad_helo!",
    "ünï.test",
    "",
    "x.dýn.test",
)
CLIENTS = ("127.0.0.1", "127.9.1.1", "127.66.1.1", "127.67.0.1", "127.68.0.1", "::1")


class Answering(threading.Thread):
    """An LMTP server that answers RCPT by the local-part, in ways that are none, too."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(50)

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client, client.makefile("rwb", 0) as wire:
            wire.write(b"220 asked\r\n")
            for line in wire:
                word = line[:4].upper()
                if word == b"RCPT":
                    local = line.partition(b"<")[2].partition(b"@")[0].decode()
                    answer = ANSWERS.get(local.lower(), "550 5.1.1 nobody")
                    if not answer:
                        return
                    wire.write(answer.encode("latin-1") + b"\r\n")
                else:
                    wire.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


@contextmanager
def answering(path: Path) -> Iterator[None]:
    server = Answering(path)
    server.start()
    try:
        yield
    finally:
        server.close()


def prepare(folder: Path) -> None:
    (folder / "fastsmtp.toml").write_text(CONFIGURATION.format(folder=folder))
    (folder / "mailboxes").write_text("ann@listed.test\nbob@listed.test\nrest\nkeep\njörg@listed.test\n")
    (folder / "mailboxes-case").write_text("Case\nann\n")
    (folder / "aliases").write_text(ALIASES)
    (folder / "free").write_text("127.68.0.0/16\n")
    (folder / "blocked").write_text("127.66.0.0/16\n::ffff:127.67.0.0/112\n")
    (folder / "slow").write_text("slow@c.test\nslow.test\n")
    database = apsw.Connection(str(folder / "users.db"))
    database.execute("CREATE TABLE box (local TEXT, domain TEXT); INSERT INTO box VALUES ('eve', 'sql.test')")
    database.close()


def any_envelope(chance: random.Random) -> tuple[str, str, str | None, list[str]]:
    def address() -> str:
        text = chance.choice(LOCALS) + "@" + chance.choice(DOMAINS)
        how = chance.random()
        if how < 0.1:
            return "@relay.test,@listed.test:" + text
        return text.rpartition("@")[0] if how < 0.15 else text

    hello = chance.choice(HELLOS) if chance.random() < 0.5 else "c.test"
    sender = chance.choice(SENDERS) if chance.random() < 0.5 else "a@c.test"
    return chance.choice(CLIENTS), hello, sender, [address() for _ in range(chance.randint(1, 6))]


def spoken(peer: Peer, hello: str, sender: str | None, recipients: list[str]) -> list[str]:
    """The last line of each reply, until one ends the session."""
    replies = [peer.reply()]
    utf8 = "" if all(text.isascii() for text in (sender or "", *recipients)) else " SMTPUTF8"
    commands = [f"EHLO {hello}", f"MAIL FROM:<{sender}>{utf8}", *[f"RCPT TO:<{to}>" for to in recipients]]
    for number, command in enumerate(commands):
        if number < 3 and not replies[-1].startswith("2"):
            break
        peer.send(command.encode() + b"\r\n")
        replies.append(peer.reply())
    return [reply.rpartition("\n")[2] for reply in replies]


def told(decisions: list[Decision]) -> list[str]:
    return [
        "" if each.answer == "accepted" else each.reply for each in decisions if each.stage not in ("limits", "trust")
    ]


def test_two_hundred_envelopes(tmp_path: Path) -> None:
    prepare(tmp_path)
    chance = random.Random(6)
    config = load(tmp_path / "fastsmtp.toml")
    reasons: list[tuple[str, str]] = []
    said: set[str] = set()
    with answering(tmp_path / "asked"), running(tmp_path, (tmp_path / "fastsmtp.toml").read_text()) as server:
        four, six = (address.replace("[::1]", "::1") for address in server.addresses())
        for _ in range(200):
            client, hello, sender, recipients = any_envelope(chance)
            words = f"client={client} helo={hello} from={sender} " + " ".join(f"to={to}" for to in recipients)
            decisions = play(config, parse_wishes(words))
            with Peer(six if ":" in client else four, hello="", source=client) as peer:
                heard = spoken(peer, hello, sender, recipients)
            assert ["" if line.startswith("2") else line for line in heard] == told(decisions), words
            said.update(line[:9] for line in heard)
            reasons += [
                (each.reason, each.reply) for each in decisions
                if each.answer in ("refused", "deferred") and (each.stage != "ehlo" or "rule-" in each.reason)
            ]  # fmt: skip
        lines = server.wait_for("refused", len(reasons))
        assert [(line["reason"], line["reply"]) for line in lines] == reasons
    assert {"250 2.1.5", "550 5.1.1", "550 5.7.1", "451 4.3.0", "554 5.7.1", "450 4.7.1", "501 5.1.3"} <= said
