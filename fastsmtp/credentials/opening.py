"""From the table `[auth]` to the Authority of a worker: its stores are opened here, and nowhere else.

In: the table, what the store needs that others have (databases, secrets of files, the shared memory). Out: an
Authority, or None where nobody can log in. Made on the loop; whoever made it closes it. Raises OSError with one line,
of which UsersError is one: what cannot be opened now is wrong, and a server that begins with it would refuse all users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .. import log as logs
from .._shared import Shared
from ..config_auth import Auth
from ..sql import Database
from . import Authority, Store
from .directory import Directory, Source
from .dovecot import Dovecot
from .file import Users
from .guessing import Guessing
from .hashes import Hashes
from .oauth import Oauth, missing_library
from .scram import take_secret
from .sql import Query

SECRET = "auth-secret"  # in the data directory
CLIENT_SECRET = "[auth.oauth]"  # its name among the passwords that were read before privileges were dropped


def open_authority(
    section: Auth,
    data_dir: Path,
    *,
    databases: Mapping[str, Database],
    passwords: Mapping[str, str],
    shared: Shared,
    unlimited: Callable[[str], bool],
    log: logs.Log,
) -> Authority | None:
    """`unlimited`: of which addresses failures are not counted."""
    stores: list[Store] = []
    domain = section.domain or ""
    if (source := _open_source(section, databases, domain)) is not None:
        stores.append(Directory(source, Hashes(), take_secret(data_dir / SECRET)))
    if section.dovecot is not None:
        stores.append(Dovecot(section.dovecot.socket, section.dovecot.timeout, domain))
    if section.oauth is not None:
        if not section.oauth.introspection and (wrong := missing_library()):
            raise OSError(wrong)
        stores.append(Oauth(section.oauth, passwords.get(CLIENT_SECRET, ""), domain))
    if not stores:
        return None
    guessing = Guessing(shared, section.address_failures, section.user_failures, unlimited, time.monotonic)
    return Authority(stores, guessing, cache=section.cache, log=log)


def _open_source(section: Auth, databases: Mapping[str, Database], domain: str) -> Source | None:
    if section.users_file is not None:
        users = Users(section.users_file, domain)
        users.load()
        return users
    if section.sql is not None:
        sql = section.sql
        return Query(databases[sql.database], sql.query, sql.scram_iterations, domain)
    return None
