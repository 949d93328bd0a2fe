"""What the supervisor holds for its workers, and how it is exchanged while they run: a reload, renewed certificates.

In: what was claimed for the first configuration, and `source`, which reads the file anew. Out: settings, sockets and
TLS contexts for every worker that is forked, and orders to those that run. A reload is whole or nothing: first the
whole configuration is read and checked, then everything the machine can refuse is claimed, then every worker prepares
and says so, and only then it holds. A worker that dies meanwhile is started with what holds then. Nothing waits here:
`look_after` is called in the supervisor's rounds. Every outcome is logged, and told to the operator who asked.
Not here: forking and ending workers (supervisor.py), the messages (reload.py). sd_notify(3).
"""

from __future__ import annotations

import os
import pwd
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from . import log as events
from . import reload
from .access import rule_names
from .certificates import CertificateError, Watch, files_of, read_pairs, try_all
from .claim import (
    Listening,
    StartError,
    begin_lists,
    bind,
    compile_lists,
    drop_privileges,
    make_commands,
    read_settings,
)
from .config import Config, ConfigError
from .delivery.runner import Runner
from .list_watch import Preparation, Watcher
from .log import Log
from .metrics import RULES, Counter
from .reload import Order, Result
from .seat import Bound, Settings
from .tls import bare_context

Source = Callable[[], Config]

# TLS contexts beyond those of the first configuration. A listener that asks clients for other certificates than before
# needs a fresh one, for tickets of the old one would still let in who is not believed any more; and it must be the same
# in all workers, so it is made before they are.
SPARE_CONTEXTS = 16


class _Read(NamedTuple):
    """A reload whose lists are compiled."""

    by: str
    config: Config
    lists: Preparation


class _Pending(NamedTuple):
    """A reload that workers prepare for; `waiting` are those that have not said so."""

    by: str
    order: Order
    result: Result
    fresh: list[Listening]
    runner: Runner | None
    watch: Watch
    waiting: set[int]
    deadline: float


