"""The ledger sees what it has to see: every kind of error, planted into mailboxes that were right."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from ledger import DOMAIN, Ledger, Outcome, Violation, any_size, find_fault, make_body, outcome_of, read_ledger, verify

NOW = 1_700_000_000.0
RECEIVED = """\
Received: from c.test ([192.0.2.1])
	by mx.test with ESMTP id 0abc
	for <x@y>;
	Mon, 1 Jan 2024 00:00:00 +0000
"""


class World:
    """A ledger and mailboxes that agree: m000001 to both, m000002 to ann, m000003 refused, m000004 unknown."""

    def __init__(self, path: Path) -> None:
        self.mail = path / "mail"
        self.ledger = Ledger(path / "ledger")
        self.chance = random.Random(1)
        self.bodies: dict[str, bytes] = {}
        for recipients, outcome in (
            (["ann", "bob"], Outcome.ACKED),
            (["ann"], Outcome.ACKED),
            (["ann"], Outcome.REFUSED),
            (["ann", "bob"], Outcome.UNKNOWN),
            (["bob"], Outcome.TEMPORARY),
        ):
            self.send(recipients, outcome, 3000)
        self.put("m000001", "ann")
        self.put("m000001", "bob")
        self.put("m000002", "ann")

    def send(self, recipients: list[str], outcome: Outcome, size: int) -> str:
        message_id = self.ledger.next_id()
        self.bodies[message_id] = make_body(message_id, size, self.chance)
        self.ledger.write(message_id, self.bodies[message_id], [f"{r}@y.test" for r in recipients], outcome)
        return message_id

    def put(
        self, message_id: str, local: str, *, name: str = "", body: bytes | None = None, to: str = "", when: float = NOW
    ) -> Path:
        folder = self.mail / "y.test" / local / "new"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name or message_id)
        head = f"Return-Path: <{message_id}@{DOMAIN}>\nDelivered-To: {to or local}@y.test\n{RECEIVED}".encode()
        path.write_bytes(head + (self.bodies[message_id] if body is None else body).replace(b"\r\n", b"\n"))
        os.utime(path, (when, when))
        return path

    def verify(self, *faults: float) -> list[Violation]:
        return verify(self.ledger.path, self.mail, faults)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_what_is_right_is_right(world: World) -> None:
    assert world.verify() == []
    world.put("m000004", "ann")
    world.put("m000004", "bob")
    assert world.verify() == [], "a message of unknown fate may have been kept"


def swap_lines(body: bytes) -> bytes:
    lines = body.split(b"\r\n")
    lines[3], lines[4] = lines[4], lines[3]
    return b"\r\n".join(lines)


PLANTED: dict[str, tuple[Callable[[World], object], list[tuple[str, str, str]]]] = {
    "lost": (
        lambda world: (world.mail / "y.test/bob/new/m000001").unlink(),
        [("A", "m000001", "acknowledged")],
    ),
    "altered": (
        lambda world: world.put("m000002", "ann", body=world.bodies["m000002"].replace(b"x", b"y", 1)),
        [("B", "m000002", "is altered")],
    ),
    "swapped lines": (
        lambda world: world.put("m000002", "ann", body=swap_lines(world.bodies["m000002"])),
        [("B", "m000002", "in the place of line")],
    ),
    "partial": (
        lambda world: world.put("m000002", "ann", body=world.bodies["m000002"][:2000]),
        [("B", "m000002", "2000 octets of 3026")],
    ),
    "without its body": (
        lambda world: world.put("m000002", "ann", body=b""),
        [("B", "m000002", "0 octets, not those")],
    ),
    "with another's body": (
        lambda world: world.put("m000002", "ann", body=world.bodies["m000001"]),
        [("B", "m000002", "it is the body of m000001")],
    ),
    "without its header": (
        lambda world: world.put("m000002", "ann", body=world.bodies["m000002"][20:]),
        [("B", "m000002", "its beginning is")],
    ),
    "cut in the trace fields": (
        lambda world: (world.mail / "y.test/ann/new/x").write_bytes(b"Return-Path: <m000001@"),
        [("B", "", "trace fields")],
    ),
    "empty file": (
        lambda world: (world.mail / "y.test/ann/new/x").touch(),
        [("B", "", "trace fields")],
    ),
    "duplicate": (
        lambda world: world.put("m000002", "ann", name="again", when=NOW + 5),
        [("C", "m000002", "no fault between")],
    ),
    "foreign recipient": (
        lambda world: world.put("m000002", "bob"),
        [("D", "m000002", "it was for")],
    ),
    "another's mailbox": (
        lambda world: world.put("m000002", "ann", to="bob"),
        [("D", "m000002", "delivered to bob")],
    ),
    "5xx, and delivered": (
        lambda world: world.put("m000003", "ann"),
        [("D", "m000003", "answered 5xx")],
    ),
    "4xx, and delivered": (
        lambda world: world.put("m000005", "bob"),
        [("D", "m000005", "answered 4xx")],
    ),
    "never sent": (
        lambda world: world.put("m000009", "ann", body=b"x\r\n"),
        [("D", "m000009", "nobody sent it")],
    ),
    "kept in part": (
        lambda world: world.put("m000004", "ann"),
        [("F", "m000004", "kept for")],
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_seen(world: World, name: str) -> None:
    plant, expected = PLANTED[name]
    plant(world)
    found = world.verify()
    assert [(each.rule, each.id) for each in found] == [(rule, message_id) for rule, message_id, _ in expected]
    for each, (_, _, text) in zip(found, expected, strict=True):
        assert text in each.text


def test_a_duplicate_is_allowed_where_a_fault_fell_behind_the_first(world: World) -> None:
    path = world.put("m000002", "ann", name="again", when=NOW + 40)
    path.rename(path.parent.parent / "moved")
    (path.parent.parent / "cur").mkdir()
    (path.parent.parent / "moved").rename(path.parent.parent / "cur" / "again:2,S")
    assert [each.rule for each in world.verify()] == ["C"]
    assert world.verify(NOW + 1) == []
    assert [each.rule for each in world.verify(NOW - 1)] == ["C"], "before the first"
    assert [each.rule for each in world.verify(NOW + 35)] == ["C"], "long behind the first"
    assert [each.rule for each in world.verify(NOW + 41)] == ["C"], "behind the second"


@pytest.mark.parametrize("size", [0, 2, 63, 64, 500, 70_000, 1 << 20])
def test_bodies_are_whole_lines_and_carry_what_they_are(size: int) -> None:
    body = make_body("m000007", size, random.Random(size))
    assert abs(len(body) - size) < 1100
    assert body.replace(b"\r\n", b"").isascii() is (size < 500)
    assert not set(b"\r\n") & set(body.replace(b"\r\n", b""))
    assert max(map(len, body.split(b"\r\n"))) <= 998
    if size >= 64:
        assert find_fault("m000007", body) == ""
        assert find_fault("m000008", body) == "it is the body of m000007"
        assert find_fault("m000007", body[: body.rindex(b"\r\n", 0, -2) + 2]).endswith(f"octets of {len(body)}")
    if size > 5000:
        assert b"\r\n." in body


def test_sizes_reach_from_nothing_to_a_mebibyte() -> None:
    chance = random.Random(1)
    sizes = [any_size(chance) for _ in range(2000)]
    assert min(sizes) == 0
    assert 1 << 19 < max(sizes) <= 1 << 20


def test_the_ledger_says_what_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ids = [ledger.next_id() for _ in range(3)]
    for message_id, reply in zip(ids, ("250 2.0.0 x", "452 4.3.1 x", "550 5.5.2 x"), strict=True):
        ledger.write(message_id, b"x\r\n", ["a@y.test"], outcome_of(reply))
    ledger.close()
    assert [entry.outcome for entry in read_ledger(ledger.path).values()] == ["acked", "4xx", "5xx"]
    assert outcome_of("") is Outcome.UNKNOWN
    ledger.path.write_text(ledger.path.read_text() * 2)
    with pytest.raises(AssertionError, match="twice"):
        read_ledger(ledger.path)
