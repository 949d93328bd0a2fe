"""The servers of a race: for each a function that says how it is started fairly, and a row in PEERS.

In: a Job: a scratch folder, an end (what becomes of the mail), a port, the sink for relayed mail. Out: a Plan: files,
folders with their owners, a command. Fair means: all on loopback, every recipient at y.test taken, limits on
connections, processes and messages a connection lifted, one mailbox for each recipient, a line of log for each message
where the server has a log, and as much on disk as its makers chose.
Always: a server listens on 127.0.0.1 only, and writes below its folder only. Nothing is started here (start), nothing
fetched (install). On failure: LoadError.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import LoadError
from .install import Installed, Store
from .private import USERS
from .processes import configuration, find_program

MAILBOXES = ("b", *(f"user{n}" for n in range(1, 1001)))  # what the scenarios send to
SESSIONS = 200  # processes that a server with one for each session may have


@dataclass(frozen=True)
class Job:
    """What a server is to be started for. `folder` is where it sees its scratch folder."""

    folder: Path
    end: str
    port: int
    sink: int  # the port of the sink on 127.0.0.1
    installed: Installed


@dataclass
class Plan:
    """How it is started. Names of files and folders are relative to the scratch folder, those of etc to /etc."""

    command: list[str]
    files: dict[str, str] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)  # name: user that owns it, "" for ours
    etc: dict[str, str] = field(default_factory=dict)
    binds: dict[str, str] = field(default_factory=dict)  # folder: where the server looks for it
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peer:
    """A server that can be raced. `claims` has its ends, and for each what its makers say is kept before 250."""

    name: str
    claims: Mapping[str, str]
    install: Callable[[Store], Installed]
    plan: Callable[[Job], Plan]
    private: bool = False  # needs a view of the file system of its own


def plan_fastsmtp(job: Job, durability: str, python: str = sys.executable) -> Plan:
    """Of the source tree that is installed.program; also for a race between two of them."""
    file = job.folder / "fastsmtp.toml"
    text = configuration(job.folder, job.port, durability, job.end, tls=False, sink=job.sink)
    command = [python, "-m", "fastsmtp", "serve", "--config", str(file)]
    return Plan(command, {file.name: text}, environment={"PYTHONPATH": str(job.installed.program)})


def fastsmtp(job: Job) -> Plan:
    return plan_fastsmtp(job, "fsync")


def fastsmtp_memory(job: Job) -> Plan:
    return plan_fastsmtp(job, "none")


_POSTFIX_SERVICES = """\
127.0.0.1:{port} inet n - n - {sessions} smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""
_POSTFIX_ENDS = {
    "discard": "virtual_transport = discard:\n",
    "maildir": "virtual_transport = virtual\n",
    "relay": "virtual_transport = relay:[127.0.0.1]:{sink}\n",
}


def postfix(job: Job) -> Plan:
    mailboxes = "".join(f"{name}@y.test y.test/{name}/\n" for name in MAILBOXES)
    main = f"""\
compatibility_level = 3.6
myhostname = mx.y.test
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
queue_directory = {job.folder}/queue
data_directory = {job.folder}/data
maillog_file = {job.folder}/log/postfix
maillog_file_prefixes = {job.folder}
virtual_mailbox_domains = y.test
virtual_mailbox_maps = texthash:{job.folder}/mailboxes
virtual_mailbox_base = {job.folder}/mail
virtual_uid_maps = static:{USERS["mailbox"]}
virtual_gid_maps = static:{USERS["mailbox"]}
virtual_mailbox_limit = 0
smtpd_client_connection_count_limit = 0
smtpd_client_connection_rate_limit = 0
smtpd_client_message_rate_limit = 0
smtpd_relay_restrictions = reject_unauth_destination
alias_maps =
alias_database =
message_size_limit = 0
mailbox_size_limit = 0
"""
    return Plan(
        ["/usr/sbin/postfix", "start-fg"],
        files={"mailboxes": mailboxes},
        folders={"queue": "", "data": "postfix", "mail": "mailbox", "log": ""},
        etc={
            "postfix/main.cf": main + _POSTFIX_ENDS[job.end].format(sink=job.sink),
            "postfix/master.cf": _POSTFIX_SERVICES.format(port=job.port, sessions=SESSIONS),
            "postfix/dynamicmaps.cf": "",
        },
    )


