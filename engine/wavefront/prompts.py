"""Sources: what a patched activation is replaced by, as (source - base) at every place of a layer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.question import Question
from deltapatch.engine.wavefront.layout import PairShapes
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.runs import RunShape, any_targets, run_alike
from deltapatch.interventions.sources import Source, check_source
from deltapatch.kernels.device import upload
from deltapatch.kernels.segments import Segment
from deltapatch.models.activations import Place
from deltapatch.models.forward import Activations

EMBEDDING: Place = ("resid_pre", 0)


@dataclass(frozen=True)
class Apart:
    """The prompts of a pair whose source is run by itself, as what lines up is at different positions.

    Attributes:
        tokens: of the base and of the source run, with what the answers add.
        shapes: of these runs.
        first: the base token at which the base run begins.
        lined_up: [n, (base, source)], the positions that line up, but those at which nothing can differ.
        same: whether nothing differs where the runs are read.
    """

    tokens: tuple[list[int], list[int]]
    shapes: tuple[RunShape, RunShape]
    first: int
    lined_up: np.ndarray
    same: bool

    @property
    def reads(self) -> np.ndarray:
        """[n, (base, source)], the positions that are read, whatever lines up there."""
        each = np.arange(0 if self.same else self.shapes[0].reads)
        return np.stack([shape.prompt - 1 + each for shape in self.shapes], 1)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a pass with what their answers add, packed: the tokens of one pair after the other's.

    Attributes:
        tokens: [base token], the base prompts.
        sources: [n_sources, base token], the prompts whose runs are carried as differences, and the same
            after them. The first is the pair's counterpart, or, of a pair whose source is run by itself, the
            base prompt again: no difference. The last is the one that patches take from.
        noise: [base token, d_model] or None, added to the embeddings of the base run.
        source_noise: the same for the source run.
        shapes: of the pairs' runs, ordered by them.
        targets: [read, 2, token], the next tokens of the clean and the corrupted answer; see `any_targets`.
        kind: the source.
        pairs: the pairs themselves.
        roles: of their prompts.
        apart: those whose source is run by itself (see own_runs.py).
        means: place -> [line, ...], of source "mean" over prompts that are not the pairs'.
        mean_line: [base token], the line that it takes; after the prompts any.
    """

    tokens: np.ndarray
    sources: np.ndarray
    noise: Tensor | None
    source_noise: Tensor | None
    shapes: PairShapes
    targets: np.ndarray
    kind: Source
    pairs: Sequence[EncodedPair] = ()
    roles: Roles = Roles()  # noqa: RUF009  (frozen)
    apart: Sequence[Apart] = ()
    means: Mapping[Place, Tensor] | None = None
    mean_line: np.ndarray | None = None

    def carries(self, segment: Segment) -> bool:
        """Whether the source run of any pair in a segment is carried as a difference; else all are zero."""
        here = range(segment.base, segment.base + segment.pairs * segment.length)
        return sum(pair.first in here for pair in self.apart) < segment.pairs

    @property
    def n_sources(self) -> int:
        """How many runs of each pair are carried beside the base run."""
        return len(self.sources)

    def source_token(self, base_token: np.ndarray) -> np.ndarray:
        """Where a base token's source stands in the arrays of `source_differences`."""
        if self.kind in ("zero", "mean"):
            return base_token
        return base_token * self.n_sources + (self.n_sources - 1)

    def embed(self, look_up: Callable[..., Tensor], *, with_positions: bool) -> Tensor:
        """The base runs' embeddings, [base token, d_model]; `look_up` gives those of token ids [...].

        With positions, what is learned for these is added.
        """
        at = np.concatenate([run.positions for run in self.shapes.runs]) if with_positions else None
        positions = None if at is None else torch.from_numpy(at)
        x = look_up(torch.from_numpy(self.tokens), positions=positions)
        return x if self.noise is None else x + upload(self.noise.numpy(), x.device).to(x.dtype)

    def embed_source_difference(self, look_up: Callable[..., Tensor]) -> Tensor:
        """The source runs' embeddings minus the base's, [base token and source, d_model].

        Positions are the same in both. Equal tokens give exactly zero, and so does everything that only
        depends on them.
        """
        base = look_up(torch.from_numpy(self.tokens))
        source = look_up(torch.from_numpy(np.ascontiguousarray(self.sources.T)))
        d = source - base.unsqueeze(1)  # [base token, source, d_model]
        for noise, sign in ((self.source_noise, 1), (self.noise, -1)):
            if noise is not None:
                d += sign * upload(noise.numpy(), d.device).to(d.dtype).unsqueeze(1)
        return d.flatten(0, 1)

    def delta(self, base: Tensor, captured: Tensor, at: Place) -> Tensor:
        """(source - base) at one place, [source token, ...], as `source_differences` gives it for all.

        After the prompts, where nothing is patched, it may be anything. Pairs whose source is run by itself
        have no difference here: `OwnRuns` has theirs.
        """
        if self.kind == "zero":
            return -base
        if self.means is not None:
            return self._from_means(base, at)
        if self.kind == "mean":
            out = torch.empty_like(base)
            for length in np.unique(self.shapes.prompt).tolist():
                alike = [s for s in self.shapes.segments(1) if s.length - s.reads + 1 == length]
                prompts = [s.run(base)[:, :length] for s in alike]  # [pair, position, ...]
                halves = [s.run(captured)[:, :length] / 2 for s in alike]
                mean = torch.cat([b + d for b, d in zip(prompts, halves, strict=True)]).mean(0, keepdim=True)
                for s, b in zip(alike, prompts, strict=True):
                    s.run(out)[:, :length] = mean - b
            return out
        return captured

    def _from_means(self, base: Tensor, at: Place) -> Tensor:
        """(mean - base) at one place, [base token, ...], the mean over prompts that are not the pairs'."""
        assert self.means is not None
        assert self.mean_line is not None
        mean = self.means[at].to(base)[upload(self.mean_line, base.device)]
        keys = min(mean.shape[-1], base.shape[-1])  # of a pattern those of the longest run of either
        out = torch.zeros_like(base)
        out[..., :keys] = mean[..., :keys] - base[..., :keys]
        return out


