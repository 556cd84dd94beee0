"""The certificate of a deletion request: plain facts under the project's ed25519 signature, which anybody can check anywhere.

The signature is over the canonical form: the JSON of everything but `signature`, keys sorted, no spaces, UTF-8. `public_key` is the one
line of base64 between the first and the last line of the key's PEM file, so that the two can be compared by eye; it is signed along.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from tasks.core import files
from tasks.core.erasure._facts import Check, Facts, faults, parse
from tasks.core.erasure._signing import known_key, line_of, private_key, public_key, read_key
from tasks.core.errors import UserError
from tasks.core.settings import Settings

if TYPE_CHECKING:
    from tasks.core.store import Store

__all__ = [
    "Check",
    "Facts",
    "canonical",
    "faults",
    "keep",
    "kept",
    "known_key",
    "names",
    "parse",
    "place",
    "public_key",
    "read_key",
    "recheck",
    "sign",
    "verify",
]


def sign(settings: Settings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of these facts: they, `public_key` and `signature`. A figure that is no number becomes null.

    The same facts give the same certificate. Raises ValueError where a fact is missing or of another kind, UserError where the key cannot
    be read.
    """
    key = private_key(settings)
    whole = {**_plain(facts), "public_key": line_of(key.public_key())}
    whole.pop("signature", None)
    if wrong := faults(whole):
        raise ValueError(f"these are not the facts of a certificate: {wrong}")
    return {**whole, "signature": base64.b64encode(key.sign(canonical(whole))).decode()}


def canonical(certificate: Mapping[str, Any]) -> bytes:
    """What is signed. Raises ValueError for values that JSON in UTF-8 has no form for."""
    signed = {name: value for name, value in certificate.items() if name != "signature"}
    return json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def verify(certificate: str | bytes | Mapping[str, Any], trusted: str | None = None) -> list[Check]:
    """Its fields, its signature and its key, from the certificate alone.

    trusted  the project's public key, as `known_key` and `read_key` give it; None: the key cannot be judged
    Raises UserError where it is no certificate at all.
    """
    found = parse(certificate) if isinstance(certificate, str | bytes) else certificate
    wrong = faults(found)
    return [
        Check("its fields", not wrong, wrong or "all there"),
        _signature(found),
        _key(found.get("public_key"), trusted),
    ]


def recheck(settings: Settings, store: Store | None, certificate: Mapping[str, Any]) -> list[Check]:
    """The facts once more, as they are now where they can be seen from here: data, suppression list, registry, DVC, journal.

    store  None: there is no registry here
    Raises UserError where fields are missing.
    """
    from tasks.core.erasure import _recheck

    if wrong := faults(certificate):
        raise UserError(f"the facts of this certificate cannot be looked at: {wrong}")
    facts = Facts.model_validate(certificate)
    return _recheck.everything(settings, store, facts, own=known_key(settings) == certificate.get("public_key"))


def names(certificate: Mapping[str, Any], sample_id: str) -> bool:
    """Whether a sample id is one of those that the certificate is about."""
    samples = certificate["samples"]
    hashed = hashlib.blake2b(sample_id.encode(), key=bytes.fromhex(samples["salt"]), digest_size=16).hexdigest()
    return hashed in samples["ids"]


def place(settings: Settings, request: str) -> Path:
    """Where the certificate of a request lies; its page lies beside it, as .html."""
    return settings.home / "certificates" / f"{request}.json"


def keep(settings: Settings, certificate: Mapping[str, Any]) -> Path:
    """Write the page of a certificate, then the certificate itself, and give the certificate's path."""
    from tasks.core.page_certificate import render_certificate

    path = place(settings, certificate["request"])
    files.write_text(path.with_suffix(".html"), render_certificate(certificate))
    files.write_text(path, json.dumps(certificate, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return path


def kept(settings: Settings) -> list[dict[str, Any]]:
    """The certificates of the project that can be read, the oldest first."""
    found = []
    for path in sorted((settings.home / "certificates").glob("r-*.json")):
        try:
            certificate = parse(path.read_bytes())
        except UserError:
            continue
        if not faults(certificate):
            found.append(certificate)
    return sorted(found, key=lambda one: datetime.fromisoformat(one["finished_at"]).timestamp())


def _signature(found: Mapping[str, Any]) -> Check:
    what = "its signature"
    try:
        signature = base64.b64decode(found["signature"], validate=True)
        key = serialization.load_der_public_key(base64.b64decode(found["public_key"], validate=True))
    except KeyError as error:
        return Check(what, False, f"{error.args[0]} is missing")
    except (ValueError, TypeError, binascii.Error, UnsupportedAlgorithm):
        return Check(what, False, "signature or public_key is damaged")
    if not isinstance(key, Ed25519PublicKey):
        return Check(what, False, "public_key is of another kind than ed25519")
    try:
        key.verify(signature, canonical(found))
    except (InvalidSignature, ValueError):
        return Check(what, False, "it was changed after it was signed")
    return Check(what, True, "nothing was changed since it was signed")


def _key(public: Any, trusted: str | None) -> Check:
    what = "its key"
    if trusted is None:
        why = "no key to compare with: ask the project for the one that 'retort certificate key' prints, and give it as --key"
        return Check(what, None, why)
    same = public == trusted
    return Check(what, same, "it is the project's" if same else "it was signed with another key than the project's")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
