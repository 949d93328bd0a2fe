"""The rules of the promise, and whether what arrived keeps them.

In: the ledger, and every delivery. Out: a Report with each broken rule, the id and recipient it is about, and what was
found where:
    A  acknowledged, and neither delivered nor reported as failed (`still_queued` are destinations that are kept shut)
    B  what was delivered is not what was sent, or not whole
    C  a second copy, without a fault behind the first
    D  delivered though not sent, not to them, or refused
    E  left over: a temporary file, where everything is to be at its end (`drained`)
    F  more than one fate: delivered and reported as failed, kept for some recipients only, a report to `<>`
A sink's record counts as delivered only where its answer was 2xx; every record is compared with what was sent.
Always: of a ledger of a million only ids, digests and addresses are in memory, about 300 octets each. Deliveries are
read once, and again only where there are second copies. Not here: what is printed (verify). On failure: LoadError.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path

from . import LoadError
from .deliveries import Delivery, read_maildirs, read_sink, sent_octets, temporary_files
from .ledger import Outcome, find_fault, names, read_ledger
from .notifications import Notification

RULES = {
    "A": "an acknowledged message is missing",
    "B": "what was delivered is not what was sent",
    "C": "a second copy without a fault",
    "D": "delivered though not sent, not to them, or refused",
    "E": "left over",
    "F": "more than one fate",
}
WINDOW = 30.0  # seconds between a delivery and its mark on disk, on a machine that is very busy
EARLY = 0.1  # seconds by which a file's time may lie behind the clock
SHARED = 10_000  # addresses that are held once, however often they come

# What is known of one recipient of one message.
_DELIVERED, _FAILED = 1, 2
_OUTCOMES = tuple(Outcome)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule, and what it is about; `where` is the file, or the record's line."""

    rule: str
    id: str
    recipient: str
    text: str
    where: str = ""


@dataclass(frozen=True)
class Circumstances:
    """What the test did: when it made faults, which destinations it keeps shut."""

    windows: tuple[tuple[float, float], ...] = ()  # epoch seconds, first and last moment of a fault
    ids: frozenset[str] = frozenset()  # messages that a fault may have doubled
    still_queued: frozenset[str] = frozenset()  # domains
    shared: bool = False  # several recipients share a mailbox: its folder says nothing
    drained: bool = False


@dataclass
class Report:
    """What was compared. Counts are of (message, recipient), outcomes of messages."""

    messages: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    delivered: int = 0
    failed: int = 0  # named in a notification
    still_queued: int = 0
    duplicates: int = 0  # second copies, those with a fault included
    violations: list[Violation] = field(default_factory=list)

    @property
    def broken(self) -> dict[str, int]:
        """How often each rule was broken."""
        counted = Counter(violation.rule for violation in self.violations)
        return {rule: counted[rule] for rule in RULES}


class Book:
    """The ledger in memory. What belongs to message number i stands at i in each list. Raises LoadError."""

    def __init__(self, ledger: Path) -> None:
        self.numbers: dict[str, int] = {}
        self._senders: list[str] = []
        self.recipients: list[tuple[str, ...]] = []
        self.refused: dict[int, tuple[str, ...]] = {}
        self.domains: set[str] = set()
        self.fates = bytearray()  # one for each recipient
        self._first = array("Q")  # where those of a message begin
        self._digests = bytearray()
        self._outcomes = bytearray()
        seen: dict[tuple[str, ...], tuple[str, ...]] = {}
        senders: dict[str, str] = {}
        for entry in read_ledger(ledger):
            if entry.id in self.numbers or not entry.id:
                raise LoadError(f"the ledger {ledger} has {entry.id or 'no id'} twice")
            number = self.numbers[entry.id] = len(self.numbers)
            recipients = tuple([normal(recipient) for recipient in entry.recipients])
            # The usual sender is the id at a domain, and the id is there already.
            sender = entry.sender.removeprefix(entry.id) if entry.sender.startswith(f"{entry.id}@") else entry.sender
            if len(seen) < SHARED and len(senders) < SHARED:
                recipients = seen.setdefault(recipients, recipients)
                sender = senders.setdefault(sender, sender)
            self._senders.append(sender)
            self.recipients.append(recipients)
            if entry.refused:
                self.refused[number] = tuple([normal(recipient) for recipient in entry.refused])
            self.domains.update([recipient.rpartition("@")[2] for recipient in recipients])
            self._first.append(len(self.fates))
            self.fates += bytes(len(recipients))
            try:
                self._digests += bytes.fromhex(entry.sha256)
            except ValueError:
                self._digests += b"?"
            if len(self._digests) != 32 * len(self.numbers):
                raise LoadError(f"the ledger {ledger} has no sha256 for {entry.id}")
            self._outcomes.append(_OUTCOMES.index(entry.outcome))

    def digest(self, number: int) -> bytes:
        return bytes(self._digests[32 * number : 32 * number + 32])

    def sender(self, message_id: str, number: int) -> str:
        sender = self._senders[number]
        return message_id + sender if sender.startswith("@") else sender

    def outcome(self, number: int) -> Outcome:
        return _OUTCOMES[self._outcomes[number]]

    def place(self, number: int, recipient: str) -> int:
        """Where the fate of this recipient stands. Raises ValueError when it is none."""
        return self._first[number] + self.recipients[number].index(recipient)

    def find(self, found: Delivery) -> str:
        """The id of a message, by what it says or by its sender; empty where neither says one that was sent."""
        if found.id:
            return found.id if found.id in self.numbers else ""
        local = (found.sender or "").rpartition("@")[0]
        return local if local in self.numbers else ""

    def outcomes(self) -> dict[str, int]:
        return {str(outcome): self._outcomes.count(place) for place, outcome in enumerate(_OUTCOMES)}


