"""What holds for every task's pairs: equal lengths, labels on their pieces, right answers, same seeds."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.tasks import TASKS, make_pairs, write_pairs
from deltapatch.tasks.answers import answer_ids
from deltapatch.tasks.expressions import SHAPES
from deltapatch.tasks.numbers import spell
from deltapatch.tasks.templates import ALL_OPERATORS

TOKENIZERS = ("gpt2_like", "llama3_like", "llama_like")
SPACES = " ▁\n"
few = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


def answer_of(pair: Any, which: str) -> str:
    """The answer, worked out anew from what the pair says it is about."""
    meta = pair.meta
    fact = meta[f"{which}_fact"]
    write = spell if meta.get("numbers") == "words" else str
    operator = meta["operator"] if which == "clean" else meta.get("corrupted_operator", meta["operator"])
    if meta["task"] == "three-operands":
        x, y, z, result = fact
        assert eval(operator, {}, {"x": x, "y": y, "z": z}) == result
        return write(result)
    if meta["task"] == "arithmetic":
        result = ALL_OPERATORS[operator].apply(fact[0], fact[1])
        assert result == fact[2]
        return result if isinstance(result, str) else write(result)
    if meta["task"] == "retrieval":
        asked = (pair.clean if which == "clean" else pair.corrupted).split("\n")[-1]
        assert fact[4] == fact[0 if asked.count(fact[2]) > asked.count(fact[3]) else 1]
        return write(fact[4])
    return fact[2]


def check(pairs: Any, tokenizer: Any) -> None:
    """Everything that every pair must have."""
    seen = set()
    for pair in pairs:
        assert (pair.clean, pair.corrupted) not in seen
        seen.add((pair.clean, pair.corrupted))
        assert pair.clean != pair.corrupted
        for which, prompt, answer in (
            ("clean", pair.clean, pair.clean_answer),
            ("corrupted", pair.corrupted, pair.corrupted_answer),
        ):
            assert answer.strip() == answer_of(pair, which)
            assert len(answer_ids(tokenizer, prompt, answer)) == 1
        same = pair.meta.get("differ") == "same_result"
        assert (pair.clean_answer == pair.corrupted_answer) == same
    for e, pair in zip(encode_pairs(pairs, tokenizer, len(tokenizer)), pairs, strict=True):
        assert e.labels["last"] == len(e.clean) - 1 == len(e.corrupted) - 1
        places = [p for name, p in e.labels.items() if name != "last"]
        for label, at in e.labels.items():
            if label.endswith("_first"):
                assert at < e.labels[label.removesuffix("_first")]
        assert all(e.clean_text[p].strip(SPACES) and e.corrupted_text[p].strip(SPACES) for p in places)
        if pair.meta.get("differ") != "operator":  # then exemplars differ too
            start = min(places)
            assert e.clean[:start] == e.corrupted[:start] or pair.meta["task"] == "three-operands"
            end = max(places)
            assert e.clean[end + 1 :] == e.corrupted[end + 1 :]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(0, 3),
    differ=st.sampled_from(["operands", "same_result", "operator"]),
    operators=st.lists(st.sampled_from(list(ALL_OPERATORS)), min_size=2, max_size=3, unique=True),
    templates=st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True),
)
@few
def test_arithmetic(name, request, seed, shots, differ, operators, templates) -> None:
    tokenizer = request.getfixturevalue(name)
    try:
        pairs, _ = make_pairs(
            "arithmetic", tokenizer, 2, shots, seed,
            operators=operators, templates=templates, differ=differ, max_number=40,
        )  # fmt: skip
    except DeltapatchError as error:
        if "No arithmetic pairs are possible" not in str(error):  # max and < have no answers in common
            raise
        return
    check(pairs, tokenizer)


@pytest.mark.parametrize("task", ["arithmetic", "three-operands", "retrieval"])
@given(seed=st.integers(0, 10**6), shots=st.integers(0, 2))
@few
def test_number_words(gpt2_like, task, seed, shots) -> None:
    pairs, dropped = make_pairs(
        task, gpt2_like, 1, shots, seed, numbers="words", max_number=50, templates=[0]
    )
    check(pairs, gpt2_like)
    assert not any(c.isdigit() for pair in pairs for c in pair.clean)
    assert any("that are one token" in note for note in dropped.notes)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    seed=st.integers(0, 10**6),
    shots=st.integers(0, 2),
    differ=st.sampled_from(["operands", "same_result", "operator"]),
    shape=st.sampled_from(SHAPES),
    template=st.integers(0, 1),
)
@few
def test_three_operands(name, request, seed, shots, differ, shape, template) -> None:
    tokenizer = request.getfixturevalue(name)
    try:
        pairs, _ = make_pairs(
            "three-operands", tokenizer, 2, shots, seed,
            shapes=[shape.name], templates=[template], differ=differ, max_number=99,
        )  # fmt: skip
    except DeltapatchError:
        if differ != "operator":  # another operator may need another phrase
            raise
        return
    check(pairs, tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(seed=st.integers(0, 10**6), shots=st.integers(0, 2))
@few
def test_retrieval_and_facts(name, request, seed, shots) -> None:
    tokenizer = request.getfixturevalue(name)
    for task in ("retrieval", "factual"):
        pairs, _ = make_pairs(task, tokenizer, 3, shots, seed)
        check(pairs, tokenizer)
        assert {pair.meta["shots"] for pair in pairs} == {shots}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "word-problems"])
def test_one_seed_gives_one_file(gpt2_like, task, tmp_path) -> None:
    files = []
    for i, seed in enumerate((3, 3, 4)):
        pairs, _ = make_pairs(task, gpt2_like, 2, seed=seed)
        write_pairs(tmp_path / f"{i}.jsonl", pairs)
        files.append((tmp_path / f"{i}.jsonl").read_bytes())
    assert files[0] == files[1] != files[2]


def test_labels_are_where_the_pieces_are(gpt2_like) -> None:
    (pair, *_), _ = make_pairs("retrieval", gpt2_like, 1, 0, seed=1)
    (e,) = encode_pairs([pair], gpt2_like, len(gpt2_like))
    x, y, first, second, asked = pair.meta["clean_fact"]
    found = {label: e.clean_text[at].strip() for label, at in e.labels.items()}
    entity = first if asked == x else second
    wanted = {"number1": str(x), "entity1": first, "number2": str(y), "entity2": second, "entity": entity}
    assert {label: found[label] for label in wanted} == wanted


def test_pieces_of_several_tokens_have_two_labels(llama_like) -> None:
    pairs, _ = make_pairs("arithmetic", llama_like, 20, 0, operators="-", templates=[1], max_number=300)
    for pair, e in zip(pairs, encode_pairs(pairs, llama_like, len(llama_like)), strict=True):
        for i, n in enumerate(pair.meta["clean_fact"][:2], start=1):
            start = e.labels.get(f"op{i}_first", e.labels[f"op{i}"])
            digits = e.clean_text[start : e.labels[f"op{i}"] + 1]
            assert "".join(digits).strip(SPACES) == str(n)


@pytest.mark.parametrize("task", ["arithmetic", "three-operands", "retrieval"])
@pytest.mark.parametrize("answers", ["text", "ids"])
def test_answers_of_several_tokens(llama_like, task, answers, tmp_path) -> None:
    pairs, dropped = make_pairs(task, llama_like, 6, 1, max_number=300, answers=answers)
    results = [pair.meta["clean_fact"][-1] for pair in pairs]
    assert max(results) > 99
    for pair, result in zip(pairs, results, strict=True):
        if answers == "text":
            assert pair.clean_answer.strip() == str(result)
        else:
            assert llama_like.decode(pair.clean_answer).replace(" ", "") == str(result)
    assert not any("limited" in note for note in dropped.notes)
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert (
        json.loads((tmp_path / "pairs.jsonl").read_text().split("\n")[0])["clean_answer"]
        == pairs[0].clean_answer
    )


def test_numbers_in_words() -> None:
    assert [spell(n) for n in (0, 7, 13, 40, 86, 100, 101, 342)] == [
        "zero", "seven", "thirteen", "forty", "eighty-six", "one hundred", "one hundred and one",
        "three hundred and forty-two",
    ]  # fmt: skip
    assert spell(12_000) == "twelve thousand"
    assert spell(300_007) == "three hundred thousand and seven"
    assert spell(1_234) == "one thousand two hundred and thirty-four"
    assert len({spell(n) for n in range(5000)}) == 5000
    with pytest.raises(DeltapatchError, match="can be spelled out"):
        spell(-1)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("arithmetic", {"differ": "mood"}, "Pairs differ by operands, same_result, operator, not 'mood'"),
        ("arithmetic", {"differ": "operator", "operators": "+"}, "at least two operators"),
        ("arithmetic", {"numbers": "roman"}, "numerals or words, not 'roman'"),
        ("arithmetic", {"numbers": "words", "templates": [5]}, "takes no number words"),
        ("arithmetic", {"answers": "long"}, "Answers are one, text, ids"),
        ("arithmetic", {"entities": []}, "has no option 'entities'; it has operators"),
        ("three-operands", {"shapes": ["x + y"]}, "no shape"),
        ("three-operands", {"templates": [2]}, "Templates are 0"),
        ("three-operands", {"per_template": 0}, "at least one pair"),
        ("three-operands", {"numbers": "words", "templates": [1]}, "takes no number words"),
        ("retrieval", {"templates": [8]}, "numbered 0 to 7"),
        ("retrieval", {"shots": -1}, "shots must be 0 or more"),
        ("retrieval", {"entities": ["pens", "pens"]}, "two different entities"),
        ("factual", {"relations": ["mood"]}, "no relation 'mood'; they have capital"),
        ("word-problems", {}, "give its path with --data"),
    ],
)  # fmt: skip
def test_mistakes(gpt2_like, task, options, message) -> None:
    with pytest.raises(DeltapatchError, match=message):
        make_pairs(task, gpt2_like, **options)


def test_every_task_has_a_summary_and_says_its_options() -> None:
    assert all(task.summary for task in TASKS.values())
    assert TASKS["factual"].default("shots") == 0
    assert TASKS["retrieval"].options == ["max_number", "templates", "entities", "numbers", "answers"]
