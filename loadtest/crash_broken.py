"""`disk`: a disk that is full, has no inodes left, fails, turns read-only, or takes its time.

In: file systems of our own, filled for real, or strace, which makes calls of the running workers fail. Out: what the
clients were answered meanwhile, and what is there when the disk works again. A full disk is told by 452, an error by
451 or by the end of the connection, never by 250; and service resumes by itself, without a restart, wherever the file
system lets it.
A run counts only if the fault struck: if a client was refused, or a call was made to fail.
`blockdev --setro` is not used: this kernel warns, and writes all the same. On failure: as any fault.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .crash_disk import Disk, Layout, run
from .crash_fault import Fault, under_load
from .crash_load import Connection, GoneError, Letter, send_data
from .crash_server import CrashError, wait_until
from .crash_site import LOCAL, Site
from .crash_trace import Tracer, traced
from .ledger import make_body, outcome_of

HELD_SECONDS = (0.4, 1.0)  # how long a fault lasts
CHUNK = 32 << 20
SLOW_SECONDS = 3
AT_ONCE = 0.1  # seconds within which other sessions are answered
OTHERS = 8  # sessions beside
PROBE_OCTETS = 1000
FULL_SECONDS = 5.0  # free space is looked at once a second
REFUSALS = (452, 421)
ROW = 8  # by the kernel's choice either worker answers: so many are both


def fill_spool(site: Site) -> None:
    """The spool's disk is filled to its last block for a moment. Within seconds new mail is put off with 452 by every
    worker; until then each takes what it has room for, in its log or in what another's ballast has left, and keeps it.
    What was acknowledged is delivered meanwhile, once: the ballast makes room for the marks. Service resumes by itself.
    """
    with _filled(site.ground.disks[0]):
        _await_refusals(site)
        _hold(site)
    _resumes(site)


def fill_mail(site: Site) -> None:
    """The mailboxes' disk is filled to its last block for a moment. Mail is taken, waits in the spool, and is delivered
    when there is room; nobody sees a part of a message."""
    with _filled(site.ground.disks[-1]):
        _hold(site)
        if site.server.queued() == 0:
            raise CrashError("the mailboxes' disk is full and nothing waits")
    _resumes(site)


def use_up_inodes(site: Site) -> None:
    """Neither disk has an inode left for a moment. Mail that needs no file is taken all the same; mailboxes that cannot
    be made have to wait, and so has mail whose body needs a file."""
    made = [disk.place / "many" for disk in site.ground.disks]
    try:
        for folder in made:
            _use_up_inodes(folder)
        _hold(site)
    finally:
        for folder in made:
            shutil.rmtree(folder)
    _resumes(site)


def exceed_quota(site: Site) -> None:
    """Writes to the spool end in EDQUOT for a moment, as for a user who has no quota left. As on a full disk."""
    _failing(site, "pwrite64:error=EDQUOT:when=1+")


def exceed_mail_quota(site: Site) -> None:
    """No file can be made, in mailboxes or elsewhere: EDQUOT. Deliveries wait."""
    _failing(site, "openat:error=EDQUOT:when=1+")


def fail_once(site: Site) -> None:
    """One fdatasync of a worker fails with EIO. Its batch is answered 451 when it is certain to be gone, or not at all;
    nothing of it is delivered that was answered so. The same descriptor is never flushed again."""
    _failing(site, f"fdatasync:error=EIO:when={site.chance.randint(1, 4)}")


def fail(site: Site) -> None:
    """Every fdatasync fails with EIO for a moment. No message is acknowledged; then service resumes by itself."""
    _failing(site, "fdatasync:error=EIO:when=1+")


def fail_writes(site: Site) -> None:
    """Writes to the spool's database and its log fail with EIO for a moment."""
    _failing(site, f"pwrite64:error=EIO:when={site.chance.randint(1, 20)}+")


def fail_mail(site: Site) -> None:
    """The flush of the mailboxes' file system fails with EIO. Its batch counts as not delivered and comes again: there
    may be second copies of it."""
    site.note_fault()
    _failing(site, f"syncfs:error=EIO:when={site.chance.randint(1, 3)}+")
    site.note_fault()


