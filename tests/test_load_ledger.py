"""The ledger is what was sent: its lines, its messages, and what servers put before them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import NamedTuple

import pytest

from loadtest import LoadError
from loadtest.ledger import (
    Ledger,
    Outcome,
    any_size,
    digest,
    find_fault,
    make_body,
    outcome_of,
    read_ledger,
    split_trace,
    trace_recipient,
    trace_sender,
)
from loadtest.notifications import Fate, read_notification


class Message(NamedTuple):
    id: str
    sender: str
    recipients: tuple[str, ...]
    sha256: str


MESSAGE = Message("m1", "m1@ledger.test", ("a@y.test", "b@y.test"), digest(b"x\r\n"))


@pytest.mark.parametrize("size", [0, 2, 62, 64, 100, 500, 599, 600, 1000, 70_000, 1 << 20])
def test_bodies_are_whole_lines_and_carry_what_they_are(size: int) -> None:
    body = make_body("m000007", size, random.Random(size))
    assert len(body) == size or (size, len(body)) == (64, 73), "a header and one line is the least"
    assert not set(b"\r\n") & set(body.replace(b"\r\n", b""))
    assert max(map(len, body.split(b"\r\n"))) <= 998
    if size >= 64:
        assert find_fault("m000007", body) == ""
        assert find_fault("m000008", body) == "it is the body of m000007"
        assert find_fault("m000007", body[: body.rindex(b"\r\n", 0, -2) + 2]).endswith(f"octets of {len(body)}")
    if size > 5000:
        assert b"\r\n." in body
        assert not body.isascii()


def test_every_size_is_met() -> None:
    chance = random.Random(2)
    for size in range(600, 2200):
        body = make_body("p0-123456", size, chance)
        assert len(body) == size
        assert find_fault("p0-123456", body) == ""


@pytest.mark.parametrize("size", [80, 700, 3000])
def test_each_octet_that_changes_is_seen(size: int) -> None:
    body = make_body("m1", size, random.Random(3))
    for place in range(len(body)):
        altered = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
        assert find_fault("m1", altered), f"octet {place}"
        if place:
            assert find_fault("m1", body[:place]) or not body[:place].strip(), f"cut at {place}"
    lines = body.split(b"\r\n")
    if size > 2000:
        lines[12], lines[13] = lines[13], lines[12]
        assert "in the place of line" in find_fault("m1", b"\r\n".join(lines))


def test_sizes_reach_from_nothing_to_a_mebibyte() -> None:
    chance = random.Random(1)
    sizes = [any_size(chance) for _ in range(2000)]
    assert min(sizes) == 0
    assert 1 << 19 < max(sizes) <= 1 << 20


def test_an_id_that_is_too_long_is_refused() -> None:
    with pytest.raises(LoadError, match="too long for an id"):
        make_body("m" * 300, 1000, random.Random(1))


def test_the_ledger_says_what_was_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for number, code in enumerate((250, 452, 550, 0)):
        ledger.write(MESSAGE._replace(id=f"m{number}"), outcome_of(code), code, ["b@y.test"] if number == 3 else [])
    ledger.close()
    entries = list(read_ledger(ledger.path))
    assert [entry.outcome for entry in entries] == ["acked", "4xx", "5xx", "unknown"]
    assert [entry.code for entry in entries] == [250, 452, 550, 0]
    assert entries[0].recipients == MESSAGE.recipients
    assert (entries[3].recipients, entries[3].refused) == (("a@y.test",), ("b@y.test",))
    assert (entries[0].id, entries[0].sender, entries[0].sha256) == ("m0", MESSAGE.sender, MESSAGE.sha256)


def test_processes_share_a_ledger(tmp_path: Path) -> None:
    children = []
    for process in range(3):
        pid = os.fork()
        if pid == 0:
            ledger = Ledger(tmp_path / "ledger")
            for number in range(300):
                ledger.write(MESSAGE._replace(id=f"p{process}-{number}"), Outcome.ACKED, 250)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert len({entry.id for entry in read_ledger(tmp_path / "ledger")}) == 900


@pytest.mark.parametrize(
    "line", ["x", "{}", '{"id": "m1"}', json.dumps({**MESSAGE._asdict(), "outcome": "perhaps"}), "[]", '"id"']
)
def test_what_is_no_ledger_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.write(MESSAGE, Outcome.ACKED, 250)
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(LoadError, match="line 2, is no entry"):
        list(read_ledger(path))


def test_a_ledger_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be written: Is a directory"):
        Ledger(tmp_path)
    with pytest.raises(LoadError, match="cannot be written: No space left"):
        Ledger("/dev/full").write(MESSAGE, Outcome.ACKED, 250)
    with pytest.raises(LoadError, match="cannot be read"):
        list(read_ledger(tmp_path / "missing"))


# What servers write before a message, one after the other: two hops, then the mailbox.
TRACES = {
    "none": b"",
    "fastsmtp": b"Return-Path: <m1@ledger.test>\nDelivered-To: a@y.test\nReceived: from c ([192.0.2.1])\n"
    b"\tby mx with ESMTP id 0abc\n\tfor <a@y.test>;\n\tMon, 1 Jan 2024 00:00:00 +0000\n",
    "fastsmtp, as sent": b"Return-Path: <m1@ledger.test>\nDelivered-To: a@y.test\nReceived: from c ([192.0.2.1])\r\n"
    b"\tby mx with ESMTP id 0abc;\r\n\tMon, 1 Jan 2024 00:00:00 +0000\r\n",
    "postfix": b"Return-Path: <m1@ledger.test>\nX-Original-To: a@y.test\nDelivered-To: a@y.test\n"
    b"Received: from c (localhost [127.0.0.1])\n\tby mx (Postfix) with SMTP id 1\n\tfor <a@y.test>; Mon, 1 Jan\n",
    "exim": b"Return-path: <m1@ledger.test>\nEnvelope-to: a@y.test\nDelivery-date: Mon, 1 Jan 2024 00:00:00 +0000\n"
    b"Received: from [127.0.0.1] (helo=c)\n\tby mx with esmtp (Exim 4.96)\n\t(envelope-from <m1@ledger.test>)\n"
    b"\tid 1; Mon, 1 Jan 2024\n",
}


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("size", [0, 2, 20, 100, 3000])
def test_trace_fields_are_parted_from_what_was_sent(name: str, size: int) -> None:
    trace = TRACES[name]
    body = make_body("m1", size, random.Random(size))
    stored = body if "as sent" in name else body.replace(b"\r\n", b"\n")
    arrived = split_trace(trace + stored)
    assert arrived.octets == body
    assert arrived.trace == trace
    assert arrived.id == ("m1" if size >= 64 else "")
    if trace:
        assert (trace_sender(trace), trace_recipient(trace)) == ("m1@ledger.test", "a@y.test")
    else:
        assert (trace_sender(trace), trace_recipient(trace)) == (None, None)


@pytest.mark.parametrize("size", [20, 3000])
def test_line_ends_that_changed_are_seen(size: int) -> None:
    body = make_body("m1", size, random.Random(1))
    mixed = body.replace(b"\r\n", b"\n", 1)
    assert split_trace(mixed).octets == mixed != body
    assert split_trace(body + b"\r").octets != body


def test_what_is_no_trace_field_does_not_pass_for_one() -> None:
    body = make_body("m1", 1000, random.Random(1))
    with pytest.raises(ValueError, match="stands before it"):
        split_trace(b"Subject: something else\r\n" + body)
    assert split_trace(b"Subject: something else\r\n\r\n" + body).id == "", "it is quoted in another message"
    for cut in (b"Return-Path: <m1@", b"Return-Path: <m1@ledger.test>\nRecei", b"Return-Path: <m1@ledger.test>\n\tx"):
        if b"Recei" in cut:
            assert split_trace(cut).octets == b"Recei"
        else:
            with pytest.raises(ValueError, match="ends in its trace fields"):
                split_trace(cut)


REPORT = b"""\
Return-Path: <>
Delivered-To: m1@ledger.test
From: MAILER-DAEMON@mx
Content-Type: multipart/report; report-type=delivery-status; boundary="b"

