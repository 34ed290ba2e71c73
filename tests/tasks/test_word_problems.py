"""Word problems: pairs taken, found and made; formulas; and every line that makes none is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.tasks.alignment import differing_labels, nearest
from deltapatch.tasks.formula import read_formula
from deltapatch.tasks.word_problems import word_problem_pairs

PENS = "I have {a} pens and {b} books, and Tom sold {b} apples. How many are there?"


def jsonl(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_templates_are_made_into_pairs(gpt2_like, tmp_path) -> None:
    data = jsonl(tmp_path / "p", {"template": PENS, "answer": "(a + b) * 2 - b", "numbers": {"a": [2, 20]}})
    pairs, _ = word_problem_pairs(gpt2_like, per_template=12, data=data)
    assert len(pairs) == 12
    assert pairs == word_problem_pairs(gpt2_like, per_template=12, data=data)[0]
    assert pairs != word_problem_pairs(gpt2_like, per_template=12, data=data, seed=1)[0]
    for pair, e in zip(pairs, encode_pairs(pairs, gpt2_like, len(gpt2_like)), strict=True):
        a, b, result = pair.meta["clean_fact"]
        assert 2 <= a <= 20
        assert pair.clean == f"Q: {PENS.format(a=a, b=b)} A:"
        assert pair.clean_answer == f" {2 * a + b}" == f" {result}"
        assert e.clean_text[e.labels["a"]].strip() == str(a)
        assert e.clean_text[e.labels["b"]].strip() == str(b)
        assert pair.clean_answer != pair.corrupted_answer


def test_equations_become_templates(gpt2_like, tmp_path) -> None:
    question = "Tom had 18 coins, sold 5 coins and found three. How many are there?"
    data = jsonl(
        tmp_path / "p",
        {"question": question, "answer": 16.0, "equation": "( ( 18.0 - 5.0 ) + 3.0 )"},
        {"question": question, "answer": 15, "equation": "18 - 5 + 3"},
        {"question": "I sold 5 and 5.", "answer": 10, "equation": "5 + 5"},
        {"question": "I sold some.", "answer": 10, "equation": "5 + 5"},
        {"question": "I sold 5 of 2.", "answer": 0, "equation": "2 - 5"},
    )
    pairs, dropped = word_problem_pairs(gpt2_like, per_template=6, data=data)
    assert len(pairs) == 6
    for pair in pairs:
        a, b, result = pair.meta["corrupted_fact"]
        assert 10 <= a <= 99
        assert 1 <= b <= 9
        assert f"had {a} coins, sold {b} coins and found three" in pair.corrupted
        assert result == a - b + 3 == int(pair.corrupted_answer)
        assert set(pair.labels) == {"number1", "number2", "last"}
    notes = "\n".join(dropped.lines())
    assert "line 2 is dropped: its equation gives 16 and its answer is 15." in notes
    assert "line 3 is dropped: 5 stands twice" in notes
    assert "line 4 is dropped: none of the numbers" in notes
    assert "line 5 is dropped: not all parts of its equation '2 - 5'" in notes


def test_problems_find_their_nearest(gpt2_like, tmp_path) -> None:
    problems = [
        ("What is the sum of 3 and 4?", 7),
        ("How many pens, cats and dogs are there?", 3),
        ("What is the sum of 3 and 6?", 9),
        ("What is the sum of 9 and 9 and 9?", 27),
        ("What is the sum of 1 and 6?", "7 and more"),
    ]
    data = jsonl(tmp_path / "p", *({"question": q, "answer": a} for q, a in problems))
    pairs, dropped = word_problem_pairs(gpt2_like, data=data, wording="{question} A:")
    (pair,) = pairs
    assert (pair.meta["line"], pair.meta["with"]) == (1, 3)
    assert pair.clean == "What is the sum of 3 and 4? A:"
    (e,) = encode_pairs(pairs, gpt2_like, len(gpt2_like))
    assert e.corrupted_text[e.labels["diff1"]] == " 6"
    notes = "\n".join(dropped.lines())
    assert "line 5 is dropped: an answer is not one token" in notes
    assert "line 4 is dropped: no other problem with" in notes
    apart = jsonl(tmp_path / "p", *({"question": q, "answer": a, "group": q} for q, a in problems))
    with pytest.raises(DeltapatchError, match=r"No pairs can be made of .*, line 5"):
        word_problem_pairs(gpt2_like, data=apart)


def test_given_pairs_are_taken_as_they_are(gpt2_like, tmp_path) -> None:
    def row(clean: str, corrupted: str, first: str = "3", second: str = "5") -> dict:
        return {"clean": clean, "corrupted": corrupted, "clean_answer": first, "corrupted_answer": second}

    data = jsonl(
        tmp_path / "p",
        row("1 + 2 =", "1 + 4 ="),
        row("1 + 2 =", "1 + 1 + 3 ="),
        row("1 + 2 =", "1 + 2 ="),
        row("1 + 2 =", "1 + 4 =", "nothing", "5"),
    )
    pairs, dropped = word_problem_pairs(gpt2_like, data=data)
    assert [(p.clean, p.clean_answer, p.labels) for p in pairs] == [
        ("1 + 2 =", " 3", {"diff1": 2, "last": 3})
    ]
    notes = "\n".join(dropped.lines())
    assert "line 2 is dropped: its prompts have 4 and 6 tokens." in notes
    assert "line 3 is dropped: its prompts are the same." in notes
    assert "line 4 is dropped: an answer is not one token" in notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has the field 'template', 'clean' or 'question', and this one has none"),
        ({"template": "How many?", "answer": "1"}, "no holes such as"),
        ({"template": "{a}?", "answer": "a + b"}, r"no hole \{b\}, which its answer needs"),
        ({"template": "{a}?", "answer": "a +"}, "'a \\+' is no formula"),
        ({"template": "{a}?", "answer": "f(a)"}, "may hold"),
        ({"template": "{a}?", "answer": "a ** a"}, "may hold"),
        ({"template": "{a}?", "answer": "a * 1.5"}, "may hold"),
        ({"template": "{a}?", "answer": "a", "numbers": {"a": [3, 1]}}, "a range each"),
        ({"question": "Why?", "answer": True}, "'answer' is missing or no text"),
        ({"template": "{a}?", "answer": "a - a"}, "no two draws of its numbers make a pair"),
    ],
)
def test_lines_that_cannot_be_used(gpt2_like, tmp_path, row, message) -> None:
    with pytest.raises(DeltapatchError, match=message):
        word_problem_pairs(gpt2_like, data=jsonl(tmp_path / "p", row))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 1}, "no exemplars"),
        ({"wording": "Q:"}, "must have {question}"),
        ({"per_template": 0}, "at least one pair"),
    ],
)
def test_mistakes(gpt2_like, tmp_path, options, message) -> None:
    with pytest.raises(DeltapatchError, match=message):
        word_problem_pairs(gpt2_like, data=jsonl(tmp_path / "p", ""), **options)
    with pytest.raises(DeltapatchError, match="is empty"):
        word_problem_pairs(gpt2_like, data=tmp_path / "p")


names = st.sampled_from(["a", "b", "7", "12"])
formulas = st.recursive(
    names, lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from("+-*/%"), inner), max_leaves=5
)


@given(text=formulas, a=st.integers(0, 50), b=st.integers(0, 50))
def test_formulas_have_pythons_value(text: str, a: int, b: int) -> None:
    value = read_formula(text, "here").value({"a": a, "b": b})
    if value is not None:
        assert value == eval(text, {}, {"a": a, "b": b})


def test_formulas_stay_whole_and_positive() -> None:
    formula = read_formula("(a - b) * 2 / 4", "here")
    assert formula.value({"a": 5, "b": 1}) == 2
    assert formula.value({"a": 4, "b": 1}) is None
    assert formula.value({"a": 1, "b": 4}) is None
    assert read_formula("a // 0", "here").value({"a": 1}) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
def test_differing_spans_are_all_labelled(tokens: list[tuple[int, int]]) -> None:
    clean, corrupted = zip(*tokens, strict=True)
    labels = differing_labels(clean, corrupted)
    covered = set()
    for i in range(1, 1 + sum(not name.endswith("_first") for name in labels)):
        covered |= set(range(labels.get(f"diff{i}_first", labels[f"diff{i}"]), labels[f"diff{i}"] + 1))
    assert covered == {i for i, (a, b) in enumerate(tokens) if a != b}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=10))
def test_nearest_pairs_use_each_row_once(rows: list[tuple[int, int, int]]) -> None:
    tokens = np.array([row[:2] for row in rows]).reshape(-1, 2)
    answers = np.array([row[2] for row in rows])
    pairs = nearest(tokens, answers)
    used = [i for pair in pairs for i in pair]
    assert len(used) == len(set(used))
    assert all(answers[i] != answers[j] for i, j in pairs)
    left = [answers[i] for i in range(len(rows)) if i not in used]
    assert len(set(left)) <= 1  # no two that are left could have been a pair
