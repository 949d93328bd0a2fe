"""Lists that may be long (mailboxes, networks, names, addresses, aliases), in files that all workers map.

In: files that list_compile.py made of an operator's text files. Out: look-ups that read the mapped file and keep
nothing in memory: a key takes one place of an index and the few lines of its bucket, a network a binary search.
A file is never written to: a new version takes its name, `refresh` finds that, and look-ups under way have the old one.
Its pages are mapped ahead, 0.02 s for 10,000,000 mailboxes: a process that has just started would wait 3 to 8 µs for
each look-up else. Of addresses of 30 octets such a list takes 32 each, once for the machine, and a look-up 1.3 µs (0.6
where the same few are looked for: memory that no cache holds is what takes longest).
Not here: what a text file looks like (list_compile.py), who makes it when (list_watch.py), what a list is for.
Failure: ListError, one line that names the file; what was there before stays in force. crc32: RFC 1952 8.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence, Set
from hashlib import sha256
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_pton
from typing import Literal, NamedTuple, Protocol, TypeAlias
from zlib import crc32

Kind: TypeAlias = Literal["mailboxes", "mailboxes-case", "networks", "names", "addresses", "aliases"]
Network: TypeAlias = IPv4Network | IPv6Network

MAGIC = b"fastsmtp list 1\n"
# magic, kind; of the text file mtime (ns), size and inode; entries, index_at, places, flags
HEADER = struct.Struct("=16s16s7Q")
TEXT = 256  # where the contents begin
PLAIN, FULL = 1, 2  # flags: there are keys without a domain, with one
POPULATE = 22  # MADV_POPULATE_READ of Linux 5.14, for which mmap has no name yet
PIECE = 4 << 20  # octets whose pages are mapped by one call: 0.3 ms
REMEMBERED = 10_000  # addresses of clients whose answer is kept: reading one takes longer than finding it

_V4 = struct.Struct("!I")
_V6 = struct.Struct("!QQ")


class Mailboxes(Protocol):
    """A list of mailboxes: `local@domain`, the local-part as it is compared there."""

    def has(self, mailbox: str) -> bool: ...


class Values(Protocol):
    """A list of names, each with a value."""

    def get(self, key: str) -> str | None: ...


class ListError(ValueError):
    """A list cannot be used. `line` is 0 where the whole file is meant."""

    def __init__(self, file: Path | str, line: int, message: str) -> None:
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")
        self.file = str(file)
        self.line = line
        self.message = message


class Stamp(NamedTuple):
    """Which version of a text file it is."""

    mtime: int
    size: int
    inode: int


class ListFile(NamedTuple):
    """A text file, and what it is read as."""

    kind: Kind
    path: Path

    def compiled(self, folder: Path) -> Path:
        """Where its compiled form is."""
        name = sha256(os.fsencode(self.path)).hexdigest()[:16]
        return folder / f"{self.kind}-{name}"


class Header(NamedTuple):
    """The beginning of a compiled file."""

    kind: str
    stamp: Stamp
    entries: int
    index_at: int  # of networks: where those of IPv6 begin
    places: int  # buckets, or networks of IPv6
    flags: int

    @property
    def total(self) -> int:
        """Of what a person would count."""
        return self.entries + self.places if self.kind == "networks" else self.entries

    def pack(self) -> bytes:
        numbers = (*self.stamp, self.entries, self.index_at, self.places, self.flags)
        return HEADER.pack(MAGIC, self.kind.encode(), *numbers).ljust(TEXT - 1, b"\0") + b"\n"


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_mtime_ns, status.st_size, status.st_ino)


def read_header(file: Path) -> Header | None:
    """None where there is no such file, or one of another format."""
    try:
        with file.open("rb") as opened:
            return _parse_header(opened.read(HEADER.size))
    except OSError:
        return None


def _parse_header(octets: bytes) -> Header | None:
    if len(octets) < HEADER.size or not octets.startswith(MAGIC):
        return None
    _, kind, mtime, size, inode, entries, index, places, flags = HEADER.unpack_from(octets)
    return Header(kind.rstrip(b"\0").decode(), Stamp(mtime, size, inode), entries, index, places, flags)


class Keys:
    """Keys, some with values. A line of the file is `key` or `key TAB value`; the lines of a bucket stand together, a
    line end before each; the crc32 of the key with a line end says which one. Never to be asked for a key that holds a
    control character."""

    __slots__ = ("_find", "_index", "_map", "_shift", "flags")

    def __init__(self, mapped: mmap.mmap, header: Header) -> None:
        self.flags = header.flags
        self._map = mapped
        self._find = mapped.find
        self._index = memoryview(mapped)[header.index_at :].cast("Q")
        self._shift = shift_of(header.places)

    def has(self, key: str) -> bool:
        line = f"{key}\n".encode()
        place = crc32(line) >> self._shift
        index = self._index
        return self._find(b"\n" + line, index[place] - 1, index[place + 1]) >= 0

    def get(self, key: str) -> str | None:
        """The value of a key that has one."""
        octets = key.encode()
        place = crc32(octets + b"\n") >> self._shift
        end = self._index[place + 1]
        found = self._find(b"\n" + octets + b"\t", self._index[place] - 1, end)
        if found < 0:
            return None
        found += len(octets) + 2
        return self._map[found : self._find(b"\n", found, end)].decode()


def shift_of(places: int) -> int:
    """What is left of a crc32 when it is shifted so far is the number of one of the buckets, a power of two of them."""
    return 33 - places.bit_length()


class Networks:
    """Networks as sorted intervals that neither touch nor overlap; IPv6 addresses are two words each."""

    __slots__ = ("_four", "_known", "_six")

    def __init__(self, four: Sequence[Sequence[int]], six: Sequence[Sequence[int]]) -> None:
        """`four`: starts and ends; `six`: the high and the low words of starts, then those of ends."""
        self._four = four
        self._six = six
        self._known: dict[str, bool] = {}

    @classmethod
    def of(cls, networks: Iterable[Network]) -> Networks:
        """Those that a configuration names."""
        spans: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for network in networks:
            spans[network.version].append((int(network.network_address), int(network.broadcast_address)))
        four, six = (merge(spans[version]) for version in (4, 6))
        return cls(columns(four), columns(words(six), 4))

    @classmethod
    def read(cls, mapped: mmap.mmap, header: Header) -> Networks:
        """Those of a mapped file."""
        view = memoryview(mapped)
        middle = TEXT + header.entries * 8  # entries of IPv4: two words of 32 bits each
        four, six = view[TEXT:middle].cast("I"), view[middle : middle + header.places * 32].cast("Q")
        n, m = header.entries, header.places
        return cls([four[:n], four[n:]], [six[i * m : (i + 1) * m] for i in range(4)])

    def __contains__(self, ip: object) -> bool:
        """Of an address as text; what is none is in no network."""
        text = str(ip)
        known = self._known.get(text)
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[text] = self._look_up(text)
        return known

    def _look_up(self, ip: str) -> bool:
        try:
            if ":" not in ip:
                (address,) = _V4.unpack(inet_pton(AF_INET, ip))
                starts, ends = self._four
                at = bisect_right(starts, address) - 1
                return at >= 0 and address <= ends[at]
            # A zone ("fe80::1%eth0") says where an address was seen, not what it is.
            high, low = _V6.unpack(inet_pton(AF_INET6, ip.partition("%")[0]))
        except (OSError, ValueError):
            return False
        highs, lows, end_highs, end_lows = self._six
        first = bisect_left(highs, high)
        at = bisect_right(lows, low, first, bisect_right(highs, high, first)) - 1
        return at >= 0 and (high, low) <= (end_highs[at], end_lows[at])


def merge(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and last addresses, sorted; what overlaps or touches becomes one."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def words(spans: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Of IPv6 intervals: the words as they stand in the file's columns."""
    low = (1 << 64) - 1
    return [(first >> 64, first & low, last >> 64, last & low) for first, last in spans]


