"""Bearer tokens: an HTTPS server that answers introspections and has keys, and tokens that are signed or seem to be."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import h11
import jwt
import pytest
from authority import Bench, client
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from sending import make_certificate

from fastsmtp._shared import Shared
from fastsmtp.config import Auth, AuthOauth
from fastsmtp.credentials import Account, Answer, BusyError, Denied, UnavailableError
from fastsmtp.credentials.oauth import ANSWER_LIMIT, UNDER_WAY, Oauth, Signatures, missing_library, parse_keys
from fastsmtp.credentials.opening import open_authority
from fastsmtp.log import Log
from fastsmtp.tls import client_context
from fastsmtp.verdict import Password, Token

INVALID = Denied("invalid_token")
NOW = 1_800_000_000.0


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30.0))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of "localhost", and of the authority that is believed."""
    return make_certificate(tmp_path_factory.mktemp("oauth"), "localhost")


class Issuer:
    """Answers each request with `status` and `body`, after `gate`; `requests` are those that came."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes = b""
        self.fields: list[tuple[str, str]] = []
        self.requests: list[tuple[bytes, bytes, dict[str, str], bytes]] = []
        self.gate: asyncio.Event | None = None
        self.raw: bytes | None = None  # instead of HTTP
        self.port = 0

    def says(self, answer: object) -> None:
        self.body = json.dumps(answer).encode()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http = h11.Connection(h11.SERVER)
        body, request = b"", None
        try:
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await reader.read(65536))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
                else:
                    return
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            self.requests.append((request.method, request.target, headers, body))
            if self.gate is not None:
                await self.gate.wait()
            if self.raw is not None:
                writer.write(self.raw)
            else:
                fields = [*self.fields, ("Content-Length", str(len(self.body)))]
                writer.write(http.send(h11.Response(status_code=self.status, headers=fields)) or b"")
                writer.write(http.send(h11.Data(data=self.body)) or b"")
                writer.write(http.send(h11.EndOfMessage()) or b"")
            await writer.drain()
        except (ConnectionError, h11.RemoteProtocolError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def issuer(certificate: Path, key: Path | None = None) -> AsyncIterator[Issuer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Issuer()
    listening = await asyncio.start_server(server.serve, "localhost", 0, ssl=context)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()


def store(certificate: Path, **keys: Any) -> Oauth:
    section = AuthOauth.model_validate({"ca_file": certificate, **keys})
    return Oauth(section, "geheim & so", "here.test", now=lambda: NOW)


def asks(server: Issuer, certificate: Path, **keys: Any) -> Oauth:
    return store(certificate, introspection=f"https://localhost:{server.port}/introspect?a=b", **keys)


# Introspection


def test_a_token_that_is_active(certificate: Path) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.says({"active": True, "username": "Ann@X.test", "exp": NOW + 30})
            one = asks(server, certificate, client_id="mail:server", client_secret_file="x")
            answer = await one.check(Token("to+ken&", ""), client())
            assert isinstance(answer, Account)
            assert (answer.name, answer.rights.addresses, answer.seconds) == ("ann@x.test", {"ann@x.test"}, 30.0)
            method, target, headers, body = server.requests[0]
            assert (method, target) == (b"POST", b"/introspect?a=b")
            assert headers["host"] == f"localhost:{server.port}"
            login = base64.b64decode(headers["authorization"].removeprefix("Basic ")).decode()
            assert login == "mail%3Aserver:geheim+%26+so"
            assert parse_qs(body.decode()) == {"token": ["to+ken&"], "token_type_hint": ["access_token"]}
            # Without a client there is no login.
            await asks(server, certificate).check(Token("t", ""), client())
            assert "authorization" not in server.requests[1][2]
            assert one.mechanisms == {"OAUTHBEARER", "XOAUTH2"}

    run(test)


ACTIVE = {"active": True, "username": "ann@x.test", "iss": "https://i.test", "aud": ["mail", "x"], "scope": "a smtp"}
WANTED = {"issuer": "https://i.test", "audience": "mail", "scope": "smtp"}


@pytest.mark.parametrize(
    ("changed", "said", "expected"),
    [
        ({}, "", "ann@x.test"),
        ({}, "ANN@X.test", "ann@x.test"),
        ({}, "eve@x.test", INVALID),
        ({"active": False}, "", INVALID),
        ({"iss": "https://j.test"}, "", INVALID),
        ({"iss": None}, "", INVALID),
        ({"aud": "mail"}, "", "ann@x.test"),
        ({"aud": "mailbox"}, "", INVALID),
        ({"aud": None}, "", INVALID),
        ({"aud": {"mail": 1}}, "", INVALID),
        ({"scope": "a smtps"}, "", Denied("insufficient_scope")),
        ({"scope": None}, "", Denied("insufficient_scope")),
        ({"scope": ["smtp"]}, "", "ann@x.test"),
        ({"username": ""}, "", INVALID),
        ({"username": 7}, "", INVALID),
        ({"username": "ann\n@x.test"}, "", INVALID),
        ({"username": None}, "", INVALID),
        ({"exp": NOW - 59}, "", "ann@x.test"),
        ({"exp": NOW - 61}, "", INVALID),
        ({"exp": "soon"}, "", INVALID),
        ({"exp": True}, "", INVALID),
        ({"nbf": NOW + 59}, "", "ann@x.test"),
        ({"nbf": NOW + 61}, "", INVALID),
        ({"exp": float("nan")}, "", INVALID),
        ({"nbf": float("nan")}, "", INVALID),
        ({"nbf": True}, "", INVALID),
        ({"exp": float("inf")}, "", INVALID),
        ({"exp": 10**400}, "", INVALID),
        ({"exp": -(10**400)}, "", INVALID),
        ({"nbf": float("-inf")}, "", INVALID),
        ({"nbf": -(10**400)}, "", INVALID),
        ({"nbf": -1}, "", "ann@x.test"),
    ],
)
def test_what_a_token_claims(certificate: Path, changed: Mapping[str, Any], said: str, expected: str | Denied) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.says({**ACTIVE, **changed})
            answer = await asks(server, certificate, **WANTED).check(Token("t", said), client())
            assert (answer.name if isinstance(answer, Account) else answer) == expected

    run(test)


def test_another_member_names_the_user(certificate: Path) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.says({**ACTIVE, "sub": "ann"})
            answer = await asks(server, certificate, user="sub").check(Token("t", ""), client())
            assert isinstance(answer, Account)
            assert answer.rights.addresses == {"ann@here.test"}

    run(test)


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (500, b"", "it answered 500"),
        (302, b"", "it answered 302"),
        (401, b"", "it answered 401"),
        (200, b"[]", "no introspection"),
        (200, b"rubbish", "no introspection"),
        (200, b'{"active": "true"}', "no introspection"),
        (200, b"[" * 60_000, "no introspection"),
        (200, b" " * (ANSWER_LIMIT + 1), "longer than 65536 octets"),
    ],
)
def test_answers_that_are_none(certificate: Path, status: int, body: bytes, problem: str) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.status, server.body = status, body
            server.fields = [("Location", f"https://localhost:{server.port}/other")]
            with pytest.raises(UnavailableError, match=problem):
                await asks(server, certificate).check(Token("t", ""), client())
            assert len(server.requests) == 1

    run(test)


@pytest.mark.parametrize("raw", [b"", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{}"])
def test_what_is_no_http(certificate: Path, raw: bytes) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.raw = raw
            with pytest.raises(UnavailableError, match=r"localhost"):
                await asks(server, certificate).check(Token("t", ""), client())

    run(test)


def test_only_a_server_with_its_name_is_asked(certificate: Path, tmp_path: Path) -> None:
    async def test() -> None:
        other = make_certificate(tmp_path, "other.test")
        for shown, believed in ((other, other), (certificate, other)):
            async with issuer(shown) as server:
                server.says(ACTIVE)
                with pytest.raises(UnavailableError, match="its certificate is not to be believed"):
                    await asks(server, believed).check(Token("t", ""), client())
                assert server.requests == []

    run(test)


def test_nobody_answers(certificate: Path) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.says(ACTIVE)
            one = asks(server, certificate, timeout=0.3)
            server.gate = asyncio.Event()
            with pytest.raises(UnavailableError, match=r"no answer within 0\.3 s"):
                await one.check(Token("t", ""), client())
        with pytest.raises(UnavailableError, match="localhost"):
            await one.check(Token("t", ""), client())
        assert await one.check(Password("a", "b"), client()) == Denied()

    run(test)


def test_so_many_are_asked_about_at_once(certificate: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            self.gate = asyncio.Event()

        async def claims(self, token: str) -> dict[str, Any]:
            await self.gate.wait()
            return dict(ACTIVE)

    async def test() -> None:
        one = store(certificate, introspection="https://x.test")
        one._checker = slow = Slow()
        tasks = [asyncio.create_task(one.check(Token("t", ""), client())) for _ in range(UNDER_WAY)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await one.check(Token("t", ""), client())
        slow.gate.set()
        assert all(isinstance(answer, Account) for answer in await asyncio.gather(*tasks))
        assert isinstance(await one.check(Token("t", ""), client()), Account)

    run(test)


def test_an_authority_with_tokens(certificate: Path) -> None:
    async def test() -> None:
        async with issuer(certificate) as server:
            server.says({**ACTIVE, "exp": NOW + 30})
            bench = Bench([asks(server, certificate)], cache=3600.0)
            assert await bench.words(Token("t", ""), Token("t", "")) == ["authenticated"] * 2
            assert len(server.requests) == 1
            bench.now += 31.0
            await bench.ask(Token("t", ""))
            assert len(server.requests) == 2
            server.says({"active": False})
            verdict = await bench.ask(Token("u", ""))
            assert (verdict.reason, verdict.problem) == ("bad-credentials", "invalid_token")
            server.status = 503
            assert await bench.words(Token("v", "")) == ["auth-unavailable"]

    run(test)


# Signed tokens

RSA = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, name: str, **more: str) -> dict[str, Any]:
    algorithm = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
    kind = next((word for kind, word in algorithm.items() if isinstance(key, kind)), "EdDSA")
    maker = jwt.get_algorithm_by_name(kind)
    return {**json.loads(maker.to_jwk(key.public_key())), "kid": name, **more}


KEYS = {"keys": [jwk(RSA, "r", use="sig"), jwk(EC, "e"), jwk(ED, "d")]}
PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
FRESH = {"iss": "https://i.test", "aud": "mail", "email": "ann@x.test"}
ALL = ("RS256", "ES256", "EdDSA")


def claims(**changed: Any) -> dict[str, Any]:
    now = time.time()
    made = {**FRESH, "exp": now + 600, **changed}
    return {name: value for name, value in made.items() if value is not None}


def sign(key: Any, algorithm: str, kid: str | None = "r", **changed: Any) -> str:
    return jwt.encode(claims(**changed), key, algorithm=algorithm, headers={"kid": kid} if kid else {})


def forge(header: Mapping[str, Any], payload: Mapping[str, Any], secret: bytes = b"") -> str:
    """A token that PyJWT would not make."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, payload)]
    said = b".".join(parts)
    signature = hmac.digest(secret, said, "sha256") if secret else b""
    return (said + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def signed(path: Path, certificate: Path, keys: object = KEYS, algorithms: tuple[str, ...] = ALL) -> Oauth:
    path.write_text(json.dumps(keys))
    section = AuthOauth.model_validate(
        {
            "ca_file": certificate, "keys_file": path, "issuer": "https://i.test", "audience": "mail",
            "algorithms": algorithms,
        }
    )  # fmt: skip
    return Oauth(section, "", "", now=time.time)


def judge(one: Oauth, *tokens: str) -> list[Answer]:
    async def ask() -> list[Answer]:
        return [await one.check(Token(token, ""), client()) for token in tokens]

    return asyncio.run(ask())


def test_tokens_that_are_signed(tmp_path: Path, certificate: Path) -> None:
    one = signed(tmp_path / "keys", certificate)
    tokens = [sign(RSA, "RS256"), sign(EC, "ES256", "e"), sign(ED, "EdDSA", "d"), sign(RSA, "RS256", aud=["x", "mail"])]
    tokens.append(sign(RSA, "RS256", email_verified=True))
    for answer in judge(one, *tokens):
        assert isinstance(answer, Account)
        assert answer.name == "ann@x.test"
        assert 590 < answer.seconds <= 600


def test_tokens_that_are_not_good(tmp_path: Path, certificate: Path) -> None:
    now = time.time()
    good = sign(RSA, "RS256")
    head, payload, signature = good.split(".")
    bad = {
        "another key": sign(OTHER, "RS256"),
        "another key by that name": sign(EC, "ES256", "r"),
        "a key that is not there": sign(RSA, "RS256", "x"),
        "no name among several": sign(RSA, "RS256", None),
        "an algorithm that is not wanted": sign(RSA, "RS512"),
        "over": sign(RSA, "RS256", exp=now - 61),
        "without an end": sign(RSA, "RS256", exp=None),
        "not yet": sign(RSA, "RS256", nbf=now + 120),
        "another issuer": sign(RSA, "RS256", iss="https://j.test"),
        "no issuer": sign(RSA, "RS256", iss=None),
        "another audience": sign(RSA, "RS256", aud="web"),
        "no audience": sign(RSA, "RS256", aud=None),
        "no user": sign(RSA, "RS256", email=None),
        "an address that he only says is his": sign(RSA, "RS256", email_verified=False),
        "an address that is not known to be his": sign(RSA, "RS256", email_verified="false"),
        "none": forge({"alg": "none"}, claims()),
        "none by a key": forge({"alg": "none", "kid": "r"}, claims()),
        "None": forge({"alg": "None", "kid": "r"}, claims()),
        "HMAC under the public key": forge({"alg": "HS256", "kid": "r"}, claims(), PEM),
        "HMAC under the key set": forge({"alg": "HS256", "kid": "r"}, claims(), json.dumps(KEYS).encode()),
        "a MAC called a signature": forge({"alg": "RS256", "kid": "r"}, claims(), PEM),
        "no signature": f"{head}.{payload}.",
        "another payload": forge({"alg": "RS256", "kid": "r"}, claims(email="eve@x.test")) + signature,
        "a key of its own": jwt.encode(
            claims(), OTHER, algorithm="RS256", headers={"jwk": jwk(OTHER, "o"), "kid": "o"}
        ),
        "no token": "rubbish",
        "empty": "",
        "numbers": "1.2.3",
        "no object": forge([], {}),  # type: ignore[arg-type]
        "a list as name": forge({"alg": "RS256", "kid": ["r"]}, claims()),
    }
    answers = judge(signed(tmp_path / "keys", certificate), *bad.values())
    assert {name for name, answer in zip(bad, answers, strict=True) if answer != INVALID} == set()
    slack = judge(
        signed(tmp_path / "keys", certificate),
        sign(RSA, "RS256", exp=now - 30),
        sign(RSA, "RS256", nbf=now + 30),
    )
    assert all(isinstance(answer, Account) for answer in slack)


def say(header: str | Mapping[str, Any], payload: str = "") -> str:
    """A token of that very text, with a good signature."""
    text = header if isinstance(header, str) else json.dumps(header)
    parts = [base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in (text, payload)]
    signature = RSA.sign(b".".join(parts), padding.PKCS1v15(), hashes.SHA256())
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


def test_tokens_that_are_written_to_break_something(tmp_path: Path, certificate: Path) -> None:
    """Each is answered as any other that is not good, also where the library lets something pass."""
    head = {"alg": "RS256", "kid": "r"}
    text = json.dumps(claims(exp=7))
    deep = "[" * 6000
    bad = {
        "a deep header": say(deep),
        "a header that is deep within": say('{"alg":' + deep),
        "a number without an end": say('{"alg":"RS256","kid":"r","x":' + "9" * 5000 + "}"),
        "half a character as name": say('{"alg":"RS256","kid":"\\ud800"}', json.dumps(claims())),
        "a name of a file": say({**head, "kid": "../keys"}, json.dumps(claims())),
        "an extension that must be understood": say({**head, "crit": ["x"], "x": 1}, json.dumps(claims())),
        "a payload that is not encoded": say({**head, "crit": ["b64"], "b64": False}, json.dumps(claims())),
        "a deep payload": say(head, deep),
        "no end": say(head, text.replace("7", "Infinity")),
        "no number": say(head, text.replace("7", "NaN")),
        "a great number": say(head, text.replace("7", "1e999")),
        "a greater number": say(head, text.replace("7", "1" + "0" * 400)),
        "an end as text": say(head, text.replace("7", '"9999999999"')),
        "long before all time": say(head, json.dumps({**claims(), "nbf": -(10**400)})),
    }
    one = signed(tmp_path / "keys", certificate)
    assert {name for name, token in bad.items() if judge(one, token) != [INVALID]} == set()
    assert isinstance(judge(one, say(head, json.dumps(claims())))[0], Account)


def test_a_critical_extension_is_refused_here_too(tmp_path: Path, certificate: Path) -> None:
    """Of some versions of the library it is passed over."""
    header = {"alg": "RS256", "kid": "r", "crit": ["x"], "x": 1}
    one = signed(tmp_path / "keys", certificate)
    token = say(header, json.dumps(claims()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jwt, "get_unverified_header", lambda _: header)
        patch.setattr(jwt, "decode", lambda *_, **__: claims())
        assert judge(one, token) == [INVALID]
        del header["crit"]
        assert isinstance(judge(one, token)[0], Account)
        for trouble in (RecursionError, OverflowError):
            patch.setattr(jwt, "decode", lambda *_, trouble=trouble, **__: raises(trouble))
            assert judge(one, token) == [INVALID]
        patch.setattr(jwt, "get_unverified_header", lambda _: raises(RecursionError))
        assert judge(one, token) == [INVALID]


def raises(error: type[Exception]) -> None:
    raise error


def test_one_key_needs_no_name(tmp_path: Path, certificate: Path) -> None:
    (yes,) = judge(signed(tmp_path / "keys", certificate, {"keys": [jwk(RSA, "r")]}), sign(RSA, "RS256", None))
    assert isinstance(yes, Account)


def test_algorithms_that_are_not_configured(tmp_path: Path, certificate: Path) -> None:
    assert judge(signed(tmp_path / "keys", certificate, algorithms=("RS256",)), sign(EC, "ES256", "e")) == [INVALID]
    for word in ("none", "HS256"):
        with pytest.raises(ValueError, match="algorithms"):
            AuthOauth.model_validate({"keys_file": "x", "algorithms": [word]})


def test_keys_of_a_file_that_changes(tmp_path: Path, certificate: Path) -> None:
    path = tmp_path / "keys"
    one = signed(path, certificate)
    token = sign(OTHER, "RS256", "new")
    assert judge(one, token) == [INVALID]
    path.write_text(json.dumps({"keys": [jwk(OTHER, "new")]}))
    (yes,) = judge(one, token)
    assert isinstance(yes, Account)
    path.unlink()
    with pytest.raises(UnavailableError, match="cannot be read"):
        judge(one, token)
    path.write_text("rubbish")
    with pytest.raises(UnavailableError, match="no JWK set"):
        judge(one, token)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"keys": 1}', '{"keys": [1]}', '{"keys": []}', '{"keys": [{"kty": "oct", "k": "AAAA"}]}',
     '{"keys": [{"kty": "RSA"}]}', '{"keys": [{"kty": "EC", "crv": "P-0"}]}', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_key_set(text: str) -> None:
    with pytest.raises(ValueError, match=r"no JWK set|no public key"):
        parse_keys(text.encode())


def test_keys_for_something_else_are_not_used() -> None:
    assert set(parse_keys(json.dumps({"keys": [jwk(RSA, "r", use="enc"), jwk(EC, "e")]}).encode())) == {"e"}


def test_keys_that_are_fetched(certificate: Path) -> None:
    clock = [1000.0]

    async def test() -> None:
        async with issuer(certificate) as server:
            section = AuthOauth.model_validate(
                {
                    "ca_file": certificate, "keys_url": f"https://localhost:{server.port}/keys",
                    "issuer": "https://i.test", "audience": "mail", "timeout": "1s",
                }
            )  # fmt: skip
            one = Oauth(section, "", "", now=time.time)
            one._checker = Signatures(section, client_context(verify=True, ca_file=certificate), lambda: clock[0])

            async def ask(token: str) -> Answer:
                return await one.check(Token(token, ""), client())

            good, new = sign(RSA, "RS256"), sign(OTHER, "RS256", "new")
            assert await ask(sign(RSA, "RS512")) == await ask("rubbish") == INVALID
            assert server.requests == []  # nothing that can be known without the keys
            server.status = 500
            with pytest.raises(UnavailableError, match="it answered 500"):
                await ask(good)
            server.status = 200
            server.says(KEYS)
            assert isinstance(await ask(good), Account)
            assert server.requests[-1][:2] == (b"GET", b"/keys")
            asked = len(server.requests)
            # Names that nobody knows fetch nothing for a minute, ...
            for _ in range(5):
                assert await ask(new) == INVALID
            assert len(server.requests) == asked
            clock[0] += 61.0
            server.says({"keys": [*KEYS["keys"], jwk(OTHER, "new")]})
            assert isinstance(await ask(new), Account)
            assert len(server.requests) == asked + 1
            # ... known ones for an hour; and when nobody answers then, what is at hand serves on.
            clock[0] += 3599.0
            await ask(good)
            assert len(server.requests) == asked + 1
            server.status = 500
            clock[0] += 2.0
            assert isinstance(await ask(good), Account)
            assert len(server.requests) == asked + 2
            # Also when there is a connection and no answer; nobody else waits for it.
            server.gate = asyncio.Event()
            clock[0] += 61.0
            unknown = asyncio.create_task(ask(sign(RSA, "RS256", "x")))
            while len(server.requests) == asked + 2:
                await asyncio.sleep(0.01)
            assert isinstance(await ask(good), Account)
            assert not unknown.done()
            assert await unknown == INVALID
            clock[0] += 3601.0
            assert isinstance(await ask(good), Account)

    run(test)


def test_a_hash_is_not_a_signature(tmp_path: Path, certificate: Path) -> None:
    """The public key's own octets, hashed, sign nothing."""
    token = forge({"alg": "RS256", "kid": "r"}, claims(), hashlib.sha256(PEM).digest())
    assert judge(signed(tmp_path / "keys", certificate), token) == [INVALID]


def test_without_the_library_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_library() == ""
    monkeypatch.setattr("jwt.algorithms.has_crypto", False)
    assert "pip install 'fastsmtp-mta[oauth]'" in missing_library()
    monkeypatch.setitem(sys.modules, "jwt.algorithms", None)
    assert "signed tokens need PyJWT" in missing_library()
    given: dict[str, Any] = {"databases": {}, "passwords": {}, "shared": Shared(1, 1), "log": cast("Log", None)}
    for key in ("keys_file", "keys_url"):
        table = {"issuer": "i", "audience": "a", key: "https://i.test/keys"}
        with pytest.raises(OSError, match="signed tokens need PyJWT"):
            open_authority(Auth.model_validate({"oauth": table}), Path("x"), unlimited=bool, **given)
    table = {"introspection": "https://i.test"}
    authority = open_authority(Auth.model_validate({"oauth": table}), Path("x"), unlimited=bool, **given)
    assert authority is not None
    assert authority.mechanisms == {"OAUTHBEARER", "XOAUTH2"}
    assert open_authority(Auth(), Path("x"), unlimited=bool, **given) is None
