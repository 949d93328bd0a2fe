"""What docs/*.md hold that can be run: blocks under headings, commands with what they print, and who has tried them.

In: a document's name. Out: its text, its blocks by the heading above them, tests of sections. Of a section all blocks
must be taken, in their order. In what a command prints `...` stands for any lines; ids, times and sizes may be others.
Not here: what differs on this machine; each document's site knows that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from servers import ROOT, Server

BLOCK = re.compile(r"^```(?P<language>[a-z]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
ID = r"\b[0-9a-v]{20}\b"
# What may be another than in the document, and what it looks like then
LOOSE = {
    "id": ID,
    "time": r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}",
    "date": r"\w{3}, \d\d? \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}",
    "span": r"\b\d+[smhd](?:\d+[mh])?\b",
    "octets": r"\d+(?=  from | octets)",
    "seconds": r"\b\d{10}(?:\.\d+)?",
    "blanks": r" +",
}
_LOOSE = re.compile("|".join(f"(?P<{name}>{shape})" for name, shape in LOOSE.items()))

Site = TypeVar("Site")


class Block(NamedTuple):
    language: str
    text: str


class Section:
    """The blocks of a section, in their order; all of them must have been taken in the end."""

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = list(blocks)

    def take(self, language: str) -> str:
        block = self._blocks.pop(0)
        assert block.language == language, block
        return block.text

    def end(self) -> None:
        assert self._blocks == [], "not tried"


class Document:
    """`sections` are the blocks by their heading, `tried` the headings that have a test."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / "docs" / name).read_text()
        parts = re.split(r"^##+ (.*)$", self.text, flags=re.MULTILINE)
        found = zip(parts[1::2], parts[2::2], strict=True)
        self.sections = {title: [Block(*block.groups()) for block in BLOCK.finditer(text)] for title, text in found}
        self.tried: set[str] = set()

    def tries(self, title: str) -> Callable[[Callable[[Site, Section], None]], Callable[[Site], None]]:
        """Makes the test of a section, which must take all its blocks; it gets the fixture `site`."""

        def decorate(test: Callable[[Site, Section], None]) -> Callable[[Site], None]:
            def run(site: Site) -> None:
                section = Section(self.sections[title])
                test(site, section)
                section.end()

            self.tried.add(title)
            return run

        return decorate

    def check_all_tried(self) -> None:
        assert {title for title, blocks in self.sections.items() if blocks} - self.tried == set()
        assert len(BLOCK.findall(self.text)) == sum(map(len, self.sections.values()))


def commands(console: str) -> Iterator[tuple[str, str]]:
    """Those of a block, and what each prints."""
    for part in re.split(r"^(?=[$#] )", console, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        yield command[2:], expected


def serve(server: Server, configuration: str, dns: str) -> None:
    """Serves with it, and with a name server of the test."""
    if server.lines():
        assert server.stop() == 0, server.story("it does not stop")
    server.configuration = f'{configuration}\n[dns]\nservers = ["{dns}"]\nallow_loopback = true\n'
    server.start()


def pattern(expected: str) -> str:
    """A regular expression for what a command prints."""
    lines = []
    for line in expected.splitlines():
        made, at = "", 0
        for match in _LOOSE.finditer(line):
            made += re.escape(line[at : match.start()]) + LOOSE[str(match.lastgroup)]
            at = match.end()
        lines.append(r"(?:.*\n)*?" if line == "..." else made + re.escape(line[at:]) + r"\n")
    return "".join(lines).replace(re.escape("..."), ".*")


def install(folder: Path) -> None:
    """Makes the command `fastsmtp` in `folder`/bin."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "fastsmtp"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom fastsmtp.cli import main\nmain()\n"
    )
    program.chmod(0o755)
