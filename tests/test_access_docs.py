"""docs/access.md, tried as a new user would: its configuration serves, its commands are run, what they print is true.

Each section is a test, in the order of the document, with one server for all of them: PostgreSQL knows the mailboxes of
one domain, Dovecot those of another. What stands in blocks is run as in test_delivery_docs.py; what differs from the
document stands in `Site.replace`, and nowhere else.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from dovecot import DOMAIN, Dovecot, dovecot
from needs import SYSTEM_PATH, needs, needs_root, public_folder
from postgresql import Postgresql, postgresql
from servers import ROOT, Server, mailbox
from test_delivery_docs import BLOCK, Block, pattern

TEXT = (ROOT / "docs/access.md").read_text()
TESTS: set[str] = set()


def sections() -> dict[str, list[Block]]:
    parts = re.split(r"^##+ (.*)$", TEXT, flags=re.MULTILINE)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {title: [Block(*match.groups()) for match in BLOCK.finditer(text)] for title, text in found}


class Site:
    """The machine of the document."""

    def __init__(self, folder: Path, mailboxes: Dovecot, sql: Postgresql) -> None:
        self.folder = folder
        self.mailboxes = mailboxes
        self.sql = sql
        self.server = Server(folder, "")
        self.toml = ""
        (folder / "bin").mkdir()
        program = folder / "bin" / "fastsmtp"
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from fastsmtp.cli import main\nmain()\n"
        )
        program.chmod(0o755)

    def replace(self, text: str) -> str:
        """What stands in the document, for this machine."""
        host, _, port = self.server.address.rpartition(":") if self.server.lines() else ("", "", "")
        replaced = {  # one after the other
            "--server mx1.example.org": f"--server {host} --port {port}",
            "mx1.example.org": "mx1.docs.test",
            "https://example.org/blocked": "https://docs.test/blocked",
            "@example.org": f"@{DOMAIN}",
            '"example.org"': f'"{DOMAIN}"',
            "domain     example.org": f"domain     {DOMAIN}",
            "/etc/fastsmtp/": f"{self.folder}/",
            f"{self.folder}/fastsmtp.toml: changed": "fastsmtp.toml: changed",  # as it was started
            "/var/lib/fastsmtp": f"{self.folder}/data",
            "-o fastsmtp /srv/mail": f"{self.folder}/mail",
            "/srv/mail/": f"{self.folder}/mail/",
            "/run/dovecot/lmtp": str(self.mailboxes.socket),
            "postgresql://mail@db.example:5432/mail": self.sql.url.replace(":secret", ""),
            "FROM mailbox": "FROM access_docs.mailbox",
            'user     = "fastsmtp"': "workers = 2",
            '"0.0.0.0:25"': '"127.0.0.1:0"',
        }
        for old, new in replaced.items():
            text = text.replace(old, new)
        return text

    def add(self, toml: str) -> None:
        """Writes more tables into the file that is served from."""
        self.toml += self.replace(toml)
        (self.folder / "fastsmtp.toml").write_text(self.toml)

    def run(self, console: str) -> None:
        """Runs commands, each of which must print what stands below it."""
        for part in re.split(r"^(?=[$#] )", console, flags=re.MULTILINE)[1:]:
            command, _, expected = part.partition("\n")
            if " serve " in command:
                continue
            done = subprocess.run(
                ["sh", "-c", self.replace(command[2:])],
                cwd=self.folder, env={"PATH": f"{self.folder}/bin:{SYSTEM_PATH}"}, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert re.fullmatch(pattern(self.replace(expected)), done.stdout), f"{command}\n{done.stdout}"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    needs_root()
    needs("swaks", "dovecot")
    sql = postgresql()
    sql.run(
        "DROP SCHEMA IF EXISTS access_docs CASCADE; CREATE SCHEMA access_docs;"
        "CREATE TABLE access_docs.mailbox (local text, domain text);"
        "INSERT INTO access_docs.mailbox VALUES ('eve', 'sql.example')"
    )
    with ExitStack() as stack:
        folder = stack.enter_context(public_folder("access"))
        mailboxes = stack.enter_context(dovecot({"ann": ""}))
        (folder / "mail").mkdir(mode=0o777)
        (folder / "mail").chmod(0o777)
        site = Site(folder, mailboxes, sql)
        stack.callback(site.server.kill)
        yield site
        site.server.check_bugs()


def tries(title: str) -> Callable[[Callable[[Site, list[Block]], None]], Callable[[Site], None]]:
    """The test of a section: it must take all its blocks."""

    def decorate(test: Callable[[Site, list[Block]], None]) -> Callable[[Site], None]:
        def run(site: Site) -> None:
            blocks = sections()[title]
            test(site, blocks)
            assert blocks == [], "not tried"

        TESTS.add(title)
        return run

    return decorate


@tries("The server")
def test_the_server(site: Site, blocks: list[Block]) -> None:
    site.add(blocks.pop(0).text)
    (site.folder / "mailboxes").write_text(blocks.pop(0).text)
    (site.folder / "aliases").write_text(blocks.pop(0).text)
    password = site.folder / "sql.password"
    password.write_text("secret\n")
    password.chmod(0o600)
    site.run(blocks.pop(0).text)
    site.server.configuration = site.toml
    site.server.start()


@tries("Who gets mail")
def test_who_gets_mail(site: Site, blocks: list[Block]) -> None:
    site.run(blocks.pop(0).text)
    site.server.wait_mail(2)
    site.server.wait(lambda: site.mailboxes.mails("ann"), "the message in Dovecot")
    assert [len(mailbox(site.server.mail, *box)) for box in (("file.example", "ann"), ("sql.example", "eve"))] == [1, 1]
    reasons = [line["reason"] for line in site.server.wait_for("refused", 4)]
    assert sorted(reasons) == ["relaying-denied", *["unknown-mailbox"] * 3]


@tries("Why was this refused?")
def test_why_was_this_refused(site: Site, blocks: list[Block]) -> None:
    site.run(blocks.pop(0).text)


@tries("Rules")
def test_rules(site: Site, blocks: list[Block]) -> None:
    (site.folder / "blocked").write_text(blocks.pop(1).text)
    site.add(blocks.pop(0).text)
    site.run(blocks.pop(0).text)
    assert site.server.wait_for("refused", reason="rule-forged")


@tries("Limits")
def test_limits(site: Site, blocks: list[Block]) -> None:
    site.add(blocks.pop(0).text)
    site.run(blocks.pop(0).text)


@tries("When something changes")
def test_when_something_changes(site: Site, blocks: list[Block]) -> None:
    site.run(blocks.pop(0).text)
    command = [
        sys.executable, "-m", "fastsmtp", "check", "--config", f"{site.folder}/fastsmtp.toml", "--as",
        "client=203.0.113.9 from= to=carol@file.example",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "accepted (known-mailbox)" in done.stdout
    assert site.server.stop() == 0


def test_every_section_with_a_block_is_tried() -> None:
    assert {title for title, blocks in sections().items() if blocks} == TESTS
