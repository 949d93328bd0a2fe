"""TLS contexts: which certificate a name gets, what clients show, what tickets outlive, what channels are bound to.

Handshakes are made between two memory buffers with real OpenSSL at both ends. Not here: sockets (test_starttls.py),
processes and reloads (test_reload.py).
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from certs import Authority, Files
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fastsmtp import tls
from fastsmtp.certificates import CertificateError, Watch, read_pair, try_all
from fastsmtp.tls import Demands, Entrance, Pair

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def pairs_of(*files: Files) -> list[Pair]:
    return [read_pair(*one) for one in files]


def make_entrance(pairs: Sequence[Pair], demands: Demands | None = None) -> Entrance:
    entrance = Entrance(tls.bare_context())
    entrance.use(demands or Demands(), pairs)
    return entrance


class Met(NamedTuple):
    """What both ends know after a handshake."""

    server: ssl.SSLObject
    client: ssl.SSLObject

    @property
    def leaf(self) -> bytes:
        shown = self.client.getpeercert(binary_form=True)
        assert shown
        return shown


def meet(entrance: Entrance, client: ssl.SSLContext, name: str | None, session: ssl.SSLSession | None = None) -> Met:
    """A handshake, and an octet each way, for tickets come behind it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
    far = entrance.context.wrap_bio(to_server, to_client, server_side=True)
    left = [near, far]
    while left:
        for one in list(left):
            try:
                one.do_handshake()
                left.remove(one)
            except ssl.SSLWantReadError:
                pass
    far.write(b"x")
    assert near.read(1) == b"x"
    near.write(b"y")
    assert far.read(1) == b"y"
    return Met(far, near)


# Names


def test_each_name_gets_its_certificate(authority: Authority) -> None:
    one = authority.issue("one", "mx.one.test")
    two = authority.issue("two", "mx.two.test", "*.two.test")
    pairs = pairs_of(one, two)
    entrance = make_entrance(pairs)
    for name, expected in (
        ("mx.one.test", 0),
        ("MX.Two.Test", 1),
        ("any.two.test", 1),
    ):
        met = meet(entrance, authority.client(), name)
        assert (
            (hashlib.sha256(met.leaf).digest(),) == tls.end_points(met.server.context) == (pairs[expected].end_point,)
        )


@pytest.mark.parametrize("name", [None, "unknown.test", "deep.any.two.test", "*.one.test"])
def test_whoever_asks_for_no_name_of_ours_gets_the_default(authority: Authority, name: str | None) -> None:
    pairs = pairs_of(authority.issue("one", "mx.one.test"), authority.issue("two", "mx.two.test", "*.two.test"))
    client = authority.client()
    client.check_hostname = False
    met = meet(make_entrance(pairs), client, name)
    assert tls.end_points(met.server.context) == (pairs[0].end_point,)


@pytest.mark.parametrize("version", VERSIONS)
def test_both_types_of_key_for_one_name(authority: Authority, version: ssl.TLSVersion) -> None:
    pairs = pairs_of(authority.issue("rsa", "mx.test", kind="rsa"), authority.issue("ec", "mx.test"))
    entrance = make_entrance(pairs)
    seen = set()
    for algorithms in ("RSA", "ECDSA"):
        client = authority.client(ssl.TLSVersion.TLSv1_2)
        client.set_ciphers(f"ECDHE-{algorithms}-AES128-GCM-SHA256")
        met = meet(entrance, client, "mx.test")
        assert set(tls.end_points(met.server.context)) == {pair.end_point for pair in pairs}
        seen.add(hashlib.sha256(met.leaf).digest())
    assert seen == {pair.end_point for pair in pairs}
    assert meet(entrance, authority.client(version), "mx.test").client.version() is not None


def test_the_choice_of_certificates() -> None:
    def pair(file: str, kind: str, *names: str) -> Pair:
        return Pair(b"", b"", names, kind, b"", file, 0)

    chosen = tls.choose(
        [pair("1", "RSA", "a", "b"), pair("2", "EC", "a"), pair("3", "EC", "c"), pair("4", "EC", "a"), pair("5", "RSA")]
    )
    files = {name: sorted(one.file for one in found) for name, found in chosen.items()}
    assert files == {"": ["1", "2"], "a": ["1", "2"], "b": ["1"], "c": ["3"]}


def test_a_certificate_without_names_is_a_default(authority: Authority) -> None:
    pairs = pairs_of(authority.issue("cn", common_name="old.test"), authority.issue("other", "new.test"))
    assert [pair.names for pair in pairs] == [("old.test",), ("new.test",)]
    nameless = pairs_of(authority.issue("none", mail="x@y.test"))
    assert nameless[0].names == ()
    assert set(tls.choose(nameless)) == {""}


