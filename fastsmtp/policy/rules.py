"""The operator's rules: who is let in, sent away or put off, by network, HELO name, reverse-path and recipient.

In: what is known at a stage. Out: a refusal that names its rule, or nothing: what a rule lets in must still be for a
recipient of ours. Of the rules in their order the first that matches decides, whatever stage that is known at: a rule
whose facts are not all there, and that may match yet, keeps those behind it waiting for the next stage. So a client
that is refused by its address is refused at once, unless a rule before asks for more.
Not asked: trusted networks and users, who are let in before. A unix socket has no address and is in no network.
RFC 5321 3.1 (554 in place of the greeting), RFC 3463 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from ..address import AddressError, parse_domain
from ..metrics import RULE
from ..patterns import has_address, has_name
from ..reply import Reply, Then
from ..verdict import Ask, Stage, Verdict

ORDER = (Stage.CONNECT, Stage.HELO, Stage.MAIL, Stage.RCPT)

Patterns = Container[str]


class Rule:
    """`clients` are networks, the others patterns; None: any. `action` is allow, refuse or defer. `count` is called
    with the name when it has refused."""

    def __init__(
        self,
        name: str,
        action: str,
        clients: Container[str] | None = None,
        helo: Patterns | None = None,
        senders: Patterns | None = None,
        recipients: Patterns | None = None,
        text: str = "",
        count: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.count = count
        self.allows = action == "allow"
        self.clients = clients
        self.helo = helo
        self.senders = senders
        self.recipients = recipients
        wanted = (clients, helo, senders, recipients)
        # At which of ORDER all of its facts are known.
        self.known_at = max((at for at, patterns in enumerate(wanted) if patterns is not None), default=0)
        self.reason = f"{RULE}{name}"
        self.verdict = None if self.allows else self._verdict(action, text, 550, 450)
        self.at_connect = None if self.allows else self._verdict(action, text, 554, 421)

    def _verdict(self, action: str, text: str, refused: int, deferred: int) -> Verdict:
        code = refused if action == "refuse" else deferred
        text = text or ("Refused" if action == "refuse" else "Not now, try again later")
        then = Then.CLOSE if code == 421 else Then.CONTINUE
        return Verdict(
            self.reason, Reply(code, f"{code // 100}.7.1", f"{text} ({self.reason})", then, reason=self.reason)
        )

    def may_match(self, ask: Ask, at: int) -> bool:
        """Whether nothing that is known speaks against it."""
        client = ask.client
        if self.clients is not None and client.ip not in self.clients:
            return False
        if self.helo is not None and at >= 1 and not _has_helo(self.helo, ask.helo or client.helo):
            return False
        if self.senders is not None and at >= 2 and not has_address(self.senders, ask.reverse_path):
            return False
        return self.recipients is None or at < 3 or has_address(self.recipients, ask.recipient)


def _has_helo(patterns: Patterns, name: str) -> bool:
    """By its name in the form that patterns have; what is no name is only "any"."""
    try:
        return has_name(patterns, parse_domain(name.rstrip(".")))
    except AddressError:
        return "*" in patterns


class Rules:
    """The check at one stage; the rules are the same for all."""

    def __init__(self, stage: Stage, rules: Sequence[Rule]) -> None:
        self.stage = stage
        self._at = ORDER.index(stage)
        self._rules = tuple(rules)

    def __call__(self, ask: Ask) -> Verdict | None:
        if ask.client.trusted or ask.client.user:
            return None
        rule = self.find(ask)
        if rule is None:
            return None
        verdict = rule.verdict if self._at else rule.at_connect
        if verdict is not None:
            rule.count(rule.name)
        return verdict

    def find(self, ask: Ask) -> Rule | None:
        """The rule that decides now; None: none does, or not yet."""
        at = self._at
        for rule in self._rules:
            if rule.may_match(ask, at):
                return rule if rule.known_at <= at else None
        return None


def make_rules(rules: Sequence[Rule]) -> list[Rules]:
    """A check for each stage at which one of the rules may refuse."""
    stages: set[int] = set()
    latest = 0
    for rule in rules:
        latest = max(latest, rule.known_at)
        if not rule.allows:
            stages.update(range(rule.known_at, latest + 1))
    return [Rules(ORDER[at], rules) for at in sorted(stages)]
