"""The configuration: every key, every kind of error with its line, and what is read back."""

from __future__ import annotations

import ipaddress
import os
import socket
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fastsmtp.config import (
    DEFAULT,
    SECTIONS,
    Config,
    ConfigError,
    Discard,
    Dns,
    Domain,
    Inet,
    InFile,
    Limits,
    Listener,
    Lmtp,
    Maildir,
    Postgresql,
    Problem,
    Queue,
    Relay,
    Route,
    Section,
    Smtp,
    Tls,
    Unix,
    Withhold,
    default,
    default_of,
    kind_of,
    load,
    parse,
    problem_at,
    warnings,
)
from fastsmtp.config_values import (
    Kind,
    Rate,
    Unset,
    machine_name,
    parse_duration,
    parse_endpoint,
    parse_rate,
    parse_size,
    show_duration,
    show_size,
)

FOLDER = Path("/srv/conf")


def read(text: str) -> Config:
    return parse(text, FOLDER, "f.toml")


def errors(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return [str(problem).removeprefix("f.toml:") for problem in caught.value.errors]


# Every key: where it stands, what a file says, what is read.

EXAMPLES: dict[str, tuple[str, Any]] = {
    "hostname": ('"MX1.Bücher.example"', "mx1.xn--bcher-kva.example"),
    "data_dir": ('"spool"', Path("/srv/conf/spool")),
    "workers": ("3", 3),
    "user": ('"mail"', "mail"),
    "postmaster": ('"Admin@Bücher.example"', "Admin@xn--bcher-kva.example"),
    "[tls] certificate": ('"a.pem"', Path("/srv/conf/a.pem")),
    "[tls] key": ('"../b.key"', Path("/srv/b.key")),
    "[tls] minimum": ('"1.3"', "1.3"),
    "[tls] ciphers": ('"ECDHE+CHACHA20"', "ECDHE+CHACHA20"),
    "[[tls.also]] certificate": ('"b.pem"', Path("/srv/conf/b.pem")),
    "[[tls.also]] key": ('"b.key"', Path("/srv/conf/b.key")),
    "[[listener]] client_ca": ('"ca.pem"', Path("/srv/conf/ca.pem")),
    "[[listener]] client_certificate": ('"required"', "required"),
    "[[listener]] address": ('["[::1]:25", "unix:s"]', (Inet("::1", 25), Unix(Path("/srv/conf/s")))),
    "[[listener]] role": ('"lmtp"', "lmtp"),
    "[[listener]] tls": ('"implicit"', "implicit"),
    "[[listener]] vrfy": ("true", True),
    "[[listener]] expn": ("true", True),
    "[[listener]] bare": ('"normalize"', "normalize"),
    "[[listener]] bare_bdat": ('"reject"', "reject"),
    "[[listener]] early_talker": ('"allow"', "allow"),
    "[[listener]] greet_delay": ("0.5", 0.5),
    "[[listener]] dsn": ("true", True),
    "[[listener]] auth": ("false", False),
    "[[listener]] auth_clear": ("true", True),
    "[[listener]] brackets": ("false", False),
    "[[listener]] mode": ('"0600"', 0o600),
    "[[listener.withhold]] keywords": ('["chunking"]', ("CHUNKING",)),
    "[[listener.withhold]] networks": (
        '["192.0.2.0/24", "2001:db8::/32", "192.0.2.1"]',
        tuple(map(ipaddress.ip_network, ("192.0.2.0/24", "2001:db8::/32", "192.0.2.1/32"))),
    ),
    "[limits] message_size": ('"1GB"', 1 << 30),
    "[limits] recipients": ("100", 100),
    "[limits] command_line": ("512", 512),
    "[submission] header_from": ('"add_sender"', "add_sender"),
    "[submission] remove_bcc": ("false", False),
    "[submission] hide_client": ("true", True),
    "[submission] rewrite": ("true", True),
    "[submission] messages": ('["100/h", "5/10m"]', (Rate(100, 3600.0), Rate(5, 600.0))),
    "[submission] recipients": ('["500/d"]', (Rate(500, 86400.0),)),
    "[inbound] sessions_per_address": ("20", 20),
    "[inbound] sessions_per_network": ("50", 50),
    "[inbound] new_sessions": ('"60/m"', Rate(60, 60.0)),
    "[inbound] messages": ('"100/h"', Rate(100, 3600.0)),
    "[inbound] recipients": ('"10/10s"', Rate(10, 10.0)),
    "[inbound] failures": ('"20/m"', Rate(20, 60.0)),
    "[inbound] exceptions": ('["192.0.2.0/24"]', (ipaddress.ip_network("192.0.2.0/24"),)),
    "[inbound] limit_trusted": ("true", True),
    "[sql.NAME] database": ('"postgresql://mail@db:5432/mail"', Postgresql("postgresql://mail@db:5432/mail")),
    "[sql.NAME] password_file": ('"pw"', Path("/srv/conf/pw")),
    "[sql.NAME] connections": ("2", 2),
    "[sql.NAME] timeout": ('"2s"', 2.0),
    "[auth] users_file": ('"users"', Path("/srv/conf/users")),
    "[auth] domain": ('"Bücher.example"', "xn--bcher-kva.example"),
    "[auth] mechanisms": ('["PLAIN", "LOGIN"]', ("PLAIN", "LOGIN")),
    "[auth] cache": ('"30s"', 30.0),
    "[auth] address_failures": ('"5/30m"', Rate(5, 1800.0)),
    "[auth] user_failures": ('"50/d"', Rate(50, 86400.0)),
    "[auth] unlimited": ('["192.0.2.1/32"]', (ipaddress.ip_network("192.0.2.1/32"),)),
    "[auth.sql] database": ('"x"', "x"),
    "[auth.sql] query": ('"SELECT 1 WHERE :local"', "SELECT 1 WHERE :local"),
    "[auth.sql] scram_iterations": ("4096", 4096),
    "[auth.dovecot] socket": ('"/run/auth"', Path("/run/auth")),
    "[auth.dovecot] timeout": ("3", 3.0),
    "[auth.oauth] introspection": ('"https://i.test/x"', "https://i.test/x"),
    "[auth.oauth] client_id": ('"me"', "me"),
    "[auth.oauth] client_secret_file": ('"secret"', Path("/srv/conf/secret")),
    "[auth.oauth] keys_file": ('"keys"', Path("/srv/conf/keys")),
    "[auth.oauth] keys_url": ('"https://i.test/keys"', "https://i.test/keys"),
    "[auth.oauth] algorithms": ('["ES256", "EdDSA"]', ("ES256", "EdDSA")),
    "[auth.oauth] issuer": ('"https://i.test"', "https://i.test"),
    "[auth.oauth] audience": ('"mail"', "mail"),
    "[auth.oauth] scope": ('"smtp"', "smtp"),
    "[auth.oauth] user": ('"sub"', "sub"),
    "[auth.oauth] ca_file": ('"ca.pem"', Path("/srv/conf/ca.pem")),
    "[auth.oauth] timeout": ('"1s"', 1.0),
    "[limits] auth_line": ("5000", 5000),
    "[limits] text_line": ("1000", 1000),
    "[limits] header": ('"64KB"', 65536),
    "[limits] received": ("30", 30),
    "[limits] errors": ("1", 1),
    "[limits] useless": ("1", 1),
    "[limits] sessions": ("5", 5),
    "[limits] memory": ('"2TB"', 2 << 40),
    "[timeouts] command": ('"1h30m"', 5400.0),
    "[timeouts] data": ('"10s"', 10.0),
    "[timeouts] data_rate": ("0", 0),
    "[timeouts] tls": ("5", 5.0),
    "[timeouts] session": ('"1d"', 86400.0),
    "[timeouts] oversize": ('"1m"', 60.0),
    "[timeouts] write": ('"1m1s"', 61.0),
    "[timeouts] shutdown": ("0", 0.0),
    "[spool] durability": ('"none"', "none"),
    "[spool] inline": ("0", 0),
    "[spool] min_free": ('"1KB"', 1024),
    "[queue] retry": ('"1m"', 60.0),
    "[queue] retry_max": ('"20h"', 72000.0),
    "[queue] lifetime": ('"3d"', 259200.0),
    "[queue] report_lifetime": ('"2h"', 7200.0),
    "[queue] delay_report": ("0", 0.0),
    "[queue] report_postmaster": ("true", True),
    "[queue] soft_bounce": ("true", True),
    "[queue] concurrency": ("7", 7),
    "[queue] concurrency_total": ("20", 20),
    "[log] format": ('"json"', "json"),
    "[[domain]] name": ('"*.Bücher.example"', "*.xn--bcher-kva.example"),
    "[[domain]] recipients": ('["Ann", "\\"a b\\"", "jörg"]', ("Ann", "a b", "jörg")),
    "[[domain]] transport": ('"x"', "x"),
    "[[domain]] case_sensitive": ("true", True),
    "[[domain]] detail": ('"+"', "+"),
    "[[domain]] catch_all": ('"Rest@Bücher.example"', "Rest@xn--bcher-kva.example"),
    "[[domain]] aliases": ('"aliases"', Path("/srv/conf/aliases")),
    "[alias] file": ('"../aliases"', Path("/srv/aliases")),
    "[alias] members": ("10", 10),
    "[[rule]] name": ('"bad-ones"', "bad-ones"),
    "[[rule]] client": ('{file = "networks"}', InFile(Path("/srv/conf/networks"))),
    "[[rule]] helo": ('["*.Bücher.example", "[192.0.2.1]"]', ("*.xn--bcher-kva.example", "[192.0.2.1]")),
    "[[rule]] sender": ('["Ann@X.test", "@x.test", "<>"]', ("ann@x.test", "x.test", "<>")),
    "[[rule]] recipient": ('["*.x.test"]', ("*.x.test",)),
    "[[rule]] action": ('"defer"', "defer"),
    "[[rule]] text": ('"Go away"', "Go away"),
    "[[route]] domain": ('"*.Bücher.example"', "*.xn--bcher-kva.example"),
    "[[route]] transport": ('"x"', "x"),
    "[[route]] tls": ('"verified"', "verified"),
    "[[route]] tls_minimum": ('"1.3"', "1.3"),
    "[[route]] concurrency": ("5", 5),
    "[[route]] ignore": ('["chunking"]', ("CHUNKING",)),
    "[relay] networks": (
        '["127.0.0.0/8", "::1", "::ffff:192.0.2.0/120"]',
        tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128", "192.0.2.0/24"))),
    ),
    "[relay] transport": ('"x"', "x"),
    "[relay] own_addresses": (
        '["192.0.2.1", "2001:DB8::1", "::ffff:192.0.2.2"]',
        tuple(map(ipaddress.ip_address, ("192.0.2.1", "2001:db8::1", "192.0.2.2"))),
    ),
    "[dns] servers": (
        '["127.0.0.1:5353", "192.0.2.1", "2001:DB8::1", "[::1]:53"]',
        ("127.0.0.1:5353", "192.0.2.1:53", "[2001:db8::1]:53", "[::1]:53"),
    ),
    "[dns] allow_loopback": ("true", True),
    "[transport.NAME] smtp type": ('"smtp"', "smtp"),
    "[transport.NAME] smtp smarthost": ('"SMTP.Provider.example:587"', Inet("smtp.provider.example", 587)),
    "[transport.NAME] smtp user": ('"me"', "me"),
    "[transport.NAME] smtp password_file": ('"secret"', Path("/srv/conf/secret")),
    "[transport.NAME] smtp auth": ('"xoauth2"', "xoauth2"),
    "[transport.NAME] smtp tls": ('"implicit"', "implicit"),
    "[transport.NAME] smtp tls_minimum": ('"1.3"', "1.3"),
    "[transport.NAME] smtp ca_file": ('"ca.pem"', Path("/srv/conf/ca.pem")),
    "[transport.NAME] smtp helo": ('"Out.Bücher.example"', "out.xn--bcher-kva.example"),
    "[transport.NAME] smtp source": (
        '["192.0.2.1", "2001:DB8::1"]',
        tuple(map(ipaddress.ip_address, ("192.0.2.1", "2001:db8::1"))),
    ),
    "[transport.NAME] smtp timeout": ('"30s"', 30.0),
    "[transport.NAME] smtp eight_bit": ('"bounce"', "bounce"),
    "[transport.NAME] smtp bare": ('"bounce"', "bounce"),
    "[transport.NAME] lmtp type": ('"lmtp"', "lmtp"),
    "[transport.NAME] lmtp address": ('"unix:run/lmtp"', Unix(Path("/srv/conf/run/lmtp"))),
    "[transport.NAME] lmtp timeout": ('"30s"', 30.0),
    "[transport.NAME] lmtp eight_bit": ('"bounce"', "bounce"),
    "[transport.NAME] pipe type": ('"pipe"', "pipe"),
    "[transport.NAME] pipe command": ('["/bin/x", "-f"]', ("/bin/x", "-f")),
    "[transport.NAME] pipe user": ('"filter"', "filter"),
    "[transport.NAME] pipe timeout": ('"30s"', 30.0),
    "[transport.NAME] pipe concurrency": ("3", 3),
    "[transport.NAME] pipe crlf": ("true", True),
    "[transport.NAME] pipe fields": ("true", True),
    "[transport.NAME] maildir type": ('"maildir"', "maildir"),
    "[transport.NAME] maildir path": ('"m/{local}"', "/srv/conf/m/{local}"),
    "[transport.NAME] maildir sync": ('"file"', "file"),
    "[transport.NAME] discard type": ('"discard"', "discard"),
    "[transport.NAME] odmr type": ('"odmr"', "odmr"),
    "[transport.NAME] odmr timeout": ('"30s"', 30.0),
    "[[customer]] networks": ('["192.0.2.1"]', (ipaddress.ip_network("192.0.2.1/32"),)),
    "[[customer]] users": ('["Home", "Ann@Bücher.example"]', ("home", "ann@xn--bcher-kva.example")),
    "[[customer]] domains": ('["*.Bücher.example", "a.example"]', ("*.xn--bcher-kva.example", "a.example")),
    "[[customer]] queue": ('"office.1"', "office.1"),
}
# What a transport of each type must have, and what belongs together in it.
TRANSPORTS = {
    "smtp": {"smarthost": '"h:587"', "user": '"me"', "password_file": '"p"'},
    "lmtp": {"address": '"unix:/run/lmtp"'},
    "pipe": {"command": '["/bin/true"]'},
    "maildir": {"path": '"/m/{local}"'},
    "discard": {},
    "odmr": {},
}
# What must stand in a table anyway. Keys of a key's own table are added in front of it.
REQUIRED = {
    "[tls]": {"certificate": '"c.pem"'},
    "[[tls.also]]": {"certificate": '"d.pem"'},
    "[[listener]]": {"address": '"127.0.0.1:0"'},
    "[[listener.withhold]]": {"keywords": '["X"]'},
    "[[domain]]": {"name": '"xn--bcher-kva.example"', "recipients": '"any"', "transport": '"x"'},
    "[[rule]]": {"action": '"refuse"'},
    "[[route]]": {"domain": '"partner.example"', "transport": '"x"'},
    "[relay]": {"transport": '"x"'},
    "[[customer]]": {"networks": '["192.0.2.1"]', "domains": '["a.example"]'},
    "[transport.x]": {"type": '"smtp"', **TRANSPORTS["smtp"]},
    "[sql.x]": {"database": '"d"'},
}
# Tables of which there is one or the other.
ALONE = {
    "[auth.sql]": {"database": '"x"', "query": '"SELECT :name"'},
    "[auth.dovecot]": {"socket": '"a"'},
    "[auth.oauth]": {"issuer": '"i"', "audience": '"a"'},
}
# What a key needs beside it.
WITH = {
    "client_id": {"keys_file": '"k"', "client_secret_file": '"s"'},
    "client_secret_file": {"keys_file": '"k"', "client_id": '"c"'},
    "introspection": {},
    "keys_url": {},
}


def file_with(section: Section, keys: dict[str, str]) -> str:
    """A file in which a table has these keys, and nothing else is wrong."""
    heading = section.heading.replace("NAME", "x")
    tables: dict[str, dict[str, str]] = {"": {}, **{table: dict(keys) for table, keys in REQUIRED.items()}}
    if section.choice:
        tables["[transport.x]"] = {"type": f'"{section.choice}"', **TRANSPORTS[section.choice]}
    if section.choice == "odmr":
        tables["[[listener]]"]["role"] = '"odmr"'
    elif heading != "[[customer]]":
        del tables["[[customer]]"]
    if heading in ALONE:
        tables[heading] = dict(ALONE[heading])
        tables["[sql.x]"] = {"database": '"d"'}
    if "client_certificate" in keys:
        tables[heading]["client_ca"] = '"ca.pem"'
    if heading == "[auth.oauth]":
        tables[heading].update(next((WITH[key] for key in keys if key in WITH), {"keys_file": '"k"'}))
    tables.setdefault(heading, {}).update(keys)
    return "".join(
        f"{table}\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()) for table, keys in tables.items()
    )


def table_of(config: Config, section: Section) -> Any:
    table: Any = config
    for step in section.place:
        if step == "#":
            table = table[0]
        elif step == "NAME":
            table = table["x"]
        elif not step.startswith("<"):
            table = getattr(table, step)
    return table


KEYS = [(section, key) for section in SECTIONS for key in section.keys]


def name_of(section: Section, key: str) -> str:
    return " ".join(filter(None, (section.heading, section.choice, key)))


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda value: getattr(value, "heading", value))
def test_every_key_is_read(section: Section, key: str) -> None:
    value, expected = EXAMPLES[name_of(section, key)]
    config = read(file_with(section, {key: value}))
    found = getattr(table_of(config, section), key)
    assert found == expected
    assert type(found) is type(expected)


