"""Unix sockets in the data directory: where a worker listens for commands of this machine, and how those connect.

In: the data directory, a kind, a worker's number as the name. Out: sockets. `control` is for the operator: its folder
is the owner's alone. `submit` is for programs that send mail: open to all who may enter the data directory. A socket
that an earlier server left is replaced; whoever listens holds the lock of the directory, so nobody else is using it.
`turned` has a socket for each domain whose server has come for its mail (odmr.py), under a short name of the domain.
Paths may be longer than an address has room for (107 octets). What is said over them is not known here. Errors are
OSError. unix(7).
"""

from __future__ import annotations

import os
import socket
import stat
from hashlib import blake2b
from pathlib import Path

CONTROL = "control"
SUBMIT = "submit"
TURNED = "turned"
MODES = {CONTROL: (0o700, 0o600), SUBMIT: (0o755, 0o666), TURNED: (0o700, 0o600)}  # of the folder and of what is in it
WAITING = 128  # clients in the kernel
LONGEST = 100  # octets of a path that is used as it is; a longer one goes through a descriptor of its folder


def listen(data_dir: Path, kind: str, worker: int | str) -> socket.socket:
    """Listens, under a worker's number or another name; the folder is made where it is missing."""
    folder = data_dir / kind
    folder_mode, mode = MODES[kind]
    folder.mkdir(0o700, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(descriptor, folder_mode)
        _remove_stale(descriptor, str(worker))
        address = _address(descriptor, folder, str(worker))
        listening.bind(address)
        os.chmod(address, mode)  # the folder is ours: nobody else can have put a link in its place
        listening.listen(WAITING)
    except OSError:
        listening.close()
        raise
    finally:
        os.close(descriptor)
    return listening


def connect(connection: socket.socket, data_dir: Path, kind: str, worker: int) -> None:
    """Connects to a worker."""
    folder = data_dir / kind
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(_address(descriptor, folder, str(worker)))
    finally:
        os.close(descriptor)


def workers(data_dir: Path, kind: str) -> list[int]:
    """Those that have a socket, which may be stale."""
    folder = data_dir / kind
    return [int(name) for name in os.listdir(folder) if name.isdecimal()] if folder.is_dir() else []


def remove(data_dir: Path, worker: int) -> None:
    """Removes a worker's sockets, if it has any."""
    for kind in MODES:
        (data_dir / kind / str(worker)).unlink(missing_ok=True)


def turned_name(domain: str) -> str:
    """The name of a domain's socket: a domain may be longer than an address has room for."""
    return f"d{blake2b(domain.encode(), digest_size=16).hexdigest()}"


def open_turned(data_dir: Path) -> int:
    """A descriptor of the folder of `turned`, which is made where it is missing."""
    folder = data_dir / TURNED
    folder.mkdir(0o700, exist_ok=True)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def find_turned(folder: int, domain: str) -> Path | None:
    """Where the server of a domain can be reached now; None: it is not here."""
    path = Path(f"/proc/self/fd/{folder}/{turned_name(domain)}")
    return path if path.exists() else None


def _address(descriptor: int, folder: Path, name: str) -> str:
    path = f"{folder}/{name}"
    return path if len(os.fsencode(path)) <= LONGEST else f"/proc/self/fd/{descriptor}/{name}"


def _remove_stale(folder: int, name: str) -> None:
    try:
        if stat.S_ISSOCK(os.lstat(name, dir_fd=folder).st_mode):
            os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
