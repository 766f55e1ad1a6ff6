"""TLS between qemumig and a real QEMU: certificates both ways, keys, who is let in, and who is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemumig.cli.vmm import FINAL
from tests.interop.test_channels import arrive, both_ways, ends
from tests.qemumig.channels.pki import CLIENT_NAME, psk_directory, strange, x509_directory
from tests.support.vmm import Stage, Vmm, listen, migrate, wait_until

pytestmark = pytest.mark.usefixtures("no_leaks")

KEY = "00112233445566778899aabbccddeeff"


def credentials(vmm: Vmm, kind: str, endpoint: str, directory: Path, name: str = "tls0", **more: object) -> None:
    """Give *vmm* an object of credentials and let it use that."""
    vmm.command("object-add", qom_type=f"tls-creds-{kind}", id=name, endpoint=endpoint, dir=str(directory), **more)
    vmm.command("migrate-set-parameters", tls_creds=name)


def outcome(source: Vmm, uri: str) -> str:
    """Migrate, and what became of it."""
    source.command("migrate", uri=uri)
    wait_until(lambda: source.command("query-migrate")["status"] in FINAL, "the migration does not end")
    return str(source.command("query-migrate")["status"])


@both_ways
def test_certificates_of_both_sides(stage: Stage, qemu: str, direction: str) -> None:
    """The name comes from the address; the list of who may names the subject as GnuTLS writes it."""
    source, destination = ends(stage, direction, qemu)
    files = x509_directory(stage.directory / "x509")
    credentials(source, "x509", "client", files)
    credentials(destination, "x509", "server", files, verify_peer=True)
    rules = [{"match": CLIENT_NAME, "policy": "allow", "format": "exact"}]
    destination.command("object-add", qom_type="authz-list", id="who", policy="deny", rules=rules)
    destination.command("migrate-set-parameters", tls_authz="who")
    migrate(source, destination)
    arrive(stage, destination)


@both_ways
def test_keys_that_both_sides_have(stage: Stage, qemu: str, direction: str) -> None:
    source, destination = ends(stage, direction, qemu)
    keys = psk_directory(stage.directory / "keys", qemu=KEY, other=KEY[::-1])
    credentials(source, "psk", "client", keys, username="other")
    credentials(destination, "psk", "server", keys)
    migrate(source, destination, f"unix:{stage.directory}/s")
    arrive(stage, destination)


@both_ways
def test_who_is_not_trusted_gets_nothing(stage: Stage, qemu: str, direction: str) -> None:
    """One after the other, then the right one: the destination waits on through all of them."""
    source, destination = ends(stage, direction, qemu)
    good, bad = x509_directory(stage.directory / "good"), strange(stage.directory / "strange")
    mute = x509_directory(stage.directory / "mute", client_cert="", client_key="")
    credentials(destination, "x509", "server", good, verify_peer=True)
    destination.command("object-add", qom_type="authz-simple", id="nobody", identity="CN=nobody")
    destination.command("object-add", qom_type="authz-simple", id="who", identity=CLIENT_NAME)
    destination.command("migrate-set-parameters", tls_authz="who")
    uri = listen(destination)
    for name, directory in (("strange", bad), ("mute", mute)):
        credentials(source, "x509", "client", directory, name)
        assert outcome(source, uri) == "failed"
    credentials(source, "x509", "client", good)
    source.command("migrate-set-parameters", tls_hostname="elsewhere.test")
    assert outcome(source, uri) == "failed"
    source.command("migrate-set-parameters", tls_hostname="any.wild.test")
    destination.command("migrate-set-parameters", tls_authz="nobody")
    assert outcome(source, uri) == "failed"
    destination.command("migrate-set-parameters", tls_authz="who")
    assert outcome(source, uri) == "completed"
    arrive(stage, destination)
