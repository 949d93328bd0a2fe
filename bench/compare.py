"""What a change costs: `make bench-compare BASE=<git revision>`, or python -m bench.compare BASE [--rounds N].

In: a revision. Out: a table of ratios, the working tree (with what is not committed) to BASE: each micro-benchmark, and
messages a second, CPU and latency of a short race, all in interleaved rounds with their spread. Both are copied to a
scratch folder and built there in the same way, with the same packages where both ask for the same; this tree's own
build is not touched. Always: the scratch folder and git's note of it are gone afterwards.
Exit code 0 also when the change is slower: the table says so; 1 when something could not be built or run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from loadtest import LoadError
from loadtest.comparison import Spread
from loadtest.comparison_text import render_table, show_spread
from loadtest.install import Installed, Store
from loadtest.measurements import say
from loadtest.peers import FSYNC, Peer, plan_fastsmtp
from loadtest.race import Load, Race, Terms
from loadtest.receive import make_folder

ROOT = Path(__file__).parents[1]
SIDES = ("base", "now")
BUILD_SECONDS = 1800.0
BENCH = ("-o", "python_files=bench_*.py", "-o", "python_functions=bench_* test_*", "--benchmark-only", "-q")
RACES = ("persistent", "churn")
HEAD = ("", "unit", "base", "now", "now / base", "")


@dataclass
class Figure:
    """One thing that was measured on both sides, a value for each round."""

    name: str
    unit: str
    less_is_better: bool
    base: list[float] = field(default_factory=list)
    now: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> Spread | None:
        """Of each round: what its two halves share of the machine's drift is not in it."""
        return Spread.of(now / base for base, now in zip(self.base, self.now, strict=False) if base)

    @property
    def verdict(self) -> str:
        """Where the two sides do not overlap: by chance that is one time in ten with 3 rounds, in 126 with 5."""
        if min(len(self.base), len(self.now)) < 3 or max(min(self.base), min(self.now)) <= min(
            max(self.base), max(self.now)
        ):
            return ""
        return "better" if (max(self.now) < min(self.base)) == self.less_is_better else "WORSE"


def render_figures(figures: Sequence[Figure]) -> str:
    rows = [HEAD]
    for one in figures:
        values = (show_spread(Spread.of(one.base)), show_spread(Spread.of(one.now)), show_spread(one.ratio))
        rows.append((one.name, one.unit, *values, one.verdict))
    return render_table(rows, texts=2)


def run(command: Sequence[str], folder: Path, what: str, environment: dict[str, str] | None = None) -> str:
    """What it printed. Raises LoadError."""
    try:
        ended = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoadError(f"{what}: {error}") from None
    if ended.returncode:
        said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
        errors = [line.removeprefix("E ") for line in said if line.startswith("E  ")]  # pytest's, far from its end
        why = [*errors[:1], *said[-1:], f"exit code {ended.returncode}"][0]
        raise LoadError(f"{what}: {why.strip()[:300]}")
    return ended.stdout


@contextmanager
def worktree(root: Path, revision: str, folder: Path) -> Iterator[Path]:
    """A revision's files, as long as the block runs. Raises LoadError."""
    run(["git", "worktree", "add", "--detach", "--force", str(folder), revision], root, f"git has no {revision}")
    try:
        yield folder
    finally:
        # Also after Ctrl-C in the middle of a build: what git forgets must not be left, nor the other way round.
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run(["git", "worktree", "prune"], cwd=root, capture_output=True, check=False)


def copy_working_tree(root: Path, folder: Path) -> None:
    """What git knows and what is new, as it is now; nothing that was built. Raises LoadError."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], root, "git lists no files")
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # else removed, and not committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


@dataclass(frozen=True)
class Side:
    """One of the two: its files, built, and the Python that runs them."""

    name: str
    tree: Path
    python: str


def requirements(tree: Path) -> tuple[str, ...]:
    """What building, running and benchmarking a tree asks for. Raises LoadError."""
    try:
        project = tomllib.loads((tree / "pyproject.toml").read_text())
        wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
        return tuple(sorted({*wanted, *project["project"]["optional-dependencies"]["bench"]}))
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise LoadError(f"{tree} cannot be built: {error}") from None


def python_with(wanted: tuple[str, ...], folder: Path) -> str:
    """This Python where it has all that is wanted, else one of a venv. Raises LoadError."""
    asked = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-q", *wanted]
    if subprocess.run(asked, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0:
        return sys.executable
    venv = folder / f"venv-{abs(hash(wanted)):x}"
    python = str(venv / "bin" / "python")
    if not venv.exists():
        say(f"installing {', '.join(wanted)}")
        run([sys.executable, "-m", "venv", str(venv)], folder, "no venv")
        run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted], folder, "pip")
    return python


def build(name: str, tree: Path, folder: Path) -> Side:
    """Raises LoadError."""
    python = python_with(requirements(tree), folder)
    say(f"{name}: building")
    run([python, "setup.py", "-q", "build_ext", "--inplace"], tree, f"{name} was not built", {"PYTHONPATH": str(tree)})
    return Side(name, tree, python)


def bench(side: Side, folder: Path, only: str) -> dict[str, tuple[str, float]]:
    """By benchmark: unit and value; CPU where it counts that, else time. Raises LoadError."""
    file = folder / f"{side.name}.json"
    chosen = ["-k", only] if only else []
    command = [side.python, "-m", "pytest", "bench", *BENCH, *chosen, f"--benchmark-json={file}"]
    run([*command, "-p", "no:cacheprovider"], side.tree, f"{side.name}: bench failed", {"PYTHONPATH": str(side.tree)})
    return read_bench(file.read_text())


def read_bench(text: str) -> dict[str, tuple[str, float]]:
    """pytest-benchmark's JSON. Raises LoadError."""
    found: dict[str, tuple[str, float]] = {}
    try:
        for one in json.loads(text)["benchmarks"]:
            cpu = one["extra_info"].get("cpu_us")
            found[one["name"]] = ("µs CPU", cpu) if cpu is not None else ("µs", one["stats"]["median"] * 1e6)
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"pytest-benchmark's JSON is not what it was: {error!r}") from None
    return found


