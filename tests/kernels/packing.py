"""Random packings of rows and swaps, where each of their tokens lies, and how far two arrays are apart."""

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from deltapatch.kernels.edits import Swap
from deltapatch.kernels.product import PRECISIONS
from deltapatch.kernels.segments import Segment

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
wide = np.longdouble  # two evaluations subtracted: float64 would lose the digits that are tested


class Token(NamedTuple):
    at: int  # in the packed array
    base: int  # its base token
    row: int  # rows are counted in the order of the segments
    pair: int
    position: int
    read: int  # where it lies once only what is read out is kept; -1 for the others


class Packing(NamedTuple):
    """Segments, and by the definition of a segment where each token lies."""

    segments: list[Segment]
    tokens: list[Token]
    prompts: list[slice]  # [pair], the base tokens of its run
    first_pairs: list[int]  # [segment]

    @property
    def n_base(self):
        return self.prompts[-1].stop

    @property
    def n_rows(self):
        return max(t.row for t in self.tokens) + 1

    @property
    def n_reads(self):
        return max(t.read for t in self.tokens) + 1

    def rows(self):
        """The tokens of each row, in order of position."""
        out = [[] for _ in range(self.n_rows)]
        for token in self.tokens:
            out[token.row].append(token)
        return out


def pack(groups, cuts):
    """Runs in groups of (length, pairs) or (length, pairs, reads, fork).

    Segments are (group, first pair, pairs, positions, rows).
    """
    prompts, firsts = [], []
    for length, pairs, *_ in groups:
        firsts.append(len(prompts))
        for _ in range(pairs):
            start = prompts[-1].stop if prompts else 0
            prompts.append(slice(start, start + length))
    segments, tokens, first_pairs, row, kept = [], [], [], 0, 0
    for group, first, pairs, positions, rows in cuts:
        length, first = groups[group][0], firsts[group] + first
        reads, fork = groups[group][2:] or (1, None)
        segments.append(
            Segment(len(tokens), pairs, positions, rows, prompts[first].start, length, reads, fork)
        )
        first_pairs.append(first)
        for i in range(pairs):
            for t in range(length - positions, length):
                base, is_read = prompts[first + i].start + t, t >= length - reads
                tokens += [
                    Token(
                        len(tokens) + r, base, row + i * rows + r, first + i, t, kept + r if is_read else -1
                    )
                    for r in range(rows)
                ]
                kept += rows if is_read else 0
        row += pairs * rows
    return Packing(segments, tokens, prompts, first_pairs)


@st.composite
def packings(draw, one_position=False):
    """Up to three groups of runs, with and without a fork, and up to two segments in each."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3))
    groups = []
    for length, pairs in sizes:
        reads = 1 if one_position else draw(st.sampled_from([1, 1, min(2, length), max(1, length - 1)]))
        fork = None
        if length > 2 and draw(st.booleans()):
            first = draw(st.integers(1, length - 2))
            fork = first, draw(st.integers(first + 1, length - 1))
        groups.append((length, pairs, reads, fork))
    cuts = []
    for group, (length, pairs, reads, _) in enumerate(groups):
        for _ in range(draw(st.integers(1, 2))):
            first = draw(st.integers(0, pairs - 1))
            n = draw(st.integers(1, pairs - first))
            positions = 1 if one_position else draw(st.integers(reads, length))
            cuts.append((group, first, n, positions, draw(st.integers(1, 4))))
    return pack(groups, cuts)


seeds = st.integers(0, 2**32 - 1)


def here(tensor):
    """A tensor on the device that is tested."""
    return tensor.to(torch.get_default_device())


def generator_of(seed):
    """Numbers are drawn on the CPU, the same for every device."""
    return torch.Generator("cpu").manual_seed(seed)


def drawer(seed, dtype):
    """A function that draws normal numbers of a shape."""
    generator = generator_of(seed)

    def draw(*shape, scale=1.0):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        return here(drawn.mul_(scale).to(dtype))

    return draw


def random_swaps(seed, dtype, n_tokens, width, kinds):
    """A swap for each of `kinds`: whole vectors (True) or coordinates, of some tokens, with two deltas."""
    draw, rng = drawer(seed, dtype), generator_of(seed)
    deltas = draw(4, width), draw(5, width, scale=1e-3)
    out = []
    for i, whole in enumerate(kinds):
        cells = torch.randperm(n_tokens if whole else n_tokens * width, generator=rng, device="cpu")
        cells = here(cells[: int(torch.randint(len(cells) + 1, (), generator=rng, device="cpu"))])
        source = here(torch.randint(4, (len(cells),), generator=rng, device="cpu"))
        token, at = (cells, None) if whole else (cells // width, cells % width)
        out.append(Swap(token, source, at, deltas[i % 2]))
    return out


def head_swaps(seed, dtype, n_tokens, heads, width, kinds):
    """Swaps of single heads of some tokens, as many as there are `kinds`."""
    out = []
    for swap in random_swaps(seed, dtype, n_tokens, heads, [False for _ in kinds]):
        delta = drawer(seed + len(out), dtype)(5, heads, width)
        out.append(Swap(swap.token, swap.source, swap.at, delta))
    return out


def swap_one_by_one(d, swaps):
    """The swaps written into [token, width], patch after patch in their order."""
    for swap in swaps:
        token, source, at, delta = swap.token, swap.source, swap.at, swap.delta
        values = exact(delta)
        for i, (t, s) in enumerate(zip(token.tolist(), source.tolist(), strict=True)):
            where = slice(None) if at is None else int(at[i])
            d[t, where] = values[s, where]


def exact(tensor):
    """A tensor in 80 bits."""
    return tensor.detach().double().cpu().numpy().astype(wide)


def distance(got, want):
    """Norm of the error over the norm of what is right; NaN where anything is."""
    want = np.asarray(want)
    assert got.shape == want.shape
    scale = np.linalg.norm(want)
    return float(np.linalg.norm(exact(got) - want) / (scale if scale else 1))


def is_rounded(narrowed, precision):
    """Whether a narrowed operand has only digits that its precision holds, whatever it is kept in."""
    values = narrowed.values
    if precision == "tf32":
        return not (values.view(torch.int32) & 0x1FFF).any()  # float32 has 13 digits more
    return torch.equal(values.to(PRECISIONS[precision].operand).to(values.dtype), values)
