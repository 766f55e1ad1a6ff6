"""TLS credentials, authorizers and secrets: what they take, what they refuse, and what they then do."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qemumig.channels.credentials import versions
from qemumig.channels.objects import TYPES, Secret, create_object
from qemumig.channels.openssl import TLS1_2_VERSION, TLS1_3_VERSION
from qemumig.errors import OptionError

from .pki import CLIENT_NAME, STORE, make, nothing, psk_directory, x509_directory

KEY = "00112233445566778899aabbccddeeff"


def refusal(kind: str, **properties: Any) -> str:
    with pytest.raises(OptionError) as caught:
        make(kind, **properties)
    return str(caught.value)


# ---- properties ----


def test_every_type_refuses_a_property_that_it_does_not_have() -> None:
    for kind in TYPES:
        assert refusal(kind, colour="red") == "Invalid parameter 'colour'"


@pytest.mark.parametrize(
    ("kind", "properties", "finding"),
    [
        ("warp-drive", {}, "Parameter 'qom-type' does not accept value 'warp-drive'"),
        ("tls-creds-x509", {"endpoint": "both"}, "Parameter 'endpoint' does not accept value 'both'"),
        ("tls-creds-x509", {"endpoint": "server"}, "Missing 'dir' property value"),
        ("tls-creds-psk", {"verify_peer": "maybe"}, "Parameter 'verify-peer' expects 'on' or 'off'"),
        ("tls-creds-psk", {"dir": 3}, "Invalid parameter type for 'dir', expected: string"),
        ("tls-creds-psk", {"dir": "/x", "endpoint": "server", "username": "u"}, "username should not be set"),
        ("tls-creds-anon", {"priority": "QUATSCH"}, "Unable to set TLS session priority QUATSCH: expected NORMAL"),
        ("authz-simple", {}, "Parameter 'identity' is missing"),
        ("authz-listfile", {}, "Parameter 'filename' is missing"),
        ("authz-list", {"policy": "perhaps"}, "Parameter 'policy' does not accept value 'perhaps'"),
        ("authz-list", {"rules": "x"}, "Invalid parameter type for 'rules', expected: array"),
        ("authz-list", {"rules": [3]}, "Invalid parameter type for 'rules[0]', expected: object"),
        ("authz-list", {"rules": [{"match": "x"}]}, "Parameter 'rules[0].policy' is missing"),
        ("authz-list", {"rules": [{"match": 1, "policy": "deny"}]}, "for 'rules[0].match', expected: string"),
        ("authz-list", {"rules": [{"match": "x", "policy": []}]}, "Parameter 'policy' does not accept value '[]'"),
        ("authz-list", {"rules": [{"match": "x", "policy": "deny", "a": 1}]}, "'rules[0].a' is unexpected"),
        ("secret", {}, "Provide either 'data' or 'file'"),
        ("secret", {"data": "x", "file": "y"}, "Provide either 'data' or 'file'"),
        ("secret", {"data": "x", "keyid": "k", "iv": "i"}, "'keyid') is not built"),
        ("secret", {"data": "%", "format": "base64"}, "the secret is not base64"),
        ("secret", {"file": "/nonexistent"}, "Unable to read /nonexistent: No such file or directory"),
    ],
)
def test_bad_properties_are_refused(kind: str, properties: dict[str, Any], finding: str) -> None:
    assert finding in refusal(kind, **properties)


def test_secrets() -> None:
    assert make("secret", data="sesam") == Secret(b"sesam")
    assert make("secret", data=base64.b64encode(b"\0sesam").decode(), format="base64") == Secret(b"\0sesam")


# ---- certificates ----

READ = "Unable to access credentials {dir}/"


@pytest.mark.parametrize(
    ("endpoint", "files", "finding"),
    [
        ("server", {"ca_cert": ""}, READ + "ca-cert.pem: No such file or directory"),
        ("server", {"server_cert": ""}, READ + "server-cert.pem: No such file or directory"),
        ("server", {"server_key": ""}, READ + "server-key.pem: No such file or directory"),
        ("client", {"client_key": ""}, READ + "client-key.pem: No such file or directory"),
        ("server", {"ca_cert": "good-ca-crl"}, "Unable to import CA certificate list {dir}/ca-cert.pem: there is no"),
        ("server", {"ca_cert": "expired-ca-cert"}, "The CA certificate {dir}/ca-cert.pem has expired"),
        ("server", {"ca_cert": "good-client-cert"}, "{dir}/ca-cert.pem basic constraints do not show a CA"),
        ("server", {"ca_cert": "strange-ca-cert"}, "{dir}/ca-cert.pem: The certificate hasn't got a known issuer"),
        (
            "server",
            {"server_cert": "expired-server-cert", "server_key": "expired-server-key"},
            "The server certificate {dir}/server-cert.pem has expired",
        ),
        (
            "server",
            {"server_cert": "future-server-cert", "server_key": "future-server-key"},
            "The server certificate {dir}/server-cert.pem is not yet active",
        ),
        ("server", {"server_key": "strange-server-key"}, "'{dir}/server-cert.pem' & key '{dir}/server-key.pem'"),
        ("server", {"server_key": "good-server-cert"}, "Cannot load certificate '{dir}/server-cert.pem'"),
        ("server", {"server_key": "encrypted-server-key"}, "Cannot load certificate '{dir}/server-cert.pem'"),
        ("server", {"ca_crl": "good-server-key"}, "Unable to import the CA certificates and CRL in {dir}"),
    ],
)
def test_bad_certificates_are_refused(endpoint: str, files: dict[str, str], finding: str, tmp_path: Path) -> None:
    directory = x509_directory(tmp_path / "creds", **files)
    assert finding.format(dir=directory) in refusal("tls-creds-x509", dir=str(directory), endpoint=endpoint)


def test_a_certificate_that_is_no_certificate_is_refused(tmp_path: Path) -> None:
    directory = x509_directory(tmp_path / "creds")
    (directory / "server-cert.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    text = refusal("tls-creds-x509", dir=str(directory), endpoint="server")
    assert text.startswith(f"Unable to import server certificate {directory}/server-cert.pem: ")


def test_a_client_needs_no_certificate_of_its_own(tmp_path: Path) -> None:
    directory = x509_directory(tmp_path / "creds", client_cert="", client_key="")
    assert make("tls-creds-x509", dir=str(directory), endpoint="client").endpoint == "client"


def test_without_a_sanity_check_old_certificates_load(tmp_path: Path) -> None:
    directory = x509_directory(tmp_path / "creds", server_cert="expired-server-cert", server_key="expired-server-key")
    assert make("tls-creds-x509", dir=str(directory), endpoint="server", sanity_check=False).endpoint == "server"


def test_an_encrypted_key_opens_with_its_password(tmp_path: Path) -> None:
    properties = {
        "dir": str(x509_directory(tmp_path / "creds", server_key="encrypted-server-key")),
        "endpoint": "server",
        "passwordid": "pw",
    }
    secrets = {"pw": Secret(b"sesam")}
    assert create_object("tls-creds-x509", "c", properties, secrets.get).endpoint == "server"
    with pytest.raises(OptionError, match="Cannot load certificate"):
        create_object("tls-creds-x509", "c", properties, {"pw": Secret(b"wrong")}.get)
    with pytest.raises(OptionError, match="No secret with id 'pw'"):
        create_object("tls-creds-x509", "c", properties, nothing)


# ---- pre-shared keys ----


@pytest.mark.parametrize(
    ("line", "finding"),
    [
        ("qemu:xyz", "line 2: found no key in hexadecimal"),
        ("qemu", "line 2: found no key in hexadecimal"),
        ("qemu:", "line 2: found no key in hexadecimal"),
        ("other:00", "Username qemu not found in PSK file"),
    ],
)
def test_bad_key_files_are_refused_and_no_key_is_told(line: str, finding: str, tmp_path: Path) -> None:
    psk_directory(tmp_path)
    with (tmp_path / "keys.psk").open("a") as file:
        file.write(line + "\n")
    text = refusal("tls-creds-psk", dir=str(tmp_path))
    assert finding in text and "xyz" not in text


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    text = refusal("tls-creds-psk", dir=str(tmp_path), endpoint="server")
    assert text == f"Unable to access credentials {tmp_path}/keys.psk: No such file or directory"


def test_a_user_is_chosen_by_name(tmp_path: Path) -> None:
    psk_directory(tmp_path, qemu=KEY, other=KEY)
    assert make("tls-creds-psk", dir=str(tmp_path), username="other").endpoint == "client"
    assert "Username third not found" in refusal("tls-creds-psk", dir=str(tmp_path), username="third")


# ---- priorities ----


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        ("NORMAL", (TLS1_2_VERSION, TLS1_3_VERSION)),
        ("@SYSTEM", (TLS1_2_VERSION, TLS1_3_VERSION)),
        ("NORMAL:-VERS-TLS1.3", (TLS1_2_VERSION, TLS1_2_VERSION)),
        ("NORMAL:-VERS-ALL:+VERS-TLS1.3", (TLS1_3_VERSION, TLS1_3_VERSION)),
    ],
)
def test_priorities_choose_versions(priority: str, expected: tuple[int, int]) -> None:
    assert versions(priority) == expected


@pytest.mark.parametrize("priority", ["SECURE256", "NORMAL:-VERS-ALL", "NORMAL:+ARCFOUR-128", "NORMAL:+VERS-SSL3.0"])
def test_priorities_without_a_counterpart_are_refused(priority: str) -> None:
    with pytest.raises(OptionError, match="Unable to set TLS session priority"):
        versions(priority)


# ---- authorization ----


def test_a_simple_authorizer_knows_one_identity() -> None:
    authorizer = make("authz-simple", identity=CLIENT_NAME)
    assert authorizer.is_allowed(CLIENT_NAME)
    assert not authorizer.is_allowed(CLIENT_NAME + "x") and not authorizer.is_allowed("")


def rule(match: str, policy: str, form: str = "exact") -> dict[str, str]:
    return {"match": match, "policy": policy, "format": form}


def test_the_first_rule_that_matches_decides() -> None:
    rules = [rule("CN=bad", "deny"), rule("CN=*", "allow", "glob"), rule("CN=late", "deny")]
    authorizer = make("authz-list", rules=rules)
    assert [authorizer.is_allowed(name) for name in ("CN=bad", "CN=good", "CN=late", "O=x")] == [False, True, True, False]
    assert make("authz-list", rules=rules, policy="allow").is_allowed("O=x")
    assert not make("authz-list").is_allowed("anybody")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("a*c", "abbc", True),
        ("a?c", "abc", True),
        ("a?c", "ac", False),
        ("a.c", "abc", False),
        ("[ab]", "a", False),
        ("*", "", True),
        ("*x", "x\nx", True),
    ],
)
def test_globs_know_asterisks_and_question_marks_only(pattern: str, name: str, expected: bool) -> None:
    assert make("authz-list", rules=[rule(pattern, "allow", "glob")]).is_allowed(name) is expected


def test_a_list_in_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"rules": [rule("a", "allow")]}))
    fresh = make("authz-listfile", filename=str(path))
    frozen = make("authz-listfile", filename=str(path), refresh=False)
    assert fresh.is_allowed("a") and not fresh.is_allowed("b")
    replacement = tmp_path / "new"
    replacement.write_text(json.dumps({"rules": [rule("b", "allow")], "policy": "deny"}))
    os.replace(replacement, path)
    assert fresh.is_allowed("b") and not fresh.is_allowed("a")
    assert frozen.is_allowed("a") and not frozen.is_allowed("b")
    path.write_text("{")
    with pytest.raises(OptionError, match=r"authorization file '.*list.json' is not JSON"):
        fresh.is_allowed("b")


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("{]", "is not JSON"),
        ("[" * 100000, "is not JSON"),
        ("[]", "is not an object of 'rules' and 'policy'"),
        ('{"other": 1}', "is not an object of 'rules' and 'policy'"),
        ('{"rules": [{"policy": "deny"}]}', "Parameter 'rules[0].match' is missing"),
        ('{"policy": {}}', "Parameter 'policy' does not accept value '{}'"),
    ],
)
def test_bad_list_files_are_refused(text: str, finding: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(text)
    assert finding in refusal("authz-listfile", filename=str(path))


def test_no_key_in_the_store_is_readable_as_a_password() -> None:
    """The encrypted key really is: the test above would otherwise prove nothing."""
    assert b"ENCRYPTED" in (STORE / "encrypted-server-key.pem").read_bytes()
