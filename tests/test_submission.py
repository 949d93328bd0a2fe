"""Submission: whose addresses may stand in a header, what is added, what is taken out, what is refused."""

from __future__ import annotations

import email
import email.policy
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.address import NULL, Address, parse_address
from fastsmtp.reply import (
    R550_AUTHOR_NEEDS_SENDER,
    R550_AUTHOR_UNCLEAR,
    R550_FROM_NOT_YOURS,
    R550_HEADER_MALFORMED,
    R550_RESENT_NOT_YOURS,
    R550_SENDER_NOT_YOURS,
    Reply,
)
from fastsmtp.rights import Rights
from fastsmtp.submission import MOST_AUTHORS, Changes, Handling, Submitter, prepare, render_missing

ANN = "ann@example.org"
RIGHTS = Rights(frozenset({ANN, "office@example.org"}), frozenset({"ann.test"}))
DATE = "Sun, 22 Nov 2026 14:00:00 +0000"
REFUSE = Handling()
ADD = Handling("add_sender")
OFF = Handling("off")
COMPLETE = b"Date: today\r\nMessage-ID: <1@x>\r\n"


def submitter(reverse_path: str = ANN, rights: Rights = RIGHTS, user: str = ANN) -> Submitter:
    path = parse_address(reverse_path) if reverse_path else NULL
    return Submitter(user, rights, path, "mx.test", "0pa9", DATE)


def change(handling: Handling, header: bytes, by: Submitter | None = None) -> Changes:
    changes = prepare(handling, header, by or submitter())
    assert isinstance(changes, Changes), changes
    return changes


def kept(octets: bytes, cuts: Collection[tuple[int, int]]) -> bytes:
    return bytes(octet for place, octet in enumerate(octets) if not any(start <= place < end for start, end in cuts))


def whole(handling: Handling, header: bytes, by: Submitter | None = None) -> bytes:
    """The header as it goes on."""
    changes = change(handling, header, by)
    return changes.added + kept(header, changes.cuts)


AUTHORS: dict[str, tuple[bytes, Reply | None]] = {
    "the user": (b"From: Ann <ann@example.org>\r\n", None),
    "the user, in capitals": (b"FROM: ANN@EXAMPLE.ORG\r\n", None),
    "another address of the user": (b"From: office@example.org\r\n", None),
    "any address of a domain": (b"From: x.y@ann.test\r\n", None),
    "below a domain": (b"From: x@sub.ann.test\r\n", R550_FROM_NOT_YOURS),
    "nobody yet": (b"Subject: x\r\n", None),
    "another": (b"From: eve@evil.test\r\n", R550_FROM_NOT_YOURS),
    "another, with the user as name": (b'From: "ann@example.org" <eve@evil.test>\r\n', R550_FROM_NOT_YOURS),
    "another, with the user in a comment": (b"From: eve@evil.test (ann@example.org)\r\n", R550_FROM_NOT_YOURS),
    "the user and another": (
        b"From: ann@example.org, eve@evil.test\r\nSender: ann@example.org\r\n",
        R550_FROM_NOT_YOURS,
    ),
    "another in a group": (b"From: Us: ann@example.org, eve@evil.test;\r\n", R550_FROM_NOT_YOURS),
    "another in a folded line": (b"From:\r\n eve@evil.test\r\n", R550_FROM_NOT_YOURS),
    "another, blank before the colon": (b"From : eve@evil.test\r\n", R550_FROM_NOT_YOURS),
    "two fields": (b"From: ann@example.org\r\nFrom: eve@evil.test\r\n", R550_AUTHOR_UNCLEAR),
    "two fields of the user": (b"From: ann@example.org\r\nfrom: ann@example.org\r\n", R550_AUTHOR_UNCLEAR),
    "what is no list": (b"From: ann@example.org eve@evil.test\r\n", R550_AUTHOR_UNCLEAR),
    "an encoded-word": (b"From: =?utf-8?q?ann?=@example.org\r\n", R550_AUTHOR_UNCLEAR),
    "a crowd": (b"From: " + b"a@ann.test, " * (MOST_AUTHORS + 1) + b"\r\n", R550_AUTHOR_UNCLEAR),
    "an empty field": (b"From: \r\n", R550_AUTHOR_NEEDS_SENDER),
    "a group of nobody": (b"From: Us:;\r\n", R550_AUTHOR_NEEDS_SENDER),
    "a group of nobody, and a sender": (b"From: Us:;\r\nSender: ann@example.org\r\n", None),
    "two, and no sender": (b"From: ann@example.org, office@example.org\r\n", R550_AUTHOR_NEEDS_SENDER),
    "two, and a sender": (b"From: ann@example.org, office@example.org\r\nSender: ann@example.org\r\n", None),
    "another's sender": (b"From: ann@example.org\r\nSender: eve@evil.test\r\n", R550_SENDER_NOT_YOURS),
    "another's sender alone": (b"Sender: eve@evil.test\r\n", R550_SENDER_NOT_YOURS),
    "two senders": (b"Sender: ann@example.org\r\nSender: ann@example.org\r\n", R550_AUTHOR_UNCLEAR),
    "a sender of two": (b"From: ann@example.org\r\nSender: ann@example.org, a@ann.test\r\n", R550_SENDER_NOT_YOURS),
    "passed on by the user": (b"Resent-From: ann@example.org\r\nFrom: ann@example.org\r\n", None),
    "passed on, not written by the user": (
        b"Resent-From: ann@example.org\r\nFrom: eve@evil.test\r\n",
        R550_FROM_NOT_YOURS,
    ),
    "passed on by another": (b"Resent-From: eve@evil.test\r\nFrom: ann@example.org\r\n", R550_RESENT_NOT_YOURS),
    "sent on by another": (b"Resent-Sender: eve@evil.test\r\nFrom: ann@example.org\r\n", R550_RESENT_NOT_YOURS),
    "passed on before": (
        b"Resent-From: ann@example.org\r\nResent-From: eve@evil.test\r\nFrom: ann@example.org\r\n",
        None,
    ),
    "a line feed before another": (b"Subject: x\nFrom: eve@evil.test\r\n", R550_HEADER_MALFORMED),
    "a return before another": (b"Subject: x\rFrom: eve@evil.test\r\n", R550_HEADER_MALFORMED),
    "a NUL": (b"Subject: x\0\r\n", R550_HEADER_MALFORMED),
    "a line that is no field": (b"Subject: x\r\nhello\r\nFrom: eve@evil.test\r\n", R550_HEADER_MALFORMED),
    "a line feed in place of the end": (b"Subject: x\n\nFrom: eve@evil.test\r\n", R550_HEADER_MALFORMED),
}


