"""What the machine can refuse to a server that starts: each refusal is one line that names the place."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fastsmtp.claim import (
    Listening,
    StartError,
    bind,
    drop_privileges,
    find_account,
    make_commands,
    read_password,
    read_passwords,
    read_settings,
    take_data_dir,
)
from fastsmtp.config import Config
from loadtest.processes import free_port

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user reaches, which tmp_path is not; its path is short, as unix sockets want it."""
    with tempfile.TemporaryDirectory(prefix="fastsmtp-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def as_nobody(job: Callable[[], object]) -> str:
    """What the job returns or raises, as the text that a user without rights gets."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = ""
        try:
            if os.geteuid() == 0:
                drop_privileges(pwd.getpwnam("nobody"))
            text = str(job())
        except StartError as error:
            text = str(error)
        finally:
            os.write(write, text.encode())
            os._exit(0)
    os.close(write)
    with open(read, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(pid, 0)
    return text


def make_config(*addresses: str, workers: int = 1, **keys: object) -> Config:
    return Config.model_validate(
        {"hostname": "mx.test", "workers": workers, "listener": [{"address": list(addresses), **keys}]}
    )


def listen(*addresses: str, workers: int = 1) -> list[Listening]:
    return bind(make_config(*addresses, workers=workers), None)


@pytest.fixture
def opened() -> Iterator[list[Listening]]:
    """What a test listens on, closed at its end."""
    listening: list[Listening] = []
    yield listening
    for one in listening:
        one.close()


# Addresses


def test_each_worker_has_a_socket_of_its_own_on_the_same_port(opened: list[Listening]) -> None:
    opened += listen("127.0.0.1:0", workers=3)
    (one,) = opened
    names = {sock.getsockname() for sock in one.sockets}
    assert len(one.sockets) == 3
    assert [f"{host}:{port}" for host, port in names] == [one.address]
    assert [one.socket_of(index) for index in range(3)] == one.sockets
    served = set()
    for _ in range(200):
        with socket.create_connection(names.copy().pop()):
            for number, sock in enumerate(one.sockets):
                try:
                    sock.accept()[0].close()
                    served.add(number)
                except BlockingIOError:
                    pass
    assert served == {0, 1, 2}


def test_a_single_worker_shares_its_port_with_nobody(opened: list[Listening]) -> None:
    opened += listen("127.0.0.1:0")
    assert opened[0].sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("reuse_port", [0, 1])
def test_a_port_in_use_is_refused_even_if_its_holder_would_share_it(workers: int, reuse_port: int) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(StartError, match=f"^listener {address}: the address is in use by another program$"):
            listen(address, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_port_in_use_by_another_of_our_servers_is_refused(opened: list[Listening], workers: int) -> None:
    opened += listen("127.0.0.1:0", workers=2)
    with pytest.raises(StartError, match="in use"):
        listen(opened[0].address, workers=workers)


def test_when_one_address_is_refused_none_is_kept() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(StartError, match="Cannot assign"):
        listen(free, "192.0.2.1:25", workers=2)
    listen(free)[0].close()


def test_a_port_is_free_at_once_after_its_server_ended() -> None:
    (one,) = listen("127.0.0.1:0")
    host, port = one.sockets[0].getsockname()
    with socket.create_connection((host, port)) as client:
        server = one.sockets[0].accept()[0]
        one.close()
        server.close()  # first to close: its end goes to TIME_WAIT
        assert client.recv(1) == b""
    listen(f"{host}:{port}")[0].close()


def test_ipv6_is_only_ipv6(opened: list[Listening]) -> None:
    try:
        opened += listen(f"[::]:{free_port()}", workers=2)
    except StartError as error:
        pytest.skip(f"no IPv6: {error}")
    port = opened[0].sockets[0].getsockname()[1]
    assert opened[0].address == f"[::]:{port}"
    opened += listen(f"0.0.0.0:{port}")


def test_a_host_name_stands_for_its_addresses(opened: list[Listening]) -> None:
    opened += listen("localhost:0")
    assert "127.0.0.1" in {one.sockets[0].getsockname()[0] for one in opened}


def test_a_host_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StartError, match=r"^listener name\.invalid:2525: \w"):
        listen("name.invalid:2525")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(StartError, match=r"^listener 192\.0\.2\.1:2525: Cannot assign requested address$"):
        listen("192.0.2.1:2525")


def test_without_permission_for_a_port() -> None:
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) <= 25:
            pytest.skip("every user may bind every port here")
    text = as_nobody(lambda: listen("127.0.0.1:25"))
    assert text == ("listener 127.0.0.1:25: no permission; ports below 1024 need a start as root (see the key `user`)")


# Unix sockets


def test_a_unix_socket_is_shared_has_its_mode_and_goes_with_the_server(public: Path) -> None:
    path = public / "lmtp"
    (one,) = bind(make_config(f"unix:{path}", workers=3, mode="0620"), None)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o620
    assert one.address == f"unix:{path}"
    assert one.socket_of(0) is one.socket_of(2)
    one.close()
    assert not path.exists()
    one.close()


@as_root
def test_a_unix_socket_belongs_to_the_user(public: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    (one,) = bind(make_config(f"unix:{public}/lmtp"), nobody)
    status = (public / "lmtp").lstat()
    one.close()
    assert (status.st_uid, status.st_gid) == (nobody.pw_uid, nobody.pw_gid)


def test_a_unix_socket_that_nobody_listens_on_is_replaced(public: Path) -> None:
    path = public / "lmtp"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    (one,) = listen(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    one.close()


def test_a_unix_socket_in_use_is_refused_and_left_alone(public: Path) -> None:
    path = public / "lmtp"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
        old.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            for _ in range(2):  # the second time its queue is full, and a connection would wait
                with pytest.raises(StartError, match=f"^listener unix:{path}: the address is in use"):
                    listen(f"unix:{path}")
        assert path.is_socket()


def test_what_is_no_socket_is_never_removed(public: Path) -> None:
    path = public / "precious"
    path.write_text("text")
    with pytest.raises(StartError, match="in use"):
        listen(f"unix:{path}")
    link = public / "link"
    link.symlink_to(path)
    with pytest.raises(StartError, match="in use"):
        listen(f"unix:{link}")
    assert path.read_text() == "text"


def test_the_next_servers_socket_is_not_removed(public: Path) -> None:
    path = public / "lmtp"
    (old,) = listen(f"unix:{path}")
    path.rename(public / "old")
    (new,) = listen(f"unix:{path}")
    old.close()
    assert path.is_socket()
    new.close()


@pytest.mark.parametrize(("name", "text"), [("x" * 120, "path too long"), ("no/folder", "No such file")])
def test_a_unix_socket_that_cannot_be(public: Path, name: str, text: str) -> None:
    with pytest.raises(StartError, match=f"^listener unix:.*: .*{text}"):
        listen(f"unix:{public}/{name}")


def test_a_socket_that_was_removed_meanwhile_is_no_error(public: Path) -> None:
    (one,) = listen(f"unix:{public}/lmtp")
    (public / "lmtp").unlink()
    one.close()


# The data directory


def test_the_data_directory_is_made_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    before = os.umask(0o077)
    try:
        lock = take_data_dir(path, None)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o711
    assert stat.S_IMODE((path / "lock").stat().st_mode) == 0o600
    assert (path / "lock").read_text() == f"{os.getpid()}\n"
    assert fcntl.fcntl(lock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with pytest.raises(
        StartError, match=f"^data_dir {path} is in use by process {os.getpid()}, or by workers it left$"
    ):
        take_data_dir(path, None)
    os.close(lock)
    os.close(take_data_dir(path, None))


def test_a_failed_start_leaves_no_descriptor(tmp_path: Path) -> None:
    lock = take_data_dir(tmp_path, None)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(StartError):
            take_data_dir(tmp_path, None)
        with pytest.raises(StartError):
            listen("127.0.0.1:0", "192.0.2.1:25")
    assert os.listdir("/proc/self/fd") == before
    os.close(lock)


def test_without_permission_for_the_data_directory(public: Path) -> None:
    closed = public / "closed"
    closed.mkdir(0o500)
    if os.geteuid() == 0:
        closed.chmod(0o700)
    assert as_nobody(lambda: take_data_dir(closed, None)) == f"data_dir {closed}: Permission denied"
    if os.geteuid() == 0:
        assert as_nobody(lambda: take_data_dir(closed / "x", None)) == f"data_dir {closed}/x: Permission denied"


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(StartError, match=f"^data_dir {tmp_path}/{name}: Not a directory$"):
            take_data_dir(tmp_path / name, None)


def test_what_was_put_in_the_locks_place_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("text")
    for number, place in enumerate((target.symlink_to, target.hardlink_to, os.mkfifo, os.mkdir)):
        folder = tmp_path / str(number)
        folder.mkdir()
        lock = folder / "lock"
        if number == 0:
            lock.symlink_to(target)
        elif number == 1:
            lock.hardlink_to(target)
        else:
            place(lock)
        with pytest.raises(StartError, match=f"^data_dir {folder}: "):
            take_data_dir(folder, None)
    assert target.read_text() == "text"


@as_root
def test_the_data_directory_belongs_to_the_user(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "new"):
        os.close(take_data_dir(tmp_path / name, nobody))
        assert (tmp_path / name).stat().st_uid == nobody.pw_uid
        assert (tmp_path / name / "lock").stat().st_uid == nobody.pw_uid
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mail").touch()
    with pytest.raises(
        StartError, match=f"^data_dir {foreign}: it does not belong to nobody: chown -R nobody {foreign}$"
    ):
        take_data_dir(foreign, nobody)
    assert foreign.stat().st_uid == 0


# Users


def test_who_is_not_root_stays_who_he_is() -> None:
    assert find_account("") is None
    assert as_nobody(lambda: find_account("root")) == "None"


@as_root
def test_root_becomes_the_user() -> None:
    assert find_account("nobody") == pwd.getpwnam("nobody")
    assert find_account("root") is None
    with pytest.raises(StartError, match=r"^user: there is no user 'no-one' on this machine$"):
        find_account("no-one")


@as_root
def test_privileges_are_dropped_for_good() -> None:
    nobody = pwd.getpwnam("nobody")
    seen = as_nobody(lambda: (os.getresuid(), os.getresgid(), os.getgroups()))
    assert seen == str(((nobody.pw_uid,) * 3, (nobody.pw_gid,) * 3, os.getgrouplist("nobody", nobody.pw_gid)))


@as_root
def test_privileges_that_could_be_regained_are_an_error() -> None:
    """With SECBIT_NO_SETUID_FIXUP the kernel leaves the capabilities, and with them the way back to root."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ctypes.CDLL(None).prctl(28, 4, 0, 0, 0)
            drop_privileges(pwd.getpwnam("nobody"))
        except OSError as error:
            code = 42 if error.strerror == "root could be regained" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


# Certificates


def write_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mx.test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def make_tls_config(certificate: Path, key: Path) -> Config:
    return Config.model_validate(
        {
            "hostname": "mx.test",
            "tls": {"certificate": certificate, "key": key},
            "listener": [
                {"address": "127.0.0.1:25", "tls": "starttls"},
                {"address": "127.0.0.1:26", "tls": "off"},
                {"address": "127.0.0.1:27", "tls": "implicit"},
            ],
        }
    )


# Passwords and commands


@pytest.mark.parametrize(
    ("octets", "password"),
    [
        (b"secret\n", "secret"),
        (b"secret", "secret"),
        (b"secret\r\nanother line\n", "secret"),
        (b" two words \n", " two words "),
        ("pässword\n".encode(), "pässword"),
        (b"x" * 8192 + b"\n", "x" * 8192),
    ],
)
def test_a_password_is_the_first_line(tmp_path: Path, octets: bytes, password: str) -> None:
    (tmp_path / "p").write_bytes(octets)
    assert read_password(tmp_path / "p") == password


@pytest.mark.parametrize(
    ("octets", "why"),
    [
        (b"", "is empty"),
        (b"\nsecret\n", "is empty"),
        (b"x" * 8193 + b"\n", "begins with a line that is too long for a password"),
        (b"\xff\n", "is not UTF-8"),
        (b"a\0b\n", "begins with a line that is not printable"),
        (b"a\rb\n", "begins with a line that is not printable"),
    ],
)
def test_what_is_no_password(tmp_path: Path, octets: bytes, why: str) -> None:
    (tmp_path / "p").write_bytes(octets)
    with pytest.raises(StartError) as caught:
        read_passwords(with_transport(smarthost="h.test:587", user="me", password_file=tmp_path / "p"))
    assert str(caught.value) == f"transport.out: {tmp_path}/p {why}"


def with_transport(kind: str = "smtp", **keys: object) -> Config:
    return Config.model_validate({"hostname": "mx.test", "transport": {"out": {"type": kind, **keys}}})


def test_passwords_by_transport(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("secret\n")
    config = with_transport(smarthost="h.test:587", user="me", password_file=tmp_path / "p")
    assert read_passwords(config) == {"out": "secret"}
    assert read_passwords(with_transport()) == {}
    with pytest.raises(StartError, match=r"^transport.out: .*/q cannot be read: No such file or directory$"):
        read_passwords(with_transport(smarthost="h.test:587", user="me", password_file=tmp_path / "q"))


def test_commands_by_transport() -> None:
    user = "nobody" if os.geteuid() == 0 else ""
    commands = make_commands(with_transport("pipe", command=["/bin/x", "{local}"], user=user, timeout=7), None)
    assert list(commands) == ["out"]
    assert (commands["out"].arguments, commands["out"].timeout) == (("/bin/x", "{local}"), 7.0)
    assert make_commands(with_transport("discard"), None) == {}
    with pytest.raises(StartError, match=r"^transport.out: command: "):
        make_commands(with_transport("pipe", command=["x"], user=user), None)


@as_root
def test_commands_run_as_somebody_else_than_the_server() -> None:
    nobody = pwd.getpwnam("nobody")
    for user, account in (("", nobody), ("root", nobody), ("nobody", nobody)):
        with pytest.raises(StartError, match=r"^transport.out: user: "):
            make_commands(with_transport("pipe", command=["/bin/x"], user=user), account)


def test_each_listener_with_tls_has_its_demands(tmp_path: Path) -> None:
    settings = read_settings(make_tls_config(*write_certificate(tmp_path, "a")))
    assert set(settings.demands) == {0, 2}
    assert [pair.names for pair in settings.pairs] == [("mx.test",)]
    assert read_settings(make_config("127.0.0.1:25")).pairs == ()


def test_certificates_that_cannot_be_used(tmp_path: Path, public: Path) -> None:
    certificate, key = write_certificate(tmp_path, "a")
    _, other_key = write_certificate(tmp_path, "b")
    missing = tmp_path / "missing"
    for pair in ((missing, key), (certificate, missing)):
        with pytest.raises(StartError, match=f"^tls: {missing} cannot be read: No such file or directory$"):
            read_settings(make_tls_config(*pair))
    text = f"^tls: the key in {other_key} does not belong to the certificate in {certificate}$"
    with pytest.raises(StartError, match=text):
        read_settings(make_tls_config(certificate, other_key))
    garbage = tmp_path / "garbage"
    garbage.write_text("no certificate")
    with pytest.raises(StartError, match=f"^tls: there is no PEM certificate in {garbage}$"):
        read_settings(make_tls_config(garbage, key))
    for file in (garbage, certificate):
        with pytest.raises(StartError, match=f"^tls: there is no PEM key in {file}$"):
            read_settings(make_tls_config(certificate, file))
    locked = tmp_path / "locked"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(StartError, match=f"^tls: {certificate} and {locked} cannot be used: the key is encrypted"):
        read_settings(make_tls_config(certificate, locked))
    readable, closed = write_certificate(public, "c")
    closed.chmod(0)
    said = as_nobody(lambda: read_settings(make_tls_config(readable, closed)))
    assert said == f"tls: {closed} cannot be read: Permission denied"


def test_libraries_are_imported_while_they_can_be() -> None:
    """Of a configuration that needs them; what is imported later might lie where only root may look."""
    script = """\
import sys
from fastsmtp.claim import read_settings
from fastsmtp.config import Config
for tables in ({}, {"sql": {"s": {"database": "s.db"}}, "auth": {"oauth": {"introspection": "https://i.test"}}}):
    read_settings(Config.model_validate({"hostname": "mx.test"} | tables))
    assert not {"psycopg", "jwt"} & set(sys.modules)
read_settings(Config.model_validate({"hostname": "mx.test", "sql": {"s": {"database": "postgresql://h.test/d"}}}))
assert "psycopg.rows" in sys.modules
assert "jwt" not in sys.modules
oauth = {"issuer": "i", "audience": "a", "keys_url": "https://i.test/keys"}
read_settings(Config.model_validate({"hostname": "mx.test", "auth": {"oauth": oauth}}))
assert "jwt.algorithms" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "jwt.algorithms", None)
    base = {"hostname": "mx.test"}
    with pytest.raises(StartError, match=r"^sql.s: PostgreSQL needs psycopg .*pip install"):
        read_settings(Config.model_validate({**base, "sql": {"s": {"database": "postgresql://h.test/d"}}}))
    oauth = {"issuer": "i", "audience": "a", "keys_url": "https://i.test/keys"}
    with pytest.raises(StartError, match=r"^auth.oauth: signed tokens need PyJWT"):
        read_settings(Config.model_validate({**base, "auth": {"oauth": oauth}}))
