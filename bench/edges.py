"""The speed of all edges of GPT-2 small's shape, beside plain batched forwards, one patched edge a row.

    python -m deltapatch.bench.edges --out bench/results/edges_gpt2_cpu.json

The model has random weights; one pair of prompts, which differ from a position on. The others run
transformers' own matrices and PyTorch's attention, in float32, with the logits of the last position only:

    full      whole forwards of the patched prompts in a batch
    layer     the same from the receiver's layer on, the base run's hidden states before it kept
    prefix    the same, and of the prompt only what comes after the first token that differs; keys and values
              before it kept: about the work that deltapatch does
    two-runs  EAP-IG's way: two forwards for every edge, with the logits of all positions

What each edge's query, key or value becomes is prepared once for all and not timed. Of each a few batches
are timed in every layer, at the best of some batch sizes, and the time of all edges follows from their
number in that layer; deltapatch does all. First the effects of a sample are held to float64.
"""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import deltapatch
from deltapatch.analysis.attribution import SplitForward
from deltapatch.bench.results import check_free, stamp, write
from deltapatch.engine.options import EdgeOptions
from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.engine.question import ask
from deltapatch.interventions.edges import EdgeGrid, own_flops
from deltapatch.interventions.nodes import LOGITS, MLP, Nodes
from deltapatch.models.forward import activation
from deltapatch.results.folder import environment

WAYS = ("full", "layer", "prefix", "two-runs")
BATCHES = (32, 64, 128)
SAMPLE = 24  # edges whose effects are held to float64


class Edge(NamedTuple):
    """One edge: numbers of its sender, and its receiver's layer, what it reads, head."""

    sender: int
    layer: int
    reads: int
    head: int


class Plain:
    """Batched forwards of a GPT-2, each row with one edge patched.

    Args:
        hf: transformers' model.
        tokens, other: of the base prompt and the source.
        first: the first position that differs.
        message: [sender, T, d_model], what each sender's change adds.
    """

    def __init__(self, hf: Any, tokens: Sequence[int], first: int, message: Tensor) -> None:
        self.body, self.head = hf.transformer, hf.lm_head
        self.first, self.message = first, message
        self.heads = hf.config.n_head
        self.act = activation("gelu_tanh")
        self.entering: list[Tensor] = []  # [layer][T, d_model], the base run before each
        self.middle: list[Tensor] = []  # likewise before each MLP
        self.kv: list[tuple[Tensor, Tensor]] = []  # [layer], keys and values [head, T, d_head]
        x = self.body.wte.weight[torch.tensor(tokens)] + self.body.wpe.weight[: len(tokens)]
        self.embedded = x
        for block in self.body.h:
            self.entering.append(x)
            q, k, v = self._split(block.attn.c_attn(block.ln_1(x))[None])
            self.kv.append((k[0], v[0]))
            mid = x + self._attended(block, q, k, v)[0]
            self.middle.append(mid)
            x = mid + self._mlp(block, block.ln_2(mid))
        self.base = self._logits(x[None, -1:])[0, 0]
        self.changed: list[
            Tensor
        ] = []  # [layer][sender, T, 3 d_model], queries, keys and values with a message
        for l, block in enumerate(self.body.h):
            some = message[: 1 + l * (self.heads + 1)]
            self.changed.append(block.attn.c_attn(block.ln_1(self.entering[l] + some)))

    def effects(self, edges: Sequence[Edge], way: str) -> Tensor:
        """The logits of the last position, [edge, vocabulary], less the base run's; of edges in one layer."""
        begin = self.first if way == "prefix" else 0
        start = edges[0].layer if way in ("layer", "prefix") else 0
        x = (self.embedded if start == 0 else self.entering[start])[begin:].expand(len(edges), -1, -1)
        for l in range(start, len(self.body.h)):
            x = self._block(l, x, edges if l == edges[0].layer else (), begin)
        if edges[0].reads == LOGITS:
            x = x + self.message[[e.sender for e in edges]][:, begin:]
        if way == "two-runs":
            plain = self.embedded.expand(len(edges), -1, -1)
            for l in range(len(self.body.h)):
                plain = self._block(l, plain, (), 0)
            return (self._logits(x) - self._logits(plain))[:, -1]
        return self._logits(x[:, -1:])[:, 0] - self.base

    def _block(self, l: int, x: Tensor, edges: Sequence[Edge], begin: int) -> Tensor:
        block, d = self.body.h[l], x.shape[-1]
        qkv = block.attn.c_attn(block.ln_1(x))
        width = d // self.heads
        rows = [i for i, e in enumerate(edges) if e.reads < MLP]
        for i in rows:
            e = edges[i]
            mine = slice(e.reads * d + e.head * width, e.reads * d + (e.head + 1) * width)
            qkv[i, :, mine] = self.changed[l][e.sender, begin:, mine]
        q, k, v = self._split(qkv)
        if begin:
            k, v = (
                torch.cat([kept[:, :begin].expand(len(x), -1, -1, -1), new], 2)
                for kept, new in zip(self.kv[l], (k, v), strict=True)
            )
        mid = x + self._attended(block, q, k, v)
        read = mid
        into = [i for i, e in enumerate(edges) if e.reads == MLP]
        if into:
            read = mid.clone()
            read[into] += self.message[[edges[i].sender for i in into]][:, begin:]
        return mid + self._mlp(block, block.ln_2(read))

    def _split(self, qkv: Tensor) -> list[Tensor]:
        """[row, T, 3 d_model] -> three of [row, head, T, d_head]."""
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]

    def _attended(self, block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, length = q.shape[2], k.shape[2]
        mask = None if n == length else torch.ones(n, length, dtype=torch.bool).tril(length - n)
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out: Tensor = block.attn.c_proj(z.transpose(1, 2).flatten(2))
        return out

    def _mlp(self, block: Any, x: Tensor) -> Tensor:
        out: Tensor = block.mlp.c_proj(self.act(block.mlp.c_fc(x)))
        return out

    def _logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body.ln_f(x))
        return out


