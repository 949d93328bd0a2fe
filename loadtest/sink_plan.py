"""What a sink does other than accept: answers, delays, failures and faults, by the stage of a session.

In: rules as the command line has them, such as `rcpt full@* 452 4.2.2 mailbox full`, `5%@rcpt`, `drip@banner:10%`.
Out: for each stage that has any, a StagePlan that chooses for a subject: the client's address at the banner, the name
given with EHLO, the sender, the recipient at RCPT, all recipients at DATA and at the end of data. The first rule that
matches decides: answers first, then hang-ups, failures, faults. A stage without rules has no plan and costs nothing.
Not here: how it is carried out (sink_protocol). On failure: LoadError for a rule that cannot be understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import translate
from random import Random

from . import LoadError
from .options import parse_seconds, parse_share

STAGES = {
    "banner": "the greeting",
    "ehlo": "EHLO, HELO or LHLO",
    "starttls": "STARTTLS",
    "auth": "AUTH",
    "mail": "MAIL",
    "rcpt": "RCPT, each",
    "data": "DATA, before the 354; each BDAT that is not the last",
    "end": "the end of data; with LMTP for each recipient",
    "quit": "QUIT",
}
FAILURE = b"451 4.3.0 failed on purpose\r\n"
LONG = 1 << 20


class Then(Enum):
    """What follows on what was said."""

    GO_ON = "the session goes on"
    CLOSE = "the connection is closed"
    RESET = "the connection is reset"
    HANG = "nothing more is said"


@dataclass(frozen=True)
class Fault:
    """A way to misbehave. `octets` makes what is said of the right reply."""

    what: str
    octets: Callable[[bytes], bytes]
    then: Then = Then.GO_ON
    answers: bool = True  # the client gets a reply that it can take for one
    slowly: bool = False  # an octet a second
    endless: bool = False  # what is said is said again and again


def _nothing(_: bytes) -> bytes:
    return b""


def _same(reply: bytes) -> bytes:
    return reply


FAULTS = {
    "silence": Fault("says nothing any more", _nothing, Then.HANG, answers=False),
    "stall": Fault("replies, and says nothing any more; at STARTTLS there is no handshake", _same, Then.HANG),
    "421": Fault("421, and closes", lambda _: b"421 4.3.2 closing on purpose\r\n", Then.CLOSE),
    "hangup": Fault("closes without a reply", _nothing, Then.CLOSE, answers=False),
    "reset": Fault("resets the connection without a reply", _nothing, Then.RESET, answers=False),
    "half": Fault("half the reply, and closes", lambda reply: reply[: len(reply) // 2], Then.CLOSE, answers=False),
    "drip": Fault("the reply, an octet a second", _same, slowly=True),
    "long-line": Fault("a reply of one line of a megabyte", lambda reply: reply[:3] + b" " + b"x" * LONG + b"\r\n"),
    "endless": Fault(
        "a reply of lines without end", lambda reply: reply[:3] + b"-more\r\n", answers=False, endless=True
    ),
    "garbage": Fault("octets that are no reply", lambda _: bytes(range(256)) * 4 + b"\r\n", answers=False),
    "mixed": Fault(
        "a reply of two lines with two codes", lambda reply: reply[:3] + b"-one\r\n550 two\r\n", answers=False
    ),
    "bare-lf": Fault("the reply, its lines ended by LF", lambda reply: reply.replace(b"\r\n", b"\n"), answers=False),
    "inject": Fault(
        "the reply, and one that nobody asked for; at STARTTLS in plain text before the handshake",
        lambda reply: reply + b"250 2.0.0 injected on purpose\r\n",
    ),
}


@dataclass(frozen=True)
class Act:
    """What is done instead of accepting: another reply, a fault, or both."""

    reply: bytes = b""
    fault: str = ""


@dataclass
class Rule:
    """`first` is how often it holds for each subject, 0 for always."""

    stage: str
    act: Act
    pattern: str = "*"
    first: int = 0
    share: float = 1.0
    _matches: Callable[[str], object] = field(init=False)
    _seen: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._matches = re.compile(translate(self.pattern), re.IGNORECASE).match

    def applies(self, subject: str, chance: Random) -> bool:
        if not self._matches(subject) or (self.share < 1 and chance.random() >= self.share):
            return False
        if self.first:
            seen = self._seen[subject] = self._seen.get(subject, 0) + 1
            return seen <= self.first
        return True


class StagePlan:
    """The rules of one stage, and how long its replies wait."""

    def __init__(self, rules: list[Rule], delay: float, chance: Random) -> None:
        self.delay = delay
        self._rules = rules
        self._chance = chance

    def choose(self, *subjects: str) -> Act | None:
        """The first rule that holds for one of them; None: it is accepted."""
        for rule in self._rules:
            for subject in subjects:
                if rule.applies(subject, self._chance):
                    return rule.act
        return None


def make_plan(rules: Iterable[Rule], delays: Iterable[tuple[str, float]], seed: int | None) -> dict[str, StagePlan]:
    """The plans of the stages that have one."""
    given = list(rules)
    chance = Random(seed)
    waits = dict(delays)
    return {
        stage: StagePlan([rule for rule in given if rule.stage == stage], waits.get(stage, 0.0), chance)
        for stage in STAGES
        if stage in waits or any(rule.stage == stage for rule in given)
    }


def parse_answer(text: str) -> Rule:
    """`STAGE [PATTERN] [first N] CODE TEXT`; `\\n` in the text begins another line. Raises LoadError."""
    words = text.split()
    stage = _stage(words.pop(0) if words else "", text)
    pattern, first = "*", 0
    if words and words[0] != "first" and not _is_code(words[0]):
        pattern = words.pop(0)
    if len(words) > 1 and words[0] == "first" and words[1].isdecimal():
        first = int(words[1])
        del words[:2]
    if not words or not _is_code(words[0]) or not text.isascii() or not text.isprintable():
        raise LoadError(f"{text!r} is no answer; 'rcpt full@* 452 4.2.2 mailbox full' would be")
    code, lines = words[0], " ".join(words[1:]).split("\\n")
    reply = [f"{code}-{line}\r\n" for line in lines[:-1]] + [f"{code} {lines[-1]}\r\n"]
    return Rule(stage, Act("".join(reply).encode()), pattern, first)


def _is_code(word: str) -> bool:
    return re.fullmatch("[2-5][0-9][0-9]", word) is not None


def _stage(name: str, text: str) -> str:
    if name.lower() not in STAGES:
        raise LoadError(f"{text!r} names no stage; there are {', '.join(STAGES)}")
    return name.lower()


def parse_failure(text: str) -> Rule:
    """`5%` or `5%@rcpt`: that share is answered 451. Raises LoadError."""
    share, _, stage = text.partition("@")
    return Rule(_stage(stage or "end", text), Act(FAILURE), share=parse_share(share))


def parse_hangup(text: str) -> Rule:
    """`1%` or `1%@mail`: that share is not answered, the connection is closed. Raises LoadError."""
    share, _, stage = text.partition("@")
    return Rule(_stage(stage or "end", text), Act(fault="hangup"), share=parse_share(share))


def parse_fault(text: str) -> Rule:
    """`drip@banner` or `421@rcpt:5%`. Raises LoadError."""
    name, _, rest = text.partition("@")
    stage, _, share = rest.partition(":")
    if name not in FAULTS:
        raise LoadError(f"{text!r} names no fault; there are {', '.join(FAULTS)}")
    return Rule(_stage(stage, text), Act(fault=name), share=parse_share(share or "100%"))


def parse_delay(text: str) -> tuple[str, float]:
    """`50ms`, before the reply to the end of data, or `rcpt=50ms`. Raises LoadError."""
    stage, separator, delay = text.rpartition("=")
    return _stage(stage if separator else "end", text), parse_seconds(delay)
