"""Encoding prompt pairs: what comes out, and a clear sentence for each mistake."""

import re

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import deltapatch
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.pairs import PromptPair

D_VOCAB = 400


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, a few words and the numbers 10 to 19, with and without a space before them."""
    vocab = {"<s>": 0}
    words = ["ĠParis", "Paris", "ĠRome", "The", "Ġcity", "Ġis", *(f"Ġ{n}" for n in range(10, 20))]
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *(str(n) for n in range(10, 20))]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


TOKENIZER = byte_tokenizer()


def pair(**changes: object) -> PromptPair:
    fields: dict = {
        "clean": "The city is",
        "corrupted": "The city is",
        "clean_answer": " Paris",
        "corrupted_answer": " Rome",
    }
    return PromptPair(**fields | changes)


def test_text_becomes_ids_and_pieces() -> None:
    (encoded,) = encode_pairs([pair(labels={"first": 0, "last": -1}, meta={"who": "me"})], TOKENIZER, D_VOCAB)
    assert encoded.clean == TOKENIZER("The city is")["input_ids"]
    assert encoded.clean_text == ["The", " city", " is"]
    assert encoded.clean_answer == [TOKENIZER.convert_tokens_to_ids("ĠParis")]
    assert encoded.answer_tokens == 1
    assert (encoded.clean_answer_text, encoded.corrupted_answer_text) == (" Paris", " Rome")
    assert encoded.labels == {"first": 0, "last": 2}
    assert encoded.meta == {"who": "me"}


@pytest.mark.parametrize(
    ("clean", "corrupted", "align", "found"),
    [
        ([1, 2, 3, 4], [1, 2, 7, 8, 4], "prefix+suffix", [[0, 0], [1, 1], [3, 4]]),
        ([1, 2, 3], [3], "prefix+suffix", [[2, 0]]),
        ([1], [1, 2, 3], "prefix+suffix", [[0, 0]]),
        ([1, 1, 1], [1, 1], "prefix+suffix", [[0, 0], [1, 1]]),  # no token twice
        ([1, 2, 3], [4, 5, 6], "prefix+suffix", None),  # of one length all lines up
        ([1, 2, 3], [4, 5, 6], [[0, 0], [1, 1], [2, 2]], None),
        ([1, 2, 3], [4, 5, 6], np.array([[0, 1], [-1, -1]]), [[0, 1], [2, 2]]),
        ([1, 2, 3], [4, 5], ((1, -1),), [[1, 1]]),
    ],
)
def test_what_lines_up(clean, corrupted, align, found) -> None:
    (encoded,) = encode_pairs([PromptPair(clean, corrupted, 8, 9, align=align)], None, 10)
    assert encoded.align == found
    again = encode_pairs([encoded], None, 10)[0]  # what is encoded may be given as pairs
    assert again == encoded
    there = dict(found if found is not None else [[at, at] for at in range(len(clean))])
    assert encoded.counterparts == [there.get(at) for at in range(len(clean))]
    for which, prompt in enumerate((clean, corrupted)):
        assert [c[which] for c in encoded.columns if c[which] is not None] == list(range(len(prompt)))
    assert {tuple(c) for c in encoded.columns if None not in c} == set(there.items())


def test_a_notebook_shows_prompts_side_by_side() -> None:
    (encoded,) = encode_pairs([PromptPair([11, 12, 13], [11, 14], 8, 9, align=[[0, 0], [2, 1]])], None, 20)
    cells = re.findall(r"<tr>(.*?)</tr>", encoded._repr_html_())
    rows = [re.findall(r">([^<]*)</td>", row) for row in cells]
    assert rows[:3] == [
        ["position", "0", "1", "2", "answer"],
        ["clean", "11", "12", "13", "8"],
        ["corrupted", "11", "", "14", "9"],
    ]
    assert rows[3] == ["", "", "changed", "changed", ""]


def test_ids_need_no_tokenizer() -> None:
    raw = PromptPair([1, 2], [3, 4], 5, 6, {"op": -2})
    (encoded,) = encode_pairs([raw], None, 7)
    assert encoded.corrupted == [3, 4]
    assert encoded.corrupted_text == ["3", "4"]
    assert (encoded.clean_answer, encoded.clean_answer_text) == ([5], "5")
    assert encoded.labels == {"op": 0}


def test_special_tokens_are_the_tokenizers_own() -> None:
    (encoded,) = encode_pairs([pair()], byte_tokenizer(bos=True), D_VOCAB)
    assert encoded.clean_text == ["<s>", "The", " city", " is"]
    assert encoded.clean_answer_text == " Paris"


@pytest.mark.parametrize(
    ("prompt", "answer", "found"),
    [
        ("The city is", " Paris", " Paris"),
        ("The city is", "Paris", " Paris"),  # as given it would change the prompt's last token
        ("The city:", "12", "12"),  # as given comes first
        ("The city:", " 12", " 12"),
        ("The city: ", "12", "12"),
        ([1, 2], " 12", " 12"),
        ([1, 2], "12", "12"),
        ([1, 2], "Rome", " Rome"),  # only with a space is it one token
        ("The city is", " Oslo", " Oslo"),
        ("The city is", "Oslo", " Oslo"),
        ("The city:", "123", "123"),  # five tokens with a space before it
        ("The city:", " 123", " 123"),
        ([1, 2], "Oslo", "Oslo"),
    ],
)
def test_answers_are_tokenised_in_context(prompt: str | list[int], answer: str, found: str) -> None:
    tokenizer = TOKENIZER
    if prompt == "The city: ":  # a tokenizer that keeps a space by itself
        tokenizer = byte_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\w+|\s|[^\s\w]+"), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
    raw = pair(clean=prompt, corrupted=prompt, clean_answer=answer, corrupted_answer=0)
    assert encode_pairs([raw], tokenizer, D_VOCAB)[0].clean_answer_text == found


def test_answers_of_several_tokens() -> None:
    raw = pair(clean_answer=" Oslo", corrupted_answer=[7, 8, 9])
    (encoded,) = encode_pairs([raw], TOKENIZER, D_VOCAB)
    assert encoded.clean_answer == TOKENIZER(" Oslo")["input_ids"]
    assert len(encoded.clean_answer) == 5
    assert encoded.corrupted_answer == [7, 8, 9]
    assert encoded.answer_tokens == 5
    (encoded,) = encode_pairs([PromptPair([1], [2], [3, 4], 5)], None, 6)
    assert (encoded.clean_answer, encoded.clean_answer_text) == ([3, 4], "3 4")


MISTAKES = [
    (pair(clean=""), "p: the clean prompt is empty"),
    (pair(corrupted=[]), "p: the corrupted prompt is empty"),
    (pair(corrupted="The city"), r"clean has 3 \['The', ' city', ' is'\] and corrupted has 2"),
    (pair(clean=[1, D_VOCAB, 2]), f"p: token {D_VOCAB} of clean is out of range.*0 to {D_VOCAB - 1}"),
    (pair(clean=[1, -1, 2]), "token -1 of clean is out of range"),
    (pair(clean=[1, True, 2]), "clean must be text or token ids"),
    (pair(clean=[1, "2", 3]), "clean must be text or token ids"),
    (pair(clean_answer=D_VOCAB), f"token {D_VOCAB} of clean_answer is out of range"),
    (pair(clean_answer=1.5), "clean_answer must be text or token ids"),
    (pair(clean_answer=""), "clean_answer is empty"),
    (pair(clean_answer=[]), "clean_answer is empty"),
    (pair(corrupted_answer=[3, D_VOCAB]), f"token {D_VOCAB} of corrupted_answer is out of range"),
    (pair(clean_answer=[1, True]), "clean_answer must be text or token ids"),
    (
        pair(clean="The city is ", corrupted="The city is ", clean_answer="Rome"),
        "tokenised; .*drop the space that ends",
    ),
    (pair(corrupted="The city"), r'; line them up with align="prefix\+suffix", or with a list'),
    (pair(align="suffix"), "align must be 'prefix\\+suffix' or a list of positions, not 'suffix'"),
    (pair(align=3), r"align must be .* or a list of \[clean position, corrupted position\], not 3"),
    (pair(align=[]), r"corrupted position\], not \[\]"),
    (pair(align=[1, 2]), r"corrupted position\], and 1 is none"),
    (pair(align=[[1, 2, 3]]), r"and \[1, 2, 3\] is none"),
    (pair(align=[[0, True]]), r"corrupted position\], not True"),
    (pair(align=[[0, 3]]), "align has position 3 of the corrupted prompt, which has 3 tokens"),
    (pair(align=[[-4, 0]]), "align has position -4 of the clean prompt"),
    (pair(align=[[0, 1], [1, 1]]), "positions of align must ascend in both prompts, each once"),
    (pair(align=[[1, 0], [0, 1]]), "positions of align must ascend"),
    (
        pair(clean=[1, 2, 3], corrupted=[4, 5], align="prefix+suffix"),
        "begin and end in different tokens: nothing lines up by",
    ),
    (pair(labels={"op1": 3}), "label 'op1' is at position 3, but the prompt has 3 tokens"),
    (pair(labels={"op1": -4}), "label 'op1' is at position -4"),
    (pair(labels={"op1": 2.5}), "label 'op1' must be a position"),
    (pair(labels={"op1": "nowhere"}), "label 'op1': 'nowhere' is not in the clean prompt"),
    (pair(labels={"op1": " "}), "label 'op1': ' ' is not in the clean prompt"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistakes_get_one_sentence(mistake: PromptPair, message: str) -> None:
    with pytest.raises(DeltapatchError, match=message) as caught:
        encode_pairs([mistake], TOKENIZER, D_VOCAB, names=["p"])
    assert str(caught.value).startswith("p: ")
    assert "\n" not in str(caught.value)


def test_the_file_and_line_name_the_pair() -> None:
    with pytest.raises(DeltapatchError, match=re.escape("pairs.jsonl, line 7: the clean prompt is empty")):
        encode_pairs(
            [pair(), pair(clean="")], TOKENIZER, D_VOCAB, names=["pairs.jsonl, line 6", "pairs.jsonl, line 7"]
        )
    with pytest.raises(DeltapatchError, match=r"^pair 1: "):
        encode_pairs([pair(), pair(clean="")], TOKENIZER, D_VOCAB)


def test_no_pairs() -> None:
    with pytest.raises(DeltapatchError, match="no prompt pairs"):
        encode_pairs([], TOKENIZER, D_VOCAB)


@pytest.mark.parametrize("text", [pair(), pair(clean=[1], corrupted=[2])])
def test_text_needs_a_tokenizer(text: PromptPair) -> None:
    with pytest.raises(DeltapatchError, match="is text, but this model has no tokenizer"):
        encode_pairs([text], None, D_VOCAB)


def test_an_unknown_word_is_no_answer() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert encode_pairs([PromptPair("a", "b", "a", "b")], words, 3)[0].clean_answer == [1]
    with pytest.raises(DeltapatchError, match="' c' is unknown to the tokenizer"):
        encode_pairs([PromptPair("a", "b", " c", "b")], words, 3)


def test_labels_by_text() -> None:
    """Each token of the text has a name; all of them are a list; what is there twice is refused."""
    model = deltapatch.load_model("builtin:gpt-neox-arithmetic")
    clean, corrupted = "Q: How much is 12 plus 6? A:", "Q: How much is 38 plus 4? A:"
    labels = {"sum": "12 plus 6", "op": "plus", "at": 3}
    given = PromptPair(clean, corrupted, " 18", " 42", labels)
    (encoded,) = encode_pairs([given], model.tokenizer, model.spec.d_vocab)
    tokens = [encoded.clean_text[encoded.labels[f"sum[{i}]"]] for i in range(3)]
    assert [t.strip() for t in tokens] == ["12", "plus", "6"]
    assert encoded.labels["sum[-3]"] == encoded.labels["sum[0]"]
    assert encoded.labels["sum"] == encoded.labels["sum[-1]"] == encoded.labels["sum[2]"]
    assert encoded.labels["op"] == encoded.labels["op[0]"] == encoded.labels["sum[1]"]
    assert encoded.labels["at"] == 3
    found = deltapatch.sweep(model, [given], sites="attn_out", positions=["sum[:]", "op"], progress=False)
    assert found.positions() == ["sum[0]", "sum[1]", "sum[2]", "op"]
    values = found.values("logit_diff")
    assert np.allclose(values[..., 1], values[..., 3], rtol=1e-4)
    for text, said in (
        ("1", "is not in|times in"),
        ("is", "not in|times"),
        ("o", "2 times|3 times"),
        ("", "not in"),
    ):
        wrong = PromptPair(clean, corrupted, " 18", " 42", {"x": text})
        if clean.count(text) != 1:
            with pytest.raises(DeltapatchError, match=said):
                encode_pairs([wrong], model.tokenizer, model.spec.d_vocab)
    ids = PromptPair(encoded.clean, encoded.corrupted, 1, 2, {"x": "plus"})
    with pytest.raises(DeltapatchError, match="the clean prompt is token ids: give its position"):
        encode_pairs([ids], model.tokenizer, model.spec.d_vocab)
    with pytest.raises(DeltapatchError, match=r"no pair has a position labelled 'none\[:\]'"):
        deltapatch.sweep(model, [given], positions="none[:]", progress=False)
