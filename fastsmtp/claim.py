"""What a server claims of its machine before it serves: user, data directory, addresses, certificates, passwords.

All that the machine can refuse is asked for here, and every refusal is a StartError with one line for the operator.
Done once, by the process that then forks or serves, before any thread. What is claimed is held by descriptors:
the lock of the data directory, the listening sockets. Nothing is read from the network. flock(2), socket(7)
SO_REUSEPORT, unix(7), RFC 3493 5.3 (IPV6_V6ONLY).
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import resource
import socket
import stat
from collections.abc import Collection
from functools import partial
from pathlib import Path

from .certificates import CertificateError, read_demands, read_pairs, try_all
from .config import Config, Inet, Pipe, Smtp, Unix
from .config_inbound import Postgresql
from .credentials.oauth import missing_library
from .delivery.runner import Command, make_command
from .list_watch import Preparation
from .lists import ListError
from .reload import Key, keys_of
from .seat import BACKLOG, Settings
from .sql import missing_driver

PASSWORD_LIMIT = 8192  # octets: tokens are long
# How far RLIMIT_NICE lets a thread come up again that took idle time only: to niceness 10 (credentials/hashes.py).
RETURN = 20 - 10


class StartError(Exception):
    """The server cannot start; the text is one line for the operator."""


class Listening:
    """An address that is listened on: a socket for each worker, or one that they share. `number` is its own as long
    as the server runs, `key` what it is called in the configuration."""

    __slots__ = ("address", "file", "key", "listener", "number", "sockets")

    def __init__(
        self,
        key: Key,
        listener: int,
        address: str,
        sockets: list[socket.socket],
        file: tuple[Path, int] | None = None,
    ) -> None:
        self.key = key
        self.number = -1
        self.listener = listener
        self.address = address
        self.sockets = sockets
        self.file = file  # a unix socket's path and inode, to be removed with it

    def socket_of(self, index: int) -> socket.socket:
        return self.sockets[index % len(self.sockets)]

    def close(self) -> None:
        if self.file:
            path, inode = self.file
            try:
                if path.lstat().st_ino == inode:
                    path.unlink()
            except OSError:
                pass  # gone, or out of reach; the next server takes it for what it is, a stale one
            self.file = None
        for one in self.sockets:
            one.close()


def find_account(user: str) -> pwd.struct_passwd | None:
    """Who the server becomes when it has claimed everything; None: it stays who it is."""
    if not user or os.geteuid() != 0:
        return None
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise StartError(f"user: there is no user {user!r} on this machine") from None
    return account if account.pw_uid else None


def drop_privileges(account: pwd.struct_passwd) -> None:
    """For good: also in a child, also through the saved ids. OSError: the machine does not allow it."""
    try:
        resource.setrlimit(resource.RLIMIT_NICE, (RETURN, RETURN))
    except (ValueError, OSError):
        pass  # root without that right, as in a container
    os.initgroups(account.pw_name, account.pw_gid)
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    try:
        os.setresuid(0, 0, 0)
    except PermissionError:
        return
    raise OSError(errno.EPERM, "root could be regained")


def take_data_dir(path: Path, account: pwd.struct_passwd | None) -> int:
    """Makes the folder where it is missing and locks it; the descriptor that holds the lock."""
    try:
        _make_folder(path, account)
        # Its owner may not be root: nothing that it put there in the lock's place is followed or written to.
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StartError(f"data_dir {path}: {error.strerror}") from None
    try:
        status = os.fstat(lock)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise StartError(f"data_dir {path}: the file 'lock' in it is not a plain file")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(lock, 0)
        os.write(lock, b"%d\n" % os.getpid())
        if account:
            os.fchown(lock, account.pw_uid, account.pw_gid)
    except BlockingIOError:
        pid = os.read(lock, 20).decode("ascii", "replace").strip()
        os.close(lock)
        raise StartError(f"data_dir {path} is in use by process {pid}, or by workers it left") from None
    except OSError as error:
        os.close(lock)
        raise StartError(f"data_dir {path}: lock: {error.strerror}") from None
    except StartError:
        os.close(lock)
        raise
    return lock


def _make_folder(path: Path, account: pwd.struct_passwd | None) -> None:
    missing = []
    folder = path
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(0o700 if folder == path else 0o755)
        if folder == path:
            # Programs of all users reach the sockets in it that they send mail through, and see nothing else of it:
            # every other folder in it is its owner's alone.
            folder.chmod(0o711)
        parent = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    if account and path.stat().st_uid != account.pw_uid:
        with os.scandir(path) as entries:
            if any(entries):
                raise StartError(
                    f"data_dir {path}: it does not belong to {account.pw_name}: chown -R {account.pw_name} {path}"
                )
        os.chown(path, account.pw_uid, account.pw_gid)


def read_settings(config: Config) -> Settings:
    """What every worker needs of files that only this process may read."""
    _import_libraries(config)
    try:
        demands = read_demands(config)
        pairs = read_pairs(config) if demands else ()
        try_all(demands.values(), pairs)
    except CertificateError as error:
        raise StartError(f"tls: {error}") from None
    return Settings(config, read_passwords(config), pairs, demands)


def _import_libraries(config: Config) -> None:
    """Those that only some configurations need: a worker, who is another user, perhaps may not look where they lie."""
    for name, section in config.sql.items():
        if isinstance(section.database, Postgresql) and (wrong := missing_driver()):
            raise StartError(f"sql.{name}: {wrong}")
    oauth = config.auth.oauth
    if oauth is not None and not oauth.introspection and (wrong := missing_library()):
        raise StartError(f"auth.oauth: {wrong}")


def read_passwords(config: Config) -> dict[str, str]:
    """The password of each transport and database that has one, by the transport's name, or "[sql.NAME]"; of
    introspection by "[auth.oauth]"."""
    smarthosts = {name: way for name, way in config.transport.items() if isinstance(way, Smtp)}
    passwords: dict[str, str] = {}
    oauth = config.auth.oauth
    for key, place, path in (
        *((name, f"transport.{name}", way.password_file) for name, way in smarthosts.items()),
        *((f"[sql.{name}]", f"sql.{name}", database.password_file) for name, database in config.sql.items()),
        ("[auth.oauth]", "auth.oauth", oauth.client_secret_file if oauth is not None else None),
    ):
        if path is not None:
            try:
                passwords[key] = read_password(path)
            except (OSError, ValueError) as error:
                raise StartError(f"{place}: {path} {explain_password(error)}") from None
    return passwords


def make_commands(config: Config, account: pwd.struct_passwd | None) -> dict[str, Command]:
    """The command of each transport that has one, by the transport's name. `account` is who the workers become."""
    commands: dict[str, Command] = {}
    for name, way in config.transport.items():
        if isinstance(way, Pipe):
            server = account.pw_uid if account else os.geteuid()
            try:
                commands[name] = make_command(way.command, way.user, server, way.timeout, way.concurrency)
            except ValueError as error:
                raise StartError(f"transport.{name}: {error}") from None
    return commands


