"""`hashdist storage check`: proof that a store can be committed to."""

from typing import Any

from hashdist.ground.errors import InvalidInput
from hashdist.ground.options import StorageOptions
from hashdist.ground.settings import Settings
from hashdist.store import open_store
from hashdist.store.check import Check, check


def storage_check(settings: Settings, options: StorageOptions) -> dict[str, Any]:
    """Try what commits rest upon; exit code 2 for a store that must not be written to."""
    uri = options.uri or settings.root
    if not uri:
        raise InvalidInput("a store is required, found none; use `hashdist storage check URI`")
    store = open_store(uri)
    checks = check(store)
    fit = all(one.passed for one in checks if one.required)
    verdict = "fit for commits" if fit else "NOT fit for commits, hashdist refuses to write there"
    lines = [f"{_mark(one)}  {one.name:<18}  {one.text}" for one in checks]
    return {
        "store": store.uri,
        "fit": fit,
        "conditional_create": next(bool(one.passed) for one in checks if one.name == "conditional create"),
        "checks": [one._asdict() for one in checks],
        "exit_code": 0 if fit else 2,
        "text": "\n".join([f"{store.uri}: {verdict}", *lines]),
    }


def _mark(one: Check) -> str:
    if one.passed is None:
        return "  -   "
    return "  ok  " if one.passed else ("FAILED" if one.required else " note ")
