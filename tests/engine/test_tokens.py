"""Text in tokens, by small real tokenizers of every kind: what is put around a text, and spaces."""

import warnings

import numpy as np
import pytest
from engine_tiny import hf_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import deltapatch
from deltapatch import DeltapatchError, PromptPair
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.tokens import pieces, tokenise
from deltapatch.tasks.answers import answer_ids
from deltapatch.tasks.numbers import token_spans

WORDS = ["▁The", "▁city", "▁is", "▁12", "▁42", "▁53", "▁", "12", "42", "53", "The", "4", "2", ":", "is"]
VOCAB = ["<unk>", "<s>", "</s>", *WORDS]


def unigram(prepend):
    """As T5's and Gemma's kin: a marker for spaces, also put before the text."""
    kind = Tokenizer(models.Unigram([(w, -1.0 if len(w) > 1 else -5.0) for w in VOCAB], unk_id=0))
    kind.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    kind.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return kind


def legacy():
    """As LLaMA 2: the marker is put before the text, whether or not it begins with a space."""
    kind = Tokenizer(
        models.BPE({w: i for i, w in enumerate(VOCAB)}, [], unk_token="<unk>", ignore_merges=True)
    )
    kind.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    kind.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(":", "isolated")]
    )
    kind.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return kind


def byte_level():
    """As GPT-2, but with a space put before the text."""
    words = [w.replace("▁", "Ġ") for w in VOCAB] + sorted(pre_tokenizers.ByteLevel.alphabet())
    kind = Tokenizer(models.BPE({w: i for i, w in enumerate(dict.fromkeys(words))}, [], ignore_merges=True))
    kind.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    kind.decoder = decoders.ByteLevel()
    return kind


KINDS = {
    "unigram-always": lambda: unigram("always"),
    "unigram-first": lambda: unigram("first"),
    "legacy": legacy,
    "byte-level": byte_level,
}
AROUND = {"none": "$A", "bos": "<s> $A", "bos-eos": "<s> $A </s>", "eos": "$A </s>"}


def make(kind, around="bos"):
    built = KINDS[kind]()
    built.add_special_tokens(["<s>", "</s>"])
    template = AROUND[around]
    special = [(name, built.token_to_id(name)) for name in ("<s>", "</s>") if name in template]
    if special:
        built.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def front(around):
    return ["<s>"] if "bos" in around else []


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=AROUND)
def around(request):
    return request.param


def encoded(tokenizer, *given, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode_pairs([PromptPair(*given, **more)], tokenizer, len(tokenizer))[0]


def test_prompts_have_the_special_tokens_at_the_front_once_and_none_at_the_end(kind, around):
    tokenizer = make(kind, around)
    want = [*front(around), " The", " city", " is", ":"]
    for text in ("The city is:", "<s>The city is:") if front(around) else ("The city is:",):
        pair = encoded(tokenizer, text, text, " 42", " 53", {"city": -3})
        found = [t.strip() for t in pair.clean_text]
        assert found == [t.strip() for t in want]
        assert pair.clean_text[pair.labels["city"]].strip() == "city"
        assert (pair.clean_answer_text, pair.corrupted_answer_text) == (" 42", " 53")
        assert (len(pair.clean_answer), len(pair.corrupted_answer)) == (1, 1)


@pytest.mark.parametrize("answer", [" 42", "42"])
def test_answers_to_ids_are_those_to_the_text_that_has_them(kind, around, answer):
    tokenizer = make(kind, around)
    text = encoded(tokenizer, "The city is:", "The city is:", answer, " 53")
    ids = encoded(tokenizer, text.clean, text.corrupted, answer, " 53")
    assert ids == text
    assert len(ids.clean_answer) == 1


@pytest.mark.parametrize("prompt", [[9, 3, 3], [14, 10], [4]])
def test_answers_to_ids_of_no_text_get_no_space_of_the_tokenizers(kind, prompt):
    tokenizer = make(kind)
    for answer, want in ((" 42", " 42"), (" 12", " 12")):
        pair = encoded(tokenizer, prompt, prompt, answer, 3)
        assert (pair.clean_answer_text, len(pair.clean_answer)) == (want, 1)


def test_what_was_done_is_said_once():
    pairs = [PromptPair("The city", "The city", " 42", " 53"), PromptPair("<s>The", "<s>The", " 42", " 53")]
    tokenizer = make("legacy", "bos-eos")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encode_pairs(pairs, tokenizer, len(tokenizer))
    assert sorted(str(w.message) for w in said) == [
        "pair 1: the corrupted prompt begins with '<s>' itself, so the tokenizer's own is not put before it "
        "(the same of others that do)",
        "the tokenizer puts '</s>' at the end of a text: it is left out, since the answer follows there",
    ]


def test_ids_that_end_or_begin_twice():
    tokenizer = make("legacy", "bos-eos")
    ids = tokenizer("The city is:")["input_ids"]
    with pytest.raises(DeltapatchError, match="p: the clean prompt ends in '</s>', which the tokenizer puts"):
        encode_pairs([PromptPair(ids, ids, " 42", " 53")], tokenizer, len(tokenizer), ["p"])
    twice = [ids[0], *ids[:-1]]
    with pytest.warns(UserWarning, match="given as ids, begins with '<s>' twice"):
        encode_pairs([PromptPair(twice, twice, " 42", " 53")], tokenizer, len(tokenizer))


def test_a_text_of_special_tokens_alone_is_empty():
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}))  # others have no token at all
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(DeltapatchError, match="the clean prompt is empty"):
        encode_pairs([PromptPair(" ", " ", 2, 2)], tokenizer, 3)


