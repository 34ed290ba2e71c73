"""Arithmetic pairs: right, repeatable, labelled, and without degenerate pairs."""

import pytest

from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.tasks.arithmetic import arithmetic_pairs
from deltapatch.tasks.numbers import number_range, token_spans
from deltapatch.tasks.registry import TASKS, find_task, make_pairs
from deltapatch.tasks.split import is_held_out
from deltapatch.tasks.templates import OPERATORS, facts


def test_templates_are_the_papers() -> None:
    assert OPERATORS["+"].templates == (
        "Q: How much is {x} plus {y}? A:",
        "Q: What is {x} plus {y}? A:",
        "Q: What is the result of {x} plus {y}? A:",
        "Q: What is the sum of {x} and {y}? A:",
        "The sum of {x} and {y} is",
        "{x} + {y} =",
    )
    assert OPERATORS["-"].templates[3] == "Q: What is the difference between {x} and {y}? A:"
    assert OPERATORS["-"].templates[4] == "The difference between {x} and {y} is"
    assert OPERATORS["*"].templates[2] == "Q: What is the result of {x} times {y}? A:"
    assert OPERATORS["/"].templates[3:] == (
        "Q: What is the ratio between {x} and {y}? A:",
        "The ratio of {x} and {y} is",
        "{x} / {y} =",
    )


def test_facts_are_true_and_complete() -> None:
    assert facts("+", 3) == [(1, 1, 2), (1, 2, 3), (2, 1, 3)]
    assert facts("-", 3) == [(2, 1, 1), (3, 1, 2), (3, 2, 1)]
    assert facts("*", 4, 3) == [(1, 1, 1), (1, 2, 2), (1, 3, 3), (2, 1, 2), (3, 1, 3)]
    assert facts("/", 4)[-3:] == [(4, 1, 4), (4, 2, 2), (4, 4, 1)]
    assert OPERATORS["/"].apply(1, 0) is None


def test_counts_and_equal_lengths(gpt2_like) -> None:
    pairs, dropped = arithmetic_pairs(gpt2_like, per_template=5)
    assert len(pairs) == 4 * 6 * 5
    assert dropped.total > 0
    encoded = encode_pairs(pairs, gpt2_like, len(gpt2_like))
    assert all(len(e.clean) == len(e.corrupted) for e in encoded)
    for pair, e in zip(pairs, encoded, strict=True):
        assert pair.clean.count("\n") == 2
        assert e.clean_answer_text == f" {pair.meta['clean_fact'][2]}"


@pytest.mark.parametrize("shots", [0, 1, 2, 3])
def test_pairs_differ_only_in_the_question(gpt2_like, shots: int) -> None:
    pairs, _ = arithmetic_pairs(gpt2_like, per_template=3, shots=shots)
    for pair in pairs:
        *shown, asked = pair.clean.split("\n")
        *shown_too, asked_too = pair.corrupted.split("\n")
        assert len(shown) == shots
        assert shown == shown_too
        assert len(set(shown)) == shots
        assert asked != asked_too
        assert not any(line.startswith((asked, asked_too)) for line in shown)
        operator = OPERATORS[pair.meta["operator"]]
        x, y, result = pair.meta["clean_fact"]
        assert operator.apply(x, y) == result
        assert asked == operator.templates[pair.meta["template"]].format(x=x, y=y)


@pytest.mark.parametrize("name", ["gpt2_like", "llama3_like", "llama_like"])
@pytest.mark.parametrize("shots", [0, 2])
def test_labels_point_at_the_right_tokens(name: str, shots: int, request) -> None:
    tokenizer = request.getfixturevalue(name)
    pairs, _ = arithmetic_pairs(tokenizer, per_template=4, shots=shots, operators="+-/")
    for pair, e in zip(pairs, encode_pairs(pairs, tokenizer, len(tokenizer)), strict=True):
        word = OPERATORS[pair.meta["operator"]].words[pair.meta["template"]]
        for fact, text in (
            (pair.meta["clean_fact"], e.clean_text),
            (pair.meta["corrupted_fact"], e.corrupted_text),
        ):
            ends = {"op1": str(fact[0]), "operator": word, "op2": str(fact[1])}
            for label, piece in ends.items():
                at = e.labels[label]
                assert piece.endswith(text[at].strip(" ▁"))
                assert text[at].strip(" ▁")
        assert e.labels["op1"] < e.labels["op2"] < e.labels["last"] == len(e.clean) - 1
        changed = {i for i in range(len(e.clean)) if e.clean[i] != e.corrupted[i]}
        assert max(changed) <= e.labels["op2"]