def test_every_example_is_a_key() -> None:
    assert set(EXAMPLES) == {name_of(section, key) for section, key in KEYS}


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda value: getattr(value, "heading", value))
def test_every_key_has_a_help_a_type_and_a_true_default(section: Section, key: str) -> None:
    field = section.keys[key]
    assert field.description is not None
    assert field.description[0].isupper() or field.description[0] == "`"
    assert field.description.endswith(".")
    assert kind_of(field)
    tables = (*REQUIRED.values(), *ALONE.values(), *TRANSPORTS.values())
    required = {name for keys in tables for name in keys}
    assert default_of(field) or key in required, "a key without a default"
    if not field.is_required() and not any(isinstance(data, Unset) for data in field.metadata):
        shown = default_of(field).strip("`")
        said = table_of(read(file_with(section, {key: shown})), section)
        unsaid = table_of(read(file_with(section, {})), section)
        assert getattr(said, key) == getattr(unsaid, key)


def test_every_table_is_documented() -> None:
    for section in SECTIONS:
        assert section.model.__doc__
        assert section.model.__doc__.endswith(".")
        for name, field in section.model.model_fields.items():
            assert field.description, (section.heading, name)


DESIGN = """\
hostname = "mx1.example.org"
data_dir = "/var/lib/fastsmtp"
workers  = 0                        # 0: one per core
user     = "fastsmtp"               # dropped to after binding, when started as root

[[listener]]
address = "0.0.0.0:25"              # host:port, [v6]:port or unix:/path; a list is allowed
role    = "mx"                      # mx | submission | lmtp
tls     = "starttls"                # off | starttls | implicit

[tls]
certificate = "/etc/ssl/mx1.pem"
key         = "/etc/ssl/mx1.key"

[limits]
message_size = "50MB"
[timeouts]
command = "5m"

[spool]
durability = "fsync"                # fsync: 250 after stable storage | none: 250 after memory

[[domain]]
name       = "example.org"          # exact, "*.example.org" or "*"
recipients = ["ann", "bob"]         # or "any"
transport  = "mailboxes"

[transport.mailboxes]
type = "maildir"                    # maildir | lmtp | smtp | discard
path = "/var/mail/{domain}/{local}"
"""


