"""Every reply that the server can send, by code and meaning, rendered to bytes once.

A constant's name is its code and what it says. `then` is what its sending brings about: the bytes that follow a
command mean what our answer to it makes of them. Texts are fixed: nothing that a peer or an exception said is ever
put into a reply, except through `Reply` values that a policy makes from its own configuration.
RFC 5321 4.2, RFC 3463 (enhanced status codes), RFC 2034 (where they are shown).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class Then(Enum):
    """What follows a reply."""

    CONTINUE = "commands"
    DATA = "the message"
    LINE = "a response in an AUTH exchange"
    USER = "commands of a user"
    TLS = "the handshake"
    CLOSE = "the end"


class Reply:
    """A reply. `text` has a line for each "\\n"-separated piece, printable ASCII.

    `enhanced` is empty where RFC 2034 allows none (greeting, EHLO, 354). `wire` is what is sent. `plain`: it refuses
    nothing and commands follow. `reason` is for log and metrics, of what is no constant. Raises ValueError for a text
    that does not fit on the wire; `wire` is given where that is known to fit.
    """

    __slots__ = ("code", "enhanced", "plain", "reason", "text", "then", "wire")

    def __init__(
        self,
        code: int,
        enhanced: str,
        text: str,
        then: Then = Then.CONTINUE,
        *,
        wire: bytes | None = None,
        reason: str = "",
    ) -> None:
        self.code = code
        self.enhanced = enhanced
        self.text = text
        self.then = then
        self.reason = reason
        self.plain = code < 400 and then is Then.CONTINUE
        self.wire = self._render() if wire is None else wire

    def _render(self) -> bytes:
        lines = self.text.split("\n")
        status = f"{self.enhanced} " if self.enhanced else ""
        out = []
        for number, line in enumerate(lines, 1):
            if not (line.isascii() and line.isprintable()):
                raise ValueError(f"not printable ASCII: {line!r}")
            separator = " " if number == len(lines) else "-"
            rendered = f"{self.code}{separator}{status}{line}\r\n"
            if len(rendered) > 512:  # RFC 5321 4.5.3.1.5
                raise ValueError(f"reply line of {len(rendered)} octets, 512 allowed")
            out.append(rendered)
        return "".join(out).encode("ascii")

    def __repr__(self) -> str:
        return f"Reply({self.wire!r})"


def queued(message_id: str) -> Reply:
    """250 for a message that is kept. The id is of our own making: nothing to check, nothing to fold."""
    text = f"Queued as {message_id}"
    return Reply(250, "2.0.0", text, wire=f"250 2.0.0 {text}\r\n".encode())


def help_with(verbs: Iterable[str]) -> Reply:
    """214: what may be said here."""
    return Reply(214, "2.0.0", f"Commands: {' '.join(verbs)}\nSee RFC 5321 and the RFCs of what EHLO offers")


def challenge(base64: bytes) -> Reply:
    """334 of an AUTH exchange, which may be longer than other replies (RFC 4954 4)."""
    return Reply(334, "", "", Then.LINE, wire=b"334 %b\r\n" % base64)


def pending(messages: int) -> Reply:
    """253 of ETRN: a queue run was started for so many (RFC 1985 5.3)."""
    return Reply(253, "2.0.0", f"{messages} pending messages, queue run started")


def joined(replies: list[Reply]) -> Reply:
    """One answer of several replies, as LMTP has them at end-of-data (RFC 2033 4.2); it counts as its last."""
    last = replies[-1]
    return Reply(last.code, last.enhanced, last.text, last.then, wire=b"".join([each.wire for each in replies]))


def named(reply: Reply, hostname: str) -> Reply:
    """The same reply with our host name in front of its text, as 220, 221 and 421 have it (RFC 5321 4.2.3)."""
    return Reply(reply.code, reply.enhanced, f"{hostname} {reply.text}", reply.then)


# Of what a message or an address is refused with for good; 450 and 451 say the same of now (RFC 5321 4.2.3).
_SOFT = {550: 450, 551: 451, 552: 452, 553: 450, 554: 451}


def softened(reply: Reply) -> Reply:
    """A refusal for good as one for now: the sender keeps the message. Other replies stay as they are."""
    code = _SOFT.get(reply.code, 0)
    return Reply(code, f"4{reply.enhanced[1:]}", reply.text, reply.then, reason=reply.reason) if code else reply


# The connection is closed without a word: the peer speaks another protocol, or must not learn what it cannot know.
SILENT_CLOSE = Reply(421, "", "", Then.CLOSE, wire=b"", reason="dropped")

R220_READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS", Then.TLS)
R221_BYE = Reply(221, "2.0.0", "Bye", Then.CLOSE)
R235_AUTHENTICATED = Reply(235, "2.7.0", "Authentication successful", Then.USER)
R250_OK = Reply(250, "2.0.0", "OK")
R250_SENDER_OK = Reply(250, "2.1.0", "Sender OK")
R250_RECIPIENT_OK = Reply(250, "2.1.5", "Recipient OK")
R250_CHUNK_OK = Reply(250, "2.0.0", "Chunk received")
R250_QUEUE_RUN = Reply(250, "2.0.0", "Queue run started")
R250_TURNING = Reply(250, "2.0.0", "Now you are the server: greet me")
R251_NOTHING_WAITS = Reply(251, "2.0.0", "No mail waits")
R252_CANNOT_VRFY = Reply(252, "2.5.0", "Cannot VRFY, but will take the mail and try to deliver it")
R252_CANNOT_EXPN = Reply(252, "2.5.0", "Cannot EXPN")
R354_GO_AHEAD = Reply(354, "", "End data with <CRLF>.<CRLF>", Then.DATA)

R421_TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many bad commands, closing", Then.CLOSE)
R421_TOO_MANY_USELESS = Reply(421, "4.7.0", "Too many commands without mail, closing", Then.CLOSE)
R421_TOO_MANY_GUESSES = Reply(421, "4.7.0", "Too many failed authentications, closing", Then.CLOSE)
R421_TOO_MANY_SESSIONS = Reply(421, "4.3.2", "Too many sessions, try again later", Then.CLOSE)
R421_ADDRESS_FULL = Reply(421, "4.7.0", "Too many sessions from your address (address-full)", Then.CLOSE)
R421_NETWORK_FULL = Reply(421, "4.7.0", "Too many sessions from your network (network-full)", Then.CLOSE)
R421_SESSION_RATE = Reply(421, "4.7.0", "You connect too often, try again later (session-rate)", Then.CLOSE)
R421_FAILURE_RATE = Reply(421, "4.7.0", "You were refused too often, try again later (failure-rate)", Then.CLOSE)
R421_TIMEOUT = Reply(421, "4.4.2", "Timed out, closing", Then.CLOSE)
R421_SHUTTING_DOWN = Reply(421, "4.3.2", "Shutting down, try again later", Then.CLOSE)
R421_SESSION_TOO_OLD = Reply(421, "4.4.2", "Session too old, connect again", Then.CLOSE)
R421_NOT_TAKING_MAIL = Reply(421, "4.3.0", "The mail store does not work, try again later", Then.CLOSE)
R421_BUG = Reply(421, "4.3.0", "Internal error, try again later", Then.CLOSE)

R450_ATRN_REFUSED = Reply(450, "4.7.1", "These domains cannot all be fetched by you")
R450_FETCHED_NOW = Reply(450, "4.5.0", "The mail of these domains is being fetched already")
R450_FAILURE_RATE = Reply(450, "4.7.1", "You were refused too often, try again later (failure-rate)")
R450_MESSAGE_RATE = Reply(450, "4.7.1", "Too many messages from you, try again later (message-rate)")
R450_RECIPIENT_RATE = Reply(450, "4.7.1", "Too many recipients from you, try again later (recipient-rate)")
R451_CANNOT_TURN = Reply(451, "4.3.0", "The mail cannot be fetched now, try again later")
R451_LOCAL_ERROR = Reply(451, "4.3.0", "The message could not be kept, try again later")
R451_ALIAS_TOO_LARGE = Reply(451, "4.2.4", "The alias stands for too many addresses")
R451_CHECK_FAILED = Reply(451, "4.3.0", "A check failed, try again later")
R451_RECIPIENT_NOT_CHECKED = Reply(451, "4.3.0", "The mailbox cannot be looked up now, try again later")
R451_RIGHTS_UNKNOWN = Reply(451, "4.3.0", "Your addresses cannot be looked up now, try again later")
R452_NO_ROOM = Reply(452, "4.3.1", "No room for mail now, try again later")
R452_TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients, send the rest in another transaction")
R453_NO_MAIL = Reply(453, "4.0.0", "You have no mail")
R454_NO_TLS = Reply(454, "4.7.0", "TLS is not available")
R454_AUTH_UNAVAILABLE = Reply(454, "4.7.0", "Authentication is not possible now, try again later")
R454_TOO_MANY_FAILURES = Reply(454, "4.7.0", "Too many failed authentications, try again later")

R458_NO_QUEUE_RUN = Reply(458, "4.3.0", "The queue cannot be run now, try again later")
R459_NODE_REFUSED = Reply(459, "4.7.1", "Its queue is not yours to run")

R500_SYNTAX = Reply(500, "5.5.2", "Command not recognized")
R500_LINE_TOO_LONG = Reply(500, "5.5.2", "Command line too long")
R500_LINE_TOO_LONG_CLOSING = Reply(500, "5.5.2", "Command line too long, closing", Then.CLOSE)
R500_AUTH_LINE_TOO_LONG = Reply(500, "5.5.6", "Authentication exchange line too long")
R500_BARE_LF = Reply(500, "5.5.2", "Lines must end in CRLF, not in LF alone, closing", Then.CLOSE)
R500_USE_LHLO = Reply(500, "5.5.1", "This is LMTP, use LHLO")
R500_NOT_LMTP = Reply(500, "5.5.1", "This is not LMTP, use EHLO")
R501_ARGUMENT_NEEDED = Reply(501, "5.5.4", "An argument is needed")
R501_NO_ARGUMENT = Reply(501, "5.5.4", "No argument is allowed")
R501_BAD_SENDER = Reply(501, "5.1.7", "Bad sender address syntax")
R501_BAD_RECIPIENT = Reply(501, "5.1.3", "Bad recipient address syntax")
R501_BAD_PARAMETER = Reply(501, "5.5.4", "Bad, repeated or over-long parameter value")
R501_BAD_BDAT = Reply(501, "5.5.4", "BDAT takes a size and an optional LAST, closing", Then.CLOSE)
R501_BAD_NODE = Reply(501, "5.5.4", "ETRN takes a domain, @domain or #queue")
R501_BAD_DOMAINS = Reply(501, "5.5.4", "ATRN takes domains, with commas between them")
R501_BAD_BASE64 = Reply(501, "5.5.2", "Not base64")
R501_BAD_RESPONSE = Reply(501, "5.5.2", "Not what the mechanism takes")
R501_CANCELLED = Reply(501, "5.7.0", "Authentication cancelled")
R502_NOT_IMPLEMENTED = Reply(502, "5.5.1", "Command not implemented")
R503_HELO_FIRST = Reply(503, "5.5.1", "Say EHLO or HELO first")
R503_NESTED_MAIL = Reply(503, "5.5.1", "A transaction is under way")
R503_MAIL_FIRST = Reply(503, "5.5.1", "Say MAIL first")
R503_RCPT_FIRST = Reply(503, "5.5.1", "Say RCPT first")
R503_BDAT_UNDER_WAY = Reply(503, "5.5.1", "BDAT was used, DATA cannot be mixed with it")
R503_BINARYMIME_NEEDS_BDAT = Reply(503, "5.5.1", "BODY=BINARYMIME needs BDAT")
R503_RCPT_AFTER_BDAT = Reply(503, "5.5.1", "The message has begun, no more recipients")
R503_IN_TLS = Reply(503, "5.5.1", "TLS is in use already")
R503_REFUSED = Reply(503, "5.5.1", "You were refused, only QUIT is left")
R503_AUTHENTICATED = Reply(503, "5.5.1", "You are authenticated already")
R504_UNKNOWN_MECHANISM = Reply(504, "5.5.4", "Authentication mechanism not offered")
R530_AUTH_NEEDED = Reply(530, "5.7.0", "Authentication required")
R535_BAD_CREDENTIALS = Reply(535, "5.7.8", "Authentication credentials invalid")
R538_TLS_NEEDED = Reply(538, "5.7.11", "Encryption is required before authentication")
R550_NO_SUCH_LIST = Reply(550, "5.1.1", "No such list here")
R550_UNKNOWN_MAILBOX = Reply(550, "5.1.1", "No such mailbox here")
R550_RELAYING_DENIED = Reply(550, "5.7.1", "Relaying denied")
R550_HOP_NEEDS_ASCII = Reply(550, "5.6.7", "The mailbox's server takes no non-ASCII addresses or headers")
R550_BARE_LINE_END = Reply(550, "5.5.2", "Message holds a bare CR or LF; lines must end in CRLF")
R550_LINE_TOO_LONG = Reply(550, "5.6.0", "Message holds a line that is too long")
R550_AUTHOR_NEEDS_SENDER = Reply(550, "5.7.1", "From names nobody or several: a Sender field must name one")
R550_AUTHOR_UNCLEAR = Reply(550, "5.6.0", "From or Sender is no address list, or stands twice")
R550_FROM_NOT_YOURS = Reply(550, "5.7.1", "The From field is not an address that you may use")
R550_HEADER_MALFORMED = Reply(550, "5.6.0", "The header holds a line that is no field")
R550_RESENT_NOT_YOURS = Reply(550, "5.7.1", "The Resent-From field is not an address that you may use")
R550_SENDER_NOT_YOURS = Reply(550, "5.7.1", "The Sender field is not an address that you may use")
R552_TOO_BIG = Reply(552, "5.3.4", "Message is over the size limit")
R552_TOO_BIG_CLOSING = Reply(552, "5.3.4", "Message is far over the size limit, closing", Then.CLOSE)
R552_HOP_TOO_BIG = Reply(552, "5.3.4", "Message is larger than the mailbox's server takes")
R552_HEADER_TOO_BIG = Reply(552, "5.3.4", "Message header is too big")
R553_NEEDS_SMTPUTF8 = Reply(553, "5.6.7", "A non-ASCII address needs SMTPUTF8")
R553_PATH_NOT_YOURS = Reply(553, "5.7.1", "The sender is not an address that you may use")
R554_NO_VALID_RECIPIENTS = Reply(554, "5.5.1", "No valid recipients")
R554_EARLY_TALKER = Reply(554, "5.5.0", "You spoke before you were answered, closing", Then.CLOSE)
R554_HOP_NEEDS_7BIT = Reply(554, "5.6.3", "Message has 8-bit content, which the mailbox's server does not take")
R554_LOOP = Reply(554, "5.4.6", "Mail loop: the message has been here or passed too many hosts")
R555_UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Parameter not recognized")

_REASONS = {
    (value.code, value.text): name[5:].lower().replace("_", "-")
    for name, value in globals().items()
    if name[:2] in ("R2", "R3", "R4", "R5")
}
# Every refusal by its reason, and what it says, in each of its forms
REFUSALS: dict[str, str] = {}
for _code, _text in _REASONS:
    if _code >= 400:
        _reason = _REASONS[_code, _text]
        REFUSALS[_reason] = f"{REFUSALS[_reason]}; {_code} {_text}" if _reason in REFUSALS else f"{_code} {_text}"
_REASONS |= {(_SOFT[code], text): name for (code, text), name in _REASONS.items() if code in _SOFT}


def reason(reply: Reply) -> str:
    """What a reply says, as one word for log and metrics: its own, or the name of its constant; else "policy"."""
    return reply.reason or _REASONS.get((reply.code, reply.text), "policy")
