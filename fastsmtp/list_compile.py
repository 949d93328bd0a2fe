"""Makes a list that workers can map out of an operator's text file; in a process of its own, for that takes a while.

In: a text file, one entry a line; blank lines and lines that begin with "#" do not count. Out: a compiled file
(lists.py) under the name that workers look for, complete and on the disk before it has that name; or ListError with the
first line that is wrong, and nothing is changed. Lines are read in blocks: a block in which every line is plain is
taken as it is, any other goes line by line through the parsers of address.py, and the result is the same. 10,000,000
mailboxes take about 10 seconds and 0.8 GB, in any order. A mailbox or network may stand twice, an alias may not.
Not here: when this is done (list_watch.py).
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from io import BufferedReader
from ipaddress import ip_interface, ip_network
from itertools import accumulate
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_pton
from typing import NoReturn
from zlib import crc32

from .address import AddressError, parse_address
from .alias_text import check_expansion, parse_alias
from .aliases import OWNER, Entry
from .lists import FULL, PLAIN, TEXT, Header, Kind, ListError, ListFile, columns, merge, shift_of, stamp_of, words
from .patterns import parse_name_pattern, parse_pattern

BLOCK = 4 << 20
TICK = 20_000_000  # ns: what is written within a tick of the kernel's clock (4 or 10 ms) has the same time
LINE_LIMIT = 1 << 20  # octets: an alias with many members
PER_BUCKET = 16  # keys
COARSE = 1024  # parts that the keys are sorted into first: they fit the processor's cache, buckets do not

# Where each line of a block needs no second look. Local-parts and domains as address.py has them.
_ATEXT = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]++"
_LOCAL = _ATEXT + rb"(?:\." + _ATEXT + rb")*"
_LABELS = rb"[A-Za-z0-9_]++(?:(?:-++|\.)[A-Za-z0-9_]++)*"
# A path of 256 octets, with its brackets; the shorter ones are judged with a domain behind them.
_PLAIN_MAILBOXES = re.compile(rb"(?:(?!#)(?=[^\n]{1,240}\n)" + _LOCAL + rb"\n)*")
_FULL_MAILBOXES = re.compile(rb"(?:(?!#)(?=[^\n]{1,254}\n)" + _LOCAL + rb"@(?=[^\n]{1,63}\n)" + _LABELS + rb"\n)*")


class _Wrong(ValueError):  # noqa: N818 - what is wrong with a line
    pass


def compile_list(source: ListFile, folder: Path | None, fewest: int = 0) -> int:
    """Makes the compiled form of a list in `folder`; None: only reads it. How many entries it has.

    Raises ListError, also when it has less than `fewest`, and OSError when `folder` cannot be written to.
    """
    try:
        # Whoever opens a FIFO waits for its writer.
        file = open(os.open(source.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    except OSError as error:
        raise ListError(source.path, 0, f"cannot be read: {error.strerror}") from None
    with file:
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ListError(source.path, 0, "cannot be read: it is no regular file")
            stamp = stamp_of(status)
            if 0 <= time.time_ns() - stamp.mtime < TICK:
                time.sleep(TICK / 1e9)
            made = _READERS[source.kind](source, file)
            if stamp_of(os.fstat(file.fileno())) != stamp:
                raise ListError(source.path, 0, "it was changed while it was read")
        except OSError as error:
            raise ListError(source.path, 0, f"cannot be read: {error.strerror}") from None
    if made.total < fewest:
        why = f"it has {made.total} entries, less than half of those before (`fastsmtp reload`, if that is meant)"
        raise ListError(source.path, 0, why)
    if folder is not None:
        index_at = TEXT + sum(map(len, made.contents))
        index_at += -index_at % 8 if made.index else 0
        header = Header(source.kind, stamp, made.entries, index_at - made.tail, made.places, made.flags)
        _publish(source.compiled(folder), header, made)
    return made.total


class _Made:
    """What goes into a file: behind the header the contents, then an index. The last `tail` octets of the contents are
    what `Header.index_at` points to where there is no index."""

    def __init__(
        self, entries: int, places: int, contents: list[bytes], *, index: bytes = b"", flags: int = 0, tail: int = 0
    ) -> None:
        self.entries = entries
        self.places = places
        self.contents = contents
        self.index = index
        self.flags = flags
        self.tail = tail

    @property
    def total(self) -> int:
        """Of what a person would count: networks of IPv6 have no index."""
        return self.entries if self.index else self.entries + self.places


def _publish(file: Path, header: Header, made: _Made) -> None:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    for left_over in file.parent.glob(f"{file.name}.*.tmp"):
        if not Path("/proc", left_over.suffixes[-2][1:]).exists():
            left_over.unlink(missing_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as out:
            out.write(header.pack())
            out.writelines(made.contents)
            if made.index:
                out.write(bytes(header.index_at - out.tell()))
                out.write(made.index)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# Keys


class _Buckets:
    """Lines on their way into buckets, by the crc32 of their keys with a line end."""

    def __init__(self) -> None:
        self._coarse = [bytearray() for _ in range(COARSE)]
        self._entries = 0
        self._values = False

    def add(self, lines: list[bytes]) -> None:
        """Keys with their line ends."""
        coarse = self._coarse
        shift = shift_of(COARSE)
        for line, hashed in zip(lines, map(crc32, lines), strict=True):
            coarse[hashed >> shift] += line
        self._entries += len(lines)

    def add_value(self, key: bytes, value: bytes) -> None:
        self._coarse[crc32(key + b"\n") >> shift_of(COARSE)] += b"%b\t%b\n" % (key, value)
        self._entries += 1
        self._values = True

    def finish(self, flags: int = 0) -> _Made:
        per_part = 1 << max(0, (self._entries // (COARSE * PER_BUCKET)).bit_length())
        places = COARSE * per_part
        shift, mask = shift_of(places), per_part - 1
        lengths = array("Q")
        contents = []
        for number, part in enumerate(self._coarse):
            buckets = [b""] * per_part
            lines = bytes(part).splitlines(keepends=True)
            keys = [line.partition(b"\t")[0] + b"\n" for line in lines] if self._values else lines
            for line, hashed in zip(lines, map(crc32, keys), strict=True):
                buckets[hashed >> shift & mask] += line
            lengths.extend(map(len, buckets))
            contents.append(b"".join(buckets))
            self._coarse[number] = bytearray()
        index = array("Q", accumulate(lengths, initial=TEXT))
        return _Made(self._entries, places, contents, index=index.tobytes(), flags=flags)


def _blocks(source: ListFile, file: BufferedReader) -> Iterator[tuple[int, bytes]]:
    """The number of its first line, and whole lines with LF at their ends."""
    first = 1
    rest = b""
    if file.peek(len(BOM_UTF8))[: len(BOM_UTF8)] == BOM_UTF8:  # as editors of Windows begin their files
        file.seek(len(BOM_UTF8))
    while block := file.read(BLOCK):
        block = rest + block
        end = block.rfind(b"\n") + 1
        block, rest = block[:end], block[end:]
        if len(rest) > LINE_LIMIT:
            raise ListError(source.path, first + block.count(b"\n"), "the line is too long")
        yield first, block.replace(b"\r\n", b"\n")
        first += block.count(b"\n")
    if rest:
        yield first, rest.removesuffix(b"\r") + b"\n"


def _lines(source: ListFile, number: int, block: bytes) -> Iterator[tuple[int, str]]:
    """What counts, with its line's number."""
    for line in block.split(b"\n")[:-1]:
        if (stripped := line.strip()) and not stripped.startswith(b"#"):
            try:
                yield number, line.decode()
            except UnicodeDecodeError:
                raise ListError(source.path, number, "not UTF-8") from None
        number += 1


