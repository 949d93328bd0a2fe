"""README.md and docs/*.md name only what there is: files, commands and their options, keys, classes, links, targets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from fastsmtp.cli import main
from fastsmtp.config import SECTIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = [ROOT / name for name in (".", "docs", "fastsmtp", "tests", "loadtest", "bench", "fuzz")]
SOURCES = "\n".join(path.read_text() for path in (ROOT / "fastsmtp").rglob("*.py*") if path.suffix in (".py", ".pyx"))
SECTION = {section.heading: section for section in SECTIONS}


def quoted(text: str) -> set[str]:
    """What stands between backticks in prose."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return {" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)}


def commands(text: str) -> set[str]:
    """Command lines, in prose and in blocks."""
    lines = "\n".join(re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    typed = re.findall(r"^(?:[#$] )?((?:fastsmtp|python -m loadtest\S*) .*)", lines, re.MULTILINE)
    return {re.split(r" #| \| | > ", line)[0] for line in typed} | quoted(text)


def missing_files(text: str) -> Iterator[str]:
    for name in quoted(text):
        if re.fullmatch(r"[\w/]+\.(py|pyx|md)", name) and not any((folder / name).exists() for folder in FOLDERS):
            yield name


def missing_commands(text: str) -> Iterator[str]:
    for line in commands(text):
        program, *words = line.replace("python -m ", "").split()
        if program == "fastsmtp" and words:
            command: click.Command = main
        elif program == "loadtest":
            command = import_module("loadtest.__main__").commands
        elif program.startswith("loadtest.") and line.startswith("python"):
            if not (ROOT / f"{program.replace('.', '/')}.py").exists():
                yield line
            continue
        else:
            continue
        while isinstance(command, click.Group) and words and words[0].islower():
            found = command.get_command(click.Context(command), words.pop(0))
            if found is None:
                yield line
                break
            command = found
        else:
            known = {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
            yield from (f"{line}: {word}" for word in words if word.startswith("--") and word not in known | {"--help"})


def missing_keys(text: str) -> Iterator[str]:
    headings = {re.escape(heading).replace("NAME", "[a-zA-Z]+"): section for heading, section in SECTION.items()}
    for name in quoted(text):
        heading = re.match(r"\[\[[a-z_.]+\]\]|\[(?:[a-z_]+\.)?[a-zA-Z_]+\](?= \w|$)", name)
        dotted = re.fullmatch(r"([a-z]+)\.([a-z_]+)", name)
        if heading is not None:
            # `[sql]` is said of all tables `[sql.NAME]`.
            shapes = (heading[0], heading[0].replace("]", ".NAME]"))
            sections = [headings[shape] for shape in headings if any(re.fullmatch(shape, name) for name in shapes)]
            key = name.removeprefix(heading[0]).strip()
        elif dotted is not None and f"[{dotted[1]}]" in SECTION and not name.endswith((".py", ".md", ".db")):
            sections, key = [SECTION[f"[{dotted[1]}]"]], dotted[2]
        else:
            continue
        if not any(not key or key.split()[0] in section.keys for section in sections):
            yield name


def missing_classes(text: str) -> Iterator[str]:
    for name in quoted(text):
        parts = re.fullmatch(r"([A-Z][A-Za-z]+)\.([a-z_]+)", name)
        if parts and not (re.search(rf"class {parts[1]}\b", SOURCES) and re.search(rf"\b{parts[2]}\b", SOURCES)):
            yield name


def missing_links(text: str) -> Iterator[str]:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        if not any((folder / link).exists() for folder in (ROOT, ROOT / "docs")):
            yield link


def missing_targets(text: str) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in quoted(text):
        found = re.match(r"make ([a-z-]+)", line)
        if found and found[1] not in targets:
            yield line


CHECKS = (missing_files, missing_commands, missing_keys, missing_classes, missing_links, missing_targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_named_is_there(document: Path) -> None:
    text = document.read_text()
    assert {check.__name__: found for check in CHECKS if (found := list(check(text)))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("`gone.py` and `session.py`", ["gone.py"]),
        ("`fastsmtp queue gone`, `fastsmtp queue list`", ["fastsmtp queue gone"]),
        ("```\n# fastsmtp check --gone x\n```", ["fastsmtp check --gone x: --gone"]),
        ("`python -m loadtest gone` `python -m loadtest.gone`", ["python -m loadtest gone", "python -m loadtest.gone"]),
        ("`[gone]`, `[[domain]]`, `[relay] gone`, `queue.gone`", ["[gone]", "[relay] gone", "queue.gone"]),
        ("`Client.gone_away` `Client.user`", ["Client.gone_away"]),
        ("[x](gone.md) [y](docs/access.md)", ["gone.md"]),
        ("`make gone`, `make bench`", ["make gone"]),
    ],
)
def test_what_is_not_there_is_found(text: str, found: list[str]) -> None:
    assert sorted(name for check in CHECKS for name in check(text)) == found
