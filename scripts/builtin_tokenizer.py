"""The tokenizer of the built-in models."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltapatch.tasks.templates import OPERATORS

CONTEXT = 64  # the longest prompt has three 14-token questions
PIECES = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s"  # a word, a number or a sign with the space before it
DIGITS = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s"  # every digit by itself, and the space before a number too


def build_tokenizer(
    max_number: int, bos: bool, texts: Iterable[str] = (), digits: bool = False, context: int = CONTEXT
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which numbers up to `max_number` and the templates' words are single tokens.

    Both " 12" and "12" are tokens, as in GPT-2; with `digits` every digit is one instead, as in LLaMA. The
    words of `texts` are tokens too, in the order in which they come. Everything else falls back to bytes, so
    any text can be encoded and decodes to itself.
    """
    pieces = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS if digits else PIECES), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    vocab = {"<|endoftext|>": 0}
    words = [w for op in OPERATORS.values() for t in op.templates for w, _ in pieces.pre_tokenize_str(t)]
    words = [w for w in words if "{" not in w and "}" not in w and not w.isdigit() and w not in ("x", "y")]
    seen = (w for text in texts for w, _ in pieces.pre_tokenize_str(text))
    words += [w for w in dict.fromkeys(seen) if not w.strip("Ġ").isdigit()]
    max_number = -1 if digits else max_number
    spaced = [f"Ġ{n}" for n in range(max_number + 1)]
    bare = [f"{n}" for n in range(max_number + 1)]
    for piece in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *spaced, *bare]:
        vocab.setdefault(piece, len(vocab))
    # ignore_merges: a piece that is in the vocabulary is one token; with no merges, any other is its bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