def normal(address: str) -> str:
    """Addresses are compared without regard to case: some servers write them anew."""
    return address.lower()


def verify(
    ledger: Path, maildirs: Sequence[Path] = (), sinks: Sequence[Path] = (), given: Circumstances | None = None
) -> Report:
    """Compares them, after everything has come to its end. Raises LoadError."""
    return _Comparison(Book(ledger), maildirs, sinks, given or Circumstances()).report()


class _Comparison:
    def __init__(self, book: Book, maildirs: Sequence[Path], sinks: Sequence[Path], given: Circumstances) -> None:
        self._book = book
        self._maildirs = maildirs
        self._sinks = sinks
        self._given = given
        self._twice: set[tuple[int, str, bool]] = set()  # number, recipient, whether it is a notification

    def report(self) -> Report:
        book = self._book
        report = Report(messages=len(book.numbers), outcomes=book.outcomes())
        for found in self._deliveries():
            report.violations += self._check(found)
        for message_id, number in book.numbers.items():
            report.violations += self._check_fates(message_id, number, report)
        report.violations += self._check_copies(report)
        if self._given.drained:
            for path in chain.from_iterable(map(temporary_files, self._maildirs)):
                report.violations.append(Violation("E", "", "", "a temporary file is left", str(path)))
        return report

    def _deliveries(self) -> Iterator[Delivery]:
        return chain(
            chain.from_iterable(map(read_maildirs, self._maildirs)), chain.from_iterable(map(read_sink, self._sinks))
        )

    def _check(self, found: Delivery) -> Iterator[Violation]:
        """Everything that one delivery shows by itself; notes the fate."""
        message_id = self._book.find(found)
        if found.fault:
            yield Violation("B", message_id, found.recipient or found.mailbox, found.fault, found.place)
        elif found.notification is not None:
            yield from self._check_notification(found, found.notification)
        elif not message_id:
            told = f"its id is {found.id}" if found.id else f"it is from <{found.sender or ''}>, without an id"
            yield Violation("D", found.id, found.recipient or found.mailbox, f"nobody sent it: {told}", found.place)
        else:
            yield from self._check_message(found, message_id, self._book.numbers[message_id])

    def _check_message(self, found: Delivery, message_id: str, number: int) -> Iterator[Violation]:
        book = self._book
        to = self._recipient(found, number)

        def broken(rule: str, text: str) -> Violation:
            return Violation(rule, message_id, to, text, found.place)

        if to in book.refused.get(number, ()):
            yield broken("D", "this recipient was refused")
        elif to not in book.recipients[number]:
            yield broken("D", f"it was for {names(book.recipients[number])}" if to else "no field says for whom it is")
        elif found.recipient is not None and normal(found.recipient) != to:
            yield broken("D", f"it says that it was delivered to {found.recipient}")
        if found.kept and book.outcome(number) in (Outcome.TEMPORARY, Outcome.REFUSED):
            yield broken("D", f"it was answered {book.outcome(number)}")
        if found.sha256 != book.digest(number):
            octets = sent_octets(found)
            fault = "its octets are not those that were sent"
            if octets is not None:
                fault = find_fault(message_id, octets) or f"{len(octets)} octets, not those that were sent"
            yield broken("B", fault)
        elif found.sender is not None and normal(found.sender) != normal(book.sender(message_id, number)):
            yield broken("B", f"it is from <{found.sender}>, and was sent from <{book.sender(message_id, number)}>")
        if found.kept and to in book.recipients[number]:
            self._note(number, to, _DELIVERED)

    def _recipient(self, found: Delivery, number: int) -> str:
        """Whose it is now: by its folder, where folders are such, else by what was noted with it."""
        if found.mailbox and not self._given.shared:
            mailbox = normal(found.mailbox)
            if mailbox.rpartition("@")[2] in self._book.domains or found.recipient is None:
                return mailbox
        if found.recipient is not None:
            return normal(found.recipient)
        recipients = self._book.recipients[number]
        return recipients[0] if len(recipients) == 1 else ""

    def _note(self, number: int, recipient: str, fate: int) -> None:
        place = self._book.place(number, recipient)
        if self._book.fates[place] & fate:
            self._twice.add((number, recipient, fate == _FAILED))
        self._book.fates[place] |= fate

    def _reported(self, found: Delivery, notification: Notification) -> str:
        """The id of the message that a notification is about: the one it returns, or that of whom it went to."""
        message_id = notification.id or (found.recipient or found.mailbox).rpartition("@")[0]
        return message_id if message_id in self._book.numbers else ""

    def _check_notification(self, found: Delivery, notification: Notification) -> Iterator[Violation]:
        book = self._book
        message_id = self._reported(found, notification)
        to = found.recipient if found.recipient is not None else found.mailbox
        if not message_id:
            yield Violation("D", notification.id, to, "it reports on a message that nobody sent", found.place)
            return
        number = book.numbers[message_id]
        sender = book.sender(message_id, number)
        if not sender or to in ("", "<>"):
            yield Violation("F", message_id, to, "a report to <>", found.place)
        elif normal(to) != normal(sender):
            yield Violation("D", message_id, to, f"it reports on a message of <{sender}>", found.place)
        if book.outcome(number) in (Outcome.TEMPORARY, Outcome.REFUSED):
            text = f"it reports on a message that was answered {book.outcome(number)}"
            yield Violation("D", message_id, to, text, found.place)
        for fate in notification.fates:
            recipient = normal(fate.recipient)
            if recipient not in book.recipients[number]:
                text = f"it reports on a recipient of another message: {names(book.recipients[number])}"
                yield Violation("D", message_id, recipient, text, found.place)
            elif fate.action == "failed" and found.kept:
                self._note(number, recipient, _FAILED)

    def _check_fates(self, message_id: str, number: int, report: Report) -> Iterator[Violation]:
        """What only all deliveries together show."""
        book = self._book
        missing = []
        for recipient in book.recipients[number]:
            fate = book.fates[book.place(number, recipient)]
            report.delivered += bool(fate & _DELIVERED)
            report.failed += bool(fate & _FAILED)
            if fate & _DELIVERED and fate & _FAILED:
                yield Violation("F", message_id, recipient, "delivered, and reported as failed")
            if not fate & (_DELIVERED | _FAILED):
                missing.append(recipient)
        shut = [each for each in missing if each.rpartition("@")[2] in self._given.still_queued]
        outcome = book.outcome(number)
        if outcome is Outcome.ACKED:
            report.still_queued += len(shut)
            for recipient in missing:
                if recipient not in shut:
                    yield Violation("A", message_id, recipient, "acknowledged, and neither delivered nor reported")
        elif outcome is Outcome.UNKNOWN and len(shut) < len(missing) < len(book.recipients[number]):
            yield Violation("F", message_id, "", f"kept, but not for {names(missing)}")

    def _check_copies(self, report: Report) -> Iterator[Violation]:
        """Reads once more what came twice, for when and where. Between two copies there was a fault, shortly behind
        the first: its mark did not come to the disk any more."""
        if not self._twice:
            return
        copies: dict[tuple[int, str, bool], list[tuple[float, str]]] = {key: [] for key in self._twice}
        for found in self._deliveries():
            for key in self._keys(found):
                if key in copies:
                    copies[key].append((found.when, found.place))
        numbers = {number for number, _, _ in copies}
        ids = {number: message_id for message_id, number in self._book.numbers.items() if number in numbers}
        for (number, recipient, _), seen in copies.items():
            report.duplicates += len(seen) - 1
            for (first, place), (second, other) in pairwise(sorted(seen)):
                if ids[number] not in self._given.ids and not self._excused(first, second):
                    text = f"copies of {first:.3f} and {second:.3f}, no fault between"
                    yield Violation("C", ids[number], recipient, text, f"{place} and {other}")

    def _keys(self, found: Delivery) -> Iterator[tuple[int, str, bool]]:
        """The fates that a delivery was noted for."""
        if found.fault or not found.kept:
            return
        if found.notification is not None:
            message_id = self._reported(found, found.notification)
            for fate in found.notification.fates if message_id else ():
                if fate.action == "failed":
                    yield self._book.numbers[message_id], normal(fate.recipient), True
        elif message_id := self._book.find(found):
            number = self._book.numbers[message_id]
            yield number, self._recipient(found, number), False

    def _excused(self, first: float, second: float) -> bool:
        """`second` may be the repetition of a delivery whose mark a fault has swallowed."""
        return any(
            first - EARLY <= end and begin <= second and begin - first < WINDOW for begin, end in self._given.windows
        )
