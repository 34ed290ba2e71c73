"""Pairs files: what is written is read, and every mistake names its file and line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.pairs_file import read_named_pairs, read_pairs, write_pairs

PROMPT = st.text() | st.lists(st.integers(0, 10**6))
ANSWER = st.text() | st.integers(0, 10**6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
PAIRS = st.builds(
    PromptPair,
    PROMPT,
    PROMPT,
    ANSWER,
    ANSWER,
    st.dictionaries(st.text(), st.integers(-100, 100), max_size=3),
    st.dictionaries(st.text(), JSON, max_size=3),
    st.sampled_from([None, "prefix+suffix", [[0, 1], [-1, -1]]]),
)
GOOD = '{"clean": "a", "corrupted": [1, 2], "clean_answer": " b", "corrupted_answer": 3}'


@given(pairs=st.lists(PAIRS, min_size=1, max_size=4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, pairs: list[PromptPair]) -> None:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs


def test_half_a_surrogate_survives(tmp_path: Path) -> None:
    pairs = [PromptPair("é\ud800\u2028", "b", "c", "d")]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(f"\ufeff\n{GOOD}\r\n\n{GOOD}".encode())
    assert [name for name, _ in read_named_pairs(path)] == [f"{path}, line 2", f"{path}, line 4"]
    assert read_pairs(path)[0] == PromptPair("a", [1, 2], " b", 3)


def test_writing_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "p.jsonl"
    pairs = [PromptPair("a", "b", "c", "d")]
    write_pairs(path, pairs)
    with pytest.raises(DeltapatchError, match="cannot be written"):
        write_pairs(path, [PromptPair("a", "b", "c", "d", meta={"x": object()})])
    with pytest.raises(DeltapatchError, match="cannot be written"):
        write_pairs(path, [PromptPair("a", "b", "c", "d", meta={"x": float("nan")})])
    assert read_pairs(path) == pairs
    assert [p.name for p in path.parent.iterdir()] == ["p.jsonl"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(DeltapatchError, match="cannot be written"):
        write_pairs(tmp_path / "taken", pairs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "taken"]


def changed(**fields: object) -> str:
    return json.dumps(json.loads(GOOD) | fields)


MISTAKES = [
    ("{", "broken JSON at column 2"),
    ("[1]", "a pair is a JSON object with the fields clean, .*, not a list"),
    ("3", "not a number"),
    ("null", "not null"),
    ("[" * 100_000, "nested too deeply"),
    ('{"clean": "a", "corrupted": "b", "clean_answer": "c"}', "the field 'corrupted_answer' is missing"),
    (changed(anwser=1), "the field 'anwser' is unknown; a pair has clean, "),
    (changed(clean=3), "'clean' must be text or a list of token ids"),
    (changed(corrupted=[1, "2"]), "'corrupted' must be text or a list of token ids"),
    (changed(corrupted=[1, True]), "'corrupted' must be text or a list of token ids"),
    (changed(clean_answer=1.5), "'clean_answer' must be text, a token id or a list of them, not a number"),
    (changed(corrupted_answer=[1, " b"]), "'corrupted_answer' must be .* not a list of anything else"),
    (changed(corrupted_answer=True), "'corrupted_answer' must be .*, not true or false"),
    (changed(corrupted_answer={}), "must be any of several answers"),
    (changed(labels=[1]), "'labels' must be an object of positions"),
    (changed(labels={"last": 1.5}), "'labels' must be an object of positions"),
    (changed(align="both"), "'align' must be 'prefix\\+suffix' or a list of"),
    (changed(align=[[1, 2], [3]]), "'align' must be"),
    (changed(align=[["a", 2]]), "'align' must be"),
    (changed(align={"1": 2}), "'align' must be"),
    (changed(meta="note"), "'meta' must be an object, not text"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(DeltapatchError, match=message) as caught:
        read_pairs(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_pairs_files(tmp_path: Path) -> None:
    with pytest.raises(DeltapatchError, match=r"There is no pairs file .*none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(DeltapatchError, match="cannot be read: Is a directory"):
        read_pairs(tmp_path)
    empty = tmp_path / "empty.jsonl"
    for text in ("", "\n \n"):
        empty.write_text(text)
        with pytest.raises(DeltapatchError, match=r"empty\.jsonl is empty"):
            read_pairs(empty)
    empty.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DeltapatchError, match="not UTF-8 text"):
        read_pairs(empty)
