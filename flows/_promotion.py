"""Moving the alias `champion`: written down before and after, checked after the move, finished or undone at the next start.

The journal is the truth about champions: whoever can open the registry's database can move an alias, but not forge an entry.
"""

from __future__ import annotations

from typing import Any

from tasks.core.errors import UserError
from tasks.core.saga import Journal
from tasks.core.settings import Settings
from tasks.core.store import Store

OPEN = {"promoting": "promoted", "rolling-back": "rolled-back"}  # begun, and its end where all went well
CHAMPION = "champion"
REVOKED = "revoked"  # a champion that nothing took the place of


def journal_of(settings: Settings) -> Journal:
    """The project's journal."""
    return Journal(settings.home / "journal.jsonl")


def history(settings: Settings, name: str) -> list[dict[str, Any]]:
    """The journal's entries on one model, the oldest first."""
    return [entry for entry in journal_of(settings).entries() if entry.get("name") == name]


def rightful(settings: Settings, name: str) -> int | None:
    """The version that the journal says is champion; None where none ever was, or the last one was revoked."""
    last = [entry for entry in history(settings, name) if entry["kind"] in (*OPEN.values(), REVOKED)]
    return last[-1]["version"] if last and last[-1]["kind"] != REVOKED else None


def check(settings: Settings, store: Store, name: str) -> None:
    """Raises UserError where the alias stands on another version than the journal says.

    A store on a server has champions that other copies of the project promoted, of which this journal knows nothing.
    """
    stands, known = store.aliases(name).get(CHAMPION), rightful(settings, name)
    if stands == known or (known is None and not store.embedded):
        return
    last = history(settings, name)[-1:]
    if last and last[0]["kind"] in OPEN and last[0]["version"] == stands:
        return  # a move that was cut off: the next run brings it to its end
    raise UserError(
        f"the champion of {name} is version {stands} by its alias, but {known or 'none'} by the journal: "
        f"somebody moved it past the gate; 'retort rollback {name}' puts it back"
    )


def move(settings: Settings, store: Store, name: str, version: int, before: int | None, begun: str, reason: str) -> None:
    """Let `champion` stand on a version: check, write down, set, read again, load it as a client would; put it back if that fails.

    before  the version that must still be champion; begun: `promoting` or `rolling-back`
    Raises UserError where the champion changed meanwhile, or the new one cannot be served.
    """
    journal = journal_of(settings)
    if store.aliases(name).get(CHAMPION) != before:
        raise UserError(f"the champion of {name} changed while version {version} was judged; run the promotion again")
    journal.append(begun, name=name, version=version, champion=before, reason=reason)
    store.set_alias(name, CHAMPION, version)
    finish(settings, store, journal.entries()[-1])


def finish(settings: Settings, store: Store, entry: dict[str, Any]) -> None:
    """Bring an open entry to its end: the champion stands and answers, or what was before it stands again.

    Raises UserError where it was put back.
    """
    name, version, before, journal = entry["name"], entry["version"], entry["champion"], journal_of(settings)
    stands = store.aliases(name).get(CHAMPION)
    if stands != version:
        journal.append("abandoned", name=name, version=version, champion=before, reason=f"the alias stands on {stands}")
        return
    try:
        store.smoke_check(name, CHAMPION)
    except UserError as error:
        if before is None:
            store.delete_alias(name, CHAMPION)
        else:
            store.set_alias(name, CHAMPION, before)
        journal.append("undone", name=name, version=version, champion=before, reason=str(error))
        raise UserError(f"version {version} of {name} was not promoted: {error}") from None
    journal.append(OPEN[entry["kind"]], name=name, version=version, champion=before, reason=entry.get("reason", ""))


def settle(settings: Settings, store: Store) -> list[str]:
    """Finish or undo what a crash left open; gives a sentence for each that was undone."""
    last: dict[str, dict[str, Any]] = {}
    for entry in journal_of(settings).entries():
        last[entry.get("name", "")] = entry
    undone = []
    for entry in last.values():
        if entry["kind"] in OPEN:
            try:
                finish(settings, store, entry)
            except UserError as error:
                undone.append(str(error))
    return undone


def unseat(settings: Settings, store: Store, name: str, version: int, reason: str) -> None:
    """Take the alias from a champion that is revoked while nothing takes its place; any other version is left alone."""
    if rightful(settings, name) != version and store.aliases(name).get(CHAMPION) != version:
        return
    journal_of(settings).append(REVOKED, name=name, version=version, champion=version, reason=reason)
    if store.aliases(name).get(CHAMPION) == version:
        store.delete_alias(name, CHAMPION)


def rollback(settings: Settings, store: Store, name: str, reason: str) -> int:
    """Give the alias back to the last champion before the present one that is not revoked, or to the journal's where somebody moved it.

    Raises UserError where there is none to go back to.
    """
    versions = {int(found.version): found for found in store.versions(name)}
    if not versions:
        raise UserError(f"there is no registered model {name!r}; there are: {', '.join(store.names()) or 'none'}")
    stands, known = store.aliases(name).get(CHAMPION), rightful(settings, name)
    line: list[int] = []  # those that stood there, the newest last, without those that a rollback left
    for entry in history(settings, name):
        if entry["kind"] == "promoted":
            line.append(entry["version"])
        elif entry["kind"] == "rolled-back":
            line = line[: len(line) - line[::-1].index(entry["version"])] if entry["version"] in line else [entry["version"]]
    # the present champion is left; an alias that was moved past the gate goes back to whom it belongs
    past = line[:-1] if stands == known else line
    choice = [v for v in past if v != stands and v in versions and versions[v].tags.get("revoked", "false") == "false"]
    if not choice:
        raise UserError(f"{name} has no earlier champion to go back to: no other version that stood there is left unrevoked")
    move(settings, store, name, choice[-1], stands, "rolling-back", reason)
    return int(choice[-1])