def product_rate(d_model: int, rows: int = 512, repeats: int = 20) -> float:
    """FLOP a second of a product of as many rows as a block has with an MLP's matrix, the best of some."""
    a, b = torch.randn(rows, d_model), torch.randn(d_model, 4 * d_model)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * rows * 4 * d_model**2 / float(np.median(times))


@torch.no_grad()
def measure(config: GPT2Config, length: int, first: int, batches: int, seed: int = 0) -> dict[str, Any]:
    """Everything, on one model of that shape.

    Args:
        length, first: tokens of the prompts, and the first that differs.
        batches: that are timed in each layer.
    """
    torch.manual_seed(seed)
    hf = GPT2LMHeadModel(config).eval()
    for name, weight in hf.named_parameters():
        if weight.ndim > 1 and "wte" not in name:
            weight.data.normal_(0, 0.06)  # so that attention and MLPs matter
    clean = torch.randint(config.vocab_size, (length,)).tolist()
    corrupted = [*clean[:first], *torch.randint(config.vocab_size, (length - first,)).tolist()]
    answers = torch.randint(config.vocab_size, (2,)).tolist()
    pair = deltapatch.PromptPair(clean, corrupted, *answers)
    model = deltapatch.from_transformers(hf)
    nodes = Nodes.of(model.spec)
    plains = {}
    for dtype in (torch.float32, torch.float64):
        split = SplitForward(model, dtype)
        runs = [split.run(split.embed(t), ([0], [1])) for t in (clean, corrupted)]
        plains[dtype] = Plain(copy.deepcopy(hf).to(dtype), clean, first, split.messages(*runs))
    plain = plains[torch.float32]

    def ours() -> deltapatch.EdgeEffects:
        return deltapatch.sweep_edges(
            model, [pair], direction="noise", precision="fp32", metrics="logit_diff", progress=False,
            noise_sample=0,
        )  # fmt: skip

    found, rates = ours(), [product_rate(config.n_embd)]
    values = found.flat("logit_diff")[0]
    listed = [
        Edge(s, r.layer, r.reads, r.head)
        for s, name in zip(found.grid.edges[:, 0].tolist(), (n for _, n in found.edges), strict=True)
        for r in [nodes.receivers[name]]
    ]
    rng = np.random.default_rng(seed)
    worst = _agreement(plains, listed, values, answers, rng)
    by_layer = {l: [e for e in listed if e.layer == l] for l in range(config.n_layer)}
    seconds: dict[str, list[float]] = {"deltapatch": []}
    for _ in range(3):  # in turn
        began = time.perf_counter()
        ours()
        seconds["deltapatch"].append(time.perf_counter() - began)
        rates.append(product_rate(config.n_embd))
        for way in WAYS:
            best = min(_all_edges(plain, by_layer, way, size, batches, rng) for size in BATCHES)
            seconds.setdefault(way, []).append(best)
    question_flops = necessary(model, pair)
    rate = float(np.median(rates))
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    return {
        "shape": {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
                  "vocab_size": config.vocab_size, "length": length, "first_difference": first},
        "edges": len(listed),
        "necessary_flops": question_flops,
        "product_rates": rates,
        "of_product_rate": question_flops / median["deltapatch"] / rate,
        "seconds": seconds,
        "times_as_long": {name: t / median["deltapatch"] for name, t in median.items()},
        "agreement": worst,
    }  # fmt: skip


