"""Sections of docs/papers.md: the papers' tables beside what bench/papers.py found."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paper_tables import TABLES, Table, shown_table
from recipe_runs import Setting

RESULTS = Path(__file__).resolve().parent / "results"


def section(shown: Table) -> Callable[[], str]:
    """A table for each machine and setting that one of its rows is measured in."""

    def made() -> str:
        found = [
            measured(shown, results["provenance"], setting, rows)
            for path in sorted(RESULTS.glob("papers-*.json"))
            for results in [json.loads(path.read_text())]
            for setting, rows in by_setting(shown, results["rows"])
        ]
        return "\n".join(found) or "Not measured yet.\n"

    return made


def by_setting(
    shown: Table, rows: list[dict[str, Any]]
) -> list[tuple[Setting, dict[str, dict[str, Any]]]]:
    """The table's rows by recipe, for each setting that there is."""
    names = [field.name for field in dataclasses.fields(Setting)]
    found: dict[Setting, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["recipe"] in shown.rows:
            setting = Setting(**{name: row[name] for name in names})
            found.setdefault(setting, {})[row["recipe"]] = row
    return list(found.items())


def measured(
    shown: Table, provenance: dict[str, Any], setting: Setting, rows: dict[str, dict[str, Any]]
) -> str:
    """The table, and where, with what and by which commands it was made."""
    p = provenance
    commands, commits = (
        ", ".join(dict.fromkeys(form.format(row[key]) for row in rows.values()))
        for key, form in (("command", "`{}`"), ("commit", "{:.12}"))
    )
    where = p["machine"] if setting.reduced else p.get("gpu", p["machine"])
    return (
        f"{shown_table(shown, list(shown.rows), rows, setting)}\n\n"
        f"{where}, {p['threads']} threads, torch {p['torch']}, Python {p['python']}, "
        f"commit {commits}; {commands}.\n"
    )


SECTIONS = {f"papers_{name.replace('-', '_')}": section(shown) for name, shown in TABLES.items()}
