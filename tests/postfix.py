"""A real Postfix as the next hop: an instance of the test's own, which takes mail for DOMAIN into Maildirs.

In: what it is to do (TLS, passwords, a size limit, answers to single recipients). Out: a `Postfix` that greets on a
free port, and what it has delivered. `answers` are given at RCPT, one after the other and then OK: {"late": ["450 4.2.0
later"]} refuses once, `itertools.repeat("550 5.1.1 no")` always. Passwords are asked of a Dovecot (its `auth` socket),
over TLS only; then nobody else may send. Nothing in a message is changed but what RFC 5321 4.4 adds.
Nothing of the system's Postfix is read or touched. Everything ends and is removed with the block. Needs root.
On failure: AssertionError with its log.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from needs import SYSTEM_PATH, needs, needs_root, public_folder

from loadtest.processes import free_port

START = 60.0  # seconds for what takes a tenth of one
DOMAIN = "postfix.test"

_QUEUE = (
    "active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "maildrop", "private", "public",
    "saved", "trace",
)  # fmt: skip
_MASTER = """\
127.0.0.1:{port} inet n - n - 50 smtpd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
proxymap unix - - n - - proxymap
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""
_MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/log/postfix
maillog_file_prefixes = {folder}
myhostname = next.test
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
disable_dns_lookups = yes
smtpd_peername_lookup = no
smtpd_error_sleep_time = 0
local_header_rewrite_clients =
alias_maps =
local_recipient_maps =
virtual_mailbox_domains = {domain}
virtual_mailbox_maps = static:all/
virtual_mailbox_base = {folder}/mail
virtual_mailbox_limit = 0
virtual_minimum_uid = 1
virtual_uid_maps = static:{uid}
virtual_gid_maps = static:{gid}
default_transport = discard
message_size_limit = {size}
smtpd_client_connection_count_limit = 0
smtpd_relay_restrictions =
smtpd_recipient_restrictions = reject_unauth_destination, check_policy_service unix:{folder}/policy
"""
_TLS = """\
smtpd_tls_security_level = {level}
smtpd_tls_cert_file = {certificate}
smtpd_tls_key_file = {key}
"""
_LOGIN = """\
smtpd_sasl_auth_enable = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = {auth}
smtpd_sasl_security_options = noanonymous
smtpd_tls_auth_only = yes
smtpd_sender_restrictions = permit_sasl_authenticated, reject
"""


class Postfix:
    """`address` is where it listens. `asked` are the recipients' local-parts in the order in which RCPT came. `pid`
    leads a session of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.pid = 0
        self.address = f"127.0.0.1:{port}"
        self.asked: list[str] = []

    def mails(self, mailbox: str) -> list[bytes]:
        """What was delivered to a local-part, with the fields that Postfix put before it."""
        found = [path.read_bytes() for path in sorted((self.folder / "mail/all/new").glob("*"))]
        return [mail for mail in found if f"\nDelivered-To: {mailbox}@{DOMAIN}\n".encode() in mail]

    def wait_mails(self, mailbox: str, n: int) -> list[bytes]:
        """The same once there are `n`: Postfix delivers after it has said 250."""
        deadline = time.monotonic() + START
        while len(found := self.mails(mailbox)) < n:
            assert time.monotonic() < deadline, f"{len(found)} of {n} mails for {mailbox}\n{self.log()}"
            time.sleep(0.02)
        return found

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted((self.folder / "log").iterdir()))