@pytest.mark.parametrize("text", [DESIGN, DESIGN.replace("\n", "\r\n")], ids=["LF", "CRLF"])
def test_a_whole_file(text: str) -> None:
    config = read(text)
    assert config == Config(
        hostname="mx1.example.org",
        data_dir=Path("/var/lib/fastsmtp"),
        user="fastsmtp",
        tls=Tls(certificate=Path("/etc/ssl/mx1.pem"), key=Path("/etc/ssl/mx1.key")),
        listener=(Listener(address="0.0.0.0:25", tls="starttls"),),
        domain=(Domain(name="example.org", recipients=["ann", "bob"], transport="mailboxes"),),
        transport={"mailboxes": Maildir(type="maildir", path="/var/mail/{domain}/{local}")},
    )
    assert config.limits.message_size == 50 * 1024 * 1024
    assert config.timeouts.command == 300.0


OUT = """\
[relay]
networks  = ["127.0.0.0/8", "::1"]     # who may send to any domain
transport = "internet"
[[route]]                              # exact, "*.partner.example" or "*"
domain = "partner.example"
transport = "internet"
tls = "verified"                       # opportunistic (default) | required | verified | off
concurrency = 5
ignore = ["CHUNKING"]                  # keywords of a broken host
[transport.internet]
type = "smtp"                          # by MX
[transport.provider]
type = "smtp"
smarthost = "smtp.provider.example:587"
tls = "starttls"                       # or "implicit" for 465
user = "me"
password_file = "/etc/fastsmtp/provider.password"
[transport.dovecot]
type = "lmtp"
address = "unix:/run/dovecot/lmtp"     # or host:port
[dns]
servers = ["127.0.0.1:5353"]           # default: the system's
[queue]
retry = "5m"                           # first wait; doubles
retry_max = "4h"
lifetime = "5d"
delay_report = "4h"
"""


def test_a_file_of_what_goes_out() -> None:
    config = read(OUT)
    assert config == Config(
        relay=Relay(networks=["127.0.0.0/8", "::1"], transport="internet"),
        route=(
            Route(domain="partner.example", transport="internet", tls="verified", concurrency=5, ignore=["CHUNKING"]),
        ),
        transport={
            "internet": Smtp(type="smtp"),
            "provider": Smtp(
                type="smtp",
                smarthost="smtp.provider.example:587",
                user="me",
                password_file=Path("/etc/fastsmtp/provider.password"),
            ),
            "dovecot": Lmtp(type="lmtp", address="unix:/run/dovecot/lmtp"),
        },
        dns=Dns(servers=["127.0.0.1:5353"]),
        hostname=config.hostname,
        data_dir=config.data_dir,
    )
    assert config.queue == Queue()
    assert warnings(config) == [
        "there is no [[domain]]: no mailbox is served here",
        "nothing uses [transport.provider]",
        "nothing uses [transport.dovecot]",
        "127.0.0.1:2525: programs of this machine may send to any domain over this mx listener, and so may everybody "
        "whom a proxy or a tunnel brings there",
    ]


def test_nothing_can_be_changed() -> None:
    config = read(DESIGN)
    for table, key in [(config, "workers"), (config.limits, "recipients"), (config.domain[0], "name")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, getattr(table, key))


def test_an_empty_file_serves_no_domain_on_the_loopback() -> None:
    config = read("")
    assert config.listener == (Listener(address="127.0.0.1:2525"),)
    assert config.data_dir == Path("/srv/conf/fastsmtp-data")
    assert config.hostname == machine_name()
    assert config.domain == ()


def test_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = default()
    assert config.listener == (Listener(address="127.0.0.1:2525"),)
    assert config.listener[0].role == "mx"
    assert config.data_dir == tmp_path / "fastsmtp-data"
    assert config.domain == (Domain(name="*", recipients="any", transport="mailboxes"),)
    assert config.transport == {
        "mailboxes": Maildir(type="maildir", path=f"{tmp_path}/fastsmtp-data/mail/{{domain}}/{{local}}")
    }
    assert warnings(config) == []


def test_the_machine_has_a_name() -> None:
    assert machine_name() in (socket.gethostname().lower(), socket.getfqdn().lower(), "localhost")


def test_workers() -> None:
    assert read("workers = 7").worker_count == 7
    assert read("").worker_count == len(os.sched_getaffinity(0))


def test_what_depends_on_another_key() -> None:
    assert [listener.early_talker for listener in read(
        '[[listener]]\naddress="h:1"\n[[listener]]\naddress="h:2"\nrole="submission"\n'
        '[[listener]]\naddress="h:3"\nrole="lmtp"\n'
    ).listener] == ["refuse", "allow", "allow"]  # fmt: skip
    plain = '[[listener]]\naddress = "h:1"\n[[listener]]\naddress = "h:2"\ntls = "off"\n'
    assert [listener.tls for listener in read(plain).listener] == ["off", "off"]
    with_tls = read(plain + '[tls]\ncertificate = "c.pem"\n')
    assert [listener.tls for listener in with_tls.listener] == ["starttls", "off"]
    assert with_tls.tls is not None
    assert with_tls.tls.key == with_tls.tls.certificate == Path("/srv/conf/c.pem")


def test_tables_made_in_python_are_checked_too() -> None:
    assert Limits(message_size="1KB").message_size == 1024
    assert Listener(address=["[::]:25"]).address == (Inet("::", 25),)
    assert Withhold(keywords=["dsn"]).networks == ()
    certificate = Tls(certificate=Path("relative.pem"))
    assert certificate.key == Path("relative.pem")
    listeners = (Listener(address="h:1"), Listener(address="h:2", tls="off"))
    assert [given.tls for given in Config(listener=listeners, tls=certificate).listener] == ["starttls", "off"]
    with pytest.raises(ValidationError, match=r"no \[transport.x\]"):
        Config(domain=(Domain(name="*", recipients="any", transport="x"),))
    Config(domain=(Domain(name="*", recipients="any", transport="x"),), transport={"x": Discard(type="discard")})


def test_braces_in_the_name_of_the_folder_of_the_file() -> None:
    with pytest.raises(ConfigError, match="no other braces"):
        parse('[transport.x]\ntype = "maildir"\npath = "m/{local}"', Path("/srv/{local}"), "f")


def test_the_folder_of_the_file_itself() -> None:
    assert read('data_dir = "."').data_dir == FOLDER


