"""`openssl s_client` against a server with two workers, on STARTTLS and implicit TLS: chain, names, versions, tickets.

What Python's ssl shows of a handshake is what OpenSSL tells Python; this is the program that administrators ask. It
believes the root only, and the server sends what stands between.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from certs import Authority, Files
from needs import SYSTEM_PATH, needs
from servers import Server, running, toml
from test_auth_server import add

USER = "ann@here.test"
LISTENERS = """\
[[listener]]
address = "127.0.0.1:0"
role = "submission"
client_ca = {clients}
[[listener]]
address = "127.0.0.1:0"
role = "submission"
tls = "implicit"
client_ca = {clients}
"""
TABLES = """\
[tls]
certificate = "mx.pem"
key = "mx.key"
[[tls.also]]
certificate = "other.pem"
key = "other.key"
[auth]
users_file = "users"
"""
VERSIONS = {"-tls1_2": "TLSv1.2", "-tls1_3": "TLSv1.3"}
PORTS = {"starttls": 0, "implicit": 1}

ports = pytest.mark.parametrize("port", PORTS.values(), ids=PORTS)
versions = pytest.mark.parametrize("version", VERSIONS)


class Place(NamedTuple):
    server: Server
    folder: Path
    client: Files
    wrong: tuple[Files, ...]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    needs("openssl")
    folder = tmp_path_factory.mktemp("openssl")
    root = Authority(folder)
    between = Authority(folder, "Between", root)
    people = Authority(folder, "People")
    for file, name, kind in (("mx", "mx.here.test", "ec"), ("other", "other.test", "rsa")):
        leaf = between.issue(file, name, kind=kind, common_name=name)
        leaf.certificate.write_bytes(leaf.certificate.read_bytes() + between.ca.read_bytes())
    client = people.issue("ann", mail=USER)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    wrong = (
        Authority(folder, "Strangers").issue("eve", mail=USER),
        Authority(elsewhere, "People").issue("false", mail=USER),  # another authority by the same name
        people.issue("late", mail=USER, days=-0.5),
        people.issue("server", common_name=USER),  # for servers
    )
    listeners = LISTENERS.format(clients=json.dumps(str(people.ca)))
    configuration = toml(folder, workers=2, listeners=listeners, tables=TABLES)
    add(folder, configuration, USER)
    with running(folder, configuration) as server:
        yield Place(server, folder, client, wrong)
        assert server.stop() == 0
        server.check_bugs()


def connect(place: Place, port: int, *options: str, say: str = "", good: bool = True) -> str:
    """All that it prints; `say` are commands between EHLO and QUIT."""
    command = ["openssl", "s_client", "-connect", place.server.addresses()[port], "-CAfile", "test-ca.pem"]
    command += ["-verify_return_error", "-ign_eof", "-crlf", *(["-starttls", "smtp"] if port == 0 else []), *options]
    done = subprocess.run(
        command, cwd=place.folder, env={**os.environ, "PATH": SYSTEM_PATH}, input=f"EHLO c.test\n{say}QUIT\n",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) is good, done.stdout
    assert not good or re.search(r"^221 2\.0\.0 ", done.stdout, re.MULTILINE), done.stdout
    return done.stdout


@versions
@ports
def test_a_chain_that_is_believed(place: Place, port: int, version: str) -> None:
    said = connect(place, port, version, "-servername", "mx.here.test", "-verify_hostname", "mx.here.test")
    assert re.findall(r"^ \d s:.*?CN = (.*)$", said, re.MULTILINE) == ["mx.here.test", "Between"]
    assert "\nVerification: OK\nVerified peername: mx.here.test\n" in said
    assert f"\nNew, {VERSIONS[version]}, Cipher is " in said
    assert "Secure Renegotiation IS supported" in said or version == "-tls1_3"
    assert "\nCompression: NONE\n" in said
    assert re.search(r"^Server Temp Key: X25519, ", said, re.MULTILINE)
    assert re.search(r"^250-AUTH SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN\n", said, re.MULTILINE)


@versions
@ports
def test_names_choose_certificates(place: Place, port: int, version: str) -> None:
    for name, shown in (("other.test", "other.test"), ("OTHER.TEST", "other.test"), ("unknown.test", "mx.here.test")):
        said = connect(place, port, version, "-servername", name)
        assert re.search(rf"^subject=CN = {shown}$", said, re.MULTILINE), said
    said = connect(place, port, version, "-noservername")
    assert re.search(r"^subject=CN = mx.here.test$", said, re.MULTILINE)
    wrong = connect(place, port, version, "-servername", "other.test", "-verify_hostname", "mx.here.test", good=False)
    assert "hostname mismatch" in wrong.lower()


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
@ports
def test_old_versions_are_refused(place: Place, port: int, version: str) -> None:
    said = connect(place, port, version, "-cipher", "ALL:@SECLEVEL=0", good=False)
    assert "\nNew, (NONE), Cipher is (NONE)\n" in said
    assert "alert protocol version" in said


@versions
@ports
def test_sessions_are_resumed_by_any_worker(place: Place, port: int, version: str) -> None:
    ticket = place.folder / f"ticket{port}{version}"
    first = connect(place, port, version, "-servername", "mx.here.test", "-sess_out", str(ticket))
    assert f"\nNew, {VERSIONS[version]}, " in first
    files = ["-sess_in", str(ticket), "-sess_out", str(ticket)]
    for _ in range(6):  # the kernel spreads them over both workers
        again = connect(place, port, version, "-servername", "mx.here.test", *files)
        assert f"\nReused, {VERSIONS[version]}, " in again
        assert "\nVerification: OK\n" in again
    # A ticket of one listener is none of the other's.
    other = connect(place, 1 - port, version, "-servername", "mx.here.test", "-sess_in", str(ticket))
    assert f"\nNew, {VERSIONS[version]}, " in other


@versions
@ports
def test_a_certificate_logs_in(place: Place, port: int, version: str) -> None:
    options = [version, "-servername", "mx.here.test"]
    shown = ["-cert", str(place.client.certificate), "-key", str(place.client.key)]
    ticket = str(place.folder / f"known{port}{version}")
    for more in (["-sess_out", ticket], ["-sess_in", ticket]):  # a ticket says who it was given to
        said = connect(place, port, *options, *shown, *more, say=f"AUTH EXTERNAL =\nMAIL FROM:<{USER}>\n")
        assert re.search(r"^250-AUTH SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN EXTERNAL\n", said, re.MULTILINE)
        assert re.search(r"^235 2\.7\.0 .*\n250 ", said, re.MULTILINE), said
        assert ("\nReused, " in said) is ("-sess_in" in more)
    without = connect(place, port, *options, say=f"AUTH EXTERNAL =\nMAIL FROM:<{USER}>\n")
    assert re.search(r"^504 .*\n530 ", without, re.MULTILINE), without
    for wrong in place.wrong:  # not even believed to be nobody
        said = connect(place, port, *options, "-cert", str(wrong.certificate), "-key", str(wrong.key), good=False)
        assert not re.search(r"^250-AUTH", said, re.MULTILINE)
        assert re.search(
            r"alert (?:unknown ca|certificate expired|unsupported certificate|decrypt error|bad certificate)", said
        ), said


@ports
def test_nobody_renegotiates(place: Place, port: int) -> None:
    """`R` at the beginning of a line is s_client's command for it. TLS 1.3 has none."""
    command = ["openssl", "s_client", "-connect", place.server.addresses()[port], "-CAfile", "test-ca.pem", "-tls1_2"]
    done = subprocess.run(
        [*command, *(["-starttls", "smtp"] if port == 0 else [])], cwd=place.folder,
        env={**os.environ, "PATH": SYSTEM_PATH}, input="R\n", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "\nRENEGOTIATING\n" in done.stdout
    assert "no renegotiation" in done.stdout