_EXIM_ENDS = {
    "discard": (
        "race:\n  driver = redirect\n  data = :blackhole:\n",
        "",
    ),
    "maildir": (
        "race:\n  driver = accept\n  transport = mailbox\n",
        # A name is used in a path only when it comes from a file: what a client says is tainted.
        "mailbox:\n  driver = appendfile\n  maildir_format\n  user = mailbox\n  group = mailbox\n"
        "  directory = {folder}/mail/${{lookup{{$local_part}}lsearch{{{folder}/mailboxes}}}}\n",
    ),
    "relay": (
        "race:\n  driver = manualroute\n  transport = sink\n  self = send\n"
        '  route_list = "* 127.0.0.1::{sink} byname"\n',
        "sink:\n  driver = smtp\n  allow_localhost\n  hosts_try_fastopen =\n",
    ),
}


def exim(job: Job) -> Plan:
    router, transport = (part.format(folder=job.folder, sink=job.sink) for part in _EXIM_ENDS[job.end])
    text = f"""\
primary_hostname = mx.y.test
spool_directory = {job.folder}/spool
log_file_path = {job.folder}/log/%slog
local_interfaces = 127.0.0.1
daemon_smtp_ports = {job.port}
domainlist local_domains = y.test
acl_smtp_rcpt = race_rcpt
acl_smtp_data = race_data
host_lookup =
rfc1413_query_timeout = 0s
recipients_max = 0
message_size_limit = 0
smtp_accept_max = {SESSIONS * 2}
smtp_accept_max_per_connection = 0
smtp_accept_queue_per_connection = 0
smtp_connect_backlog = 1000
tls_advertise_hosts =
keep_environment =
never_users =

begin acl
race_rcpt:
  accept
race_data:
  accept

begin routers
{router}
begin transports
{transport}
begin retry
* * F,1h,5s
"""
    return Plan(
        ["/usr/sbin/exim4", "-bdf", "-q5s"],
        files={"mailboxes": "".join(f"{name}: {name}\n" for name in MAILBOXES)},
        folders={"spool": "Debian-exim", "log": "Debian-exim", "mail": "mailbox"},
        etc={"exim4/exim4.conf": text},
    )


_OPENSMTPD_ENDS = {
    "maildir": 'action "race" maildir "{folder}/mail/%{{rcpt.user}}" virtual <all>\n',
    "relay": 'action "race" relay host "smtp://127.0.0.1:{sink}"\n',
}


def opensmtpd(job: Job) -> Plan:
    action = _OPENSMTPD_ENDS[job.end].format(folder=job.folder, sink=job.sink)
    text = f"""\
table all {{ "@" = "mailbox" }}
smtp limit max-mails 1000000000
mta limit session-mail-max 1000000000
smtp max-message-size "1G"
listen on 127.0.0.1 port {job.port} hostname mx.y.test
{action}match from any for domain "y.test" action "race"
"""
    return Plan(
        ["/usr/sbin/smtpd", "-d"],
        folders={"spool": "", "mail": "mailbox", "empty": ""},
        etc={"smtpd.conf": text},
        binds={"spool": "/var/spool/smtpd", "empty": "/var/lib/opensmtpd/empty"},
    )


_HARAKA_PLUGIN = {
    "discard": "exports.hook_rcpt = (next) => next(OK)\nexports.hook_queue = (next) => next(OK)\n",
    "relay": (
        "exports.hook_rcpt = (next, connection) => {{ connection.relaying = true; next(OK) }}\n"
        "exports.hook_get_mx = (next) => next(OK, {{ exchange: '127.0.0.1', port: {sink}, priority: 0 }})\n"
    ),
}
# A section that is missing is an exception in the first session.
_HARAKA_CONNECTION = """\
[main]
[haproxy]
[headers]
add_received=true
max_received=100
[max]
bytes=1000000000
line_length=512
data_line_length=992
mime_parts=1000
[message]
helo=Haraka
close=bye
[uuid]
banner_chars=6
"""


