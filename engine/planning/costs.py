"""What a sweep must cost: rows and necessary FLOPs, from a model's shapes alone.

A row takes one product with each matrix of each layer after its own, for every position from its patch to
the last, and one read-out. Where answers have several tokens, those after the prompt are positions and
read-outs too. Attention scores, norms and whatever an engine does beside that are not counted:
this is the floor that speed is measured against.
"""

from collections.abc import Sequence

from deltapatch.interventions.grid import Grid
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.runs import continuation_of
from deltapatch.interventions.sites import find_site
from deltapatch.models.spec import ModelSpec


def layer_parameters(spec: ModelSpec) -> int:
    """Entries of the matrices of one layer."""
    attention = spec.d_model * spec.d_head * (2 * spec.n_heads + 2 * spec.n_kv_heads)
    return attention + (3 if spec.gated else 2) * spec.d_model * spec.d_mlp


def parameters(spec: ModelSpec) -> int:
    """Entries of all matrices, embedding and read-out included; norms and biases are left out."""
    ends = spec.d_vocab * spec.d_model * (1 if spec.tied_embeddings else 2)
    return spec.n_layers * layer_parameters(spec) + ends


def rows(spec: ModelSpec, site: str, layers: Sequence[int], positions: Sequence[int]) -> int:
    """How many interventions a sweep of one site and one pair has."""
    return len(layers) * len(positions) * (find_site(site)[0].n_indices(spec) or 1)


def flops(spec: ModelSpec, row_layers: int, readouts: int) -> int:
    """What row tokens need that pass so many layers, counted for each layer, and so many read-outs."""
    return 2 * (layer_parameters(spec) * row_layers + spec.d_model * spec.d_vocab * readouts)


def necessary_flops(
    spec: ModelSpec,
    site: str,
    layers: Sequence[int],
    positions: Sequence[int],
    length: int,
    continued: int = 0,
) -> int:
    """The necessary FLOPs of a sweep of one site over one pair of prompts of `length` tokens.

    Args:
        layers: the patched layers. `resid_pre` of a layer passes through that layer as well.
        positions: from 0, or negative from the end.
        continued: tokens that the answers add to the prompt.
    """
    enters_before = find_site(site)[0].name.startswith("resid_pre")
    depth = sum(spec.n_layers - layer - (0 if enters_before else 1) for layer in layers)
    width = sum(length + continued - (p + length if p < 0 else p) for p in positions)
    one = flops(spec, depth * width, len(layers) * len(positions) * (1 + continued))
    return (find_site(site)[0].n_indices(spec) or 1) * one


def sweep_cost(grid: Grid, pairs: Sequence[EncodedPair], spec: ModelSpec) -> tuple[int, int]:
    """Rows and necessary FLOPs of a sweep over pairs of any lengths."""
    n_rows = needed = 0
    for pair in pairs:
        continued = len(continuation_of(pair).tokens)
        for site in grid.sites:
            found = [places[0] for _, places in site.spots(pair)]
            layers, (base, _) = site.layers.tolist(), site.roles.prompts(pair)
            n_rows += rows(spec, site.site.name, layers, found)
            needed += necessary_flops(spec, site.site.name, layers, found, len(base), continued)
    return n_rows, needed
