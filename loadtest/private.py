"""A view of the file system that one server has to itself: the machine's own configuration is not touched.

In: unpacked packages, files for /etc, folders to be seen elsewhere. Out: a command that runs another one in a mount
namespace of its own: there /usr and /etc show the packages and our files above the machine's, with users, hosts and
resolver of our making (no name server is asked), and the scratch folder stands at INSIDE, which everyone may reach even
when it lies below a home directory. Always: the view ends with the last process in it; the machine's files are not
written (the overlays are read-only). Needs root and overlayfs. On failure: LoadError; mount(8)'s own words in the log.
mount_namespaces(7).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import LoadError
from .processes import find_program

INSIDE = Path("/mnt")
# Name: number of user and group. Far from what a machine gives out.
USERS = {
    "postfix": 52501,
    "postdrop": 52502,
    "Debian-exim": 52503,
    "opensmtpd": 52504,
    "opensmtpq": 52505,
    "mailbox": 52506,
}
_PASSWD = "".join(
    (
        "root:x:0:0:root:/root:/bin/sh\n",
        "daemon:x:1:1:daemon:/:/usr/sbin/nologin\n",
        "mail:x:8:8:mail:/:/usr/sbin/nologin\n",
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        *(f"{name}:x:{number}:{number}:{name}:/:/usr/sbin/nologin\n" for name, number in USERS.items()),
    )
)
_GROUP = "".join(
    (
        "root:x:0:\ndaemon:x:1:\nadm:x:4:\nmail:x:8:\nnogroup:x:65534:\n",
        *(f"{name}:x:{number}:\n" for name, number in USERS.items()),
    )
)
_FILES = {
    "passwd": _PASSWD,
    "group": _GROUP,
    "hosts": "127.0.0.1 localhost mx.y.test\n",
    "resolv.conf": "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "mailname": "mx.y.test\n",
}


def own(path: Path, user: str) -> None:
    os.chown(path, USERS[user], USERS[user])


def private_command(
    folder: Path, trees: Sequence[Path], etc: Mapping[str, str], binds: Mapping[str, str], command: Sequence[str]
) -> list[str]:
    """`command` in a view of its own; `binds` has folders below `folder` and where they are to be seen, such as in
    /var/spool, of which nothing else is seen then. Raises LoadError.
    """
    if os.geteuid() != 0:
        raise LoadError("a file system view of its own needs root")
    if any(letter in str(path) for path in (folder, *trees) for letter in ':,\\"'):
        raise LoadError(f"{folder}: overlayfs takes no path with a colon, comma, quote or backslash; use --dir")
    top = folder / "etc"
    for name, text in {**_FILES, **etc}.items():
        file = top / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    steps = []
    for name in ("usr", "etc"):
        layers = [str(tree / name) for tree in trees if (tree / name).is_dir()]
        if name == "etc":
            layers.insert(0, str(top))
        if layers:
            below = ":".join([*layers, f"/{name}"])
            steps.append(f"mount -t overlay overlay -o ro,lowerdir={shlex.quote(below)} /{name}")
    for top_of in sorted({"/".join(place.split("/")[:3]) for place in binds.values()}):
        # An empty folder of ours, such as /var/spool, in which the places can be seen.
        ours = folder / "view" / top_of.lstrip("/")
        for place in binds.values():
            if place.startswith(f"{top_of}/"):
                (ours / Path(place).relative_to(top_of)).mkdir(parents=True, exist_ok=True)
        steps.append(f"mount --bind {INSIDE / ours.relative_to(folder)} {top_of}")
    # First, so that it can be reached whatever hides its own path.
    places = [f"mount --bind {shlex.quote(str(folder))} {INSIDE}", *steps]
    places += [f"mount --bind {shlex.quote(str(INSIDE / source))} {place}" for source, place in binds.items()]
    # No log daemon, and no socket of the machine's own servers.
    places += ["mount -t tmpfs tmpfs /run", f"cd {INSIDE}", 'exec "$@"']
    script = " && ".join(places)
    unshare = find_program("unshare", "util-linux")
    return [unshare, "--mount", "--propagation", "private", "/bin/sh", "-c", script, "sh", *command]