def bench_both(sides: Sequence[Side], rounds: int, folder: Path, only: str = "") -> list[Figure]:
    """Benchmarks that both sides have, in interleaved rounds. Raises LoadError."""
    figures: dict[str, Figure] = {}
    for number in range(1, rounds + 1):
        found = {}
        for side in sides:
            say(f"bench: round {number} of {rounds}, {side.name}")
            found[side.name] = bench(side, folder, only)
        for name in found["base"].keys() & found["now"].keys():
            figure = figures.setdefault(name, Figure(name, found["now"][name][0], less_is_better=True))
            figure.base.append(found["base"][name][1])
            figure.now.append(found["now"][name][1])
    return [figures[name] for name in sorted(figures)]


def race_both(sides: Sequence[Side], rounds: int, seconds: float, folder: Path, load: Load) -> list[Figure]:
    """A short race between the two, 250 after fsync, mail thrown away. Raises LoadError."""

    def installed(side: Side) -> Callable[[Store], Installed]:
        return lambda _: Installed(side.name, program=side.tree)

    peers = tuple(
        Peer(
            side.name, {"discard": FSYNC}, installed(side), partial(plan_fastsmtp, durability=FSYNC, python=side.python)
        )
        for side in sides
    )
    terms = Terms(peers, ("discard",), RACES, rounds, seconds, 60.0, folder, Store(folder / "store"), traced=False)
    race = Race(terms, load)
    race.run()
    found = race.comparison("")
    if found.interrupted:
        raise KeyboardInterrupt
    for line in found.lines:
        if line.problems:
            raise LoadError(f"{line.server}, {line.scenario}: {line.problems[0]}")
    figures = []
    for scenario in RACES:
        by_side = {line.server: line.rounds for line in found.lines if line.scenario == scenario}
        rates = Figure(f"{scenario}: accepted", "messages/s", less_is_better=False)
        cpu = Figure(f"{scenario}: CPU", "µs/message", less_is_better=True)
        late = Figure(f"{scenario}: end of data to 250, p99", "ms", less_is_better=True)
        for name in SIDES:
            getattr(rates, name).extend(one.accepted_rate for one in by_side[name])
            getattr(cpu, name).extend(one.cpu_us for one in by_side[name])
            getattr(late, name).extend(one.latency_ms["end_of_data"].p99 for one in by_side[name])
        figures += [rates, cpu, late]
    return figures


def compare(given: argparse.Namespace, scratch: Path, root: Path = ROOT) -> list[Figure]:
    """All figures. Raises LoadError."""
    from loadtest.compare import send  # the generator, with what it needs

    now = scratch / "now"
    copy_working_tree(root, now)
    with worktree(root, given.base, scratch / "base") as base:
        sides = [build(name, tree, scratch) for name, tree in zip(SIDES, (base, now), strict=True)]
        figures = [] if given.only == "race" else bench_both(sides, given.rounds, scratch, given.k)
        if given.only != "bench":
            figures += race_both(sides, given.rounds, given.seconds, scratch, send)
    return figures


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="What a change costs.")
    parser.add_argument("base", metavar="BASE", help="a git revision: HEAD, main~3, a tag")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each side (5)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of load in a round of the race (5)")
    parser.add_argument("--only", choices=("bench", "race"), help="one of the two")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="benchmarks to run, as pytest's -k")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rounds go there too")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where data lies (beside this folder)")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.seconds <= 0:
        parser.error("--rounds and --seconds must be more than nothing")
    scratch = None
    try:
        scratch = make_folder(given.dir or ROOT.parent)
        figures = compare(given, scratch)
        print(render_figures(figures))
        if given.json:
            text = json.dumps([asdict(one) | {"ratio": asdict(one.ratio) if one.ratio else None} for one in figures])
            given.json.write_text(f"{text}\n")
    except (LoadError, OSError) as error:
        say(f"bench-compare: {error}")
        return 1
    except KeyboardInterrupt:
        say("bench-compare: interrupted")
        return 130
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