@contextmanager
def postfix(
    *,
    answers: Mapping[str, Iterable[str]] | None = None,
    size: int = 50 << 20,
    certificate: tuple[Path, Path] | None = None,
    tls: str = "may",
    auth: Path | None = None,
) -> Iterator[Postfix]:
    """`certificate` and its key, as PEM: STARTTLS is offered, and demanded with `tls` "encrypt". `auth` is a Dovecot's
    socket: whoever sends must log in. `size` is the limit in octets."""
    needs_root()
    needs("postfix")
    with public_folder("postfix") as folder:
        server = Postfix(folder, free_port())
        _make_folders(folder)
        nobody = pwd.getpwnam("nobody")
        text = _MAIN.format(folder=folder, domain=DOMAIN, uid=nobody.pw_uid, gid=nobody.pw_gid, size=size)
        if certificate is not None:
            text += _TLS.format(level=tls, certificate=certificate[0], key=certificate[1])
        if auth is not None:
            text += _LOGIN.format(auth=auth)
        (folder / "etc/main.cf").write_text(text)
        (folder / "etc/master.cf").write_text(_MASTER.format(port=server.port))
        with _policy(server, {local: iter(lines) for local, lines in (answers or {}).items()}), _master(server):
            yield server


def _make_folders(folder: Path) -> None:
    owner, nobody = pwd.getpwnam("postfix"), pwd.getpwnam("nobody")
    private = ["data", *(f"queue/{name}" for name in _QUEUE)]
    for name in ("etc", "log", "mail", "queue", "queue/pid", *private):
        (folder / name).mkdir()
    for name in private:
        os.chown(folder / name, owner.pw_uid, -1)
        (folder / name).chmod(0o700)
    os.chown(folder / "mail", nobody.pw_uid, nobody.pw_gid)


@contextmanager
def _master(server: Postfix) -> Iterator[None]:
    environment = {"PATH": SYSTEM_PATH}
    command = ["postconf", "-dh", "daemon_directory"]
    programs = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    with (server.folder / "log/errors").open("wb") as errors:
        process = subprocess.Popen(
            [f"{programs}/master", "-c", str(server.folder / "etc"), "-d"],
            env=environment, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True,
        )  # fmt: skip
    server.pid = process.pid
    try:
        _wait(server, process)
        yield
    finally:
        # What it runs stands in its group and is told too, but would not be waited for.
        process.terminate()
        try:
            process.wait(10.0)
        finally:
            _end_group(process.pid)
            process.wait()


def _wait(server: Postfix, process: subprocess.Popen[bytes]) -> None:
    """Until it greets."""
    deadline = time.monotonic() + START
    while True:
        try:
            with socket.create_connection(("127.0.0.1", server.port), 5.0) as client:
                if client.recv(512).startswith(b"220 "):
                    client.sendall(b"QUIT\r\n")
                    client.recv(512)
                    return
        except OSError:
            pass
        assert process.poll() is None, f"Postfix has ended: {server.log()}"
        assert time.monotonic() < deadline, f"Postfix does not answer: {server.log()}"
        time.sleep(0.02)


def _end_group(group: int) -> None:
    """Waits until nothing of it is left; kills what does not end."""
    deadline = time.monotonic() + 5.0
    while _members(group):
        if time.monotonic() > deadline:
            os.killpg(group, signal.SIGKILL)
        time.sleep(0.01)


def _members(group: int) -> list[int]:
    """The processes of a group that have not ended; who waits to be buried has."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                state, _, of = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue  # ended meanwhile
            if int(of) == group and state != "Z":
                found.append(int(entry))
    return found


@contextmanager
def _policy(server: Postfix, answers: Mapping[str, Iterator[str]]) -> Iterator[None]:
    """What Postfix asks at each RCPT (its SMTPD_POLICY_README): lines `name=value` up to an empty one; one answer."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            facts: dict[str, str] = {}
            for line in self.rfile:
                name, equals, value = line.decode().rstrip("\n").partition("=")
                if equals:
                    facts[name] = value
                    continue
                local = facts["recipient"].partition("@")[0]
                server.asked.append(local)
                self.wfile.write(f"action={next(answers.get(local, iter(())), 'DUNNO')}\n\n".encode())
                facts = {}

    class Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True
        block_on_close = False

    path = server.folder / "policy"
    with Listener(str(path), Handler) as listener:
        path.chmod(0o666)
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield
        finally:
            listener.shutdown()
            thread.join()
