from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tasks.core import uids
from tasks.core.errors import UserError

NAMES = ["0" * 31 + "2", "f" * 32, "digits-0001"]


def test_a_uid_is_its_hexadecimal_number_and_any_other_name_has_its_md5() -> None:
    found = uids.uids(NAMES)
    assert found[:2].tolist() == [(0, 2), (2**64 - 1, 2**64 - 1)]
    assert "{:016x}{:016x}".format(*found[2].tolist()) == hashlib.md5(b"digits-0001").hexdigest()


def test_a_file_is_what_datacomp_writes_and_comes_back() -> None:
    blob = uids.to_bytes(uids.uids(NAMES))
    found = uids.read(blob, "it")
    assert found.dtype == np.dtype("u8,u8")
    assert found.tolist() == sorted(uids.uids(NAMES).tolist())
    assert uids.read("\n".join(["", *NAMES, " "]).encode(), "it").tolist() == found.tolist()


def test_membership_is_by_both_halves() -> None:
    listed = uids.read("\n".join(NAMES).encode(), "it")
    some = uids.uids(["0" * 31 + "2", "0" * 31 + "3", "digits-0001", "digits-0002"])
    assert uids.among(some, listed).tolist() == [True, False, True, False]
    assert uids.among(some, listed[:0]).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "lists no uid"),
        (b"\xff\xfe\x00\xd8", "neither a .npy file nor text"),
        (b"\x93NUMPY cut", "is no list of uids"),
        (uids.to_bytes(np.arange(3)), "holds int64 of shape"),
    ],
)
def test_a_file_that_is_no_list_is_named(blob: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"^the list .*{message}|the list {message}"):
        uids.read(blob, "the list")