def test_the_root_of_mailboxes() -> None:
    assert Maildir(type="maildir", path="/var/mail/{domain}/{local}/Maildir").root == Path("/var/mail")
    assert Maildir(type="maildir", path="{local}").root == Path()
    assert Maildir(type="maildir", path="/{local}").root == Path("/")
    relative = '[transport.x]\ntype = "maildir"\npath = "{local}"\n'
    assert read(relative).transport["x"] == Maildir(type="maildir", path="/srv/conf/{local}")
    assert read(relative.replace("{", "/{")).transport["x"] == Maildir(type="maildir", path="/{local}")


# What is wrong, where, and what was expected.

LISTENER = '[[listener]]\naddress = "h:1"\n'
DISCARD = 'transport.x.type = "discard"\n[[domain]]\n'
SIZE = 'expected a size such as "64KB", "50MB" or "1GB", or a number of octets'
DURATION = 'expected a duration such as "30s", "5m", "1h30m" or "5d", or a number of seconds'
ADDRESS = 'expected "host:port", "[IPv6]:port" (ports 0 to 65535) or "unix:/path"'
LOGIN = '[transport.x]\ntype = "smtp"\nsmarthost = "h:587"\nuser = "me"\npassword_file = "p"\n'
UNVERIFIED = "a password goes over a verified connection only"
CUSTOMER = '[[customer]]\nnetworks = ["192.0.2.1"]\ndomains = ["a.example"]\n'
NETWORK = 'expected a network such as "192.0.2.0/24" or "2001:db8::/32", without bits beyond its length'
ONE_ERROR = {
    "unknown key": ("\nworker = 3", '2: worker: unknown key; did you mean "workers"?'),
    "unknown table": ("[limit]", '1: limit: unknown key; did you mean "limits"?'),
    "unknown key in a table": (
        "[limits]\nrecipient = 3",
        '2: limits.recipient: unknown key; did you mean "recipients"?',
    ),
    "like nothing": ("[log]\nxyz = 3", "2: log.xyz: unknown key; known here: format"),
    "key of another table": (
        "[log]\ncase_sensitive = true",
        "2: log.case_sensitive: unknown key; it belongs in [[domain]]",
    ),
    "odd key": ('"a b" = 1', '1: "a b": unknown key; known here: hostname'),
    "text for a number": ('workers = "3"', '1: workers: expected a whole number, found "3"'),
    "truth for a number": ("workers = true", "1: workers: expected a whole number, found true"),
    "fraction for a number": ("workers = 3.0", "1: workers: expected a whole number, found 3.0"),
    "date for a number": (
        "workers = 2020-01-01 01:02:03",
        '1: workers: expected a whole number, found "2020-01-01 01:02:03"',
    ),
    "number for text": ("user = 3", "1: user: expected text in quotes, found 3"),
    "number for a path": ("data_dir = 3", "1: data_dir: expected a path in quotes, found 3"),
    "empty path": ('data_dir = ""', '1: data_dir: expected a path in quotes, found ""'),
    "NUL in a path": ('data_dir = "a\\u0000b"', '1: data_dir: expected a path in quotes, found "a\\u0000b"'),
    "text for truth": (
        '[[listener]]\naddress = "h:1"\nbrackets = "yes"',
        '3: listener[0].brackets: expected true or false, found "yes"',
    ),
    "passwords of two places": (
        '[auth]\nusers_file = "u"\n[auth.dovecot]\nsocket = "s"',
        "3: auth.dovecot: passwords come from one place: users_file, [auth.sql] or [auth.dovecot]",
    ),
    "recipients of no database": (
        '[sql.mail]\ndatabase = "d"\n[transport.x]\ntype = "discard"\n[[domain]]\nname = "a.example"\ntransport = "x"\n'
        'recipients = {sql = "mali", query = "SELECT 1 WHERE :address"}',
        '8: domain[0].recipients: there is no [sql.mali]; did you mean "mail"?',
    ),
    "a query for no recipient": (
        '[sql.x]\ndatabase = "d"\n[transport.x]\ntype = "discard"\n[[domain]]\nname = "a.example"\ntransport = "x"\n'
        'recipients = {sql = "x", query = "SELECT 1"}',
        "8: domain[0].recipients: expected a query that asks for :local and :domain, or for :address, found a table",
    ),
    "a query that knows everyone": (
        '[sql.x]\ndatabase = "d"\n[transport.x]\ntype = "discard"\n[[domain]]\nname = "a.example"\ntransport = "x"\n'
        'recipients = {sql = "x", query = "SELECT COUNT(*) FROM t WHERE a = :address"}',
        "8: domain[0].recipients: expected a query that finds no row for who is unknown: COUNT and EXISTS always have "
        "one, found a table",
    ),
    "recipients of a transport without a server": (
        '[transport.x]\ntype = "discard"\n[[domain]]\nname = "a.example"\ntransport = "x"\nrecipients = {ask = "x"}',
        "6: domain[0].recipients: [transport.x] is of type discard; smtp and lmtp have a server that can be asked",
    ),
    "no database": (
        '[sql.x]\ndatabase = "mysql://db/mail"',
        '2: sql.x.database: expected a URL such as "postgresql://user@host:5432/name", or the path of an SQLite file, '
        'found "mysql://db/mail"',
    ),
    "users of no database": (
        '[sql.mail]\ndatabase = "d"\n[auth.sql]\ndatabase = "mali"\nquery = "SELECT :name"',
        '4: auth.sql.database: there is no [sql.mali]; did you mean "mail"?',
    ),
    "a query for nobody": (
        '[sql.x]\ndatabase = "d"\n[auth.sql]\ndatabase = "x"\nquery = "SELECT 1 WHERE :user"',
        "5: auth.sql.query: it does not ask for a user: there is neither :name nor :local in it",
    ),
    "tokens that nobody checks": (
        "[auth.oauth]",
        "1: auth.oauth: one of introspection, keys_file and keys_url says how a token is checked",
    ),
    "tokens that two check": (
        '[auth.oauth]\nintrospection = "https://i.test"\nkeys_file = "k"',
        "1: auth.oauth: one of introspection, keys_file and keys_url says how a token is checked",
    ),
    "a client without a secret": (
        '[auth.oauth]\nintrospection = "https://i.test"\nclient_id = "me"',
        "3: auth.oauth.client_id: there is no client_secret_file",
    ),
    "a secret without a client": (
        '[auth.oauth]\nintrospection = "https://i.test"\nclient_secret_file = "me"',
        "3: auth.oauth.client_secret_file: there is no client_id",
    ),
    "signed tokens for anybody": (
        '[auth.oauth]\nkeys_file = "k"\nissuer = "i"',
        "1: auth.oauth: without audience a token that was made for somebody else would do",
    ),
    "tokens of anybody": (
        '[auth.oauth]\nkeys_file = "k"\naudience = "i"',
        "1: auth.oauth: without issuer a token that was made for somebody else would do",
    ),
    "an introspection in clear": (
        '[auth.oauth]\nintrospection = "http://i.test"',
        '2: auth.oauth.introspection: expected an address that begins with "https://", found "http://i.test"',
    ),
    "an introspection with a password in its address": (
        '[auth.oauth]\nkeys_url = "https://me:secret@i.test"\nissuer = "i"\naudience = "a"',
        '2: auth.oauth.keys_url: expected an address that begins with "https://", found "https://me:secret@i.test"',
    ),
    "tokens that are signed by whoever can check them": (
        '[auth.oauth]\nkeys_file = "k"\nissuer = "i"\naudience = "a"\nalgorithms = ["HS256"]',
        '5: auth.oauth.algorithms[0]: expected "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", '
        '"ES384", "ES512" or "EdDSA", found "HS256"',
    ),
    "a rate": (
        '[auth]\naddress_failures = "5/2d"',
        '2: auth.address_failures: expected a rate such as "60/m", "100/h" or "10/10m", over a day ("1d") at most, '
        'found "5/2d"',
    ),
    "an answer that is remembered for long": ('[auth]\ncache = "1d"', '2: auth.cache: expected at most 1h, found "1d"'),
    "a role of listeners that nobody can use": (
        f'{LISTENER}role = "odmr"',
        "3: listener[0].role: there is no [[customer]] who could fetch mail",
    ),
    "mail that nobody can fetch": (
        'transport.x.type = "odmr"',
        "1: transport.x.type: nobody can fetch its mail: there is no [[customer]]",
    ),
    "mail that nobody can fetch anywhere": (
        f'transport.x.type = "odmr"\n{CUSTOMER}',
        "1: transport.x.type: nobody can fetch its mail: there is no listener of role odmr",
    ),
    "concurrency of mail that is fetched": (
        f'{LISTENER}role = "odmr"\n{CUSTOMER}[transport.x]\ntype = "odmr"\n'
        '[[route]]\ndomain = "a.example"\ntransport = "x"\nconcurrency = 3',
        "12: route[0].concurrency: [transport.x] is of type odmr, which has one connection for a domain",
    ),
    "mail in memory that is asked for": (
        f'spool.durability = "none"\n{CUSTOMER}',
        "1: spool.durability: mail that is kept in memory only cannot be asked for by a [[customer]]",
    ),
    "a queue's name": (
        f'{CUSTOMER}queue = "#home"',
        '4: customer[0].queue: expected a name of letters, digits and ".", "_", "-", without "#", found "#home"',
    ),
    "no such choice": ('[log]\nformat = "xml"', '2: log.format: expected "auto", "human" or "json", found "xml"'),
    "too small": ("[limits]\nrecipients = 99", "2: limits.recipients: expected at least 100, found 99"),
    "size too small": ("[limits]\ntext_line = 999", "2: limits.text_line: expected at least 1000, found 999"),
    "too great": ("workers = 2000", "1: workers: expected at most 1000, found 2000"),
    "not more than zero": ('[timeouts]\ndata = "0s"', '2: timeouts.data: expected more than 0, found "0s"'),
    "bad size": ('[spool]\ninline = "5 MB"', f'2: spool.inline: {SIZE}, found "5 MB"'),
    "bad duration": ('[queue]\nretry = "5 min"', f'2: queue.retry: {DURATION}, found "5 min"'),
    "order of waits": (
        '[queue]\nretry = "1h"\nretry_max = "1m"',
        '3: queue.retry_max: expected no less than retry, found "1m"',
    ),
    "too long a wait": (
        '[queue]\nretry_max = "2d"',
        '2: queue.retry_max: expected at most 1d, found "2d"',
    ),
    "bad host name": (
        'hostname = "a..b"',
        '1: hostname: expected a host name such as "mx1.example.org" (the domain has',
    ),
    "bad postmaster": (
        'postmaster = "root"',
        '1: postmaster: expected an address such as "admin@example.org" (the address has no domain), found "root"',
    ),
    "postmaster elsewhere": ('postmaster = "a@b.example"', "1: postmaster: no [[domain]] serves b.example"),
    "bad port": (
        '[[listener]]\naddress = "0.0.0.0:65536"',
        f'2: listener[0].address: {ADDRESS}, found "0.0.0.0:65536"',
    ),
    "one bad address of two": (
        '[[listener]]\naddress = [\n "h:1",\n 7\n]',
        f"4: listener[0].address[1]: {ADDRESS}, found 7",
    ),
    "no address": ("[[listener]]\naddress = []", "2: listener[0].address: expected at least one entry, found a list"),
    "missing key": (
        '\n[[listener]]\nrole = "mx"',
        "2: listener[0].address: missing; expected address, or list of them (",
    ),
    "no listener": ("listener = []", "1: listener: expected at least one entry, found a list"),
    "table for a list": (
        '[listener]\naddress = "h:1"',
        "1: listener: expected a list, each of its tables under [[listener]], found a table",
    ),
    "value for a list": ("listener = 5", "1: listener: expected a list, found 5"),
    "value for a table": ("limits = 5", "1: limits: expected a table, found 5"),
    "list for a table": ("[[limits]]", "1: limits: expected a table, found a list"),
    "value in a list of tables": ("listener = [5]", "1: listener[0]: expected a table, found 5"),
    "users without any": (
        '[tls]\ncertificate = "x"\n[[listener]]\naddress = "h:1"\nauth = true',
        "5: listener[0].auth: nobody can log in: [auth] names no users",
    ),
    "users without TLS": (
        '[auth]\nusers_file = "x"\n[[listener]]\naddress = "h:1"\nauth = true',
        "5: listener[0].auth: nobody can log in without TLS, and tls is off",
    ),
    "users where TLS is off": (
        'auth.users_file = "x"\n[tls]\ncertificate = "x"\n[[listener]]\naddress = "h:1"\nauth = true\ntls = "off"',
        "6: listener[0].auth: nobody can log in without TLS, and tls is off",
    ),
    "passwords in clear": (
        '[[listener]]\naddress = ["127.0.0.1:1", "192.0.2.1:1"]\nauth_clear = true',
        "3: listener[0].auth_clear: passwords would cross the network in clear",
    ),
    "passwords in clear, by name": (
        '[[listener]]\naddress = "h:1"\nauth_clear = true',
        "3: listener[0].auth_clear: passwords would cross the network in clear",
    ),
    "passwords in clear, everywhere": (
        '[[listener]]\naddress = "[::]:1"\nauth_clear = true',
        "3: listener[0].auth_clear: passwords would cross the network in clear",
    ),
    "a customer who is nobody": (
        '[[customer]]\ndomains = ["a.example"]',
        "1: customer[0]: nobody is this customer: there are neither networks nor users",
    ),
    "a customer with a user that is no name": (
        '[[customer]]\ndomains = ["a.example"]\nusers = ["a\\u0007"]',
        '3: customer[0].users[0]: expected a user name in quotes, found "a\\u0007"',
    ),
    "address twice": (
        '[[listener]]\naddress = "h:1"\n[[listener]]\naddress = ["h:2", "h:1"]',
        "4: listener[1].address: h:1 stands twice",
    ),
    "LMTP on port 25": (
        '[[listener]]\naddress = "h:25"\nrole = "lmtp"',
        "2: listener[0].address: LMTP never runs on port 25 (RFC 2033 5)",
    ),
    "STARTTLS without a certificate": (
        '[[listener]]\naddress = "h:1"\ntls = "starttls"',
        "3: listener[0].tls: there is no [tls] table that names a certificate",
    ),
    "TLS without a certificate": (
        '[[listener]]\naddress = "h:1"\ntls = "implicit"',
        "3: listener[0].tls: there is no [tls] table that names a certificate",
    ),
    "bad mode": (
        '[[listener]]\naddress = "h:1"\nmode = 660',
        '3: listener[0].mode: expected a file mode such as "0660", found 660',
    ),
    "no certificate": ("[tls]", "1: tls.certificate: missing; expected path (The certificate with"),
    "bad keyword": (
        '[[listener]]\naddress = "h:1"\n[[listener.withhold]]\nkeywords = ["a b"]',
        '4: listener[0].withhold[0].keywords[0]: expected an EHLO keyword such as "CHUNKING", found "a b"',
    ),
    "no keyword": (
        '[[listener]]\naddress = "h:1"\n[[listener.withhold]]\nkeywords = []',
        "4: listener[0].withhold[0].keywords: expected at least one entry, found a list",
    ),
    "bad network": (
        '[[listener]]\naddress = "h:1"\nwithhold = [{keywords = ["X"], networks = ["192.0.2.1/24"]}]',
        f'3: listener[0].withhold[0].networks[0]: {NETWORK}, found "192.0.2.1/24"',
    ),
    "number for a network": (
        '[[listener]]\naddress = "h:1"\nwithhold = [{keywords = ["X"], networks = [4]}]',
        "3: listener[0].withhold[0].networks[0]: expected a network such as",
    ),
    "bad domain": (
        'transport.x.type = "discard"\n[[domain]]\nname = "-"\nrecipients = []\ntransport = "x"',
        '3: domain[0].name: expected a domain such as "example.org", "*.example.org" or "*" (',
    ),
    "domain twice": (
        'transport.x.type = "discard"\n[[domain]]\nname = "Bücher.example"\nrecipients = []\ntransport = "x"\n'
        '[[domain]]\nname = "xn--bcher-kva.example"\nrecipients = []\ntransport = "x"',
        "7: domain[1].name: xn--bcher-kva.example stands twice",
    ),
    "no such transport": (
        'transport.box.type = "discard"\n[[domain]]\nname = "*"\nrecipients = []\ntransport = "bxo"',
        '5: domain[0].transport: there is no [transport.bxo]; did you mean "box"?',
    ),
    "no transport at all": (
        '[[domain]]\nname = "*"\nrecipients = []\ntransport = "box"',
        "4: domain[0].transport: there is no [transport.box]",
    ),
    "address for a local-part": (
        'transport.x.type = "discard"\n[[domain]]\nname = "*"\nrecipients = ["a", "b@c"]\ntransport = "x"',
        '4: domain[0].recipients[1]: expected a local-part: what stands before the "@", such as "ann", found "b@c"',
    ),
    "bad recipients": (
        'transport.x.type = "discard"\n[[domain]]\nname = "*"\nrecipients = "all"\ntransport = "x"',
        '4: domain[0].recipients: expected "any", a list of local-parts, or a table, found "all"',
    ),
    "unknown type": (
        '[transport.x]\ntype = "uucp"',
        '2: transport.x.type: expected "smtp", "lmtp", "pipe", "maildir", "discard" or "odmr", found "uucp"',
    ),
    "no type": (
        "[transport.x]\n",
        '1: transport.x.type: expected "smtp", "lmtp", "pipe", "maildir", "discard" or "odmr", found nothing',
    ),
    "value for a transport": ("[transport]\nx = 5", "2: transport.x: expected a table, found 5"),
    "value for transports": ("transport = 5", "1: transport: expected a table, found 5"),
    "key of another type": (
        '[transport."a b"]\ntype = "discard"\npath = "/m"',
        '3: transport."a b".path: unknown key; it is for type "maildir"',
    ),
    "no path": (
        '[transport.x]\ntype = "maildir"',
        "1: transport.x.path: missing; expected path with placeholders (A mailbox's folder",
    ),
    "route to nowhere": (
        '[transport.net]\ntype = "smtp"\n[[route]]\ndomain = "*"\ntransport = "nte"',
        '5: route[0].transport: there is no [transport.nte]; did you mean "net"?',
    ),
    "route twice": (
        '[transport.x]\ntype = "smtp"\n[[route]]\ndomain = "a.test"\ntransport = "x"\n[[route]]\ndomain = "A.test"\n'
        'transport = "x"',
        "7: route[1].domain: a.test stands twice",
    ),
    "TLS of a route that is no smtp": (
        '[transport.x]\ntype = "discard"\n[[route]]\ndomain = "*"\ntransport = "x"\ntls = "off"',
        "6: route[0].tls: [transport.x] is of type discard; this is for smtp",
    ),
    "keywords of a route that is no smtp": (
        '[transport.x]\ntype = "lmtp"\naddress = "h:24"\n[[route]]\ndomain = "*"\ntransport = "x"\nignore = ["SIZE"]',
        "7: route[0].ignore: [transport.x] is of type lmtp; this is for smtp",
    ),
    "concurrency of batches": (
        '[transport.x]\ntype = "discard"\n[[route]]\ndomain = "*"\ntransport = "x"\nconcurrency = 2',
        "6: route[0].concurrency: [transport.x] is of type discard, which delivers in batches",
    ),
    "a route that lets a password go in clear": (
        f'{LOGIN}[[route]]\ndomain = "*"\ntransport = "x"\ntls = "required"',
        '9: route[0].tls: [transport.x] sends a password, and "required" is not verified',
    ),
    "a route against implicit TLS": (
        f'{LOGIN}tls = "implicit"\n[[route]]\ndomain = "*"\ntransport = "x"\ntls = "verified"',
        "10: route[0].tls: [transport.x] has TLS from the first octet; it cannot be changed here",
    ),
    "concurrency of commands": (
        '[transport.x]\ntype = "pipe"\ncommand = ["/x"]\n[[route]]\ndomain = "*"\ntransport = "x"\nconcurrency = 2',
        "7: route[0].concurrency: [transport.x] has a concurrency of its own",
    ),
    "no deliveries at once": (
        '[transport.x]\ntype = "smtp"\n[[route]]\ndomain = "*"\ntransport = "x"\nconcurrency = 0',
        "6: route[0].concurrency: expected at least 1, found 0",
    ),
    "relay without a transport": (
        '[relay]\nnetworks = ["127.0.0.0/8"]',
        "2: relay.networks: they may send to any domain, and nothing takes mail there; set relay.transport",
    ),
    "relay to nowhere": (
        '[relay]\ntransport = "internet"',
        "2: relay.transport: there is no [transport.internet]",
    ),
    "no address of ours": (
        '[relay]\nown_addresses = ["192.0.2.0/24"]',
        '2: relay.own_addresses[0]: expected an IP address such as "192.0.2.1" or "2001:db8::1", found "192.0.2.0/24"',
    ),
    "smarthost without a port": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "smtp.provider.example"',
        '3: transport.x.smarthost: expected "host:port" or "[IPv6]:port", such as "smtp.example.org:587", '
        'found "smtp.provider.example"',
    ),
    "smarthost on port 0": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "h:0"',
        '3: transport.x.smarthost: expected "host:port" or "[IPv6]:port", such as "smtp.example.org:587", found "h:0"',
    ),
    "a smarthost that is a socket": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "unix:/run/x"',
        "3: transport.x.smarthost: expected",
    ),
    "a password in clear": (f'{LOGIN}tls = "off"', f'6: transport.x.tls: {UNVERIFIED}, and "off" is none'),
    "a password over TLS that anybody may end": (
        f'{LOGIN}tls = "required"',
        f'6: transport.x.tls: {UNVERIFIED}, and "required" is none',
    ),
    "a password where TLS may fail": (
        f'{LOGIN}tls = "opportunistic"',
        f'6: transport.x.tls: {UNVERIFIED}, and "opportunistic" is none',
    ),
    "a user without a password": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "h:587"\nuser = "me"',
        "4: transport.x.user: there is no password_file",
    ),
    "a password without a user": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "h:587"\npassword_file = "p"',
        "4: transport.x.password_file: there is no user",
    ),
    "a password for anybody's MX": (
        '[transport.x]\ntype = "smtp"\npassword_file = "p"',
        "3: transport.x.password_file: a login is for a smarthost, and none is named",
    ),
    "implicit TLS by MX": (
        '[transport.x]\ntype = "smtp"\ntls = "implicit"',
        '3: transport.x.tls: "implicit" is for a smarthost, and none is named',
    ),
    "two addresses of one kind": (
        '[transport.x]\ntype = "smtp"\nsource = ["192.0.2.1", "192.0.2.2"]',
        "3: transport.x.source: more than one IPv4 address",
    ),
    "a smarthost that is this server": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "127.0.0.1:25"\n[[listener]]\naddress = "127.0.0.1:25"',
        "3: transport.x.smarthost: 127.0.0.1:25 is this server itself",
    ),
    "a smarthost that is this server by its name": (
        '[transport.x]\ntype = "smtp"\nsmarthost = "mx.test:25"\n[[listener]]\naddress = "[::]:25"',
        "4: transport.x.smarthost: mx.test:25 is this server itself",
    ),
    "LMTP to this server": (
        '[transport.x]\ntype = "lmtp"\naddress = "localhost:24"\n[[listener]]\naddress = "0.0.0.0:24"',
        "3: transport.x.address: localhost:24 is this server itself",
    ),
    "LMTP to no port": (
        '[transport.x]\ntype = "lmtp"\naddress = "localhost:0"',
        '3: transport.x.address: expected "host:port", "[IPv6]:port" (ports 1 to 65535) or "unix:/path", '
        'found "localhost:0"',
    ),
    "no command": (
        '[transport.x]\ntype = "pipe"\ncommand = []\nuser = "u"',
        "3: transport.x.command: expected at least one entry, found a list",
    ),
    "a command for a shell": (
        '[transport.x]\ntype = "pipe"\ncommand = "cat | x"\nuser = "u"',
        '3: transport.x.command: expected a list, found "cat | x"',
    ),
    "no name server": (
        '[dns]\nservers = ["ns.test"]',
        '2: dns.servers[0]: expected an IP address, "address:port" or "[IPv6]:port", found "ns.test"',
    ),
    "order of caps": (
        "[queue]\nconcurrency = 50\nconcurrency_total = 10",
        "3: queue.concurrency_total: expected no less than concurrency, found 10",
    ),
    "long value": (f'user = {[1] * 1}\nworkers = "{"9" * 100}"', "1: user: expected text in quotes, found a list"),
}


