"""What a server counts, asked of it from outside: over all workers, over a worker's death and over reloads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer import Peer
from servers import ROOT, Server, running, toml

from fastsmtp.metrics import RULES, SIZE, Counter, tell

RULE = '[[rule]]\nname = "{0}"\nsender = ["{0}.test"]\naction = "refuse"\n'
LETTER = b"Subject: x\r\n\r\nx\r\n"


def ask(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastsmtp", "counters", "--config", "fastsmtp.toml", *options],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def counted(folder: Path) -> dict[str, int]:
    """What is not 0, by name or reason."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(ask(folder, "--json").stdout)
    assert list(found) == ["counters", "refused"]
    assert all(row["help"] for rows in found.values() for row in rows.values())
    return {name: row["value"] for rows in found.values() for name, row in rows.items() if row["value"]}


def refuse(server: Server, domain: str) -> str:
    with Peer(server.address) as peer:
        return peer.ask(f"MAIL FROM:<a@{domain}>")


def test_all_workers_are_counted_and_what_one_counted_outlives_it(tmp_path: Path) -> None:
    tables = f'{RULE.format("spam")}[sql.users]\ndatabase = "users.db"\n'
    (tmp_path / "users.db").write_bytes(b"no database")
    domains = '[[domain]]\nname = "x.test"\nrecipients = ["ann", "bob"]\ntransport = "boxes"\n' + (
        '[[domain]]\nname = "sql.test"\ntransport = "boxes"\n'
        'recipients = {sql = "users", query = "SELECT 1 FROM t WHERE a = :address"}\n'
    )
    with running(tmp_path, toml(tmp_path, workers=2, domains=domains, tables=tables)) as server:
        for _ in range(12):  # so that both workers have some
            assert refuse(server, "spam.test").startswith("550 5.7.1")
            with Peer(server.address) as peer:
                replies = peer.envelope(["zoe@x.test", "ann@sql.test", "ann@else.test"])
                assert [reply[:3] for reply in replies[1:]] == ["550", "451", "550"]
                peer.ask("RSET")
                assert peer.data(["ann@x.test", "bob@x.test"], LETTER).startswith("250 ")
        server.wait_mail(24)
        server.wait(lambda: counted(tmp_path).get("recipients_delivered") == 24, "deliveries that are counted")
        server.wait(lambda: counted(tmp_path).get("commits"), "commits, which are counted once a second")
        found = counted(tmp_path)
        expected = {
            "sessions": 24, "messages_accepted": 12, "recipients_accepted": 24, "recipients_refused": 36,
            "refused_by_rule": 12, "rule-spam": 12, "unknown-mailbox": 12, "relaying-denied": 12,
            "recipient-not-checked": 12, "lookup_failed": 12, "recipients_delivered": 24,
        }  # fmt: skip
        assert {name: value for name, value in found.items() if not name.startswith(("commits", "octets"))} == expected
        assert found["octets_received"] > 12 * len(LETTER)
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for("worker-died")
        server.wait(lambda: len(server.workers()) == 2, "another worker")
        assert {name: value for name, value in counted(tmp_path).items() if name in expected} == expected


def test_a_rule_is_counted_by_its_name_whatever_place_it_has(tmp_path: Path) -> None:
    def reload(*names: str) -> None:
        (tmp_path / "fastsmtp.toml").write_text(toml(tmp_path, tables="".join(map(RULE.format, names))))
        before = len(server.events("reloaded"))
        os.kill(server.pid, signal.SIGHUP)
        server.wait_for("reloaded", before + 1)

    def refused() -> dict[str, int]:
        return {name: value for name, value in counted(tmp_path).items() if name.startswith("rule-")}

    with running(tmp_path, toml(tmp_path, tables=RULE.format("one") + RULE.format("two"))) as server:
        for domain in ("one", "two", "two"):
            refuse(server, f"{domain}.test")
        assert refused() == {"rule-one": 1, "rule-two": 2}
        reload("new", "two")
        refuse(server, "new.test")
        refuse(server, "two.test")
        assert refused() == {"rule-one": 1, "rule-two": 3, "rule-new": 1}
        os.kill(server.workers()[0], signal.SIGKILL)
        server.wait_for("worker-died")
        server.wait(lambda: server.workers(), "a worker")
        refuse(server, "two.test")
        # more than have a counter of their own
        reload(*[f"r{n}" for n in range(RULES)], "one")
        for domain in ("one.test", f"r{RULES - 4}.test", f"r{RULES - 3}.test"):
            assert refuse(server, domain).startswith("550")
        assert refused() == {"rule-one": 2, "rule-two": 4, "rule-new": 1, f"rule-r{RULES - 4}": 1}
        assert counted(tmp_path)["refused_by_rule"] == 9


def test_what_people_and_prometheus_read(tmp_path: Path) -> None:
    """Also where mail is kept in memory only, which no other command reaches."""
    tables = RULE.format("spam") + '[spool]\ndurability = "none"\n'
    with running(tmp_path, toml(tmp_path, tables=tables)) as server:
        refuse(server, "spam.test")
        with Peer(server.address) as peer:
            peer.ask("NOSUCH")
            peer.ask("NOSUCH")
        table = ask(tmp_path).stdout
        assert re.search(r"^sessions +2  Connections that were given a session$", table, re.MULTILINE)
        assert re.search(r"^messages_accepted +0  ", table, re.MULTILINE)
        refused = r"refused, by reason\nsyntax +2  Refusals: 500 Command not recognized\nrule-spam +1  .* rule spam\n"
        assert re.fullmatch(refused, table.rpartition("\n\n")[2]), table
        text = ask(tmp_path, "--prometheus").stdout
        sample = r'(fastsmtp_[a-z_]+_total)(?:\{reason="((?:[^"\\\n]|\\["\\n])+)"\})? (\d+)\n'
        metrics: dict[str, dict[str, int]] = {}
        for block in re.split(r"^(?=# HELP )", text, flags=re.MULTILINE)[1:]:
            parts = re.fullmatch(rf"# HELP (\S+) [^\\\n]+\n# TYPE (\S+) counter\n((?:{sample})+)", block)
            assert parts is not None, block
            metrics[parts[1]] = {reason: int(value) for _, reason, value in re.findall(sample, parts[3])}
            assert {parts[1], parts[2]} | {name for name, _, _ in re.findall(sample, parts[3])} == {parts[1]}
        assert metrics.pop("fastsmtp_refused_total")["syntax"] == 2
        assert metrics["fastsmtp_sessions_total"] == {"": 2}
        assert set(metrics) == {f"fastsmtp_{row.name.lower()}_total" for row in Counter if not row.reason}


def test_what_cannot_be_done_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "fastsmtp.toml").write_text(toml(tmp_path))
    cases = [
        ((), 1, f"fastsmtp: data_dir {tmp_path}/data: no server has run with it\n"),
        (("--json", "--prometheus"), 2, "Error: Give either --json or --prometheus.\n"),
    ]
    for options, code, said in cases:
        done = ask(tmp_path, *options)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.endswith(said)
    (tmp_path / "fastsmtp.toml").write_text("hostname = 7\n")
    done = ask(tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r".*fastsmtp.toml:1: hostname: .*\n", done.stderr)


def test_all_that_is_told_has_its_number() -> None:
    rules = {"a": len(Counter), "b": SIZE - 1}
    told = tell(lambda number: number, rules)
    assert [row["value"] for row in told] == [*range(len(Counter)), *rules.values()]
    assert [row["reason"] for row in told[-2:]] == ["rule-a", "rule-b"]
    assert len(Counter) + RULES == SIZE
