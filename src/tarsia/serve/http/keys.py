"""Who may ask, for what and how often: a YAML file of keys, of which only hashes are kept.

keys:
  - name: acme-laptop            # for the log; the key itself is nowhere
    sha256: 64 hexadecimal digits
    tenant: acme                 # whose requests share a place in the queue
    weight: 2                    # of the tenant against others
    adapters: ["acme-*", ocr]    # shell patterns of names; none: no adapter
    base: true                   # may ask for the bare base
    requests_per_minute: 600
    tokens_per_minute: 200000
    at_once: 16
    admin: false                 # may see metrics, load and unload
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tarsia.core.errors import ConfigError

_PREFIX: Final = "tarsia-"
_Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Pattern = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._*?\[\]!-]{1,100}$")]


class Key(BaseModel):
    """One key's rights. ``requests_per_minute`` and so on None: as many as the server takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: _Label
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    tenant: _Label
    weight: float = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    adapters: list[_Pattern] = []
    base: bool = True
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    at_once: int | None = Field(default=None, ge=1)
    admin: bool = False

    def may(self, adapter: str) -> bool:
        """Whether it may use an adapter of this name."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    @property
    def unbounded(self) -> bool:
        """Whether it may use every adapter."""
        return "*" in self.adapters


class _Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: list[Key]


ANYBODY: Final = Key(name="anybody", sha256="0" * 64, tenant="local", adapters=["*"], admin=True)
"""Whoever asks a server that needs no key."""


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys of a server."""

    keys: tuple[Key, ...]

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """The keys of a file. Raises ConfigError where it is none, or somebody else may write it."""
        path = Path(path)
        try:
            mode, text = path.stat().st_mode, path.read_text(encoding="utf8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("The file of keys can not be read.", given=f"{path}: {error}") from None
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError("Others may write the file of keys.", given=path, do=f"chmod 600 {path}")
        try:
            written = _Written.model_validate(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError("The file of keys is no YAML.", given=f"{path}: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ConfigError(
                "The file of keys has a key that is none.",
                given=f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                allowed=", ".join(Key.model_fields),
                do="see docs/serving.md",
            ) from None
        return cls.of(written.keys)

    @classmethod
    def of(cls, keys: Sequence[Key]) -> Self:
        """A ring of these. Raises ConfigError where there is none, or two are the same."""
        if not keys:
            raise ConfigError("A server with keys needs at least one.", do="tarsia serve --new-key makes one")
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in keys]
            if len(set(values)) < len(values):
                raise ConfigError(f"Two keys have the same {what}.")
        weights: dict[str, float] = {}
        for key in keys:
            if weights.setdefault(key.tenant, key.weight) != key.weight:
                raise ConfigError("Two keys of one tenant have different weights.", given=key.tenant)
        return cls(tuple(keys))

    def find(self, secret: str) -> Key | None:
        """Whose secret this is. All hashes are compared, in full, whatever is found."""
        digest = hashlib.sha256(secret.encode("utf8", "surrogatepass")).hexdigest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return found


def new_key(name: str, tenant: str, adapters: Sequence[str] = ()) -> tuple[str, str]:
    """A new secret of 256 bits, told once, and what is to be written in the file of keys for it."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    key = Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest(), tenant=tenant, adapters=list(adapters))
    return secret, yaml.safe_dump([key.model_dump(exclude_defaults=True)], sort_keys=False)
