"""A real server with two workers asks a users file, a database and Dovecot, and does not let itself be guessed at."""

from __future__ import annotations

import json
import smtplib
import sqlite3
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from dovecot import dovecot
from servers import ROOT, Server, running, toml

from fastsmtp.credentials.hashes import hash_password

LISTENER = '[[listener]]\naddress = "127.0.0.1:0"\nrole = "submission"\nauth_clear = true\n'


def configuration(folder: Path, auth: str) -> str:
    return toml(folder, workers=2, listeners=LISTENER, tables=auth)


def user(folder: Path, *arguments: str, password: str = "") -> None:
    command = [sys.executable, "-m", "fastsmtp", "user", *arguments, "--config", str(folder / "users.toml")]
    subprocess.run(command, input=password.encode(), cwd=ROOT, check=True, timeout=60)


def login(server: Server, name: str, password: str) -> int:
    """The code of the answer to AUTH PLAIN."""
    host, port = server.address.rsplit(":", 1)
    with closing(smtplib.SMTP(host, int(port), timeout=60)) as client:
        client.ehlo()
        client.user, client.password = name, password
        return client.auth("PLAIN", client.auth_plain, initial_response_ok=True)[0] if name else 0


def code(server: Server, name: str, password: str) -> int:
    try:
        return login(server, name, password)
    except smtplib.SMTPAuthenticationError as error:
        return error.smtp_code


def offered(server: Server) -> set[str]:
    host, port = server.address.rsplit(":", 1)
    with smtplib.SMTP(host, int(port), timeout=60) as client:
        client.ehlo()
        return set(client.esmtp_features.get("auth", "").split())


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20.0
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_users_file_that_changes_while_it_serves(tmp_path: Path) -> None:
    auth = (
        '[auth]\nusers_file = "users"\naddress_failures = "5/d"\nmechanisms = ["PLAIN", "SCRAM-SHA-256", "XOAUTH2"]\n'
    )
    text = configuration(tmp_path, auth)
    (tmp_path / "users.toml").write_text(text)
    user(tmp_path, "add", "ann@x.test", password="one")
    with running(tmp_path, text) as server:
        assert (tmp_path / "data" / "auth-secret").stat().st_mode & 0o777 == 0o600
        assert offered(server) == {"PLAIN", "SCRAM-SHA-256"}
        assert [code(server, "ann@x.test", "one") for _ in range(4)] == [235] * 4
        user(tmp_path, "passwd", "ann@x.test", password="two")
        assert [code(server, "ann@x.test", "two") for _ in range(4)] == [235] * 4
        assert code(server, "ann@x.test", "one") == 535
        # Five failures are the address's, whichever workers are asked, and whoever is guessed.
        guesses = [(f"u{n % 3}@x.test", f"guess{n}") for n in range(8)]
        with ThreadPoolExecutor(len(guesses)) as clients:
            answers = list(clients.map(lambda guess: code(server, *guess), guesses))
        assert sorted(answers) == [454] * 3 + [535] * 5
        assert code(server, "ann@x.test", "two") == 235, "she was right here lately"
        user(tmp_path, "add", "bob@x.test", "--no-scram", password="one")
        assert until(lambda: all(offered(server) == {"PLAIN"} for _ in range(8)))
        user(tmp_path, "delete", "bob@x.test")
        assert until(lambda: all(offered(server) == {"PLAIN", "SCRAM-SHA-256"} for _ in range(8)))
        assert server.stop() == 0
        server.check_bugs()


def test_a_reload_brings_other_users(tmp_path: Path) -> None:
    files = {name: configuration(tmp_path, f'[auth]\nusers_file = "{name}"\n') for name in ("first", "second")}
    for name, text in files.items():
        (tmp_path / "users.toml").write_text(text)
        user(tmp_path, "add", f"{name}@x.test", "--no-scram", password="secret")
    with running(tmp_path, files["first"]) as server:
        assert (code(server, "first@x.test", "secret"), code(server, "second@x.test", "secret")) == (235, 535)
        file = tmp_path / "fastsmtp.toml"
        command = [sys.executable, "-m", "fastsmtp", "reload", "--config", str(file)]
        file.write_text(files["second"].replace("second", "none"))
        wrong = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert wrong.returncode == 1
        assert "none" in wrong.stdout + wrong.stderr
        assert code(server, "first@x.test", "secret") == 235
        file.write_text(files["second"])
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert offered(server) == {"PLAIN", "LOGIN"}
        assert (code(server, "first@x.test", "secret"), code(server, "second@x.test", "secret")) == (535, 235)
        assert server.stop() == 0
        server.check_bugs()


