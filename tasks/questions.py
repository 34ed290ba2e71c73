"""Questions: a text that ends where its answer begins, and where in it the named pieces stand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Span = tuple[int, int]  # [start, end) in characters

_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        text: without the answer and without a space at its end.
        answer: without a space at its beginning.
        spans: label -> where that piece stands in the text.
    """

    text: str
    answer: str
    spans: dict[str, Span]

    @property
    def solved(self) -> str:
        """The question with its answer on a line of its own, as an exemplar shows it."""
        return f"{self.text} {self.answer}\n"


def fill(template: str, pieces: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """Put the pieces where the template names them, as in ``{op1} plus {op2}``, and say where they stand.

    A piece that is named twice is marked where it stands last. Other braces stay as they are.
    """
    text, spans, end = "", {}, 0
    for hole in _HOLE.finditer(template):
        name = hole[1]
        if name not in pieces:
            continue
        text += template[end : hole.start()]
        spans[name] = (len(text), len(text) + len(pieces[name]))
        text += pieces[name]
        end = hole.end()
    return text + template[end:], spans


def holes(template: str) -> list[str]:
    """The names in a template, each once, in the order in which they stand."""
    return list(dict.fromkeys(_HOLE.findall(template)))