# Channel bindings (RFC 5929 4.1)


@pytest.mark.parametrize(
    ("digest", "expected"),
    [(hashes.SHA256(), "sha256"), (hashes.SHA384(), "sha384"), (hashes.SHA512(), "sha512")],
    ids=lambda value: getattr(value, "name", value),
)
def test_end_points_use_the_hash_of_the_signature(
    authority: Authority, digest: hashes.HashAlgorithm, expected: str
) -> None:
    files = authority.issue("digest", "mx.test", digest=digest)
    der = x509.load_pem_x509_certificate(files.certificate.read_bytes()).public_bytes(serialization.Encoding.DER)
    assert read_pair(*files).end_point == hashlib.new(expected, der).digest()


def test_a_weak_hash_or_none_is_replaced_by_sha256(tmp_path: Path) -> None:
    from fastsmtp.certificates import _end_point

    class Leaf:
        """A certificate that was signed with SHA-1, which nothing here would sign any more."""

        signature_hash_algorithm: hashes.HashAlgorithm | None = hashes.SHA1()

        def public_bytes(self, _: object) -> bytes:
            return b"der"

    assert _end_point(Leaf()) == hashlib.sha256(b"der").digest()  # type: ignore[arg-type]
    leaf = Leaf()
    leaf.signature_hash_algorithm = None  # Ed25519
    assert _end_point(leaf) == hashlib.sha256(b"der").digest()  # type: ignore[arg-type]


def test_other_contexts_have_no_end_points() -> None:
    assert tls.end_points(tls.bare_context()) == ()


# Clients' certificates


