"""`fastsmtp check --as`: the decisions are those of a running server, word for word; nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import apsw
import pytest
from peer import Peer
from servers import ROOT, running

CONFIGURATION = """\
hostname = "mx.here.test"
data_dir = "data"
workers = 1

[[listener]]
address = ["127.0.0.1:0", "unix:{folder}/socket"]

[[listener]]
address = "[::1]:0"
role = "lmtp"

[relay]
networks = ["127.9.0.0/16", "10.0.0.0/8"]
transport = "boxes"

[inbound]
sessions_per_address = 100
failures = "1000/d"
exceptions = ["192.0.2.0/24"]

[[rule]]
name = "spammer"
client = ["198.51.100.0/24"]
action = "refuse"

[[rule]]
name = "not-now"
sender = ["slow@c.test"]
action = "defer"

[[domain]]
name = "listed.test"
recipients = {{file = "mailboxes"}}
transport = "boxes"

[[domain]]
name = "sql.test"
recipients = {{sql = "users", query = "SELECT 1 FROM box WHERE address = :address"}}
transport = "others"

[[domain]]
name = "down.test"
recipients = {{ask = "down"}}
transport = "down"

[sql.users]
database = "users.db"

[transport.boxes]
type = "maildir"
path = "mail/{{domain}}/{{local}}"

[transport.others]
type = "maildir"
path = "others/{{domain}}/{{local}}"

[transport.down]
type = "lmtp"
address = "unix:{folder}/nobody"

[transport.program]
type = "pipe"
command = ["/bin/cat"]
user = "nobody"

[alias]
file = "aliases"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fastsmtp.toml").write_text(CONFIGURATION.format(folder=tmp_path))
    (tmp_path / "mailboxes").write_text("ann@listed.test\n")
    (tmp_path / "aliases").write_text("team@listed.test: ann@listed.test, bob@sql.test\n")
    database = apsw.Connection(str(tmp_path / "users.db"))
    database.execute("CREATE TABLE box (address TEXT); INSERT INTO box VALUES ('bob@sql.test')")
    database.close()
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsmtp", "check", "--config", "fastsmtp.toml", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def decide(folder: Path, words: str) -> dict[str, Any]:
    done = run(folder, "--json", "--as", words)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def told(folder: Path, words: str) -> list[tuple[str, str, str]]:
    """Of each command: the stage, the answer, the reason."""
    decisions = decide(folder, words)["decisions"]
    commands = [each for each in decisions if each["stage"] not in ("limits", "trust")]
    return [(each["stage"], each["answer"], each["reason"]) for each in commands]


def test_each_decision_has_its_rule_and_says_where_mail_goes(folder: Path) -> None:
    words = "client=203.0.113.9 helo=c.test from=a@c.test"
    recipients = ("ann@listed.test", "no@listed.test", "team@listed.test", "c@else.test", "no@sql.test", "x@down.test")
    before = sorted(folder.iterdir())
    answer = decide(folder, " ".join([words, *(f"to={recipient}" for recipient in recipients)]))
    assert sorted(folder.iterdir()) == before, "nothing is made"
    assert not answer["accepted"]
    limits, trust, connect, hello, mail, *found = answer["decisions"]
    assert limits["answer"] == "not asked: only a running server counts"
    assert trust["answer"] == "may send to our domains only"
    assert [each["answer"] for each in (connect, hello, mail)] == ["accepted"] * 3
    assert [(each["answer"], each["reason"], each["reply"][:9]) for each in found] == [
        ("accepted", "known-mailbox", ""),
        ("refused", "unknown-mailbox", "550 5.1.1"),
        ("accepted", "alias", ""),
        ("refused", "relaying-denied", "550 5.7.1"),
        ("refused", "unknown-mailbox", "550 5.1.1"),
        ("deferred", "recipient-not-checked", "451 4.3.0"),
    ]
    assert found[0]["goes"] == {"ann@listed.test": "boxes"}
    assert found[2]["goes"] == {"bob@sql.test": "others"}, "of two members one was there before"
    assert [note.rpartition(": ")[2] for note in found[5]["notes"]] == ["No such file or directory"]


