"""The tables of the configuration that say who may log in: users and their passwords, tokens, limits of guessing.

As in config_tables.py each key's name, type, default and help stand once, here. Passwords come from one place: a users
file, a query, or Dovecot; tokens may be taken beside it. What one table must know of another is checked in
config_conflicts.py. Not here: who is asked for a login at all (`auth` of a listener), and whether the machine has
these files and sockets. RFC 4954, RFC 7628 (tokens), RFC 7662 (introspection), RFC 7517 and 7519 (signed tokens).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PlainValidator, field_validator

from .config_values import (
    Count,
    Duration,
    FilePath,
    Hostname,
    Kind,
    Name,
    Networks,
    RateLimit,
    Table,
    Unset,
    parse_duration,
    parse_path,
    parse_rate,
)

# Of signatures only: with a MAC, whoever can check a token could make one; "none" is none.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


def check_url(value: str) -> str:
    try:
        url = urlsplit(value)
        if url.scheme == "https" and url.hostname and value.isascii() and value.isprintable() and not url.username:
            _ = url.port  # raises ValueError for what is none
            return value
    except ValueError:
        pass
    raise ValueError('an address that begins with "https://"')


# In the order of auth.py; a test holds the names equal.
Mechanism = Literal[
    "SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN", "OAUTHBEARER", "XOAUTH2", "EXTERNAL"
]  # fmt: skip

Url = Annotated[str, AfterValidator(check_url), Kind("https address")]
OptionalUrl = Annotated[Url | None, Kind("https address"), Unset("none")]
OptionalPath = Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("none")]


class AuthSql(Table):
    """Users in a database."""

    database: Name = Field(description="The NAME of a `[sql.NAME]` table.")
    query: str = Field(
        description="What is asked for one user, such as `SELECT password, senders FROM users WHERE name = :name`. "
        "`:name` is the whole user name in lower case, `:local` and `:domain` are its parts. Columns by their names: "
        "`password` (argon2, or SCRAM keys as `{SCRAM-SHA-256}count,salt,stored,server`), and where there are such "
        "`scram` (SCRAM keys beside it), `senders` (addresses and `@domain`s with commas between; one row or many)."
    )
    scram_iterations: Count = Field(
        0,
        ge=0,
        description="The count of the SCRAM keys, when every user has them; 0: SCRAM is not offered. Users that do not "
        "exist seem to have it too.",
    )


class AuthDovecot(Table):
    """Users are asked of Dovecot."""

    socket: FilePath = Field(description="Its auth socket, such as `/run/dovecot/auth-client`.")
    timeout: Duration = Field(parse_duration("20s"), gt=0, description="The longest wait for an answer.")


class AuthOauth(Table):
    """Tokens (OAUTHBEARER, XOAUTH2): checked by asking who issued them, or by their signature."""

    introspection: OptionalUrl = Field(
        None, validate_default=False, description="Where a token is asked about (RFC 7662)."
    )
    client_id: Annotated[str, Unset("none")] = Field("", description="Who we are there.")
    client_secret_file: OptionalPath = Field(
        None, validate_default=False, description="The file whose first line is the secret of `client_id`."
    )
    keys_file: OptionalPath = Field(
        None, validate_default=False, description="The public keys of signed tokens (JWT), as a JWK set."
    )
    keys_url: OptionalUrl = Field(
        None, validate_default=False, description="Where such a set is; asked for again each hour."
    )
    algorithms: Annotated[tuple[Algorithm, ...], Kind("list of names"), Unset('`["RS256"]`')] = Field(
        ("RS256",), min_length=1, description="How tokens may be signed."
    )
    issuer: Annotated[str, Unset("any, for introspection only")] = Field(
        "", description="Who must have issued a token: its `iss`."
    )
    audience: Annotated[str, Unset("any, for introspection only")] = Field(
        "", description="Whom a token must be for: its `aud`, or one of them."
    )
    scope: Annotated[str, Unset("any")] = Field("", description="What a token must allow: one word of its `scope`.")
    user: Annotated[str, Unset("`username` of an introspection, `email` of a signed token")] = Field(
        default_factory=lambda values: "username" if values["introspection"] else "email",
        min_length=1,
        description="The member that names the user.",
    )
    ca_file: Annotated[Path | None, PlainValidator(parse_path), Kind("path"), Unset("the system's")] = Field(
        None, validate_default=False, description="Whose certificates are believed, as PEM."
    )
    timeout: Duration = Field(parse_duration("5s"), gt=0, description="The longest wait for an answer.")


class Auth(Table):
    """Who may log in: users of one place (`users_file`, `[auth.sql]` or `[auth.dovecot]`), and tokens."""

    users_file: OptionalPath = Field(
        None,
        validate_default=False,
        description="The users and their passwords; kept by `fastsmtp user`. Its mode must be 0600.",
    )
    domain: Annotated[Hostname | None, Kind("domain"), Unset("none")] = Field(
        None,
        validate_default=False,
        description="What stands behind a user name that is no address, when its own address is meant.",
    )
    mechanisms: Annotated[tuple[Mechanism, ...], Kind("list of names"), Unset("all")] = Field(
        (),
        description="The SASL mechanisms that are offered, where they can succeed: `SCRAM-SHA-256-PLUS` "
        "(bound by tls-server-end-point), `SCRAM-SHA-256`, `PLAIN`, `LOGIN`, `OAUTHBEARER`, `XOAUTH2`, `EXTERNAL`. For "
        "clients that stumble over one.",
    )
    cache: Duration = Field(
        parse_duration("1m"),
        description="How long an answer is taken for known, at most 1h; 0: not at all. A change of `users_file` is "
        "seen at once.",
    )
    address_failures: RateLimit = Field(
        parse_rate("10/10m"),
        description="Failures from one address (of IPv6 its /64), on the whole machine; for each user who succeeded "
        "there within a day it has so many besides. More hear 454.",
    )
    user_failures: RateLimit = Field(
        parse_rate("20/h"),
        description="Failures for one user, from addresses that did not succeed for that user within a day.",
    )
    unlimited: Networks = Field((), description="Whose failures are not counted by address, such as a webmail's.")
    sql: Annotated[AuthSql | None, Unset("none")] = Field(None, description="Users in a database.")
    dovecot: Annotated[AuthDovecot | None, Unset("none")] = Field(None, description="Users of a Dovecot.")
    oauth: Annotated[AuthOauth | None, Unset("none")] = Field(None, description="Tokens.")

    @field_validator("cache")
    @classmethod
    def _check_cache(cls, value: float) -> float:
        if value > parse_duration("1h"):
            raise ValueError("at most 1h")
        return value

    @property
    def stores(self) -> bool:
        """Whether anybody can log in."""
        return any((self.users_file, self.sql, self.dovecot, self.oauth))