def columns(rows: Sequence[Sequence[int]], n: int = 2) -> list[array[int]]:
    """Two columns are of 32 bits, four of 64."""
    return [array("I" if n == 2 else "Q", column) for column in zip(*rows, strict=True)] or [array("Q")] * n


class Listed:
    """A list of a file, in its newest version. Raises ListError when it cannot be opened."""

    __slots__ = ("_ahead", "_file", "_mapped", "_version", "keys", "list_file", "networks")

    keys: Keys
    networks: Networks
    _mapped: mmap.mmap

    def __init__(self, list_file: ListFile, folder: Path) -> None:
        self.list_file = list_file
        self._file = list_file.compiled(folder)
        self._version: Stamp | None = None
        self._ahead = 0  # octets whose pages are mapped
        self.refresh()

    def refresh(self) -> bool:
        """Takes a new version when there is one; whether there was."""
        try:
            try:
                version = stamp_of(self._file.stat())
            except FileNotFoundError:
                if self._version is None:
                    raise
                return False  # no configuration names it any more (list_watch.py): who has mapped it goes on with it
            if version == self._version:
                return False
            self._version = version  # one that cannot be used is not looked at again
            self._open()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise ListError(self.list_file.path, 0, f"its compiled form {self._file} cannot be used: {why}") from None
        return True

    def _open(self) -> None:
        with self._file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        header = _parse_header(mapped[: HEADER.size])
        if header is None or header.kind != self.list_file.kind:
            raise ValueError("it is of another format")
        networks = header.kind == "networks"
        rest = header.places * 32 if networks else 8 * (header.places + 1)
        if len(mapped) != header.index_at + rest:
            raise ValueError("it is not whole")
        mapped.madvise(mmap.MADV_WILLNEED)
        self._mapped = mapped
        self._ahead = 0
        if networks:
            self.networks = Networks.read(mapped, header)
        else:
            self.keys = Keys(mapped, header)

    def map_ahead(self, until: float) -> None:
        """Maps pages that nobody has touched yet, until a monotonic time: the first touch of each costs more than a
        look-up. A piece at a time, because one that must be read from the disk is waited for."""
        while self._ahead < len(self._mapped) and time.monotonic() < until:
            try:
                self._mapped.madvise(POPULATE, self._ahead, min(PIECE, len(self._mapped) - self._ahead))
            except OSError:  # an older kernel: look-ups do it
                self._ahead = len(self._mapped)
            self._ahead += PIECE

    # As a container: an address of a client, or a key.

    def __contains__(self, key: object) -> bool:
        if self.list_file.kind == "networks":
            return key in self.networks
        return isinstance(key, str) and self.keys.has(key)

    def get(self, key: str) -> str | None:
        """The value of a key that has one."""
        return self.keys.get(key)

    def has(self, mailbox: str) -> bool:
        """Whether a mailbox is there, by itself or with its domain."""
        keys = self.keys
        if keys.flags & FULL and keys.has(mailbox):
            return True
        if not keys.flags & PLAIN:
            return False
        local = mailbox.rpartition("@")[0]
        return "@" not in local and keys.has(local)  # "ann@b.test"@a.test is not ann@b.test


class Lists:
    """The lists that one process has open. `folder` is where their compiled forms are. `version` grows when a list has
    another one."""

    def __init__(self, folder: Path) -> None:
        self.version = 0
        self._folder = folder
        self._open: dict[ListFile, Listed] = {}

    def open(self, kind: Kind, path: Path) -> Listed:
        """Raises ListError."""
        list_file = ListFile(kind, path)
        found = self._open.get(list_file)
        if found is None:
            found = self._open[list_file] = Listed(list_file, self._folder)
        return found

    def keep(self, files: Set[ListFile]) -> None:
        """Forgets all others: nobody names them any more."""
        self._open = {file: listed for file, listed in self._open.items() if file in files}

    def refresh(self) -> list[ListError]:
        """Takes new versions; which cannot be used."""
        errors = []
        for listed in self._open.values():
            try:
                self.version += listed.refresh()
            except ListError as error:
                errors.append(error)
        return errors

    def map_ahead(self, seconds: float) -> None:
        """Has the pages of lists mapped before they are looked at, as far as that takes no longer."""
        until = time.monotonic() + seconds
        for listed in self._open.values():
            listed.map_ahead(until)
