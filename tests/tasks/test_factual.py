"""Facts from files: LAMA's folder, JSONL, and what of them cannot be used."""

import json
from pathlib import Path

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.tasks.facts import CLOSED_FACTS, CLOSED_RELATIONS
from deltapatch.tasks.factual import factual_pairs


def jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lama(folder: Path) -> Path:
    templates = {"P36": "The capital of [X] is [Y] .", "P103": "[Y] is spoken by [X] ."}
    jsonl(folder / "relations.jsonl", [{"relation": r, "template": t} for r, t in templates.items()])
    capitals = [(s, o) for s, r, o in CLOSED_FACTS if r == "capital"]
    rows = [{"sub_label": s, "obj_label": o} for s, o in capitals]
    jsonl(folder / "TREx" / "P36.jsonl", [*rows, {"sub_label": "Peru", "obj_label": "Cuba"}])
    jsonl(folder / "TREx" / "P103.jsonl", rows)
    return folder


def test_the_closed_set() -> None:
    assert len(CLOSED_FACTS) == 24 * len(CLOSED_RELATIONS)
    assert len({(s, r) for s, r, _ in CLOSED_FACTS}) == len(CLOSED_FACTS)


@pytest.mark.parametrize("inner", [".", "data"])
def test_lama(gpt2_like, tmp_path, inner) -> None:
    lama(tmp_path / inner)
    pairs, dropped = factual_pairs(gpt2_like, per_template=10, data=tmp_path, relations=["P36", "P103"])
    assert len(pairs) == 10
    for pair in pairs:
        subject, _, answer = pair.meta["clean_fact"]
        assert pair.clean == f"The capital of {subject} is"
        assert pair.clean_answer == f" {answer}"
        assert subject != "Peru"
    notes = " ".join(dropped.lines())
    assert "1 subjects of P36 are left out, because they have several objects" in notes
    assert "P103 is left out: in '[Y] is spoken by [X] .' the object [Y] does not come last" in notes


def test_jsonl(gpt2_like, tmp_path) -> None:
    rows = [
        {"subject": s, "relation": "has the capital", "object": o}
        for s, o in (("Italy", "Rome"), ("Egypt", "Cairo"), ("Atlantis", "Oslo"), ("Peru", "Neverwhere"))
    ]
    pairs, dropped = factual_pairs(gpt2_like, per_template=5, data=jsonl(tmp_path / "facts.jsonl", rows))
    assert {pair.clean for pair in pairs} == {"Italy has the capital", "Egypt has the capital"}
    notes = " ".join(dropped.lines())
    assert "1 facts of has the capital are left out, because the object is not one token" in notes
    assert "Only 2 of 5 pairs exist for has the capital" in notes
    rows = [row | {"template": "In {subject} one loves {object}"} for row in rows]
    pairs, _ = factual_pairs(gpt2_like, per_template=5, data=jsonl(tmp_path / "facts.jsonl", rows))
    assert pairs[0].clean.startswith("In ")
    assert pairs[0].clean.endswith(" one loves")


@pytest.mark.parametrize(
    ("rows", "relations", "message"),
    [
        (["{"], None, "line 1: broken JSON"),
        (["[1]"], None, "line 1: not a JSON object"),
        ([{"subject": "a", "relation": "b"}], None, "line 1: the field 'object' is missing"),
        (
            [{"subject": "a", "relation": "b", "object": "c", "template": "x [Y]"}],
            None,
            r"must have \[X\] once",
        ),
        ([{"subject": "a", "relation": "b", "object": "c"}], ["d"], "no facts of the relation 'd'"),
        ([{"subject": "a", "relation": "b", "object": "yes"}], None, "No factual pairs are possible"),
        ([], None, "has no usable facts"),
    ],
)
def test_broken_files(gpt2_like, tmp_path, rows, relations, message) -> None:
    with pytest.raises(DeltapatchError, match=message):
        factual_pairs(gpt2_like, data=jsonl(tmp_path / "facts.jsonl", rows), relations=relations)


def test_files_that_are_not_there(gpt2_like, tmp_path) -> None:
    with pytest.raises(DeltapatchError, match="is no LAMA folder"):
        factual_pairs(gpt2_like, data=tmp_path)
    with pytest.raises(DeltapatchError, match="cannot be read"):
        factual_pairs(gpt2_like, data=tmp_path / "nothing.jsonl")
    lama(tmp_path)
    with pytest.raises(DeltapatchError, match="has no relation 'P1376'"):
        factual_pairs(gpt2_like, data=tmp_path)
