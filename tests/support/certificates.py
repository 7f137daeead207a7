"""Certificates for tests: an authority in a folder of its own, by the openssl program."""

from __future__ import annotations

import subprocess
from pathlib import Path

CA_CONFIG = """[ca]
default_ca = own
[own]
database = index.txt
default_md = sha256
serial = serial
new_certs_dir = .
policy = any
unique_subject = no
[any]
commonName = supplied
"""


class Authority:
    """A certificate authority in a folder of its own, by the openssl program."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.file = folder / "ca.pem"
        (folder / "ca.cnf").write_text(CA_CONFIG)
        (folder / "index.txt").touch()
        (folder / "serial").write_text("01\n")
        usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
        subject = ["-days", "2", "-subj", f"/CN={name}", *usage]
        self._openssl("req", "-x509", *self._new_key("ca"), "-out", "ca.pem", *subject)

    def issue(
        self, name: str, host: str = "IP:127.0.0.1,DNS:localhost", years: tuple[int, int] = (2020, 2049)
    ) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key."""
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={host}\nauthorityKeyIdentifier=keyid\n")
        self._openssl("req", *self._new_key(name), "-out", f"{name}.csr", "-subj", f"/CN={name}")
        first, last = years
        self._openssl(
            "ca", "-batch", "-notext", "-config", "ca.cnf", "-cert", "ca.pem", "-keyfile", "ca.key",
            "-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext",
            "-startdate", f"{first}0101000000Z", "-enddate", f"{last}0101000000Z",
        )  # fmt: skip
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def _new_key(self, name: str) -> list[str]:
        return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{name}.key"]

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)
