"""Ids of messages."""

from __future__ import annotations

import pytest

from fastsmtp.ids import Ids, is_id, key_of


def test_keys_are_consecutive_and_in_the_id() -> None:
    ids = Ids(5, 0, lambda: 1.7e9)
    # over the edges of the digits that change seldom
    made = [ids.next() for _ in range(3000)]
    keys = [key_of(name) for name in made]
    assert keys == list(range(keys[0], keys[0] + 3000))
    assert made == sorted(made)
    assert all(is_id(name) for name in made)
    assert {name[13:15] for name in made} == {"05"}
    assert len({name[15:] for name in made}) == 1


@pytest.mark.parametrize("newest", [0, (1 << 20) - 2, (1 << 40) - 2, (1 << 62) - 2])
def test_a_key_is_greater_than_any_in_the_spool(newest: int) -> None:
    ids = Ids(0, newest, lambda: 0.0)
    assert [key_of(ids.next()) for _ in range(4)] == [newest + 1, newest + 2, newest + 3, newest + 4]


@pytest.mark.parametrize("wall", [-1e12, 0.0, 1.7e9, 4e9, 1e15])
def test_whatever_the_clock_says_a_key_has_63_bits(wall: float) -> None:
    assert 0 < key_of(Ids(0, 0, lambda: wall).next()) < 1 << 63


def test_two_starts_at_one_moment_give_different_ids() -> None:
    assert len({Ids(0, 0, lambda: 1.7e9).next() for _ in range(20)}) == 20


@pytest.mark.parametrize("text", ["", "0" * 19, "0" * 21, "w" * 20, "A" * 20, "../../../../etc/passw", "0" * 19 + "\n"])
def test_what_is_no_id(text: str) -> None:
    assert not is_id(text)
