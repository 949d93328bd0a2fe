"""A real Dovecot with directories, sockets and a configuration of its own: LMTP into Maildirs, and SASL for Postfix.

In: the mailboxes with their quotas, or passwords. Out: a `Dovecot` that answers, on a unix socket and on a free port,
and what it has delivered. RCPT is answered 550 for whom it does not know; for a mailbox that would be over its quota it
is answered 250, and end-of-data for that recipient alone 552, or 452 with `tempfail` (RFC 2033 4.2).
Nothing of the system's Dovecot is read or touched. Everything ends and is removed with the block. Needs root, for
Dovecot gives up privileges. On failure: AssertionError with its log.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from needs import SYSTEM_PATH, needs, needs_root, public_folder

from loadtest.processes import free_port

START = 60.0  # seconds for what takes a tenth of one
DOMAIN = "dovecot.test"

_CONFIGURATION = """\
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
listen = 127.0.0.1
protocols = lmtp
hostname = mailboxes.test
ssl = no
mail_plugins = quota
mail_location = maildir:{folder}/mail/%n
mail_uid = nobody
mail_gid = {group}
first_valid_gid = 1
auth_mechanisms = plain login scram-sha-256
auth_failure_delay = 0
passdb {{
  driver = passwd-file
  args = username_format=%u {folder}/users
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {folder}/users
}}
plugin {{
  quota = maildir:User quota
  quota_grace = 0
  quota_exceeded_message = the mailbox is full
}}
quota_full_tempfail = {tempfail}
service lmtp {{
  unix_listener {folder}/lmtp {{
    mode = 0666
  }}
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {port}
  }}
}}
service anvil {{
  # Else a wrong password delays the next one.
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service auth {{
  unix_listener {folder}/auth {{
    mode = 0666
  }}
}}
"""


class Dovecot:
    """`socket` and `address` are where it speaks LMTP, `auth` where it speaks Dovecot's SASL protocol. `pid` leads a
    session of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.socket = folder / "lmtp"
        self.auth = folder / "auth"
        self.port = port
        self.pid = 0
        self.address = f"127.0.0.1:{port}"

    def mails(self, mailbox: str) -> list[bytes]:
        """What was delivered to a local-part, with the fields that Dovecot put before it."""
        folder = self.folder / "mail" / mailbox
        return [path.read_bytes() for path in sorted([*folder.glob("new/*"), *folder.glob("cur/*")])]

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace") if path.exists() else ""


@contextmanager
def dovecot(
    quotas: Mapping[str, str], *, tempfail: bool = False, passwords: Mapping[str, str] | None = None
) -> Iterator[Dovecot]:
    """Serves `quotas`, octets by local-part in DOMAIN, as in {"bob": "10M", "full": "1"}; "" is no limit. `passwords`
    are by user names, for SASL."""
    needs_root()
    needs("dovecot")
    with public_folder("dovecot") as folder:
        port = free_port()
        nobody = pwd.getpwnam("nobody")
        (folder / "mail").mkdir()
        os.chown(folder / "mail", nobody.pw_uid, nobody.pw_gid)
        users = [
            f"{local}@{DOMAIN}:{{PLAIN}}-::::::{f'userdb_quota_rule=*:bytes={octets}' if octets else ''}\n"
            for local, octets in quotas.items()
        ]
        users += [f"{user}:{{PLAIN}}{password}::::::\n" for user, password in (passwords or {}).items()]
        (folder / "users").write_text("".join(users))
        (folder / "dovecot.conf").write_text(
            _CONFIGURATION.format(folder=folder, port=port, group=nobody.pw_gid, tempfail="yes" if tempfail else "no")
        )
        server = Dovecot(folder, port)
        process = subprocess.Popen(
            ["dovecot", "-F", "-c", str(folder / "dovecot.conf")],
            env={"PATH": SYSTEM_PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        server.pid = process.pid
        try:
            _wait(server, process)
            yield server
        finally:
            process.terminate()
            try:
                process.communicate(timeout=10.0)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def _wait(server: Dovecot, process: subprocess.Popen[bytes]) -> None:
    """Until it greets."""
    deadline = time.monotonic() + START
    while True:
        try:
            with socket.create_connection(("127.0.0.1", server.port), 5.0) as client:
                if client.recv(512).startswith(b"220 "):
                    return
        except OSError:
            pass
        if process.poll() is not None and process.stderr is not None:
            raise AssertionError(f"Dovecot has ended: {process.stderr.read().decode()}{server.log()}")
        assert time.monotonic() < deadline, f"Dovecot does not answer: {server.log()}"
        time.sleep(0.02)
