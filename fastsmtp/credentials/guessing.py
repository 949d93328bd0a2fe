"""How often passwords may be guessed: buckets of failures, which all workers of the machine share.

In: who asks, for which user. Out: whether he may, and how long a no is to take. There is a bucket for each address (of
IPv6 for its /64, which is one customer's) and one for each user. An attempt is spent before anything is looked up and
given back when it was right, so that a thousand at once are no more than the bucket holds. An address that succeeded
for a user within a day has a bucket of its own for him, in the place of the address's: neither who guesses his password
elsewhere nor who guesses others' behind the same NAT can lock him out, and guessing his from there ends as soon.
Not here: what a failure is, and who waits. Nothing fails: what the table forgets is only asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from .._shared import Shared
from ..config_values import Rate
from ..shared_keys import KeyKind

LATELY_SECONDS = 86_400.0
# What a no takes: a second, and so much more for each failure that is still in the bucket.
DELAY = 1.0
DELAY_STEP = 0.25
DELAY_MOST = 4.0


def network_of(ip: str) -> bytes:
    """What is counted as one address; empty for a unix socket."""
    if ":" not in ip:
        return ip.encode()
    address = ip_address(ip.partition("%")[0])
    return address.packed[:8] if isinstance(address, IPv6Address) else address.packed


class Guessing:
    """The buckets. `unlimited` says of which addresses failures are not counted by address; `now` is monotonic."""

    def __init__(
        self, shared: Shared, address: Rate, user: Rate, unlimited: Callable[[str], bool], now: Callable[[], float]
    ) -> None:
        self.shared = shared
        self.address = address
        self.user = user
        self.now = now
        self._unlimited = unlimited

    def attempt(self, ip: str, user: str) -> Attempt:
        """`user` is empty where nobody is named."""
        network = network_of(ip)
        key = self.shared.key
        name = user.encode()
        both = network + b"\0" + name
        lately = key(KeyKind.LOGGED_IN_LATELY, both) if name else 0
        address = key(KeyKind.GUESSES_OF_ADDRESS, network) if network and not self._unlimited(ip) else 0
        if address and lately and self.shared.owes(lately, LATELY_SECONDS, 1.0, self.now()) > 0.0:
            address = key(KeyKind.GUESSES_OF_BOTH, both)
        return Attempt(self, address, key(KeyKind.GUESSES_FOR_USER, name) if name else 0, lately)


class Attempt:
    """One attempt of one client for one user: what is spent is given back by the same. A key of 0: there is no such
    bucket. `address` is the key of the address's bucket, or of that which it has for this user."""

    __slots__ = ("_address", "_guessing", "_lately", "_user")

    def __init__(self, guessing: Guessing, address: int, user: int, lately: int) -> None:
        self._guessing = guessing
        self._address = address
        self._user = user
        self._lately = lately

    def refused(self) -> bool:
        """Whether there have been too many failures."""
        guessing = self._guessing
        if self._address and self._owes(self._address, guessing.address, 1) > 0.0:
            return True
        return bool(self._user) and self._owes(self._user, guessing.user, 1) > 0.0 and not self.known()

    def spend(self) -> bool:
        """Takes it for a failure, until it is given back. False: there have been too many, and nothing is spent."""
        guessing = self._guessing
        if self._address and self._charge(self._address, guessing.address, 1) > 0.0:
            return False
        if self._user and self._charge(self._user, guessing.user, 1) > 0.0:
            if not self.known():
                if self._address:
                    self._charge(self._address, guessing.address, -1)
                return False
            self._user = 0  # nothing was taken there, so nothing is given back: others would guess once more for it
        return True

    def give_back(self) -> None:
        """It was none."""
        guessing = self._guessing
        if self._address:
            self._charge(self._address, guessing.address, -1)
        if self._user:
            self._charge(self._user, guessing.user, -1)

    def succeed(self) -> None:
        """It was right."""
        self.give_back()
        if self._lately:
            guessing = self._guessing
            guessing.shared.forgive(self._lately)
            guessing.shared.spend(self._lately, LATELY_SECONDS, 1.0, guessing.now())

    def delay(self) -> float:
        """Seconds that a no takes: the more, the more failures there have been from this address."""
        guessing = self._guessing
        if not self._address:
            return DELAY
        owed = self._owes(self._address, guessing.address, guessing.address.count)
        return min(DELAY_MOST, DELAY + DELAY_STEP * max(0.0, owed / guessing.address.interval - 1.0))

    def known(self) -> bool:
        """Whether this address has lately succeeded for this user."""
        guessing = self._guessing
        return bool(self._lately) and guessing.shared.owes(self._lately, LATELY_SECONDS, 1.0, guessing.now()) > 0.0

    def _owes(self, key: int, rate: Rate, n: int) -> float:
        guessing = self._guessing
        return guessing.shared.owes(key, rate.interval, rate.count, guessing.now(), n)

    def _charge(self, key: int, rate: Rate, n: int) -> float:
        guessing = self._guessing
        return guessing.shared.spend(key, rate.interval, rate.count, guessing.now(), n)
