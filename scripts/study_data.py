"""What the study models learn: the questions of every task, in kinds, with a tenth of the facts held out."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from deltapatch.tasks import arithmetic, factual, retrieval, three_operands
from deltapatch.tasks.expressions import SHAPES
from deltapatch.tasks.facts import CLOSED_FACTS, CLOSED_RELATIONS, Fact
from deltapatch.tasks.numbers import WRITINGS, NumberRange
from deltapatch.tasks.pairing import Question
from deltapatch.tasks.split import is_held_out
from deltapatch.tasks.templates import OPERATORS, facts

LISTED = range(3, 11)  # things in a list
TOLD = range(2, 6)  # things in a question about several
LARGEST_WORD = 99  # numbers in words go from one to ninety-nine
CHOICES = ("max", "min", ">", "<")

Split = tuple[list[Question], list[Question]]  # to learn, and held out


@dataclass
class Kind:
    """Questions of one task, operator (or shape, relation) and template: what exemplars have in common.

    Attributes:
        held: questions that are never learnt; none of a kind that can only be known by heart.
    """

    task: str
    name: str
    template: int
    seen: list[Question]
    held: list[Question] = field(default_factory=list)


def all_kinds(max_number: int, samples: int, seed: int = 0) -> list[Kind]:
    """Every kind of question of the study.

    Args:
        max_number: the largest operand and result in numerals.
        samples: how many questions there are of each kind that is not small enough to be listed.
    """
    numerals = numerals_to(max_number)
    words = words_to(max_number)
    return [
        *_two_operands("numerals", tuple(OPERATORS), range(6), numerals),
        *_two_operands("words", tuple(OPERATORS), range(5), words),
        *_two_operands("choices", CHOICES, range(6), numerals, samples, seed),
        # Of so many that they are not worth knowing by heart.
        *_retrieval("retrieval", numerals, 5 * samples, seed),
        *_retrieval("retrieval, words", words, 2 * samples, seed),
        *_three_operands(numerals, samples, seed),
        *_facts(),
    ]


def numerals_to(max_number: int) -> NumberRange:
    """Operands and results in numerals."""
    return NumberRange(max_number, max_number, "", split=False)


def words_to(max_number: int) -> NumberRange:
    """Operands and results in words."""
    largest = min(max_number, LARGEST_WORD)
    return NumberRange(largest, largest, "", split=True, write=WRITINGS["words"])


def _two_operands(
    task: str,
    symbols: Sequence[str],
    templates: range,
    known: NumberRange,
    most: int | None = None,
    seed: int = 0,
) -> Iterator[Kind]:
    for symbol in symbols:
        table = facts(symbol, known.operands, known.results)
        if most is not None and len(table) > most:
            table = random.Random(f"{seed} {task} {symbol}").sample(table, most)
        for template in templates:
            seen, held = [], []
            for fact in table:
                side = held if is_held_out(symbol, fact[0], fact[1]) else seen
                side.append(arithmetic.ask(symbol, template, fact, known))
            yield Kind(task, symbol, template, seen, held)


def _retrieval(task: str, known: NumberRange, samples: int, seed: int) -> Iterator[Kind]:
    usable = range(2, known.results + 1)
    for template in range(len(retrieval.TEMPLATES)):
        rng = random.Random(f"{seed} {task} {template}")
        seen, held = [], []
        for _ in range(samples):
            told = retrieval.draw(rng, usable, retrieval.ENTITIES)
            side = held if is_held_out("retrieval", *told.numbers) else seen
            side.append(retrieval.ask(told, rng.randrange(2), template, known))
        yield Kind(task, "retrieval", template, seen, held)


def _three_operands(known: NumberRange, samples: int, seed: int) -> Iterator[Kind]:
    for shape in SHAPES:
        rng = random.Random(f"{seed} {shape.name}")
        asked = {drawn[1]: drawn for drawn in three_operands.expressions(rng, shape, known, samples)}
        for template in (0, 1):
            seen, held = [], []
            for x, y, z in asked:
                side = held if is_held_out(f"{shape.name} {x}", y, z) else seen
                side.append(three_operands.ask(asked[x, y, z], template, known))
            yield Kind("three operands", shape.name, template, seen, held)


def _facts() -> Iterator[Kind]:
    for relation, template in CLOSED_RELATIONS.items():
        known = [Fact(s, r, o, template) for s, r, o in CLOSED_FACTS if r == relation]
        yield Kind("facts", relation, 0, [factual.ask(fact) for fact in known])


def words_of(kinds: Sequence[Kind]) -> list[str]:
    """Texts that have every word of the questions."""
    numbers = [f" {WRITINGS['words'](n)}" for n in range(1, LARGEST_WORD + 1)]
    things = [f" {thing}" for thing in retrieval.ENTITIES]
    return [*(q.solved for kind in kinds for q in kind.seen[:50]), *numbers, *things]


class Pool:
    """The solved questions of one side of a kind, as one array of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> None:
        solved = tokenizer([q.solved for q in questions], add_special_tokens=False)["input_ids"]
        # Pieces are tokenised by themselves, so an answer has the same tokens alone.
        endings = list({q.answer for q in questions})
        alone = tokenizer([f" {a}\n" for a in endings], add_special_tokens=False)["input_ids"]
        size = {a: len(ids) for a, ids in zip(endings, alone, strict=True)}
        self.start = np.cumsum([0, *map(len, solved)])  # [question + 1]
        self.answer = self.start[1:] - np.array([size[q.answer] for q in questions])  # [question]
        self.tokens = np.array([t for ids in solved for t in ids], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.answer)

    def prompt(self, chosen: np.ndarray, bos: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Some questions one after another: the tokens, and whether each is part of an answer or ends one."""
        parts = [np.array(bos, dtype=np.int64)]
        wanted = [np.zeros(len(bos), dtype=bool)]
        for i in chosen.tolist():
            a, b = self.start[i], self.start[i + 1]
            parts.append(self.tokens[a:b])
            wanted.append(np.arange(a, b) >= self.answer[i])
        return np.concatenate(parts), np.concatenate(wanted)


class Lists:
    """Lists to recall from, with every number asked for, in three forms.

    In number retrieval a number goes to the thing beside it, the question's thing finds its twin, and the
    end finds the question. The three steps only help together, so a model that sees only questions of two
    numbers keeps to one of the two. Each form here needs one step more:

    - the list once more, all of it asked for: " 28 apples, 11 eggs: 28 apples 11 eggs";
    - its things in any order: " 28 apples, 11 eggs: eggs 11 apples 28 eggs 11", or with some words between:
      " 28 apples, 11 eggs: eggs is 11 apples is 28 eggs is 11";
    - in the words of number retrieval: "Q: I have 28 apples and 11 eggs. How many eggs do I have? A: 11. How
      many apples do I have? A: 28".

    Args:
        tokenizer: of the model.
        known: the numbers.
        n: lists.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, known: NumberRange, n: int, seed: int = 0) -> None:
        rng = random.Random(f"{seed} lists")
        drawn = [_list(rng, known) for _ in range(n)]
        # Pieces are tokenised by themselves, so a line has the tokens of its pieces.
        flat = list(dict.fromkeys(text for line in drawn for text, _ in line))
        ids = dict(zip(flat, tokenizer(flat, add_special_tokens=False)["input_ids"], strict=True))
        self.lines = [
            (
                np.array([token for text, _ in line for token in ids[text]], dtype=np.int64),
                np.array([wanted for text, wanted in line for _ in ids[text]]),
            )
            for line in drawn
        ]

    def __len__(self) -> int:
        return len(self.lines)

    def prompt(self, chosen: np.ndarray, bos: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """One line, the first that is chosen: the tokens, and whether each is part of an answer.

        An earlier line would have answers to the same things.
        """
        tokens, wanted = self.lines[int(chosen[0])]
        return np.concatenate([np.array(bos, dtype=np.int64), tokens]), np.concatenate(
            [np.zeros(len(bos), dtype=bool), wanted]
        )


def _list(rng: random.Random, known: NumberRange) -> list[tuple[str, bool]]:
    """One line of `Lists`: its pieces, and whether each is asked for."""
    form = rng.choices(("again", "things", "questions"), (0.45, 0.4, 0.15))[0]
    size = rng.choice(TOLD if form == "questions" else LISTED)
    things = rng.sample(retrieval.ENTITIES, size)
    numbers = [known.write(x) for x in rng.sample(range(2, known.results + 1), size)]
    told = [f" {number} {thing}" for number, thing in zip(numbers, things, strict=True)]
    asked = [rng.randrange(size) for _ in range(size)]
    before, after = rng.choice(retrieval.TEMPLATES).split(" {number1} {entity1} and {number2} {entity2}")
    if form == "questions":
        line = [(before + " and".join(told), False)]
        for i in asked:
            line += [(after.format(entity=things[i]), False), (f" {numbers[i]}", True)]
        return line
    line = [(",".join(told) + ":", False)]
    if form == "again":
        for i in range(size):  # the first number could be any
            line += [(f" {numbers[i]}", i > 0), (f" {things[i]}", True)]
        return line
    between = rng.choice(("", "", ":", "? A:", after.split("{entity}")[1]))
    for i in asked:
        line += [(f" {things[i]}{between}", False), (f" {numbers[i]}", True)]
    return line


Batch = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # tokens [prompt, T], where to read [2, n], targets [n]


def collate(prompts: Sequence[tuple[np.ndarray, np.ndarray]], context: int) -> Batch:
    """Prompts side by side, padded at the end, where causal attention lets nobody see it."""
    longest = min(context, max(len(tokens) for tokens, _ in prompts))
    tokens = np.zeros((len(prompts), longest), dtype=np.int64)
    wanted = np.zeros((len(prompts), longest), dtype=bool)
    for row, (ids, read) in enumerate(prompts):
        tokens[row, : len(ids)] = ids[:longest]
        wanted[row, : len(ids)] = read[:longest]
    rows, columns = np.nonzero(wanted)
    targets = tokens[rows, columns]
    # The token before predicts.
    return (
        torch.from_numpy(tokens),
        torch.from_numpy(np.stack([rows, columns - 1])),
        torch.from_numpy(targets),
    )


def batches(
    pools: Sequence[Pool | Lists],
    weights: np.ndarray,
    bos: list[int],
    size: int,
    shots: Sequence[float],
    context: int,
    seed: int,
    ahead: int = 16,
) -> Iterator[Batch]:
    """Without end: batches of about `size` tokens, of prompts of about one length.

    Args:
        weights: [pool], how often a prompt is of it.
        shots: how often a prompt has 0, 1, ... exemplars; as many as the context has room for.
        ahead: from how many batches' prompts those of one length are put together.
    """
    rng = np.random.default_rng(seed)
    while True:
        prompts: list[tuple[np.ndarray, np.ndarray]] = []
        total = 0
        while total < ahead * size:
            pool = pools[int(rng.choice(len(pools), p=weights))]
            questions = 1 + int(rng.choice(len(shots), p=shots))
            ids, read = pool.prompt(rng.integers(len(pool), size=questions), bos)
            if len(ids) <= context:
                prompts.append((ids, read))
                total += len(ids)
        prompts.sort(key=lambda prompt: len(prompt[0]))
        cut = (np.cumsum([len(ids) for ids, _ in prompts]) - 1) * ahead // total
        for n in rng.permutation(ahead).tolist():
            part = [prompts[i] for i in np.flatnonzero(cut == n)]
            if part:
                yield collate(part, context)
