"""`deltapatch reproduce` as a user meets it: what it lists, what it says, and how it refuses."""

import json

import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny products are slower on several threads."""
    from deltapatch.engine.wavefront.pool import threads

    with threads(1):
        yield


MODEL = ("--model", "builtin:gpt-neox-arithmetic", "--device", "cpu")


def test_the_experiments_are_listed_without_a_model(command) -> None:
    result = command("reproduce", "--list")
    assert result.code == 0
    lines = [line.split()[0] for line in result.out.splitlines()]
    assert {"numerals-operands", "words-same-result", "retrieval", "factual", "shots-0"} <= set(lines)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "Missing option '--model'"),
        (MODEL, "Missing option '--out'"),
        ((*MODEL, "--out", "new", "--experiment", "nonsense"), "unknown experiment 'nonsense': choose from"),
        ((*MODEL, "--out", "new", "--experiment", ","), "--experiment names no experiment"),
        ((*MODEL, "--out", "new", "--experiment", "word-problems"), "give its path with --problems"),
        ((*MODEL, "--out", "new", "--quick", "--paper-size"), "exclude each other"),
        ((*MODEL, "--out", "new", "--per-template", "0"), "per-template must be at least 1"),
        ((*MODEL, "--out", "new", "--shots", "-1"), "shots must be at least 0"),
        ((*MODEL, "--out", "new", "--max-number", "1"), "max-number must be at least 2, not 1"),
        ((*MODEL, "--out", "new", "--memory-budget", "much"), "is not an amount of memory"),
        ((*MODEL, "--out", "new", "--lama", "nowhere"), "nowhere cannot be read"),
        ((*MODEL, "--out", "new", "--layer", "9"), "layer 9 does not exist: this model has 0 to 3"),
        ((*MODEL, "--out", "new", "--compare", "nowhere"), "nowhere"),
        ((*MODEL, "--out", "new", "--compare", "builtin:llama-arithmetic"), "tokenises text in another way"),
        (
            (*MODEL, "--out", "new", "--experiment", "retrieval"),
            "none of these experiments: retrieval: its prompts have up to",
        ),
        ((*MODEL, "--out", ".", "--resume"), "is taken, and not by a study"),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, monkeypatch, args, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("")
    result = command("reproduce", *args)
    assert result.code == 2
    assert message in result.err
    assert result.err.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.err
    assert not result.out
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_dry_run_says_what_it_would_take(command, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("reproduce", *MODEL, "--quick", "--experiment", "shots-0,retrieval", "--dry-run")
    assert result.code == 0
    assert not list(tmp_path.iterdir())
    assert "# retrieval: not possible: its prompts have up to 177 tokens, more than the 64" in result.out
    assert "# shots-0: Two operands in numerals, 0 exemplars; 48 pairs, 2,752 interventions" in result.out
    assert "deltapatch sweep --model builtin:gpt-neox-arithmetic --pairs shots-0/pairs.jsonl" in result.out
    facts = json.loads(
        command("reproduce", *MODEL, "--quick", "--experiment", "shots-0", "--dry-run", "--json").out
    )
    assert [e["rows"] for e in facts["experiments"]] == [2752]


def test_one_experiment_on_a_built_in_model(command, tmp_path) -> None:
    out = tmp_path / "study"
    args = (
        "reproduce",
        *MODEL,
        "--per-template",
        "1",
        "--experiment",
        "shots-0",
        "--experiment",
        "retrieval",
    )
    result = command(*args, "--out", out, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert facts["experiments"]["shots-0"]["accuracy"] > 0.9
    assert facts["experiments"]["shots-0"]["importance"] > 0.2 > facts["experiments"]["shots-0"]["null"]
    assert facts["experiments"]["shots-0"]["error"] < 1e-4
    assert "its prompts have up to 176 tokens" in facts["failures"]["retrieval"]
    assert "not done: its prompts" in result.err
    assert command("effects", out / "shots-0" / "components", "--site", "mlp_out").code == 0
    taken = command(*args, "--out", out)
    assert taken.code == 2
    assert "--resume goes on with it" in taken.err
    again = command(*args, "--out", out, "--resume", "--quiet")
    assert again.code == 0
    assert again.out == f"{out}\n"
    assert "retrieval was not done: its prompts" in again.err
