"""Audit: every certificate once more against the project as it is now.

Consumes  the certificates that are kept, data, registry, DVC's stores
Produces  a table, and where one no longer holds an event and a failed run
Started   weekly by its deployment (`retort serve`, `retort up`), or by `retort audit`
"""

from __future__ import annotations

from prefect import flow

from flows._runs import BROKEN, emit, shown
from flows._session import NeedsRun, session
from tasks.core.erasure import certificate


@flow(name="audit")
def audit() -> str:
    """Check the signature and the facts of every certificate. Raises RuntimeError that names those that no longer hold, and why."""
    here = session()
    if here.planning:
        raise NeedsRun("audit")
    kept, broken = certificate.kept(here.settings), []
    known = certificate.known_key(here.settings)
    with shown(here, max(len(kept), 1)) as count:
        for found in kept:
            checks = [*certificate.verify(found, known), *certificate.recheck(here.settings, here.store, found)]
            failed = [check for check in checks if check.ok is False]
            unseen = sum(check.ok is None for check in checks)
            words = f"{failed[0].what}: {failed[0].why}" if failed else f"{len(checks) - unseen} checks hold"
            here.record("audit", found["request"], False, 0.0, words + (f", {unseen} could not be made" if unseen else ""))
            if failed:
                broken.append(f"{found['request']} ({words})")
                emit(here, BROKEN, f"request.{found['request']}", request=found["request"], reason=words)
            count()
        if not kept:
            here.record("audit", "", True, 0.0, "there is no certificate yet")
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(kept)} certificates no longer hold: {'; '.join(broken)}; 'retort forget' erases again")
    return f"{len(kept)} certificates hold"


if __name__ == "__main__":
    from flows.cli import run_alone

    run_alone(audit)