def test_the_same_seed_gives_the_same_pairs(gpt2_like) -> None:
    once, _ = arithmetic_pairs(gpt2_like, per_template=3, seed=7)
    again, _ = arithmetic_pairs(gpt2_like, per_template=3, seed=7)
    other, _ = arithmetic_pairs(gpt2_like, per_template=3, seed=8)
    minus, _ = arithmetic_pairs(gpt2_like, per_template=3, seed=7, operators="-")
    assert once == again
    assert once != other
    assert minus == [p for p in once if p.meta["operator"] == "-"]
    # Written down, so that a new version or another machine cannot change them unnoticed.
    assert (once[0].meta["clean_fact"], once[0].meta["corrupted_fact"]) == ([78, 16, 94], [59, 36, 95])


def test_nothing_degenerate_is_left(gpt2_like) -> None:
    pairs, dropped = arithmetic_pairs(gpt2_like, per_template=40, shots=0, max_number=20)
    seen = set()
    for pair in pairs:
        clean, corrupted = pair.meta["clean_fact"], pair.meta["corrupted_fact"]
        assert clean[2] != corrupted[2]
        assert clean[:2] != corrupted[:2]
        if pair.meta["operator"] in "*/":
            assert 1 not in clean[:2]
            assert clean[2] != 1
        key = (pair.clean, pair.corrupted)
        assert key not in seen
        seen.add(key)
    assert len(dropped.reasons) == 3
    assert all(n > 0 for n in dropped.reasons.values())
    assert any("left out, because they multiply or divide by 1" in line for line in dropped.lines())
    assert any("were dropped because both prompts have the same result" in line for line in dropped.lines())


def test_a_dry_table_gives_what_there_is(gpt2_like) -> None:
    pairs, dropped = arithmetic_pairs(
        gpt2_like, per_template=50, shots=0, operators="*", max_number=8, templates=[5]
    )
    # 2*2, 2*3, 3*2, 2*4, 4*2: all ordered pairs but those of equal results
    assert len(pairs) == 5 * 4 - 2 * 2
    assert any("Only 16 of 50 pairs" in note for note in dropped.notes)
    with pytest.raises(DeltapatchError, match="No arithmetic pairs are possible"):
        arithmetic_pairs(gpt2_like, shots=9, operators="*", max_number=8)


@pytest.mark.parametrize("shots", [0, 2])
def test_small_ranges_end(gpt2_like, shots: int) -> None:
    pairs, _ = arithmetic_pairs(gpt2_like, per_template=3, shots=shots, operators="+", max_number=4)
    assert pairs


def test_numbers_stop_where_the_tokenizer_splits_them(gpt2_like) -> None:
    assert number_range(gpt2_like, 300).operands == 120
    assert number_range(gpt2_like, 50).results == 50
    pairs, dropped = arithmetic_pairs(gpt2_like, per_template=5, operators="+-")
    assert max(max(p.meta["clean_fact"]) for p in pairs) <= 120
    assert any("from 1 to 120" in note for note in dropped.notes)
    assert arithmetic_pairs(gpt2_like, per_template=1, operators="+", max_number=50)[1].notes == []


def test_a_space_of_its_own_ends_the_prompt(llama3_like) -> None:
    numbers = number_range(llama3_like, 300)
    assert (numbers.operands, numbers.results, numbers.ending) == (300, 300, " ")
    pairs, dropped = arithmetic_pairs(llama3_like, per_template=1)
    assert all(p.clean.endswith((": ", "= ", "is ")) for p in pairs)
    assert any("Prompts end in a space" in note for note in dropped.notes)
    encoded = encode_pairs(pairs, llama3_like, len(llama3_like))
    assert {e.clean_text[-1] for e in encoded} == {" "}


