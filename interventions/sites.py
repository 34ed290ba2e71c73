"""Sites: where a patch can go. Adding one is one entry of SITES and its swap in the wavefront.

docs/sites.md lists all their names.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.spec import ModelSpec

Index = Literal["none", "coordinate", "head", "kv_head", "neuron"]
# The places inside a block, in the order in which a row passes them.
PLACES = ("q", "k", "v", "z", "attn_out", "resid_mid", "mlp_post", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Site:
    """A place in the block and what its index counts."""

    name: str
    place: str  # one of PLACES; resid_pre of layer l is resid_post of layer l - 1
    index: Index

    def n_indices(self, spec: ModelSpec) -> int:
        """How many indices the site has in a model; 0 where a patch swaps the whole vector."""
        sizes = {
            "none": 0,
            "coordinate": spec.d_model,
            "head": spec.n_heads,
            "kv_head": spec.n_kv_heads,
            "neuron": spec.d_mlp,
        }
        return sizes[self.index]


SITES: dict[str, Site] = {
    s.name: s
    for s in (
        Site("resid_pre", "resid_post", "none"),
        Site("resid_mid", "resid_mid", "none"),
        Site("resid_post", "resid_post", "none"),
        Site("attn_out", "attn_out", "none"),
        Site("mlp_out", "mlp_out", "none"),
        Site("q", "q", "head"),
        Site("k", "k", "kv_head"),
        Site("v", "v", "kv_head"),
        Site("z", "z", "head"),
        Site("mlp_post", "mlp_post", "neuron"),
        Site("mlp_out.dim", "mlp_out", "coordinate"),
        Site("attn_out.dim", "attn_out", "coordinate"),
        Site("resid_pre.dim", "resid_post", "coordinate"),
        Site("resid_post.dim", "resid_post", "coordinate"),
    )
}

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
    "attn.hook_z": "z",
    "mlp.hook_post": "mlp_post",
}
_BARE = {name.rpartition(".")[2]: site for name, site in HOOK_NAMES.items()}
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
