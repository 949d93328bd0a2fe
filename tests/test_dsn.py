"""Delivery reports as others read them: Python's email package, RFC 3464's examples, Postfix's bounce beside ours, and
hostile replies, headers and addresses."""

from __future__ import annotations

import email
import email.policy
import re
import time
from collections.abc import Iterator
from email.message import EmailMessage

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmtp._parser import BodyEnd, Parser
from fastsmtp.address import NULL, Address, parse_address
from fastsmtp.dsn import KINDS, Action, Event, Reporter, is_wanted
from fastsmtp.message import Content, Envelope, Message, Recipient, date, waives_tls
from fastsmtp.record import parse_envelope, render_envelope

ANN = Address("ann", "example.org")
BOB = Address("bob", "example.net")
DAY = 86400.0
ARRIVED = 1_000_000_000.0  # Sun, 9 Sep 2001 01:46:40 +0000
PREFIX = b"Received: from a.test ([192.0.2.1])\r\n\tby mx.example.org with ESMTP id 0abc; Sun, 9 Sep 2001\r\n"
BODY = b"Subject: Lunch on Friday\r\nMessage-ID: <lunch@example.org>\r\n\r\nAt one?\r\n"
REPORTER = Reporter("mx.example.org")


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    date.cache_clear()
    yield
    monkeypatch.undo()
    time.tzset()
    date.cache_clear()


def message_of(
    body: bytes = BODY, *, reverse_path: Address = ANN, ret: str = "", envid: str = "", content: Content = Content.NONE
) -> Message:
    """As the parser would describe it: the header ends at the first empty line, or with the message."""
    envelope = Envelope(reverse_path)
    envelope.id = "0abc"
    envelope.ret = ret
    envelope.envid = envid
    end = body.find(b"\r\n\r\n") + 4
    return Message(envelope, PREFIX, [body], len(body), len(body) if end == 3 else end, content, ARRIVED)


def event_of(
    address: Address = BOB,
    action: Action = Action.FAILED,
    status: str = "5.1.1",
    text: str = "the recipient was refused",
    reply: str = "550 5.1.1 <bob@example.net>: Recipient address rejected: User unknown in virtual mailbox table",
    remote: str = "mail.example.net",
    *,
    notify: str = "",
    orcpt: str = "",
    retry_until: float = 0,
) -> Event:
    recipient = Recipient(address, notify, orcpt)
    return Event(recipient, action, status, text, ARRIVED + 5, reply, remote, retry_until)


def reports(message: Message, *events: Event, reporter: Reporter = REPORTER, now: float = ARRIVED + 5) -> list[Message]:
    assert message.parts is not None
    ids = iter(f"0def{number}" for number in range(10))
    head = b"".join(message.parts)[: reporter.head_size(message)]
    return reporter.write(message, events, head, lambda: next(ids), now)


def report(message: Message, *events: Event, reporter: Reporter = REPORTER, now: float = ARRIVED + 5) -> Message:
    (only,) = reports(message, *events, reporter=reporter, now=now)
    return only


def octets_of(message: Message) -> bytes:
    assert message.parts is not None
    return message.prefix + b"".join(message.parts)


def parsed(message: Message) -> EmailMessage:
    return email.message_from_bytes(octets_of(message), policy=email.policy.default)


def split(message: Message) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The header, and of each part its header and its octets; by the boundary alone, which stands nowhere else."""
    octets = octets_of(message)
    header, _, rest = octets.partition(b"\r\n\r\n")
    found = re.search(rb'\r\n\tboundary="([^"]+)"', header)
    assert found
    _, *parts, end = rest.split(b"\r\n--" + found[1])
    assert end == b"--\r\n"
    assert rest.count(found[1]) == len(parts) + 1
    pairs = []
    for part in parts:
        top, empty_line, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        assert empty_line
        pairs.append((top, content))
    return header, pairs


def groups(fields: bytes) -> list[dict[str, str]]:
    """The groups of fields in a machine part, folded lines joined (RFC 3464 2.1)."""
    found = []
    for group in fields.decode().removesuffix("\r\n").split("\r\n\r\n"):
        lines = group.replace("\r\n ", " ").split("\r\n")
        found.append(dict(line.split(": ", 1) for line in lines))
    return found


def text_of(message: Message) -> str:
    part = parsed(message).get_body(("plain",))
    assert part is not None
    return str(part.get_content()).replace("\r\n", "\n")


def flat(message: Message) -> str:
    return " ".join(text_of(message).split())


GOLDEN = """\
Date: Fri, 14 Sep 2001 01:46:40 +0000
From: Mail Delivery System <MAILER-DAEMON@mx.example.org>
To: <ann@example.org>
Subject: Mail could not be delivered: 3 recipients
Message-ID: <0def0@mx.example.org>
In-Reply-To: <lunch@example.org>
References: <lunch@example.org>
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
	boundary="=_0def0"