def haraka(job: Job) -> Plan:
    packages = job.installed.program
    assert packages is not None
    return Plan(
        ["node", str(packages / "node_modules" / "Haraka" / "bin" / "haraka"), "-c", str(job.folder)],
        files={
            "config/smtp.ini": f"listen=127.0.0.1:{job.port}\nnodes=0\n",
            "config/me": "mx.y.test\n",
            "config/connection.ini": _HARAKA_CONNECTION,
            "config/loglevel": "NOTICE\n",
            "config/plugins": "race\n",
            "config/outbound.ini": "local_mx_ok=true\nconcurrency_max=100\nenable_tls=false\n",
            "plugins/race.js": _HARAKA_PLUGIN[job.end].format(sink=job.sink),
        },
        folders={"queue": ""},
    )


_AIOSMTPD = """\
import asyncio, sys
import uvloop
from aiosmtpd.handlers import Mailbox
from aiosmtpd.smtp import SMTP

class Discard:
    async def handle_DATA(self, server, session, envelope):
        return "250 OK"

async def main():
    handler = Mailbox(sys.argv[2]) if len(sys.argv) > 2 else Discard()
    loop = asyncio.get_running_loop()
    make = lambda: SMTP(handler, hostname="mx.y.test", loop=loop, data_size_limit=0)
    server = await loop.create_server(make, "127.0.0.1", int(sys.argv[1]), backlog=1000)
    await server.serve_forever()

uvloop.run(main())
"""


def aiosmtpd(job: Job) -> Plan:
    mailbox = [str(job.folder / "mail")] if job.end == "maildir" else []
    script = job.folder / "server.py"
    return Plan([str(job.installed.program), str(script), str(job.port), *mailbox], {script.name: _AIOSMTPD})


def smtp_sink(job: Job) -> Plan:
    program = "/usr/sbin/smtp-sink" if job.installed.tree else find_program("smtp-sink", "postfix")
    user = ["-u", "nobody"] if os.geteuid() == 0 else []
    return Plan([program, *user, "-c", f"127.0.0.1:{job.port}", "1000"])


def our_own(_: Store, source: Path = Path(__file__).parents[1]) -> Installed:
    """The fastsmtp of a source tree whose extensions are built, run by this Python. Raises LoadError."""
    try:
        version: str = tomllib.loads((source / "pyproject.toml").read_text())["project"]["version"]
        asked = ["git", "-C", str(source), "rev-parse", "--short", "HEAD"]
        revision = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise LoadError(f"{source} has no fastsmtp: {error}") from None
    return Installed(f"{version} {revision}".strip(), program=source)


FSYNC = "fsync"
NOTHING = "nothing"
OURS = ("fastsmtp", "fastsmtp-memory")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("fastsmtp", {"discard": FSYNC, "maildir": FSYNC, "relay": FSYNC}, our_own, fastsmtp),
        Peer("fastsmtp-memory", {"discard": NOTHING}, our_own, fastsmtp_memory),
        Peer(
            "postfix",
            dict.fromkeys(("discard", "maildir", "relay"), FSYNC),
            lambda store: store.debian("postfix"),
            postfix,
            private=True,
        ),
        Peer(
            "exim",
            dict.fromkeys(("discard", "maildir", "relay"), FSYNC),
            lambda store: store.debian("exim4-daemon-light"),
            exim,
            private=True,
        ),
        Peer(
            "opensmtpd",
            dict.fromkeys(("maildir", "relay"), FSYNC),
            lambda store: store.debian("opensmtpd"),
            opensmtpd,
            private=True,
        ),
        Peer("haraka", {"discard": NOTHING, "relay": FSYNC}, lambda store: store.npm("Haraka"), haraka),
        Peer(
            "aiosmtpd",
            {"discard": NOTHING, "maildir": FSYNC},
            lambda store: store.python("aiosmtpd", "uvloop"),
            aiosmtpd,
        ),
        Peer("smtp-sink", {"discard": NOTHING}, lambda store: store.debian("postfix"), smtp_sink),
    )
}
