"""Bearer tokens (OAUTHBEARER, XOAUTH2): whose they are, said by who issued them or by their signature.

In: a token, and who the client says it is. Out: the user that the token names, or the word of RFC 7628 for why not.
Introspection asks over verified TLS, as a client with a secret; its answer is bounded and may be remembered until the
token ends. A signed token is checked here, by PyJWT: algorithm, issuer, audience and the two times, with a minute of
slack; its keys are of the kinds that only sign, so neither `none` nor a MAC under a public key can pass. What cannot
be asked, or fetched, is UnavailableError. A client that names another user than the token does is refused.
RFC 7662, RFC 7519, RFC 7517, RFC 8725.
"""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote_plus, urlencode

from ..config_auth import AuthOauth
from ..tls import client_context
from ..verdict import Client, Token
from . import Account, Answer, Asked, BusyError, Denied, UnavailableError, canonical, own_rights
from .https import HttpError, ask

if TYPE_CHECKING:
    from jwt import PyJWK

LEEWAY = 60  # seconds that clocks may differ
LATEST = 1 << 53  # of seconds since the epoch
ANSWER_LIMIT = 64 << 10
KEYS_LIMIT = 256 << 10
KEYS_SECONDS = 3600.0  # after which keys are asked for again
KEYS_PAUSE = 60.0  # before that, for a key that is not among them
UNDER_WAY = 64  # tokens that are being asked about at once

INVALID = Denied("invalid_token")
NARROW = Denied("insufficient_scope")

Claims = Mapping[str, Any]


class Checker(Protocol):
    """What a token claims, when it is genuine; None when it is not. Raises UnavailableError."""

    async def claims(self, token: str) -> Claims | None: ...


class Oauth:
    """A store. `now` is in seconds since the epoch."""

    label = "auth.oauth"
    questions: frozenset[type] = frozenset((Token,))
    mechanisms: frozenset[str] = frozenset(("OAUTHBEARER", "XOAUTH2"))

    def __init__(self, section: AuthOauth, secret: str, domain: str, *, now: Callable[[], float] = time.time) -> None:
        self._section = section
        self._domain = domain
        self._now = now
        self._under_way = 0
        context = client_context(verify=True, ca_file=section.ca_file)
        self._checker: Checker = (
            Introspection(section, secret, context) if section.introspection else Signatures(section, context)
        )

    def stamp(self, name: str) -> object:
        return None

    async def check(self, question: Asked, client: Client, known: bool = False) -> Answer:
        if not isinstance(question, Token):
            return Denied()
        if self._under_way >= UNDER_WAY:
            raise BusyError("too many tokens are being checked")
        self._under_way += 1
        try:
            async with asyncio.timeout(self._section.timeout):
                claims = await self._checker.claims(question.token)
        except TimeoutError:
            raise UnavailableError(f"no answer within {self._section.timeout:g} s") from None
        finally:
            self._under_way -= 1
        return INVALID if claims is None else self._judge(claims, question.name)

    def find(self, name: str) -> Account:
        return Account(name, own_rights(name, self._domain))

    async def close(self) -> None:
        pass

    def _judge(self, claims: Claims, said: str) -> Answer:
        section, now = self._section, self._now()
        ends, begins = claims.get("exp", LATEST - 1), claims.get("nbf", 0)
        if not _is_time(ends) or not _is_time(begins) or not begins - LEEWAY <= now < ends + LEEWAY:
            return INVALID
        if section.issuer and claims.get("iss") != section.issuer:
            return INVALID
        if section.audience and section.audience not in _words(claims.get("aud"), None):
            return INVALID
        if section.scope and section.scope not in _words(claims.get("scope", claims.get("scp")), " "):
            return NARROW
        user = claims.get(section.user)
        if not isinstance(user, str) or not user or not user.isprintable():
            return INVALID
        # Whoever may write his own address into his account would be whom he likes.
        if section.user == "email" and claims.get("email_verified", True) not in (True, "true"):
            return INVALID
        name = canonical(user)
        if said and canonical(said) != name:
            return INVALID
        return Account(name, own_rights(name, self._domain), seconds=max(0.0, ends - now))


