"""The README: its configuration is valid, its make targets and links exist. Its program runs in test_embed.py."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fastsmtp import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_configuration_is_valid() -> None:
    example = re.search(r"```toml\n(.*?)```", README, re.DOTALL)
    assert example is not None
    parsed = config.parse(example[1], Path("/etc"), "README.md")
    assert parsed.hostname == "mx1.example.org"
    assert [str(endpoint) for endpoint in parsed.listener[0].address] == ["0.0.0.0:25", "[::]:25"]
    assert parsed.listener[0].tls == "starttls"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z]+)", README))))
def test_the_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_the_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).is_file()
