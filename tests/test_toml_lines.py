"""Lines of TOML documents. In each document every number is the line it stands on: that is the oracle."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsmtp.toml_lines import Lines, Place

DOCUMENTS = {
    "plain": 'a = @\n\n# c = 9\n  b   =   @ # = [x]\n"c d" = @\n\'e"f\' = @\n"\\u00e9\\"" = @\n-_1 = @',
    "dotted": 'a.b . "c.d" = @\na.e=@\nx.y = {z = @, w.v = @}\n',
    "tables": 'a = @\n[t]\nb = @\n[ t . "u.v" ] # ]\nc = @\n[w.x.y]\nd = @\n[w]\ne = @\n',
    "arrays": "[[t]]\na = @\n[[ t ]]\na = @\n[t.u]\nb = @\n[[t.v]]\nc = @\n[[t.v]]\nc = @\n[[t]]\n[t.u]\nb = @",
    "lists": "a = [\n @, # 5\n @,\n\n [@, @,\n @], [],\n]\nb = [@]\nc = [ {d = @}, {e = [@,\n@]}\n]\nf = @",
    "strings": 'a = "x # \\" = ["\nb = @\nc = \'\\\'\nd = @\ne = """\n[t]\nq = 1\\\n""\\"" """\nf = @\n'
               "g = '''\n[[t]]''x\n'''\nh = @\ni = '''''a'''''\nj = @\nk = \"\"\"\"\"b\"\"\"\"\"\nl = @\n"
               "m = \"\"\nn = @\n"
               "o = ''\np = @\nq = \"\"\"\"\"\"\nr = @\ns = '[['\nt = @",
    "scalars": "a = 1.5e-3\nb = 1979-05-27 07:32:00.5Z\nc = @\nd = [1.5, true, inf, -nan,\n"
               "1979-05-27, 07:32:00 ]\ne = 0xff\nf = @\ng = {h = 1.5, i = @}\n",
    "blanks": "\n\n\t\n   [t]   \n\t a\t=\t@\n\n\n[[u]]\n\n\nb = [\n\n\n@\n\n,]\nc = {}\nd = @\n\n",
    "empty": "",
}  # fmt: skip


def number(text: str) -> str:
    return "\n".join(line.replace("@", str(i)) for i, line in enumerate(text.split("\n"), 1))


def numbers(value: Any, place: Place = ()) -> list[tuple[Place, int]]:
    """All whole numbers but the 255 of a document, with their places."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, inside in items for found in numbers(inside, (*place, key))]
    return [(place, value)] if type(value) is int and value != 255 else []


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_number_stands_on_its_line(text: str) -> None:
    lines = Lines(number(text))
    found = numbers(tomllib.loads(number(text)))
    assert len(found) == text.count("@")
    for place, line in found:
        assert lines.line(place) == line, place


HEADERS = ["[a]", "[[b]]", "[b.c]", "[[b.d]]", "[a.e]", '["x]".y]', "", "# '\"", "[b.d.f]", "[[a.g]]"]
VALUES = ["@", '"#"', "[@,\n@]", "{s = @, t = [@]}", '"""\n[u]\n"""', "[\n[@], # ]\n'''\n]''',{v=@}]", "1.5"]
PAIRS = [f"{key} = {value}" for key in ("k", "l.m", '"n o".p', "q", "r") for value in VALUES]


@given(st.lists(st.sampled_from(HEADERS + PAIRS), max_size=25).map("\n".join))
def test_made_up_documents(text: str) -> None:
    text = number(text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = Lines(text)
    for place, line in numbers(document):
        assert lines.line(place) == line, place


def test_tables_stand_at_their_headers() -> None:
    lines = Lines("a = 1\n[t]\nb = 1\n[[u]]\nc = 1\n[[u]]\n[u.v]\n")
    places: list[Place] = [("t",), ("u",), ("u", 0), ("u", 1), ("u", 1, "v")]
    assert [lines.line(place) for place in places] == [2, 4, 4, 6, 7]


def test_what_is_missing_stands_where_it_would_have_been() -> None:
    lines = Lines("\n[[t]]\na = 1\n[[t]]\n\nb = 'x'\n")
    assert lines.line(("t", 1, "c")) == 4
    assert lines.line(("t", 1, "b", 0)) == 6
    assert lines.line(("z",)) == 1
    assert lines.line(()) == 1
