"""The declarative spec: everything that the one forward needs to know about a decoder-only model.

sequential block                      parallel block
  x ─┬─ norm1 ─ attention ─┐            x ─┬─ norm1 ─ attention ───────┐
     └────────────────────(+)─ mid         ├─ norm2 ─ MLP ────────────(+)── (+)─ out
  mid ─┬─ norm2 ─ MLP ─┐                   └────────────────────────────────┘
       └──────────────(+)─ out             (norm2 is norm1 where the norm is shared)

Some models have norms behind attention and MLP as well, before what these say is added, or there alone.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]
RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding.

    Attributes:
        dim: how many of the d_head coordinates turn; the rest pass through. 0: none do.
        base: theta, the base of the frequencies.
        interleaved: coordinates (0, 1), (2, 3), ... turn together (GPT-J), else (0, dim/2), ...
        scaling: how frequencies are stretched for long contexts.
        factor, low_freq_factor, high_freq_factor, original_context: the numbers that `scaling` takes; yarn
            takes its betas for the two factors.
        truncate: yarn's ramp begins and ends at whole coordinates.
        short_factors, long_factors: [dim / 2], longrope's, up to the original context and beyond it.
        attention_factor: what coordinates that turn are multiplied by.
    """

    dim: int
    base: float = 10_000.0
    interleaved: bool = False
    scaling: RopeScaling = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def depends_on_length(self, n_positions: int) -> bool:
        """Whether a prompt of that length has other tables than one within the original context."""
        return self.scaling in ("dynamic", "longrope") and n_positions > self.original_context


class Scores(NamedTuple):
    """How one layer's products of queries and keys become probabilities.

    Attributes:
        scale: what they are multiplied by.
        softcap: c of c tanh(score / c), which comes next; None: nothing does.
        window: how many positions a query sees, its own the last; None: all up to its own.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and kinds of one model. Everything is static; weights are in `LayerWeights`, `EndWeights`.

    Attributes:
        architecture: the name of the file in models/ that reads it.
        context: the longest prompt that the checkpoint was made for.
        gated: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        rope: of all layers, or of the first where they differ.
        shared_norm: the MLP reads norm1's output.
        fused_qkv: one product, rows ordered [head, (q, k, v), d_head].
        pre_norm, post_norm: whether there are norms before attention and MLP, and behind them.
        qk_norm: norms of queries and keys before rotary: of each head with one weight for all heads ("head")
            or with weights of its own ("each"), or of a whole projection ("width").
        unit_offset: RMS norms multiply by 1 + their weight.
        learned_positions: a table of positions is added to the embedding.
        embedding_scale: what embeddings are multiplied by.
        round_embedding_scale: that is rounded to the dtype which they are stored in.
        residual_scale: what attention and MLP say is multiplied by this before it is added.
        attention_scale: of scores; None: 1/sqrt(d_head).
        scores_by_depth: scores of layer l, counted from 0, are divided by l + 1 as well.
        attention_softcap, logit_softcap: c of c tanh(x / c), of scores and of logits.
        logit_scale: what logits are multiplied by.
        ropes, windows: [layer], where layers differ; see `rope_of` and `scores`.
    """

    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    context: int
    norm: Literal["layer", "rms"]
    norm_eps: float
    parallel: bool
    gated: bool
    activation: Activation
    rope: RopeSpec
    tied_embeddings: bool = False
    shared_norm: bool = False
    fused_qkv: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    unembedding_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: Literal["none", "head", "each", "width"] = "none"
    unit_offset: bool = False
    learned_positions: bool = False
    embedding_scale: float = 1.0
    round_embedding_scale: bool = False
    residual_scale: float = 1.0
    attention_scale: float | None = None
    scores_by_depth: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    ropes: tuple[RopeSpec, ...] = ()
    windows: tuple[int | None, ...] = ()

    def rope_of(self, layer: int) -> RopeSpec:
        """The rotary embedding of a layer."""
        return self.ropes[layer] if self.ropes else self.rope

    def all_ropes(self) -> list[RopeSpec]:
        """The rotary embeddings that there are."""
        return list(dict.fromkeys(self.ropes or [self.rope]))

    def scores(self, layer: int) -> Scores:
        """How a layer's scores become probabilities."""
        scale = self.d_head**-0.5 if self.attention_scale is None else self.attention_scale
        if self.scores_by_depth:
            scale /= layer + 1
        return Scores(scale, self.attention_softcap, self.windows[layer] if self.windows else None)