def fail_and_die(site: Site) -> None:
    """Every fdatasync fails with EIO, then all processes are killed and started anew. A log whose flush failed may be
    read back all the same: nothing appears that was answered 4xx."""
    with _injected(site, "fdatasync:error=EIO:when=1+") as tracers:
        time.sleep(site.chance.uniform(0.05, 0.5))
        site.kill()
        _check_struck(tracers)
    site.restart()


def turn_read_only(site: Site) -> None:
    """The file systems find an error in themselves and turn read-only, as ext4 does by errors=remount-ro. No message is
    acknowledged any more; after a repair and a start all that was is there."""
    for disk in site.ground.disks:
        run("mount", "-o", "remount,errors=remount-ro", str(disk.place))
        Path(f"/sys/fs/ext4/{Path(disk.device).name}/trigger_fs_error").write_text("1")
    site.note_fault()
    _hold(site)
    if not _refused(site):
        raise CrashError("its disks are read-only and it takes mail")
    site.kill()
    site.ground.recover()
    site.restart()


def starve(site: Site) -> None:
    """The medium below the file systems fails: what they write ends in EIO from the kernel itself, in their journals
    too. No message is acknowledged that is not on the medium; after a repair and a start all that was is there."""
    hog = site.ground.disks[0].image.parent / "hog"
    _fill(hog, site.ground.disks[0].image.parent)
    site.note_fault()
    _hold(site)
    site.kill()
    hog.unlink()
    site.ground.recover()
    site.restart()


def flush_slowly(site: Site) -> None:
    """One fdatasync of each worker takes three seconds. Whoever waits for it waits; other sessions are answered at once
    meanwhile: 99 in 100 within 100 ms."""
    with ExitStack() as stack, _injected(site, f"fdatasync:delay_enter={SLOW_SECONDS}s:when=1") as tracers:
        others = [stack.enter_context(Connection(site.server.port)) for _ in range(OTHERS)]
        for other in others:
            other.hello()
        taken = []
        until = time.monotonic() + SLOW_SECONDS
        while time.monotonic() < until:
            for other in others:
                begun = time.monotonic()
                other.send(b"MAIL FROM:<a@client.test>\r\nRCPT TO:<a@" + LOCAL.encode() + b">\r\nRSET\r\n")
                other.codes(3)
                taken.append(time.monotonic() - begun)
            time.sleep(0.02)
        _check_struck(tracers)
    slow = sum(seconds > AT_ONCE for seconds in taken)
    if slow > len(taken) / 100:
        raise CrashError(f"{slow} of {len(taken)} answers beside a slow flush took over {AT_ONCE * 1000:.0f} ms")


def take_folders(site: Site) -> None:
    """A reader moves mail to cur/ and removes every folder of a mailbox that is empty, and mailboxes are renamed and
    come back, again and again while mail is delivered into them. Nothing is lost, and nothing comes twice."""
    until = time.monotonic() + site.chance.uniform(*HELD_SECONDS)
    while time.monotonic() < until:
        for box in list((site.ground.mail / LOCAL).glob("box*")):
            if site.chance.random() < 0.5:
                _read_mail(box)
            else:
                away = site.ground.mail / "away"
                box.rename(away)
                time.sleep(site.chance.uniform(0, 0.005))
                _bring_back(away, box)
        time.sleep(0.002)


def _read_mail(box: Path) -> None:
    (box / "cur").mkdir(exist_ok=True)
    for mail in (box / "new").glob("*"):
        mail.rename(box / "cur" / f"{mail.name}:2,S")
    for folder in (box / "new", box / "tmp", box / "cur", box):
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise


def _bring_back(away: Path, box: Path) -> None:
    """Beside what came meanwhile, where it was made anew."""
    try:
        away.rename(box)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    for mail in away.glob("*/*"):
        (box / mail.parent.name).mkdir(exist_ok=True)
        mail.rename(box / mail.parent.name / mail.name)
    shutil.rmtree(away)


@contextmanager
def _filled(disk: Disk) -> Iterator[None]:
    hog = disk.place / "hog"
    try:
        _fill(hog, disk.place)
        yield
    finally:
        hog.unlink()


def _fill(file: Path, place: Path) -> None:
    """Takes every block that is free."""
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC)
    try:
        size, chunk = 0, CHUNK
        block = os.statvfs(place).f_bsize
        while chunk >= block:
            try:
                os.posix_fallocate(descriptor, size, chunk)
                size += chunk
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                chunk //= 2
    finally:
        os.close(descriptor)