Content-Transfer-Encoding: 7bit

This is a delivery report in MIME format.
--=_0def0
Content-Type: text/plain; charset=us-ascii
Content-Description: Notification
Content-Transfer-Encoding: 7bit

This is the mail system at mx.example.org.

Your message could not be delivered to

    bob@example.net (you wrote to staff+all@example.com)

There is no such mailbox. Check the address for typing errors, or ask
the recipient for the right one.

The mail server mail.example.net answered:

    550 5.1.1 <bob@example.net>: Recipient address rejected: User
    unknown in virtual mailbox table

Your message could not be delivered to

    carol@example.com
    dave@example.com

The recipient's mail server did not answer. This was tried again and
again for 5 days, and has now been given up. Send the message again
later. If it fails again, ask your postmaster.

In technical terms:

    no connection to mx.example.com: timed out

The message:

    Subject:   Lunch on Friday
    Accepted:  Sun, 9 Sep 2001 01:46:40 +0000
    Known as:  0abc

Recipients who are not named above are not concerned. If you need help,
ask your postmaster and forward this whole report: what follows is for
experts.

--=_0def0
Content-Type: message/delivery-status
Content-Description: Delivery report
Content-Transfer-Encoding: 7bit

Original-Envelope-Id: QQ+1
Reporting-MTA: dns; mx.example.org
Arrival-Date: Sun, 9 Sep 2001 01:46:40 +0000

Original-Recipient: rfc822; staff+all@example.com
Final-Recipient: rfc822; bob@example.net
Action: failed
Status: 5.1.1
Remote-MTA: dns; mail.example.net
Diagnostic-Code: smtp; 550 5.1.1 <bob@example.net>: Recipient address
 rejected: User unknown in virtual mailbox table
Last-Attempt-Date: Sun, 9 Sep 2001 01:46:45 +0000
Final-Log-ID: 0abc

Final-Recipient: rfc822; carol@example.com
Action: failed
Status: 4.4.1
Diagnostic-Code: X-fastsmtp; no connection to mx.example.com: timed out
Last-Attempt-Date: Sun, 9 Sep 2001 01:46:45 +0000
Final-Log-ID: 0abc

Final-Recipient: rfc822; dave@example.com
Action: failed
Status: 4.4.1
Diagnostic-Code: X-fastsmtp; no connection to mx.example.com: timed out
Last-Attempt-Date: Sun, 9 Sep 2001 01:46:45 +0000
Final-Log-ID: 0abc

--=_0def0
Content-Type: message/rfc822
Content-Description: Your message
Content-Transfer-Encoding: 7bit

Received: from a.test ([192.0.2.1])
	by mx.example.org with ESMTP id 0abc; Sun, 9 Sep 2001
Subject: Lunch on Friday
Message-ID: <lunch@example.org>

At one?

