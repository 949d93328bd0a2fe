"""Builds what is C: the three Cython modules, and the Python modules on the path of every message.

Those are compiled by mypyc, from the source that is read and edited, and take half the time then. All works without
too: `FASTSMTP_PURE=1` leaves them as they are. Everything else stands in pyproject.toml.
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

# -O3 lets the compiler vectorise the scan loops. FASTSMTP_CFLAGS is for sanitizer builds.
FLAGS = ["-O3", *os.environ.get("FASTSMTP_CFLAGS", "").split()]

EXTENSIONS = [
    Extension(f"fastsmtp.{name}", [f"fastsmtp/{name}.pyx"], extra_compile_args=FLAGS, extra_link_args=FLAGS)
    for name in ("_parser", "_files", "_shared")
]
DIRECTIVES = {
    "language_level": "3",
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
}


HOT = (
    *("address", "arrival", "bodies", "commands", "commit", "connection", "destinations", "domains", "doors"),
    *("extensions", "fate", "gate", "ids", "job", "lists", "log", "memory_spool", "message", "outlet", "patterns"),
    *("queue", "record", "reply", "room", "routes", "service", "session", "spool", "telling", "terms"),
    *("tls_transport", "transaction", "verdict", "waiting"),
    *("delivery/__init__", "delivery/body", "delivery/dialogue", "delivery/discard", "delivery/link"),
    *("delivery/maildir", "delivery/offers", "delivery/opening", "delivery/replies", "delivery/transaction"),
    *("policy/__init__", "policy/limits", "policy/lookup", "policy/quota", "policy/recipients", "policy/relay"),
    *("policy/rules", "policy/senders"),
)


def compiled() -> list[Extension]:
    """The hot modules as mypyc makes them: one library, and a stub for each."""
    from mypyc.build import mypycify

    files = [f"fastsmtp/{name}.py" for name in HOT]
    # Types of what is not installed while it is built are unknown then, and checked when they are used.
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    extensions: list[Extension] = mypycify([*options, *files], group_name="fastsmtp", debug_level="0")
    return extensions


modules = []
# pip asks for metadata twice before it builds: nothing is translated for that.
if not {"egg_info", "dist_info"}.intersection(sys.argv):
    if os.environ.get("FASTSMTP_PURE", "") in ("", "0"):
        modules += compiled()
    modules += cythonize(EXTENSIONS, compiler_directives=DIRECTIVES)
# The hot modules are one long C file, and begin; all others are compiled beside it.
setup(ext_modules=modules, options={"build_ext": {"parallel": True}})
