"""A store that knows hashes and keys: whatever a source (a file, a query) says of a user, it compares itself.

In: questions about names; a source that finds a `Record`. Out: answers. Who does not exist costs what the others cost:
the password is compared with one that nobody has, and the keys are imagined. A user without SCRAM keys is for SCRAM
one who does not exist. What a source says that no password can be compared with is trouble of the store, not a wrong
password: the operator hears of it. Not here: where records come from, and what a failure costs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Protocol, TypeAlias

from ..rights import Rights
from ..verdict import Client, Identity, Keys, Password, ScramKeys, Token
from . import Account, Answer, Asked, Denied, Found, UnavailableError, canonical
from .guessing import network_of
from .hashes import NOBODYS, Hashes
from .scram import Shape, imagine_keys

PASSWORDS = frozenset(("PLAIN", "LOGIN", "EXTERNAL"))
SCRAM = frozenset(("SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"))


@dataclass(frozen=True, slots=True)
class Record:
    """What a source keeps of a user. `password` is argon2 or SCRAM keys as text; empty: nobody can log in by it."""

    name: str
    password: str = field(repr=False)
    keys: Keys | None = field(repr=False)
    rights: Rights


Sought: TypeAlias = Record | None


class Source(Protocol):
    """Where records are. `shapes` are those that users' SCRAM keys have, with how many have each; none: not every user
    has such keys, so SCRAM is not offered."""

    label: str

    @property
    def shapes(self) -> Mapping[Shape, int]: ...

    def stamp(self, name: str) -> object:
        """As a store's."""

    def find(self, name: str) -> Sought | Awaitable[Sought]:
        """By the canonical name. Raises UnavailableError."""

    async def close(self) -> None: ...


class Directory:
    """`secret` is what imagined keys are made of."""

    questions: frozenset[type] = frozenset((Password, ScramKeys, Identity))

    def __init__(self, source: Source, hashes: Hashes, secret: bytes) -> None:
        self.label = source.label
        self.stamp = source.stamp
        self._source = source
        self._hashes = hashes
        self._secret = secret

    @property
    def mechanisms(self) -> frozenset[str]:
        return PASSWORDS | SCRAM if self._source.shapes else PASSWORDS

    async def check(self, question: Asked, client: Client, known: bool = False) -> Answer:
        name = canonical(question.name)
        found = self._source.find(name)
        record = await found if isawaitable(found) else found
        match question:
            case Password():
                return await self._check_password(record, question.password, None if known else network_of(client.ip))
            case ScramKeys():
                return self._keys(record, name)
            case Identity():
                return Denied() if record is None else Account(record.name, record.rights)
            case Token():
                return Denied()

    def find(self, name: str) -> Found | Awaitable[Found]:
        found = self._source.find(name)
        return _wait(found) if isawaitable(found) else _account(found)

    async def close(self) -> None:
        self._hashes.close()
        await self._source.close()

    async def _check_password(self, record: Sought, password: str, stranger: bytes | None) -> Answer:
        stored = record.password if record is not None and record.password else NOBODYS
        try:
            fits = await self._hashes.verify(stored, password, stranger)
        except ValueError as error:
            raise UnavailableError(f"user {record.name if record else ''}: {error}") from None
        if record is None or not fits:
            return Denied()
        return Account(record.name, record.rights)

    def _keys(self, record: Sought, name: str) -> Account:
        if record is None or record.keys is None:
            return Account("", keys=imagine_keys(self._secret, name, self._source.shapes))
        return Account(record.name, record.rights, record.keys)


def _account(record: Sought) -> Found:
    return None if record is None else Account(record.name, record.rights)


async def _wait(waiting: Awaitable[Sought]) -> Found:
    return _account(await waiting)
