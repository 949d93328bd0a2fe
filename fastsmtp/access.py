"""Rules, aliases and lists, as a configuration names them, made into what checks are made of.

In: a configuration, and the lists that are open. Out: the checks for rules, for VRFY and EXPN, the aliases, who is free
of limits, and for each domain what it knows of its mailboxes. Used by a worker for its listeners, and by `check --as`,
which has none. In which order checks are asked is decided where a listener is put together (generation.py). Raises
ListError.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from .aliases import Aliases
from .config import Config, Domain, InFile, Listener
from .domains import Domains
from .lists import Kind, Lists, Mailboxes, Networks, Values
from .policy import Check
from .policy.relay import Trust
from .policy.rules import Rule, make_rules
from .policy.verify import Verify
from .verdict import Stage


class Exempt:
    """Whether the limits of `[inbound]` do not hold for an address, without brackets and unmapped."""

    def __init__(self, config: Config, lists: Lists) -> None:
        inbound = config.inbound
        listed = inbound.exceptions
        named = () if isinstance(listed, InFile) else listed
        self._named = Trust(named if inbound.limit_trusted else (*named, *config.relay.networks))
        self._listed = lists.open("networks", listed.path) if isinstance(listed, InFile) else None

    def __call__(self, ip: str) -> bool:
        return self._named(ip) or (self._listed is not None and ip in self._listed)

    def version(self) -> object:
        """Another than before when the answers may be others."""
        return self._listed and self._listed.networks


def rule_names(config: Config) -> list[str]:
    """Their names, or else numbers."""
    return [rule.name or str(number) for number, rule in enumerate(config.rule, 1)]


def make_rule_checks(config: Config, lists: Lists, count: Callable[[str], None]) -> list[Check]:
    """A check for each stage at which a rule may refuse; `count` is called with the name of each that does."""

    def patterns(value: object, kind: Kind) -> Container[str] | None:
        if isinstance(value, InFile):
            return lists.open(kind, value.path)
        if not isinstance(value, tuple) or not value:
            return None
        return Networks.of(value) if kind == "networks" else frozenset(value)

    rules = [
        Rule(
            name,
            rule.action,
            patterns(rule.client, "networks"),
            patterns(rule.helo, "names"),
            patterns(rule.sender, "addresses"),
            patterns(rule.recipient, "addresses"),
            rule.text,
            count,
        )
        for name, rule in zip(rule_names(config), config.rule, strict=True)
    ]
    return list(make_rules(rules))


def make_verify_checks(listener: Listener, trusts: bool, domains: Domains, aliases: Aliases | None) -> list[Check]:
    """What is told by VRFY and EXPN; no check where nobody is told. `trusts`: some clients are trusted there."""
    return [
        Verify(stage, domains, aliases, everyone)
        for stage, everyone in ((Stage.VRFY, listener.vrfy), (Stage.EXPN, listener.expn))
        if everyone or trusts
    ]


def make_aliases(config: Config, domains: Domains, lists: Lists) -> Aliases | None:
    """None where there are none."""
    common = config.alias.file
    if common is None and all(domain.aliases is None for domain in config.domain):
        return None
    table = lists.open("aliases", common) if common is not None else None
    return Aliases(domains, table, config.alias.members, lambda: lists.version)


def mailboxes_of(domain: Domain, lists: Lists) -> Mailboxes | None:
    """The mailboxes of a domain that has them in a file."""
    if not isinstance(domain.recipients, InFile):
        return None
    return lists.open("mailboxes-case" if domain.case_sensitive else "mailboxes", domain.recipients.path)


def aliases_of(domain: Domain, lists: Lists) -> Values | None:
    """The aliases that a domain has for itself."""
    return lists.open("aliases", domain.aliases) if domain.aliases is not None else None