def source_differences(
    prompts: Prompts, base: Activations, captured: dict[str, Tensor], layer: int
) -> dict[str, Tensor]:
    """(source - base) at every place of a layer.

    Args:
        prompts: which source, and the pairs.
        base: the base runs' activations in this layer.
        captured: place -> [base token and source, ...], the source runs' differences.
        layer: its number.

    Returns:
        place -> [source token, ...]; `Prompts.source_token` says which token is whose.
    """
    return {place: prompts.delta(getattr(base, place), d, (place, layer)) for place, d in captured.items()}


def prompts_of(question: Question, numbers: Sequence[int]) -> Prompts:
    """The prompts of some pairs, cut at the position where effects are read, and what their answers add."""
    parts: list[list[list[int]]] = [[], [], []]  # base, counterpart, another pair's source
    mean_line: list[np.ndarray] = []
    apart: list[Apart] = []
    for i in numbers:
        (n, m), after = question.lengths[:, i].tolist(), question.continued[i].tokens
        base, other = question.roles.prompts(question.pairs[i])
        if question.runs[i].beside:
            own = [*base[:n], *after], [*other[:m], *after]
            apart.append(_apart(question, i, own, first=sum(map(len, parts[0]))))
            other = base
        parts[0].append([*base[:n], *after])
        parts[1].append([*other[:n], *after])
        if question.dataset is not None:
            mean_line += [question.dataset.lines[i], np.zeros(len(after), np.int64)]
        if question.partner is not None:
            partner = question.pairs[int(question.partner[i])]
            parts[2].append([*question.roles.prompts(partner)[1][:n], *after])
    flat = [np.concatenate(p) for p in parts if p]
    noise = _noise(question, numbers) if question.options.source == "noise" else None
    in_base = question.options.direction == "denoise"
    return Prompts(
        tokens=flat[0],
        sources=np.stack(flat[1:]),
        noise=noise if in_base else None,
        source_noise=None if in_base else noise,
        shapes=PairShapes([question.runs[i]._replace(beside=0) for i in numbers]),
        targets=any_targets([question.continued[i] for i in numbers]),
        kind=check_source(question.options.source),
        pairs=[question.pairs[i] for i in numbers],
        roles=question.roles,
        apart=apart,
        means=question.means,
        mean_line=np.concatenate(mean_line) if mean_line else None,
    )


def _apart(question: Question, number: int, tokens: tuple[list[int], list[int]], *, first: int) -> Apart:
    """A pair whose source is run by itself; its base run begins at `first`."""
    pair = question.pairs[number]
    base, source = (question.continued[number].shape(int(n)) for n in question.lengths[:, number])
    alike = run_alike(pair, (base.length, source.length), question.model.spec)
    lined_up = [
        (b, s)
        for b, s in question.roles.mapped(pair)
        if b < base.prompt and s < source.prompt and (b != s or b >= alike)
    ]
    same = base.prompt == source.prompt <= alike
    return Apart(tokens, (base, source), first, np.array(lined_up, np.int64).reshape(-1, 2), same)


def _noise(question: Question, numbers: Sequence[int]) -> Tensor:
    """[base token, d_model]; each pair has a seed of its own, so passes may be cut anywhere."""
    options, width = question.options, question.model.spec.d_model
    scale = options.noise_scale * question.embedding_std
    parts = []
    for i in numbers:
        n, pair = int(question.lengths[0, i]), question.pairs[i]
        drawn = np.random.default_rng((options.seed, i)).standard_normal((n, width)) * scale
        differs = np.array(pair.changed[:n])
        parts += [drawn * differs[:, None], np.zeros((len(question.continued[i].tokens), width))]
    return torch.from_numpy(np.concatenate(parts))
