"""Mail that comes by a list is from its owner: on its way through session, spool, queue and reports."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from scripted import LATER, NEVER, Bench, Kinds, Logged, Scripted, logged, play
from test_reporting import told

from fastsmtp.address import NULL, Address, parse_address
from fastsmtp.delivery import Delivery, Outcome
from fastsmtp.message import LIST, Content, Envelope, Message, Recipient, sent_by_owner
from fastsmtp.record import parse_envelope, render_envelope
from fastsmtp.reply import R452_TOO_MANY_RECIPIENTS, R554_LOOP
from fastsmtp.transaction import EXPANDED_LIMIT, Transaction
from fastsmtp.verdict import STORED, Member, NextHop, Refused, Stored

OWNER, OTHER = parse_address("owner-a@own.test"), parse_address("owner-b@own.test")


@pytest.fixture
def log() -> Iterator[Logged]:
    with logged() as pair:
        yield pair


def envelope_of(*recipients: tuple[str, Address | None], sender: str = "s@x.test") -> Envelope:
    envelope = Envelope(parse_address(sender) if sender else NULL)
    envelope.id = "0abc"
    envelope.envid = "mine"
    envelope.ret = "HDRS"
    for text, owner in recipients:
        recipient = Recipient(parse_address(text), "" if owner else "FAILURE")
        recipient.sender = owner
        envelope.recipients.append(recipient)
    return envelope


async def keep(bench: Bench, envelope: Envelope) -> None:
    envelope.id = bench.spool.next_id()
    body = b"Subject: hello\r\n\r\nbody\r\n"
    draft = bench.spool.draft(envelope.id, lambda: None)
    draft.write(body)
    answered: asyncio.Future[Stored | Refused] = asyncio.get_running_loop().create_future()
    message = Message(envelope, b"", None, len(body), 18, Content.NONE, bench.clock.now())
    bench.spool.append(message, draft, answered.set_result)
    assert await answered is STORED


class Envelopes(Scripted):
    """A transport that notes from whom what goes to whom."""

    def __init__(self, *script: Outcome | Exception, concurrency: int = 0) -> None:
        super().__init__(*script, concurrency=concurrency)
        self.sent: list[tuple[str, str, str, list[str]]] = []

    async def deliver(self, deliveries: Sequence[Delivery]) -> Sequence[Sequence[Outcome]]:
        for one in deliveries:
            envelope = one.message.envelope
            names = [str(recipient.address) for recipient in one.recipients]
            assert [envelope.recipients[number] for number in one.numbers] == list(one.recipients)
            self.sent.append((str(envelope.reverse_path), envelope.envid, envelope.ret, names))
        return await super().deliver(deliveries)


# The record


def test_owners_are_written_down() -> None:
    envelope = envelope_of(("a@b.test", OWNER), ("c@d.test", None), ("e@f.test", parse_address('"o w"@own.test')))
    raw = render_envelope(envelope)
    assert raw.startswith(b"2\n")
    kept = parse_envelope(raw, "0abc")
    assert [recipient.sender for recipient in kept.recipients] == [OWNER, None, parse_address('"o w"@own.test')]
    assert [str(recipient.address) for recipient in kept.recipients] == ["a@b.test", "c@d.test", "e@f.test"]
    assert [recipient.notify for recipient in kept.recipients] == ["", "FAILURE", ""]
    assert kept.envid == "mine"


def test_what_comes_by_no_list_is_written_as_ever() -> None:
    assert render_envelope(envelope_of(("a@b.test", None))).startswith(b"1\n")


@pytest.mark.parametrize("damage", [b"\nmore", b"\nx@y\n", b"3"])
def test_a_damaged_record(damage: bytes) -> None:
    raw = render_envelope(envelope_of(("a@b.test", OWNER)))
    with pytest.raises(ValueError, match=r".+"):
        parse_envelope(damage + raw[1:] if damage == b"3" else raw + damage, "0abc")


def values_of(kind: type) -> list[str]:
    """The names of what an object holds; a compiled class has no __slots__."""
    return [name for name in dir(kind) if not name.startswith("_") and not callable(getattr(kind, name))]


def test_what_a_list_passes_on() -> None:
    assert {"reverse_path", "recipients", "waives_tls"} <= {*values_of(Envelope)}
    envelope = envelope_of(("a@b.test", OWNER))
    envelope.require_tls = envelope.waives_tls = True
    envelope.body = "8BITMIME"
    message = Message(envelope, b"Received: x\r\n", [b"body"], 4, 0, Content.EIGHT_BIT, 1.0, "file", ((0, 1),))
    passed = sent_by_owner(message, OWNER)
    assert (passed.envelope.reverse_path, passed.envelope.envid, passed.envelope.ret) == (OWNER, "", "")
    for name in values_of(Envelope):
        if name not in ("reverse_path", "envid", "ret"):
            assert getattr(passed.envelope, name) == getattr(envelope, name), name
    for name in values_of(Message):
        if name != "envelope":
            assert getattr(passed, name) == getattr(message, name), name
    assert sent_by_owner(message, parse_address("ö@own.test")).envelope.utf8


# Queue and reports


@pytest.mark.parametrize("kind", Kinds)
@pytest.mark.parametrize("concurrency", [0, 5])
def test_one_message_is_sent_by_several(kind: str, concurrency: int, log: Logged, tmp_path: Path) -> None:
    box = Envelopes(concurrency=concurrency)

    async def test(bench: Bench) -> None:
        await keep(
            bench,
            envelope_of(
                ("a@box.test", OWNER), ("b@box.test", None), ("c@box.test", OTHER), ("d@box.test", OWNER),
            ),
        )  # fmt: skip
        await bench.settle()
        assert sorted(box.sent) == [
            ("owner-a@own.test", "", "", ["a@box.test", "d@box.test"]),
            ("owner-b@own.test", "", "", ["c@box.test"]),
            ("s@x.test", "mine", "HDRS", ["b@box.test"]),
        ]
        assert all(body.endswith(b"body\r\n") for batch in box.batches for _, body in batch)
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box}, test)


def test_it_stays_so_over_a_restart(log: Logged, tmp_path: Path) -> None:
    box = Envelopes(LATER)

    async def first(bench: Bench) -> None:
        await keep(bench, envelope_of(("a@box.test", OWNER), ("b@box.test", None)))
        await bench.settle()

    async def later(bench: Bench) -> None:
        await bench.pass_time(2000.0)
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"box": box}, first)
    before = len(box.sent)
    play("disk", log[0], tmp_path, {"box": box}, later)
    assert sorted(one[0] for one in box.sent[before:]) == ["owner-a@own.test", "s@x.test"]


def test_each_is_told_what_became_of_its_own(log: Logged, tmp_path: Path) -> None:
    box, senders, owners = Scripted(), Scripted(), Scripted()
    box.always = NEVER

    async def test(bench: Bench) -> None:
        await keep(bench, envelope_of(("a@box.test", OWNER), ("b@box.test", None), ("c@box.test", OWNER)))
        await bench.settle()
        assert told(senders) == [("failed", "b@box.test", "5.1.1")]
        assert sorted(told(owners)) == [("failed", "a@box.test", "5.1.1"), ("failed", "c@box.test", "5.1.1")]
        assert (senders.tried, owners.tried) == (["s@x.test"], ["owner-a@own.test"])
        assert bench.spool.backlog == 0

    play("disk", log[0], tmp_path, {"box": box, "x": senders, "own": owners}, test)


def test_a_report_to_an_alias_goes_to_its_members(log: Logged, tmp_path: Path) -> None:
    box, members = Scripted(NEVER), Scripted()

    async def test(bench: Bench) -> None:
        asked: list[str] = []

        def expand(address: Address) -> list[Member] | None:
            asked.append(str(address))
            return [Member(parse_address(name), None) for name in ("m@mem.test", "n@mem.test")]

        bench.reports._expand = expand
        await keep(bench, envelope_of(("a@box.test", OWNER)))
        await bench.settle()
        assert asked == ["owner-a@own.test"]
        assert sorted(members.tried) == ["m@mem.test", "n@mem.test"]

    play("disk", log[0], tmp_path, {"box": box, "mem": members}, test)


# The transaction


def transaction(sender: str = "s@x.test") -> tuple[Transaction, Recipient]:
    asked = Recipient(parse_address("list@here.test"), "SUCCESS,FAILURE", "rfc822;list@here.test")
    return Transaction(Envelope(parse_address(sender) if sender else NULL)), asked


def members(*names: str, owner: Address | None = None) -> tuple[Member, ...]:
    return tuple(Member(parse_address(name), owner) for name in names)


def test_an_alias_passes_on_what_the_sender_wants_to_know() -> None:
    mail, asked = transaction()
    assert mail.add_members(asked, members("a@here.test", "b@here.test")) is None
    for recipient in mail.envelope.recipients:
        assert (recipient.notify, recipient.orcpt, recipient.sender) == (asked.notify, asked.orcpt, None)
    assert len(mail.accepted) == 1


def test_a_list_does_not() -> None:
    mail, asked = transaction()
    mail.add_members(asked, members("a@here.test", owner=OWNER))
    recipient, itself = mail.envelope.recipients
    assert (recipient.notify, recipient.orcpt, recipient.sender) == ("", "", OWNER)
    assert (itself.notify, itself.orcpt, itself.sender, itself.fault) == ("SUCCESS", asked.orcpt, None, LIST)
    reports, asked = transaction(sender="")
    reports.add_members(asked, members("a@here.test", owner=OWNER))
    assert [each.sender for each in reports.envelope.recipients] == [None], "and nobody hears of success"


@pytest.mark.parametrize("notify", ["", "NEVER", "FAILURE,DELAY"])
def test_of_a_list_nobody_hears_who_did_not_ask(notify: str) -> None:
    mail, asked = transaction()
    asked.notify = notify
    mail.add_members(asked, members("a@here.test", owner=OWNER))
    assert [each.fault for each in mail.envelope.recipients] == [""]


def test_a_list_may_have_a_mailbox_of_its_name() -> None:
    mail, asked = transaction()
    for _ in range(2):
        mail.add_members(asked, members("list@here.test", owner=OWNER))
    assert [(each.sender, each.fault) for each in mail.envelope.recipients] == [(OWNER, ""), (None, LIST)]
    assert len(mail.accepted) == 2
    assert mail.loops(b"Delivered-To: list@here.test\r\n", 100, lmtp=False), "nobody is left who has not had it"
    assert mail.envelope.recipients[1].fault == LIST


@pytest.mark.parametrize("kind", Kinds)
def test_a_sender_hears_that_the_list_has_it(kind: str, log: Logged, tmp_path: Path) -> None:
    box, senders, owners = Scripted(NEVER), Scripted(), Scripted()

    async def test(bench: Bench) -> None:
        mail, asked = transaction()
        mail.envelope.envid = "mine"
        mail.add_members(asked, members("a@box.test", "list@here.test", owner=OWNER))
        await keep(bench, mail.envelope)
        await bench.settle()
        assert told(senders) == [("delivered", "list@here.test", "2.0.0")]
        report = senders.batches[0][0][1]
        assert b"Original-Envelope-Id: mine" in report
        assert b"Original-Recipient: rfc822; list@here.test" in report
        assert told(owners) == [("failed", "a@box.test", "5.1.1")]
        assert bench.spool.backlog == 0

    play(kind, log[0], tmp_path, {"box": box, "here": Scripted(), "x": senders, "own": owners}, test)


def test_a_mailbox_that_is_reached_twice_is_there_once() -> None:
    mail, asked = transaction()
    asked.notify = ""
    mail.add(Recipient(parse_address("A@here.test")))
    mail.add_members(asked, members("a@here.test", "b@here.test", owner=OWNER))
    mail.add(Recipient(parse_address("b@here.test")))
    assert [str(each.address) for each in mail.envelope.recipients] == ["A@here.test", "b@here.test"]
    assert [str(each.address) for each in mail.accepted] == ["A@here.test", "A@here.test", "b@here.test"]


def test_who_has_no_mailbox_answers_for_nobody() -> None:
    mail, asked = transaction()
    ghost = Member(parse_address("ghost@here.test"), None, fault="unknown mailbox")
    mail.add_members(asked, (ghost, *members("a@here.test")))
    assert [str(each.address) for each in mail.accepted] == ["a@here.test"]
    mail.envelope.recipients.append(Recipient(parse_address("c@here.test")))
    assert not mail.loops(b"Delivered-To: c@here.test\r\n", 100, lmtp=True)
    assert [(str(each.address), each.fault) for each in mail.envelope.recipients] == [
        ("a@here.test", ""), ("ghost@here.test", "unknown mailbox"),
    ]  # fmt: skip


def test_where_members_go_is_noted() -> None:
    mail, asked = transaction()
    hop = NextHop(1000)
    abroad = Member(parse_address("x@else.test"), None, ours=False)
    mail.add_members(asked, (Member(parse_address("a@here.test"), None, hop=hop), abroad))
    assert mail.hops == [hop]
    # what was delivered abroad before is no loop of ours
    assert not mail.loops(b"Delivered-To: x@else.test\r\n", 100, lmtp=False)
    assert mail.loops(b"Delivered-To: x@else.test\r\n" * 101, 100, lmtp=False)
    assert all(each.fault != R554_LOOP.text for each in mail.envelope.recipients)


def test_a_message_has_not_more_recipients_than_it_may() -> None:
    mail, asked = transaction()
    many = members(*[f"u{n}@here.test" for n in range(EXPANDED_LIMIT)])
    assert mail.add_members(asked, many) is None
    assert mail.add_members(asked, members("one@here.test")) is R452_TOO_MANY_RECIPIENTS
    assert len(mail.envelope.recipients) == EXPANDED_LIMIT
