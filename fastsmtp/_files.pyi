"""Types and documentation of `_files.pyx`."""

import os
from collections.abc import Sequence
from typing import TypeAlias

# path, offset, octets
Range: TypeAlias = tuple[bytes, int, int]
# temporary name, mailbox, name, content in order, whether every CR is left out
Item: TypeAlias = tuple[bytes, bytes, bytes, tuple[bytes | Range, ...], bool]

def write_batch(directory: int, items: Sequence[Item], *, each: bool = False, probe: int = -1) -> list[int]:
    """Puts each item at `mailbox/new/name,S=<octets written>`; returns an errno for each, 0: it is durable.

    `directory` is a descriptor of the folder in which relative temporary names are made, opened before the
    first write and kept open from batch to batch while all goes well. Mailboxes are absolute paths on its
    file system (EXDEV otherwise); a missing one is made (0700). A temporary name that exists is EEXIST; a
    final name that exists is replaced. ENODATA: a source file is missing or too short. Leaving out CRs is
    right only for content without bare ones.

    One syncfs before the first rename and one behind the last serve the batch. With `each`, every file has
    its own fdatasync and an fsync of `new/`, and a folder that was made is fsynced into its parent. What was flushed is
    confirmed with the file `probe`, which lies on the same file system; -1: it is not.

    Raises OSError when a syncfs or the confirmation fails: nothing of the batch counts as delivered, and `directory`
    must be opened anew, for an error is reported once. ValueError for a NUL in a name; then nothing was written.
    """

def append_file(fd: int, parts: Sequence[bytes], sync: bool) -> None:
    """Appends all octets of `parts`, then fdatasync if `sync`. Raises OSError; no flush is ever repeated."""

def confirm(fd: int, place: int) -> None:
    """Confirms that what was flushed before, in any file of this file system, is there. Raises OSError: it may not be.

    A flush may say OK for what never reached the disk: when ext4 gives up its journal, while a flush waits for a
    transaction that another one had begun, it finds the transaction gone and takes it for complete. A file system that
    turned read-only says OK too, up to Linux 6.14. But neither begins a new transaction, and a journal that was given
    up stays so. So the octet at `place` is allocated, which it should be already: that begins one, and is done in 2 µs.

    `fd` is open for writing, and is not what was flushed: its next flush would wait for this. What cannot allocate
    (ext3's files, many network file systems) or has no room confirms everything.
    """

def fsync_dir(path: str | bytes | os.PathLike[str]) -> None:
    """Makes the names in a folder durable. Raises OSError."""

def make_dirs(path: str | bytes | os.PathLike[str]) -> None:
    """Makes a folder (0700) and its missing parents, each fsynced into its parent. Raises OSError."""

def render_line(pieces: tuple[bytes, ...], stamp: str, values: tuple[object, ...]) -> bytes | None:
    """A line of the log: the first piece, the time in ASCII, then each value behind its piece, and the last piece.

    Values are as in `Log.write`. None: one of them has to be escaped or cut, the line would be longer than PIPE_BUF, or
    there are not as many values as pieces for them. What is rendered is what log.py would make of it, in a tenth of the
    time (2.5 of 10 µs that a message took went into its lines).
    """

def send_last(fd: int, octets: bytes) -> int:
    """Sends octets and ends that direction of a socket, on TCP in one packet: each takes the kernel 2 µs and wakes the
    client. Never waits. How many octets were taken: with fewer than all nothing is ended, and what stands in the way
    is told to whoever sends the rest."""
