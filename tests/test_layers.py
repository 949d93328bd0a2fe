"""Who may import whom, read from the sources.

Modules stand in layers. One may import what stands in a lower layer, and to its left in its own; a few rows say less or
more. `if TYPE_CHECKING` does not count: names in annotations are not dependencies.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

import fastsmtp

SOURCE = Path(fastsmtp.__file__).parent


def _modules(names: str, package: str = "") -> list[str]:
    """Modules by their names, those of a package with its name before them."""
    return [package + name for name in names.split()]


# wire and words: values and octets
VALUES = _modules(
    "_parser _files _shared shared_keys toml_lines saslprep tls address patterns config_values config_conflicts "
    "config_outgoing config_auth config_lists sql_text config_inbound config_access config_submission config_tables "
    "config_sections config_warnings config reply metrics rights message verdict outlet log job ids selection thread "
    "lists domains aliases alias_text list_compile routes seat local_socket header rewrite"
)
# decides, never waits
PROTOCOL = _modules("auth auth_exchange extensions commands submission terms transaction arrival session")
# facts in, verdict out
CHECKS = _modules("limits lookup recipients relay rules verify senders quota", "policy.")
CREDENTIALS = [
    *_modules("guessing memory turns", "credentials."),
    "credentials",
    *_modules("scram hashes senders directory file sql dovecot https oauth opening", "credentials."),
]
POLICY = ["sql", "dns", "dns_message", "nameservers", "policy", *CHECKS, *CREDENTIALS]
# keep
SPOOL = _modules(
    "record reader room bodies store scan trouble waiting commit census administration salvage recovery spool "
    "memory_spool"
)
# send; CLIENT is that side of SMTP and LMTP: files that serve one another, and see no transport
CLIENT = _modules("replies failures login body offers transaction opening dialogue", "delivery.")
SENDING = [
    *_modules("reasons returned dsn delivery delivery.hosts"),
    *CLIENT,
    *_modules("client_tls link pool smtp ahead odmr discard maildir runner pipe", "delivery."),
    *_modules("schedule destinations reporting fate telling queue"),
]
EDGE = ["tls_transport", "service", "connection", "gate"]
PROCESS = _modules(
    "certificates reload list_watch access claim folders check doors lookups outgoing control colleagues odmr "
    "customers generation holdings server supervisor"
)
FACE = _modules(
    "embed console command_line queue_text queue_command user_command reload_command counters_command sendmail "
    "as_command cli __main__"
)
LAYERS = (VALUES, PROTOCOL, POLICY, [*SPOOL, *SENDING], EDGE, PROCESS, FACE)
ORDER = {name: (layer, place) for layer, names in enumerate(LAYERS) for place, name in enumerate(names)}

# Where less is allowed than the layers say.
DELIVERY = {*VALUES, "delivery"}
SPOKEN = DELIVERY | set(CLIENT)
ONLY: Mapping[str, set[str]] = {
    # One check never imports another, nor what is above the values.
    "policy": set(VALUES),
    **{check: {*VALUES, "policy"} for check in CHECKS},
    # Transports see neither queue nor spool, nor each other; the queue sees none of them.
    "delivery": set(VALUES),
    # Where mail goes is found out by asking the cache; what asks name servers is wired to it.
    "dns": set(),
    "dns_message": {"dns"},
    "nameservers": {"dns", "dns_message"},
    "delivery.hosts": {*DELIVERY, "dns"},
    **dict.fromkeys(CLIENT, SPOKEN),
    # Each knows what stands under it: terms and TLS, one connection, many, hosts.
    "delivery.client_tls": {*DELIVERY, "delivery.offers"},
    "delivery.link": SPOKEN | {"delivery.client_tls"},
    "delivery.pool": SPOKEN | {"delivery.client_tls", "delivery.link"},
    "delivery.smtp": SPOKEN | {f"delivery.{name}" for name in ["client_tls", "link", "pool", "hosts"]},
    "delivery.ahead": DELIVERY | {"delivery.pool", "delivery.smtp"},
    # Its hosts are spoken to as all others are.
    "delivery.odmr": DELIVERY | {f"delivery.{name}" for name in ["client_tls", "failures", "offers", "pool", "smtp"]},
    "delivery.discard": DELIVERY,
    "delivery.maildir": DELIVERY,
    # Run as root in a process of its own: it sees nothing of the server.
    "delivery.runner": set(),
    "delivery.pipe": {*DELIVERY, "delivery.body", "delivery.runner"},
    "schedule": set(VALUES),
    "destinations": {*DELIVERY, "schedule"},
    "reporting": {*VALUES, "dsn"},
    "fate": {*DELIVERY, "dsn", "schedule", "reporting"},
    "telling": {*VALUES, "bodies", "reporting", "fate"},
    "queue": {*DELIVERY, "schedule", "destinations", "reporting", "fate", "telling", "selection"},
    # A report is made of a message; who keeps and sends it is not its business.
    "returned": set(VALUES),
    "dsn": {*VALUES, "reasons", "returned"},
    # What keeps messages is reached through the words of job.py.
    "service": {*VALUES, "extensions", "commands", "terms", "session", "policy"},
    "tls_transport": set(),
    "connection": {*VALUES, "extensions", "commands", "session", "policy", "service", "tls_transport"},
    "gate": {*VALUES, "service", "connection", "tls_transport"},
}
WORLD = {"asyncio", "socket", "ssl", "threading", "os"}
NEVER: Mapping[str, set[str]] = {
    **dict.fromkeys(PROTOCOL, WORLD),
    **dict.fromkeys(CLIENT, WORLD),
    "delivery.body": WORLD - {"os"},
}
# Packages that one part of the program has to itself.
OWNERS: Mapping[str, set[str]] = {
    "apsw": {"store", "reader", "scan", "salvage", "recovery", "administration", "spool", "sql"},
    "psycopg": {"sql"},
    "sqlite3": set(),
    "uvloop": {"server"},
    "pydantic": {
        *("config", "config_access", "config_auth", "config_inbound", "config_values", "config_outgoing"),
        *("config_submission", "config_tables", "config_sections", "config_lists"),
    },
    "cryptography": {"certificates"},
    "click": {
        *("cli", "command_line", "user_command", "reload_command", "counters_command", "queue_command", "queue_text"),
    },
    "rich": {"queue_text"},
    "idna": {"address"},
    "dns": {"dns_message"},
    "argon2": {"credentials.hashes"},
    "h11": {"credentials.https"},
    "jwt": {"credentials.oauth"},
}


class Imports(NamedTuple):
    """`own` are modules of the package, by their names in it; `others` are top-level names."""

    own: set[str]
    others: set[str]


def _statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, also those inside functions; not those for the type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _statements(other)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from _statements(child)


def read_imports(name: str, source: str, modules: set[str]) -> Imports:
    """What the module `name` imports. `modules` are all there are."""
    own: set[str] = set()
    others: set[str] = set()
    is_package = any(module.startswith(f"{name}.") for module in modules)
    for statement in _statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            base = statement.module or ""
            if statement.level:
                parents = name.split(".") if is_package else name.split(".")[:-1]
                parents = parents[: len(parents) - (statement.level - 1)]
                base = ".".join(["fastsmtp", *parents, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in statement.names]
        for full in names:
            package, _, inside = full.partition(".")
            if package != "fastsmtp":
                others.add(package)
                continue
            # `from .x import name` names a module x, unless x.name is one itself.
            while inside and inside not in modules:
                inside = inside.rpartition(".")[0]
            own.add(inside)
    return Imports(own - {""}, others)


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is imported and may not be."""
    modules = set(sources) | {"_parser", "_files", "_shared"}
    found = []
    for name, source in sources.items():
        if name not in ORDER:
            found.append(f"{name} stands in no layer")
            continue
        imports = read_imports(name, source, modules)
        for other in imports.own:
            if other not in ORDER:
                found.append(f"{name} imports {other}, which stands in no layer")
            elif ORDER[other] >= ORDER[name] or (name in ONLY and other not in ONLY[name]):
                found.append(f"{name} imports {other}")
        found += [f"{name} imports {other}" for other in imports.others & NEVER.get(name, set())]
        found += [f"{name} imports {other}" for other in imports.others & set(OWNERS) if name not in OWNERS[other]]
    return found


