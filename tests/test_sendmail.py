"""`sendmail`, as those programs call it that have called it for forty years."""

from __future__ import annotations

import io
import os
import pwd
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import needs_root
from servers import ROOT, Mail, Server, mailbox, running, toml

from fastsmtp.sendmail import Order, RefusedError, parse_arguments, prepare, run

HOST = "mx.here.test"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ME = pwd.getpwuid(os.getuid()).pw_name
DOMAINS = """\
[[domain]]
name = "here.test"
recipients = ["ann", "bob", "cy"]
transport = "boxes"
[[domain]]
name = "mx.here.test"
recipients = "any"
transport = "boxes"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers; the recipients of here.test are known."""
    folder = tmp_path_factory.mktemp("sendmail")
    with running(folder, toml(folder, workers=2, domains=DOMAINS, tables='[limits]\nmessage_size = "1MB"')) as server:
        yield server


def call(
    server: Server, arguments: list[str], octets: bytes, program: list[str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """What a program of this machine does; the configuration stands where the variable says."""
    return subprocess.run(
        [*(program or [sys.executable, "-m", "fastsmtp", "sendmail"]), *arguments], input=octets, cwd="/",
        env={**ENVIRONMENT, "FASTSMTP_CONFIG": str(server.folder / "fastsmtp.toml")}, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip


def sent(server: Server, arguments: list[str], octets: bytes, *recipients: str) -> list[Mail]:
    """The messages that arrived, one for each recipient."""
    before = {recipient: len(box(server, recipient)) for recipient in recipients}
    done = call(server, arguments, octets)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")
    for recipient in recipients:
        server.wait(lambda: len(box(server, recipient)) > before[recipient], f"mail for {recipient}")  # noqa: B023
    return [max(box(server, recipient), key=lambda mail: mail.path.stat().st_mtime_ns) for recipient in recipients]


def box(server: Server, recipient: str) -> list[Mail]:
    local, _, domain = recipient.partition("@")
    return mailbox(server.mail, domain, local)


# As others call it


def test_cron(server: Server) -> None:
    """Debian's cron: local names, a From without a domain, no Date."""
    text = b"From: root (Cron Daemon)\nTo: ann\nSubject: Cron <ann@host> true\n\nout\n.\nput\n"
    (mail,) = sent(server, ["-i", "-FCronDaemon", "-B8BITMIME", "-oem", "ann"], text, f"ann@{HOST}")
    assert mail.sender == f"{ME}@{HOST}"
    assert b"(local, uid %d)" % os.getuid() in mail.received
    head, _, body = mail.body.partition(b"\n\n")
    assert body == b"out\n.\nput\n"
    assert [line.split(b":")[0] for line in head.split(b"\n")] == [b"Message-ID", b"Date", b"From", b"To", b"Subject"]
    assert head.count(b"\nFrom: root (Cron Daemon)") == 1


def test_php(server: Server) -> None:
    """mail() of PHP: -t -i, and the sender attached to its option."""
    text = b"To: ann@here.test, B <bob@here.test>\r\nSubject: x\r\nBcc: cy@here.test\r\nFrom: w@x.test\r\n\r\nhello\r\n"
    mails = sent(server, ["-t", "-i", "-fw@x.test"], text, "ann@here.test", "bob@here.test", "cy@here.test")
    for mail in mails:
        assert mail.sender == "w@x.test"
        assert b"bcc" not in mail.body.lower()
        assert b"cy@" not in mail.body
        assert mail.body.endswith(b"\n\nhello\n")
    assert len({mail.id for mail in mails}) == 1


def test_mutt(server: Server) -> None:
    text = (
        b"Date: Mon, 1 Jan 2024 00:00:00 +0000\nFrom: a@x.test\nMessage-ID: <1@x.test>\nSubject: caf\xc3\xa9\n\n\xe4\n"
    )
    (mail,) = sent(server, ["-oem", "-oi", "-f", "a@x.test", "--", "ann@here.test"], text, "ann@here.test")
    assert mail.body == text
    assert mail.sender == "a@x.test"


def test_monitoring(server: Server) -> None:
    """No header at all, and the null sender."""
    (mail,) = sent(server, ["-f", "<>", "-F", "The Monitor", "bob@here.test"], b"disk full\n", "bob@here.test")
    assert mail.sender == ""
    assert mail.body.endswith(b"\n\ndisk full\n")
    assert f"\nFrom: The Monitor <{ME}@{HOST}>\n".encode() in mail.body


def test_a_dot_ends_the_message_unless_it_was_said_otherwise(server: Server) -> None:
    (mail,) = sent(server, ["bob@here.test"], b"Subject: x\n\none\n..\n.dot\n.\ntwo\n", "bob@here.test")
    assert mail.body.endswith(b"\n\none\n..\n.dot\n")


def test_an_empty_message_is_one(server: Server) -> None:
    (mail,) = sent(server, ["bob@here.test"], b"", "bob@here.test")
    assert re.fullmatch(rb"Message-ID: .*\nDate: .*\nFrom: .*\n\n", mail.body)


def test_a_link_of_that_name_is_enough(server: Server, tmp_path: Path) -> None:
    """As a console script is called: by its path, which may be a link."""
    script = tmp_path / "fastsmtp"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom fastsmtp.cli import main\nsys.exit(main())\n")
    script.chmod(0o755)
    link = tmp_path / "sendmail"
    link.symlink_to(script)
    before = len(box(server, "bob@here.test"))
    done = call(server, ["-t", "-i"], b"To: bob@here.test\nSubject: by a link\n\nx\n", [str(link)])
    assert (done.returncode, done.stderr) == (0, b"")
    server.wait(lambda: len(box(server, "bob@here.test")) > before, "mail")
    done = call(server, ["--help"], b"", [str(link)])
    assert done.stdout.startswith(b"Usage: fastsmtp sendmail ")
    assert call(server, ["--version"], b"", [str(script)]).stdout.startswith(b"fastsmtp")


def test_smtp_on_standard_input(server: Server) -> None:
    before = len(box(server, "ann@here.test"))
    said = b"EHLO x\r\nMAIL FROM:<a@x.test>\r\nRCPT TO:<ann@here.test>\r\nDATA\r\nSubject: x\r\n\r\nx\r\n.\r\nQUIT\r\n"
    done = call(server, ["-bs"], said)
    assert done.returncode == 0
    codes = [line[:4] for line in done.stdout.split(b"\r\n") if line[3:4] == b" "]
    assert codes == [b"220 ", b"250 ", b"250 ", b"250 ", b"354 ", b"250 ", b"221 "]
    server.wait(lambda: len(box(server, "ann@here.test")) > before, "mail")
    assert call(server, ["-bs"], b"EHLO x\r\n").stdout.startswith(b"220 ")  # it goes without a word


def test_the_queue_is_shown(server: Server) -> None:
    done = call(server, ["-bp"], b"")
    assert (done.returncode, done.stdout) == (0, b"Nothing is queued.\n")


# What cannot be sent


@pytest.mark.parametrize(
    ("arguments", "octets", "code", "words"),
    [
        ([], b"x\n", os.EX_USAGE, "no recipient"),
        (["-t"], b"Subject: x\n\nTo: ann@here.test\n", os.EX_USAGE, "no recipient"),
        (["-t"], b"", os.EX_USAGE, "no recipient"),
        (["-q"], b"", os.EX_USAGE, "-q not recognized"),
        (["-bd"], b"", os.EX_USAGE, "-bd is not done here"),
        (["-N", "sometimes", "ann@here.test"], b"", os.EX_USAGE, "not known"),
        (["a..b@here.test"], b"x\n", os.EX_DATAERR, "is no address"),
        (["-f", "a b@c d", "ann@here.test"], b"x\n", os.EX_DATAERR, "is no address"),
        (["ann@here.test\r\nRCPT TO:<x@y.test>"], b"x\n", os.EX_DATAERR, "is no address"),
        (["-t"], b"To: " + b"(" * 5_000 + b"\n\nx\n", os.EX_DATAERR, "a comment that does not end"),
        (["ann@here.test", "zed@here.test"], b"x\n", os.EX_NOUSER, "<zed@here.test>: 550 "),
        (["ann@elsewhere.test"], b"x\n", os.EX_UNAVAILABLE, "<ann@elsewhere.test>: 550 "),
        (["ann@here.test"], b"x\n" * 600_000, os.EX_UNAVAILABLE, "larger than"),
        (["-C", "/nowhere/f.toml", "ann@here.test"], b"x\n", os.EX_TEMPFAIL, "cannot be read"),
    ],
)
def test_exit_codes(
    server: Server,
    arguments: list[str],
    octets: bytes,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = len(server.events("accepted"))
    monkeypatch.setenv("FASTSMTP_CONFIG", str(server.folder / "fastsmtp.toml"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(octets)))
    assert run(arguments) == code
    said = capsys.readouterr()
    assert words in said.err
    assert all(line.startswith("sendmail: ") for line in said.err.splitlines())
    assert said.out == ""
    assert len(server.events("accepted")) == before


def test_a_server_that_does_not_run_is_a_matter_of_time(tmp_path: Path) -> None:
    with running(tmp_path, toml(tmp_path)) as server:
        for way in ("stopped", "killed"):
            if way == "killed":
                server.start()
                server.kill()
                assert list((tmp_path / "data" / "submit").iterdir())
            else:
                server.stop()
            done = call(server, ["ann@here.test"], b"x\n")
            assert done.returncode == os.EX_TEMPFAIL
            assert b"cannot be reached" in done.stderr
            done = call(server, ["-bs"], b"QUIT\r\n")
            assert done.returncode == os.EX_TEMPFAIL
            assert done.stdout.startswith(b"421 4.3.2 ")


def test_the_data_directory_says_who_may_send() -> None:
    needs_root()
    program = [
        sys.executable,
        "-c",
        "import os, pwd, sys, fastsmtp.cli; nobody = pwd.getpwnam('nobody'); os.setgroups([])\n"
        "os.setresgid(*[nobody.pw_gid] * 3); os.setresuid(*[nobody.pw_uid] * 3)\n"
        "sys.exit(fastsmtp.cli.sendmail.run(sys.argv[1:]))",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with running(folder, toml(folder)) as server:
            (mail,) = sent_as(server, program)
            assert mail.sender == f"nobody@{HOST}"
            assert b"(local, uid %d)" % pwd.getpwnam("nobody").pw_uid in mail.received
            open_to_all = [path.name for path in (folder / "data").iterdir() if path.stat().st_mode & 0o077]
            assert open_to_all == ["submit"]
            (folder / "data").chmod(0o700)
            done = call(server, ["-i", "ann@here.test"], b"x\n", program)
            assert done.returncode == os.EX_TEMPFAIL
            assert b"Permission denied" in done.stderr


def test_arguments_that_are_not_utf8(server: Server) -> None:
    (mail,) = sent(server, ["-F", "J\udcf6rg", "ann@here.test"], b"Subject: odd\n\nx\n", "ann@here.test")
    assert b"From: =?utf-8?" in mail.body
    done = call(server, ["-V", "\udcff1", "ann@here.test"], b"x\n")
    assert done.returncode == os.EX_DATAERR
    assert done.stderr.startswith(b"sendmail: 501 ")


def test_more_recipients_than_others_may_have(server: Server) -> None:
    """In one message, for it goes to all of them or to nobody."""
    header = "To: " + ",\n ".join(f"crowd{number}" for number in range(1_200)) + "\n\nx\n"
    done = call(server, ["-t"], header.encode())
    assert (done.returncode, done.stderr) == (0, b"")
    crowd = server.mail / HOST
    server.wait(lambda: len(list(crowd.glob("crowd*/new/*"))) == 1_200, "mail for all of them")
    before = len(server.events("accepted"))
    done = call(server, [f"too-many{number}@here.test" for number in range(10_001)], b"x\n")
    assert done.returncode == os.EX_UNAVAILABLE
    assert b"more than 10000 recipients" in done.stderr
    assert len(server.events("accepted")) == before


def sent_as(server: Server, program: list[str]) -> list[Mail]:
    done = call(server, ["-i", "ann@here.test"], b"x\n", program)
    assert (done.returncode, done.stderr) == (0, b"")
    server.wait_mail(1)
    return box(server, "ann@here.test")


# Without a server


def prepared(text: bytes, *arguments: str) -> tuple[str, list[str], bytes]:
    mail = prepare(parse_arguments(arguments), text, HOST, "me")
    return mail.sender.wire, [address.wire for address in mail.recipients], mail.octets


@pytest.mark.parametrize(
    ("header", "arguments", "recipients"),
    [
        (b"To: a@x.test", [], ["a@x.test"]),
        (b"to : a@x.test", [], ["a@x.test"]),
        (b"To: a@x.test,\n b@x.test,\n\tc", [], ["a@x.test", "b@x.test", f"c@{HOST}"]),
        (b'To: "Last, First" <a@x.test>, b@x.test (who, else)', [], ["a@x.test", "b@x.test"]),
        (b"To: friends: a@x.test, b@x.test;\nCc: undisclosed-recipients:;", [], ["a@x.test", "b@x.test"]),
        (b"To: a@x.test\nCC: A@X.test\nBcc: b@x.test\nBcc: c@x.test", [], ["A@x.test", "b@x.test", "c@x.test"]),
        (b"To: a@x.test\nResent-To: b@x.test\nResent-Bcc: c@x.test", [], ["b@x.test", "c@x.test"]),
        (b"To: a@x.test", ["b@x.test, c@x.test"], ["b@x.test", "c@x.test", "a@x.test"]),
        ("To: Jürgen <jü@x.test>".encode(), [], ["jü@x.test"]),
        (b'To: "a b"@x.test', [], ['"a b"@x.test']),
    ],
)
def test_recipients_of_a_header(header: bytes, arguments: list[str], recipients: list[str]) -> None:
    _, found, octets = prepared(header + b"\n\nx\n", "-t", *arguments)
    assert found == recipients
    assert b"bcc" not in octets.lower()


def test_without_t_the_header_is_not_asked_and_bcc_still_goes() -> None:
    _, recipients, octets = prepared(b"To: a@x.test\nBcc: b@x.test\n\nx\n", "c@x.test")
    assert recipients == ["c@x.test"]
    assert b"To: a@x.test" in octets
    assert b"b@x.test" not in octets


@pytest.mark.parametrize(
    ("text", "names", "body"),
    [
        (b"", [], b""),
        (b"\r\n", [], b""),
        (b"A: 1\r\nb: 2\r\n 3\r\n\r\nx\r\n\r\ny", ["A", "b"], b"x\r\n\r\ny"),
        (b"From me Mon Jan 1\r\nA: 1\r\n\r\nx", ["A"], b"x"),
        (b"A: 1\r\nno field\r\n\r\nx", ["A"], b"no field\r\n\r\nx"),
        (b"hello\r\n", [], b"hello\r\n"),
        (b" indented\r\n", [], b" indented\r\n"),
        (b"A: 1", ["A"], b""),
    ],
)
def test_a_header_ends_where_it_does(text: bytes, names: list[str], body: bytes) -> None:
    _, _, octets = prepared(text, "c@x.test")
    header, _, rest = octets.partition(b"\r\n\r\n")
    added = [b"Message-ID", b"Date", b"From"]
    found = [line.partition(b":")[0] for line in header.split(b"\r\n") if line[:1] != b" "]
    assert found == [*added, *[name.encode() for name in names]]
    assert rest.removesuffix(b"\r\n") == body.removesuffix(b"\r\n")


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (b"\nx", b"x\r\n"),
        (b"\nx\r\ny\nz\r", b"x\r\ny\r\nz\r\r\n"),
        (b"\nx\n.\ny\n", b"x\r\n"),
        (b"\nx\r\n.\r\ny\n", b"x\r\n"),
        (b"\nx\n.", b"x\r\n"),
        (b".\nx", b""),
        (b"\nx\n. \n.y\n", b"x\r\n. \r\n.y\r\n"),
    ],
)
def test_lines_of_a_file_become_lines_of_a_message(text: bytes, body: bytes) -> None:
    _, _, octets = prepared(text, "a@x.test")
    assert octets.split(b"\r\n\r\n", 1)[1] == body
    _, _, octets = prepared(b"\nx\n.\ny\n", "-oi", "a@x.test")
    assert octets.endswith(b"\r\n\r\nx\r\n.\r\ny\r\n")


def test_senders() -> None:
    for given, wire in {
        "a@x.test": "a@x.test",
        "Ann <a@x.test>": "a@x.test",
        "ann": f"ann@{HOST}",
        "<>": "",
        "": "",
        " ": "",
    }.items():
        assert prepared(b"x", "-f", given, "b@x.test")[0] == wire
    assert prepared(b"x", "b@x.test")[0] == f"me@{HOST}"
    assert prepared(b"x", "-r", "a@x.test", "b@x.test")[0] == "a@x.test"


def test_a_name_in_any_script_is_encoded() -> None:
    _, _, octets = prepared(b"x", "-F", "Jürgen\nBcc: x@y.test", "a@x.test")
    assert octets.split(b"\r\n\r\n")[0].count(b"\r\n") == 2
    assert b"=?utf-8?" in octets


def test_arguments() -> None:
    order = parse_arguments(
        [
            "-t",
            "-oi",
            "-odb",
            "-oem",
            "-om",
            "-v",
            "-O",
            "X=y",
            "-N",
            "Success,delay",
            "-R",
            "hdrs",
            "-VId",
            "a@b",
            "-G",
        ]
    )
    assert order == Order(
        from_header=True, ignore_dots=True, notify="SUCCESS,DELAY", ret="HDRS", envid="Id", recipients=("a@b",)
    )
    assert parse_arguments(["-i", "--", "-x@y"]).recipients == ("-x@y",)
    for wrong in (["-Z"], ["-f"], ["-R", "some"], ["-N", "never,success"]):
        with pytest.raises(RefusedError) as refused:
            parse_arguments(wrong)
        assert refused.value.code == os.EX_USAGE
