"""The command line: exit codes, what is printed where, and what `check` asks of the machine."""

from __future__ import annotations

import datetime
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from needs import default_port, lacks, needs_root

from fastsmtp.cli import _senders, main, render_reference

ROOT = Path(__file__).parent.parent
GOOD = """\
hostname = "mx.example.org"
postmaster = "ann@example.org"
data_dir = "data"

[[listener]]
address = "127.0.0.1:0"

[[domain]]
name = "example.org"
recipients = ["ann"]
transport = "mailboxes"

[transport.mailboxes]
type = "maildir"
path = "mail/{domain}/{local}"
"""
RELAY = '[relay]\ntransport = "internet"\n[transport.internet]\ntype = "smtp"\n'
TLS = '[tls]\ncertificate = "c.pem"\nkey = "k.pem"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "f.toml"
    path.write_text(GOOD)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def python(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsmtp", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["serve", "check", "reload", "counters", "queue list", "user list"])
def test_the_configuration_is_named_once_for_all_commands(
    file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    file.write_text("hostname = 1")
    monkeypatch.setenv("FASTSMTP_CONFIG", str(file))
    result = run(*command.split())
    assert (result.exit_code, f"{file}:1: hostname" in result.output) == (1, True)


def test_check_of_a_good_file(file: Path) -> None:
    file.write_text(GOOD + RELAY)
    result = run("check", "--config", file)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.startswith(f"{file}: no errors\n")
    for line in (
        "listener   127.0.0.1:0  role mx, tls off",
        "domain     example.org  1 recipients, by mailboxes",
        f"transport  mailboxes  maildir {file.parent}/mail/{{domain}}/{{local}}",
        "note: `fastsmtp reload` applies changes; data_dir, workers, user, [spool], [log], [[listener]] mode, "
        "limits.memory need a restart",
    ):
        assert line in result.stdout.splitlines()
    assert "warning" not in result.stdout
    assert list(file.parent.iterdir()) == [file], "check makes nothing"


def test_check_warns(file: Path) -> None:
    file.write_text(GOOD.replace('postmaster = "ann@example.org"', ""))
    result = run("check", "--config", file)
    assert result.exit_code == 0
    assert "warning: postmaster is not set" in result.stdout
    assert (
        f"\nsendmail   for root and the user of the server: {file.parent} is closed to others (chmod o+x)\n"
        in result.stdout
    )
    assert "\nrelay      nothing; a report to a sender whom no route reaches is only logged\n" in result.stdout


def test_who_reaches_the_sockets_for_mail(tmp_path: Path) -> None:
    assert _senders(Path("/no-such-folder/data")) == "all users of this machine"
    tmp_path.chmod(0o700)
    assert _senders(tmp_path / "data").endswith(f": {tmp_path} is closed to others (chmod o+x)")


def test_check_of_a_wrong_file(file: Path) -> None:
    file.write_text(GOOD + "\n[limits]\nrecipients = 5\nx = 1\n")
    result = run("check", "--config", file)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"{file}:18: limits.recipients: expected at least 100, found 5",
        f"{file}:19: limits.x: unknown key; known here: message_size, recipients, command_line, auth_line, text_line, "
        "header, received, errors, useless, sessions, memory",
    ]


def test_check_in_json(file: Path) -> None:
    file.write_text(GOOD + RELAY)
    result = run("check", "--json", "--config", file)
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"ok": True, "errors": [], "warnings": []}
    file.write_text(GOOD + "\n[limit]\n")
    result = run("check", "--json", "--config", file)
    assert result.exit_code == 1
    assert result.stderr == ""
    error = {"file": str(file), "line": 17, "path": "limit", "message": 'unknown key; did you mean "limits"?'}
    assert json.loads(result.stdout) == {"ok": False, "errors": [error], "warnings": []}