def _fail(source: ListFile, number: int, line: str, error: ValueError, expected: str) -> NoReturn:
    shown = json.dumps(line.strip(), ensure_ascii=True)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise ListError(source.path, number, f"expected {expected}, found {shown} ({error})") from None


def _read_mailboxes(source: ListFile, file: BufferedReader) -> _Made:
    fold = source.kind == "mailboxes"
    buckets = _Buckets()
    flags = 0
    for first, block in _blocks(source, file):
        for form, pattern in ((PLAIN, _PLAIN_MAILBOXES), (FULL, _FULL_MAILBOXES)):
            # Where case matters, it does in the local-part only.
            if (fold or form == PLAIN) and pattern.fullmatch(block):
                buckets.add((block.lower() if fold else block).splitlines(keepends=True))
                flags |= form
                break
        else:
            for number, line in _lines(source, first, block):
                text = line.strip()
                try:
                    address = parse_address(text if "@" in text else f"{text}@local.invalid")
                except AddressError as error:
                    _fail(source, number, line, error, "a local-part or an address")
                local = address.mailbox.rpartition("@")[0] if fold else address.local
                buckets.add([(f"{local}@{address.domain}\n" if "@" in text else f"{local}\n").encode()])
                flags |= FULL if "@" in text else PLAIN
    return buckets.finish(flags)