@pytest.mark.parametrize("end", [b"\r\n", b""], ids=["with a body", "without"])
@pytest.mark.parametrize(("header", "refusal"), AUTHORS.values(), ids=AUTHORS)
def test_who_may_be_the_author(header: bytes, refusal: Reply | None, end: bytes) -> None:
    answer = prepare(REFUSE, header + end, submitter())
    assert answer is refusal or (refusal is None and isinstance(answer, Changes))
    assert isinstance(prepare(OFF, header + end, submitter()), Changes)


def test_who_has_no_rights_may_be_nobody() -> None:
    assert prepare(REFUSE, b"From: ann@example.org\r\n", submitter(rights=Rights())) is R550_FROM_NOT_YOURS
    anybody = submitter(rights=Rights(domains=frozenset("*")))
    assert isinstance(prepare(REFUSE, b"From: eve@evil.test\r\n", anybody), Changes)


SENDERS = {
    "another": (b"From: eve@evil.test\r\n", b"Sender: ann@example.org\r\nFrom: eve@evil.test\r\n"),
    "the user": (b"From: ann@example.org\r\n", b"From: ann@example.org\r\n"),
    "the user, and the user": (b"Sender: ann@example.org\r\nFrom: eve@evil.test\r\n", None),
    "another's sender": (
        b"Sender: eve@evil.test\r\nFrom: ann@example.org\r\n",
        b"Sender: ann@example.org\r\nFrom: ann@example.org\r\n",
    ),
    "two": (
        b"From: ann@example.org, office@example.org\r\n",
        b"Sender: ann@example.org\r\nFrom: ann@example.org, office@example.org\r\n",
    ),
    "a group of nobody": (b"From: Us:;\r\n", b"Sender: ann@example.org\r\nFrom: Us:;\r\n"),
    "nobody yet": (b"", b"From: ann@example.org\r\n"),
}


@pytest.mark.parametrize(("header", "found"), SENDERS.values(), ids=SENDERS)
def test_a_sender_is_added_where_the_author_is_another(header: bytes, found: bytes | None) -> None:
    header += COMPLETE + b"\r\n"
    expected = header if found is None else found + COMPLETE + b"\r\n"
    assert whole(ADD, header) == expected