def necessary(model: deltapatch.Model, pair: deltapatch.PromptPair) -> int:
    """FLOPs that all edges of a pair need, with two logits read of each row.

    In the last layer keys and values of all tokens are needed, and all else of the last one alone.
    """
    question = ask(model, [pair], EdgeOptions(direction="noise", metrics="logit_diff"))
    spec, entered = model.spec, question.entering
    grid, run = question.interventions, question.runs[0]
    assert isinstance(grid, EdgeGrid)
    own = own_flops(grid.table(0, question.pairs[0])[0], grid.nodes, spec, run)
    flying = np.cumsum(entered)[:-1]  # [layer], row tokens that pass through each
    last = int(flying[-1])
    rows = last // (run.length - question.pairs[0].first_difference)
    keys = 2 * spec.d_model * 2 * spec.n_kv_heads * spec.d_head
    rest = 2 * layer_parameters(spec) - keys
    before = 2 * layer_parameters(spec) * int(flying[:-1].sum())
    return own + before + last * keys + rows * rest


def _agreement(
    plains: dict[torch.dtype, Plain], listed: list[Edge], values: np.ndarray, answers: list[int], rng: Any
) -> dict[str, float]:
    """Relative errors of a sample against float64, of deltapatch and of every other way."""
    some = rng.choice(len(listed), SAMPLE, replace=False)

    def apart(plain: Plain, way: str) -> np.ndarray:
        logits = [plain.effects([listed[i]], way)[0] for i in some]
        return np.array([float(x[answers[0]] - x[answers[1]]) for x in logits])

    true = apart(plains[torch.float64], "full")
    found = {"deltapatch": values[some]} | {way: apart(plains[torch.float32], way) for way in WAYS}
    errors = {name: float(np.linalg.norm(v - true) / np.linalg.norm(true)) for name, v in found.items()}
    wrong = {name: error for name, error in errors.items() if error > 1e-2}
    if wrong:
        raise SystemExit(f"effects differ from float64 by {wrong}: no speed is told")
    return errors


def _all_edges(
    plain: Plain, by_layer: dict[int, list[Edge]], way: str, size: int, batches: int, rng: Any
) -> float:
    """Seconds that all edges take, from some batches of every layer."""
    total = 0.0
    for edges in by_layer.values():
        work = [[edges[i] for i in rng.choice(len(edges), size)] for _ in range(batches)]
        began = time.perf_counter()
        for some in work:
            kinds = [[e for e in some if e.reads == LOGITS], [e for e in some if e.reads != LOGITS]]
            for kind in kinds:
                if kind:
                    plain.effects(kind, way)
        total += (time.perf_counter() - began) / (size * batches) * len(edges)
    return total


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--first", type=int, default=10)
    parser.add_argument("--batches", type=int, default=1)
    given = parser.parse_args()
    check_free(given.out)
    torch.set_num_threads(given.threads)
    config = GPT2Config(
        n_layer=given.layers, n_head=given.heads, n_embd=given.d_model, vocab_size=given.vocab,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    found = measure(config, given.length, given.first, given.batches)
    result = stamp("edges", {**environment(), "threads": given.threads, "precision": "fp32", **found})
    print(json.dumps({k: result[k] for k in ("edges", "of_product_rate", "times_as_long", "agreement")}))
    if given.out:
        write(given.out, result)


if __name__ == "__main__":
    main()
