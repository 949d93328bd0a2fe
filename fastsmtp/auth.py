"""The server's side of SASL: each mechanism is a generator of challenges and questions that ends with a user's name.

In: the client's responses, decoded, and the verdicts on what was asked. Out: a `Challenge` or a question of
verdict.py, one for each of them; the canonical name of the user is what the generator returns. A mechanism decides
what a response means and whether a proof holds; whether a password, token or certificate is good is asked.
An `Attempt` is what a log may know of it: no secret is ever put there, nor into a reply or an exception.
Channel binding is tls-server-end-point only: Python's ssl has no tls-exporter. CRAM-MD5 is left out.
On failure: `AuthError` with the reply. Not here: base64, cancelling and what AUTH is answered (auth_exchange.py).
RFC 4422, 4616 (PLAIN), 5802 and 7677 (SCRAM-SHA-256), 5929 (bindings), 7628 (OAUTHBEARER), draft-murchison-sasl-login.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from base64 import b64encode
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias, TypeVar

from .reply import R454_AUTH_UNAVAILABLE, R501_BAD_RESPONSE, R535_BAD_CREDENTIALS, Reply
from .saslprep import saslprep
from .verdict import Client, Identity, Password, Proved, Question, ScramKeys, Token, Verdict

NAME_LIMIT = 255  # octets: RFC 4616 2
PASSWORD_LIMIT = 1024  # octets, also in `fastsmtp user`: 9 KB could hold everybody up for a third of a second
BINDING = "tls-server-end-point"


class AuthError(Exception):
    """The exchange is over. `reason` is one constant word."""

    def __init__(self, reason: str, reply: Reply = R535_BAD_CREDENTIALS) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reply = reply


class Challenge:
    """Octets to the client, which it answers."""

    __slots__ = ("octets",)

    def __init__(self, octets: bytes) -> None:
        self.octets = octets


class Attempt:
    """One exchange: `name` as the client typed it, empty until it is known. `reason`: why it failed, empty until it
    does."""

    __slots__ = ("mechanism", "name", "reason")

    def __init__(self, mechanism: str) -> None:
        self.mechanism = mechanism
        self.name = ""
        self.reason = ""


class Facts(NamedTuple):
    """`offered`: the mechanisms that this client could have chosen. `make_nonce` gives printable ASCII, no comma."""

    client: Client
    attempt: Attempt
    offered: tuple[str, ...]
    make_nonce: Callable[[], str] = secrets.token_urlsafe


Step: TypeAlias = Challenge | Question
# A mechanism is sent the response to a challenge, and the verdict on a question.
Run: TypeAlias = Generator[Step, "bytes | Verdict | None", str]
T = TypeVar("T")
Part: TypeAlias = Generator[Step, "bytes | Verdict | None", T]


def _challenge(octets: bytes) -> Part[bytes]:
    response = yield Challenge(octets)
    assert isinstance(response, bytes)
    return response


def _put(question: Question) -> Part[Verdict]:
    """The verdict on a question that was not refused."""
    verdict = yield question
    assert isinstance(verdict, Verdict)
    if verdict.reply is not None:
        raise _refused(verdict.reason, verdict.reply)
    return verdict


def _refused(reason: str, reply: Reply) -> AuthError:
    """A check that fails says 451 at every stage; of AUTH's codes that is 454."""
    return AuthError(reason, R454_AUTH_UNAVAILABLE if reply.code == 451 else reply)


def _user(verdict: Verdict) -> str:
    """Whom a verdict grants. Where nobody had an opinion it names nobody."""
    if not verdict.user:
        raise AuthError("auth-failed")
    return verdict.user


def _text(response: bytes) -> str:
    try:
        return response.decode()
    except UnicodeDecodeError:
        # The error holds the response.
        raise AuthError("auth-malformed", R501_BAD_RESPONSE) from None


def _name(facts: Facts, text: str) -> str:
    """A name as it is asked about. What cannot be a name is answered as a wrong password is."""
    facts.attempt.name = text
    prepared = _prepared(text, NAME_LIMIT)
    if len(prepared.encode()) > NAME_LIMIT:
        raise AuthError("auth-malformed")
    return prepared


def _prepared(text: str, limit: int = PASSWORD_LIMIT) -> str:
    """The text as it is compared. It is measured first: nobody has paid for the work yet."""
    if len(text.encode()) > limit:
        raise AuthError("auth-malformed")
    try:
        return saslprep(text)
    except ValueError:
        raise AuthError("auth-malformed") from None


