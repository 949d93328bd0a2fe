"""Whether a client is who it says it is: the check of Stage.AUTH, and the words in which a store of users answers it.

In: the questions of verdict.py. Out: verdicts, with the user's canonical name where the answer is yes. Every attempt is
paid for before a store is asked, and paid back when it was right (guessing.py). A no has the same words whether the
user is unknown or the password wrong. All but a yes takes a second or more: no connection guesses faster, also where
nothing is looked at any more. What a store said is remembered for a short time under a keyed hash, and forgotten when
the store's stamp of that user changes. Who asks what is just being asked waits for that answer. A store that cannot be
asked is 454: neither right nor wrong; what ends it is told once.
Not here: SASL (auth.py), the stores (directory, dovecot, oauth), the third failure of a session. RFC 4954 4, 6.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import Task
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from math import inf
from secrets import token_hex
from typing import Protocol, TypeAlias

from .. import log as logs
from ..address import Address, AddressError, parse_address
from ..reply import R454_AUTH_UNAVAILABLE, R454_TOO_MANY_FAILURES, R535_BAD_CREDENTIALS
from ..rights import NO_RIGHTS, Rights
from ..verdict import Ask, Client, Identity, Keys, Password, Proved, ScramKeys, Stage, Token, Verdict
from .guessing import DELAY, Attempt, Guessing
from .memory import Memory

LIMITED = Verdict("too-many-failures", R454_TOO_MANY_FAILURES)
UNAVAILABLE = Verdict("auth-unavailable", R454_AUTH_UNAVAILABLE)

Asked: TypeAlias = Password | ScramKeys | Token | Identity


class UnavailableError(Exception):
    """A store cannot be asked now; one line says why."""


class BusyError(UnavailableError):
    """There is no trouble but work."""


@dataclass(frozen=True, slots=True)
class Account:
    """A user. `name` is canonical, and empty for one who does not exist where `keys` are answered. `seconds`: how long
    this may be taken for known."""

    name: str
    rights: Rights = NO_RIGHTS
    keys: Keys | None = None
    seconds: float = inf


@dataclass(frozen=True, slots=True)
class Denied:
    """No. `problem` is why a token is refused, in a word of RFC 7628 3.2.2."""

    problem: str = ""


Answer: TypeAlias = Account | Denied
Found: TypeAlias = Account | None


class Store(Protocol):
    """Users, as one place knows them. `questions` are the kinds it answers, `mechanisms` those of SASL that can
    succeed with it; `label` is what the log calls it. All but `stamp` raise UnavailableError."""

    label: str
    questions: frozenset[type]

    @property
    def mechanisms(self) -> frozenset[str]: ...

    def stamp(self, name: str) -> object:
        """A value that changes with what is known of a user, where that can be told at once."""

    async def check(self, question: Asked, client: Client, known: bool = False) -> Answer:
        """`known`: such a client was lately let in as this user, and need not wait behind those that were not."""

    def find(self, name: str) -> Found | Awaitable[Found]:
        """A user by the canonical name, without any proof."""

    async def close(self) -> None: ...


def canonical(name: str) -> str:
    """The one form of a user name: as a mailbox where it is an address, else in lower case."""
    if "@" in name:
        try:
            return parse_address(name).mailbox
        except AddressError:
            pass
    return name.lower()


def own_rights(name: str, domain: str) -> Rights:
    """A user's own address: the name, where it is one, else the name at `domain`; a name with quotes in it is another
    than that without."""
    try:
        parsed = parse_address(name if "@" in name else Address(name, domain).wire)
    except AddressError:
        return NO_RIGHTS
    return Rights(frozenset((parsed.mailbox,))) if parsed.domain else NO_RIGHTS


class Authority:
    """All stores of a worker, behind one check. `cache` is in seconds; `now` is monotonic."""

    stage = Stage.AUTH

    def __init__(
        self,
        stores: Sequence[Store],
        guessing: Guessing,
        *,
        cache: float,
        log: logs.Log,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._all = stores
        self._stores = {kind: store for store in stores for kind in store.questions}
        self._guessing = guessing
        self._log = log
        self._now = now
        self._sleep = sleep
        self._answers: Memory[Answer] = Memory(cache, now)
        self._rights: Memory[Rights] = Memory(cache, now)
        self._under_way: dict[bytes, Task[Answer | None]] = {}
        self._troubled: set[str] = set()  # labels of stores that could not be asked

    @property
    def mechanisms(self) -> frozenset[str]:
        """What a client may be offered."""
        return frozenset().union(*(store.mechanisms for store in self._all))

    def __call__(self, ask: Ask) -> Verdict | Awaitable[Verdict]:
        question, client = ask.question, ask.client
        if question is None:
            return UNAVAILABLE
        name = canonical(question.name)
        if isinstance(question, Proved):
            return self._prove(question, name)
        attempt = self._guessing.attempt(client.ip, name)
        store = self._stores.get(type(question))
        if store is None:
            return UNAVAILABLE
        begun = self._now()
        # Before what is known: else who is to guess no more could go on with users that have just been here.
        if attempt.refused():
            return self._later(LIMITED, DELAY, begun)
        mark = self._mark(question, name, client.ip)
        known = self._answers.recall(mark, store.stamp(name))
        if isinstance(known, Account):
            return _accept(known)
        if known is not None:
            return self._refuse(known, attempt, begun)
        task = self._under_way.get(mark)
        if task is None:
            if not attempt.spend():
                return self._later(LIMITED, DELAY, begun)
            task = asyncio.get_running_loop().create_task(self._inquire(store, question, client, attempt, mark))
            self._under_way[mark] = task
            task.add_done_callback(lambda _: self._under_way.pop(mark, None))
        return self._answer(task, attempt, begun)

    def rights(self, user: str) -> Rights | Awaitable[Rights | None] | None:
        """What an authenticated user may send as; None: it cannot be asked now."""
        directory = self._stores.get(Identity)
        if directory is None:
            return self._rights_of(user, None)
        mark = self._rights.mark(user)
        known = self._rights.recall(mark, None)
        if known is not None:
            return known
        try:
            found = directory.find(user)
        except UnavailableError as trouble:
            self._tell(directory.label, trouble)
            return None
        if not isawaitable(found):
            return self._rights_of(user, found)
        return self._find_rights(directory, user, found, mark)

    async def close(self) -> None:
        for task in list(self._under_way.values()):
            task.cancel()
        for store in self._all:
            await store.close()

    def _mark(self, question: Asked, name: str, ip: str) -> bytes:
        """What of a question makes it another one; a store may let a user in from some addresses only."""
        secret = ""
        if isinstance(question, Password):
            secret = question.password
        elif isinstance(question, Token):
            secret = question.token
        elif isinstance(question, ScramKeys):
            secret = token_hex()  # each proof is a guess of its own, and paid for
        return self._answers.mark(type(question).__name__, name, secret, ip)

    async def _inquire(
        self, store: Store, question: Asked, client: Client, attempt: Attempt, mark: bytes
    ) -> Answer | None:
        """What the store says; None: it cannot be asked. Goes on when the client goes away: what is spent is spent."""
        stamp = store.stamp(canonical(question.name))
        try:
            answer = await store.check(question, client, attempt.known())
        except UnavailableError as trouble:
            attempt.give_back()
            self._tell(store.label, trouble)
            return None
        self._tell(store.label, None)
        if isinstance(question, ScramKeys):
            return answer  # paid for until it is proved
        if isinstance(answer, Account):
            attempt.succeed()
            self._answers.keep(mark, stamp, answer, answer.seconds)
        else:
            self._answers.keep(mark, stamp, answer, inf)
        return answer

    async def _answer(self, task: Task[Answer | None], attempt: Attempt, begun: float) -> Verdict:
        answer = await asyncio.shield(task)
        if answer is None:
            return await self._later(UNAVAILABLE, DELAY, begun)
        return _accept(answer, attempt) if isinstance(answer, Account) else await self._refuse(answer, attempt, begun)

    def _prove(self, question: Proved, name: str) -> Verdict | Awaitable[Verdict]:
        """The attempt was spent when the keys were asked for."""
        attempt = question.paid
        if not isinstance(attempt, Attempt):
            return UNAVAILABLE
        if question.ok:
            attempt.succeed()
            return _accept(Account(name))
        return self._refuse(Denied(), attempt, self._now())

    def _refuse(self, denied: Denied, attempt: Attempt, begun: float) -> Awaitable[Verdict]:
        verdict = Verdict("bad-credentials", R535_BAD_CREDENTIALS, problem=denied.problem)
        return self._later(verdict, attempt.delay(), begun)

    async def _later(self, verdict: Verdict, seconds: float, begun: float) -> Verdict:
        """Counted from the question on: how long a store took is not seen."""
        await self._sleep(max(0.0, begun + seconds - self._now()))
        return verdict

    async def _find_rights(self, directory: Store, user: str, waiting: Awaitable[Found], mark: bytes) -> Rights | None:
        try:
            rights = self._rights_of(user, await waiting)
        except UnavailableError as trouble:
            self._tell(directory.label, trouble)
            return None
        self._rights.keep(mark, None, rights, inf)
        return rights

    def _rights_of(self, user: str, found: Found) -> Rights:
        """Who is in no directory logged in by a token, or is Dovecot's: then its name is all that is known."""
        if found is not None:
            return found.rights
        for store in self._all:
            if Identity not in store.questions:
                own = store.find(user)
                return own.rights if isinstance(own, Account) else NO_RIGHTS
        return NO_RIGHTS

    def _tell(self, label: str, trouble: UnavailableError | None) -> None:
        """The log hears when it begins and when it ends."""
        if trouble is None:
            if label in self._troubled:
                self._troubled.discard(label)
                self._log.write(logs.AUTH_WELL, label)
        elif not isinstance(trouble, BusyError) and label not in self._troubled:
            self._troubled.add(label)
            self._log.write(logs.AUTH_TROUBLE, label, str(trouble))


def _accept(account: Account, paid: Attempt | None = None) -> Verdict:
    return Verdict("authenticated", user=account.name, keys=account.keys, paid=paid)