def _use_up_inodes(folder: Path) -> None:
    folder.mkdir()
    number = 0
    try:
        while True:
            os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC))
            number += 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _failing(site: Site, inject: str) -> None:
    with _injected(site, inject) as tracers:
        _hold(site)
        _check_struck(tracers)
    _resumes(site)


@contextmanager
def _injected(site: Site, inject: str) -> Iterator[list[Tracer]]:
    """All workers, with all their threads."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(traced(worker, site.folder / f"trace.{number}", following=True, inject=inject))
            for number, worker in enumerate(site.server.workers())
        ]


def _check_struck(tracers: list[Tracer]) -> None:
    """A load that runs makes every worker flush sooner or later."""
    wait_until(lambda: any(tracer.injected() for tracer in tracers), "a call that is made to fail")


def _hold(site: Site) -> None:
    time.sleep(site.chance.uniform(*HELD_SECONDS))


def _refused(site: Site) -> bool:
    """Whether no message can be sent now."""
    return _send_probe(site) != 250


def _await_refusals(site: Site) -> None:
    """Until so many probes in a row were refused at their MAIL that no worker takes mail any more: by 452, or by 421
    where a worker cannot even open its spool. Raises CrashError."""
    row = 0
    deadline = time.monotonic() + FULL_SECONDS
    while row < ROW:
        if time.monotonic() > deadline:
            raise CrashError(f"the spool's disk is full, and {FULL_SECONDS:.0f} s later it takes mail")
        row = row + 1 if _send_probe(site) in REFUSALS else 0
        time.sleep(0.02)


def _send_probe(site: Site) -> int:
    """What a message of the ledger was answered, which must arrive where it was taken: 250, the code of a refusal at
    its MAIL, or 0."""
    site.probes += 1
    name = f"r{site.run}p{site.probes}"
    letter = Letter(name, make_body(name, PROBE_OCTETS, site.chance), (f"probe-{site.run}@{LOCAL}",))
    try:
        with Connection(site.server.port) as connection:
            connection.hello()
            connection.send(f"MAIL FROM:<> SIZE={PROBE_OCTETS}\r\n".encode())
            if (code := connection.code()) != 250:
                return code
            connection.send(b"RSET\r\n")
            connection.code()
            try:
                send_data(connection, [letter])
            finally:
                site.ledger.write(letter, outcome_of(letter.code), letter.code, letter.refused)
    except GoneError:
        pass
    return 250 if letter.code == 250 else 0


def _resumes(site: Site) -> None:
    """The disk works again, and so does the server, by itself."""
    begun = time.monotonic()

    def takes_mail() -> bool:
        try:
            with Connection(site.server.port) as connection:
                connection.hello()
                connection.send(b"MAIL FROM:<a@client.test> SIZE=100\r\n")
                return connection.code() == 250
        except GoneError:
            return False

    # By the kernel's choice either worker answers: several in a row are both.
    wait_until(lambda: all(takes_mail() for _ in range(6)), "mail is taken again")
    site.note_recovery(time.monotonic() - begun)


_EXT4, _XFS = Layout("ext4"), Layout("xfs")

FAULTS: tuple[Fault, ...] = (
    under_load("disk.full-ext4", fill_spool, layout=_EXT4, share=2),
    under_load("disk.full-xfs", fill_spool, layout=_XFS, share=2),
    under_load("disk.full-one", fill_spool, layout=Layout("ext4", one=True)),
    under_load("disk.full-mail", fill_mail, layout=_EXT4, share=2),
    under_load("disk.inodes", use_up_inodes, layout=Layout("ext4", inodes=2000)),
    under_load("disk.quota", exceed_quota),
    under_load("disk.quota-mail", exceed_mail_quota),
    under_load("disk.eio-once", fail_once, share=2),
    under_load("disk.eio", fail, share=2),
    under_load("disk.eio-write", fail_writes, share=2),
    under_load("disk.eio-mail", fail_mail),
    under_load("disk.eio-kill", fail_and_die, share=2),
    under_load("disk.readonly", turn_read_only, layout=_EXT4),
    under_load("disk.medium", starve, layout=Layout("ext4", medium="tmpfs")),
    under_load("disk.slow", flush_slowly),
    under_load("disk.folders", take_folders),
)
