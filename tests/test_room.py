"""How much may be taken, and the ballast."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from keeping import run

from fastsmtp.room import BALLAST_OCTETS, Ballast, Room
from fastsmtp.thread import OneThread


def test_the_ballast_is_allocated_given_up_and_made_again(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "ballast")
    for _ in range(2):
        ballast.make()
        assert ballast.there
        state = (tmp_path / "ballast").stat()
        assert state.st_size == BALLAST_OCTETS
        assert state.st_blocks * 512 >= BALLAST_OCTETS
    ballast.give_up()
    ballast.give_up()
    assert not ballast.there
    assert os.listdir(tmp_path) == []


def test_a_ballast_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    ballast = Ballast(tmp_path / "missing" / "ballast")
    ballast.make()
    assert not ballast.there


def test_the_disk_is_asked_once_a_second_and_the_ballast_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        thread = OneThread(asyncio.get_running_loop(), "x")
        now = 0.0
        room = Room(tmp_path, 0, 1000, lambda: now)
        assert not room.fits(0, thread)  # begins to make the ballast
        await thread.call(lambda: None)
        assert room.fits(0, thread)
        assert not room.fits(1 << 60, thread)
        room.drafts = 600
        room.jobs = 399
        assert room.fits(0, thread)
        room.jobs = 400
        assert not room.fits(0, thread)
        room.jobs = room.drafts = 0
        tmp_path.rename(tmp_path.with_name("moved"))
        assert room.fits(0, thread)  # not asked again yet
        now = 1.0
        assert not room.fits(0, thread)  # it cannot be asked: no room
        tmp_path.with_name("moved").rename(tmp_path)
        assert not room.fits(0, thread)
        now = 2.0
        assert room.fits(0, thread)
        await thread.close()

    run(main())
