"""Run as a program in the folder argv[1]: keeps messages, then one commit's flush fails; ends itself like kill -9.

argv[2] is the moment: "refused" when a sender was told 4xx, "undecided" when the commit has failed and nobody was
told. Lines: "acked ID" and "4xx ID".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import apsw
from keeping import Answers, Yard, injected, keep, letter, run

from fastsmtp.store import Store
from fastsmtp.verdict import Refused


async def main(path: Path, moment: str) -> None:
    yard = Yard(path)
    with injected() as faults:
        spool = yard.spool()
        spool.open()
        for _ in range(5):
            message = await keep(spool)
            os.write(1, f"acked {message.id}\n".encode())
        if moment == "undecided":
            patch.object(Store, "recover", lambda self, keys: os._exit(9)).start()
        faults.fail(apsw.IOError, "sync", times=1)
        answers = Answers()
        message, draft = letter(spool)
        spool.append(message, draft, answers)
        (answer,) = await answers.wait(1)
        if isinstance(answer, Refused) and answer.reply is not None:
            os.write(1, f"4xx {message.id}\n".encode())
        os._exit(9)


if __name__ == "__main__":
    run(main(Path(sys.argv[1]), sys.argv[2]))