def test_ids_beside_a_tokenizer_that_knows_few_words():
    """It fails at any other word, and ids do not need it; a text answer behind them does."""
    words = Tokenizer(models.WordLevel({"1": 0, "2": 1, "</s>": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    pair = encoded(tokenizer, [0, 1], [1, 1], 0, "2")
    assert (pair.clean_answer, pair.corrupted_answer) == ([0], [1])


def test_a_tokenizer_that_does_not_say_what_it_adds():
    class Careless:
        """Its mask is that of the text alone."""

        def __call__(self, text, **wanted):
            return {"input_ids": [1, *map(ord, text)], "special_tokens_mask": [0] * len(text)}

    with pytest.raises(DeltapatchError, match="it does not say which special tokens it adds"):
        encode_pairs([PromptPair("a", "b", "c", "d")], Careless(), 200)


def test_tokens_keep_the_space_that_belongs_to_them(kind):
    tokenizer = make(kind)
    ids = tokenise(tokenizer, "The: 42").ids
    assert pieces(tokenizer, ids) == ["<s>", " The", ":", " 42"]
    assert pieces(None, [3, 4]) == ["3", "4"]


def test_labels_of_made_pairs_name_the_same_tokens(kind, around):
    tokenizer = make(kind, around)
    ids, (city,) = token_spans(tokenizer, "The city is:", [(4, 8)])
    pair = encoded(tokenizer, "The city is:", "The city is:", " 42", " 53")
    assert ids == pair.clean
    assert [pair.clean_text[i].strip() for i in city] == ["city"]
    assert answer_ids(tokenizer, "The city is:", " 42") == pair.clean_answer


@pytest.mark.parametrize(("kind", "around"), [("unigram-always", "bos"), ("legacy", "bos-eos")])
def test_effects_of_ids_are_those_of_their_text(kind, around):
    """An end token behind the prompt, or a space of its own before an answer, would change every number."""
    tokenizer = make(kind, around)
    model = deltapatch.from_transformers(hf_model("llama"), tokenizer)
    ids = [[1, VOCAB.index("▁The"), VOCAB.index(number), VOCAB.index(":")] for number in ("▁12", "▁42")]
    given = [
        PromptPair(*ids, VOCAB.index("▁42"), VOCAB.index("▁53")),
        PromptPair(*ids, " 42", " 53"),
        PromptPair("The 12:", "The 42:", " 42", " 53"),
        PromptPair("<s>The 12:", "<s>The 42:", " 42", " 53"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = deltapatch.sweep(model, given, sites="mlp_out", progress=False).values("logit_diff")
    assert np.abs(found[0]).max() > 0
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
