"""What a machine is, for whoever reads figures that were measured on it.

In: the folder in which data lay. Out: a dict for the JSON file and the tables. Nothing here measures or fails: what
cannot be read is missing.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def describe_machine(folder: Path) -> dict[str, Any]:
    found = {
        "processor": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": _memory(),
        "kernel": platform.release(),
        "system": _system(),
        "file system": file_system(folder),
        "python": platform.python_version(),
    }
    return {name: value for name, value in found.items() if value}


def file_system(folder: Path) -> str:
    """The kind of the file system that a folder is on, or ""."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            where, _, what = line.partition(" - ")
            if where.split()[2] == number:
                return what.split()[0]
    except OSError:
        pass
    return ""


def _line(file: str, name: str) -> str:
    try:
        for line in Path(file).read_text().splitlines():
            key, separator, value = line.partition(":")
            if separator and key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return ""


def _memory() -> str:
    kilobytes = _line("/proc/meminfo", "MemTotal").removesuffix(" kB")
    return f"{int(kilobytes) / 1e6:.0f} GB" if kilobytes.isdecimal() else ""


def _system() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    return release.get("PRETTY_NAME", "")
