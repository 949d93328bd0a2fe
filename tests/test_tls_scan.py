"""What a scanner finds: testssl.sh against a server with two certificates of an authority that it believes.

It must have looked (what it says of versions is in its answer), and nothing that it found is worse than "low". The
whole scan takes minutes and runs with --long; always looked at are the versions that are spoken after STARTTLS.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest
from certs import Authority
from needs import SYSTEM_PATH, needs
from servers import Server, running, toml

# INFO and DEBUG say what is so. WARN says that a check could not be made, with the words "check failed".
HARMLESS = {"OK", "INFO", "LOW", "DEBUG", "WARN"}
LISTENERS = """\
[[listener]]
address = "127.0.0.1:0"
role = "submission"
[[listener]]
address = "127.0.0.1:0"
role = "submission"
tls = "implicit"
"""
TLS = """\
[tls]
certificate = "mx.pem"
key = "mx.key"
[[tls.also]]
certificate = "rsa.pem"
key = "rsa.key"
"""


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    needs("testssl")
    folder = tmp_path_factory.mktemp("scan")
    authority = Authority(folder)
    for file, kind in (("mx", "ec"), ("rsa", "rsa")):
        # A scanner finds fault with a certificate that cannot be revoked.
        name, crl = "mx.here.test", "http://127.0.0.1:1/crl"
        authority.issue(file, name, kind=kind, common_name=name, crl=crl)
    with running(folder, toml(folder, workers=2, listeners=LISTENERS, tables=TLS)) as server:
        yield server


def scan(server: Server, listener: int, *options: str) -> dict[str, dict[str, str]]:
    """What was found, by its id."""
    port = server.addresses()[listener].rpartition(":")[2]
    answer = server.folder / f"scan-{listener}-{len(options)}.json"
    starttls = ["--starttls", "smtp"] if listener == 0 else []
    command = [
        "testssl", "--warnings", "batch", "--color", "0", "--quiet", "--nodns", "min", "--ip", "127.0.0.1",
        "--add-ca", "test-ca.pem", "--jsonfile", str(answer), *starttls, *options, f"mx.here.test:{port}",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=server.folder, env={**os.environ, "PATH": SYSTEM_PATH}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert answer.exists(), done.stdout + done.stderr
    return {one["id"]: one for one in json.loads(answer.read_text())}


def check(found: dict[str, dict[str, str]]) -> None:
    bad = [one for one in found.values() if one["severity"] not in HARMLESS]
    assert bad == []
    assert {name: found[name]["finding"].split()[0] for name in ("SSLv2", "SSLv3", "TLS1", "TLS1_1")} == {
        "SSLv2": "not", "SSLv3": "not", "TLS1": "not", "TLS1_1": "not",
    }  # fmt: skip
    assert all(found[name]["finding"].startswith("offered") for name in ("TLS1_2", "TLS1_3"))


def test_versions_are_those_of_today(scanned: Server) -> None:
    check(scan(scanned, 0, "-p"))


@pytest.mark.parametrize("listener", [0, 1], ids=["starttls", "implicit"])
@pytest.mark.usefixtures("long")
def test_the_whole_scan(scanned: Server, listener: int) -> None:
    found = scan(scanned, listener)
    check(found)
    trusted = [one["finding"] for name, one in found.items() if name.startswith("cert_chain_of_trust")]
    assert trusted == ["passed.", "passed."]
    assert {"heartbleed", "ROBOT", "secure_renego", "CRIME_TLS", "POODLE_SSL", "LUCKY13", "RC4"} <= set(found)
    scanned.check_bugs()


def test_what_is_bad_would_be_found() -> None:
    harmless = {name: {"severity": "OK", "finding": "not offered"} for name in ("SSLv2", "SSLv3", "TLS1", "TLS1_1")}
    harmless |= {name: {"severity": "OK", "finding": "offered (OK)"} for name in ("TLS1_2", "TLS1_3")}
    check(harmless)
    with pytest.raises(AssertionError):
        check(harmless | {"LUCKY13": {"severity": "MEDIUM", "finding": "potentially vulnerable"}})
    with pytest.raises(AssertionError):
        check(harmless | {"TLS1_1": {"severity": "LOW", "finding": "offered (deprecated)"}})