def test_digits_leave_small_results(llama_like) -> None:
    numbers = number_range(llama_like, 300)
    assert (numbers.operands, numbers.results, numbers.ending, numbers.split) == (300, 9, " ", True)
    pairs, dropped = arithmetic_pairs(llama_like, per_template=6, operators="-/")
    assert max(p.meta["clean_fact"][2] for p in pairs) <= 9
    assert max(p.meta["clean_fact"][0] for p in pairs) > 99
    for pair in pairs:
        lengths = [[len(str(n)) for n in pair.meta[which][:2]] for which in ("clean_fact", "corrupted_fact")]
        assert lengths[0] == lengths[1]
    assert any("splits numbers" in note for note in dropped.notes)
    assert any("different numbers of tokens" in line for line in dropped.lines())
    encode_pairs(pairs, llama_like, len(llama_like))


def test_spans_are_tokens_of_their_own(gpt2_like) -> None:
    text = "12 + 345 ="
    ids, spans = token_spans(gpt2_like, text, [(0, 2), (5, 8), (6, 8), (0, 1)])
    pieces = [[gpt2_like.decode([ids[i]]) for i in span] for span in spans]
    assert pieces == [["12"], ["3", "4", "5"], ["4", "5"], []]


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, "need a tokenizer, and this model has none"),
        ({"tokenizer": Slow()}, "need a fast tokenizer .* not Slow"),
        ({"per_template": 0}, "at least 1, not 0"),
        ({"shots": -1}, "cannot be negative: -1"),
        ({"max_number": 1}, "at least 2, not 1"),
        ({"operators": "+!"}, "must be some of"),
        ({"operators": ""}, "must be some of"),
        ({"operators": "++"}, "each once"),
        ({"templates": [6]}, "numbered 0 to 5"),
        ({"templates": []}, "numbered 0 to 5"),
    ],
)
def test_mistakes(gpt2_like, changes: dict, message: str) -> None:
    options = {"tokenizer": gpt2_like} | changes
    with pytest.raises(DeltapatchError, match=message):
        arithmetic_pairs(options.pop("tokenizer"), **options)


def test_a_tokenizer_without_numbers() -> None:
    class Letters:
        """Every character is two tokens."""

        is_fast, unk_token_id = True, None

        def __call__(self, text: str, **wanted: bool) -> dict:
            spans = [(i, i + 1) for i in range(len(text)) for _ in range(2)]
            return {
                "input_ids": [ord(c) * 2 + half for c in text for half in (0, 1)],
                "offset_mapping": spans,
                "special_tokens_mask": [0] * len(spans),
            }

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(i // 2) for i in ids)

    with pytest.raises(DeltapatchError, match="no numbers that are one token after a prompt"):
        arithmetic_pairs(Letters())


def test_tasks_by_name(gpt2_like) -> None:
    options = {"per_template": 1, "shots": 0, "seed": 3, "operators": "+"}
    pairs, dropped = make_pairs("arithmetic", gpt2_like, **options)
    assert len(pairs) == 6
    assert (pairs, dropped) == find_task("arithmetic")(gpt2_like, **options)
    assert all(task.summary for task in TASKS.values())
    with pytest.raises(DeltapatchError, match="no task 'geometry'; the tasks are arithmetic"):
        find_task("geometry")


@pytest.mark.parametrize("symbol", list(OPERATORS))
def test_a_tenth_is_held_out(symbol: str) -> None:
    table = facts(symbol, 200)
    share = sum(is_held_out(symbol, x, y) for x, y, _ in table) / len(table)
    assert share == pytest.approx(0.1, abs=0.015)


def test_the_split_knows_what_is_the_same_question() -> None:
    assert all(
        is_held_out(s, x, y) == is_held_out(s, y, x) for s in "+*" for x in range(30) for y in range(30)
    )
    assert any(is_held_out("-", x, y) != is_held_out("-", y, x) for x in range(30) for y in range(30))
    # Written down: the shipped models were trained on this split.
    assert [y for y in range(1, 60) if is_held_out("+", 7, y)] == [11, 14, 41, 48, 49, 53]
