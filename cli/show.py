"""What `deltapatch pairs --show FILE --model M` prints: tokens with their positions, labels and answers."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from deltapatch.interventions.pairs import EncodedPair, PromptPair
from deltapatch.interventions.tokens import around, pieces

_WIDTH = 80
_TOKEN = 22  # columns of a token at most


def shown_pairs(
    pairs: Sequence[PromptPair], names: Sequence[str], encoded: Sequence[EncodedPair], tokenizer: Any
) -> list[dict[str, Any]]:
    """One object a pair, for programs.

    Args:
        pairs, names: as they are in the file.
        encoded: the same, in tokens.
        tokenizer: of the model, or None.
    """
    front = [] if tokenizer is None else around(tokenizer).front
    out = []
    for pair, name, own in zip(pairs, names, encoded, strict=True):
        length = len(own.clean)
        tokens = [
            {
                "position": at,
                "from_end": at - length,
                "clean": own.clean_text[at],
                "clean_id": own.clean[at],
                "corrupted": own.corrupted_text[at],
                "corrupted_id": own.corrupted[at],
                "labels": [label for label, place in own.labels.items() if place == at],
            }
            for at in range(length)
        ]
        found: dict[str, Any] = {"pair": name, "length": length, "tokens": tokens}
        for which in ("clean_answer", "corrupted_answer"):
            ids = getattr(own, which)
            found[which] = {"tokens": pieces(tokenizer, ids), "ids": ids}
            others = getattr(own, which.replace("_answer", "_others"))
            if others:
                found[which] |= {"or_tokens": pieces(tokenizer, others), "or_ids": others}
        bare = front and any(
            _is_ids(given) and ids[: len(front)] != front
            for given, ids in ((pair.clean, own.clean), (pair.corrupted, own.corrupted))
        )
        found["missing_front"] = "".join(pieces(tokenizer, front)) if bare else None
        out.append(found)
    return out


def as_text(found: Sequence[dict[str, Any]]) -> str:
    """The same for people: a table a pair, in 80 columns."""
    return "\n".join(_pair(one) for one in found)


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and not any(isinstance(part, dict) for part in prompt)


def _pair(found: dict[str, Any]) -> str:
    rows: list[tuple[str, str, str, str, list[str]]] = [("position", "", "clean", "corrupted", ["labels"])]
    for token in found["tokens"]:
        differs = token["corrupted_id"] != token["clean_id"]
        other = _token(token["corrupted"]) if differs else ""
        where = (str(token["position"]), str(token["from_end"]))
        rows.append((*where, _token(token["clean"]), other, token["labels"]))
    clean, corrupted = max(len(row[2]) for row in rows), max(len(row[3]) for row in rows)
    lines = [f"{found['pair']}: {found['length']} tokens"]
    if found["missing_front"] is not None:
        own = repr(found["missing_front"])
        lines.append(f"given as ids without {own}, which the tokenizer puts at the front")
    for place, from_end, first, second, labels in rows:
        left = f"{place:>8} {from_end:>6}  {first:<{clean}}  {second:<{corrupted}}  "
        folded = wrap(", ".join(labels), max(12, _WIDTH - len(left))) or [""]
        lines += [f"{left}{folded[0]}".rstrip(), *(" " * len(left) + more for more in folded[1:])]
    for which in ("clean_answer", "corrupted_answer"):
        tokens, head = found[which]["tokens"], f"{which.replace('_', ' '):<18}"
        text = " ".join(repr(token) for token in tokens)
        text = " or ".join([text, *(repr(token) for token in found[which].get("or_tokens", []))])
        lines += wrap(head + text, _WIDTH, subsequent_indent=" " * len(head), drop_whitespace=False)
    return "\n".join(lines) + "\n"


def _token(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _TOKEN else f"{shown[: _TOKEN - 3]}..."