def sources() -> dict[str, str]:
    """The Python sources of the package, by their names in it."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":  # the public names
            found[name] = path.read_text()
    return found


def test_layers() -> None:
    assert violations(sources()) == []


def test_the_table_for_people_is_this_one() -> None:
    text = (SOURCE.parent / "docs/architecture.md").read_text()
    rows = [re.findall(r"`([^`]+)`", row) for row in re.findall(r"^\| \d .*? \| (.+) \|$", text, re.MULTILINE)]
    assert len(rows) == len(LAYERS)
    for row, names in zip(rows, LAYERS, strict=True):
        assert [name for name in names if name in row] == [name for name in row if "*" not in name]
        assert [name for name in names if not any(fnmatchcase(name, pattern) for pattern in row)] == []


def test_every_row_is_a_module() -> None:
    assert set(ORDER) - {"_parser", "_files", "_shared"} == set(sources())
    assert {*ONLY, *NEVER} <= set(ORDER)


PLANTED = {
    "upward": ("message", "from .session import Session", "message imports session"),
    "upward, the whole module": ("address", "from . import server", "address imports server"),
    "to the right": ("reply", "from . import verdict", "reply imports verdict"),
    "itself": ("store", "from .store import x", "store imports store"),
    "absolute": ("tls", "import fastsmtp.session", "tls imports session"),
    "absolute, from": ("tls", "from fastsmtp.session import Session", "tls imports session"),
    "in a function": ("tls", "def f():\n    from .session import Session", "tls imports session"),
    "from a package": ("policy.recipients", "from ..spool import Spool", "policy.recipients imports spool"),
    "a package": ("session", "from .policy import Policy", "session imports policy"),
    "I/O in the protocol": ("session", "import asyncio", "session imports asyncio"),
    "I/O in the dialogue": ("delivery.dialogue", "import socket", "delivery.dialogue imports socket"),
    "the dialogue and a transport": (
        "delivery.dialogue",
        "from .hosts import x",
        "delivery.dialogue imports delivery.hosts",
    ),
    "the link and its pool": ("delivery.link", "from .pool import Pool", "delivery.link imports delivery.pool"),
    "SMTP and another transport": (
        "delivery.smtp",
        "from .maildir import Maildir",
        "delivery.smtp imports delivery.maildir",
    ),
    "I/O in the protocol, from": ("commands", "from os.path import join", "commands imports os"),
    "a transport and the queue": ("delivery.maildir", "from ..queue import Queue", "delivery.maildir imports queue"),
    "a transport and the spool": ("delivery.discard", "from ..spool import Spool", "delivery.discard imports spool"),
    "two transports": ("delivery.maildir", "from .discard import Discard", "delivery.maildir imports delivery.discard"),
    "the queue and a transport": ("queue", "from .delivery.maildir import M", "queue imports delivery.maildir"),
    "the queue and the spool": ("queue", "from .spool import Spool", "queue imports spool"),
    "reports and the queue": ("dsn", "from .queue import Queue", "dsn imports queue"),
    "the connection and the spool": ("connection", "from .spool import Spool", "connection imports spool"),
    "a database elsewhere": ("queue", "import apsw.ext", "queue imports apsw"),
    "the other database": ("store", "import sqlite3", "store imports sqlite3"),
    "nobody imports the command line": ("supervisor", "from .cli import main", "supervisor imports cli"),
}


@pytest.mark.parametrize(("name", "statement", "found"), PLANTED.values(), ids=PLANTED)
def test_what_may_not_be_is_found(name: str, statement: str, found: str) -> None:
    planted = sources()
    planted[name] += f"\n{statement}\n"
    assert violations(planted) == [found]


def test_what_is_allowed_is_not_found() -> None:
    planted = sources()
    planted["verdict"] += "\nfrom .reply import R250_OK\n"
    planted["tls"] += "\nif TYPE_CHECKING:\n    from .session import Session\n"
    planted["spool"] += "\nimport apsw\nimport os\n"
    assert violations(planted) == []


def test_a_module_in_no_layer_is_found() -> None:
    assert violations({**sources(), "helpers": ""}) == ["helpers stands in no layer"]
