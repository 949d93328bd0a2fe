"""Who may send as whom: the reverse-path of a user must be one of those that the user may use.

In: MAIL's address and the user's name. Out: 553 5.7.1 for another's; nothing else, so that the checks behind this one
are asked too. The null reverse-path is allowed, as programs of users answer with it (RFC 8098 3), but not to who has no
address at all: one who was deleted while he was here. The user's rights are left at the client, for the header is
looked at with them later (submission.py). Who is no user is nobody's business here. 451 where the store of users cannot
be asked. RFC 6409 6.1; RFC 4954 5.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ..reply import R451_RIGHTS_UNKNOWN, R553_PATH_NOT_YOURS
from ..rights import Rights
from ..verdict import Ask, Stage, Verdict

PATH_NOT_YOURS = Verdict("path-not-yours", R553_PATH_NOT_YOURS)
RIGHTS_UNKNOWN = Verdict("rights-unknown", R451_RIGHTS_UNKNOWN)


class Senders:
    """The check at MAIL. `rights` looks up what a user may send as; None: it cannot now."""

    stage = Stage.MAIL

    def __init__(self, rights: Callable[[str], Rights | Awaitable[Rights | None] | None]) -> None:
        self._rights = rights

    def __call__(self, ask: Ask) -> Verdict | Awaitable[Verdict | None] | None:
        if not ask.client.user:
            return None
        rights = self._rights(ask.client.user)
        return _judge(ask, rights) if rights is None or isinstance(rights, Rights) else self._wait(ask, rights)

    async def _wait(self, ask: Ask, rights: Awaitable[Rights | None]) -> Verdict | None:
        return _judge(ask, await rights)


def _judge(ask: Ask, rights: Rights | None) -> Verdict | None:
    ask.client.rights = rights
    if rights is None:
        return RIGHTS_UNKNOWN
    may = rights.allows(ask.reverse_path) if ask.reverse_path else bool(rights.addresses or rights.domains)
    return None if may else PATH_NOT_YOURS
