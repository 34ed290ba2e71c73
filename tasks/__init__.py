"""Prompt pairs: the paper's data sets and the files that users bring."""

from deltapatch.interventions.pairs_file import read_named_pairs, read_pairs, write_pairs
from deltapatch.tasks.answered import answered, keep_answered
from deltapatch.tasks.arithmetic import arithmetic_pairs
from deltapatch.tasks.factual import factual_pairs
from deltapatch.tasks.pairing import Dropped
from deltapatch.tasks.registry import TASKS, Task, find_task, make_pairs
from deltapatch.tasks.retrieval import retrieval_pairs
from deltapatch.tasks.three_operands import three_operand_pairs
from deltapatch.tasks.word_problems import word_problem_pairs

__all__ = [
    "TASKS",
    "Dropped",
    "Task",
    "answered",
    "arithmetic_pairs",
    "factual_pairs",
    "find_task",
    "keep_answered",
    "make_pairs",
    "read_named_pairs",
    "read_pairs",
    "retrieval_pairs",
    "three_operand_pairs",
    "word_problem_pairs",
    "write_pairs",
]
