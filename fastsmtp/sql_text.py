"""The text of an SQL query that an operator wrote: which values it asks for, and how a driver wants them named.

In: a query with `:name` where a value belongs. Out: the names, or the same query for psycopg. Colons in strings, quoted
names, comments and casts are no value's. Nothing else of a query is understood here, and nothing is put into it: values
are bound by the driver. Not here: asking (sql.py).
"""

from __future__ import annotations

import re
from functools import lru_cache

# What may hold a colon that is no value's: strings, names, comments, casts.
_TOKENS = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]* | /\*.*?\*/ | (\$\w*\$).*?\1 | ::\w+ | % |
    :(?P<name>[A-Za-z_]\w*)""",
    re.VERBOSE | re.DOTALL,
)


@lru_cache(maxsize=256)
def names_in(query: str) -> frozenset[str]:
    """The values that a query asks for."""
    return frozenset(found["name"] for found in _TOKENS.finditer(query) if found["name"])


_ALWAYS = re.compile(r"\s*SELECT\s+(?:NOT\s+)?(?:COUNT|EXISTS|MAX|MIN|SUM|BOOL_OR)\s*\(", re.IGNORECASE)
_PERHAPS = re.compile(r"\b(?:GROUP\s+BY|HAVING)\b", re.IGNORECASE)


def always_finds(query: str) -> bool:
    """Whether a query has a row whatever it is asked, as `SELECT count(*) ...` has: the answer is in the row then."""
    return _ALWAYS.match(query) is not None and _PERHAPS.search(query) is None


@lru_cache(maxsize=256)
def as_psycopg(query: str) -> str:
    """With `%(name)s` for `:name`, and every other `%` doubled."""

    def replace(found: re.Match[str]) -> str:
        return f"%({found['name']})s" if found["name"] else found[0].replace("%", "%%")

    return _TOKENS.sub(replace, query)