def test_who_passes_on_is_no_sender() -> None:
    header = b"Resent-From: ann@example.org\r\nFrom: eve@evil.test\r\nSender: list@evil.test\r\n" + COMPLETE + b"\r\n"
    assert b"\r\nSender: ann" not in b"\r\n" + whole(ADD, header)
    assert whole(ADD, header).endswith(header)
    assert prepare(ADD, header.replace(b"ann@", b"eve@"), submitter()) is R550_RESENT_NOT_YOURS


@pytest.mark.parametrize("name", ["two fields", "what is no list", "a line feed before another", "a NUL"])
def test_what_is_unclear_is_refused_where_a_sender_would_be_added(name: str) -> None:
    header, refusal = AUTHORS[name]
    assert prepare(ADD, header + b"\r\n", submitter()) is refusal


def test_what_is_missing_is_added() -> None:
    assert whole(REFUSE, b"Subject: x\r\n\r\n") == (
        b"From: ann@example.org\r\nDate: Sun, 22 Nov 2026 14:00:00 +0000\r\nMessage-ID: <0pa9@mx.test>\r\n"
        b"Subject: x\r\n\r\n"
    )
    complete = b"from : ann@example.org\r\n" + COMPLETE.upper().replace(b"<1@X>", b"<1@x>") + b"\r\n"
    assert change(REFUSE, complete) == Changes(b"", ())


@pytest.mark.parametrize("name", ["From", "Date", "Message-ID"])
def test_only_what_is_missing_is_added(name: str) -> None:
    fields = {"From": "ann@example.org", "Date": "today", "Message-ID": "<1@x>"}
    header = "".join(f"{each}: {value}\r\n" for each, value in fields.items() if each != name).encode() + b"\r\n"
    (added,) = change(REFUSE, header).added.splitlines()
    assert added.startswith(f"{name}: ".encode())


def test_what_is_missing_of_a_message_that_is_passed_on() -> None:
    header = b"Resent-To: bob@example.org\r\nFrom: ann@example.org\r\n" + COMPLETE + b"\r\n"
    assert (
        whole(REFUSE, header)
        == (
            b"Resent-From: ann@example.org\r\nResent-Date: Sun, 22 Nov 2026 14:00:00 +0000\r\n"
            b"Resent-Message-ID: <0pa9@mx.test>\r\n"
        )
        + header
    )


def test_bcc_is_taken_out() -> None:
    header = (
        b"Bcc: a@b.test\r\nFrom: ann@example.org\r\nbcc :\r\n c@d.test,\r\n e@f.test\r\nTo: g@h.test\r\n"
        b"Resent-From: ann@example.org\r\nResent-Date: x\r\nResent-Message-ID: <2@x>\r\nResent-Bcc: i@j.test\r\n"
    ) + COMPLETE
    expected = (
        b"From: ann@example.org\r\nTo: g@h.test\r\n"
        b"Resent-From: ann@example.org\r\nResent-Date: x\r\nResent-Message-ID: <2@x>\r\n"
    ) + COMPLETE
    assert whole(REFUSE, header + b"\r\n") == expected + b"\r\n"
    assert whole(REFUSE, header) == expected
    assert whole(REFUSE._replace(remove_bcc=False), header) == header


def test_where_users_log_in_on_an_mx_only_the_author_is_checked() -> None:
    handling = REFUSE._replace(complete=False)
    assert change(handling, b"Bcc: a@b.test\r\nSubject: x\r\n\r\n") == Changes(b"", ())
    assert prepare(handling, b"From: eve@evil.test\r\n\r\n", submitter()) is R550_FROM_NOT_YOURS
    for header in (b"hello\r\nFrom: eve@evil.test\r\n\r\n", b"From ann Mon Jan\r\nSubject: x\r\n\r\n"):
        assert prepare(handling, header, submitter()) is R550_HEADER_MALFORMED


@pytest.mark.parametrize(
    "header",
    [
        b"From: a@b.test\r\nno field\r\nBcc: x@y.test\r\n\r\n",
        b"From: a@b.test\nBcc: x@y.test\nSubject: x\n\r\n",
        b"From: a@b.test\rbcc : x@y.test\r\n\r\n",
        b"no field\r\nResent-BCC: x@y.test\r\n\r\n",
        b"From: a@b.test\r\n\nBcc: x@y.test\r\n\r\n",
        b"Bcc: w@y.test\nBcc: x@y.test\r\n\r\n",
    ],
)
def test_a_bcc_that_cannot_be_taken_out_is_refused(header: bytes) -> None:
    """Whoever gets the message would read it."""
    assert prepare(OFF, header, submitter()) == R550_HEADER_MALFORMED
    assert isinstance(prepare(Handling("off", remove_bcc=False), header, submitter()), Changes)
    assert isinstance(prepare(Handling("off", complete=False), header, submitter()), Changes)


