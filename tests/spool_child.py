"""Run as a program: keeps messages in the spool of argv[1] and says so, until it is killed or has kept argv[2].

Lines: "acked ID CRC" when the answer was STORED, "finishing ID" before a message is marked finished. The process
opens a spool after it was killed as well. Sizes go up to argv[3] octets.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from pathlib import Path
from zlib import crc32

from keeping import INLINE, letter, octets, run

from fastsmtp.job import Job, Mark
from fastsmtp.log import Log
from fastsmtp.spool import Spool
from fastsmtp.verdict import STORED, Refused, Stored


async def main(directory: Path, count: int, greatest: int, parallel: int) -> None:
    loop = asyncio.get_running_loop()
    log = Log(2, False, time.time, threaded=False)
    spool = Spool(directory, 0, loop=loop, log=log, inline=INLINE, min_free=0, memory=32 << 20)
    spool.open()
    kept = 0
    full = asyncio.Semaphore(parallel)
    chance = random.Random(os.getpid())

    def stored(jobs: list[Job]) -> None:
        marks = []
        for job in jobs:
            if chance.random() < 0.5:
                os.write(1, f"finishing {job.message.id}\n".encode())
                marks.append(Mark(job.key, 0))
        spool.finish(marks)

    spool.on_stored = stored

    def send() -> None:
        body = octets(int(greatest ** chance.random()), chance.randrange(1 << 20))
        message, draft = letter(spool, body)

        def answered(answer: Stored | Refused) -> None:
            nonlocal kept
            assert answer is STORED
            os.write(1, f"acked {message.id} {crc32(body)}\n".encode())
            kept += 1
            full.release()

        spool.append(message, draft, answered)

    while kept < count:
        await full.acquire()
        send()
        if parallel == 1:
            await full.acquire()
            full.release()
    await spool.close()


if __name__ == "__main__":
    parallel = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), parallel))
