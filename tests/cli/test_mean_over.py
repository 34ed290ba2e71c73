"""Files of prompts, as `--mean-over` takes them: text and JSON lines, and what is wrong in them."""

import json

import pytest

from deltapatch import DeltapatchError
from deltapatch.interventions.prompts_file import load_prompts

TEXTS = ["Q: What is 1 plus 2? A:", ' "so" [1, 2]']


def test_lines_are_prompts(tmp_path):
    plain, ids = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("\r\n".join(TEXTS) + "\n")
    labelled = {"prompt": [3, 4], "labels": {"a": 1}}, {"prompt": "What is 3", "labels": {"a": "3"}}
    ids.write_text("\n".join(map(json.dumps, [*TEXTS, [3, 4], *labelled])))
    assert load_prompts(plain) == TEXTS
    assert load_prompts(ids) == [*TEXTS, [3, 4], *labelled]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "p.txt is empty; it needs one prompt a line"),
        ("p.txt", "a\n\nb\n", "p.txt, line 2: the line is empty"),
        ("p.jsonl", '"a"\n{"prompt": "b"}\n', "p.jsonl, line 2: a line must be a prompt as a JSON string"),
        ("p.jsonl", "[1, true]\n", "p.jsonl, line 1: a line must be"),
        ("p.txt", None, "p.txt cannot be read"),
    ],
)
def test_what_is_no_file_of_prompts(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DeltapatchError, match=message):
        load_prompts(tmp_path / name)
