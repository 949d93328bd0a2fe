"""The oracle sees what it has to see: every kind of error, planted where everything was right.

A world is a ledger with what came of it, in Maildirs or in the record of a sink; both hold the same, so that each
error is planted in both.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest import LoadError
from loadtest.ledger import Ledger, Outcome, digest, make_body
from loadtest.rules import RULES, Circumstances, Report, verify
from loadtest.sink_record import Client, Recipient, Recorder
from loadtest.verify import parse_faulted
from tests.test_load_ledger import Message

ROOT = Path(__file__).parent.parent
NOW = 1_700_000_000.0
RECEIVED = "Received: from c.test ([192.0.2.1])\n\tby mx.test with ESMTP id 0abc;\n\tMon, 1 Jan 2024 00:00:00 +0000\n"
SENT = {
    "m1": (["ann", "bob"], Outcome.ACKED, 3000),
    "m2": (["ann"], Outcome.ACKED, 3000),
    "m3": (["ann"], Outcome.REFUSED, 3000),
    "m4": (["ann", "bob"], Outcome.UNKNOWN, 3000),
    "m5": (["bob"], Outcome.TEMPORARY, 3000),
    "m6": (["bob"], Outcome.ACKED, 0),
}


def address(local: str) -> str:
    return local if "@" in local or not local else f"{local}@y.test"


class World:
    """m1 to both, m2 to ann, m3 and m5 refused, m4 unknown, m6 (empty) to bob; eve was refused for m2."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ledger = Ledger(path / "ledger")
        self.bodies: dict[str, bytes] = {}
        for message_id, (recipients, outcome, size) in SENT.items():
            self.send(message_id, recipients, outcome, size, refused=["eve"] if message_id == "m2" else [])
        for message_id, local in (("m1", "ann"), ("m1", "bob"), ("m2", "ann"), ("m6", "bob")):
            self.put(message_id, local)

    def send(
        self,
        message_id: str,
        recipients: list[str],
        outcome: Outcome,
        size: int,
        *,
        refused: list[str],
        sender: str = "",
    ) -> None:
        body = self.bodies[message_id] = make_body(message_id, size, random.Random(message_id))
        to = tuple(address(recipient) for recipient in [*recipients, *refused])
        mail = Message(message_id, sender or f"{message_id}@ledger.test", to, digest(body))
        if sender == "<>":
            mail = mail._replace(sender="")
        self.ledger.write(mail, outcome, 250, [address(recipient) for recipient in refused])

    def put(
        self,
        message_id: str,
        local: str,
        *,
        name: str = "",
        body: bytes | None = None,
        when: float = NOW,
        sender: str = "",
    ) -> None:
        raise NotImplementedError

    def report(
        self, local: str, about: str, *recipients: str, name: str = "", when: float = NOW, action: str = "failed"
    ) -> None:
        """A notification to `local` about a message."""
        blocks = "".join(
            f"\n\nFinal-Recipient: rfc822; {address(each)}\nAction: {action}\nStatus: 5.0.0" for each in recipients
        )
        text = (
            'From: x@y\nContent-Type: multipart/report; boundary="b"\n\n--b\nContent-Type: message/delivery-status\n\n'
            f"Reporting-MTA: dns; mx{blocks}\n\n--b\nContent-Type: text/rfc822-headers\n\n"
        )
        head = self.bodies[about].partition(b"\r\n\r\n")[0].decode("latin1").replace("\r\n", "\n") if about else ""
        body = f"{text}{head}\n\n--b--\n".replace("\n", "\r\n").encode()
        self.put(f"dsn-{about}", local, name=name, body=body, when=when, sender="<>")

    def unput(self, message_id: str, local: str) -> None:
        raise NotImplementedError

    def verify(self, given: Circumstances | None = None) -> Report:
        raise NotImplementedError

    def options(self) -> list[str]:
        raise NotImplementedError

    def found(self, given: Circumstances | None = None) -> list[tuple[str, str, str]]:
        """Rule, id and recipient of each violation."""
        return [(each.rule, each.id, each.recipient) for each in self.verify(given).violations]


