"""What a spool does before it serves: it opens its database, and sets aside what it does not find as it was kept.

In: the directory of a spool that is locked. Out: a Store that is open, whose messages have their bodies; what is wrong
with the others is in the log, with the place where it lies.
Always: the server starts, whatever lies there, but for a database of another program or of a newer version; nothing is
deleted but bodies that nobody was told of, and those only where a kill may have left them. A damaged database is
read once more at its next start, when the power was cut meanwhile: salvage.py leaves it whole until then.
Not here: checksums of bodies, which are looked at before a delivery (spool). On failure: SpoolError with one line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import apsw

from .bodies import check_length, remove_orphans
from .ids import begin_of, is_id
from .log import SET_ASIDE, Log
from .salvage import CHECKED_OCTETS, clear, find_damage, find_records, is_sound, make_folder, move_bodies, salvage
from .store import DamagedError, SpoolError, Store
from .trouble import Trouble


class Recovery:
    """Of one spool, once."""

    def __init__(self, directory: Path, store: Store, log: Log, trouble: Trouble, wall: Callable[[], float]) -> None:
        self._directory = directory
        self._bodies = directory / "body"
        self._store = store
        self._log = log
        self._trouble = trouble
        self._wall = wall
        self._named: set[str] = set()  # ids of what was found to be lost

    def open(self, was_closed: bool) -> None:
        """`was_closed`: the last who had the spool has ended in order. Raises SpoolError, and nothing is open then."""
        try:
            damaged = self._open_store(was_closed)
            try:
                self._look_through(damaged, was_closed)
            # Of a database that is too large to be looked through before; of text, which no look through finds.
            except (apsw.CorruptError, UnicodeDecodeError) as error:
                self._store.drop()
                self._look_through(self._salvage(str(error)), was_closed)
        except OSError as error:
            raise SpoolError(f"{error.filename or self._directory}: {error.strerror}") from error
        except apsw.Error as error:
            self._store.drop()
            raise SpoolError(f"{self._directory}: {error}") from error

    def _open_store(self, was_closed: bool) -> Path | None:
        """Where the database is damaged, one is opened that is made of what can be read of it; where the old one is."""
        folder, put_aside = clear(self._directory, was_closed, self._wall())
        if put_aside:
            self._trouble.warn("log", f"put aside into {folder}: {', '.join(put_aside)}")
        why = find_damage(self._directory)
        if not why:
            try:
                self._store.open(self._wall())
                if is_sound(self._store):
                    return None
                self._store.drop()
                why = "its pages do not hang together"
            except DamagedError as error:
                why = str(error)
        return self._salvage(why, folder)

    def _salvage(self, why: str, folder: Path | None = None) -> Path:
        try:
            damaged, kept, lost = salvage(self._directory, self._wall(), folder)
        except (apsw.Error, OSError) as error:
            raise SpoolError(f"{self._store.path}: damaged, and nothing can be made of it: {error}") from error
        for message_id, reason in lost:
            self._log.write(SET_ASIDE, message_id, reason, str(damaged))
            self._named.add(message_id)
        text = f"the database was damaged ({why}): {kept} messages could be read of it and are kept, "
        text += f"{len(lost)} are known to be lost; what was found is in {damaged}"
        self._trouble.warn("damage", text)
        self._store.open(self._wall())
        return damaged

    def _mend(self) -> None:
        """Messages that have lost their recipients, or whose records are damaged, are set aside; recipients without a
        message are only named."""
        if self._store.path.stat().st_size > CHECKED_OCTETS:
            return
        if damaged := find_records(self._store):
            why = "its record is damaged"
            for key in damaged:
                self._log.write(SET_ASIDE, begin_of(key), why, str(self._store.path))
            self._store.set_aside([(key, why, self._wall()) for key in damaged])
        alone, lost = self._store.torn()
        why = "its recipients are gone"
        for _, message_id in alone:
            self._log.write(SET_ASIDE, message_id, why, str(self._store.path))
        self._store.set_aside([(key, why, self._wall()) for key, _ in alone])
        for key, domain in lost:
            self._log.write(SET_ASIDE, begin_of(key), f"its record is gone; it was for {domain}", str(self._store.path))
        if lost:
            self._store.erase([key for key, _ in lost])

    def _look_through(self, damaged: Path | None, was_closed: bool) -> None:
        """Sets messages aside whose files are not as they were kept; removes files that nobody was told of. An end in
        order leaves none of those, so what is found then is of messages that are not there any more (the database is
        another: exchanged, or an older one put back); where anything else is wrong it may be. It is put aside."""
        self._mend()
        known: set[str] = set()
        aside: list[tuple[int, str, float]] = []
        for key, message_id, size, was_aside in self._store.in_files():
            if not isinstance(message_id, str):
                raise apsw.CorruptError("an index holds an id that is no text")
            known.add(message_id)
            if was_aside:
                continue
            path = self._bodies / message_id
            why = check_length(path, size) if is_id(message_id) else "its id is damaged"
            if why:
                aside.append((key, why, self._wall()))
                self._log.write(SET_ASIDE, message_id, why, str(path))
        self._store.set_aside(aside)
        orphans = any(is_id(name) and name not in known for name in os.listdir(self._bodies))
        if damaged is None and orphans and (aside or was_closed):
            damaged = make_folder(self._directory, self._wall())
            self._trouble.warn("body", f"files of no message that is known are put aside into {damaged}")
        if damaged is not None:
            for name in move_bodies(self._bodies, damaged, known):
                if name not in self._named:
                    self._log.write(SET_ASIDE, name, "a body that no record knows", str(damaged))
        _, strange = remove_orphans(self._bodies, known)
        if strange:
            self._trouble.warn("body", f"{strange} entries are not of the spool; left alone")