def begin_lists(config: Config, account: pwd.struct_passwd | None) -> Preparation:
    """Workers only open the lists of the configuration: they must be there in their present version."""
    return Preparation(config, partial(drop_privileges, account) if account is not None else None)


def compile_lists(lists: Preparation, *, wait: bool) -> bool:
    """Whether all of them are there. Raises StartError."""
    try:
        return lists.advance(wait=wait)
    except ListError as error:
        raise StartError(f"list {error}") from None
    except OSError as error:
        raise StartError(f"lists cannot be compiled: {error.strerror}") from None


def read_password(path: Path) -> str:
    """The first line of a file. Raises OSError, and ValueError for what is no password."""
    with path.open("rb") as file:
        line = file.readline(PASSWORD_LIMIT + 2).rstrip(b"\r\n")
    if not line:
        raise ValueError("is empty")
    if len(line) > PASSWORD_LIMIT:
        raise ValueError("begins with a line that is too long for a password")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    if not text.isprintable():
        raise ValueError("begins with a line that is not printable")
    return text


def explain_password(error: OSError | ValueError) -> str:
    """What stands behind the file's name."""
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)


def bind(
    config: Config, account: pwd.struct_passwd | None, bound: Collection[Key] = (), first: int = 0
) -> list[Listening]:
    """Listens on every address of the configuration that is not bound; on all of them, or on none. They are numbered
    from `first`."""
    listening: list[Listening] = []
    try:
        for key, number in keys_of(config).items():
            endpoint = key[0]
            if key in bound:
                continue
            if isinstance(endpoint, Unix):
                listening.append(_bind_unix(key, number, endpoint.path, config.listener[number].mode, account))
            else:
                for family, address in _resolve(endpoint):
                    listening.append(_bind_inet(key, number, family, address, config.worker_count))
        for place, one in enumerate(listening, first):
            one.number = place
    except StartError:
        for one in listening:
            one.close()
        raise
    return listening


def _resolve(endpoint: Inet) -> list[tuple[int, Inet]]:
    """A host name may stand for several addresses; each is listened on."""
    try:
        found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise StartError(f"listener {endpoint}: {error.strerror}") from None
    return list(dict.fromkeys((family, Inet(str(address[0]), endpoint.port)) for family, *_, address in found))


def _bind_inet(key: Key, listener: int, family: int, endpoint: Inet, workers: int) -> Listening:
    sockets: list[socket.socket] = []
    host, port = endpoint.host, endpoint.port
    try:
        for _ in range(workers):
            one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # The first is bound without SO_REUSEPORT, so that any other program's socket, even one that has it,
            # is an error; it gets the option behind bind, in time to let the others in.
            if len(sockets) > 1:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((host, port))
            if len(sockets) == 1 and workers > 1:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.listen(BACKLOG)
            port = one.getsockname()[1]  # port 0 has become the one that the others must get
    except OSError as error:
        for one in sockets:
            one.close()
        raise StartError(f"listener {endpoint}: {_explain_bind(error)}") from None
    return Listening(key, listener, str(Inet(host, port)), sockets)


def _explain_bind(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the address is in use by another program"
    if error.errno == errno.EACCES:
        return "no permission; ports below 1024 need a start as root (see the key `user`)"
    return error.strerror or str(error)


def _bind_unix(key: Key, listener: int, path: Path, mode: int, account: pwd.struct_passwd | None) -> Listening:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        before = os.umask(0o777 & ~mode)  # chmod would follow a symlink put in its place
        try:
            one.bind(os.fspath(path))
        finally:
            os.umask(before)
        if account:
            os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        one.listen(BACKLOG)
        return Listening(key, listener, f"unix:{path}", [one], (path, path.lstat().st_ino))
    except OSError as error:
        one.close()
        raise StartError(f"listener unix:{path}: {_explain_bind(error)}") from None


def _remove_stale(path: Path) -> None:
    """Removes a socket that nobody listens on any more; anything else stays, and bind will say so."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
        except BlockingIOError:
            pass  # somebody listens, and is busy
