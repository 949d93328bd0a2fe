"""What one worker asks of all workers of the machine, itself included: over their control sockets.

In: domains. Out: numbers, summed over all spools. An answer is there when all workers have given theirs, each for all
that lies in its spools; an order that was answered is durable. Raises UnreachableError when one of them does not
answer, or says that it cannot: what the others were told is done all the same.
Not here: what a request means (control.py), how an operator asks (console.py).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import local_socket
from .control import REQUEST_LIMIT
from .selection import Selection


class UnreachableError(Exception):
    """A worker cannot be asked; one line says why."""


class Colleagues:
    """Of a server with so many workers."""

    def __init__(self, data_dir: Path, workers: int) -> None:
        self._data_dir = data_dir
        self._workers = workers

    async def retry(self, domains: Sequence[str]) -> int:
        """Makes what is deferred for domains due now; how many messages."""
        return await self._sum({"do": "retry"}, domains, "messages")

    async def count(self, domains: Sequence[str], state: str) -> int:
        """How many recipients of domains are in a state (reader.STATES)."""
        return await self._sum({"do": "count", "state": state}, domains, "recipients")

    async def domains(self) -> set[str]:
        """Those that mail waits for."""
        found: set[str] = set()
        for items, _ in await self._ask({"do": "summary"}):
            for item in items:
                found.update(item["domains"])
        return found

    async def _sum(self, request: dict[str, Any], domains: Iterable[str], what: str) -> int:
        total = 0
        for domain in domains:
            answers = await self._ask({**request, **Selection(domain=domain).render()})
            total += sum(int(done[what]) for _, done in answers)
        return total

    async def _ask(self, request: dict[str, Any]) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """The items and the end of each worker's answer."""
        line = json.dumps(request).encode() + b"\n"
        answers = await asyncio.gather(*[self._ask_one(number, line) for number in range(self._workers)])
        return list(answers)

    async def _ask_one(self, worker: int, line: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            local_socket.connect(connection, self._data_dir, local_socket.CONTROL, worker)
            reader, writer = await asyncio.open_unix_connection(sock=connection, limit=REQUEST_LIMIT)
        except OSError as error:
            connection.close()
            raise UnreachableError(f"worker {worker}: {error.strerror}") from error
        items = []
        try:
            writer.write(line)
            while said := await reader.readline():
                answer = json.loads(said)
                if "item" in answer:
                    items.append(answer["item"])
                elif "done" in answer:
                    return items, answer["done"]
                elif "error" in answer:
                    raise UnreachableError(f"worker {worker}: {answer['error']}")
        except (OSError, ValueError) as error:
            raise UnreachableError(f"worker {worker}: {error}") from error
        finally:
            writer.close()
        raise UnreachableError(f"worker {worker} went away")
