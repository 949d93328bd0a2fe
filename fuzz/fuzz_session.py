"""Fuzzes a whole connection with atheris: `python fuzz/fuzz_session.py [-max_total_time=60] [CORPUS]`.

In: octets that libFuzzer makes; the first choose the listener, 0xfe cuts the reads, others from 0xc0 on stand for whole
commands, of which some are lines of AUTH. Policy, parser, session and
connection are real, transport and store are those of the tests. Nothing may raise or be logged as a bug, no draft may
be left over, what is unread stays bounded, and the connection ends.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

with atheris.instrument_imports(include=["fastsmtp"]):
    from users import Users
    from wire import make_service

    from fastsmtp.connection import UNREAD_LIMIT

WORDS = (
    b"EHLO c\r\n",
    b"LHLO c\r\n",
    b"HELO c\r\n",
    b"MAIL FROM:<a@b.test>\r\n",
    b"MAIL FROM:<> SIZE=9 BODY=BINARYMIME SMTPUTF8\r\n",
    b"RCPT TO:<ann@here.test>\r\n",
    b"RCPT TO:<x@any.test> NOTIFY=NEVER ORCPT=rfc822;",
    b"DATA\r\n",
    b"BDAT 5\r\n",
    b"BDAT 9 LAST\r\n",
    b"BDAT 0 LAST\r\n",
    b"RSET\r\n",
    b"NOOP\r\n",
    b"QUIT\r\n",
    b"VRFY x\r\n",
    b"HELP\r\n",
    b"STARTTLS\r\n",
    b"AUTH PLAIN\r\n",
    b"AUTH PLAIN AGFubgBzZWNyZXQ=\r\n",
    b"AUTH LOGIN\r\n",
    b"AUTH SCRAM-SHA-256 biwsbj1hbm4scj1hYmM=\r\n",
    b"AUTH XOAUTH2 dXNlcj1hbm4BYXV0aD1CZWFyZXIgd3JvbmcBAQ==\r\n",
    b"YW5u\r\n",
    b"c2VjcmV0\r\n",
    b"AGFubgBzZWNyZXQ=\r\n",
    b"=\r\n",
    b"*\r\n",
    b"A" * 13000,
    b"\r\n.\r\n",
    b"\r\n",
    b"\n.\n",
    b"\r",
    b"\n",
    b"x" * 999,
    b"Received: x\r\n",
    b"Delivered-To: ann@here.test\r\n",
    b"\xff\0",
)
ROLES = ("mx", "submission", "lmtp")
BARE = ("reject", "normalize", "keep")
LOOP = asyncio.new_event_loop()


def test_one(data: bytes) -> None:
    if len(data) < 2:
        return
    made = make_service(
        LOOP,
        ROLES[data[0] % 3],
        bare=BARE[data[0] // 3 % 3],
        early_refused=bool(data[1] & 1),
        message_size=2000,
        text_line=200,
        header=500,
        users=Users() if data[1] & 8 else None,
        auth_clear=True,
    )
    made.keeper.later = bool(data[1] & 2)
    made.keeper.full = bool(data[1] & 4)
    try:
        player = made.connect()
        for number, read in enumerate(data[2:].split(b"\xfe")):
            octets = b"".join([WORDS[octet % len(WORDS)] if octet >= 0xC0 else bytes([octet]) for octet in read])
            if not player.transport.reading:
                continue
            player.send(octets)
            assert player.connection.parser.unread <= UNREAD_LIMIT + len(octets)
            if number % 2:
                made.keeper.release()
        player.end()
        made.keeper.release()
        player.transport.settle()
        player.vanish()
        made.check_bugs(0)
        assert made.keeper.leaked == []
        assert made.service.connections() == []
    finally:
        made.close()


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one)
    atheris.Fuzz()