--=_0def0--
"""


def golden() -> Message:
    lost = "no connection to mx.example.com: timed out"
    return report(
        message_of(ret="FULL", envid="QQ+2B1"),
        event_of(orcpt="rfc822;staff+2Ball@example.com"),
        event_of(Address("carol", "example.com"), status="4.4.1", text=lost, reply="", remote=""),
        event_of(Address("dave", "example.com"), status="4.4.1", text=lost, reply="", remote=""),
        now=ARRIVED + 5 * DAY,
    )


def test_golden() -> None:
    assert octets_of(golden()).decode().split("\r\n") == GOLDEN.split("\n")


def test_as_python_reads_it() -> None:
    read = parsed(golden())
    assert not read.defects
    assert (read.get_content_type(), read.get_param("report-type")) == ("multipart/report", "delivery-status")
    assert read["auto-submitted"] == "auto-replied"
    assert read["from"].addresses[0].addr_spec == "MAILER-DAEMON@mx.example.org"
    assert read["to"].addresses[0].addr_spec == "ann@example.org"
    text, status, original = read.iter_parts()
    assert text.get_content_type() == "text/plain"
    of_message, of_bob, of_carol, of_dave = status.get_payload()
    assert of_message["reporting-mta"] == "dns; mx.example.org"
    assert of_bob["action"] == "failed"
    assert of_carol["final-recipient"] == "rfc822; carol@example.com"
    assert of_dave["status"] == "4.4.1"
    assert original.get_content()["subject"] == "Lunch on Friday"


def test_a_report_is_a_message_to_keep() -> None:
    made = golden()
    octets = octets_of(made)
    assert (made.size, made.arrived, made.id) == (len(octets), ARRIVED + 5 * DAY, "0def0")
    assert octets[: made.header_end].endswith(b'"\r\nContent-Transfer-Encoding: 7bit\r\n\r\n')
    assert octets[made.header_end :].startswith(b"This is")
    assert made.envelope.reverse_path == NULL
    assert not made.envelope.utf8
    kept = parse_envelope(render_envelope(made.envelope), made.id)
    assert [(one.address, one.notify) for one in kept.recipients] == [(ANN, "NEVER")]
    assert not kept.reverse_path


@pytest.mark.parametrize(
    ("reverse_path", "recipient", "body"),
    [
        (ANN, BOB, BODY),
        (ANN, BOB, BODY + b".\r\n\xe9\r\n"),
        (ANN, Address("jörg", "example.net"), BODY),
        (Address("jörg", "example.org"), BOB, BODY),
        (ANN, BOB, b"Subject: \xe9\r\n\r\n"),
    ],
)
def test_it_is_what_the_parser_would_say(reverse_path: Address, recipient: Address, body: bytes) -> None:
    """As if it had come by DATA."""
    made = report(message_of(body, reverse_path=reverse_path, ret="FULL"), event_of(recipient))
    parser = Parser(frozenset())
    parser.data(1 << 20)
    parser.feed(octets_of(made).replace(b"\r\n.", b"\r\n..") + b".\r\n")
    while not isinstance(end := parser.next(), BodyEnd):
        assert end is not None
    assert (end.size, end.header_end) == (made.size, made.header_end)
    assert (end.bare, end.long_line, end.long_header) == (False, False, False)
    assert end.eight_bit == bool(made.content & Content.EIGHT_BIT) == (made.envelope.body == "8BITMIME")
    assert end.eight_bit_header == bool(made.content & Content.EIGHT_BIT_HEADER) == made.envelope.utf8


def test_no_report_of_a_report() -> None:
    every = [event_of(action=action, notify="SUCCESS,FAILURE,DELAY") for action in Action]
    assert len(reports(message_of(), *every)) == len(Action)
    assert reports(message_of(reverse_path=NULL), *every) == []
    made = golden()
    assert reports(made, event_of(notify="SUCCESS,FAILURE,DELAY")) == []


@pytest.mark.parametrize(
    ("notify", "wanted"),
    [
        ("", "failed delayed"),
        ("NEVER", ""),
        ("FAILURE", "failed"),
        ("DELAY", "delayed"),
        ("SUCCESS", "delivered relayed expanded"),
        ("SUCCESS,FAILURE", "failed delivered relayed expanded"),
        ("SUCCESS,FAILURE,DELAY", "failed delayed delivered relayed expanded"),
    ],
)
def test_notify(notify: str, wanted: str) -> None:
    assert [action.value for action in Action if is_wanted(action, notify)] == wanted.split()


def test_one_report_for_each_kind_of_event() -> None:
    names = {name: Address(name, "example.net") for name in ("a", "b", "c", "d", "e")}
    made = reports(
        message_of(),
        event_of(names["a"]),
        event_of(names["b"], Action.DELAYED, "4.2.2", retry_until=ARRIVED + DAY),
        event_of(names["c"]),
        event_of(names["d"], notify="NEVER"),
        event_of(names["e"], Action.DELIVERED, "2.0.0"),
    )
    told = [[group["Final-Recipient"] for group in groups(split(one)[1][1][1])[1:]] for one in made]
    assert told == [["rfc822; a@example.net", "rfc822; c@example.net"], ["rfc822; b@example.net"]]
    assert [one.id for one in made] == ["0def0", "0def1"]


def test_a_delayed_one() -> None:
    made = report(message_of(), event_of(action=Action.DELAYED, status="4.2.2", retry_until=ARRIVED + 5 * DAY))
    assert parsed(made)["subject"] == "Mail is delayed: bob@example.net"
    fields = groups(split(made)[1][1][1])[1]
    assert fields["Action"] == "delayed"
    assert fields["Will-Retry-Until"] == "Fri, 14 Sep 2001 01:46:40 +0000"
    said = flat(made)
    assert "The mailbox is full." in said
    assert "will be tried again until Fri, 14 Sep 2001 01:46:40 +0000. You need not send it again" in said
    assert "given up" not in said
    failed = report(message_of(), event_of(retry_until=ARRIVED + 5 * DAY))
    assert "Will-Retry-Until" not in groups(split(failed)[1][1][1])[1]


@pytest.mark.parametrize("action", [Action.DELIVERED, Action.RELAYED, Action.EXPANDED])
def test_good_news(action: Action) -> None:
    """RFC 3461 4.3: only the header comes back, whatever RET says."""
    made = report(
        message_of(ret="FULL"),
        event_of(action=action, status="2.1.5", reply="250 2.1.5 Ok", notify="SUCCESS"),
    )
    _, (_, (_, fields), (top, returned)) = split(made)
    assert groups(fields)[1]["Action"] == action.value
    assert groups(fields)[1]["Diagnostic-Code"] == "smtp; 250 2.1.5 Ok"
    assert b"text/rfc822-headers" in top
    assert b"At one?" not in returned
    said = flat(made)
    assert KINDS[action].opening + " bob@example.net" in said
    assert "postmaster" not in said


@pytest.mark.parametrize(
    ("status", "action", "shown"),
    [
        ("5.1.1", Action.FAILED, "5.1.1"),
        ("4.4.1", Action.FAILED, "4.4.1"),
        ("2.0.0", Action.FAILED, "5.0.0"),
        ("5.1.1", Action.DELAYED, "4.1.1"),
        ("5.1.1", Action.DELIVERED, "2.1.1"),
        ("", Action.FAILED, "5.0.0"),
        ("550", Action.DELAYED, "4.0.0"),
        ("5.1.1\r\nAction: delivered", Action.FAILED, "5.0.0"),
        ("2.1.5", Action.RELAYED, "2.1.5"),
    ],
)
def test_status(status: str, action: Action, shown: str) -> None:
    made = report(message_of(), event_of(action=action, status=status, notify="SUCCESS,FAILURE,DELAY"))
    assert groups(split(made)[1][1][1])[1]["Status"] == shown


@pytest.mark.parametrize(
    ("reply", "remote", "diagnostic", "host"),
    [
        ("550 5.1.1 no", "mail.test", "smtp; 550 5.1.1 no", "dns; mail.test"),
        ("550-5.1.1 no", "[192.0.2.1]", "smtp; 550-5.1.1 no", "dns; [192.0.2.1]"),
        ("550", "[IPv6:2001:db8::1]", "smtp; 550", "dns; [IPv6:2001:db8::1]"),
        ("", "mail.test", "X-fastsmtp; our words", "dns; mail.test"),
        ("garbage", "", "X-fastsmtp; our words", None),
        ("550 no", "unix:/run/dovecot/lmtp", "smtp; 550 no", None),
        ("550 no", "mail.test\r\nX-Evil: 1", "smtp; 550 no", None),
        ("550 a\r\nX-Evil:\t1 \0 \u202e é", "", "smtp; 550 a X-Evil: 1 ? ? ?", None),
    ],
)
def test_remote(reply: str, remote: str, diagnostic: str, host: str | None) -> None:
    made = report(message_of(), event_of(reply=reply, remote=remote, text="our words"))
    fields = groups(split(made)[1][1][1])[1]
    assert fields["Diagnostic-Code"] == diagnostic
    assert fields.get("Remote-MTA") == host


def test_a_long_reply_is_cut() -> None:
    made = report(message_of(), event_of(reply="550 " + "no " * 100_000))
    assert made.size < 8000
    assert groups(split(made)[1][1][1])[1]["Diagnostic-Code"].endswith(" ...")


@pytest.mark.parametrize(
    ("orcpt", "field"),
    [
        ("rfc822;bob@example.net", "rfc822; bob@example.net"),
        ("rfc822;a+2Bb+3Dc@example.net", "rfc822; a+b=c@example.net"),
        ("rfc822;+22a+20+20b+22@example.net", 'rfc822; "a  b"@example.net'),
        ("rfc822;x+0D+0AAction:+20delivered", "rfc822; x??Action: delivered"),
        ("X-local;somebody", "X-local; somebody"),
        ("utf-8;j\\x{F6}rg@example.net", "utf-8; j\\x{F6}rg@example.net"),
    ],
)
def test_original_recipient(orcpt: str, field: str) -> None:
    made = report(message_of(), event_of(orcpt=orcpt))
    assert groups(split(made)[1][1][1])[1]["Original-Recipient"] == field
    assert octets_of(made).isascii()


JOERG = Address("jörg", "example.net")


def test_non_ascii_recipient() -> None:
    """RFC 6533: types of their own, 8bit; the envelope is ASCII, so SMTPUTF8 is not needed."""
    made = report(message_of(), event_of(JOERG, orcpt="utf-8;j\\x{F6}rg@example.net", reply="550 <jörg@…>: no"))
    header, ((_, text), (top, fields), _) = split(made)
    assert header.isascii()
    assert b"report-type=global-delivery-status" in header
    assert b"Content-Transfer-Encoding: 8bit" in header
    assert b"Content-Type: message/global-delivery-status\r\n" in top
    assert groups(fields)[1]["Final-Recipient"] == "utf-8; jörg@example.net"
    assert groups(fields)[1]["Original-Recipient"] == "utf-8; jörg@example.net"
    assert groups(fields)[1]["Diagnostic-Code"] == "smtp; 550 <jörg@…>: no"
    assert text.isascii()
    assert "    jörg@example.net\n" in text_of(made)
    assert (made.envelope.body, made.envelope.utf8, made.content) == ("8BITMIME", False, Content.EIGHT_BIT)


def test_an_embedded_character_that_is_none_stays_coded() -> None:
    made = report(message_of(), event_of(JOERG, orcpt="utf-8;\\x{D800}\\x{2B}\\x{0A}\\x{FFFFFF}\\x{F6}@x"))
    shown = groups(split(made)[1][1][1])[1]["Original-Recipient"]
    assert shown == "utf-8; \\x{D800}\\x{2B}\\x{0A}\\x{FFFFFF}ö@x"


def test_non_ascii_sender() -> None:
    made = report(message_of(reverse_path=JOERG), event_of())
    header, _ = split(made)
    assert "\r\nTo: <jörg@example.net>\r\n" in header.decode()
    assert (made.envelope.body, made.envelope.utf8, made.content) == ("7BIT", True, Content.EIGHT_BIT_HEADER)
    assert made.envelope.recipients[0].address == JOERG


def test_configured_sender() -> None:
    reporter = Reporter("mx.example.org", sender=parse_address("postmaster@example.org"))
    made = report(message_of(), event_of(), reporter=reporter)
    assert parsed(made)["from"] == "Mail Delivery System <postmaster@example.org>"


@pytest.mark.parametrize(
    ("body", "ret", "content", "kind", "encoding"),
    [
        (BODY, "FULL", Content.NONE, "message/rfc822", "7bit"),
        (BODY, "HDRS", Content.NONE, "text/rfc822-headers", "7bit"),
        (BODY, "", Content.NONE, "text/rfc822-headers", "7bit"),
        (BODY + b"\xe9\r\n", "FULL", Content.EIGHT_BIT, "message/rfc822", "8bit"),
        (BODY + b"\xe9\r\n", "HDRS", Content.EIGHT_BIT, "text/rfc822-headers", "7bit"),
        (BODY + b"bare\n", "FULL", Content.BARE, "text/rfc822-headers", "7bit"),
        (BODY + b"\0\r\n", "FULL", Content.NONE, "text/rfc822-headers", "7bit"),
        (BODY, "FULL", Content.BINARY, "text/rfc822-headers", "7bit"),
        (BODY + b"x" * 2000, "FULL", Content.NONE, "text/rfc822-headers", "7bit"),
        (BODY + b"x\r\n" * 700, "FULL", Content.NONE, "text/rfc822-headers", "7bit"),
        (b"Subject: \xc3\xa9\r\n\r\n", "FULL", Content.EIGHT_BIT_HEADER, "message/global", "8bit"),
        (b"Subject: \xc3\xa9\r\n\r\n", "HDRS", Content.EIGHT_BIT_HEADER, "message/global-headers", "8bit"),
        (b"Subject: \xe9\r\n\r\n", "FULL", Content.EIGHT_BIT_HEADER, "text/rfc822-headers", "quoted-printable"),
    ],
)
def test_what_comes_back(body: bytes, ret: str, content: Content, kind: str, encoding: str) -> None:
    made = report(message_of(body, ret=ret, content=content), event_of(), reporter=Reporter("mx.test", whole=2000))
    (top, octets) = split(made)[1][2]
    assert top.decode().split("\r\n")[0] == f"Content-Type: {kind}"
    assert top.decode().split("\r\n")[2] == f"Content-Transfer-Encoding: {encoding}"
    assert made.envelope.body == ("8BITMIME" if encoding == "8bit" else "7BIT")
    assert (encoding == "8bit") == (not octets_of(made).isascii())
    if kind in ("message/rfc822", "message/global"):
        assert octets == PREFIX + body


@pytest.mark.parametrize("wish", ["", "requires", "waives"])
def test_a_report_is_kept_from_others_as_its_message_was(wish: str) -> None:
    """RFC 8689 5."""
    message = message_of(ret="FULL")
    message.envelope.require_tls = wish == "requires"
    message.envelope.waives_tls = wish == "waives"
    made = report(message, event_of())
    assert (made.envelope.require_tls, made.envelope.waives_tls) == (wish == "requires", wish == "waives")
    assert waives_tls(octets_of(made), made.header_end) is (wish == "waives")
    kind = "text/rfc822-headers" if wish == "requires" else "message/rfc822"
    assert split(made)[1][2][0].startswith(b"Content-Type: %s" % kind.encode())


def test_only_what_is_needed_is_read() -> None:
    reporter = Reporter("mx.test", whole=2000, header=100)
    big = message_of(BODY + b"x" * 2000, ret="FULL")
    assert reporter.head_size(message_of(ret="FULL")) == len(BODY)
    assert reporter.head_size(message_of(ret="HDRS")) == BODY.index(b"At one?")
    assert reporter.head_size(big) == BODY.index(b"At one?")
    assert reporter.head_size(message_of(b"A: " + b"x" * 200 + b"\r\n\r\n")) == 100


def test_the_boundary_is_in_no_part() -> None:
    body = BODY + b"--=_0def0\r\n--=_0def0_--\r\n"
    made = report(message_of(body, ret="FULL"), event_of())
    assert split(made)[1][2][1] == PREFIX + body


@pytest.mark.parametrize(
    ("subject", "shown"),
    [
        (b"=?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Grüße"),
        (b"=?iso-8859-1?q?Gr=FC=DFe?=\r\n =?iso-8859-1?q?_an_alle?=", "Grüße an alle"),
        ("Grüße".encode(), "Grüße"),
        (b"=?nonsense?q?a?=", "=?nonsense?q?a?="),
        (b"=?utf-8?b?a?=", "=?utf-8?b?a?="),
        (b"=?utf-8?q?a=0D=0A=0D=0AYou_won!?=", "a You won!"),
        (b"=?utf-8?q?=E2=80=AEevil?=", "?evil"),
        (b"x" * 100, "x" * 72 + "..."),
    ],
)
def test_the_subject_for_people(subject: bytes, shown: str) -> None:
    made = report(message_of(b"From: a@b\r\nSUBJECT : " + subject + b"\r\n\r\n"), event_of())
    assert f"    Subject:   {shown}\n" in text_of(made)


@pytest.mark.parametrize(
    "field",
    [b"Message-ID: no-brackets", b"Message-ID: <a b@c>", b"Message-ID: <a@b> <c@d>", b"Message-ID: <\xe9@b>", b"A: b"],
)
def test_no_thread_without_a_clean_message_id(field: bytes) -> None:
    read = parsed(report(message_of(field + b"\r\n\r\n"), event_of()))
    assert read["in-reply-to"] is None
    assert read["references"] is None


@pytest.mark.parametrize(
    ("seconds", "span"),
    [(59, "less than a minute"), (60, "1 minute"), (7200, "2 hours"), (86400, "1 day"), (5.9 * DAY, "5 days")],
)
def test_how_long_it_was_tried(seconds: float, span: str) -> None:
    made = report(message_of(), event_of(status="4.4.1"), now=ARRIVED + seconds)
    assert f"again for {span}, and has now been given up" in flat(made)


def test_rfc_3464_examples() -> None:
    """Appendix E.1 and E.3: what must be in the fields of a failure after many attempts, and of a delay."""
    louis = parse_address("louisl@larry.slip.umd.edu")
    event = event_of(
        louis, status="4.0.0", reply="426 connection timed out", remote="", orcpt="rfc822;louisl@larry.slip.umd.edu"
    )
    made = report(message_of(), event, reporter=Reporter("cs.utk.edu"))
    of_message, of_recipient = groups(split(made)[1][1][1])
    assert of_message["Reporting-MTA"] == "dns; cs.utk.edu"
    assert (
        of_recipient.items()
        >= {
            "Original-Recipient": "rfc822; louisl@larry.slip.umd.edu",
            "Final-Recipient": "rfc822; louisl@larry.slip.umd.edu",
            "Action": "failed",
            "Status": "4.0.0",
            "Diagnostic-Code": "smtp; 426 connection timed out",
        }.items()
    )
    assert "Will-Retry-Until" not in of_recipient

    event = event_of(parse_address("newton@cs.utk.edu"), Action.DELAYED, "4.0.0", reply="", text="host down")
    made = report(message_of(), event, reporter=Reporter("sun2.nsfnet-relay.ac.uk"))
    _, of_recipient = groups(split(made)[1][1][1])
    assert (of_recipient["Action"], of_recipient["Status"]) == ("delayed", "4.0.0")


# As Postfix 3.7.11 sent it back, cut down to what is compared: for bob with RET=FULL ENVID=QQ+2B1
# ORCPT=rfc822;rob+2Bx@example.com, for jörg with SMTPUTF8 RET=HDRS ORCPT=utf-8;j\x{F6}rg@example.net.
POSTFIX_BOB = b"""\
From: Mail Delivery System <MAILER-DAEMON@pf.test>
Subject: Undelivered Mail Returned to Sender
To: ann@example.org
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
\tboundary="F396E218895.1795345264/pf.test"
Content-Transfer-Encoding: 8bit

