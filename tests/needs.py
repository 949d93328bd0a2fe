"""What a test needs of the machine: programs, root, a file system of its own, a folder that other users may enter.

What is missing skips the test and says what to install. With CI=true it fails instead, for there everything was to
be installed; only a CI that does not run as root skips what needs root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

# Debian's package, where it has not the program's name
PACKAGES = {
    "dovecot": "dovecot-lmtpd",
    "losetup": "mount",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "nft": "nftables",
    "smtp-sink": "postfix",
    "smtp-source": "postfix",
    "systemd-analyze": "systemd",
    "testssl": "testssl.sh",
    "xfs_io": "xfsprogs",
}
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def lacks(text: str) -> NoReturn:
    """Ends the test: skipped, or failed in CI."""
    if os.environ.get("CI") == "true":
        pytest.fail(text)
    pytest.skip(text)


def needs(*programs: str) -> None:
    """These programs are installed."""
    missing = [program for program in programs if shutil.which(program, path=SYSTEM_PATH) is None]
    if missing:
        packages = sorted({PACKAGES.get(program, program) for program in missing})
        lacks(f"needs {', '.join(missing)}: apt-get install {' '.join(packages)}")


def needs_root() -> None:
    """The tests run as root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")


@contextmanager
def default_port() -> Iterator[None]:
    """The port of the embedded default is this test's: tests of several processes take turns."""
    with (Path(tempfile.gettempdir()) / "fastsmtp-tests-port-2525").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield


class Volume:
    """A file system of the test's own, mounted at `path`."""

    def __init__(self, path: Path, mount: list[str]) -> None:
        self.path = path
        self._mount = [*mount, str(path)]

    def shut_down(self) -> None:
        """From now on every write and flush is an error."""
        needs("xfs_io")
        _run("xfs_io", "-x", "-c", "shutdown", str(self.path))

    def cut_power(self) -> None:
        """Everything that is not on stable storage is lost; then the machine is up again."""
        self.shut_down()
        _run("umount", str(self.path))
        _run(*self._mount)


@contextmanager
def volume(kind: str, path: Path, size: str) -> Iterator[Volume]:
    """Makes and mounts a file system: `kind` is tmpfs, ext4 or xfs, `size` as "300M". Needs root."""
    needs_root()
    path.mkdir(parents=True, exist_ok=True)
    image = path.with_name(path.name + ".image")
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
    else:
        needs(f"mkfs.{kind}", "losetup")
        _run("truncate", "-s", size, str(image))
        _run(f"mkfs.{kind}", "-q", str(image))
        mount = ["mount", "-o", "loop", str(image)]
    try:
        _run(*mount, str(path))
    except subprocess.CalledProcessError as error:
        lacks(f"needs the right to mount: {error.stderr.decode().strip()}")
    try:
        yield Volume(path, mount)
    finally:
        _run("umount", str(path))
        image.unlink(missing_ok=True)


@contextmanager
def public_folder(name: str) -> Iterator[Path]:
    """A folder that every user may enter (pytest's own are closed to others), with a short path, as unix sockets want
    it. Removed with what is in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"fastsmtp-{name}-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _run(*command: str) -> None:
    subprocess.run(command, env={**os.environ, "PATH": SYSTEM_PATH}, check=True, capture_output=True)