@pytest.mark.parametrize(("text", "expected"), ONE_ERROR.values(), ids=ONE_ERROR)
def test_an_error_says_where_and_what(text: str, expected: str) -> None:
    found = errors(('hostname = "mx.test"\n' if "mx.test" in text else "") + text)
    assert found[0].startswith(expected)
    if expected.endswith('"') or expected[-1].isdigit():
        assert found[0] == expected
    assert len(found) == (2 if "\nworkers" in text else 1)


def test_a_long_value_is_cut() -> None:
    (found,) = errors(f'workers = "{"9" * 100}"')
    assert found.endswith(f'found "{"9" * 76}...')


@pytest.mark.parametrize(
    "path",
    [
        "/var/mail/{user}/{local}", "/var/mail/{domain}", "/var/mail", "/m/{local", "/m/local}", "/m/{}/{local}",
        "/m/{local}-{domain}", "/m/x{local}", "/m/{local}/../x", "/m/{local}/./x", "/m/{local}/", "/m/{local}//x",
        "/m/{domain}/{local}/{local}", "/m/{domain}/{domain}/{local}", "/m/{{local}}", "", "{Local}", "/\0/{local}",
    ],
)  # fmt: skip
def test_mailbox_paths_that_could_collide_or_escape(path: str) -> None:
    with pytest.raises(ValidationError, match="a path such as"):
        Maildir(type="maildir", path=path)