def _check_authzid(authzid: str, name: str) -> None:
    """Nobody acts as another user: where a client says as whom, it must be itself."""
    if authzid not in ("", name):
        raise AuthError("auth-foreign-authzid")


# PLAIN and LOGIN


def _plain(facts: Facts) -> Run:
    parts = _text((yield from _challenge(b""))).split("\0")
    if len(parts) != 3 or not (parts[1] and parts[2]):
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    authzid, name, password = parts
    prepared = _name(facts, name)
    _check_authzid(authzid, name)
    return _user((yield from _put(Password(prepared, _prepared(password)))))


def _login(facts: Facts) -> Run:
    name = _text((yield from _challenge(b"Username:")))
    password = _text((yield from _challenge(b"Password:")))
    if not (name and password) or "\0" in name or "\0" in password:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    return _user((yield from _put(Password(_name(facts, name), _prepared(password)))))


# SCRAM (RFC 5802 7). Of extensions none is known; "m" must be understood, so nothing may stand before the name.

_CLIENT_FIRST = re.compile(
    r"(?P<gs2>(?P<flag>n|y|p=(?P<binding>[A-Za-z0-9.-]+)),(?:a=(?P<authzid>[^,\0]+))?,)"
    r"(?P<bare>n=(?P<name>[^,\0]+),r=(?P<nonce>[!-+\--~]+)(?:,[A-Za-z]=[^,\0]+)*)"
)
_CLIENT_FINAL = re.compile(
    r"(?P<unproved>c=(?P<binding>[A-Za-z0-9+/=]+),r=(?P<nonce>[!-+\--~]+)(?:,[A-Za-z]=[^,\0]+)*),"
    r"p=(?P<proof>[A-Za-z0-9+/=]+)"
)


def _scram(facts: Facts) -> Run:
    return (yield from _scram_sha_256(facts, plus=False))


def _scram_plus(facts: Facts) -> Run:
    return (yield from _scram_sha_256(facts, plus=True))


def _scram_sha_256(facts: Facts, plus: bool) -> Run:
    first = _CLIENT_FIRST.fullmatch(_text((yield from _challenge(b""))))
    if first is None:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    typed = _decode_saslname(first["name"])
    name = _name(facts, typed)
    _check_authzid(_decode_saslname(first["authzid"] or ""), typed)
    if (first["binding"] or "") != (BINDING if plus else ""):
        raise AuthError("auth-binding")
    if first["flag"] == "y" and "SCRAM-SHA-256-PLUS" in facts.offered:
        # RFC 5802 6: the client can bind and believes that we cannot, so somebody took PLUS out of our offer.
        raise AuthError("auth-downgrade")
    verdict = yield from _put(ScramKeys(name))
    keys = verdict.keys
    if keys is None:
        raise AuthError("auth-failed")
    nonce = first["nonce"] + facts.make_nonce()
    server_first = f"r={nonce},s={b64encode(keys.salt).decode()},i={keys.iterations}"
    final = _CLIENT_FINAL.fullmatch(_text((yield from _challenge(server_first.encode()))))
    if final is None:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    header = first["gs2"].encode()
    bound = [header + data for data in facts.client.bindings] if plus else [header]
    signed = f"{first['bare']},{server_first},{final['unproved']}".encode()
    binding, proof = _decode(final["binding"]), _decode(final["proof"])
    sound = (
        _prove(keys.stored_key, signed, proof)
        and binding in bound
        and hmac.compare_digest(final["nonce"], nonce)
        and verdict.user != ""
    )
    yield from _put(Proved(name, sound, verdict.paid))
    if not sound:
        raise AuthError("auth-failed")
    # RFC 4954 4: 235 carries no data, so the server's proof is a challenge that is answered with nothing.
    if (yield from _challenge(b"v=" + b64encode(hmac.digest(keys.server_key, signed, "sha256")))):
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    return verdict.user


def _prove(stored_key: bytes, signed: bytes, proof: bytes) -> bool:
    """Whether the proof was made with the client's key (RFC 5802 3)."""
    signature = hmac.digest(stored_key, signed, "sha256")
    if len(proof) != len(signature):
        return False
    client_key = bytes(a ^ b for a, b in zip(proof, signature, strict=True))
    return hmac.compare_digest(hashlib.sha256(client_key).digest(), stored_key)


