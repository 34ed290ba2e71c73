"""The options of `pairs` and `effects` that the study needs."""

import json

import pytest

MODEL = "builtin:gpt-neox-arithmetic"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (("--differ", "same_result", "--operators", "+-", "--templates", "1,5"), 8),
        (("--differ", "operator", "--operators", "+, max ,*", "--templates", "5"), 2 * 3),
        (("--task", "three-operands", "--shapes", "x + y + z,(x + y) * z", "--templates", "0,1"), 8),
        (("--task", "retrieval", "--max-number", "50"), 16),
        (("--task", "factual", "--relations", "capital", "--answers", "text"), 2),
    ],
)
def test_tasks(command, tmp_path, options, count) -> None:
    out = tmp_path / "pairs.jsonl"
    result = command(
        "pairs", "--model", MODEL, "--per-template", 2, "--shots", 0, *options, "--out", out, "--json"
    )
    assert result.code == 0, result.err
    made = json.loads(result.out)["pairs"]
    assert made == len(out.read_text().splitlines())
    # max beside + * has another sentence, so that fewer can be had.
    assert made == count if "max" not in str(options) else 0 < made <= count


def test_word_problems(command, tmp_path) -> None:
    data = tmp_path / "problems.jsonl"
    rows = [
        {"template": "What is {a} plus {b}?", "answer": "a + b"},
        {"question": "How much is 3?", "answer": 3},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = command(
        "pairs", "--task", "word-problems", "--model", MODEL, "--data", data, "--out", tmp_path / "out"
    )
    assert result.code == 0
    assert len((tmp_path / "out").read_text().splitlines()) == 50
    assert "line 2 is dropped: no other problem with" in result.err


def test_only_correct(command, tmp_path) -> None:
    out = tmp_path / "pairs.jsonl"
    args = ("pairs", "--model", MODEL, "--operators", "+,>", "--templates", "1", "--shots", 0)
    args += ("--per-template", 5, "--answers", "text", "--only-correct", "--max-number", 100, "--out", out)
    result = command(*args)
    assert result.code == 0, result.err
    assert "both of 5 of 10 pairs" in result.err
    assert all(json.loads(line)["meta"]["operator"] == "+" for line in out.read_text().splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "factual", "--operators", "+"), "the task factual has no option --operators"),
        (("--templates", "one"), "--templates 'one' is not numbers such as 0,2,5"),
        (("--differ", "mood"), "Pairs differ by operands, same_result, operator, not 'mood'"),
        (("--task", "word-problems"), "give its path with --data"),
    ],
)
def test_pairs_that_cannot_be_made(command, tmp_path, options, message) -> None:
    result = command("pairs", "--model", MODEL, *options, "--out", tmp_path / "out")
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "out").exists()


def test_intervals_and_discoveries(command, make_effects, tmp_path) -> None:
    effects = make_effects(lengths=(8,) * 8)
    effects.sites["mlp_post"].measured["kl"][:, 2, 0, 5] += 50
    effects.save(tmp_path / "run")
    args = ("effects", tmp_path / "run", "--site", "z", "--format", "json")
    rows = json.loads(command(*args, "--interval").out)["rows"]
    assert len(rows) == 3 * 4
    assert {"layer", "position", "index", "recovered", "low", "high", "p", "q"} < set(rows[0])
    args = ("effects", tmp_path / "run", "--site", "mlp_post", "--metric", "kl", "--by", "layer,index")
    shown = command(*args, "--fdr", 0.05)
    assert shown.code == 0
    assert "of 48 rows have q <= 0.05" in shown.err
    assert command(*args, "--fdr", 0.05).out == shown.out
    assert "--by none lists every cell" in command(*args[:-1], "none", "--interval").err
    assert "rate lies between 0 and 1" in command(*args, "--fdr", 2).err
