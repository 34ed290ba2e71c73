"""Sources: what a patched activation is replaced by, as (source - base) at every place of a layer.

Where what lines up in both prompts of a pair is at the same positions, its source run is carried as a
difference from the base run. Else it is run by itself, as base runs are, and differences are taken of what
lines up: the activations of tokens at different positions differ too much for that to cost any digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltapatch.engine.layout import PairShapes
from deltapatch.engine.question import Question
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.runs import NONE, any_targets, run_alike
from deltapatch.interventions.sources import Source, check_source
from deltapatch.kernels.device import upload
from deltapatch.models.forward import Activations


@dataclass(frozen=True)
class Prompts:
    """The prompts of a pass with what their answers add, packed: the tokens of one run after the other's.

    Attributes:
        tokens: [base token], the base prompts, and after them the source prompts that are run by themselves.
        sources: [n_sources, token of a base prompt], the prompts whose runs are carried as differences, and
            the same after them. The first is the pair's counterpart, or, of a pair whose source is run by
            itself, the base prompt again: no difference. The last is the one that patches take from.
        noise: [base token, d_model] or None, added to the embeddings of the base run.
        source_noise: the same for the source run.
        shapes: of the pairs' base runs, ordered by them.
        unpatched: of these and of the source prompts that are run by themselves.
        own: [token of a base prompt], the base token of a source's own run that lines up with it; NONE where
            there is none, or where nothing differs.
        own_read: [token of a base prompt], the same of tokens that are read: both runs are from the end of
            their prompts on, whatever lines up there.
        targets: [read, 2, token], the next tokens of the clean and the corrupted answer; see `any_targets`.
        kind: the source.
        pairs: the pairs themselves.
    """

    tokens: np.ndarray
    sources: np.ndarray
    noise: Tensor | None
    source_noise: Tensor | None
    shapes: PairShapes
    unpatched: PairShapes
    own: np.ndarray
    own_read: np.ndarray
    targets: np.ndarray
    kind: Source
    pairs: Sequence[EncodedPair] = ()

    @property
    def against_base(self) -> bool:
        """Whether differences are taken from activations of base runs, which are kept for that."""
        return self.kind in ("zero", "mean") or bool((self.own != NONE).any())

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
        at = np.concatenate([run.positions for run in self.unpatched.runs]) if with_positions else None
        positions = None if at is None else torch.from_numpy(at)
        x = look_up(torch.from_numpy(self.tokens), positions=positions)
        return x if self.noise is None else x + upload(self.noise.numpy(), x.device).to(x.dtype)

    def embed_source_difference(self, look_up: Callable[..., Tensor]) -> Tensor:
        """The source runs' embeddings minus the base's, [base token and source, d_model].

        Positions are the same in both. Equal tokens give exactly zero, and so does everything that only
        depends on them.
        """
        base = look_up(torch.from_numpy(self.tokens[: self.shapes.n_tokens]))
        source = look_up(torch.from_numpy(np.ascontiguousarray(self.sources.T)))
        d = source - base.unsqueeze(1)  # [base token, source, d_model]
        for noise, sign in ((self.source_noise, 1), (self.noise, -1)):
            if noise is not None:
                d += sign * upload(noise.numpy(), d.device).to(d.dtype).unsqueeze(1)
        return d.flatten(0, 1)

    def delta(self, base: Tensor, captured: Tensor) -> Tensor:
        """(source - base) at one place, [source token, ...], as `source_differences` gives it for all.

        After the prompts and where nothing lines up, where nothing is patched, it may be anything.
        """
        if self.kind == "zero":
            return -base
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
        token = np.flatnonzero(self.own != NONE)
        if not len(token):
            return captured
        out = captured.clone()
        to, of = (upload(at, base.device) for at in (token, self.own[token]))
        out[to * self.n_sources] = base[of] - base[to]
        return out

    def counterpart_change(self, token: np.ndarray, x: Tensor, dx: Tensor) -> Tensor:
        """What is different in the counterparts' runs after the last layer at some tokens, [n, d_model].

        Args:
            token: [n], base tokens that are read.
            x, dx: [base token, d_model] and [source token, d_model].
        """
        change = dx[upload(token * self.n_sources, dx.device)]
        mine = np.flatnonzero(self.own_read[token] != NONE)
        if len(mine):
            to, of = (upload(at, x.device) for at in (token[mine], self.own_read[token[mine]]))
            change[upload(mine, x.device)] = x[of] - x[to]
        return change


def source_differences(prompts: Prompts, base: Activations, captured: dict[str, Tensor]) -> dict[str, Tensor]:
    """(source - base) at every place of a layer.

    Args:
        prompts: which source, and the pairs.
        base: the base runs' activations in this layer.
        captured: place -> [base token and source, ...], the source runs' differences.

    Returns:
        place -> [source token, ...]; `Prompts.source_token` says which token is whose.
    """
    return {place: prompts.delta(getattr(base, place), d) for place, d in captured.items()}


def prompts_of(question: Question, numbers: Sequence[int]) -> Prompts:
    """The prompts of some pairs, cut at the position where effects are read, and what their answers add."""
    parts: list[list[list[int]]] = [[], [], []]  # base, counterpart, another pair's source
    alone: list[int] = []  # those whose source is run by itself
    beside: list[list[int]] = []  # these sources
    for i in numbers:
        (n, m), after = question.lengths[:, i].tolist(), question.continued[i].tokens
        base, other = question.roles.prompts(question.pairs[i])
        if question.runs[i].beside:
            alone.append(i)
            beside.append([*other[:m], *after])
            other = base
        parts[0].append([*base[:n], *after])
        parts[1].append([*other[:n], *after])
        if question.partner is not None:
            partner = question.pairs[int(question.partner[i])]
            parts[2].append([*question.roles.prompts(partner)[1][:n], *after])
    flat = [np.concatenate(p) for p in parts if p]
    noise = _noise(question, numbers) if question.options.source == "noise" else None
    in_base = question.options.direction == "denoise"
    runs = [question.runs[i]._replace(beside=0) for i in numbers]
    of_sources = [question.continued[i].shape(int(question.lengths[1, i])) for i in alone]
    unpatched = PairShapes([*runs, *of_sources])
    own, own_read = _own(question, numbers, unpatched)
    return Prompts(
        tokens=np.concatenate([flat[0], *beside]),
        sources=np.stack(flat[1:]),
        noise=noise if in_base else None,
        source_noise=None if in_base else noise,
        shapes=PairShapes(runs),
        unpatched=unpatched,
        own=own,
        own_read=own_read,
        targets=any_targets([question.continued[i] for i in numbers]),
        kind=check_source(question.options.source),
        pairs=[question.pairs[i] for i in numbers],
    )


def _own(question: Question, numbers: Sequence[int], shapes: PairShapes) -> tuple[np.ndarray, np.ndarray]:
    """`Prompts.own` and `own_read` of some pairs; `shapes` has their runs, and then the sources' own."""
    own, read = (np.full(int(shapes.length[: len(numbers)].sum()), NONE) for _ in range(2))
    of_source = iter(range(len(numbers), len(shapes.runs)))
    for number, i in enumerate(numbers):
        if not question.runs[i].beside:
            continue
        pair, other = question.pairs[i], next(of_source)
        base, source = shapes.runs[number], shapes.runs[other]
        at, of = int(shapes.base[number]), int(shapes.base[other])
        alike = run_alike(pair, (base.length, source.length), question.model.spec)
        for b, s in question.roles.mapped(pair):
            if b < base.prompt and s < source.prompt and (b != s or b >= alike):
                own[at + b] = of + s
        if not base.prompt == source.prompt <= alike:
            for k in range(base.reads):
                read[at + base.prompt - 1 + k] = of + source.prompt - 1 + k
    return own, read


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
