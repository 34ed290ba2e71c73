"""Tokenizers that treat numbers as real ones do."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltapatch.tasks.expressions import SHAPES
from deltapatch.tasks.facts import CLOSED_FACTS, CLOSED_RELATIONS
from deltapatch.tasks.numbers import spell
from deltapatch.tasks.retrieval import ENTITIES, TEMPLATES
from deltapatch.tasks.templates import ALL_OPERATORS

_TEXTS = [
    *(t for o in ALL_OPERATORS.values() for t in o.templates),
    *(s.phrase for s in SHAPES),
    *TEMPLATES,
    *CLOSED_RELATIONS.values(),
    *(f"{subject} {answer}" for subject, _, answer in CLOSED_FACTS),
    *(spell(n).replace("-", " ") for n in range(200)),
    " ".join(ENTITIES),
    "yes no",
]
WORDS = sorted({w.strip("?:,.()") for t in _TEXTS for w in t.split() if "{" not in w and "[" not in w} - {""})


def byte_level(pieces: str, extra: list[str], bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, the templates' words with and without a space before them, and `extra`."""
    vocab: dict[str, int] = {"<s>": 0}
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *WORDS, *(f"Ġ{w}" for w in WORDS), *extra]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="session")
def gpt2_like() -> PreTrainedTokenizerFast:
    """As GPT-2: " 12" is one token; numbers above 120 are several."""
    numbers = [f"{space}{n}" for space in ("", "Ġ") for n in range(121)]
    return byte_level(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s", numbers)


@pytest.fixture(scope="session")
def llama3_like() -> PreTrainedTokenizerFast:
    """As LLaMA 3: " 12" is a space and "12"; a BOS."""
    return byte_level(r" ?[A-Za-z]+|[0-9]+| ?[^\sA-Za-z0-9]+|\s", [f"{n}" for n in range(1000)], bos=True)


@pytest.fixture(scope="session")
def llama_like() -> PreTrainedTokenizerFast:
    """As LLaMA: a space is put before the text, every digit is a token; a BOS."""
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "\n": 3}
    for piece in [
        *"0123456789?:+-*/=",
        *(f"▁{w}" for w in WORDS),
        *",.()^%<>",
        "A",
        "Q",
        "The",
        "I",
        "max",
        "min",
    ]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r"[0-9?:+*/=\n,.()^%<>-]"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")