def _decode_saslname(text: str) -> str:
    """RFC 5802 5.1: `=2C` and `=3D`, and no other `=`."""
    if re.search(r"=(?!2C|3D)", text):
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    return text.replace("=2C", ",").replace("=3D", "=")


def _decode(text: str) -> bytes:
    try:
        return decode_base64(text.encode())
    except ValueError:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE) from None


# Bearer tokens. A refused one is told why, in JSON, before 535.

_OAUTHBEARER = re.compile(r"[ny],(?:a=(?P<authzid>[^,\0\x01]*))?,\x01(?P<pairs>(?:[A-Za-z]+=[^\0\x01]*\x01)*)\x01")
_XOAUTH2 = re.compile(r"user=(?P<name>[^\0\x01]*)\x01auth=(?P<auth>[^\0\x01]*)\x01\x01")
_BEARER = re.compile(r"Bearer ([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)


def _oauthbearer(facts: Facts) -> Run:
    response = _OAUTHBEARER.fullmatch(_text((yield from _challenge(b""))))
    if response is None:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    pairs = [pair.partition("=")[::2] for pair in response["pairs"].split("\1") if pair]
    auths = [value for key, value in pairs if key.lower() == "auth"]
    if len(auths) != 1:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    name = _decode_saslname(response["authzid"] or "")
    # RFC 7628 3.2.2.
    return (yield from _bearer(facts, name, auths[0], lambda problem: {"status": problem}))


def _xoauth2(facts: Facts) -> Run:
    response = _XOAUTH2.fullmatch(_text((yield from _challenge(b""))))
    if response is None:
        raise AuthError("auth-malformed", R501_BAD_RESPONSE)
    # As Google and Microsoft document it: a status of HTTP.
    return (
        yield from _bearer(
            facts, response["name"], response["auth"], lambda _: {"status": "401", "schemes": "bearer", "scope": ""}
        )
    )


def _bearer(facts: Facts, typed: str, auth: str, explain: Callable[[str], dict[str, str]]) -> Run:
    name = _name(facts, typed) if typed else ""
    token = _BEARER.fullmatch(auth)
    # An empty token asks what there is to be had here (RFC 7628 4.3); it is none.
    verdict = (yield Token(token[1], name)) if token else Verdict("auth-malformed", R535_BAD_CREDENTIALS)
    assert isinstance(verdict, Verdict)
    if verdict.reply is None:
        return _user(verdict)
    if verdict.reply.code == 535:
        facts.attempt.reason = verdict.reason
        yield from _challenge(json.dumps(explain(verdict.problem or "invalid_token")).encode())
    raise _refused(verdict.reason, verdict.reply)


# EXTERNAL


def _external(facts: Facts) -> Run:
    authzid = _text((yield from _challenge(b"")))
    name = _name(facts, facts.client.certificate)
    verdict = yield from _put(Identity(name))
    if authzid != _user(verdict):
        _check_authzid(authzid, name)
    return verdict.user


class Mechanism(NamedTuple):
    """A row of the table. `binds`: it needs TLS and its certificates; `certified`: a client certificate."""

    name: str
    run: Callable[[Facts], Run]
    binds: bool = False
    certified: bool = False


# In the order of EHLO: some clients take the first that they know.
TABLE = (
    Mechanism("SCRAM-SHA-256-PLUS", _scram_plus, binds=True),
    Mechanism("SCRAM-SHA-256", _scram),
    Mechanism("PLAIN", _plain),
    Mechanism("LOGIN", _login),
    Mechanism("OAUTHBEARER", _oauthbearer),
    Mechanism("XOAUTH2", _xoauth2),
    Mechanism("EXTERNAL", _external, certified=True),
)
MECHANISMS = {row.name: row for row in TABLE}


def available(configured: frozenset[str], client: Client, clear: bool) -> tuple[str, ...]:
    """The mechanisms that can succeed now. `configured`: what the credential stores can answer; `clear`: passwords may
    be seen on this listener without TLS."""
    if client.user or not (client.tls or clear):
        return ()
    return tuple(
        row.name
        for row in TABLE
        if row.name in configured and (client.bindings or not row.binds) and (client.certificate or not row.certified)
    )


def decode_base64(text: bytes) -> bytes:
    """The octets of a text that is exactly their base64. Raises ValueError."""
    try:
        octets = a2b_base64(text)
    except Base64Error:
        raise ValueError("not base64") from None
    # What is no base64 was passed over, and so were bits that are left over.
    if b64encode(octets) != text:
        raise ValueError("not base64")
    return octets