--b
Content-Type: text/plain

It did not work.
--b
Content-Type: message/delivery-status

Reporting-MTA: dns; mx
Arrival-Date: Mon, 1 Jan 2024 00:00:00 +0000

Final-Recipient: rfc822; a@y.test
Action: failed
Status: 5.1.1
Diagnostic-Code: smtp; 550 5.1.1 nobody

Final-Recipient: rfc822;root@inside
Original-Recipient: rfc822;b@y.test
Action: delayed
Status: 4.4.1
--b
Content-Type: message/rfc822

X-Ledger: m1 00000010
Subject: x

hi
--b--
"""


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_notification_says_of_whom_and_what(end: bytes) -> None:
    found = read_notification(REPORT.replace(b"\n", end))
    assert found is not None
    assert found.id == "m1"
    assert found.fates == (Fate("a@y.test", "failed", "5.1.1"), Fate("b@y.test", "delayed", "4.4.1"))
    without = read_notification(REPORT.replace(b"X-Ledger", b"X-Other"))
    assert without is not None
    assert without.id == ""
    assert split_trace(REPORT).id == "", "the message that it returns is not what arrived"


def test_what_is_no_notification_is_none() -> None:
    assert read_notification(b"Subject: multipart/report\n\nContent-Type: multipart/report\n") is None
    assert read_notification(b"") is None
    with pytest.raises(ValueError, match="names no recipient"):
        read_notification(REPORT.replace(b"message/delivery-status", b"text/plain"))
