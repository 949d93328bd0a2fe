"""docs/access.md, tried as a new user would: its configuration serves, its commands are run, what they print is true.

Each section is a test, in the order of the document, with one server for all of them: PostgreSQL knows the mailboxes of
one domain, Dovecot those of another. What differs from the
document stands in `Site.replace`, and nowhere else.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from documents import Document, Section, commands, install, pattern
from dovecot import DOMAIN, Dovecot, dovecot
from needs import SYSTEM_PATH, needs, needs_root, public_folder
from postgresql import Postgresql, postgresql
from servers import ROOT, Server, mailbox

DOCUMENT = Document("access.md")


class Site:
    """The machine of the document."""

    def __init__(self, folder: Path, mailboxes: Dovecot, sql: Postgresql) -> None:
        self.folder = folder
        self.mailboxes = mailboxes
        self.sql = sql
        self.server = Server(folder, "")
        self.toml = ""
        install(folder)

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
            'user       = "fastsmtp"': "workers = 2",
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
        for command, expected in commands(console):
            if " serve " in command:
                continue
            done = subprocess.run(
                ["sh", "-c", self.replace(command)],
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


@DOCUMENT.tries("The server")
def test_the_server(site: Site, section: Section) -> None:
    site.add(section.take("toml"))
    (site.folder / "mailboxes").write_text(section.take(""))
    (site.folder / "aliases").write_text(section.take(""))
    password = site.folder / "sql.password"
    password.write_text("secret\n")
    password.chmod(0o600)
    site.run(section.take("console"))
    site.server.configuration = site.toml
    site.server.start()


@DOCUMENT.tries("Who gets mail")
def test_who_gets_mail(site: Site, section: Section) -> None:
    site.run(section.take("console"))
    site.server.wait_mail(2)
    site.server.wait(lambda: site.mailboxes.mails("ann"), "the message in Dovecot")
    assert [len(mailbox(site.server.mail, *box)) for box in (("file.example", "ann"), ("sql.example", "eve"))] == [1, 1]
    reasons = [line["reason"] for line in site.server.wait_for("refused", 4)]
    assert sorted(reasons) == ["relaying-denied", *["unknown-mailbox"] * 3]


@DOCUMENT.tries("Why was this refused?")
def test_why_was_this_refused(site: Site, section: Section) -> None:
    site.run(section.take("console"))


@DOCUMENT.tries("Rules")
def test_rules(site: Site, section: Section) -> None:
    site.add(section.take("toml"))
    (site.folder / "blocked").write_text(section.take(""))
    site.run(section.take("console"))
    assert site.server.wait_for("refused", reason="rule-forged")


@DOCUMENT.tries("Limits")
def test_limits(site: Site, section: Section) -> None:
    site.add(section.take("toml"))
    (site.folder / "exceptions").write_text(section.take(""))
    site.run(section.take("console"))
    told = f"fastsmtp check --config {site.folder}/fastsmtp.toml --as client="
    site.run(f"$ {told}192.0.2.9\nlimits    192.0.2.9 free of limits\n...\n")
    site.run(f"$ {told}203.0.113.9\nlimits    203.0.113.9 not asked: only a running server counts\n...\n")


@DOCUMENT.tries("How often")
def test_how_often(site: Site, section: Section) -> None:
    site.run(section.take("console"))


@DOCUMENT.tries("When something changes")
def test_when_something_changes(site: Site, section: Section) -> None:
    site.run(section.take("console"))
    command = [
        sys.executable, "-m", "fastsmtp", "check", "--config", f"{site.folder}/fastsmtp.toml", "--as",
        "client=203.0.113.9 from= to=carol@file.example",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "accepted (known-mailbox)" in done.stdout
    assert site.server.stop() == 0


def test_every_block_is_tried() -> None:
    DOCUMENT.check_all_tried()
