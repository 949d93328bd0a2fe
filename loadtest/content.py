"""What the generator sends: envelopes from patterns, with a message of one size or several, or the files of a folder.

In: Options, and which of the processes this is. Out: a function that gives the next Mail. Always: process p of n takes
the running numbers p, p + n, p + 2n ... of the patterns, so that all together count round evenly and no `{n}` comes
twice. Where envelopes repeat, which is usual, and there is one message, the same Mail objects come again and again:
a message costs nothing then. Several sizes and files are rendered once, beforehand.
With a ledger each message is made anew, and its id is its sender's local-part too, so that an empty one can be told.
Not here: what the server offers (MAIL has no parameters). On failure: LoadError, when the source is made.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, count, cycle, islice, repeat
from pathlib import Path
from random import Random
from typing import TypeAlias, TypeVar

from . import LoadError
from .ledger import DOMAIN, digest, make_body
from .messages import Message, make_messages, read_messages
from .options import Options
from .patterns import Pattern, common_period, parse_pattern
from .sizes import parse_size, parse_sizes

T = TypeVar("T")
Source: TypeAlias = Callable[[], "Mail"]

PREPARED = 10_000  # envelopes, about 1 KB each; more are made as they are needed
DRAWN = 4096  # at a time


class Envelope:
    """Who a message is from and for, as text and as commands."""

    __slots__ = ("mail", "rcpts", "recipients", "sender")

    def __init__(self, sender: str, mail: bytes, recipients: tuple[str, ...]) -> None:
        self.sender = sender
        self.mail = mail
        self.recipients = recipients
        self.rcpts = tuple([b"RCPT TO:<%s>\r\n" % recipient.encode() for recipient in recipients])


def _render_mail(sender: str) -> bytes:
    return b"MAIL FROM:<%s>\r\n" % sender.encode()


class Mail:
    """One message, ready to send."""

    __slots__ = ("eight_bit", "id", "mail", "raw", "rcpts", "recipients", "sender", "sha256", "text")

    def __init__(self, envelope: Envelope, message: Message, message_id: str = "", sha256: str = "") -> None:
        self.id = message_id  # "" without a ledger
        self.sender = envelope.sender
        self.recipients = envelope.recipients
        self.mail = envelope.mail  # the command, CRLF and no parameters
        self.rcpts = envelope.rcpts
        self.text = message.text  # for DATA
        self.raw = message.raw  # for BDAT; b"" where DATA is used
        self.eight_bit = message.eight_bit
        self.sha256 = sha256  # of the message before dots are stuffed; "" without a ledger


def make_source(options: Options, process: int, seed: int) -> Source:
    """What this process sends, `options.processes` being how many there are. Raises LoadError."""
    rng = Random(f"{seed} {process}")
    numbers = count(process, max(options.processes, 1))
    sender = parse_pattern(options.sender, rng, null=True)
    recipient = parse_pattern(options.recipient, rng)
    if 0 < recipient.period < options.recipients:
        raise LoadError(
            f"--recipients {options.recipients} needs a pattern of as many addresses, such as "
            f"user{{1..{options.recipients}}}@y.test; {recipient.text!r} has {recipient.period}"
        )
    if options.ledger:
        return _ledger_source(options, sender, recipient, numbers, rng)
    messages, shares = _find_messages(options, rng)
    envelopes = _prepare_envelopes(options, sender, recipient, numbers)
    if len(messages) == 1 and isinstance(envelopes, list):
        return _take_turns([Mail(envelope, messages[0]) for envelope in envelopes])
    next_envelope = _take_turns(envelopes) if isinstance(envelopes, list) else envelopes
    next_message = _draw(messages, shares, rng) if len(shares) > 1 else _take_turns(messages)
    return lambda: Mail(next_envelope(), next_message())


def _find_messages(options: Options, rng: Random) -> tuple[list[Message], list[float]]:
    """All that can be sent, and their shares; without shares they come in turn."""
    keep_raw = options.body == "bdat"
    if options.corpus:
        messages = read_messages(Path(options.corpus), keep_raw)
        rng.shuffle(messages)  # processes shall not send the same file at the same time
        return messages, []
    sizes = _find_sizes(options)
    return make_messages(sizes, keep_raw), list(sizes.values())


def _find_sizes(options: Options) -> dict[int, float]:
    return parse_sizes(options.sizes) if options.sizes else {parse_size(options.size): 1.0}


def _prepare_envelopes(
    options: Options, sender: Pattern, recipient: Pattern, numbers: Iterator[int]
) -> list[Envelope] | Callable[[], Envelope]:
    """All envelopes in their order, or, where they are too many, a function that makes the next."""
    made = _make_envelopes(options, sender, recipient, numbers)
    period = common_period(sender, recipient, options.recipients)
    period //= math.gcd(period, max(options.processes, 1))
    return list(islice(made, period)) if 0 < period <= PREPARED else made.__next__


def _make_envelopes(
    options: Options, sender: Pattern, recipient: Pattern, numbers: Iterator[int]
) -> Iterator[Envelope]:
    each = range(options.recipients)
    fixed = _render_mail(sender.render(0)) if sender.period == 1 else b""
    for number in numbers:
        address = sender.render(number)
        first = number * options.recipients
        recipients = tuple([recipient.render(first + n) for n in each])
        yield Envelope(address, fixed or _render_mail(address), recipients)


def _take_turns(things: Sequence[T]) -> Callable[[], T]:
    """Each in its turn, for ever, without a line of Python."""
    return repeat(things[0]).__next__ if len(things) == 1 else cycle(things).__next__


def _draw(things: Sequence[T], shares: Sequence[float], rng: Random) -> Callable[[], T]:
    """At random by their shares; many at a time, which costs a fifth of one by one."""
    bounds = list(accumulate(shares))
    return chain.from_iterable(rng.choices(things, cum_weights=bounds, k=DRAWN) for _ in repeat(None)).__next__


def _ledger_source(
    options: Options, sender: Pattern, recipient: Pattern, numbers: Iterator[int], rng: Random
) -> Source:
    """Messages that can be told apart and checked line by line."""
    if options.corpus:
        raise LoadError("--ledger makes its messages itself: not with --corpus")
    sizes = _find_sizes(options)
    next_size = _draw(list(sizes), list(sizes.values()), rng)
    envelopes = _make_envelopes(options, sender, recipient, numbers)
    running = count(1)
    run = secrets.token_hex(4)  # of this process; not of the seed: a second run into the same ledger needs other ids

    def make_mail() -> Mail:
        envelope = next(envelopes)
        message_id = f"m{run}.{next(running)}"
        address = f"{message_id}@{envelope.sender.partition('@')[2] or DOMAIN}"
        raw = make_body(message_id, next_size(), rng)
        named = Envelope(address, _render_mail(address), envelope.recipients)
        return Mail(named, Message(raw, options.body == "bdat"), message_id, digest(raw))

    return make_mail