@pytest.fixture(scope="module")
def server(authority: Authority) -> list[Pair]:
    return pairs_of(authority.issue("server", "mx.test"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_is_known_by_its_certificate(
    authority: Authority, server: list[Pair], version: ssl.TLSVersion
) -> None:
    demands = Demands(client="optional", client_ca=authority.ca.read_text())
    entrance = make_entrance(server, demands)
    mail = authority.issue("mail", mail="ann@here.test", common_name="Ann")
    both = authority.client(version, mail)
    first = meet(entrance, both, "mx.test")
    assert tls.identity(first.server) == "ann@here.test"
    again = meet(entrance, both, "mx.test", first.client.session)
    assert (again.client.session_reused, tls.identity(again.server)) == (True, "ann@here.test")
    assert tls.identity(meet(entrance, authority.client(version), "mx.test").server) == ""


def test_a_common_name_counts_where_there_is_no_address(authority: Authority, server: list[Pair]) -> None:
    class Shown:
        def __init__(self, certificate: dict[str, object]) -> None:
            self.certificate = certificate

        def getpeercert(self) -> dict[str, object]:
            return self.certificate

    subject = ((("organizationName", "x"),), (("commonName", "bob"),))
    assert tls.identity(Shown({"subject": subject})) == "bob"  # type: ignore[arg-type]
    names = (("DNS", "h.test"), ("email", "bob@h.test"))
    assert tls.identity(Shown({"subject": subject, "subjectAltName": names})) == "bob@h.test"  # type: ignore[arg-type]
    assert tls.identity(Shown({})) == ""  # type: ignore[arg-type]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("client", ["optional", "required"])
def test_a_foreign_certificate_ends_the_handshake(
    authority: Authority, server: list[Pair], tmp_path: Path, version: ssl.TLSVersion, client: str
) -> None:
    entrance = make_entrance(server, Demands(client=client, client_ca=authority.ca.read_text()))  # type: ignore[arg-type]
    foreign = Authority(tmp_path, "Other CA").issue("foreign", mail="ann@here.test")
    with pytest.raises(ssl.SSLError):
        meet(entrance, authority.client(version, foreign), "mx.test")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_certificate_that_is_required_is_missed(
    authority: Authority, server: list[Pair], version: ssl.TLSVersion
) -> None:
    entrance = make_entrance(server, Demands(client="required", client_ca=authority.ca.read_text()))
    with pytest.raises(ssl.SSLError):
        meet(entrance, authority.client(version), "mx.test")
    mine = authority.issue("mine", mail="ann@here.test")
    assert tls.identity(meet(entrance, authority.client(version, mine), "mx.test").server) == "ann@here.test"


def test_nobody_is_asked_where_it_is_off(authority: Authority, server: list[Pair]) -> None:
    mine = authority.issue("mine", mail="ann@here.test")
    assert tls.identity(meet(make_entrance(server), authority.client(None, mine), "mx.test").server) == ""


# Exchange


@pytest.mark.parametrize("version", VERSIONS)
def test_tickets_outlive_an_exchange_of_certificates(authority: Authority, version: ssl.TLSVersion) -> None:
    entrance = make_entrance(pairs_of(authority.issue("old", "mx.test")))
    client = authority.client(version)
    session = meet(entrance, client, "mx.test").client.session
    new = pairs_of(authority.issue("new", "mx.test", kind="rsa"))
    entrance.use(Demands(), new)
    assert meet(entrance, client, "mx.test", session).client.session_reused
    fresh = meet(entrance, authority.client(version), "mx.test")
    assert hashlib.sha256(fresh.leaf).digest() == new[0].end_point
    other = make_entrance(new)
    assert not meet(other, client, "mx.test", session).client.session_reused


def test_an_exchange_that_cannot_be_changes_nothing(authority: Authority, server: list[Pair]) -> None:
    entrance = make_entrance(server)
    (other,) = pairs_of(authority.issue("other", "mx.test"))
    (foreign,) = pairs_of(authority.issue("foreign", "mx.test"))
    with pytest.raises(ssl.SSLError):
        entrance.use(Demands(minimum="1.3"), [other, foreign._replace(key=other.key, names=("b.test",))])
    met = meet(entrance, authority.client(ssl.TLSVersion.TLSv1_2), "mx.test")
    assert tls.end_points(met.server.context) == (server[0].end_point,)


def test_what_is_demanded_holds_for_every_name(authority: Authority) -> None:
    pairs = pairs_of(authority.issue("one", "one.test"), authority.issue("two", "two.test"))
    entrance = make_entrance(pairs, Demands(minimum="1.2", ciphers="ECDHE+AES256+AESGCM"))
    for name in ("one.test", "two.test"):
        cipher = meet(entrance, authority.client(ssl.TLSVersion.TLSv1_2), name).client.cipher()
        assert cipher is not None
        assert cipher[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"
        client = authority.client(ssl.TLSVersion.TLSv1_2)
        client.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        with pytest.raises(ssl.SSLError):
            meet(entrance, client, name)
    entrance.use(Demands(minimum="1.3"), pairs)
    for name in ("one.test", "two.test"):
        with pytest.raises(ssl.SSLError):
            meet(entrance, authority.client(ssl.TLSVersion.TLSv1_2), name)


# Files


def test_ciphers_that_are_none(server: list[Pair]) -> None:
    with pytest.raises(CertificateError, match=r"^cannot be used: "):
        try_all([Demands(ciphers="NONSENSE")], tuple(server))


def test_a_chain_is_sent_whole(authority: Authority) -> None:
    files = authority.issue("leaf", "mx.test")
    files.certificate.write_bytes(files.certificate.read_bytes() + authority.ca.read_bytes())
    pair = read_pair(*files)
    assert pair.names == ("mx.test",)
    assert meet(make_entrance([pair]), authority.client(), "mx.test").client.version() == "TLSv1.3"


def test_a_key_of_another_type_is_not_the_certificates(authority: Authority) -> None:
    certificate, _ = authority.issue("x", "mx.test", kind="rsa")
    _, key = authority.issue("y", "mx.test")
    with pytest.raises(CertificateError, match="does not belong to the certificate"):
        read_pair(certificate, key)


def test_one_file_may_hold_both(authority: Authority) -> None:
    files = authority.issue("both", "mx.test")
    files.certificate.write_bytes(files.key.read_bytes() + files.certificate.read_bytes())
    assert read_pair(files.certificate, files.certificate).names == ("mx.test",)


def test_nothing_of_a_key_is_told(authority: Authority) -> None:
    files = authority.issue("secret", "mx.test")
    assert "PRIVATE" not in str(read_pair(*files)._replace(key=b"").chain)
    key = ec.generate_private_key(ec.SECP256R1())
    files.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    with pytest.raises(CertificateError) as caught:
        read_pair(*files)
    assert "BEGIN" not in str(caught.value)


def test_files_are_taken_when_they_stand_still(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    watch = Watch([one, two, one])
    assert not any(watch.has_changed(now) for now in (10.0, 11.0, 12.0))
    one.write_text("22")
    assert not watch.has_changed(13.0)  # it has changed, but not rested
    two.write_text("2")
    assert not watch.has_changed(13.5)  # too soon for another look
    assert not watch.has_changed(14.0)
    assert watch.has_changed(15.0)
    assert not watch.has_changed(16.0)  # told once
    two.unlink()
    assert not watch.has_changed(17.0)
    assert watch.has_changed(18.0)
    assert not Watch([]).has_changed(1000.0)
