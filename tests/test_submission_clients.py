"""Real mail programs send through 465 and 587, each in its own way, and the message stands in a mailbox afterwards.

Those that cannot be run here are played: the order of commands that Thunderbird and Outlook are known for. All of them
know the test's authority only, so a certificate that is not the server's would be refused.
"""

from __future__ import annotations

import base64
import email.policy
import hashlib
import random
import re
import smtplib
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from email.message import EmailMessage

import pytest
from needs import lacks, needs
from servers import Mail, mailbox
from submission_site import MAIN, PASSWORD, Site, site

ANN, BOB = "ann@example.org", "bob@example.org"


@pytest.fixture(scope="module")
def place() -> Iterator[Site]:
    with site((ANN,), (BOB, "--sender", "@shop.example.org")) as found:
        yield found


def received(place: Site, subject: str) -> Mail:
    """Bob's message with that subject."""
    found: list[Mail] = []

    def look() -> bool:
        line = f"Subject: {subject}\n".encode()
        found[:] = [mail for mail in mailbox(place.server.mail, "example.org", "bob") if line in mail.body]
        return bool(found)

    place.server.wait(look, f"{subject} in the mailbox")
    (mail,) = found
    return mail


def check(place: Site, subject: str, sender: str = ANN) -> Mail:
    mail = received(place, subject)
    assert (mail.sender, mail.protocol) == (sender, "ESMTPSA")
    header = mail.body.partition(b"\n\n")[0]
    for name in (b"From", b"Date", b"Message-I[dD]"):
        assert len(re.findall(rb"^%b: " % name, header, re.MULTILINE)) == 1, header
    return mail


