"""Fixtures shared by all tests: one thread; and effects that no model had to make."""

from collections.abc import Callable

import numpy as np
import pytest

from deltapatch.engine.wavefront.pool import threads
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.results.effects import Effects, SiteEffects
from deltapatch.results.metrics import MEASURED, Reference

WORDS = ("Q:", " What", " is", " 3", " plus", " 4", "?", " A:")


def _pair(rng: np.random.Generator, length: int, labels: bool) -> EncodedPair:
    x, y, z = rng.integers(1, 100, 3)
    words = [" and"] * (length - len(WORDS)) + list(WORDS)
    at = words.index(" plus")
    clean, corrupted = list(words), list(words)
    clean[at - 1], clean[at + 1], corrupted[at - 1], corrupted[at + 1] = f" {x}", f" {y}", f" {z}", f" {y}"
    ids = [int(i) for i in rng.integers(0, 200, length)]
    return EncodedPair(
        clean=ids,
        corrupted=[*ids[: at - 1], 200, *ids[at:]],
        clean_answer=[5],
        corrupted_answer=[6],
        clean_text=clean,
        corrupted_text=corrupted,
        clean_answer_text=f" {x + y}",
        corrupted_answer_text=f" {z + y}",
        labels={"op1": at - 1, "operator": at, "op2": at + 1, "last": length - 1} if labels else {},
        meta={"template": 1},
    )


def _site(
    rng: np.random.Generator,
    name: str,
    pairs: list[EncodedPair],
    n_layers: int,
    positions: list,
    n_index: int,
) -> SiteEffects:
    shape = (len(pairs), n_layers, len(positions)) + ((n_index,) if n_index else ())
    measured = {m: rng.normal(size=shape).astype(np.float32) for m in MEASURED}
    measured["kl"] = np.abs(measured["kl"])
    for flag in ("flip", "says_clean", "says_corrupted"):
        measured[flag] = (measured[flag] > 1).astype(np.float32)
    for i, pair in enumerate(pairs):
        for j, position in enumerate(positions):
            if pair.resolve(position) is None:
                for array in measured.values():
                    array[i, :, j] = np.nan
    return SiteEffects(name, np.arange(n_layers), positions, measured)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny products are slower on several threads; and the tests have a process for each core."""
    with threads(1):
        yield


@pytest.fixture
def make_effects() -> Callable[..., Effects]:
    """Builds random effects of the sites mlp_out, attn_out, mlp_post (16 neurons) and z (4 heads)."""

    def make(
        lengths: tuple[int, ...] = (8,) * 5, n_layers: int = 3, labels: bool = True, seed: int = 0
    ) -> Effects:
        rng = np.random.default_rng(seed)
        pairs = [_pair(rng, length, labels) for length in lengths]
        everywhere = list(range(max(lengths)))
        plan = {
            "mlp_out": (everywhere, 0),
            "attn_out": (everywhere, 0),
            "mlp_post": ([-1], 16),
            "z": ([-1], 4),
        }
        sites = {name: _site(rng, name, pairs, n_layers, *rest) for name, rest in plan.items()}
        n = len(pairs)
        logit = rng.normal(size=(n, 2, 2)) + 5 * np.eye(2)
        says = np.broadcast_to(np.eye(2, dtype=bool), (n, 2, 2)).copy()
        reference = Reference(logit, logit - 9, np.array([[5, 6]] * n), says)
        meta = {"model": "made-up", "precision": "fp32", "backend": "cpu"}
        return Effects(sites, pairs, reference, "denoise", meta)

    return make
