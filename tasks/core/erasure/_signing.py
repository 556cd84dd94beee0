"""The project's ed25519 key: `.retort/signing.key`, made on first use, or the file that `RETORT_SIGNING_KEY` names. PEM, PKCS8."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from tasks.core import files
from tasks.core.errors import UserError
from tasks.core.settings import Settings


def public_key(settings: Settings) -> str:
    """The project's public key as PEM. The key is made where there is none yet."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return private_key(settings).public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def known_key(settings: Settings) -> str | None:
    """The project's public key as a certificate names it; None where no key was made yet."""
    path, named = settings.signing_key
    return line_of(private_key(settings).public_key()) if named or path.exists() else None


def read_key(path: Path) -> str:
    """The public key of a file, PEM or its one line, as a certificate names it. Raises UserError where there is none."""
    try:
        content = path.read_bytes()
        if b"PRIVATE KEY" in content:
            raise UserError(f"{path} holds a private key, which nobody should hand out; 'retort certificate key' prints the public one")
        if b"-----BEGIN" not in content:
            content = b"-----BEGIN PUBLIC KEY-----\n" + content.strip() + b"\n-----END PUBLIC KEY-----\n"
        found = serialization.load_pem_public_key(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path} holds no public key; 'retort certificate key' prints the one of its project") from None
    if not isinstance(found, Ed25519PublicKey):
        raise UserError(f"{path} holds a key of another kind than ed25519; 'retort certificate key' prints the one of its project")
    return line_of(found)


def private_key(settings: Settings) -> Ed25519PrivateKey:
    """The key that `RETORT_SIGNING_KEY` names, or the project's own, made on first use. What it holds is never part of a message."""
    path, named = settings.signing_key
    try:
        if not named and not path.exists():
            _make(settings, path)
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise UserError(f"the signing key {path} cannot be read: {error.strerror}") from None
    except TypeError:
        raise UserError(f"the signing key {path} has a passphrase; name one without in RETORT_SIGNING_KEY") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path} holds no private key in PEM; restore it from a backup") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise UserError(f"{path} holds a key of another kind than ed25519: make one with 'openssl genpkey -algorithm ed25519'")
    return found


def _make(settings: Settings, path: Path) -> None:
    """Make the project's key. It appears under its name only when it is whole, and no moment is it readable by others."""
    with files.exclusive(settings.home / "signing.lock"):
        if path.exists():
            return
        forms = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        fresh = path.with_name(".signing.new")
        fresh.unlink(missing_ok=True)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as out:
            out.write(Ed25519PrivateKey.generate().private_bytes(*forms))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)


def line_of(key: Ed25519PublicKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return base64.b64encode(key.public_bytes(serialization.Encoding.DER, form)).decode()
