"""bench-compare: ratios and their verdict, two trees built side by side, and nothing of them left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import needs

from bench.compare import (
    ROOT,
    Figure,
    copy_working_tree,
    python_with,
    read_bench,
    render_figures,
    requirements,
    worktree,
)
from loadtest import LoadError


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@x.test"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits, and what is not committed."""
    needs("git")
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / ".gitignore").write_text("*.so\n")
    for text in ("first", "second"):
        (root / "kept").write_text(text)
        (root / "removed").write_text(text)
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", text)
    (root / "kept").write_text("third")
    (root / "removed").unlink()
    (root / "new name").write_text("new")
    (root / "built.so").write_text("built")
    return root


def test_ratios_are_of_the_same_round() -> None:
    figure = Figure("a", "µs", less_is_better=True, base=[10.0, 20.0, 40.0], now=[11.0, 24.0, 36.0])
    assert figure.ratio is not None
    assert figure.ratio.rounds == (1.1, 1.2, 0.9)
    assert figure.ratio.median == 1.1
    assert Figure("a", "µs", less_is_better=True).ratio is None
    assert Figure("a", "µs", less_is_better=True, base=[0.0], now=[1.0]).ratio is None


@pytest.mark.parametrize(
    ("base", "now", "less", "more"),
    [
        ([10, 11, 12], [7, 8, 9], "better", "WORSE"),
        ([7, 8, 9], [10, 11, 12], "WORSE", "better"),
        ([7, 8, 10], [10, 11, 12], "", ""),  # they touch
        ([7, 12, 9], [10, 11, 8], "", ""),
        ([7, 8], [10, 11], "", ""),  # too few rounds to tell
        ([], [], "", ""),
    ],
)
def test_a_verdict_needs_rounds_that_do_not_overlap(base: list[float], now: list[float], less: str, more: str) -> None:
    assert Figure("a", "µs", True, base, now).verdict == less
    assert Figure("a", "messages/s", False, base, now).verdict == more


def test_the_table_holds_values_and_ratios() -> None:
    lines = render_figures([Figure("churn: CPU", "µs/message", True, [100, 110, 120], [50, 55, 60])]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "churn: CPU",
        "µs/message",
        "110 (100–120)",
        "55.0 (50.0–60.0)",
        "0.50 (0.50–0.50)",
        "better",
    ]


def test_a_worktree_is_gone_afterwards_also_after_an_error(repository: Path, tmp_path: Path) -> None:
    with worktree(repository, "HEAD~1", tmp_path / "base") as tree:
        assert (tree / "kept").read_text() == "first"
        assert str(tree) in git(repository, "worktree", "list")

    def interrupt() -> None:
        with worktree(repository, "HEAD", tmp_path / "base") as tree:
            (tree / "built").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not (tmp_path / "base").exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert git(repository, "branch", "--list").split() == ["*", "main"]


def test_a_revision_that_does_not_exist_is_an_error_of_one_line(repository: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(LoadError, match=r"git has no nowhere: .*nowhere"),
        worktree(repository, "nowhere", tmp_path / "b"),
    ):
        pass
    assert not (tmp_path / "b").exists()


def test_the_working_tree_is_copied_as_it_is_now(repository: Path, tmp_path: Path) -> None:
    copy_working_tree(repository, tmp_path / "now")
    copied = {file.name: file.read_text() for file in (tmp_path / "now").iterdir()}
    assert copied == {".gitignore": "*.so\n", "kept": "third", "new name": "new"}


def test_this_python_is_taken_where_it_has_all(tmp_path: Path) -> None:
    assert python_with(("click>=8", "uvloop"), tmp_path) == sys.executable
    assert list(tmp_path.iterdir()) == []
    wanted = requirements(ROOT)
    assert any(one.startswith("cython") for one in wanted)
    assert any(one.startswith("pytest-benchmark") for one in wanted)
    with pytest.raises(LoadError, match="cannot be built"):
        requirements(tmp_path)


def test_cpu_is_taken_where_a_benchmark_counts_it() -> None:
    benchmarks = [
        {"name": "a", "extra_info": {"cpu_us": 7.5}, "stats": {"median": 1.0}},
        {"name": "b", "extra_info": {"GB/s": 3}, "stats": {"median": 0.002}},
    ]
    assert read_bench(json.dumps({"benchmarks": benchmarks})) == {"a": ("µs CPU", 7.5), "b": ("µs", 2000.0)}
    with pytest.raises(LoadError):
        read_bench("{}")


def bench_compare(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compare", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def on_disk() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="bench-test-", dir=ROOT.parent))
    yield folder
    shutil.rmtree(folder)


def test_a_real_comparison(long: None, on_disk: Path, tmp_path: Path) -> None:
    """Of the last commit with what is here, built as quickly as can be."""
    needs("git", "gcc")
    pytest.importorskip("pytest_benchmark")
    if not (ROOT / ".git").exists():
        pytest.skip("needs the history: this is no git repository")
    given = ["HEAD", "--only", "bench", "-k", "bench_commands", "--rounds", "1"]
    given += ["--dir", str(on_disk), "--json", str(tmp_path / "figures.json")]
    ended = bench_compare(*given, FASTSMTP_PURE="1", FASTSMTP_CFLAGS="-O0")
    assert ended.returncode == 0, ended.stderr
    (figure,) = json.loads((tmp_path / "figures.json").read_text())
    assert figure["name"] == "bench_commands"
    assert figure["base"][0] > 0
    assert figure["ratio"]["median"] == figure["now"][0] / figure["base"][0]
    assert "| bench_commands" in ended.stdout
    assert list(on_disk.iterdir()) == []
    assert str(on_disk) not in git(ROOT, "worktree", "list")


def test_what_cannot_be_compared_is_one_line(on_disk: Path) -> None:
    needs("git")
    ended = bench_compare("no-such-revision", "--dir", str(on_disk))
    assert ended.returncode == 1
    assert ended.stderr.startswith("bench-compare: git has no no-such-revision: ")
    assert len(ended.stderr.splitlines()) == 1
    assert list(on_disk.iterdir()) == []
    assert bench_compare("HEAD", "--rounds", "0").returncode == 2