def _read_patterns(parse: Callable[[str], str], expected: str) -> Callable[[ListFile, BufferedReader], _Made]:
    def read(source: ListFile, file: BufferedReader) -> _Made:
        buckets = _Buckets()
        for first, block in _blocks(source, file):
            keys: list[bytes] = []
            for number, line in _lines(source, first, block):
                try:
                    keys.append(parse(line.strip()).encode() + b"\n")
                except AddressError as error:
                    _fail(source, number, line, error, expected)
            buckets.add(keys)
        return buckets.finish()

    return read


# Networks


def _read_networks(source: ListFile, file: BufferedReader) -> _Made:
    four: list[tuple[int, int]] = []
    six: list[tuple[int, int]] = []
    for first, block in _blocks(source, file):
        for number, line in _lines(source, first, block):
            try:
                span, version = _parse_network(line.strip())
            except (OSError, ValueError):
                wrong = _Wrong(_explain_network(line.strip()))
                _fail(source, number, line, wrong, "an IP address or a network")
            (four if version == 4 else six).append(span)
    four, six = merge(four), merge(six)
    low = [column.tobytes() for column in columns(four)] if four else []
    high = [column.tobytes() for column in columns(words(six), 4)] if six else []
    return _Made(len(four), len(six), [*low, *high], tail=len(six) * 32)


def _explain_network(text: str) -> str:
    """Why it is none."""
    try:
        written = ip_interface(text)
    except ValueError:
        return "it is neither"
    network = written.network
    if int(written) == int(network.network_address):
        return "it is neither"
    return f"it has bits set beyond /{network.prefixlen}; did you mean {network}?"


def _parse_network(text: str) -> tuple[tuple[int, int], int]:
    """First and last address; ip_network takes five times as long."""
    ip, slash, length = text.partition("/")
    octets = inet_pton(AF_INET6 if ":" in ip else AF_INET, ip)
    bits = 8 * len(octets)
    if slash and not length.isdecimal():  # a netmask
        network = ip_network(text)
        return (int(network.network_address), int(network.broadcast_address)), network.version
    prefix = int(length) if slash else bits
    start = int.from_bytes(octets, "big")
    size = 1 << (bits - prefix)
    if start % size:
        raise ValueError
    if bits == 128 and start >> 32 == 0xFFFF and prefix >= 96:  # IPv4-mapped
        return (start & 0xFFFFFFFF, (start & 0xFFFFFFFF) + size - 1), 4
    return (start, start + size - 1), 4 if bits == 32 else 6


# Aliases


def _read_aliases(source: ListFile, file: BufferedReader) -> _Made:
    targets: dict[str, tuple[str, ...]] = {}
    numbers: dict[str, int] = {}
    for number, line in _folded(source, file):
        try:
            name, members = parse_alias(line)
        except AddressError as error:
            _fail(source, number, line, error, '"name: address, address"')
        if name in targets:
            raise ListError(source.path, number, f"{name} stands in line {numbers[name]} already")
        targets[name] = members
        numbers[name] = number
    check_expansion(source.path, targets, numbers)
    buckets = _Buckets()
    for name, members in targets.items():
        local, at, domain = name.rpartition("@") if "@" in name else (name, "", "")
        owner = f"{OWNER}{local}{at}{domain}"
        entry = Entry((owner if at else f"{owner}@") if owner in targets else "", members)
        buckets.add_value(name.encode(), entry.render().encode())
    return buckets.finish()


def _folded(source: ListFile, file: BufferedReader) -> Iterator[tuple[int, str]]:
    """Entries: a line that begins with a blank goes on with the one before."""
    begun = ""
    begun_at = 0
    for first, block in _blocks(source, file):
        for number, line in _lines(source, first, block):
            if line[0] in " \t":
                if not begun:
                    raise ListError(source.path, number, "the line goes on with nothing: it begins with a blank")
                begun += line
                continue
            if begun:
                yield begun_at, begun
            begun, begun_at = line, number
    if begun:
        yield begun_at, begun


_READERS: dict[Kind, Callable[[ListFile, BufferedReader], _Made]] = {
    "mailboxes": _read_mailboxes,
    "mailboxes-case": _read_mailboxes,
    "networks": _read_networks,
    "names": _read_patterns(parse_name_pattern, "a name"),
    "addresses": _read_patterns(parse_pattern, "an address, a domain or <>"),
    "aliases": _read_aliases,
}