class Boxes(World):
    """In Maildirs."""

    @property
    def mail(self) -> Path:
        return self.path / "mail"

    def file(self, message_id: str, local: str) -> Path:
        recipient, _, domain = address(local).partition("@")
        return self.mail / domain / recipient / "new" / message_id

    def put(
        self,
        message_id: str,
        local: str,
        *,
        name: str = "",
        body: bytes | None = None,
        when: float = NOW,
        sender: str = "",
    ) -> None:
        path = self.file(name or message_id, local)
        path.parent.mkdir(parents=True, exist_ok=True)
        sender = "" if sender == "<>" else sender or f"{message_id}@ledger.test"
        head = f"Return-Path: <{sender}>\nDelivered-To: {address(local)}\n{RECEIVED}".encode()
        path.write_bytes(head + (self.bodies[message_id] if body is None else body).replace(b"\r\n", b"\n"))
        os.utime(path, (when, when))

    def unput(self, message_id: str, local: str) -> None:
        self.file(message_id, local).unlink()

    def verify(self, given: Circumstances | None = None) -> Report:
        return verify(self.ledger.path, [self.mail], [], given)

    def options(self) -> list[str]:
        return ["--maildir", str(self.mail)]


class Sunk(World):
    """In the record of a sink that keeps the messages too."""

    def put(
        self, message_id: str, local: str, *, name: str = "", body: bytes | None = None, when: float = NOW,
        sender: str = "", answer: str = "250 2.0.0 kept",
    ) -> None:  # fmt: skip
        recorder = Recorder(self.path / "record", self.path / "kept", False)
        sender = "" if sender == "<>" else sender or f"{message_id}@ledger.test"
        octets = RECEIVED.replace("\n", "\r\n").encode() + (self.bodies[message_id] if body is None else body)
        client = Client("192.0.2.1:9", "mx.test", "ESMTP", "", "").render()
        recorder.write(client, Recipient(sender, ""), [Recipient(address(local), "")], [answer], octets)
        recorder.close()
        *before, last = (self.path / "record").read_text().splitlines()
        record = json.loads(last) | {"time": when}
        (self.path / "record").write_text("\n".join([*before, json.dumps(record), ""]))

    def unput(self, message_id: str, local: str) -> None:
        lines = (self.path / "record").read_text().splitlines()
        kept = [
            line
            for line in lines
            if (json.loads(line)["sender"], json.loads(line)["recipients"][0]["address"])
            != (f"{message_id}@ledger.test", address(local))
        ]
        assert len(kept) == len(lines) - 1
        (self.path / "record").write_text("".join(f"{line}\n" for line in kept))

    def verify(self, given: Circumstances | None = None) -> Report:
        return verify(self.ledger.path, [], [self.path / "record"], given)

    def options(self) -> list[str]:
        return ["--sink", str(self.path / "record")]


@pytest.fixture(params=[Boxes, Sunk])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    made: World = request.param(tmp_path)
    return made


def test_what_is_right_is_right(world: World) -> None:
    report = world.verify()
    assert report.violations == []
    assert (report.messages, report.delivered, report.failed, report.duplicates) == (6, 4, 0, 0)
    assert report.outcomes == {"acked": 3, "4xx": 1, "5xx": 1, "unknown": 1}
    world.put("m4", "ann")
    world.put("m4", "bob")
    assert world.found() == [], "a message of unknown fate may have been kept"


def swap_lines(body: bytes) -> bytes:
    lines = body.split(b"\r\n")
    lines[12], lines[13] = lines[13], lines[12]
    return b"\r\n".join(lines)


def rewrite(world: World, change: Callable[[bytes], bytes]) -> None:
    """m2 with another body."""
    world.unput("m2", "ann")
    world.put("m2", "ann", body=change(world.bodies["m2"]))