def test_a_bcc_that_is_none() -> None:
    header = b"Subject: about\r\n Bcc: x\r\nX-Bcc: y\r\nBcc-Note: z\r\n" + COMPLETE + b"From: a@b.test\r\n\r\n"
    assert change(OFF, header) == Changes(b"", ())


def test_a_line_of_an_mbox_file_is_taken_out() -> None:
    header = b"From ann Mon Jan\r\nFrom: ann@example.org\r\n" + COMPLETE + b"\r\n"
    assert whole(REFUSE, header) == header.partition(b"\r\n")[2]


@pytest.mark.parametrize("octets", [b"hello\r\n", b"hello\r\nFrom: eve@evil.test\r\n\r\n", b" folded\r\n", b"a\nb"])
@pytest.mark.parametrize("handling", [REFUSE, OFF])
def test_a_message_without_a_header_gets_one(handling: Handling, octets: bytes) -> None:
    changes = change(handling, octets)
    assert changes.headless
    message = email.message_from_bytes(changes.added + octets + b"body")
    assert sorted(message.keys()) == ["Date", "From", "Message-ID"]
    assert message["From"] == ANN
    assert message.get_payload() == (octets + b"body").decode()


@pytest.mark.parametrize("octets", [b"", b"\r\n", b"Subject: x"])
def test_a_message_with_a_header_is_not_headless(octets: bytes) -> None:
    assert not change(REFUSE, octets).headless


@pytest.mark.parametrize(
    ("user", "rights", "address"),
    [
        (ANN, RIGHTS, ANN),
        ("ann", RIGHTS, ANN),
        ("ann", Rights(frozenset(), frozenset({"ann.test", "b.test"})), "ann@ann.test"),
        ("ann@other.test", Rights(frozenset(), frozenset({"ann.test"})), "ann@ann.test"),
        ("ann@other.test", Rights(frozenset(), frozenset("*")), "ann@other.test"),
        ("ann", Rights(), "ann@mx.test"),
    ],
)
def test_whom_mail_is_from_that_does_not_say(user: str, rights: Rights, address: str) -> None:
    assert str(submitter("", rights, user).address) == address
    assert str(submitter("x@ann.test", rights, user).address) == "x@ann.test"


def test_missing_fields_are_known_by_lower_case_names() -> None:
    assert render_missing({"a"}, {"A": "1", "B": "2"}) == b"B: 2\r\n"


LINES = [b"From: ann@example.org", b"From: eve@evil.test", b"FROM : <eve@evil.test>", b"Sender: eve@evil.test",
         b"Bcc: x@y.test", b"Subject: x", b" folded", b"From ann", b"hello", b"", b"X: a\nFrom: eve@evil.test",
         b"Resent-From: eve@evil.test"]  # fmt: skip


@given(st.lists(st.sampled_from(LINES), max_size=7), st.booleans())
def test_no_reader_sees_another_author(lines: list[bytes], complete: bool) -> None:
    """Whatever is accepted, a reader finds nobody else in it, and it has one author."""
    octets = b"\r\n".join([*lines, b""])
    found = octets.find(b"\r\n\r\n")
    end = 2 if octets.startswith(b"\r\n") else len(octets) if found < 0 else found + 4
    changes = prepare(REFUSE._replace(complete=complete), octets[:end], submitter())
    if isinstance(changes, Reply):
        return
    sent = changes.added + kept(octets, changes.cuts)
    for policy in (email.policy.compat32, email.policy.SMTP):
        message = email.message_from_bytes(sent.replace(b"\r\n", b"\n"), policy=policy)
        for name in ("From", "Sender", "Resent-From"):
            assert all("eve" not in str(value) for value in message.get_all(name, []))
        assert message["Bcc"] is None or not complete
        assert len(message.get_all("From", [])) == 1 or not complete


def test_rights() -> None:
    assert RIGHTS.allows(Address("ANN", "example.org"))
    assert not RIGHTS.allows(NULL)
    assert not Rights().allows(Address("ann", "example.org"))