def test_who_is_trusted_or_free_is_said(folder: Path) -> None:
    for client, limits, trust in (
        ("10.1.2.3", "free of limits", "may send to any domain: [relay] networks"),
        ("192.0.2.5", "free of limits", "may send to our domains only"),
        ("unix", "free of limits", "may send to our domains only"),
        ("2001:db8::1", "not asked: only a running server counts", "may send to our domains only"),
    ):
        decisions = decide(folder, f"client={client}")["decisions"]
        assert [each["answer"] for each in decisions[:2]] == [limits, trust]
    found = decide(folder, "client=203.0.113.9 user=ann from=a@c.test to=b@else.test")["decisions"]
    assert found[1]["answer"] == "may send to any domain: it has logged in"
    assert told(folder, "client=10.1.2.3 from= to=b@else.test")[-1] == ("rcpt", "accepted", "relayed")
    assert decide(folder, "client=10.1.2.3 from= to=b@else.test")["decisions"][-1]["goes"] == {"b@else.test": "boxes"}


def test_rules_are_named_and_end_what_follows(folder: Path) -> None:
    assert told(folder, "client=198.51.100.7 from=a@c.test to=ann@listed.test") == [
        ("connect", "refused", "rule-spammer"),
    ]
    assert told(folder, "client=203.0.113.9 from=slow@c.test to=ann@listed.test")[-1] == (
        "mail", "deferred", "rule-not-now",
    )  # fmt: skip


def test_the_running_server_says_the_same(folder: Path) -> None:
    recipients = ["ann@listed.test", "no@listed.test", "team@listed.test", "c@else.test", "no@sql.test", "bob@sql.test"]
    played = decide(folder, "client=127.0.0.1 from=a@c.test " + " ".join(f"to={each}" for each in recipients))
    with running(folder, (folder / "fastsmtp.toml").read_text()) as server, Peer(server.address) as peer:
        replies = peer.envelope(recipients, sender="a@c.test")[1:]
        for decision, reply in zip(played["decisions"][-len(recipients) :], replies, strict=True):
            assert decision["reply"] == ("" if reply.startswith("250 ") else reply)
        logged = {line["to"]: line["reason"] for line in server.wait_for("refused", 3)}
        assert logged == {
            each["about"].strip("<>"): each["reason"] for each in played["decisions"] if each["answer"] == "refused"
        }
        assert told(folder, "client=127.0.0.1 from=a@c.test to=ann@listed.test")[-1][1] == "accepted", "beside it"


def test_for_people(folder: Path) -> None:
    done = run(folder, "--as", "client=203.0.113.9 helo=c.test from=a@c.test to=no@listed.test to=ann@listed.test")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-4:] == [
        "rcpt      <no@listed.test>             refused (unknown-mailbox)",
        "            550 5.1.1 No such mailbox here",
        "rcpt      <ann@listed.test>            accepted (known-mailbox)",
        "            ann@listed.test goes by boxes",
    ]


def test_bad_commands_are_refused_as_the_server_would(folder: Path) -> None:
    assert told(folder, "client=203.0.113.9 from=a@@b")[-1] == ("mail", "refused", "bad-sender")
    assert told(folder, "client=203.0.113.9 from=a@c.test to=b@")[-1] == ("rcpt", "refused", "bad-recipient")
    assert told(folder, "client=203.0.113.9 listener=lmtp from= to=ann@listed.test")[-1][1] == "accepted"
    assert told(folder, "client=203.0.113.9 from=grün@c.test to=ann@listed.test")[-1][1] == "accepted"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "client=: an IP address"),
        ("client=here", "client=here: an IP address such as 203.0.113.9"),
        ("client=203.0.113.9 form=a@b", "form=a@b says nothing; known are client="),
        ("client=203.0.113.9 from=a@b from=c@d", "from= stands 2 times"),
        ("client=203.0.113.9 listener=[::2]:25", "no such listener; there are 127.0.0.1:0 (mx), unix:"),
    ],
)
def test_words_that_cannot_be_played(folder: Path, words: str, said: str) -> None:
    for json_too in ((), ("--json",)):
        done = run(folder, *json_too, "--as", words)
        assert done.returncode == 1
        assert done.stdout == ""
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_wrong_configuration_is_told_first(folder: Path) -> None:
    (folder / "mailboxes").write_text("ann@listed.test\nbob@elsewhere@\n")
    done = run(folder, "--as", "client=203.0.113.9")
    assert done.returncode == 1
    assert "mailboxes:2" in done.stderr
    assert "Traceback" not in done.stderr
