"""Directories of credentials for the TLS tests, put together from the certificates in pki/ (see its README)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qemumig.channels.objects import create_object

STORE = Path(__file__).parent / "pki"
CLIENT_NAME = "C=XX,ST=A State,L=Town,O=Example\\, Inc.,OU=Unit,CN=client.test"
ROLES = ("server-cert", "server-key", "client-cert", "client-key")


def x509_directory(path: Path, **files: str) -> Path:
    """A directory with everything of the good authority; *files* replace one (`server_key="strange-server-key"`).

    An empty name leaves the file out.
    """
    path.mkdir()
    wanted = {name: f"good-{name}" for name in ("ca-cert", *ROLES)}
    wanted |= {name.replace("_", "-"): source for name, source in files.items()}
    for name, source in wanted.items():
        if source:
            shutil.copy(STORE / f"{source}.pem", path / f"{name}.pem")
    return path


def strange(path: Path) -> Path:
    """A directory with everything of the authority that nobody else trusts."""
    return x509_directory(path, **{name: f"strange-{name}" for name in ("ca-cert", *ROLES)})


def psk_directory(path: Path, **keys: str) -> Path:
    """A directory with a file of pre-shared keys: user name = key in hexadecimal."""
    path.mkdir(exist_ok=True)
    (path / "keys.psk").write_text("# users\n" + "".join(f"{user}:{key}\n" for user, key in keys.items()))
    return path


def make(kind: str, **properties: Any) -> Any:
    """An object of *kind*; underscores in names become dashes."""
    return create_object(kind, "made", {name.replace("_", "-"): value for name, value in properties.items()}, nothing)


def nothing(object_id: str) -> Any:
    """A finder where there are no objects."""
