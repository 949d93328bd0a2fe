"""Flushes that say OK for what never reached the disk, and what is asked of the file system after each of them.

An ext4 that turns read-only under many writers shows it: whatever the spool's stores and Maildirs have said was durable
must be there behind a check of the file system. Without the confirmations a fifth of such runs loses something.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import apsw
import pytest
from needs import needs, needs_root

from fastsmtp.address import Address
from fastsmtp.delivery import Delivery, Result
from fastsmtp.delivery.maildir import Maildir
from fastsmtp.message import Content, Envelope, Message, Recipient
from fastsmtp.store import Batch, Store

RUNS = 30
STORES, MAILDIRS = 6, 2
BODY = b"x" * 3000


# --- a file system that gives up ---


class GivingUp:
    """An ext4 that turns read-only when it is told to; `check` brings it back as it is found on the disk."""

    def __init__(self, path: Path, image: Path) -> None:
        self.path = path
        self._image = image
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image), "64M"], check=True)

    def mount(self) -> None:
        options = ["-o", "loop,errors=remount-ro"]
        subprocess.run(["mount", "-t", "ext4", *options, str(self._image), str(self.path)], check=True)

    def umount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=False, capture_output=True)

    def give_up(self) -> None:
        device = subprocess.run(["findmnt", "-no", "SOURCE", str(self.path)], capture_output=True, check=True).stdout
        (Path("/sys/fs/ext4") / os.path.basename(device.decode().strip()) / "trigger_fs_error").write_text("1")

    def check(self) -> None:
        self.umount()
        subprocess.run(["e2fsck", "-p", "-f", str(self._image)], check=False, capture_output=True)
        self.mount()


@pytest.fixture
def giving_up(tmp_path: Path) -> Iterator[GivingUp]:
    needs_root()
    needs("mkfs.ext4", "losetup")
    (tmp_path / "disk").mkdir()
    disk = GivingUp(tmp_path / "disk", tmp_path / "image")
    disk.mount()
    try:
        yield disk
    finally:
        disk.umount()


def commit_until_it_fails(path: Path, acked: list[int]) -> None:
    store = Store(path)
    store.open(0.0)
    key = 0
    try:
        while True:
            key += 1
            batch = Batch()
            batch.messages.append((key, f"id{key}", 0.0, b"", b"", "", 0, 0, len(BODY), 0, BODY))
            batch.recipients.append((key, 0, "x.test", 0))
            store.write(batch)
            store.commit()
            acked.append(key)
            if not key % 8:
                store.checkpoint()
    except (apsw.Error, OSError):
        pass
    finally:
        store.drop()


def mail(number: int) -> Delivery:
    envelope = Envelope(Address("ann", "x.test"))
    envelope.id = f"id{number}"
    message = Message(envelope, b"Received: x\r\n", [BODY], len(BODY), 0, Content.NONE, 0.0)
    return Delivery(message, [Recipient(Address("bob", "y.test"))], range(1))


def deliver_until_it_fails(root: Path, acked: list[int], sync: str) -> None:
    async def main() -> None:
        maildir = Maildir(f"{root}/{{domain}}/{{local}}", 0, "mx.test", "cafe", sync)
        number = 0
        while True:
            number += 1
            [[outcome]] = await maildir.deliver([mail(number)])
            if outcome.result is not Result.DELIVERED:
                break
            acked.append(number)
        await maildir.close()

    asyncio.run(main())


def lose(disk: GivingUp, wait: float) -> tuple[int, list[str]]:
    """How much was said to be durable when the file system gave up, and what of it is not there."""
    stores: list[list[int]] = [[] for _ in range(STORES)]
    maildirs: list[list[int]] = [[] for _ in range(MAILDIRS)]
    root = disk.path
    jobs: list[Callable[[], None]] = []
    for number, acked in enumerate(stores):
        jobs.append(partial(commit_until_it_fails, root / f"{number}.db", acked))
    for number, acked in enumerate(maildirs):
        jobs.append(partial(deliver_until_it_fails, root / f"mail{number}", acked, ("batch", "file")[number % 2]))
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while not all(stores + maildirs):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(wait)
    disk.give_up()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    disk.check()
    lost = []
    for number, acked in enumerate(stores):
        db = apsw.Connection(str(root / f"{number}.db"))
        found = {key for (key,) in db.execute("SELECT key FROM message WHERE length(body) = ?", (len(BODY),))}
        db.close()
        lost += [f"store {number}: {key} of {len(acked)}" for key in acked if key not in found]
    for number, acked in enumerate(maildirs):
        new = root / f"mail{number}" / "y.test" / "bob" / "new"
        whole = {path.name.split(".")[1] for path in new.iterdir() if path.read_bytes().endswith(BODY)}
        lost += [f"Maildir {number}: {one} of {len(acked)}" for one in acked if f"Mid{one}R0" not in whole]
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sum(map(len, stores + maildirs)), lost


def test_what_was_said_to_be_durable_is_there_when_the_file_system_gives_up(giving_up: GivingUp) -> None:
    said = 0
    for number in range(RUNS):
        acked, lost = lose(giving_up, 0.002 * number)
        assert lost == [], f"run {number}"
        said += acked
    assert said >= RUNS * (STORES + MAILDIRS)
