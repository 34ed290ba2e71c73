"""The oracle of edges and circuits: a forward in which every receiver reads a stream of its own.

Each node's output is kept apart; what a receiver reads is added up anew from what each sender says in this
run, in the source run or in the unpatched base run, as a wiring tells it. It shares no code with deltapatch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from engine_oracle import (
    Pair,
    TrueModel,
    _activation,
    _attend,
    _linear,
    _rotate,
    both,
    continuations,
    counterparts,
    metrics_of_answers,
)

OWN, SOURCE, BASE = range(3)  # what of a sender an edge carries
Said = dict[str, np.ndarray]  # sender -> [T, ...]: the embedding, z of a head, mlp_out
Wiring = Mapping[tuple[str, str], Any]  # (sender, receiver) -> what it carries
REST = ("", "")  # in a wiring, all edges that it does not name; they carry OWN where it does not say


def senders(true: TrueModel) -> list[str]:
    heads, layers = true.shape.n_heads, true.n_layers
    return ["input", *(n for l in range(layers) for n in (*(f"a{l}.h{h}" for h in range(heads)), f"m{l}"))]


def receivers(true: TrueModel) -> list[str]:
    heads, layers = true.shape.n_heads, true.n_layers
    out = []
    for l in range(layers):
        out += [*(f"a{l}.h{h}<{r}>" for r in "qkv" for h in range(heads)), f"m{l}"]
    return [*out, "logits"]


def speaks_before(true: TrueModel, sender: str, receiver: str) -> bool:
    """Whether there is an edge."""
    if sender == "input" or receiver == "logits":
        return True
    from_layer, to_layer = (int(name[1:].split(".")[0]) for name in (sender, receiver))
    if from_layer == to_layer:
        return sender[0] == "a" and receiver[0] == "m" and not true.shape.parallel
    return from_layer < to_layer


@cache
def edges(true: TrueModel) -> list[tuple[str, str]]:
    return [(s, r) for r in receivers(true) for s in senders(true) if speaks_before(true, s, r)]


@cache
def unpatched(true: TrueModel, tokens: tuple[int, ...]) -> Said:
    """What every node says in a plain run."""
    _, said = forward(true, tokens, 1, {}, {}, {})
    return {name: value[0] for name, value in said.items()}


def forward(
    true: TrueModel, tokens: Sequence[int], n_rows: int, wiring: Wiring, source: Said, base: Said
) -> tuple[np.ndarray, Said]:
    """Logits [row, T, vocab] of a wired run, and what every node says in it, [row, T, ...].

    `wiring` has [row, T] for each edge that does not carry OWN everywhere.
    """
    shape = true.shape
    x = true.embedding[list(tokens)] * true.embedding.dtype.type(shape.embedding_scale)
    if true.positions is not None:
        x = x + true.positions[: len(tokens)]
    said: Said = {"input": np.repeat(x[None], n_rows, axis=0)}
    scale = x.dtype.type(shape.residual_scale)

    def carried(sender: str, receiver: str) -> np.ndarray:
        own = said[sender]
        kind = wiring.get((sender, receiver))
        if kind is None:
            return own
        kind = kind[..., None]
        out = np.where(kind == OWN, own, 0)
        for value, which in ((source, SOURCE), (base, BASE)):
            if (kind == which).any():
                out = np.where(kind == which, value[sender][None], out)
        return out

    def read(receiver: str, layer: int, middle: bool) -> np.ndarray:
        """The stream that a receiver reads: of the layers before it, and of the attention of its own."""
        total = carried("input", receiver)
        for l in range(layer + middle):
            w = true.blocks[l]
            z = np.concatenate([carried(f"a{l}.h{h}", receiver) for h in range(shape.n_heads)], -1)
            total = total + scale * true._normed(_linear(z, w.out), w.post1)
            if l < layer:
                total = total + carried(f"m{l}", receiver)
        return total

    group = shape.n_heads // shape.n_kv_heads
    for l, w in enumerate(true.blocks):
        how = true.attention(l)
        for h in range(shape.n_heads):
            q, k, v = (
                true._heads(_linear(true._normed(read(f"a{l}.h{h}<{r}>", l, False), w.norm1), part))
                for r, part in zip("qkv", (w.q, w.k, w.v), strict=True)
            )
            q, k = true._normed_heads(q, w.q_norm)[:, :, h : h + 1], true._normed_heads(k, w.k_norm)
            k, v = (t[:, :, h // group : h // group + 1] for t in (k, v))
            pattern = _attend(_rotate(q, shape.ropes[l]), _rotate(k, shape.ropes[l]), *how)
            said[f"a{l}.h{h}"] = np.einsum("rthi,rihd->rthd", pattern, v)[:, :, 0]
        norm = w.norm2 if w.norm2 is not None or not shape.parallel else w.norm1
        normed = true._normed(read(f"m{l}", l, not shape.parallel), norm)
        hidden = _linear(normed, w.up)
        if w.gate is None:
            post = _activation(shape.activation, hidden)
        else:
            post = _activation(shape.activation, _linear(normed, w.gate)) * hidden
        said[f"m{l}"] = scale * true._normed(_linear(post, w.down), w.post2)
    end = read("logits", true.n_layers, False)
    logits = _linear(true._normed(end, true.norm), true.unembedding) * x.dtype.type(shape.logit_scale)
    cap = shape.logit_cap
    return (logits if cap is None else cap * np.tanh(logits / cap)), said


def effects(
    true: TrueModel,
    pair: Pair,
    wirings: Sequence[Wiring],
    direction: str = "denoise",
    source: str = "counterpart",
    runs_of: Sequence[Sequence[int]] = (),
) -> dict[str, np.ndarray]:
    """Every metric of wired runs of one pair: name -> [row].

    Args:
        wirings: what each edge that is told carries: a number, or one for each position of the prompt.
        source: "counterpart", "zero", or "mean" over the runs of `runs_of`, prompts of one length.
    """
    prompt, other = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)

    def run(after: Sequence[int]) -> np.ndarray:
        """Logits [row, 1 + n, vocab] at the end of the prompt and at each of the tokens after it."""
        tokens = (*prompt, *after)
        own = unpatched(true, tokens)
        theirs = unpatched(true, (*other, *after))
        if pair.align is not None:  # at the places of the base run that they line up with
            theirs = {name: _lined_up(pair, value, own[name], direction) for name, value in theirs.items()}
        if source == "zero":
            theirs = {name: np.zeros_like(value) for name, value in theirs.items()}
        elif source == "mean":
            every = [unpatched(true, (*p, *after)) for p in runs_of]
            theirs = {name: np.mean([run[name] for run in every], axis=0) for name in theirs}
        elif runs_of:
            theirs = unpatched(true, (*runs_of[0], *after))
        together = _together(true, wirings, len(prompt), len(tokens))
        logits, _ = forward(true, tokens, len(wirings), together, theirs, own)
        return logits[:, len(prompt) - 1 :]

    runs = both(continuations(pair), run)
    clean, corrupted = (
        both(continuations(pair), lambda after, p=p: true.logits([*p, *after])[len(p) - 1 :])
        for p in (pair.clean, pair.corrupted)
    )
    base = corrupted if direction == "denoise" else clean
    return metrics_of_answers(base, runs, clean, corrupted, pair, direction)


def _together(true: TrueModel, wirings: Sequence[Wiring], n_prompt: int, n_tokens: int) -> Wiring:
    """What each edge carries in every row, [row, T]; what comes after the prompt is never patched."""
    rest = np.array([wiring.get(REST, OWN) for wiring in wirings])
    told = defaultdict(list)  # edge -> [(row, kind)]
    for row, wiring in enumerate(wirings):
        for edge, kind in wiring.items():
            told[edge].append((row, kind))
    out = {}
    for edge in edges(true) if rest.any() else told:
        out[edge] = kinds = np.repeat(rest[:, None], n_tokens, axis=1)
        for row, kind in told[edge]:
            kinds[row, :n_prompt] = kind
            kinds[row, n_prompt:] = BASE if np.all(kind == BASE) else OWN
    return out


def _lined_up(pair: Pair, theirs: np.ndarray, own: np.ndarray, direction: str) -> np.ndarray:
    """[position of the base run, ...], what the source run says where it lines up, and else the base run."""
    out = own.copy()
    for clean, corrupted in counterparts(pair).items():
        b, s = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
        out[b] = theirs[s]
    return out


def total(edge: tuple[str, str], kind: Any = SOURCE) -> Wiring:
    """The wiring of an edge whose receiver all else reacts to."""
    return {edge: kind}


def direct(edge: tuple[str, str], kind: Any = SOURCE) -> Wiring:
    """That of an edge whose receiver the logits alone hear."""
    node = edge[1].split("<")[0]
    frozen = {} if node == "logits" else {REST: BASE, (node, "logits"): OWN}
    return frozen | {edge: kind}
