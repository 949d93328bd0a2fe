"""File systems of our own on images in files, and the power cut: what was not on stable storage is gone.

In: a folder, a kind (ext4 or xfs), what lies where. Out: Disks that are mounted, cut (`xfs_io -x -c shutdown`, which
stops the file system without flushing anything) and mounted again, when it recovers from its journal as after a crash.
Always: needs root and loop devices; what was mounted is unmounted and detached at the end, whatever happened.
Not modelled: drives that lie about flushing, blocks that reach the medium in another order than a journal expects.
On failure: LoadError, with what the program said.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import LoadError
from .processes import find_program

# Of the image, which is sparse. mkfs.xfs makes nothing that is smaller than 300 MB.
_SIZES = {"ext4": "256M", "xfs": "320M"}
_PACKAGES = {"mkfs.ext4": "e2fsprogs", "mkfs.xfs": "xfsprogs", "xfs_io": "xfsprogs", "strace": "strace"}
# No journal of half the image, nothing zeroed in the background; lazy counters and so on are each file system's own.
_MAKE = {"ext4": ("-E", "lazy_itable_init=1,lazy_journal_init=1"), "xfs": ("-f",)}
UNMOUNT_SECONDS = 90.0
MEDIUM_SIZE = "160M"


@dataclass(frozen=True)
class Layout:
    """Where things lie. `kind` "": in a folder, on no disk of ours. `one`: spool and mailboxes on the same disk.
    `medium` "tmpfs": the images are in a small memory, which can be made full below the file systems. `inodes`: so
    many and no more; 0: as the file system likes."""

    kind: str = ""
    one: bool = False
    medium: str = ""
    inodes: int = 0


class Disk:
    """One file system."""

    def __init__(self, kind: str, image: Path, place: Path, size: str = "", inodes: int = 0) -> None:
        self.place = place
        self.image = image
        self.device = ""
        self._kind = kind
        self._size = size or _SIZES[kind]
        self._options = (*_MAKE[kind], "-N", str(inodes)) if inodes else _MAKE[kind]
        self._mounted = False

    def make(self) -> None:
        """Makes it anew, empty, and mounts it. Raises LoadError."""
        self.remove()
        run("truncate", "-s", self._size, str(self.image))
        run(f"mkfs.{self._kind}", "-q", *self._options, str(self.image))
        self.device = run("losetup", "--find", "--show", str(self.image)).strip()
        self.place.mkdir(parents=True, exist_ok=True)
        self._mount()

    def cut(self) -> None:
        """From now on nothing reaches it."""
        run("xfs_io", "-x", "-c", "shutdown", str(self.place))

    def recover(self) -> None:
        """The power is back. Nothing may use it meanwhile."""
        self._unmount()
        self._mount()

    def remove(self) -> None:
        """Unmounts and detaches it, and removes its image. Also twice."""
        if self._mounted:
            self._unmount()
        if self.device:
            run("losetup", "--detach", self.device)
            self.device = ""
        self.image.unlink(missing_ok=True)

    def _mount(self) -> None:
        run("mount", self.device, str(self.place))
        self._mounted = True

    def _unmount(self) -> None:
        deadline = time.monotonic() + UNMOUNT_SECONDS
        while True:
            try:
                run("umount", str(self.place))
                break
            except LoadError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # a process that was killed has it open still
        # A process in a mount namespace of its own, which it took while this was mounted, keeps it alive.
        living = Path(f"/sys/fs/{self._kind}/{Path(self.device).name}")
        while living.exists():
            if time.monotonic() > deadline:
                raise LoadError(f"{self.place} is still mounted in another mount namespace")
            time.sleep(0.01)
        self._mounted = False


@dataclass
class Ground:
    """What a server stands on: where its data and its mailboxes lie, and the disks below them."""

    data: Path
    mail: Path
    disks: list[Disk]

    def make(self) -> None:
        """All disks anew and empty."""
        for disk in self.disks:
            disk.make()

    def cut(self) -> None:
        for disk in self.disks:
            disk.cut()

    def recover(self) -> None:
        for disk in self.disks:
            disk.recover()


@contextmanager
def ground(layout: Layout, folder: Path) -> Iterator[Ground]:
    """What a layout needs, below `folder`, as long as the block runs. Raises LoadError."""
    with ExitStack() as stack:
        disks: list[Disk] = []
        places = {"data": folder / "data", "mail": folder / "mail"}
        if layout.kind:
            check_root()
            names = ("disk",) if layout.one else ("spool", "boxes")
            images = folder
            if layout.medium:
                images = folder / "medium"
                images.mkdir()
                run("mount", "-t", "tmpfs", "-o", f"size={MEDIUM_SIZE}", "crash", str(images))
                stack.callback(run, "umount", str(images))
            for name, thing in zip(names * 2, places, strict=False):
                disk = next((one for one in disks if one.place == folder / name), None)
                if disk is None:
                    disk = Disk(layout.kind, images / f"{name}.image", folder / name, inodes=layout.inodes)
                    stack.callback(disk.remove)
                    disks.append(disk)
                places[thing] = disk.place / thing
        made = Ground(places["data"], places["mail"], disks)
        made.make()
        yield made


def check_root() -> None:
    """Raises LoadError."""
    if os.geteuid() != 0:
        raise LoadError("file systems of its own need root")


def run(program: str, *arguments: str) -> str:
    """What a program of the system said. Raises LoadError."""
    path = find_program(program, _PACKAGES.get(program, "mount util-linux"))
    done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadError(f"{program} {' '.join(arguments)}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.stdout
