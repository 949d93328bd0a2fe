"""`fastsmtp check --as`: plays an envelope through the checks of a listener, and says what each decides, and why.

In: a configuration and words such as "client=203.0.113.9 helo=x.test from=a@x.test to=b@y.test". Out: a decision for
each stage, with the reply and the reason word that stand in the log of a running server. It is the session, the policy
and the ways of a worker that answer, made for one envelope: databases and delivery servers are asked, nothing is sent,
and nothing is written but in a folder that is gone afterwards. What only a running server can count (limits) is not
asked, and said to be so. Raises AsError with one line. Not here: how the answer is printed (cli.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from pathlib import Path

from . import log as logs
from ._parser import Line
from ._shared import Shared
from .address import Address
from .claim import StartError, read_passwords
from .colleagues import Colleagues
from .config import Config, Listener, Maildir, Unix
from .generation import Generation, Tools
from .list_watch import Preparation, folder_of
from .lists import ListError, Lists
from .memory_spool import MemorySpool
from .metrics import Counter
from .reply import Reply, reason
from .seat import Seat, Settings
from .service import Service
from .session import Answer, Session
from .verdict import Ask, Client, Verdict

WORDS = {
    "client": "its IP address, or `unix`",
    "helo": "what it says in EHLO",
    "from": "the reverse-path, empty for the null one",
    "to": "a recipient; may stand several times",
    "user": "who has logged in",
    "listener": "its address or its role",
}


class AsError(Exception):
    """The words, or the machine, do not allow an answer."""


@dataclass(frozen=True)
class Wishes:
    """What is played. `to` in the order in which RCPT comes."""

    client: str
    helo: str = "client.invalid"
    sender: str | None = None
    to: tuple[str, ...] = ()
    user: str = ""
    listener: str = ""


@dataclass
class Decision:
    """`stage` is a command, or connect, `limits` or `trust`; `answer`: accepted, deferred, refused, or what is so.
    `goes`: the transports of an accepted recipient, by address. `notes` are lines that the log would have."""

    stage: str
    about: str
    answer: str
    reason: str = ""
    reply: str = ""
    goes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def parse_wishes(text: str) -> Wishes:
    """Raises AsError."""
    found: dict[str, list[str]] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals or key not in WORDS:
            known = ", ".join(f"{name}= ({meaning})" for name, meaning in WORDS.items())
            raise AsError(f"{word} says nothing; known are {known}")
        found.setdefault(key, []).append(value.removeprefix("<").removesuffix(">") if key in ("from", "to") else value)
    for key, values in found.items():
        if len(values) > 1 and key != "to":
            raise AsError(f"{key}= stands {len(values)} times")
    single = {key: values[0] for key, values in found.items()}
    client = single.get("client", "")
    if client != "unix":
        try:
            client = str(ip_address(client))
        except ValueError:
            raise AsError(f'client={client}: an IP address such as 203.0.113.9, or "unix"') from None
    return Wishes(
        client,
        single.get("helo", Wishes.helo),
        single.get("from"),
        tuple(found.get("to", ())),
        single.get("user", ""),
        single.get("listener", ""),
    )


def play(config: Config, wishes: Wishes) -> list[Decision]:
    """Raises AsError."""
    number = _find_listener(config, wishes)
    with tempfile.TemporaryDirectory(prefix="fastsmtp-as-") as folder:
        data_dir = Path(folder)
        lists = folder_of(config.model_copy(update={"data_dir": data_dir}))
        lists.mkdir()
        try:
            passwords = read_passwords(config)
            _link_compiled(folder_of(config), lists)
            Preparation(config, None, lists).advance(wait=True)
        except (StartError, ListError, OSError) as error:
            raise AsError(str(error)) from None
        settings = Settings(_moved(config, data_dir), passwords)
        return asyncio.run(_Stage(settings, number, wishes).play(lists))


def render_json(wishes: Wishes, decisions: list[Decision]) -> str:
    accepted = all(decision.answer not in ("refused", "deferred") for decision in decisions)
    given = {"from" if key == "sender" else key: value for key, value in asdict(wishes).items()}
    return json.dumps(
        {"as": given, "accepted": accepted, "decisions": [asdict(decision) for decision in decisions]},
        indent=2,
        ensure_ascii=False,
    )


def render_text(decisions: list[Decision]) -> list[str]:
    lines = []
    for decision in decisions:
        why = f" ({decision.reason})" if decision.reason else ""
        lines.append(f"{decision.stage:<9} {decision.about:<28} {decision.answer}{why}".rstrip())
        if decision.reply:
            lines.append(f"{'':<9}   {decision.reply}")
        lines += [f"{'':<9}   {address} goes by {way}" for address, way in decision.goes.items()]
        lines += [f"{'':<9}   note: {note}" for note in decision.notes]
    return lines


def _moved(config: Config, folder: Path) -> Config:
    """The same with everything that it writes in a folder of ours."""
    transports = {
        name: way.model_copy(update={"path": f"{folder}/mail/{{domain}}/{{local}}"})
        if isinstance(way, Maildir)
        else way
        for name, way in config.transport.items()
    }
    return config.model_copy(update={"data_dir": folder, "transport": transports})


def _find_listener(config: Config, wishes: Wishes) -> int:
    """The first that is named; without a name the first for strangers, or for programs."""
    for number, listener in enumerate(config.listener):
        here = [address for address in listener.address if isinstance(address, Unix) == (wishes.client == "unix")]
        if wishes.listener:
            if wishes.listener == listener.role or wishes.listener in map(str, listener.address):
                return number
        elif here and (listener.role == "mx" or wishes.client == "unix"):
            return number
    known = ", ".join(f"{address} ({listener.role})" for listener in config.listener for address in listener.address)
    what = f"listener={wishes.listener}: no such listener" if wishes.listener else "name a listener by listener="
    raise AsError(f"{what}; there are {known}")


def _link_compiled(existing: Path, lists: Path) -> None:
    """Lists that a server has compiled are not compiled again."""
    try:
        entries = list(existing.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_file() and os.access(entry, os.R_OK):
            (lists / entry.name).symlink_to(entry.absolute())


class _Stage:
    """One session, in place of a worker."""

    def __init__(self, settings: Settings, number: int, wishes: Wishes) -> None:
        self._settings = settings
        self._number = number
        self._wishes = wishes
        self._verdict: Verdict | None = None  # the last one
        self._log_fd = os.memfd_create("log")
        self._log = logs.Log(self._log_fd, False, time.time, threaded=False)
        self._read = 0
        self._told: set[str] = set()

    async def play(self, lists: Path) -> list[Decision]:
        config = self._settings.config
        loop = asyncio.get_running_loop()
        shared = Shared(1, len(Counter))
        asks, runner = socket.socketpair()
        seat = Seat(0, 1, [], [], shared, -1, -1, self._settings)
        keeper = MemorySpool(0, loop=loop, memory=1 << 20)
        colleagues = Colleagues(config.data_dir, 1)
        tools = Tools(
            loop, self._log, seat, time.time, "as", keeper, colleagues, [], Lists(lists), lambda: True
        )  # fmt: skip
        generation = Generation(self._settings, tools, asks)
        try:
            generation.build()
            return await self._play(generation, generation.services[self._number])
        finally:
            for part in generation.parts():
                await part.close()
            await keeper.close()
            runner.close()
            self._log.close()
            os.close(self._log_fd)

    async def _play(self, generation: Generation, service: Service) -> list[Decision]:
        wishes = self._wishes
        listener = generation.config.listener[self._number]
        client = Client("" if wishes.client == "unix" else wishes.client, 0, service.name)
        client.trusted = service.trusts is not None and service.trusts(client.ip)
        client.user = wishes.user
        session = Session(service.terms, client, frozenset(), None)
        decisions = [self._on_limits(generation, service, client, listener), _on_trust(client)]
        decisions.append(await self._ask(service, session, session.greet(), "connect", wishes.client))
        if decisions[-1].answer != "accepted":
            return decisions
        verb = "LHLO" if listener.role == "lmtp" else "EHLO"
        commands = [(verb.lower(), wishes.helo, f"{verb} {wishes.helo}")]
        if wishes.sender is not None:
            utf8 = "" if all(text.isascii() for text in (wishes.sender, *wishes.to)) else " SMTPUTF8"
            commands.append(("mail", f"<{wishes.sender}>", f"MAIL FROM:<{wishes.sender}>{utf8}"))
            commands += [("rcpt", f"<{to}>", f"RCPT TO:<{to}>") for to in wishes.to]
        for stage, about, command in commands:
            answer = self._receive(service, session, command)
            decision = await self._ask(service, session, answer, stage, about)
            decisions.append(decision)
            if stage == "rcpt" and decision.answer == "accepted" and session.transaction is not None:
                added = session.transaction.envelope.recipients
                self._add_ways(generation, decision, [recipient.address for recipient in added])
            if stage != "rcpt" and decision.answer != "accepted":
                break
        return decisions

    def _on_limits(self, generation: Generation, service: Service, client: Client, listener: Listener) -> Decision:
        if service.limits is None:
            return Decision("limits", client.ip or "unix", "none hold here")
        if service.limits.counted(client) is None:
            return Decision("limits", client.ip or client.user or "unix", "free of limits")
        return Decision("limits", client.ip, "not asked: only a running server counts")

    def _receive(self, service: Service, session: Session, command: str) -> Answer:
        parser = service.make_parser()
        parser.feed(command.encode() + b"\r\n")
        line = parser.next()
        if not isinstance(line, Line):
            raise AsError(f"{command}: not one command")
        return session.receive(line)

    async def _ask(self, service: Service, session: Session, answer: Answer, stage: str, about: str) -> Decision:
        """What the policy and the session make of a command."""
        verdict: Verdict | None = None
        while isinstance(answer, Ask):
            decided = service.policy.evaluate(answer)
            verdict = decided if isinstance(decided, Verdict) else await decided
            answer = session.resume(verdict)
        assert isinstance(answer, Reply)
        said = "deferred" if answer.code < 500 else "refused"
        if answer.code < 400:
            said = "accepted"
        word = verdict.reason if verdict is not None and (verdict.reply is not None or said == "accepted") else ""
        if said != "accepted":
            word = word or reason(answer)
        elif word == said:  # nobody had an opinion
            word = ""
        reply = answer.wire.decode("ascii").rstrip("\r\n").rpartition("\n")[2] if said != "accepted" else ""
        return Decision(stage, about, said, word, reply, notes=self._notes())

    def _add_ways(self, generation: Generation, decision: Decision, recipients: list[Address]) -> None:
        for recipient in recipients:
            name, mailbox = generation.ways.route(recipient)
            if mailbox.wire not in self._told:
                decision.goes[mailbox.wire] = name or "nothing: it would be returned"
                self._told.add(mailbox.wire)

    def _notes(self) -> list[str]:
        self._log.flush()
        lines = os.pread(self._log_fd, 1 << 20, self._read)
        self._read += len(lines)
        events = [json.loads(line) for line in lines.splitlines()]
        return [str(event.get("why") or event.get("exception") or event["event"]) for event in events]


def _on_trust(client: Client) -> Decision:
    if client.user:
        return Decision("trust", client.user, "may send to any domain: it has logged in")
    if client.trusted:
        return Decision("trust", client.ip or "unix", "may send to any domain: [relay] networks")
    return Decision("trust", client.ip or "unix", "may send to our domains only")