Plant = Callable[[World], object]
M2_B = ("B", "m2", "ann@y.test")
PLANTED: dict[str, tuple[Plant, list[tuple[str, str, str]], str]] = {
    "lost": (lambda w: w.unput("m1", "bob"), [("A", "m1", "bob@y.test")], "neither delivered nor reported"),
    "lost, empty": (lambda w: w.unput("m6", "bob"), [("A", "m6", "bob@y.test")], "neither delivered nor reported"),
    "altered": (lambda w: rewrite(w, lambda b: b.replace(b"xx", b"xy", 1)), [M2_B], "is altered"),
    "altered header": (
        lambda w: rewrite(w, lambda b: b.replace(b"Subject", b"Sbuject")),
        [M2_B],
        "its header is altered",
    ),
    "swapped lines": (lambda w: rewrite(w, swap_lines), [M2_B], "in the place of line"),
    "partial": (lambda w: rewrite(w, lambda b: b[:2000]), [M2_B], "octets of 3000"),
    "a line too many": (lambda w: rewrite(w, lambda b: b + b"\r\n"), [M2_B], "is altered"),
    "a field too many": (
        lambda w: rewrite(w, lambda b: b"Subject: new\r\n" + b),
        [M2_B, ("A", "m2", "ann@y.test")],
        "stands before it",
    ),
    "without its body": (lambda w: rewrite(w, lambda _: b""), [M2_B], "0 octets, not those"),
    "swapped bodies": (
        lambda w: (w.unput("m6", "bob"), w.put("m6", "bob", body=w.bodies["m2"], sender="m6@ledger.test")),
        [
            ("D", "m2", "bob@y.test"),
            ("B", "m2", "bob@y.test"),
            ("A", "m6", "bob@y.test"),
        ],
        "it was for <ann@y.test>",
    ),
    "another's sender": (
        lambda w: (w.unput("m2", "ann"), w.put("m2", "ann", sender="x@ledger.test")),
        [M2_B],
        "and was sent from <m2@ledger.test>",
    ),
    "duplicate": (
        lambda w: w.put("m2", "ann", name="again", when=NOW + 5),
        [("C", "m2", "ann@y.test")],
        "copies of 1700000000.000 and 1700000005.000, no fault between",
    ),
    "three copies": (
        lambda w: [w.put("m6", "bob", name=f"again{n}", when=NOW + n) for n in (1, 2)],
        [("C", "m6", "bob@y.test")] * 2,
        "no fault between",
    ),
    "to another recipient": (lambda w: w.put("m2", "bob"), [("D", "m2", "bob@y.test")], "it was for <ann@y.test>"),
    "to one who was refused": (lambda w: w.put("m2", "eve"), [("D", "m2", "eve@y.test")], "was refused"),
    "5xx, and delivered": (lambda w: w.put("m3", "ann"), [("D", "m3", "ann@y.test")], "answered 5xx"),
    "4xx, and delivered": (lambda w: w.put("m5", "bob"), [("D", "m5", "bob@y.test")], "answered 4xx"),
    "never sent": (lambda w: w.put("m9", "ann", body=b"x\r\n"), [("D", "", "ann@y.test")], "nobody sent it"),
    "never sent, with an id": (
        lambda w: w.put("m9", "ann", body=make_body("m9", 100, random.Random(1))),
        [("D", "m9", "ann@y.test")],
        "nobody sent it: its id is m9",
    ),
    "kept in part": (lambda w: w.put("m4", "ann"), [("F", "m4", "")], "not for <bob@y.test>"),
    "a report too": (
        lambda w: w.report("m1@ledger.test", "m1", "bob"),
        [("F", "m1", "bob@y.test")],
        "delivered, and reported as failed",
    ),
    "two reports": (
        lambda w: (
            w.unput("m1", "bob"),
            w.report("m1@ledger.test", "m1", "bob"),
            w.report("m1@ledger.test", "m1", "bob", name="again", when=NOW + 1),
        ),
        [("C", "m1", "bob@y.test")],
        "no fault between",
    ),
    "a report to another": (
        lambda w: (w.unput("m1", "bob"), w.report("m2@ledger.test", "m1", "bob")),
        [("D", "m1", "m2@ledger.test")],
        "a message of <m1@ledger.test>",
    ),
    "a report on another's recipient": (
        lambda w: w.report("m2@ledger.test", "m2", "bob"),
        [("D", "m2", "bob@y.test")],
        "a recipient of another message: <ann@y.test>",
    ),
    "a report on what was refused": (
        lambda w: w.report("m3@ledger.test", "m3", "ann"),
        [("D", "m3", "m3@ledger.test")],
        "was answered 5xx",
    ),
    "a report on nothing": (
        lambda w: w.report("x@ledger.test", "", "ann"),
        [("D", "", "x@ledger.test")],
        "nobody sent",
    ),
    "a delay is no fate": (
        lambda w: (w.unput("m1", "bob"), w.report("m1@ledger.test", "m1", "bob", action="delayed")),
        [("A", "m1", "bob@y.test")],
        "neither delivered nor reported",
    ),
    "a report without recipients": (
        lambda w: w.report("m1@ledger.test", "m1"),
        [("B", "", "m1@ledger.test")],
        "names no recipient",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(world: World, name: str) -> None:
    plant, expected, text = PLANTED[name]
    plant(world)
    violations = world.verify().violations
    found = [(each.rule, each.id, each.recipient) for each in violations]
    assert sorted(found) == sorted(expected)
    assert any(text in each.text for each in violations), violations
    for each in violations:
        if each.rule not in "AF":
            assert str(world.path) in each.where, "it says where"


def test_every_rule_is_planted() -> None:
    seen = {rule for _, expected, _ in PLANTED.values() for rule, _, _ in expected}
    assert seen | {"E"} == set(RULES)


def test_a_report_is_a_fate(world: World) -> None:
    world.unput("m1", "bob")
    world.report("m1@ledger.test", "m1", "bob")
    world.unput("m6", "bob")  # has no id in its body: the report's address tells
    world.report("m6@ledger.test", "", "bob", name="dsn-m6")
    report = world.verify()
    assert report.violations == []
    assert (report.delivered, report.failed) == (2, 2)


def test_a_report_to_nobody_is_seen(world: World) -> None:
    world.send("m7", ["ann"], Outcome.ACKED, 1000, refused=[], sender="<>")
    world.report("postmaster@y.test", "m7", "ann")
    assert world.found() == [("F", "m7", "postmaster@y.test")]


def test_copies_that_a_fault_explains_are_allowed(world: World) -> None:
    world.put("m2", "ann", name="again", when=NOW + 40)

    def rules(*windows: tuple[float, float], ids: frozenset[str] = frozenset()) -> list[str]:
        return [rule for rule, _, _ in world.found(Circumstances(windows, ids))]

    assert rules() == ["C"]
    assert rules((NOW + 1, NOW + 1)) == []
    assert rules((NOW - 1, NOW - 1)) == ["C"], "before the first"
    assert rules((NOW + 35, NOW + 35)) == ["C"], "long behind the first"
    assert rules((NOW + 41, NOW + 41)) == ["C"], "behind the second"
    assert rules((NOW - 10, NOW + 1)) == [], "a fault that lasted"
    assert rules(ids=frozenset({"m2"})) == []
    assert rules(ids=frozenset({"m1"})) == ["C"]
    assert world.verify().duplicates == 1


def test_what_is_still_queued_is_not_lost(world: World) -> None:
    world.send("m8", ["ann", "zoe@shut.test"], Outcome.ACKED, 1000, refused=[])
    world.put("m8", "ann")
    assert world.found() == [("A", "m8", "zoe@shut.test")]
    report = world.verify(Circumstances(still_queued=frozenset({"shut.test"})))
    assert (report.violations, report.still_queued) == ([], 1)
    world.send("m9", ["ann", "zoe@shut.test"], Outcome.UNKNOWN, 1000, refused=[])
    world.put("m9", "ann")
    assert world.verify(Circumstances(still_queued=frozenset({"shut.test"}))).violations == []


def test_addresses_are_one_in_any_case(world: World) -> None:
    world.send("m8", ["Zoe@Y.Test"], Outcome.ACKED, 1000, refused=[])
    world.put("m8", "zoe@y.test")
    assert world.found() == []


# What only Maildirs can show.


@pytest.fixture
def boxes(tmp_path: Path) -> Boxes:
    return Boxes(tmp_path)


def test_a_file_that_is_cut_is_seen(boxes: Boxes) -> None:
    path = boxes.file("m2", "ann")
    whole = path.read_bytes()
    for cut in [*range(0, len(whole), 13), *range(len(whole) - 20, len(whole))]:
        path.write_bytes(whole[:cut])
        rules = {rule for rule, _, _ in boxes.found()}
        assert "B" in rules or ("D" in rules and cut < len("Return-Path:")), cut
    path.write_bytes(whole)
    assert boxes.found() == []


def test_what_is_no_file_is_seen(boxes: Boxes) -> None:
    (boxes.mail / "y.test/ann/new/link").symlink_to(boxes.file("m2", "ann"))
    (boxes.mail / "y.test/ann/new/folder").mkdir()
    os.mkfifo(boxes.mail / "y.test/ann/new/fifo")
    assert boxes.found() == [("B", "", "ann@y.test")] * 3
    assert {each.text for each in boxes.verify().violations} == {"it is no file"}


def test_another_mailbox_is_seen_unless_they_are_shared(boxes: Boxes) -> None:
    boxes.file("m2", "ann").rename(boxes.file("m2", "bob"))
    assert boxes.found() == [("D", "m2", "bob@y.test"), ("A", "m2", "ann@y.test")]
    assert boxes.found(Circumstances(shared=True)) == []
    box = boxes.file("m1", "ann")
    box.write_bytes(box.read_bytes().replace(b"Delivered-To: ann@", b"Delivered-To: bob@"))
    assert ("D", "m1", "ann@y.test") in boxes.found()


def test_any_nesting_and_any_folder_is_read(boxes: Boxes) -> None:
    deep = boxes.path / "elsewhere/a/b/c/.Junk/cur"
    deep.mkdir(parents=True)
    boxes.file("m2", "ann").rename(deep / "m2:2,S")
    (boxes.mail / "y.test/ann/tmp").mkdir()
    boxes.file("m1", "ann").rename(boxes.mail / "y.test/ann/tmp/m1")
    assert boxes.found() == [("A", "m1", "ann@y.test"), ("A", "m2", "ann@y.test")]
    given = [boxes.mail, boxes.path / "elsewhere"]
    assert [each.id for each in verify(boxes.ledger.path, given).violations] == ["m1"]
    given = [boxes.mail, boxes.path / "elsewhere/a/b/c/.Junk"]
    assert [each.id for each in verify(boxes.ledger.path, given).violations] == ["m1"]


def test_a_folder_of_a_mailbox_is_its_owners(boxes: Boxes) -> None:
    boxes.unput("m1", "bob")
    folder = boxes.mail / "y.test/bob/.Junk/new"
    folder.mkdir(parents=True)
    (folder / "m1").write_bytes(boxes.bodies["m1"])
    assert boxes.found() == []


def test_what_is_left_in_tmp_is_seen_after_the_drain(boxes: Boxes) -> None:
    for path in ("y.test/bob/tmp/x", ".batch.1/y"):
        (boxes.mail / path).parent.mkdir(parents=True, exist_ok=True)
        (boxes.mail / path).touch()
    assert boxes.found() == []
    violations = boxes.verify(Circumstances(drained=True)).violations
    assert [(each.rule, Path(each.where).name) for each in violations] == [("E", "x"), ("E", "y")]


def test_mail_without_fields_of_its_delivery_is_known_by_its_id(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path)
    path = boxes.file("m2", "ann")
    path.write_bytes(boxes.bodies["m2"])
    assert boxes.found() == []
    path.rename(path.parent.parent / "moved")
    other = tmp_path / "mail/box/new/x"
    other.parent.mkdir(parents=True)
    (path.parent.parent / "moved").rename(other)
    assert boxes.found() == [], "there is one recipient only"
    (other.parent / "y").write_bytes(boxes.bodies["m1"])
    assert boxes.found() == [("D", "m1", "")], "ann or bob?"


# What only a sink can show.


def test_what_a_sink_did_not_answer_is_not_delivered(tmp_path: Path) -> None:
    sunk = Sunk(tmp_path)
    sunk.unput("m2", "ann")
    sunk.put("m2", "ann", answer="")
    sunk.put("m2", "ann", answer="451 4.3.0 later", when=NOW + 1)
    assert sunk.found() == [("A", "m2", "ann@y.test")]
    sunk.put("m2", "ann", when=NOW + 2)
    assert sunk.found() == [], "tries that were not answered are no copies"
    sunk.put("m2", "ann", when=NOW + 3)
    assert sunk.found() == [("C", "m2", "ann@y.test")]
    assert sunk.verify().duplicates == 1
    (tmp_path / "record").write_text("".join((tmp_path / "record").read_text().splitlines(keepends=True)[:-1]))
    sunk.put("m3", "ann", answer="451 4.3.0 later")
    assert sunk.found() == [], "what was refused was tried and refused"
    sunk.put("m2", "bob", answer="451 4.3.0 later")
    assert sunk.found() == [("D", "m2", "bob@y.test")], "but tries have to be right"


def test_without_the_message_only_its_digest_tells(tmp_path: Path) -> None:
    sunk = Sunk(tmp_path)
    rewrite(sunk, lambda body: body[:-2] + b"x\r\n")
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    assert [each.text for each in sunk.verify().violations] == ["its octets are not those that were sent"]


def test_mailboxes_and_sink_together(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    boxes, sunk = Boxes(tmp_path / "a"), Sunk(tmp_path / "b")
    boxes.unput("m1", "bob")
    sunk.unput("m1", "ann")
    sunk.unput("m2", "ann")
    sunk.unput("m6", "bob")
    given: Any = (boxes.ledger.path, [boxes.mail], [sunk.path / "record"])
    assert verify(*given).violations == []
    sunk.put("m2", "ann")
    assert [(each.rule, each.id) for each in verify(*given).violations] == [("C", "m2")]


# The whole.


def test_a_large_ledger_takes_little_memory(tmp_path: Path) -> None:
    many = 5_000
    ledger = Ledger(tmp_path / "ledger")
    sha256 = digest(b"")
    with (tmp_path / "record").open("w") as record:
        for n in range(many):
            message = Message(f"p{n % 4}-{n:09d}", "a@x.test", (f"user{n % 1000}@y.test",), sha256)
            ledger.write(message, Outcome.ACKED, 250)
            to = {"address": message.recipients[0], "parameters": "", "answer": "250 ok"}
            record.write(
                json.dumps({"time": NOW, "sender": "a@x.test", "recipients": [to], "id": message.id, "sha256": sha256})
                + "\n"
            )
    tracemalloc.start()
    report = verify(ledger.path, [], [tmp_path / "record"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.violations == []
    assert report.delivered == many
    assert peak / many < 400


def test_a_ledger_with_an_id_twice_is_refused(world: World) -> None:
    world.send("m1", ["ann"], Outcome.ACKED, 100, refused=[])
    with pytest.raises(LoadError, match="has m1 twice"):
        world.verify()


def test_faults_are_ids_and_times() -> None:
    lines = ["m1  # a comment", "", "1700000000.5", "1700000000 1700000010"]
    assert parse_faulted(lines) == (frozenset({"m1"}), ((1700000000.5, 1700000000.5), (1.7e9, 1.7e9 + 10)))
    for wrong in ("m1 m2", "1 2 3", "2 1"):
        with pytest.raises(LoadError, match="line 1 is no id"):
            parse_faulted([wrong])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtest", "verify", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_program(world: World) -> None:
    ledger = str(world.ledger.path)
    clean = run(ledger, *world.options())
    assert (clean.returncode, clean.stderr) == (0, "")
    assert clean.stdout.splitlines()[-1] == "violations: none"
    world.unput("m2", "ann")
    world.put("m6", "bob", name="again", when=NOW + 40)
    found = run(ledger, *world.options())
    assert found.returncode == 1
    assert found.stdout.splitlines()[0] == "A m2 <ann@y.test>: acknowledged, and neither delivered nor reported"
    assert found.stdout.splitlines()[1].startswith("C m6 <bob@y.test>: copies of 1700000000.000 and 1700000040.000")
    assert found.stdout.splitlines()[-1].startswith("violations: A 1 (an acknowledged message is missing), C 1 (")
    faults = world.path / "faults"
    faults.write_text(f"{NOW + 1}\nm1\n")
    told = run(ledger, *world.options(), "--json", "--faulted", str(faults), "--still-queued", "Y.test")
    assert told.returncode == 0
    report = json.loads(told.stdout)
    assert (report["violations"], report["still_queued"], report["duplicates"]) == ([], 1, 1)
    told = run(ledger, *world.options(), "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["broken"] == {"A": 1, "B": 0, "C": 1, "D": 0, "E": 0, "F": 0}


def test_what_cannot_be_compared_is_one_line(world: World, tmp_path: Path) -> None:
    ledger = str(world.ledger.path)
    wrong = tmp_path / "wrong"
    wrong.write_text("nonsense two\n")
    for arguments, text in (
        ((ledger,), "Give --maildir or --sink"),
        ((str(tmp_path / "missing"), *world.options()), "does not exist"),
        ((str(wrong), *world.options()), "line 1, is no entry"),
        ((ledger, "--sink", str(wrong)), "line 1, is none of a sink"),
        ((ledger, "--sink", ledger), "line 1, is none of a sink"),
        ((ledger, *world.options(), "--faulted", str(wrong)), "line 1 is no id"),
        ((ledger, "--maildir", ledger), "is a file"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert text in done.stderr
        assert "Traceback" not in done.stderr
