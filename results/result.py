"""What results of every kind have in common: prompts, their unpatched runs, a folder to be saved to."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from deltapatch.errors import path_of
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.folder import Record, write_run
from deltapatch.results.metrics import Direction, Reference


class Result(ABC):
    """What a run found. Kinds of results are dataclasses that have these fields, each in its place.

    Attributes:
        pairs: of prompts.
        reference: their unpatched runs.
        direction: of the run.
        meta: what was run.
    """

    pairs: list[EncodedPair]
    reference: Reference
    direction: Direction
    meta: dict[str, Any]
    # Of a run that kept nothing: hashes the model, should it be saved.
    _fingerprint: Callable[[], str | None] | None

    def __getstate__(self) -> dict[str, Any]:
        """Without what only this process can ask."""
        return self.__dict__ | {"_fingerprint": None}

    @property
    def answer_tokens(self) -> int:
        """How many tokens the longest answer has; effects are of the probability of all of them."""
        return max(pair.answer_tokens for pair in self.pairs)

    def accuracy(self) -> float:
        """Half clean runs right and half corrupted runs right, see `Reference`."""
        return self.reference.accuracy()

    def caveat(self) -> str | None:
        """What a reader has to know beside effects: that the model answers nothing right; None otherwise."""
        return self.reference.caveat()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a run folder, which `load_effects`, `load_edges` or `load_outcome` reads.

        Raises:
            DeltapatchError: the path is taken or cannot be written.
        """
        if self.meta.get("fingerprint") is None and self._fingerprint is not None:
            self.meta["fingerprint"] = self._fingerprint()
        write_run(self.record(), path_of(path, "a run folder"))

    @abstractmethod
    def record(self) -> Record:
        """What a run folder holds of it."""
