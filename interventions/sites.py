"""Sites: where a patch can go, and what is said of each. Adding one is one entry of SITES and its swap.

docs/sites.md lists all their names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.spec import ModelSpec


@dataclass(frozen=True)
class Index:
    """What a site's index counts, and what is said of it everywhere.

    Attributes:
        counts: in the singular; "" where a patch swaps the whole vector.
        letter: before its number in short names such as L3.H2.
        size: how many there are in a model.
        few: so few that a figure shows every one.
    """

    counts: str
    letter: str
    size: Callable[[ModelSpec], int]
    few: bool = False


WHOLE = Index("", "", lambda spec: 0)
HEAD = Index("head", "H", lambda spec: spec.n_heads, few=True)
KV_HEAD = Index("head", "H", lambda spec: spec.n_kv_heads, few=True)
NEURON = Index("neuron", "N", lambda spec: spec.d_mlp)
COORDINATE = Index("coordinate", "D", lambda spec: spec.d_model)
DIRECTION = Index("direction", "V", lambda spec: 0)  # as many as a sweep is given
ALONG = ".along"  # ends the names of sites that are swapped along given directions
# The places inside a block, in the order in which a row passes them.
PLACES = ("q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Site:
    """A place in the block and what its index counts."""

    name: str
    place: str  # one of PLACES; resid_pre of layer l is resid_post of layer l - 1
    index: Index

    def n_indices(self, spec: ModelSpec) -> int:
        """How many indices the site has in a model; 0 where a patch swaps the whole vector."""
        return self.index.size(spec)


SITES: dict[str, Site] = {
    s.name: s
    for s in (
        Site("resid_pre", "resid_post", WHOLE),
        Site("resid_mid", "resid_mid", WHOLE),
        Site("resid_post", "resid_post", WHOLE),
        Site("attn_out", "attn_out", WHOLE),
        Site("mlp_out", "mlp_out", WHOLE),
        Site("q", "q", HEAD),
        Site("k", "k", KV_HEAD),
        Site("v", "v", KV_HEAD),
        Site("pattern", "pattern", HEAD),
        Site("z", "z", HEAD),
        Site("mlp_post", "mlp_post", NEURON),
        Site("mlp_out.dim", "mlp_out", COORDINATE),
        Site("attn_out.dim", "attn_out", COORDINATE),
        Site("resid_pre.dim", "resid_post", COORDINATE),
        Site("resid_post.dim", "resid_post", COORDINATE),
        Site("mlp_out.along", "mlp_out", DIRECTION),
        Site("attn_out.along", "attn_out", DIRECTION),
        Site("resid_pre.along", "resid_post", DIRECTION),
        Site("resid_mid.along", "resid_mid", DIRECTION),
        Site("resid_post.along", "resid_post", DIRECTION),
    )
}

# What indices count, as people group by it: each head (neuron, coordinate) of each layer.
COUNTED = tuple(dict.fromkeys(site.index.counts for site in SITES.values() if site.index.counts))

# The hook names of TransformerLens, which users know, mean the same sites: bare, as in a block, and in full.
HOOK_NAMES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "mlp.hook_post": "mlp_post",
}
_BARE = {name.rpartition(".")[2]: site for name, site in HOOK_NAMES.items()}
# Attention scores: all of a query's, of another run, make that run's probabilities; zero or mean ones do not.
_SCORES = ("scores", "attn_scores", "hook_attn_scores", "attn.hook_attn_scores")
_HOOK = re.compile(r"blocks\.(\d{1,9})\.(.+)")


def find_site(name: str) -> tuple[Site, int | None]:
    """The site of a name, and the layer where the name carries one (`blocks.3.mlp.hook_post`).

    Raises:
        DeltapatchError: no site has that name.
    """
    if not isinstance(name, str):
        raise DeltapatchError(f"a site must be a name such as 'mlp_out', not {shown(name)}")
    return _find(name)


@cache  # a joint patch names its sites thousands of times
def _find(name: str) -> tuple[Site, int | None]:
    match = _HOOK.fullmatch(name)
    short = match[2] if match else name
    hook = HOOK_NAMES.get(short) or _BARE.get(short)
    site = SITES.get(hook or ("" if match else name))
    if site is None and short in _SCORES:
        raise DeltapatchError(
            f"site {shown(name)} is none of its own: use pattern, which is the same patch where scores are "
            "another run's (sources counterpart, resample and noise); zero or mean scores cannot be patched"
        )
    if site is None:
        raise DeltapatchError(f"unknown site {shown(name)}: choose from {', '.join(SITES)}")
    return site, int(match[1]) if match else None


def check_site(site: Site, spec: ModelSpec) -> None:
    """Raise DeltapatchError where a model has no such site."""
    if site.place == "resid_mid" and spec.parallel:
        raise DeltapatchError(
            "site 'resid_mid' does not exist in this model: attention and MLP read the same residual stream; "
            "use resid_pre or resid_post"
        )
