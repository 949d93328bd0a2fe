"""dovecot.py and postfix.py: that the real servers do what tests rely on, and that nothing is left of them."""

from __future__ import annotations

import base64
import itertools
import os
import smtplib
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dovecot
import postfix
import pytest
from needs import needs

MESSAGE = b"Subject: x\r\n\r\nhello\r\n"


def check_nothing_left(server: dovecot.Dovecot | postfix.Postfix) -> None:
    """Neither its folder nor a process of its session."""
    assert not server.folder.exists()
    left = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                state, _, _, session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == server.pid and state != "Z":
                    left.append(Path(f"/proc/{entry}/cmdline").read_bytes())
            except OSError:
                continue  # ended meanwhile
    assert left == []


@contextmanager
def client(address: str | Path, lmtp: bool = False) -> Iterator[smtplib.SMTP]:
    with (smtplib.LMTP if lmtp else smtplib.SMTP)() as session:
        host, _, port = str(address).rpartition(":")
        session.connect(host or str(address), int(port) if host else 0)
        yield session


@pytest.mark.parametrize("tempfail", [False, True])
def test_dovecot_refuses_a_full_mailbox_after_the_message(tempfail: bool) -> None:
    with dovecot.dovecot({"bob": "", "full": "10"}, tempfail=tempfail) as server:
        for address in (server.socket, server.address):
            with client(address, lmtp=True) as session:
                session.ehlo()  # LHLO
                session.mail("ann@example.org")
                codes = [session.rcpt(f"{local}@{dovecot.DOMAIN}")[0] for local in ("bob", "full", "unknown")]
                assert codes == [250, 250, 550]
                assert session.data(MESSAGE)[0] == 250  # bob's
                code, text = session.getreply()
                assert (code, text[:5]) == ((452, b"4.2.2") if tempfail else (552, b"5.2.2"))
        assert len(server.mails("bob")) == 2
        assert server.mails("bob")[0].endswith(b"\nSubject: x\n\nhello\n")
        assert server.mails("full") == []
        assert "the mailbox is full" in server.log()
    check_nothing_left(server)


def test_postfix_answers_single_recipients() -> None:
    answers = {"late": ["450 4.2.0 later"], "bad": itertools.repeat("550 5.1.1 nobody")}
    with postfix.postfix(answers=answers, size=5000) as server, client(server.address) as session:
        recipients = [f"{local}@{postfix.DOMAIN}" for local in ("bob", "late", "bad")]
        for refused in ({450, 550}, {550}):
            errors = session.sendmail("ann@example.org", recipients, MESSAGE)
            assert {code for code, _ in errors.values()} == refused
        assert server.wait_mails("bob", 2)[0].endswith(b"\nSubject: x\n\nhello\n")
        assert len(server.wait_mails("late", 1)) == 1
        assert server.mails("bad") == []
        assert server.asked == ["bob", "late", "bad"] * 2
        with pytest.raises(smtplib.SMTPSenderRefused) as refusal:
            session.sendmail("ann@example.org", recipients, MESSAGE + b"x" * 5000)
        assert refusal.value.smtp_code == 552
        assert session.docmd("MAIL FROM:<ann@example.org>")[0] == 250
        assert session.docmd("RCPT TO:<bob@elsewhere.test>")[0] == 554
    check_nothing_left(server)


def test_postfix_with_tls_and_passwords(tmp_path: Path) -> None:
    needs("openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=next.test", "-addext", "subjectAltName=DNS:next.test", "-keyout", "key.pem", "-out", "cert.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    with (
        dovecot.dovecot({}, passwords={"me": "secret"}) as passwords,
        postfix.postfix(
            certificate=(tmp_path / "cert.pem", tmp_path / "key.pem"), tls="encrypt", auth=passwords.auth
        ) as server,
        client(server.address) as session,
    ):
        session.ehlo()
        assert session.has_extn("STARTTLS")
        assert not session.has_extn("AUTH")
        assert session.docmd("MAIL FROM:<ann@example.org>")[0] == 530
        session._host = "next.test"  # type: ignore[attr-defined]  # the name that is verified
        session.starttls(context=context)
        session.ehlo()
        assert set(session.esmtp_features["auth"].split()) == {"PLAIN", "LOGIN", "SCRAM-SHA-256"}
        assert session.mail("ann@example.org")[0] == 250
        assert session.rcpt(f"bob@{postfix.DOMAIN}")[0] == 554
        session.rset()
        wrong = base64.b64encode(b"\0me\0wrong").decode()
        assert session.docmd(f"AUTH PLAIN {wrong}")[0] == 535
        session.login("me", "secret")
        session.sendmail("ann@example.org", [f"bob@{postfix.DOMAIN}"], MESSAGE)
        assert len(server.wait_mails("bob", 1)) == 1
    check_nothing_left(server)
    check_nothing_left(passwords)
