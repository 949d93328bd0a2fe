"""What a configuration may say of rules, lists and aliases, and what it is told where that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import errors, read

from fastsmtp.config import InFile, warnings
from fastsmtp.list_watch import files_of
from fastsmtp.lists import ListFile

HERE = """\
[[domain]]
name = "here.test"
transport = "x"
recipients = ["ann"]
"""
BOXES = '[transport.x]\ntype = "discard"\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            '[[rule]]\naction = "drop"\n',
            '2: rule[0].action: expected "allow", "refuse" or "defer", found "drop"',
        ),
        ('[[rule]]\nclient = []\naction = "refuse"\n', "2: rule[0].client: expected at least one entry, found a list"),
        (
            '[[rule]]\nclient = ["192.0.2.1/24"]\naction = "refuse"\n',
            "2: rule[0].client[0]: expected a network such as",
        ),
        (
            '[[rule]]\nclient = {path = "x"}\naction = "refuse"\n',
            '2: rule[0].client: expected {file = "PATH"}, found a table',
        ),
        ('[[rule]]\nclient = "x"\naction = "refuse"\n', '2: rule[0].client: expected {file = "PATH"}, found "x"'),
        ('[[rule]]\nhelo = ["a@b"]\naction = "refuse"\n', "2: rule[0].helo[0]: expected a name such as"),
        ('[[rule]]\nsender = ["a..b"]\naction = "refuse"\n', "2: rule[0].sender[0]: expected an address, a domain"),
        ('[[rule]]\nname = "A b"\naction = "refuse"\n', "2: rule[0].name: expected a name of lower-case letters"),
        ('[[rule]]\ntext = "a\\nb"\naction = "refuse"\n', "2: rule[0].text: expected a text of at most 400"),
        ('[[rule]]\ntext = "x"\naction = "allow"\n', "2: rule[0].text: nobody is told anything who is let in"),
        (
            '[[rule]]\nname = "2"\naction = "allow"\n[[rule]]\naction = "refuse"\n',
            "4: rule[1].name: a rule before it is called 2",
        ),
        (HERE + 'catch_all = "a@else.test"\n' + BOXES, "5: domain[0].catch_all: no [[domain]] serves else.test"),
        (HERE + 'catch_all = "a"\n' + BOXES, "5: domain[0].catch_all: expected an address such as"),
        (HERE + 'detail = "++"\n' + BOXES, '5: domain[0].detail: expected one of "+"'),
        (HERE + 'detail = "@"\n' + BOXES, '5: domain[0].detail: expected one of "+"'),
        (
            '[inbound]\nexceptions = {path = "x"}\n',
            '2: inbound.exceptions: expected {file = "PATH"}, found a table',
        ),
        ("[alias]\nmembers = 0\n", "2: alias.members: expected at least 1, found 0"),
        (
            HERE.replace('["ann"]', '{path = "x"}') + BOXES,
            '4: domain[0].recipients: expected "any", a list of local-parts, {file = "PATH"}, ',
        ),
    ],
)
def test_what_is_wrong(text: str, found: str) -> None:
    (error,) = errors(text)
    assert error.startswith(found)


def test_lists_that_are_named() -> None:
    config = read(
        HERE.replace('["ann"]', '{file = "boxes"}')
        + 'aliases = "own"\n'
        + HERE.replace('["ann"]', '{file = "/boxes"}').replace("here", "case")
        + "case_sensitive = true\n"
        + HERE.replace('["ann"]', '{file = "boxes"}').replace("here", "more")
        + BOXES
        + '[alias]\nfile = "aliases"\n'
        + '[[rule]]\naction = "refuse"\nclient = {file = "nets"}\nhelo = {file = "names"}\nsender = ["a@b"]\n'
        + '[[rule]]\naction = "refuse"\nsender = {file = "bad"}\nrecipient = {file = "bad"}\n'
        + '[inbound]\nexceptions = {file = "free"}\n'
    )
    conf = Path("/srv/conf")
    assert config.domain[0].recipients == InFile(conf / "boxes")
    assert files_of(config) == [
        ListFile("mailboxes", conf / "boxes"),
        ListFile("aliases", conf / "own"),
        ListFile("mailboxes-case", Path("/boxes")),
        ListFile("aliases", conf / "aliases"),
        ListFile("networks", conf / "free"),
        ListFile("networks", conf / "nets"),
        ListFile("names", conf / "names"),
        ListFile("addresses", conf / "bad"),
    ]


def test_a_catch_all_that_catches_nothing_is_warned_of() -> None:
    config = read(HERE.replace('["ann"]', '"any"') + 'catch_all = "rest@here.test"\n' + BOXES)
    assert any("catch_all gets nothing" in warning for warning in warnings(config))