class Holdings:
    """`account` is who the workers become; `source` reads the whole configuration, checked, or raises ConfigError;
    without it there is no reload."""

    def __init__(
        self,
        settings: Settings,
        account: pwd.struct_passwd | None,
        runner: Runner | None,
        listening: list[Listening],
        watch: Watch,
        log: Log,
        source: Source | None,
        file: str = "",
    ) -> None:
        self.account = account
        self.runner = runner
        self.listening = listening
        self.contexts = [bare_context() for _ in range(len(settings.demands) + SPARE_CONTEXTS)]
        self._used = 0  # of the contexts
        self._rules: dict[str, int] = {}  # the counters of all that there have been
        self.settings = replace(
            settings, tickets=self._assign_tickets(settings, None), rules=self._number_rules(settings.config)
        )
        self.source = source
        self._file = file
        self._watch = watch
        self._log = log
        self._retired: list[Runner] = []
        self._lines: dict[int, socket.socket] = {}  # to the workers that run
        self._read: _Read | None = None
        self._pending: _Pending | None = None
        self._orders = 0  # that were made
        self._again = ""  # who asked while one was under way
        # Worker and number of those who are to hear what becomes of it, and of the next: that reads what they wrote.
        self._asked: list[tuple[int, str]] = []
        self._asked_again: list[tuple[int, str]] = []
        self.lists = Watcher(log, partial(drop_privileges, account) if account is not None else None)
        self.lists.remove_others(settings.config)

    # A worker's share

    def open_line(self, worker: int) -> socket.socket:
        """The end of a worker that is about to be forked. Raises OSError."""
        self._lines[worker], end = reload.open_pair()
        if self._pending is not None:
            self._pending.waiting.add(worker)
            self._send_order(self._pending, worker)
        return end

    def close_line(self, worker: int) -> None:
        """It is no more."""
        line = self._lines.pop(worker, None)
        if line is not None:
            line.close()
        if self._pending is not None:
            self._pending.waiting.discard(worker)

    def sockets_of(self, worker: int) -> list[Bound]:
        return [Bound(one.number, one.listener, one.socket_of(worker)) for one in self.listening]

    def forget(self, worker: int) -> None:
        """In the child: closes its copies of what is not its own. Held there, another worker's socket would stay open
        after that worker, and nobody would see that the supervisor is gone."""
        for line in self._lines.values():
            line.close()
        fresh = self._pending.fresh if self._pending is not None else []
        for one in (*self.listening, *fresh):
            own = one.socket_of(worker) if one not in fresh else None
            for listening in one.sockets:
                if listening is not own:
                    listening.close()
        pending = self._pending.runner if self._pending is not None else None
        for runner in (self.runner, pending):
            if runner is not None:
                runner.forget()

    def stop_listening(self) -> None:
        for one in self.listening:
            one.close()

    def close(self) -> None:
        if self._read is not None:
            self._read.lists.close()
            self._read = None
        if self._pending is not None:
            self._drop(self._pending)
            self._pending = None
        for worker in list(self._lines):
            self.close_line(worker)
        self.stop_listening()
        self.lists.close()
        for runner in (*self._retired, self.runner):
            if runner is not None:
                runner.close()

    # While they run

    @property
    def is_busy(self) -> bool:
        """Whether a reload is under way, and wants to be looked after often."""
        return self._read is not None or self._pending is not None

    def look_after(self, now: float) -> None:
        """Hears the workers, and goes on with what is under way. `now` is monotonic."""
        for worker, line in list(self._lines.items()):
            for word, text in reload.said(line):
                self._hear(worker, word, text)
        if self._read is None:
            self.lists.look_after(self.settings.config, now)
        else:
            self._go_on(self._read)
        pending = self._pending
        if pending is not None:
            if not pending.waiting:
                self._adopt(pending)
            elif now > pending.deadline:
                late = ", ".join(map(str, sorted(pending.waiting)))
                self._refuse(pending.by, f"worker {late} does not answer")
        elif self._again and not self.is_busy:
            by, self._again = self._again, ""
            self._asked, self._asked_again = self._asked_again, []
            self.begin(by)
        elif self._watch.has_changed(now):
            self._renew()
        self._retired = [runner for runner in self._retired if not runner.has_ended()]

    def _hear(self, worker: int, word: bytes, text: str) -> None:
        pending = self._pending
        if word == reload.ASKED:
            number, _, uid = text.partition(" ")
            (self._asked_again if self.is_busy else self._asked).append((worker, number))
            self.begin(f"uid {uid[:20]}")
        elif pending is not None and worker in pending.waiting:
            number, _, why = text.partition(" ")
            if number != str(pending.order.number):
                return  # it was asked by an earlier one, which was refused
            if word == reload.READY:
                pending.waiting.discard(worker)
            elif word == reload.UNABLE:
                self._refuse(pending.by, f"worker {worker}: {why}")

    # Reload

    def begin(self, by: str) -> None:
        """Reads the configuration anew, and has the workers prepare for it. `by` is who wants it."""
        if self.is_busy:
            self._again = by
            return
        if self.source is None:
            self._refuse(by, "the server was started without a configuration file")
            return
        tell_service_manager(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            config = self.source()
        except ConfigError as error:
            self._refuse(by, *map(str, error.errors))
            return
        lists = begin_lists(reload.settle(self.settings.config, config)[0], self.account)
        self._read = _Read(by, config, lists)
        self._go_on(self._read)

    def _go_on(self, read: _Read) -> None:
        """When every list is there, has the workers prepare."""
        try:
            if compile_lists(read.lists, wait=False):
                self._read = None
                self._pending = self._prepare(read.by, read.config)
        except (StartError, OSError) as error:
            self._read = None
            self._refuse(read.by, str(error))

    def _prepare(self, by: str, read: Config) -> _Pending:
        """Claims what the machine can refuse, and tells the workers. Raises StartError and OSError."""
        before = self.settings.config
        config, restart = reload.settle(before, read)
        watch = Watch(path for files in files_of(config) for path in files)
        settings = read_settings(config)
        settings = replace(
            settings, tickets=self._assign_tickets(settings, self.settings), rules=self._number_rules(config)
        )
        keys = reload.keys_of(config)
        number = 1 + max((one.number for one in self.listening), default=-1)
        kept = [one for one in self.listening if one.key in keys]
        fresh = bind(config, self.account, {one.key for one in kept}, number)
        if len(fresh) > reload.MOST_SOCKETS:
            for one in fresh:
                one.close()
            raise StartError(
                f"{len(fresh)} new addresses at once; {reload.MOST_SOCKETS} are possible without a restart"
            )
        runner = None
        try:
            if reload.commands_of(config) != reload.commands_of(before):
                runner = start_runner(config, self.account)
        except StartError:
            for one in fresh:
                one.close()
            raise
        bound = tuple((one.number, keys[one.key]) for one in (*kept, *fresh))
        self._orders += 1
        order = Order(self._orders, settings, bound, tuple(one.number for one in fresh), runner is not None)
        result = Result(self._file, (), reload.changes(before, config), restart)
        pending = _Pending(
            by, order, result, fresh, runner, watch, set(self._lines), time.monotonic() + reload.PATIENCE
        )  # fmt: skip
        for worker in list(pending.waiting):
            self._send_order(pending, worker)  # one that takes nothing is found out by its silence
        return pending

    def _send_order(self, pending: _Pending, worker: int) -> None:
        descriptors = [one.socket_of(worker).fileno() for one in pending.fresh]
        if pending.runner is not None:
            descriptors.append(pending.runner.asks.fileno())
        reload.send(self._lines[worker], reload.PREPARE, value=pending.order, more=descriptors)

    def _adopt(self, pending: _Pending) -> None:
        self._pending = None
        listeners = dict(pending.order.bound)
        for one in self.listening:
            if one.number not in listeners:
                one.close()
        self.listening = [one for one in (*self.listening, *pending.fresh) if one.number in listeners]
        for one in self.listening:
            one.listener = listeners[one.number]
        before = self.settings.config
        self.settings = pending.order.settings
        self._watch = pending.watch
        if reload.commands_of(before) != reload.commands_of(self.settings.config) and self.runner is not None:
            self.runner.retire()
            self._retired.append(self.runner)
            self.runner = None
        self.runner = pending.runner or self.runner
        for line in self._lines.values():
            reload.send(line, reload.ADOPT)
        self.lists.remove_others(self.settings.config)
        result = pending.result
        self._log.write(events.RELOADED, pending.by, result.file, result.changed, result.restart)
        self._tell(result)

    def _refuse(self, by: str, *errors: str) -> None:
        """Nothing changes, and everybody hears why."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._drop(pending)
            for line in self._lines.values():
                reload.send(line, reload.FORGET)
        shown = tuple(error[:500] for error in errors[: reload.SHOWN])
        self._log.write(events.RELOAD_REFUSED, by, self._file, shown)
        self._tell(Result(self._file, shown))

    def _drop(self, pending: _Pending) -> None:
        for one in pending.fresh:
            one.close()
        if pending.runner is not None:
            pending.runner.close()

    def _tell(self, result: Result) -> None:
        asked, self._asked = self._asked, []
        for worker, line in self._lines.items():
            if numbers := [number for asker, number in asked if asker == worker]:
                reload.send(line, reload.RESULT, f"{','.join(numbers)} ".encode() + result.render())
        tell_service_manager("READY=1")

    def _assign_tickets(self, settings: Settings, before: Settings | None) -> dict[int, int]:
        """Which context each listener has: its own one, as long as it asks clients for the same certificates."""
        found: dict[int, int] = {}
        earlier = reload.keys_of(before.config) if before is not None else {}
        for key, number in reload.keys_of(settings.config).items():
            wanted = settings.demands.get(number)
            old = earlier.get(key, -1)
            had = before.demands.get(old) if before is not None else None
            if wanted is None or had is None or number in found or before is None:
                continue
            free = before.tickets[old] not in found.values()
            if free and (had.client, had.client_ca) == (wanted.client, wanted.client_ca):
                found[number] = before.tickets[old]
        for number in settings.demands:
            if number not in found:
                if self._used == len(self.contexts):
                    raise StartError("listeners with TLS have changed so often that it needs a restart")
                found[number] = self._used
                self._used += 1
        return found

    def _number_rules(self, config: Config) -> dict[str, int]:
        """A counter for each rule by its name, which it keeps whatever becomes of the rules; those that are too many
        have none."""
        for name in rule_names(config):
            if len(self._rules) < RULES:
                self._rules.setdefault(name, len(Counter) + len(self._rules))
        return dict(self._rules)

    # Certificates

    def _renew(self) -> None:
        """Their files have changed, and stand still."""
        settings = self.settings
        names = tuple(str(certificate) for certificate, _ in files_of(settings.config))
        try:
            pairs = read_pairs(settings.config)
            try_all(settings.demands.values(), pairs)
        except CertificateError as error:
            self._log.write(events.CERTIFICATES_KEPT, names, str(error))
            return
        if pairs == settings.pairs:
            return
        self.settings = replace(settings, pairs=pairs)
        for line in self._lines.values():
            reload.send(line, reload.RENEW, value=pairs)
        days = (min(pair.expires for pair in pairs) - time.time()) / 86400
        self._log.write(events.CERTIFICATES_RENEWED, names, round(days))


def start_runner(config: Config, account: pwd.struct_passwd | None) -> Runner | None:
    """The process that runs commands, if a transport has one. Raises StartError."""
    commands = make_commands(config, account)
    if not commands:
        return None
    runner = Runner(commands)
    try:
        runner.start()
    except OSError as error:
        runner.close()
        raise StartError(f"the process that runs commands cannot be started: {error.strerror}") from None
    return runner


def tell_service_manager(state: str) -> None:
    """Nobody else could be told that it failed, so it is not looked at."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as service_manager:
        try:
            service_manager.sendto(state.encode(), address)
        except OSError:
            pass