MANY = """\
hostname = "mx 1"
worker = 3

[[listener]]
address = ["0.0.0.0:25",
   "[::1]:99999"]
tls = "starttls"

[limits]
message_size = "50 MB"

[[domain]]
name = "example.org"
recipients = ["ann"]
transport = "mailbox"

[[domain]]
recipients = "all"

[transport.mailboxes]
type = "uucp"
"""


def test_all_errors_come_at_once_in_the_order_of_lines() -> None:
    assert [error.partition(": ")[0] + ": " + error.split(": ")[1] for error in errors(MANY)] == [
        "1: hostname",
        "2: worker",
        "6: listener[0].address[1]",
        "7: listener[0].tls",
        "10: limits.message_size",
        "15: domain[0].transport",
        "17: domain[1].name",
        "17: domain[1].transport",
        "18: domain[1].recipients",
        "21: transport.mailboxes.type",
    ]


def test_one_exception_holds_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        read("a = 1\nb = 2")
    first, second = caught.value.errors
    assert (first.file, first.line, first.path) == ("f.toml", 1, "a")
    assert (second.file, second.line, second.path) == ("f.toml", 2, "b")
    assert str(caught.value) == f"{first}\n{second}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb =\n", "2: not TOML: Invalid value"),
        ("a = 1\n\nb c\n", "3: not TOML: Expected '=' after a key in a key/value pair"),
        ('a = 1\n\nb = """', "3: not TOML: Unterminated string"),
        ("workers = 1\nworkers = 2\n", "2: not TOML: Cannot overwrite a value"),
        ("a = " + "[" * 100_000, " nested too deeply"),
    ],
    ids=["value", "statement", "end", "twice", "deep"],
)
def test_what_is_not_toml(text: str, expected: str) -> None:
    (found,) = errors(text)
    assert found.startswith(expected)


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return [str(problem) for problem in caught.value.errors]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert problems_of(missing) == [f"{missing}: cannot be read: No such file or directory"]
    assert problems_of(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]
    latin = tmp_path / "latin"
    latin.write_bytes(b'workers = 1\nuser = "J\xf6rg"\n')
    assert problems_of(latin) == [f"{latin}:2: not UTF-8"]