def _is_time(value: object) -> bool:
    """Not what JSON has besides: true, NaN, and what overflows a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LATEST


def _words(value: object, separator: str | None) -> list[str]:
    """A claim that is one text or a list of them."""
    if isinstance(value, str):
        return value.split(separator) if separator else [value]
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []


class Introspection:
    """Asks who issued the token (RFC 7662)."""

    def __init__(self, section: AuthOauth, secret: str, context: ssl.SSLContext) -> None:
        self._url = section.introspection or ""
        self._context = context
        self._fields: list[tuple[str, str]] = []
        if section.client_id:
            login = f"{quote_plus(section.client_id)}:{quote_plus(secret)}".encode()  # RFC 6749 2.3.1
            self._fields.append(("Authorization", f"Basic {b64encode(login).decode()}"))

    async def claims(self, token: str) -> Claims | None:
        form = urlencode({"token": token, "token_type_hint": "access_token"}).encode()
        try:
            body = await ask(self._url, self._context, form=form, fields=self._fields, limit=ANSWER_LIMIT)
            answer = json.loads(body)
        except HttpError as error:
            raise UnavailableError(str(error)) from None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or not isinstance(answer.get("active"), bool):
            raise UnavailableError(f"{self._url}: the answer is no introspection")
        return answer if answer["active"] else None


class Signatures:
    """Checks the signature of a JWT. `now` is monotonic."""

    def __init__(self, section: AuthOauth, context: ssl.SSLContext, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._section = section
        self._context = context
        self._keys: dict[str, PyJWK] = {}
        self._stamp = 0  # of keys_file
        self._fetched = -math.inf
        self._fetching = asyncio.Lock()

    async def claims(self, token: str) -> Claims | None:
        import jwt

        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, RecursionError):  # of some versions, at JSON in great depth
            return None
        # Of critical extensions (RFC 7515 4.1.11) none is known here; old versions of the library pass them over.
        if header.get("alg") not in self._section.algorithms or "crit" in header:
            return None
        key = await self._find_key(header.get("kid"))
        if key is None:
            return None
        try:
            claims: Claims = jwt.decode(
                token, key.key, algorithms=list(self._section.algorithms), audience=self._section.audience,
                issuer=self._section.issuer, leeway=LEEWAY, options={"require": ["exp", "iss", "aud"]},
            )  # fmt: skip
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            return None
        return claims

    async def _find_key(self, name: object) -> PyJWK | None:
        """By its name; without one, the only key that there is."""
        if self._section.keys_file is not None:
            self._read(self._section.keys_file)
        else:
            await self._fetch(name)
        if name is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(name) if isinstance(name, str) else None

    def _read(self, path: Path) -> None:
        try:
            stamp = path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._keys = parse_keys(path.read_bytes())
                self._stamp = stamp
        except OSError as error:
            raise UnavailableError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UnavailableError(f"{path}: {error}") from None

    async def _fetch(self, name: object) -> None:
        """Keys that are at hand serve on when new ones cannot be had."""
        if self._is_fresh(name):  # nobody who has what he needs waits for who has not
            return
        async with self._fetching:
            if self._is_fresh(name):
                return
            try:
                async with asyncio.timeout(self._section.timeout / 2):
                    body = await ask(self._section.keys_url or "", self._context, limit=KEYS_LIMIT)
                self._keys = parse_keys(body)
            except (HttpError, ValueError, TimeoutError) as error:
                if not self._keys:
                    raise UnavailableError(f"{self._section.keys_url}: {error or 'no answer'}") from None
            self._fetched = self._now()

    def _is_fresh(self, name: object) -> bool:
        age = self._now() - self._fetched
        known = name is None or name in self._keys
        return age < KEYS_PAUSE or (known and age < KEYS_SECONDS)


def parse_keys(octets: bytes) -> dict[str, PyJWK]:
    """The signature keys of a JWK set, by `kid`; what has none is named by its place. ValueError: it is no such set."""
    import jwt

    try:
        document = json.loads(octets)
        entries = document["keys"]
        keys = {}
        for place, entry in enumerate(entries):
            if entry.get("kty") in ("RSA", "EC", "OKP") and entry.get("use", "sig") == "sig":
                try:
                    keys[str(entry.get("kid", f"#{place}"))] = jwt.PyJWK(entry)
                except jwt.PyJWTError:
                    continue  # of a curve or an algorithm that nobody here knows
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("no JWK set") from None
    if not keys:
        raise ValueError("there is no public key for signatures in it")
    return keys


def missing_library() -> str:
    """Why signed tokens cannot be checked here; empty when they can."""
    try:
        from jwt.algorithms import has_crypto
    except ImportError:
        has_crypto = False
    return "" if has_crypto else "signed tokens need PyJWT with cryptography: pip install 'fastsmtp-mta[oauth]'"