def run(place: Site, *command: str, text: str = "") -> None:
    done = subprocess.run(
        command, cwd=place.folder, env=place.environment, input=text.encode(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout.decode(errors="replace")


def letter(subject: str) -> str:
    return f"From: Ann <{ANN}>\nTo: {BOB}\nSubject: {subject}\n\nHi\n.\n"


# Programs

PORTS = [587, 465]


@pytest.mark.parametrize("port", PORTS)
def test_smtplib(place: Site, port: int) -> None:
    context = ssl.create_default_context(cafile=str(place.authority))
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = ANN, BOB, f"smtplib {port}"
    message["Bcc"] = "secret@example.org"
    message.set_content("Grüße")
    if port == 465:
        client: smtplib.SMTP = smtplib.SMTP_SSL(place.ip, port, context=context)
    else:
        client = smtplib.SMTP(place.ip, port)
        client.starttls(context=context)
    with client:
        client.login(ANN, PASSWORD)
        client.sendmail(ANN, [BOB], message.as_bytes(policy=email.policy.SMTP))
        with pytest.raises(smtplib.SMTPDataError, match="not an address that you may use"):
            client.sendmail(ANN, [BOB], f"From: {BOB}\r\n\r\nHi\r\n")
        with pytest.raises(smtplib.SMTPSenderRefused, match="not an address that you may use"):
            client.sendmail(BOB, [BOB], "Subject: x\r\n\r\nHi\r\n")
    assert b"secret" not in check(place, f"smtplib {port}").body


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
@pytest.mark.parametrize("port", PORTS)
def test_swaks(place: Site, port: int, mechanism: str) -> None:
    needs("swaks")
    if subprocess.run(["perl", "-MNet::SSLeay", "-e", "1"], capture_output=True, check=False).returncode:
        lacks("swaks needs Net::SSLeay for TLS: apt-get install libnet-ssleay-perl")
    subject = f"swaks {port} {mechanism}"
    tls = ["--tls-on-connect"] if port == 465 else ["--tls"]
    run(
        place, "swaks", "--server", place.ip, "--port", str(port), *tls, "--tls-verify",
        "--tls-ca-path", str(place.authority), "--auth", mechanism, "--auth-user", ANN, "--auth-password", PASSWORD,
        "--from", ANN, "--to", BOB, "--h-Subject", subject,
    )  # fmt: skip
    check(place, subject)


@pytest.mark.parametrize("port", PORTS)
def test_curl(place: Site, port: int) -> None:
    needs("curl")
    subject = f"curl {port}"
    url = f"smtps://{place.ip}:{port}" if port == 465 else f"smtp://{place.ip}:{port}"
    run(
        place, "curl", "-sS", "--ssl-reqd", "--crlf", "--mail-from", ANN, "--mail-rcpt", BOB, "--user",
        f"{ANN}:{PASSWORD}", "--upload-file", "-", url, text=letter(subject),
    )  # fmt: skip
    check(place, subject)


@pytest.mark.parametrize("mechanism", ["plain", "login", "scram-sha-256"])
@pytest.mark.parametrize("port", PORTS)
def test_msmtp(place: Site, port: int, mechanism: str) -> None:
    needs("msmtp")
    subject = f"msmtp {port} {mechanism}"
    run(
        place, "msmtp", f"--host={place.ip}", f"--port={port}", "--tls=on",
        f"--tls-starttls={'off' if port == 465 else 'on'}", f"--tls-trust-file={place.authority}",
        f"--auth={mechanism}", f"--user={ANN}", f"--passwordeval=echo {PASSWORD}", f"--from={ANN}", BOB,
        text=letter(subject),
    )  # fmt: skip
    check(place, subject)


@pytest.mark.parametrize("port", PORTS)
def test_mutt(place: Site, port: int) -> None:
    """With the mechanisms of its own choice it takes SCRAM-SHA-256-PLUS, with a binding that the server has not."""
    needs("mutt")
    subject = f"mutt {port}"
    scheme = "smtps" if port == 465 else "smtp"
    (place.folder / "muttrc").write_text(
        f'set smtp_url="{scheme}://{ANN.replace("@", "%40")}@{place.ip}:{port}/"\nset smtp_pass="{PASSWORD}"\n'
        f'set ssl_ca_certificates_file="{place.authority}"\nset ssl_force_tls=yes\nset ssl_starttls=yes\n'
        f'set from="{ANN}"\nset use_from=yes\nset use_envelope_from=yes\nset copy=no\nset hostname="desk.test"\n'
        f'set certificate_file="{place.folder}/known"\nset smtp_authenticators="scram-sha-256:plain"\n'
    )
    run(place, "mutt", "-n", "-F", "muttrc", "-s", subject, "--", BOB, text="Hi\n")
    check(place, subject)


@pytest.mark.parametrize("port", PORTS)
def test_s_nail(place: Site, port: int) -> None:
    """It knows no addresses in certificates, so it is shown what the server's looks like."""
    needs("s-nail")
    subject = f"s-nail {port}"
    user, password = ANN.replace("@", "%40"), PASSWORD.replace(" ", "%20")
    url = f"{'smtps' if port == 465 else 'smtp'}://{user}:{password}@{place.ip}:{port}"
    octets = ssl.PEM_cert_to_DER_cert(place.certificate.read_text().partition("-----END")[0] + ssl.PEM_FOOTER)
    fingerprint = hashlib.sha256(octets).digest().hex(":").upper()
    starttls = [] if port == 465 else ["-S", "smtp-use-starttls"]
    run(
        place, "s-nail", "-:/", "-S", "v15-compat", "-S", f"mta={url}", *starttls, "-S", "smtp-auth=plain", "-S",
        "tls-verify=strict", "-S", "tls-fingerprint-digest=SHA256", "-S", f"tls-fingerprint={fingerprint}", "-S",
        f"tls-ca-file={place.authority}", "-S", f"from={ANN}", "-S", "hostname=desk.test",
        "-r", ANN, "-s", subject, BOB, text="Hi\n",
    )  # fmt: skip
    check(place, subject)


# Programs that are played


class Played:
    """A client that says lines and notes replies."""

    def __init__(self, place: Site, port: int) -> None:
        self._context = ssl.create_default_context(cafile=str(place.authority))
        self._ip = place.ip
        self._socket: socket.socket = socket.create_connection((place.ip, port), 30)
        if port == 465:
            self.start_tls()
        else:
            self._file = self._socket.makefile("rb")
        self.replies: list[str] = [self.reply()]

    def start_tls(self) -> None:
        self._socket = self._context.wrap_socket(self._socket, server_hostname=self._ip)
        self._file = self._socket.makefile("rb")

    def reply(self) -> str:
        lines = []
        while True:
            line = self._file.readline().decode().rstrip("\r\n")
            lines.append(line)
            if line[3:4] != "-":
                return "\n".join(lines)

    def say(self, line: str) -> str:
        self._socket.sendall(f"{line}\r\n".encode())
        self.replies.append(self.reply())
        return self.replies[-1]

    def codes(self) -> list[str]:
        return [reply[:3] for reply in self.replies]

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def thunderbird(client: Played, port: int, message: str) -> None:
    """EHLO with an address literal, the parameters that were offered, a message with everything in its header."""
    offered = client.say("EHLO [192.168.1.23]")
    if port == 587:
        client.say("STARTTLS")
        client.start_tls()
        offered = client.say("EHLO [192.168.1.23]")
    assert re.search(r"^250-AUTH .*\bPLAIN\b", offered, re.MULTILINE)
    client.say(f"AUTH PLAIN {b64(f'{chr(0)}{ANN}{chr(0)}{PASSWORD}')}")
    client.say(f"MAIL FROM:<{ANN}> BODY=8BITMIME SIZE={len(message)}")
    client.say(f"RCPT TO:<{BOB}>")
    client.say("DATA")
    client.say(message.replace("\n", "\r\n") + ".")
    client.say("QUIT")


def outlook(client: Played, port: int, message: str) -> None:
    """EHLO with the machine's bare name, LOGIN in three steps, a RSET before the message, no parameters."""
    client.say("EHLO DESKTOP-7F3K2")
    if port == 587:
        client.say("STARTTLS")
        client.start_tls()
        client.say("EHLO DESKTOP-7F3K2")
    assert client.say("AUTH LOGIN") == f"334 {b64('Username:')}"
    assert client.say(b64(ANN)) == f"334 {b64('Password:')}"
    client.say(b64(PASSWORD))
    client.say("RSET")
    client.say(f"MAIL FROM: <{ANN}>")
    client.say(f"RCPT TO: <{BOB}>")
    client.say("DATA")
    client.say(message.replace("\n", "\r\n") + ".")
    client.say("QUIT")


THUNDERBIRD = """\
Message-ID: <2f1c@example.org>
Date: Sun, 22 Nov 2026 14:00:00 +0100
MIME-Version: 1.0
User-Agent: Mozilla Thunderbird
Content-Language: en-GB
To: bob@example.org
From: Ann <ann@example.org>
Subject: {subject}
Content-Type: text/plain; charset=UTF-8; format=flowed
Content-Transfer-Encoding: 8bit

Grüße
"""
OUTLOOK = """\
From: "Ann" <ann@example.org>
To: <bob@example.org>
Subject: {subject}
Date: Sun, 22 Nov 2026 14:00:00 +0100
Message-ID: <000001dc@example.org>
MIME-Version: 1.0
Content-Type: text/plain;
\tcharset="us-ascii"
Content-Transfer-Encoding: 7bit
X-Mailer: Microsoft Outlook 16.0
Thread-Index: AdxbAAAA

Hi
"""


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(("play", "text"), [(thunderbird, THUNDERBIRD), (outlook, OUTLOOK)])
def test_the_orders_of_programs(place: Site, play: Callable[[Played, int, str], None], text: str, port: int) -> None:
    subject = f"{play.__name__} {port}"
    message = text.format(subject=subject)
    client = Played(place, port)
    play(client, port, message)
    client.close()
    assert not [code for code in client.codes() if code >= "4"], client.replies
    assert client.codes()[-3:] == ["354", "250", "221"]
    assert received(place, subject).body == message.encode()


def test_a_program_that_changes_its_mind(place: Site) -> None:
    """A cancelled exchange, a wrong password, another mechanism: then it is in."""
    client = Played(place, 465)
    client.say("EHLO [192.168.1.23]")
    client.say("AUTH LOGIN")
    assert client.say("*").startswith("501 5.7.0 ")
    assert client.say(f"AUTH PLAIN {b64(f'{chr(0)}{ANN}{chr(0)}wrong')}").startswith("535 5.7.8 ")
    client.say("AUTH PLAIN")
    assert client.say(b64(f"\0{ANN}\0{PASSWORD}")).startswith("235 2.7.0 ")
    assert client.say("MAIL FROM:<>").startswith("250 ")
    client.say("QUIT")
    client.close()


def test_senders_that_change_in_the_midst_of_a_session(place: Site) -> None:
    """Given and taken by `user senders`, while the user is there: the next message knows."""

    def senders(*options: str) -> list[str]:
        said, code = place.shell(f"fastsmtp user senders {ANN} {' '.join(options)}")
        assert code == 0, said
        return said.split()

    def log_in() -> Played:
        client = Played(place, 465)
        client.say("EHLO c")
        assert client.say(f"AUTH PLAIN {b64(f'{chr(0)}{ANN}{chr(0)}{PASSWORD}')}").startswith("235 ")
        return client

    client = log_in()
    for options, known, code in (
        ([], [ANN], "553"),
        (["--add", "office@example.org"], [ANN, "office@example.org"], "250"),
        (["--sender", "@example.org"], [ANN, "@example.org"], "250"),
        (["--none"], [ANN], "553"),
    ):
        assert senders(*options) == known
        assert client.say("MAIL FROM:<office@example.org>")[:3] == code
        client.say("RSET")
    client.close()
    log_in().close()  # the password stays


def test_mail_that_must_not_travel_in_clear(place: Site) -> None:
    """REQUIRETLS of a user is taken where it can be kept; by MX with opportunistic TLS it cannot be."""
    client = Played(place, 465)
    client.say("EHLO c")
    client.say(f"AUTH PLAIN {b64(f'{chr(0)}{ANN}{chr(0)}{PASSWORD}')}")
    assert "REQUIRETLS" not in client.say("EHLO c")
    assert client.say(f"MAIL FROM:<{ANN}> REQUIRETLS").startswith("555 ")
    client.close()


# What leaves by the queue


def at_partner(place: Site, subject: str) -> bytes:
    """The message with that subject as another server got it."""
    found: list[bytes] = []

    def look() -> bool:
        line = f"\r\nSubject: {subject}\r\n".encode()
        found[:] = [octets for octets in (file.read_bytes() for file in place.partner.glob("*")) if line in octets]
        return bool(found)

    place.server.wait(look, f"{subject} at the partner's")
    (octets,) = found
    return octets


def send(place: Site, octets: bytes) -> None:
    with smtplib.SMTP_SSL(place.ip, 465, context=ssl.create_default_context(cafile=str(place.authority))) as client:
        client.login(ANN, PASSWORD)
        assert client.sendmail(ANN, [BOB, "eve@partner.example"], octets) == {}


ATTACHED = base64.encodebytes(random.Random(1).randbytes(300_000)).replace(b"\n", b"\r\n")
LETTER = (
    b"Bcc: secret@example.org\r\nSubject: %b\r\nMIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"
    b"--b\r\nContent-Type: text/html; charset=utf-8\r\n\r\n%b\r\n"
    b"--b\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\n%b--b--\r\n"
)
HTML = "<p>Grüße. ".encode() * 3000


def test_a_large_message_with_long_lines_leaves_as_it_came(place: Site) -> None:
    """By BDAT, from a file of the spool, but for its Bcc."""
    octets = LETTER % (b"as it came", HTML, ATTACHED)
    send(place, octets)
    sent = octets.partition(b"\r\n")[2]
    relayed, delivered = at_partner(place, "as it came"), received(place, "as it came")
    assert relayed.endswith(sent)
    assert delivered.body.endswith(sent.replace(b"\r\n", b"\n"))
    for header in (relayed, delivered.path.read_bytes()):
        assert re.search(rb"\r?\nFrom: ann@example.org\r?\nDate: [^\n]*\nMessage-ID: <[^\n]*>\r?\nSubject: ", header)
        assert b"secret" not in header


def test_long_lines_are_rewritten_where_that_is_wanted(place: Site) -> None:
    """The last test here: the server has another configuration then."""
    place.serve(MAIN.replace("[submission]\n", "[submission]\nrewrite = true\nhide_client = true\n"))
    octets = LETTER % (b"rewritten", HTML, ATTACHED)
    send(place, octets)
    relayed = at_partner(place, "rewritten")
    assert max(map(len, relayed.split(b"\r\n"))) < 998
    assert ATTACHED in relayed
    _, text, image = email.message_from_bytes(relayed).walk()
    assert text.get_payload(decode=True) == HTML
    assert image.get_payload(decode=True) == base64.b64decode(ATTACHED)
    assert b"secret" not in relayed
    assert relayed.startswith(b"Received: from localhost (hidden)\r\n\t(TLS")
    assert b"127." not in relayed.partition(b"\r\n\r\n")[0]
