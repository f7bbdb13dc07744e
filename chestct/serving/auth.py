"""Who may use the service: names and passwords, or tokens, from the environment, where only their hashes stand.

CHESTCT_USERS="name:HASH;other:HASH" for HTTP basic authentication, CHESTCT_TOKENS="HASH;HASH" for bearer tokens;
`python serve.py --hash-password` makes a HASH of either. Without them the service is open to whoever reaches it.
"""

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from chestct.errors import ConfigError

COST, BLOCK, PARALLEL = 2**14, 8, 1
"""scrypt's N, r and p (RFC 7914) for interactive logins: 16 MiB and some 50 ms a try."""

KNOWN = 256
"""Headers that are remembered as good, as keyed hashes; without it every request would cost a scrypt."""


def hash_password(password: str, salt: bytes | None = None) -> str:
    """`scrypt$SALT$HASH`, both as URL-safe base64 without padding."""
    salt = salt or secrets.token_bytes(16)
    digest = hashlib.scrypt(password.encode(), salt=salt, n=COST, r=BLOCK, p=PARALLEL)
    return f"scrypt${_encoded(salt)}${_encoded(digest)}"


def verify(password: str, hashed: str) -> bool:
    """Whether the password belongs to the hash."""
    return hmac.compare_digest(hash_password(password, _decoded(hashed.split("$")[1])), hashed)


@dataclass
class Gate:
    """Decides about Authorization headers. users: name -> hash; tokens: hashes. Open where both are empty."""

    users: Mapping[str, str] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    _known: set[bytes] = field(default_factory=set, repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Gate":
        """Raises ConfigError where an entry is not as the module says."""
        users: dict[str, str] = {}
        for entry in _entries(environ.get("CHESTCT_USERS", "")):
            name, _, hashed = entry.partition(":")
            users[name] = _checked(hashed, "CHESTCT_USERS", "name:HASH;other:HASH")
        tokens = [
            _checked(entry, "CHESTCT_TOKENS", "HASH;HASH") for entry in _entries(environ.get("CHESTCT_TOKENS", ""))
        ]
        return cls(users, tuple(tokens))

    @property
    def open(self) -> bool:
        return not self.users and not self.tokens

    def known(self, header: str) -> bool:
        """Whether the header was let through before; quick, unlike `admits`."""
        return self._mark(header) in self._known

    def admits(self, header: str) -> bool:
        """Whether an Authorization header names somebody who may in. Slow on purpose: call it in a thread."""
        if self.known(header):
            return True
        scheme, _, rest = header.partition(" ")
        good = self._basic(rest) if scheme.lower() == "basic" else self._bearer(rest, scheme)
        if good:
            if len(self._known) >= KNOWN:
                self._known.clear()
            self._known.add(self._mark(header))
        return good

    def _basic(self, credentials: str) -> bool:
        try:
            name, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        # An unknown name costs as much as a wrong password, so that time does not tell which names exist.
        hashed = self.users.get(name) or hash_password("", b"nobody has this!")
        return verify(password, hashed) and name in self.users

    def _bearer(self, token: str, scheme: str) -> bool:
        return scheme.lower() == "bearer" and any(verify(token, hashed) for hashed in self.tokens)

    def _mark(self, header: str) -> bytes:
        return hmac.digest(self._key, header.encode("latin-1", "replace"), "sha256")


def _entries(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(";") if entry.strip()]


def _checked(hashed: str, variable: str, form: str) -> str:
    parts = hashed.split("$")
    try:
        good = (
            len(parts) == 3 and parts[0] == "scrypt" and len(_decoded(parts[1])) >= 8 and len(_decoded(parts[2])) == 64
        )
    except (binascii.Error, ValueError):
        good = False
    if not good:
        raise ConfigError(
            f"{variable} is to be {form}, each HASH as `python serve.py --hash-password` prints it. Plain "
            "passwords are not taken. In a shell, put it in single quotes: it contains $."
        )
    return hashed


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def ask_and_hash() -> None:
    """Asks for a password and prints its hash; the password is never an argument, which other users could read."""
    import getpass
    import sys

    asked = getpass.getpass("Password or token: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    print(hash_password(asked))
