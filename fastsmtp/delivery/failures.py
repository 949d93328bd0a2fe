"""What each failure of a dialogue means: stage × answer → result, scope, and where to try again.

One table, TABLE, and the findings of our own, FINDINGS; docs/failures.md shows both to people, and a test holds them
equal. A cell that is missing cannot occur. A failure that is the host's or the network's never ends a recipient;
only a 5xx to MAIL, RCPT, DATA or the message itself does, and what we find that no later attempt will change.
After the last octet of a message, silence or nonsense means "later": it may have been taken, and another host would
deliver it twice. Out: one Outcome for each failure. Nothing here knows a connection.
RFC 5321 3.1, 4.2.1, 4.5.3.2 (PATIENCE), 5.1; RFC 3463; RFC 2033 4.2; RFC 8689 4.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import NamedTuple

from . import Outcome, Result, Retry, Scope
from .replies import Reply


class Stage(StrEnum):
    """Where a dialogue stands. Strings hash in C: each reply is dispatched by its stage."""

    CONNECT = "connect"
    GREETING = "greeting"
    EHLO = "EHLO"
    STARTTLS = "STARTTLS"
    TLS = "TLS handshake"
    AUTH = "AUTH"
    REUSE = "reuse"  # RSET, or the first answer on a connection that was kept from the last message
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    BODY = "message"  # its octets, and BDAT chunks but the last
    END = "final dot"  # or BDAT LAST
    LMTP_END = "final dot, LMTP"


class Answer(Enum):
    """What came in place of what was wanted."""

    TEMPORARY = "4xx"
    PERMANENT = "5xx"
    CLOSING = "421"
    HANG_UP = "hang-up"
    TIME_OUT = "time-out"
    GARBAGE = "garbage"


class Meaning(NamedTuple):
    result: Result
    scope: Scope
    retry: Retry


# How long the host may take, in seconds (RFC 5321 4.5.3.2); AUTH and TLS have no clause. BODY: between two takings of
# octets. Applied by the transport.
PATIENCE: Mapping[Stage, float] = {
    Stage.CONNECT: 60,
    Stage.GREETING: 300,
    Stage.EHLO: 300,
    Stage.STARTTLS: 120,
    Stage.TLS: 60,
    Stage.AUTH: 120,
    Stage.REUSE: 60,
    Stage.MAIL: 300,
    Stage.RCPT: 300,
    Stage.DATA: 120,
    Stage.BODY: 180,
    Stage.END: 600,
    Stage.LMTP_END: 600,
}

_HOST_NEXT = Meaning(Result.DEFERRED, Scope.HOST, Retry.NEXT_HOST)
_HOST_LATER = Meaning(Result.DEFERRED, Scope.HOST, Retry.LATER)
_SAME_HOST = Meaning(Result.DEFERRED, Scope.SESSION, Retry.SAME_HOST)
_MESSAGE_NEXT = Meaning(Result.DEFERRED, Scope.MESSAGE, Retry.NEXT_HOST)
_MESSAGE_LATER = Meaning(Result.DEFERRED, Scope.MESSAGE, Retry.LATER)
_MESSAGE_FAILED = Meaning(Result.FAILED, Scope.MESSAGE, Retry.LATER)
_MESSAGE_UNFIT = Meaning(Result.FAILED, Scope.MESSAGE, Retry.NEXT_HOST)
_RCPT_LATER = Meaning(Result.DEFERRED, Scope.RECIPIENT, Retry.LATER)
_RCPT_FAILED = Meaning(Result.FAILED, Scope.RECIPIENT, Retry.LATER)

_COLUMNS = tuple(Answer)
_ROWS: Mapping[Stage, tuple[Meaning | None, ...]] = {
    # a stage        4xx             5xx              421          hang-up      time-out     garbage
    Stage.CONNECT: (None, None, None, _HOST_NEXT, _HOST_NEXT, None),
    Stage.GREETING: (_HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.EHLO: (_HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.STARTTLS: (_HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.TLS: (None, None, None, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    # A wrong password is wrong at the next host too, and asking there helps to lock the account.
    Stage.AUTH: (_HOST_NEXT, _HOST_LATER, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.REUSE: (_SAME_HOST, _SAME_HOST, _SAME_HOST, _SAME_HOST, _SAME_HOST, _SAME_HOST),
    Stage.MAIL: (_MESSAGE_NEXT, _MESSAGE_FAILED, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.RCPT: (_RCPT_LATER, _RCPT_FAILED, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.DATA: (_MESSAGE_NEXT, _MESSAGE_FAILED, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.BODY: (_MESSAGE_NEXT, _MESSAGE_FAILED, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT, _HOST_NEXT),
    Stage.END: (_MESSAGE_LATER, _MESSAGE_FAILED, _HOST_NEXT, _HOST_LATER, _HOST_LATER, _HOST_LATER),
    Stage.LMTP_END: (_RCPT_LATER, _RCPT_FAILED, _HOST_NEXT, _HOST_LATER, _HOST_LATER, _HOST_LATER),
}  # fmt: skip
TABLE: Mapping[Stage, Mapping[Answer, Meaning]] = {
    stage: {answer: cell for answer, cell in zip(_COLUMNS, row, strict=True) if cell is not None}
    for stage, row in _ROWS.items()
}

# The status where the host gave none, and the words for people; {host}, {stage}, {what}.
_WORDS: Mapping[Answer, tuple[str, str]] = {
    Answer.TEMPORARY: ("4.0.0", "{host} said: {what} (in reply to {stage})"),
    Answer.PERMANENT: ("5.0.0", "{host} said: {what} (in reply to {stage})"),
    Answer.CLOSING: ("4.3.2", "{host} said: {what} (in reply to {stage})"),
    Answer.HANG_UP: ("4.4.2", "lost connection with {host} ({stage}){what}"),
    Answer.TIME_OUT: ("4.4.2", "{host} timed out ({stage}){what}"),
    Answer.GARBAGE: ("4.5.0", "{host} does not keep to the protocol ({stage}){what}"),
}
# Mostly a certificate, or a version of ours that is too new: no breach of the protocol.
_NO_HANDSHAKE = ("4.7.5", "{host}: the {stage} failed{what}")


class Finding(Enum):
    """What we see ourselves, before anything of it is sent. The value is the word in docs/failures.md."""

    TOO_BIG = "larger than SIZE"
    EIGHT_BIT = "8-bit content, no 8BITMIME"
    BINARY = "binary content, no BINARYMIME and CHUNKING"
    BARE = "bare CR or LF, no CHUNKING"
    HEADER_UTF8 = "UTF-8 in header or sender, no SMTPUTF8"
    ADDRESS_UTF8 = "UTF-8 in the recipient, no SMTPUTF8"
    REQUIRETLS = "REQUIRETLS wanted and not to be had"
    BAD_SENDER = "sender or parameter with a control character"
    BAD_RECIPIENT = "recipient with a control character"
    NO_TLS = "TLS required, no STARTTLS"
    NO_LOGIN = "no AUTH mechanism that we know"
    NO_CHANNEL = "AUTH over a connection that is not verified"
    SESSION_FULL = "the host's LIMITS for a session are reached"
    BODY_MISSING = "the message cannot be read"


FINDINGS: Mapping[Finding, tuple[Meaning, str, str]] = {
    Finding.TOO_BIG: (_MESSAGE_FAILED, "5.3.4", "the message is larger than {host} takes"),
    Finding.EIGHT_BIT: (_MESSAGE_FAILED, "5.6.3", "the message has 8-bit content, and {host} offers no 8BITMIME"),
    Finding.BINARY: (_MESSAGE_FAILED, "5.6.3", "the message is binary, and {host} does not take that"),
    Finding.BARE: (_MESSAGE_FAILED, "5.6.3", "the message has a bare CR or LF, and {host} offers no CHUNKING"),
    Finding.HEADER_UTF8: (_MESSAGE_FAILED, "5.6.7", "the message needs SMTPUTF8, and {host} does not offer it"),
    Finding.ADDRESS_UTF8: (_RCPT_FAILED, "5.6.7", "the address needs SMTPUTF8, and {host} does not offer it"),
    Finding.REQUIRETLS: (_MESSAGE_UNFIT, "5.7.30", "{host} cannot promise REQUIRETLS over a verified connection"),
    Finding.BAD_SENDER: (_MESSAGE_FAILED, "5.1.7", "the envelope holds what cannot be sent in a command"),
    Finding.BAD_RECIPIENT: (_RCPT_FAILED, "5.1.3", "the address holds what cannot be sent in a command"),
    Finding.NO_TLS: (_HOST_NEXT, "4.7.4", "TLS is required, and {host} does not offer it"),
    Finding.NO_LOGIN: (_HOST_NEXT, "4.7.0", "{host} offers no way to log in that we know"),
    Finding.NO_CHANNEL: (_HOST_NEXT, "4.7.0", "{host} is not verified, so no password is sent to it"),
    Finding.SESSION_FULL: (_SAME_HOST, "4.5.3", "{host} takes no more in this session"),
    Finding.BODY_MISSING: (_MESSAGE_LATER, "4.3.0", "the message cannot be read"),
}


def classify(reply: Reply) -> Answer:
    """What a reply is that says no."""
    if reply.code == 421:
        return Answer.CLOSING
    return {4: Answer.TEMPORARY, 5: Answer.PERMANENT}.get(reply.code // 100, Answer.GARBAGE)


def failure(stage: Stage, answer: Answer, host: str, reply: Reply | None = None, why: str = "") -> Outcome:
    """The Outcome of a failure. `reply` is what the host said, if it spoke; `why` our words where it did not."""
    meaning = TABLE[stage][answer]
    status, words = _WORDS[answer] if (stage, answer) != (Stage.TLS, Answer.GARBAGE) else _NO_HANDSHAKE
    said = reply.text if reply is not None else ""
    if reply is not None and answer is not Answer.GARBAGE:
        status = reply.status or status
        what = said
    else:
        # A connection that was never made is another thing than one that broke (RFC 3463 3.5).
        status = "4.4.1" if stage is Stage.CONNECT else status
        what = why or said
        what = f": {what}" if what else ""
    status = ("5" if meaning.result is Result.FAILED else "4") + status[1:]
    # Not str.format: the host's words may hold braces, and are put in last.
    text = words.replace("{host}", host).replace("{stage}", stage.value).replace("{what}", what)
    return Outcome(meaning.result, status, text, meaning.scope, meaning.retry, host, said)


def finding(what: Finding, host: str, why: str = "") -> Outcome:
    """The Outcome of what we found ourselves."""
    meaning, status, words = FINDINGS[what]
    text = words.replace("{host}", host) + (f": {why}" if why else "")
    return Outcome(meaning.result, status, text, meaning.scope, meaning.retry, host)
