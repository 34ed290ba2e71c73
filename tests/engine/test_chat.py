"""Prompts that are conversations: the tokenizer's own chat template makes the text, as transformers does."""

import json
import re
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import deltapatch as dp
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs import PromptPair
from deltapatch.interventions.pairs_file import write_pairs

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
CHOOSY = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}" + CHATML
)


def make(template, bos=True):
    """Bytes as tokens, and those of ChatML; `<s>` is put before a text."""
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(special)
    if bos:
        built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


def ask(what):
    return [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"Is {what} big?"}]


def encoded(tokenizer, *given, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encode_pairs([PromptPair(*given, **more)], tokenizer, len(tokenizer))[0]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, WITH_BOS])
def test_the_tokens_are_those_of_transformers(template, bos):
    """None is added to those of the template: the begin-of-sequence token is there once or not at all."""
    tokenizer = make(template, bos)
    labels = {"place": "Rome", "system": "short"}
    pair = encoded(tokenizer, ask("Rome"), ask("Oslo"), "Y", dp.AnyOf(["N", "n"]), labels=labels)
    for ids, what in ((pair.clean, "Rome"), (pair.corrupted, "Oslo")):
        want = tokenizer.apply_chat_template(
            ask(what), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == want
    assert pair.clean.count(0) == (template is WITH_BOS)
    assert pair.clean_text[-2:] == ["t", "\n"]
    assert "".join(pair.clean_text[pair.labels[f"place[{i}]"]] for i in range(4)) == "Rome"
    assert (pair.clean_answer_text, pair.corrupted_answer_text) == ("Y", "N | n")


def test_an_answer_that_the_assistant_has_begun():
    tokenizer = make(WITH_BOS)
    begun = [*ask("Rome"), {"role": "assistant", "content": "I say:"}]
    pair = encoded(tokenizer, begun, begun, " Y", " N")
    want = tokenizer.apply_chat_template(begun, continue_final_message=True, tokenize=True, return_dict=False)
    assert pair.clean == want
    assert pair.clean_text[-1] == ":"
    assert pair.clean_answer_text == " Y"


def test_files_hold_conversations(tmp_path):
    tokenizer = make(CHATML)
    pair = PromptPair(ask("Rome"), ask("Oslo"), "Y", "N", {"place": "Rome"})
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [pair])
    assert json.loads(path.read_text())["clean"] == ask("Rome")
    assert dp.load_pairs(path) == [pair]
    assert encode_pairs(dp.load_pairs(path), tokenizer, len(tokenizer)) == [
        encoded(tokenizer, ask("Rome"), ask("Oslo"), "Y", "N", labels={"place": "Rome"})
    ]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, ask("Rome"), "clean: a list of messages needs a tokenizer with a chat template"),
        (CHOOSY, ask("Rome"), "refuses the messages ('the user speaks first')"),
        (CHATML, [{"role": "user"}], "message 0 must be like"),
        (CHATML, [{"role": "user", "content": ["Hi"]}], "message 0 must be like"),
        (CHATML, [*ask("Rome"), 7], "message 2 must be like"),
        ("{{ messages[9].role.x }}", ask("Rome"), "refuses the messages"),
    ],
)
def test_what_is_refused(template, messages, message):
    with pytest.raises(DeltapatchError, match=re.escape(message)) as error:
        encoded(make(template), messages, messages, "Y", "N")
    assert str(error.value).startswith("pair 0: ")


def test_messages_without_a_tokenizer():
    with pytest.raises(DeltapatchError, match="no tokenizer"):
        encode_pairs([PromptPair(ask("Rome"), ask("Oslo"), 1, 2)], None, 9)


def test_a_file_with_a_list_of_anything_else(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"clean": [{"role": "user"}, 3], "corrupted": [2], "clean_answer": 1, "corrupted_answer": 4}\n'
    )
    with pytest.raises(DeltapatchError, match="line 1: 'clean' must be text or a list of token ids"):
        dp.load_pairs(path)