This is a MIME-encapsulated message.

--F396E218895.1795345264/pf.test
Content-Description: Notification
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

<bob@example.net>: there is no such mailbox

--F396E218895.1795345264/pf.test
Content-Description: Delivery report
Content-Type: message/delivery-status

Reporting-MTA: dns; pf.test
Original-Envelope-Id: QQ+1
X-Postfix-Queue-ID: F396E218895
X-Postfix-Sender: rfc822; ann@example.org
Arrival-Date: Sun, 22 Nov 2026 11:01:03 +0000 (UTC)

Final-Recipient: rfc822; bob@example.net
Original-Recipient: rfc822;rob+x@example.com
Action: failed
Status: 5.1.1
Diagnostic-Code: X-Postfix; there is no such mailbox

--F396E218895.1795345264/pf.test
Content-Description: Undelivered Message
Content-Type: message/rfc822
Content-Transfer-Encoding: 8bit

Subject: Lunch

Hello

--F396E218895.1795345264/pf.test--
"""
POSTFIX_JOERG = """\
From: Mail Delivery System <MAILER-DAEMON@pf.test>
To: ann@example.org
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status;
\tboundary="00071218896.1795345264/pf.test"
Content-Transfer-Encoding: 8bit

This is a MIME-encapsulated message.

--00071218896.1795345264/pf.test
Content-Description: Notification
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

