"""What `deltapatch pairs --show FILE --model M` prints: tokens with their positions, labels and answers."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from deltapatch.interventions.alignment import Column
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
        found: dict[str, Any] = {
            "pair": name,
            "length": len(own.clean),
            "corrupted_length": len(own.corrupted),
            "tokens": [_column(own, column) for column in own.columns],
        }
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


def _column(pair: EncodedPair, column: Column) -> dict[str, Any]:
    """What stands side by side of a pair's prompts; None for what has no counterpart in one of them."""
    at, there = column
    return {
        "position": at,
        "from_end": None if at is None else at - len(pair.clean),
        "clean": None if at is None else pair.clean_text[at],
        "clean_id": None if at is None else pair.clean[at],
        "corrupted_position": there,
        "corrupted": None if there is None else pair.corrupted_text[there],
        "corrupted_id": None if there is None else pair.corrupted[there],
        "labels": [label for label, place in pair.labels.items() if place == at],
    }


def as_text(found: Sequence[dict[str, Any]]) -> str:
    """The same for people: a table a pair, in 80 columns."""
    return "\n".join(_pair(one) for one in found)


def _is_ids(prompt: Any) -> bool:
    return not isinstance(prompt, str) and not any(isinstance(part, dict) for part in prompt)


def _pair(found: dict[str, Any]) -> str:
    # Where all lines up, positions are told once, and so are tokens that are the same in both prompts.
    in_line = all(token["position"] == token["corrupted_position"] for token in found["tokens"])
    rows = [("position", "", "clean", "" if in_line else "at", "corrupted", ["labels"])]
    for token in found["tokens"]:
        differs = not in_line or token["corrupted_id"] != token["clean_id"]
        other = _token(token["corrupted"]) if differs else ""
        there = "" if in_line else _number(token["corrupted_position"])
        own = (_number(token["position"]), _number(token["from_end"]), _token(token["clean"]))
        rows.append((*own, there, other, token["labels"]))
    clean, at, corrupted = (max(len(row[i]) for row in rows) for i in (2, 3, 4))
    sizes = (found["length"],) if in_line else (found["length"], found["corrupted_length"])
    lines = [f"{found['pair']}: {' and '.join(map(str, sizes))} tokens"]
    if found["missing_front"] is not None:
        lines.append(
            f"given as ids without {found['missing_front']!r}, which the tokenizer puts at the front"
        )
    for place, from_end, first, there, second, labels in rows:
        middle = f"{there:>{at}} " if at else ""
        left = f"{place:>8} {from_end:>6}  {first:<{clean}}  {middle}{second:<{corrupted}}  "
        folded = wrap(", ".join(labels), max(12, _WIDTH - len(left))) or [""]
        lines += [f"{left}{folded[0]}".rstrip(), *(" " * len(left) + more for more in folded[1:])]
    for which in ("clean_answer", "corrupted_answer"):
        tokens, head = found[which]["tokens"], f"{which.replace('_', ' '):<18}"
        text = " ".join(repr(token) for token in tokens)
        text = " or ".join([text, *(repr(token) for token in found[which].get("or_tokens", []))])
        lines += wrap(head + text, _WIDTH, subsequent_indent=" " * len(head), drop_whitespace=False)
    return "\n".join(lines) + "\n"


def _number(at: int | None) -> str:
    return "" if at is None else str(at)


def _token(text: str | None) -> str:
    if text is None:
        return ""
    shown = repr(text)
    return shown if len(shown) <= _TOKEN else f"{shown[: _TOKEN - 3]}..."
