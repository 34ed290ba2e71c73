"""Facts: from a local LAMA folder (T-REx), from any JSONL of subject, relation and object, or a small set."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.header import check_file

# country, capital, language, continent
_COUNTRIES = (
    ("France", "Paris", "French", "Europe"),
    ("Italy", "Rome", "Italian", "Europe"),
    ("Germany", "Berlin", "German", "Europe"),
    ("Spain", "Madrid", "Spanish", "Europe"),
    ("Portugal", "Lisbon", "Portuguese", "Europe"),
    ("Greece", "Athens", "Greek", "Europe"),
    ("Poland", "Warsaw", "Polish", "Europe"),
    ("Sweden", "Stockholm", "Swedish", "Europe"),
    ("Norway", "Oslo", "Norwegian", "Europe"),
    ("Hungary", "Budapest", "Hungarian", "Europe"),
    ("Japan", "Tokyo", "Japanese", "Asia"),
    ("China", "Beijing", "Chinese", "Asia"),
    ("Thailand", "Bangkok", "Thai", "Asia"),
    ("Vietnam", "Hanoi", "Vietnamese", "Asia"),
    ("Turkey", "Ankara", "Turkish", "Asia"),
    ("Iran", "Tehran", "Persian", "Asia"),
    ("Egypt", "Cairo", "Arabic", "Africa"),
    ("Kenya", "Nairobi", "Swahili", "Africa"),
    ("Ghana", "Accra", "English", "Africa"),
    ("Senegal", "Dakar", "French", "Africa"),
    ("Peru", "Lima", "Spanish", "America"),
    ("Brazil", "Brasilia", "Portuguese", "America"),
    ("Cuba", "Havana", "Spanish", "America"),
    ("Canada", "Ottawa", "English", "America"),
)

# relation -> template; [X] is the subject, and the object follows.
CLOSED_RELATIONS = {
    "capital": "The capital of [X] is",
    "language": "The language of [X] is",
    "continent": "The continent of [X] is",
}

# subject, relation, object
CLOSED_FACTS: tuple[tuple[str, str, str], ...] = tuple(
    (country, relation, answer)
    for country, *answers in _COUNTRIES
    for relation, answer in zip(CLOSED_RELATIONS, answers, strict=True)
)


PAPER_RELATIONS = ("P36", "P1376", "P279", "P19", "P103", "P20")


@dataclass(frozen=True)
class Fact:
    """One fact, and the text that its object follows.

    Attributes:
        template: with [X] for the subject, up to where the object begins.
    """

    subject: str
    relation: str
    answer: str
    template: str


def read_facts(path: Path, relations: Sequence[str] | None) -> tuple[list[Fact], list[str]]:
    """The facts of a LAMA folder or a JSONL file, of some relations, and notes on what cannot be used.

    Raises:
        DeltapatchError: nothing there, broken JSON, a missing field, or a relation without facts.
    """
    facts, notes = _lama(path, relations) if path.is_dir() else _jsonl(path, relations)
    if any(fact.relation == "all" for fact in facts):
        raise DeltapatchError(
            f"{path}: a relation is called 'all', which stands for all of them in tables: rename it."
        )
    if not facts:
        which = f" of {', '.join(relations)}" if relations else ""
        raise DeltapatchError(f"{path} has no usable facts{which}.")
    return facts, notes


def _lama(folder: Path, relations: Sequence[str] | None) -> tuple[list[Fact], list[str]]:
    """LAMA as it is published: relations.jsonl beside TREx/P36.jsonl, ..., in the folder or in its data/."""
    root = next((r for r in (folder, folder / "data") if (r / "relations.jsonl").is_file()), None)
    if root is None:
        raise DeltapatchError(
            f"{folder} is no LAMA folder: it has no relations.jsonl; give LAMA's data folder or a JSONL file."
        )
    templates = {
        str(_get(row, "relation", where)): str(_get(row, "template", where))
        for where, row in read_rows(root / "relations.jsonl")
    }
    facts, notes = [], []
    for relation in relations or PAPER_RELATIONS:
        if relation not in templates:
            raise DeltapatchError(f"{root / 'relations.jsonl'} has no relation {relation!r}.")
        before, found, after = templates[relation].partition("[Y]")
        if not found or "[X]" not in before or after.strip(" ."):
            notes.append(
                f"{relation} is left out: in {templates[relation]!r} the object [Y] does not come last."
            )
            continue
        facts += [
            Fact(
                str(_get(row, "sub_label", where)),
                relation,
                str(_get(row, "obj_label", where)),
                before.rstrip(),
            )
            for where, row in read_rows(root / "TREx" / f"{relation}.jsonl")
        ]
    return facts, notes


def _jsonl(path: Path, relations: Sequence[str] | None) -> tuple[list[Fact], list[str]]:
    """Lines with subject, relation, object and, if the relation's name does not read on, a template."""
    facts = []
    for where, row in read_rows(path):
        subject, relation, answer = (str(_get(row, key, where)) for key in ("subject", "relation", "object"))
        template = str(row.get("template") or f"[X] {relation}").replace("{subject}", "[X]")
        template = template.partition("[Y]")[0].partition("{object}")[0].rstrip()
        if template.count("[X]") != 1:
            raise DeltapatchError(
                f"{where}: the template {template!r} must have [X] once, before the object."
            )
        if relations is None or relation in relations:
            facts.append(Fact(subject, relation, answer, template))
    missing = [r for r in relations or () if r not in {fact.relation for fact in facts}]
    if missing:
        raise DeltapatchError(f"{path} has no facts of the relation {missing[0]!r}.")
    return facts, []


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its name for errors."""
    try:
        check_file(path)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DeltapatchError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise DeltapatchError(f"{path} cannot be read: {error.strerror}.") from None
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DeltapatchError(f"{where}: broken JSON.") from None
        if not isinstance(row, dict):
            raise DeltapatchError(f"{where}: not a JSON object.")
        yield where, row


def _get(row: dict[str, Any], key: str, where: str) -> Any:
    if row.get(key) in (None, ""):
        raise DeltapatchError(f"{where}: the field {key!r} is missing.")
    return row[key]