def test_a_file_is_read_and_paths_start_at_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.toml").write_text('data_dir = "../d"\n' + DEFAULT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load(Path("sub/f.toml"))
    assert config.data_dir == tmp_path / "d"
    assert config.transport["mailboxes"] == Maildir(
        type="maildir", path=f"{tmp_path}/sub/fastsmtp-data/mail/{{domain}}/{{local}}"
    )
    assert str(problem_at(Path("sub/f.toml"), ("transport", "mailboxes", "path"), "no")) == (
        "sub/f.toml:12: transport.mailboxes.path: no"
    )


ANYTHING = st.recursive(
    st.sampled_from(
        ["0", "-1", "3.5", "1e999", "nan", "true", '""', '"x"', '"*"', '"any"', '"5m"', '"1KB"', '"h:25"',
         '"\\u0000"', '"\\n"', '"a@b"', '"{local}"', '"maildir"', "2020-01-01", "[]", "{}", str(10**400),
         '"' + "9" * 5000 + 's"', '"unix:"', '"[x]:1"', '"1.2.3.4.5:25"', '"\\U0010ffff.example"']
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ", ".join(items) + "]"),
        st.tuples(st.sampled_from(["type", "x", "name", "address"]), inner).map(lambda kv: f"{{{kv[0]} = {kv[1]}}}"),
    ),
    max_leaves=4,
)  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(KEYS), ANYTHING), min_size=1, max_size=4))
def test_whatever_stands_there_is_read_or_explained(settings: list[tuple[tuple[Section, str], str]]) -> None:
    for (section, key), value in settings:
        text = file_with(section, {key: value})
        for problem in problems_in(text):
            # the line is that of a key on the path, or of the table in which a key is missing
            line = text.splitlines()[problem.line - 1]
            assert line.partition(" =")[0].strip('[]"').split(".")[-1] in problem.path


def problems_in(text: str) -> list[Problem]:
    try:
        read(text)
    except ConfigError as error:
        return error.errors
    return []


@given(st.lists(st.tuples(st.sampled_from(["limits", "listener", "tls", "domain", "transport"]), ANYTHING)))
def test_whatever_stands_at_the_top_is_read_or_explained(settings: list[tuple[str, str]]) -> None:
    text = "".join(f"{key} = {value}\n" for key, value in dict(settings).items())
    assert all(problem.line for problem in problems_in(text))


# Values.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("5m", 300), ("1h30m", 5400), ("4h", 14400), ("5d", 432000), ("0s", 0), (7, 7), (0.25, 0.25),
     ("1d2h3m4s", 93784), ("90m", 5400), (36500 * 86400, 36500 * 86400)],
)  # fmt: skip
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert type(parse_duration(text)) is float


@pytest.mark.parametrize(
    "text",
    ["", "5", "m", "5 m", "5m ", "-5m", "5M", "5m1h", "5m5m", "1.5h", "5min", "٥m", True, -1, -0.5, None, [], {},
     float("inf"), float("nan"), 10**400, "9" * 400 + "d", 36500 * 86400 + 1],
)  # fmt: skip
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match="a duration such as"):
        parse_duration(text)


@given(st.integers(0, 36500 * 86400) | st.floats(0, 36500 * 86400))
def test_durations_are_read_as_they_are_shown(seconds: float) -> None:
    shown = show_duration(float(seconds))
    assert parse_duration(tomllib.loads(f"x = {shown}")["x"]) == seconds


@given(*[st.integers(0, 500)] * 4)
def test_a_duration_is_the_sum_of_its_parts(days: int, hours: int, minutes: int, seconds: int) -> None:
    expected = days * 86400 + hours * 3600 + minutes * 60 + seconds
    assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == expected


@pytest.mark.parametrize(
    ("text", "rate", "shown"),
    [("60/m", Rate(60, 60.0), "60/m"), ("10/10m", Rate(10, 600.0), "10/10m"), ("5/60m", Rate(5, 3600.0), "5/h"),
     ("1/1d", Rate(1, 86400.0), "1/d"), ("999999999/s", Rate(999999999, 1.0), "999999999/s"),
     ("7/90m", Rate(7, 5400.0), "7/1h30m"), (Rate(1, 1.0), Rate(1, 1.0), "1/s")],
)  # fmt: skip
def test_rates(text: object, rate: Rate, shown: str) -> None:
    assert parse_rate(text) == rate
    assert str(rate) == shown
    assert rate.interval == rate.seconds / rate.count


@pytest.mark.parametrize(
    "text",
    ["", "5", "/m", "5/", "0/m", "-1/m", "5/0m", "5/m ", "5 /m", "5/M", "5/2d", "5/86401s", "5/99999h", "1.5/m", "٥/m",
     "1234567890/m", "5/1h30m", 5, 5.0, True, None, []],
)  # fmt: skip
def test_what_is_no_rate(text: object) -> None:
    with pytest.raises(ValueError, match="a rate such as"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("text", "octets"),
    [("50MB", 52428800), ("64KB", 65536), ("1GB", 1 << 30), ("2TB", 2 << 40), ("0KB", 0), (0, 0), (1000, 1000),
     ((1 << 63) - 1, (1 << 63) - 1)],
)  # fmt: skip
def test_sizes(text: object, octets: int) -> None:
    assert parse_size(text) == octets


@pytest.mark.parametrize(
    "text",
    ["", "5", "KB", "5 KB", "5kb", "5K", "5KiB", "-5KB", "1.5GB", "٥KB", "5KB5KB", True, -1, 1.0, None, [], {},
     1 << 63, "9999999999TB", "9" * 5000 + "KB"],
)  # fmt: skip
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        parse_size(text)


@given(st.integers(0, (1 << 63) - 1) | st.integers(0, 8000).map(lambda n: n << 30))
def test_sizes_are_read_as_they_are_shown(octets: int) -> None:
    assert parse_size(tomllib.loads(f"x = {show_size(octets)}")["x"]) == octets


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("0.0.0.0:25", Inet("0.0.0.0", 25)),
        ("[::]:0", Inet("::", 0)),
        ("[2001:DB8:0::1]:65535", Inet("2001:db8::1", 65535)),
        ("localhost:2525", Inet("localhost", 2525)),
        ("Bücher.example:25", Inet("xn--bcher-kva.example", 25)),
        ("unix:/run/x:1", Unix(Path("/run/x:1"))),
        (Inet("::1", 1), Inet("::1", 1)),
    ],
)
def test_addresses(text: object, endpoint: Inet | Unix) -> None:
    assert parse_endpoint(text) == endpoint
    assert parse_endpoint(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", ":", "25", ":25", "h:", "h:-1", "h:65536", "h:٢٥", "h:123456", "::1:25", "[::1]", "[::1:25", "[h]:25",
     "1.2.3:25", "256.1.1.1:25", "[1.2.3.4]:25", "h h:25", "*:25", "unix:", "unix:a\0b", 25, None, True, {}],
)  # fmt: skip
def test_what_is_no_address(text: object) -> None:
    with pytest.raises(ValueError, match='"host:port"'):
        parse_endpoint(text)


@pytest.mark.parametrize(("mode", "expected"), [("0660", 0o660), ("660", 0o660), (0o600, 0o600), ("000", 0)])
def test_modes(mode: object, expected: int) -> None:
    assert Listener(address="h:1", mode=mode).mode == expected