<jörg@example.net>: there is no such mailbox

--00071218896.1795345264/pf.test
Content-Description: Delivery report
Content-Type: message/global-delivery-status
Content-Transfer-Encoding: 8bit

Reporting-MTA: dns; pf.test
X-Postfix-Queue-ID: 00071218896
X-Postfix-Sender: rfc822; ann@example.org
Arrival-Date: Sun, 22 Nov 2026 11:01:03 +0000 (UTC)

Final-Recipient: utf-8; jörg@example.net
Original-Recipient: utf-8;jörg@example.net
Action: failed
Status: 5.1.1
Diagnostic-Code: X-Postfix; there is no such mailbox

--00071218896.1795345264/pf.test
Content-Description: Undelivered Message Headers
Content-Type: message/global-headers
Content-Transfer-Encoding: 8bit

Subject: Grüße

--00071218896.1795345264/pf.test--
""".encode()


def skeleton(raw: bytes) -> tuple[list[str], list[dict[str, str]]]:
    """The types of the parts, and what Postfix and we both say for programs."""
    boundary = re.search(rb'boundary="([^"]+)"', raw)
    assert boundary
    parts = [part.lstrip(b"\n").partition(b"\n\n") for part in raw.split(b"\n--" + boundary[1])[1:-1]]
    types = [re.search(rb"Content-Type: ([a-z0-9/-]+)", top) for top, _, _ in parts]
    told = [
        {name: value.replace("; ", ";") for name, value in group.items() if name in COMMON}
        for group in groups(parts[1][2].removesuffix(b"\n").replace(b"\n", b"\r\n"))
    ]
    return [found[1].decode() if found else "" for found in types], told


COMMON = ("Original-Envelope-Id", "Original-Recipient", "Final-Recipient", "Action", "Status")


@pytest.mark.parametrize("name", ["bob", "jörg"])
def test_the_same_as_postfix(name: str) -> None:
    if name == "bob":
        postfix = POSTFIX_BOB
        message = message_of(b"Subject: Lunch\r\n\r\nHello\r\n", ret="FULL", envid="QQ+2B1")
        event = event_of(orcpt="rfc822;rob+2Bx@example.com")
    else:
        postfix = POSTFIX_JOERG
        message = message_of("Subject: Grüße\r\n\r\nHällo\r\n".encode(), ret="HDRS")
        event = event_of(JOERG, orcpt="utf-8;j\\x{F6}rg@example.net")
    assert skeleton(octets_of(report(message, event)).replace(b"\r\n", b"\n")) == skeleton(postfix)


# What strangers write: text with line ends, fields, controls, other scripts, halves of surrogate pairs.
hostile = st.lists(
    st.sampled_from(
        ["\r\n", "\n", "\r", "\r\n\r\n", "X-Evil: 1", "\r\nBcc: x@y", "--=_0def0", "\0", "\u202e", "\u2028", "é", "字",
         "\udcff", " ", "  ", "550 ", "=?utf-8?q?=0D=0A?=", "x" * 300, "+0D+0A", "\\x{A}", ";", '"', "<", ">", "@"]
    )
    | st.text(max_size=20),
    max_size=8,
).map("".join)  # fmt: skip
names = st.sampled_from([BOB, JOERG, Address("a  b", "x.test"), Address('a"\\>b', "[192.0.2.1]")])
addresses = names | st.builds(Address, hostile.filter(bool), st.sampled_from(["x.test", "[ipv6:2001:db8::1]"]))
pieces = st.sampled_from(
    [b"Subject: ", b"Message-ID: <", b"Message-ID:\r\n <a@b>", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0",
     b"\xff", b"\xc3\xa9", b" ", b"\t", b"a" * 600, b"--=_0def0--\r\n", b"=?utf-8?b?"]
)  # fmt: skip
bodies = st.lists(pieces | st.binary(max_size=20), max_size=12).map(b"".join)
events = st.builds(
    Event,
    st.builds(Recipient, addresses, st.just("SUCCESS,FAILURE,DELAY"), hostile),
    st.sampled_from(Action),
    st.sampled_from(["5.1.1", "4.2.2", "2.0.0", "5.7.26"]) | hostile,
    hostile,
    st.floats(0, 4e9),
    hostile,
    st.sampled_from(["mail.test", "[192.0.2.1]"]) | hostile,
    st.floats(0, 4e9),
)

TOP = ["Date", "From", "To", "Subject", "Message-ID", "In-Reply-To", "References", "Auto-Submitted", "MIME-Version",
       "Content-Type", "Content-Transfer-Encoding"]  # fmt: skip
OF_MESSAGE = ["Original-Envelope-Id", "Reporting-MTA", "Arrival-Date"]
OF_RECIPIENT = ["Original-Recipient", "Final-Recipient", "Action", "Status", "Remote-MTA", "Diagnostic-Code",
                "Last-Attempt-Date", "Final-Log-ID", "Will-Retry-Until"]  # fmt: skip


def names_in(header: bytes) -> list[str]:
    lines = header.decode().split("\r\n")
    return [line.partition(":")[0] for line in lines if not line.startswith(("\t", " "))]


def is_part_of(found: list[str], table: list[str]) -> bool:
    """Whether `found` are rows of `table`, in its order, each at most once."""
    return found == [name for name in table if name in found]


@settings(max_examples=200, deadline=None)
@given(bodies, st.sampled_from(["FULL", "HDRS", ""]), hostile, addresses, st.lists(events, min_size=1, max_size=4))
def test_nothing_that_strangers_write_forges_anything(
    body: bytes, ret: str, envid: str, reverse_path: Address, happened: list[Event]
) -> None:
    message = message_of(body, ret=ret, envid=envid, reverse_path=reverse_path)
    made = reports(message, *happened, reporter=Reporter("mx.example.org", header=1000), now=ARRIVED + DAY)
    assert len(made) == len({event.action for event in happened})
    for one in made:
        octets = octets_of(one)
        lines = octets.split(b"\r\n")
        assert max(map(len, lines)) <= 998
        assert not any(line.count(b"\r") or line.count(b"\n") or line.count(b"\0") for line in lines)
        header, parts = split(one)
        assert is_part_of(names_in(header), TOP)
        assert header.isascii() != one.envelope.utf8
        assert bool(one.content & Content.EIGHT_BIT_HEADER) == one.envelope.utf8
        assert (one.envelope.body == "7BIT") == octets[one.header_end :].isascii()
        (_, text), (_, status), *original = parts
        assert text.isascii()
        of_message, *of_recipients = status.removesuffix(b"\r\n").split(b"\r\n\r\n")
        assert is_part_of(names_in(of_message), OF_MESSAGE)
        assert all(is_part_of(names_in(group), OF_RECIPIENT) for group in of_recipients)
        for top, shown in original:
            if b"message/rfc822" in top or b"message/global\r\n" in top:
                assert shown == PREFIX + body
        read = parsed(one)
        assert not read.defects
        assert read.get_content_type() == "multipart/report"
        assert len(list(read.iter_parts())) == len(parts)


@settings(max_examples=100, deadline=None)
@given(st.lists(events, min_size=1, max_size=6))
def test_every_recipient_is_told_of_once(happened: list[Event]) -> None:
    told: dict[str, int] = {}
    for one in reports(message_of(), *happened):
        _, *of_recipients = groups(split(one)[1][1][1])
        told[of_recipients[0]["Action"]] = len(of_recipients)
        assert len({group["Action"] for group in of_recipients}) == 1
    expected = [event.action.value for event in happened]
    assert told == {action: expected.count(action) for action in expected}