def test_wrong_arguments() -> None:
    for arguments in (["check"], ["check", "--what"], ["serve", "x"], ["what"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("fastsmtp, version ")


def test_the_reference_in_docs_is_what_the_program_says() -> None:
    result = run("check", "--describe")
    assert result.exit_code == 0
    assert result.stdout == render_reference()
    docs = ROOT / "docs" / "configuration.md"
    assert docs.read_text() == result.stdout, "python -m fastsmtp check --describe > docs/configuration.md"


def test_the_reference_is_markdown_with_whole_rows() -> None:
    for line in render_reference().splitlines():
        if line.startswith("|"):
            assert line.count("|") == 5, line


# check, on this machine


def wrong(file: Path, text: str) -> list[str]:
    file.write_text(text)
    result = run("check", "--config", file)
    assert isinstance(result.exception, SystemExit | None)
    assert result.exit_code == (1 if result.stderr else 0)
    return result.stderr.replace(str(file.parent) + "/", "").splitlines()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate, its key, the key under a passphrase, and a key that belongs to nothing."""
    folder = tmp_path_factory.mktemp("keys")
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mx.example.org")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    plain, secret = serialization.NoEncryption(), serialization.BestAvailableEncryption(b"x")
    (folder / "c.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "k.pem").write_bytes(key.private_bytes(pem, pkcs8, plain))
    (folder / "encrypted.pem").write_bytes(key.private_bytes(pem, pkcs8, secret))
    (folder / "other.pem").write_bytes(other.private_bytes(pem, pkcs8, plain))
    (folder / "both.pem").write_bytes((folder / "k.pem").read_bytes() + (folder / "c.pem").read_bytes())
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    return folder


def test_certificates_that_fit(file: Path, keys: Path) -> None:
    assert wrong(file, GOOD + f'[tls]\ncertificate = "{keys}/c.pem"\nkey = "{keys}/k.pem"') == []
    assert wrong(file, GOOD + f'[tls]\ncertificate = "{keys}/both.pem"') == []


@pytest.mark.parametrize(
    ("certificate", "key", "expected"),
    [
        ("none.pem", "k.pem", "f.toml:17: tls.certificate: {}/none.pem cannot be read: No such file or directory"),
        ("c.pem", "none.pem", "f.toml:18: tls.key: {}/none.pem cannot be read: No such file or directory"),
        ("c.pem", ".", "f.toml:18: tls.key: {} cannot be read: Is a directory"),
        ("k.pem", "k.pem", "f.toml:17: tls.certificate: there is no PEM certificate in {}/k.pem"),
        ("c.pem", "c.pem", "f.toml:18: tls.key: there is no PEM key in {}/c.pem"),
        ("c.pem", "other.pem", "f.toml:18: tls.key: the key in {0}/other.pem does not belong to the certificate in "
                               "{0}/c.pem"),
        ("c.pem", "encrypted.pem", "f.toml:16: tls: {0}/c.pem and {0}/encrypted.pem cannot be used: the key is encr"),
        ("broken.pem", "k.pem", "f.toml:17: tls.certificate: there is no PEM certificate in {0}/broken.pem"),
    ],
)  # fmt: skip
def test_certificates_that_do_not(file: Path, keys: Path, certificate: str, key: str, expected: str) -> None:
    (found,) = wrong(file, GOOD + f'[tls]\ncertificate = "{keys}/{certificate}"\nkey = "{keys}/{key}"')
    assert found.startswith(expected.format(keys))


def test_all_that_is_wrong_with_the_machine_comes_at_once(file: Path) -> None:
    (file.parent / "data").write_text("a file")
    text = GOOD.replace("mail/{domain}", "data/mail/{domain}") + TLS + '[[listener]]\naddress = "unix:run/s"\n'
    assert wrong(file, 'user = "nobody-has-this-name"\n' + text) == [
        "f.toml:1: user: there is no user nobody-has-this-name on this machine",
        "f.toml:4: data_dir: data is no folder",
        "f.toml:16: transport.mailboxes.path: data is no folder",
        "f.toml:18: tls.certificate: c.pem cannot be read: No such file or directory",
        "f.toml:19: tls.key: k.pem cannot be read: No such file or directory",
        "f.toml:21: listener[1].address: run is no folder",
    ]


def test_what_transports_need_of_the_machine(file: Path) -> None:
    (file.parent / "empty").write_text("\n")
    (file.parent / "good").write_text("secret\n")
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    smtp = '[transport.{}]\ntype = "smtp"\nsmarthost = "h.test:587"\nuser = "me"\npassword_file = "{}"\n'
    assert wrong(file, GOOD + smtp.format("a", "none") + smtp.format("b", "empty") + smtp.format("c", "good")) == [
        "f.toml:20: transport.a.password_file: none cannot be read: No such file or directory",
        "f.toml:25: transport.b.password_file: empty is empty",
    ]
    text = '[transport.x]\ntype = "smtp"\nca_file = "good"\nsource = ["192.0.2.1", "::1"]\n'
    found = wrong(file, GOOD + text)
    assert [line.partition(": ")[0] for line in found] == ["f.toml:18", "f.toml:19"]
    assert "good holds no certificate that can be read" in found[0]
    assert found[1].endswith("transport.x.source: 192.0.2.1 is no address of this machine")
    pipe = '[transport.x]\ntype = "pipe"\ncommand = {}\nuser = "{}"\n'
    assert wrong(file, GOOD + pipe.format('["/bin/sh", "{local}"]', user)) == []
    assert wrong(file, GOOD + pipe.format('["sh"]', "nobody-has-this-name")) == [
        "f.toml:18: transport.x.command: it begins with the absolute path of a program",
        "f.toml:19: transport.x.user: there is no user nobody-has-this-name on this machine",
    ]
    assert wrong(file, GOOD + pipe.format('["/bin/none"]', user)) == [
        "f.toml:18: transport.x.command: there is no /bin/none"
    ]
    if os.geteuid() == 0:
        (found_one,) = wrong(file, GOOD + pipe.format('["/bin/sh"]', "root"))
        assert found_one.startswith("f.toml:19: transport.x.user: 'root' could read the spool")


def test_what_users_need_of_the_machine(file: Path) -> None:
    auth = '[auth]\nusers_file = "users"\n'
    assert wrong(file, GOOD + auth) == ["f.toml:17: auth.users_file: there is no users; `fastsmtp user add` makes it"]
    (file.parent / "users").write_text("# fastsmtp users 1\nann:secret::\n")
    (file.parent / "users").chmod(0o600)
    assert wrong(file, GOOD + auth) == ["f.toml:17: auth.users_file: users: user ann: no SCRAM keys"]
    assert wrong(file, GOOD + '[auth.dovecot]\nsocket = "users"\n') == [
        "f.toml:17: auth.dovecot.socket: users is no socket"
    ]
    oauth = '[auth.oauth]\nissuer = "i"\naudience = "a"\nkeys_file = "{}"\nca_file = "{}"\n'
    found = wrong(file, GOOD + oauth.format("none", "users"))
    assert found[0] == "f.toml:19: auth.oauth.keys_file: none cannot be read: No such file or directory"
    assert [line.partition(" that")[0] for line in found[1:]] == [
        "f.toml:20: auth.oauth.ca_file: users holds no certificate"
    ]
    (file.parent / "keys").write_text("{}")
    assert wrong(file, GOOD + oauth.format("keys", "users"))[0] == "f.toml:19: auth.oauth.keys_file: keys: no JWK set"
    introspection = '[auth.oauth]\nintrospection = "https://i.test"\nclient_id = "me"\nclient_secret_file = "none"\n'
    assert wrong(file, GOOD + introspection) == [
        "f.toml:19: auth.oauth.client_secret_file: none cannot be read: No such file or directory"
    ]


def test_the_ways_out_are_told(file: Path) -> None:
    text = """\
[relay]
networks = ["127.0.0.0/8", "::1"]
transport = "internet"
[[route]]
domain = "*.partner.example"
transport = "provider"
[transport.internet]
type = "smtp"
[transport.provider]
type = "smtp"
smarthost = "smtp.provider.example:587"
tls = "starttls"
[transport.dovecot]
type = "lmtp"
address = "unix:/run/lmtp"
"""
    file.write_text(GOOD + text)
    lines = run("check", "--config", file).stdout.splitlines()
    for line in (
        "route      *.partner.example  by provider",
        "relay      any other domain, for 127.0.0.0/8, ::1/128, by internet",
        "transport  internet  smtp by MX, tls opportunistic",
        "transport  provider  smtp to smtp.provider.example:587, tls starttls",
        "transport  dovecot  lmtp to unix:/run/lmtp",
        "warning: nothing uses [transport.dovecot]",
    ):
        assert line in lines


def test_a_user_of_this_machine(file: Path) -> None:
    assert wrong(file, f'user = "{pwd.getpwuid(os.geteuid()).pw_name}"\n' + GOOD) == []


def test_folders_without_permission(file: Path, tmp_path: Path) -> None:
    """As a user who is not root: root may write everywhere."""
    (tmp_path / "closed").mkdir(mode=0o555)
    (tmp_path / "data").mkdir(mode=0o555)
    file.write_text(GOOD.replace('"mail/', '"closed/mail/'))
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
        if folder.name == "tmp":
            break
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        result = run("check", "--config", file)
        os.write(writer, f"{result.exit_code}\n{result.stderr}".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    me = pwd.getpwuid(os.geteuid() or 65534).pw_name
    with os.fdopen(reader) as stream:
        assert stream.read().splitlines() == [
            "1",
            f"{file}:3: data_dir: {tmp_path}/data is not writable for the user {me}",
            f"{file}:15: transport.mailboxes.path: {tmp_path}/closed is not writable for the user {me}, so "
            f"{tmp_path}/closed/mail cannot be made",
        ]


# As a process


def test_exit_codes_of_the_process(file: Path, tmp_path: Path) -> None:
    good = python("check", "--config", file)
    assert (good.returncode, good.stderr) == (0, "")
    file.write_text("[[listener")
    bad = python("check", "--config", file)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith(f"{file}:1: not TOML: ")
    missing = python("check", "--config", tmp_path / "none")
    assert (missing.returncode, missing.stderr) == (1, f"{tmp_path}/none: cannot be read: No such file or directory\n")
    assert python("check").returncode == 2
    assert python("--version").returncode == 0


@pytest.mark.parametrize("descriptors", [[1], [2], [0, 1, 2]], ids=["stdout", "stderr", "all"])
@pytest.mark.parametrize("text", [GOOD, "x = 1"], ids=["good", "bad"])
def test_closed_descriptors(file: Path, descriptors: list[int], text: str) -> None:
    file.write_text(text)
    command = (
        f"exec {' '.join(f'{n}>&-' for n in descriptors)}; exec {sys.executable} -m fastsmtp check --config {file}"
    )
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == (0 if text == GOOD else 1)
    assert b"Traceback" not in done.stderr


def test_closed_descriptors_are_not_given_to_anything_else() -> None:
    code = "import os; from fastsmtp import cli; cli._open_standard_descriptors(); print_to = os.open('/', 0);"
    code += "os._exit(0 if print_to > 2 and all(os.path.samestat(os.fstat(n), os.stat(os.devnull)) for n in (0, 1, 2))"
    code += " and os.listdir('/proc/self/fd').__len__() == 5 else 1)"
    command = f'exec 0<&- 1>&- 2>&-; exec {sys.executable} -c "$0"'
    assert subprocess.run(["sh", "-c", command, code], cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_went_away(file: Path, stream: str) -> None:
    file.write_text(GOOD if stream == "stdout" else "x = 1")
    reader, writer = os.pipe()
    os.close(reader)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    command = [sys.executable, "-m", "fastsmtp", "check", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, timeout=60, check=False, text=True, **pipes)
    os.close(writer)
    assert done.returncode == (0 if stream == "stdout" else 1)
    assert not done.stderr
    assert not done.stdout


# serve


def test_serve_refuses_a_wrong_file(file: Path) -> None:
    file.write_text("x = 1\ny = 2\n")
    done = python("serve", "--config", file)
    assert done.returncode == 1
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [f"{file}:1", f"{file}:2"]


@pytest.mark.parametrize("cause", ["port", "key", "folder", "user"])
def test_serve_says_in_one_line_why_it_cannot_start(file: Path, cause: str) -> None:
    if cause == "user":
        needs_root()  # others stay who they are
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = {
            "port": GOOD.replace("127.0.0.1:0", f"127.0.0.1:{port}"),
            "key": GOOD + TLS,
            "folder": GOOD.replace('"data"', '"f.toml/data"'),
            "user": 'user = "nobody-has-this-name"\n' + GOOD,
        }[cause]
        file.write_text(text)
        done = python("serve", "--config", file)
    assert done.returncode == 1
    assert done.stderr.startswith("fastsmtp: ")
    assert done.stderr.count("\n") == 1
    assert {"port": str(port), "key": ".pem", "folder": "data", "user": "nobody-has"}[cause] in done.stderr


def test_serve_without_a_file_says_what_it_does(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    with default_port(), subprocess.Popen(
        [sys.executable, "-m", "fastsmtp", "serve"], cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as server:  # fmt: skip
        try:
            assert server.stderr is not None
            banner = ""
            deadline = time.monotonic() + 30
            while "--describe" not in banner and time.monotonic() < deadline:
                line = server.stderr.readline()
                if not line:
                    break
                banner += line
            if "in use" in banner:
                lacks("needs port 2525 of 127.0.0.1: stop what listens there")
            assert "listens on 127.0.0.1:2525" in banner
            assert f"{tmp_path}/fastsmtp-data/mail/<domain>/<local-part>/" in banner
            assert "swaks --server 127.0.0.1:2525 --to b@y.test" in banner
            assert "Ctrl-C" in banner
            with socket.create_connection(("127.0.0.1", 2525), 10) as client:
                assert client.recv(100).startswith(b"220 ")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
