"""Users of a real server with two workers: added by the command, logged in over TLS, sending where others may not."""

from __future__ import annotations

import json
import smtplib
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from servers import Server, mailbox, running, toml
from tls_users import Papers, papers, trusting
from users import ScramClient, b64, plain

__all__ = ["papers"]

LISTENERS = """
[[listener]]
address = "127.0.0.1:0"
role = "submission"
[[listener]]
address = "127.0.0.1:0"
role = "submission"
tls = "implicit"
[[listener]]
address = "127.0.0.1:0"
"""


NO_SCRAM = '[auth]\nusers_file = "users"\nmechanisms = ["LOGIN", "PLAIN", "EXTERNAL"]\n'


def tables(papers: Papers) -> str:
    certificate, key = papers.server
    return f"""
[tls]
certificate = {json.dumps(str(certificate))}
key = {json.dumps(str(key))}
[auth]
users_file = "users"
[relay]
transport = "boxes"
"""


def add(folder: Path, configuration: str, *users: str) -> None:
    (folder / "users.toml").write_text(configuration)
    for name in users:
        command = [sys.executable, "-m", "fastsmtp", "user", "add", name, "--config", str(folder / "users.toml")]
        subprocess.run([*command, "--sender", "@here.test"], input=b"secret\n", check=True, timeout=60)


def connect(server: Server, number: int) -> smtplib.SMTP:
    """To a listener, in TLS; greeted."""
    host, port = server.addresses()[number].rsplit(":", 1)
    if number == 1:
        smtp: smtplib.SMTP = smtplib.SMTP_SSL(host, int(port), timeout=30, context=trusting())
    else:
        smtp = smtplib.SMTP(host, int(port), timeout=30)
        smtp.starttls(context=trusting())
    smtp.ehlo("client.test")
    return smtp


def scram(smtp: smtplib.SMTP, mechanism: str, client: ScramClient) -> int:
    code, first = smtp.docmd("AUTH", f"{mechanism} {b64(client.first())}")
    if code != 334:
        return code
    code, final = smtp.docmd(b64(client.final(b64decode(first).decode())))
    if code != 334:
        return code
    assert b64decode(final)[:2] == b"v="
    return smtp.docmd("")[0]


def test_users(papers: Papers, tmp_path: Path) -> None:
    ours = x509.load_pem_x509_certificate(papers.server[0].read_bytes()).fingerprint(hashes.SHA256())
    domain = '[[domain]]\nname = "here.test"\nrecipients = "any"\ntransport = "boxes"\n'
    configuration = toml(tmp_path, workers=2, listeners=LISTENERS, domains=domain, tables=tables(papers))
    add(tmp_path, configuration, "ann", "bob@here.test")
    with running(tmp_path, configuration) as server:
        for number in (0, 1):
            with connect(server, number) as smtp:
                assert smtp.esmtp_features["auth"].split() == ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN"]
                assert smtp.mail("ann@here.test")[0] == 530
                smtp.login("Ann", "secret")
                smtp.sendmail("ann@here.test", ["bob@here.test", "u@else.test"], b"From: ann@here.test\r\n\r\nx\r\n")
            with connect(server, number) as smtp:
                plus = ScramClient("bob@here.test", "secret", "p=tls-server-end-point,,", ours)
                assert scram(smtp, "SCRAM-SHA-256-PLUS", plus) == 235
            with connect(server, number) as smtp:
                assert scram(smtp, "SCRAM-SHA-256", ScramClient("bob@here.test", "wrong")) == 535
                assert scram(smtp, "SCRAM-SHA-256", ScramClient("nobody", "secret")) == 535
                assert smtp.docmd("AUTH", f"PLAIN {plain('eve', 'secret')}")[0] == 421
        with connect(server, 2) as smtp:
            assert "auth" not in smtp.esmtp_features
            assert smtp.docmd("AUTH", f"PLAIN {plain('ann', 'secret')}")[0] == 502
            assert smtp.mail("a@b.test")[0] == 250
            assert smtp.rcpt("u@else.test")[0] == 550
        server.wait_mail(4)
        assert {line["user"] for line in server.events("accepted")} == {"ann"}
        server.wait(lambda: len(server.events("auth-failed")) == 6, "the log of both workers")
        assert sorted(line["user"] for line in server.events("auth-failed")) == [
            *["bob@here.test"] * 2,
            *["eve"] * 2,
            *["nobody"] * 2,
        ]
    assert [mail.protocol for mail in mailbox(tmp_path / "mail", "else.test", "u")] == ["ESMTPSA"] * 2


def test_who_could_bind_and_is_not_asked_to(papers: Papers, tmp_path: Path) -> None:
    """A "y" says that the client saw no PLUS: a downgrade where PLUS is offered, and nothing where it is left out."""
    for mechanisms, code in ((None, 535), (["SCRAM-SHA-256", "PLAIN"], 235)):
        with_them = "" if mechanisms is None else f"mechanisms = {json.dumps(mechanisms)}\n"
        text = tables(papers).replace("[relay]", f"{with_them}[relay]")
        folder = tmp_path / str(code)
        folder.mkdir()
        configuration = toml(folder, listeners=LISTENERS, tables=text)
        add(folder, configuration, "ann")
        with running(folder, configuration) as server, connect(server, 1) as smtp:
            offered = smtp.esmtp_features["auth"].split()
            assert mechanisms is None or offered == mechanisms
            assert ("SCRAM-SHA-256-PLUS" in offered) is (mechanisms is None)
            assert scram(smtp, "SCRAM-SHA-256", ScramClient("ann", "secret", "y,,")) == code


def test_a_certificate_instead_of_a_password(papers: Papers, tmp_path: Path) -> None:
    asked = f'client_ca = {json.dumps(str(papers.authority))}\nclient_certificate = "optional"\n'
    listeners = '[[listener]]\naddress = "127.0.0.1:0"\nrole = "submission"\ntls = "implicit"\n' + asked
    configuration = toml(tmp_path, listeners=listeners, tables=tables(papers))
    add(tmp_path, configuration, "bob@here.test")
    with running(tmp_path, configuration) as server:
        host, port = server.addresses()[0].rsplit(":", 1)
        for identity, code in ((papers.client, 235), (None, 504)):
            with smtplib.SMTP_SSL(host, int(port), timeout=30, context=trusting(identity)) as smtp:
                smtp.ehlo("client.test")
                assert ("EXTERNAL" in smtp.esmtp_features["auth"]) == (code == 235)
                assert smtp.docmd("AUTH EXTERNAL =")[0] == code
        server.wait_for("session", user="bob@here.test")


def test_in_clear_on_this_machine(tmp_path: Path) -> None:
    listeners = '[[listener]]\naddress = "127.0.0.1:0"\nrole = "submission"\nauth_clear = true\n'
    configuration = toml(tmp_path, listeners=listeners, tables=NO_SCRAM)
    add(tmp_path, configuration, "ann")
    with running(tmp_path, configuration) as server:
        host, port = server.addresses()[0].rsplit(":", 1)
        with smtplib.SMTP(host, int(port), timeout=30) as smtp:
            smtp.ehlo("client.test")
            assert smtp.esmtp_features["auth"].split() == ["PLAIN", "LOGIN"]
            smtp.login("ann", "secret")
            smtp.sendmail("ann@here.test", ["bob@here.test"], b"From: ann@here.test\r\n\r\nx\r\n")
        server.wait_mail(1)