@pytest.mark.parametrize("mode", ["", "66", "0668", "07777", "rw", 660, 777, -1, True, None])
def test_what_is_no_mode(mode: object) -> None:
    with pytest.raises(ValidationError, match="a file mode"):
        Listener(address="h:1", mode=mode)


@pytest.mark.parametrize(("pattern", "served"), [("b.example", True), ("*", True), ("*.example", True)])
@pytest.mark.parametrize(("domain", "other"), [("b.example", False), ("a.c.test", True), ("example", True)])
def test_a_postmaster_is_at_a_domain_served_here(pattern: str, served: bool, domain: str, other: bool) -> None:
    text = f"""
        postmaster = "a@{domain}"
        domain = [{{name = "{pattern}", recipients = "any", transport = "x"}}]
        transport.x.type = "discard"
    """
    if pattern == "*" or not other:
        assert read(text).postmaster == f"a@{domain}"
    else:
        assert errors(text) == [f"2: postmaster: no [[domain]] serves {domain}"]


def test_any_free_port_may_stand_twice() -> None:
    assert len(read('[[listener]]\naddress = ["h:0", "h:0"]').listener[0].address) == 2


# What is allowed, but seldom meant.


def warn(text: str) -> str:
    return "\n".join(warnings(read(text)))


SERVED = '[transport.x]\ntype = "discard"\n[[domain]]\nname = "a.example"\nrecipients = "any"\ntransport = "x"\n'


def test_warnings() -> None:
    assert warn(f'postmaster = "p@a.example"\n{SERVED}').startswith("nothing takes mail to other domains: senders")
    assert "postmaster is not set" in warn(SERVED)
    assert "postmaster" not in warn(SERVED.replace("a.example", "*"))
    assert "there is no [[domain]]: every recipient is refused" in warn("")
    assert 'durability is "none"' in warn('spool.durability = "none"')
    assert "nothing uses [transport.y]" in warn('transport.y.type = "discard"\n' + SERVED)
    submission = '[[listener]]\naddress = "h:1"\nrole = "submission"\n'
    assert "h:1: nobody can authenticate" in warn(submission)
    assert "nobody can authenticate" not in warn(submission + '[auth]\nusers_file = "users"')


INTERNET = 'transport.net.type = "smtp"\n[relay]\ntransport = "net"\n'


def test_warnings_of_what_goes_out() -> None:
    assert warn(f'{INTERNET}networks = ["192.0.2.0/24"]\n{SERVED}'.replace("a.example", "*")) == ""
    assert warn(f'postmaster = "p@a.example"\n{INTERNET}{SERVED}') == "", "reports leave, and nobody relays"
    for way in ("[relay]\ntransport", '[[route]]\ndomain = "*"\ntransport', '[[route]]\ndomain = "b.test"\ntransport'):
        found = warn(f'{SERVED}{way} = "x"\n')
        assert ("senders there are not told what fails" in found) == ("b.test" in way)
    assert "relay.networks: ::/0 makes this an open relay" in warn(f'{INTERNET}networks = ["::1", "::/0"]')
    assert "relay.networks: 128.0.0.0/1 makes this an open relay" in warn(f'{INTERNET}networks = ["128.0.0.0/1"]')
    assert "open relay" not in warn(f'{INTERNET}networks = ["192.0.2.0/24", "10.0.0.0/8", "fc00::/7"]')
    everywhere = SERVED.replace("a.example", "*").replace('"x"', '"net"')
    assert "[[domain]] * makes this an open relay" in warn(INTERNET + everywhere)
    assert "open relay" not in warn(INTERNET + everywhere.replace('"*"', '"*.a.example"'))
    assert "dns.allow_loopback is for tests" in warn("dns.allow_loopback = true")
    route = '[[route]]\ndomain = "a.example"\ntransport = "x"\n'
    assert "[[route]] a.example is never used: [[domain]] a.example serves it" in warn(SERVED + route)
    assert "never used" not in warn(SERVED + route.replace("a.", "b."))
    for address, crosses in (("unix:/run/x", False), ("localhost:24", False), ("boxes.test:24", True)):
        found = warn(f'[transport.x]\ntype = "lmtp"\naddress = "{address}"')
        assert ("[transport.x]: mail crosses the network to" in found) == crosses


def test_warnings_of_whose_certificates_are_believed(tmp_path: Path) -> None:
    tls = 'tls = { certificate = "c", key = "k" }\n'
    listener = '[[listener]]\naddress = "h:1"\nrole = "submission"\nclient_ca = "/etc/ssl/certs/ca-certificates.crt"\n'
    submission = tls + listener
    assert "h:1: client_ca /etc/ssl/certs/ca-certificates.crt is for servers of anybody" in warn(submission)
    (link := tmp_path / "ours.pem").symlink_to("/etc/ssl/certs/ca-certificates.crt")
    linked = submission.replace("/etc/ssl/certs/ca-certificates.crt", str(link))
    assert "is for servers of anybody" in warn(linked)
    ours = submission.replace("/etc/ssl/certs/ca-certificates.crt", "ours.pem")
    assert "client_ca" not in warn(ours)
    mx = ours.replace("submission", "mx")
    assert "h:1: hosts that show a certificate of another authority" in warn(mx)
    assert "another authority" not in warn(mx + 'client_certificate = "required"\n')


def test_warning_of_a_customer_who_may_be_anybody() -> None:
    row = '[[customer]]\nnetworks = ["192.0.2.0/24", "{}"]\ndomains = ["a.example"]\n'
    assert "[[customer]] networks: 0.0.0.0/0 lets anybody ask for the mail of a.example" in warn(
        SERVED + row.format("0.0.0.0/0")
    )
    assert "[[customer]] networks: ::/0 lets" in warn(SERVED + row.format("::/0"))
    assert "[[customer]]" not in warn(SERVED + row.format("10.0.0.0/8"))


def test_warning_of_an_mx_on_loopback_that_relays() -> None:
    for address, role, network, warned in (
        ("127.0.0.1:25", "mx", "127.0.0.0/8", True),
        ("[::1]:25", "mx", "::1", True),
        ("127.0.0.1:25", "mx", "192.0.2.0/24", False),
        ("192.0.2.1:25", "mx", "127.0.0.0/8", False),
        ("unix:/run/x", "mx", "127.0.0.0/8", False),
        ("127.0.0.1:24", "lmtp", "127.0.0.0/8", False),
    ):
        listener = f'[[listener]]\naddress = "{address}"\nrole = "{role}"\n'
        found = warn(f'{INTERNET}networks = ["{network}"]\n{listener}')
        assert (f"{address}: programs of this machine may send to any domain" in found) == warned


def test_what_depends_on_a_login() -> None:
    assert read(LOGIN).transport["x"].tls == "starttls"  # type: ignore[union-attr]
    assert read('[transport.x]\ntype = "smtp"\nsmarthost = "h:25"').transport["x"].tls == "opportunistic"  # type: ignore[union-attr]
    assert read(f'{LOGIN}tls = "implicit"').transport["x"].tls == "implicit"  # type: ignore[union-attr]


def test_a_route_knows_what_it_was_told() -> None:
    told = read(
        '[transport.x]\ntype = "smtp"\n[[route]]\ndomain = "a.test"\ntransport = "x"\n'
        '[[route]]\ndomain = "b.test"\ntransport = "x"\ntls = "opportunistic"\nconcurrency = 5\n'
    ).route
    assert [route.model_fields_set & {"tls", "concurrency"} for route in told] == [set(), {"tls", "concurrency"}]


@pytest.mark.parametrize("address", ["127.0.0.2:25", "[::1]:25", "localhost:25", "unix:/run/x"])
def test_no_warning_of_clear_text_on_this_machine(address: str) -> None:
    assert "in clear" not in warn(f'[[listener]]\naddress = "{address}"')


@pytest.mark.parametrize("address", ["0.0.0.0:25", "[::]:25", "mx.example:25"])
def test_warning_of_clear_text(address: str) -> None:
    listener = f'[[listener]]\naddress = ["127.0.0.1:25", "{address}"]\n'
    assert f"127.0.0.1:25, {address}: mail crosses the network in clear" in warn(listener)
    assert "in clear" not in warn(listener + '[tls]\ncertificate = "c"')


def test_kinds_are_shown_as_they_are_read() -> None:
    shows = {data.name: data for section in SECTIONS for field in section.keys.values() for data in field.metadata
             if isinstance(data, Kind)}  # fmt: skip
    assert shows["duration"].show(5400.0) == '"1h30m"'
    assert shows["size"].show(65536) == '"64KB"'
    assert [shows["file mode"].show(mode) for mode in (0o660, 0)] == ['"0660"', '"0000"']
    assert shows["list of networks"].show((ipaddress.ip_network("192.0.2.0/24"),)) == '["192.0.2.0/24"]'
