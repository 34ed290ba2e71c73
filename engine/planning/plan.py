"""The plan of a sweep before it runs: rows, passes, FLOPs and memory, from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltapatch.engine.passes import memory_costs, work_limit
from deltapatch.engine.planning.planner import Used, cut_rows
from deltapatch.engine.question import Question
from deltapatch.kernels.product import Precision


@dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Attributes:
        pairs, rows: prompt pairs and interventions.
        answer_tokens: of the longest answer.
        flops: the necessary ones (planning/costs.py).
        passes: what each holds.
        entering: [1 + layer], row tokens that enter at the embedding and in each layer, over all passes.
        budget: bytes that a pass may take.
        memory: bytes: `model`, its weights, which are not in memory as a whole where it is streamed; `rows`,
            of the largest pass; `pass`, the whole of it; `results`; `peak`, what the process takes at most:
            weights in a mapped file, which the system drops where it needs room, are not in it.
    """

    pairs: int
    answer_tokens: int
    rows: int
    flops: int
    passes: list[Used]
    entering: np.ndarray
    budget: int
    memory: Mapping[str, int]

    @property
    def in_flight(self) -> np.ndarray:
        """[layer], row tokens that pass through each."""
        return np.cumsum(self.entering)[:-1]

    def as_dict(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "pairs": self.pairs,
            "answer_tokens": self.answer_tokens,
            "rows": self.rows,
            "passes": len(self.passes),
            "necessary_flops": self.flops,
            "memory_budget": self.budget,
            "memory_bytes": dict(self.memory),
        }


def plan(question: Question, precision: Precision, threads: int) -> Plan:
    """The plan of a question.

    Args:
        precision: that it is expected to take.
        threads: how many blocks are worked on at once.

    Raises:
        DeltapatchError: the memory budget has no room for one intervention.
    """
    decided, model = question.decided(precision), question.model
    costs = memory_costs(question, decided, threads)
    sizes = question.interventions.row_sizes
    rows_of = ((i, *sizes(i, question.pairs[i], question.runs[i])) for i in question.order)
    share, limit = question.shares_means, work_limit(question, threads)
    cuts = cut_rows(rows_of, question.runs, costs, decided.memory_budget, share, limit, decided.stream)
    passes = [used for _, used in cuts]
    largest = max(used.bytes(costs) for used in passes)
    return Plan(
        len(question.pairs),
        max(pair.answer_tokens for pair in question.pairs),
        question.n_rows,
        question.flops,
        passes,
        question.entering,
        decided.memory_budget,
        {
            "model": model.n_bytes,
            "rows": max(used.row_tokens * costs.row_token + used.row_reads * costs.row for used in passes),
            "pass": largest,
            "results": question.interventions.n_effects * len(question.measured) * precision.base.itemsize,
            "peak": largest + model.resident_bytes,
        },
    )