def test_users_of_a_database(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "users.sqlite")) as database:
        database.execute("CREATE TABLE users (name TEXT, password TEXT)")
        database.execute("INSERT INTO users VALUES ('ann@x.test', ?)", (hash_password("secret"),))
        database.commit()
    auth = (
        '[sql.users]\ndatabase = "users.sqlite"\n'
        '[auth.sql]\ndatabase = "users"\nquery = "SELECT password FROM users WHERE name = :name"\n'
    )
    with running(tmp_path, configuration(tmp_path, auth)) as server:
        assert offered(server) == {"PLAIN", "LOGIN"}
        assert code(server, "Ann@X.test", "secret") == 235
        assert code(server, "ann@x.test", "Secret") == 535
        assert server.stop() == 0
        server.check_bugs()


def test_users_of_dovecot(tmp_path: Path) -> None:
    with dovecot({}, passwords={"ann@x.test": "secret"}) as users:
        auth = f"[auth.dovecot]\nsocket = {json.dumps(str(users.auth))}\n"
        with running(tmp_path, configuration(tmp_path, auth)) as server:
            assert offered(server) == {"PLAIN", "LOGIN"}
            assert [code(server, "ann@x.test", "secret") for _ in range(4)] == [235] * 4
            assert code(server, "ann@x.test", "Secret") == 535
            assert server.stop() == 0
            server.check_bugs()


def test_tokens_that_are_signed_beside_a_users_file(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key()))
    (tmp_path / "keys").write_text(json.dumps({"keys": [public]}))
    auth = (
        '[auth]\nusers_file = "users"\n[auth.oauth]\nkeys_file = "keys"\nalgorithms = ["ES256"]\n'
        'issuer = "https://i.test"\naudience = "mail"\n'
    )
    text = configuration(tmp_path, auth)
    (tmp_path / "users.toml").write_text(text)
    user(tmp_path, "add", "ann@x.test", password="secret")
    claims = {"iss": "https://i.test", "aud": "mail", "exp": time.time() + 600, "email": "Eve@X.test"}
    with running(tmp_path, text) as server:
        assert {"PLAIN", "OAUTHBEARER", "XOAUTH2"} <= offered(server)
        assert code(server, "ann@x.test", "secret") == 235
        host, port = server.address.rsplit(":", 1)
        for name, audience, expected in (("eve@x.test", "mail", 235), ("ann@x.test", "mail", 535), ("", "web", 535)):
            token = jwt.encode({**claims, "aud": audience}, key, algorithm="ES256")
            with smtplib.SMTP(host, int(port), timeout=60) as client:
                client.ehlo()
                said = b64encode(f"user={name}\1auth=Bearer {token}\1\1".encode()).decode()
                answer = client.docmd("AUTH", f"XOAUTH2 {said}")
                if expected == 535:
                    assert json.loads(b64decode(answer[1]))["status"] == "401"
                    answer = client.docmd("")
                assert answer[0] == expected
        assert server.stop() == 0
        assert {line["user"] for line in server.events("session")} >= {"ann@x.test", "eve@x.test"}
        server.check_bugs()


def test_a_users_file_that_cannot_be_used_keeps_it_from_starting(tmp_path: Path) -> None:
    (tmp_path / "users").write_text("rubbish\n")
    (tmp_path / "users").chmod(0o600)
    (tmp_path / "fastsmtp.toml").write_text(configuration(tmp_path, '[auth]\nusers_file = "users"\n'))
    command = [sys.executable, "-m", "fastsmtp", "serve", "--config", str(tmp_path / "fastsmtp.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "users is no users file: its first line is not '# fastsmtp users 1'" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
