"""Grids: the forms in which sites, layers and positions are given, and the arrays of patches they become."""

import numpy as np
import pytest
from engine_tiny import hf_model

import deltapatch
from deltapatch import DeltapatchError, PromptPair
from deltapatch.engine.planning.costs import sweep_cost
from deltapatch.interventions.encode import encode_pairs
from deltapatch.interventions.grid import make_grid
from deltapatch.interventions.roles import Roles
from deltapatch.interventions.table import EDIT, place_of

SPEC = deltapatch.from_transformers(hf_model("neox-parallel")).spec  # 3 layers, 2 heads, 24 neurons
PAIRS = encode_pairs(
    [
        PromptPair([1, 2, 3, 4, 5], [1, 2, 6, 4, 5], 7, 8, labels={"op": 2, "end": -2}),
        PromptPair([1, 2, 3], [1, 4, 3], 7, 8, labels={"op": 1}),
    ],
    None,
    SPEC.d_vocab,
)


def grid(sites="mlp_out", positions="all", layers="all", pairs=PAIRS):
    return make_grid(sites, positions, layers, pairs, SPEC, Roles())


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("last", [-1]),
        ("op", ["op"]),
        ([0, -1, "op", "last"], [0, -1, "op", "last"]),
        ([range(1, 4)], [1, 2, 3]),
        (range(2), [0, 1]),
        ([4, 4, -5], [4, -5]),
        (np.array([1, 2]), [1, 2]),
    ],
    ids=str,
)
def test_positions(given, want):
    assert grid(positions=given).sites[0].positions == want


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("all", [0, 1, 2]),
        ([2, 0], [0, 2]),
        ([range(1, 3)], [1, 2]),
        (range(2), [0, 1]),
        ([0, range(3), 2], [0, 1, 2]),
    ],
    ids=str,
)
def test_layers(given, want):
    assert grid(layers=given).sites[0].layers.tolist() == want


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ("mlp_out, z", {"mlp_out": [0, 1], "z": [0, 1]}),
        (["mlp_out", "mlp_out"], {"mlp_out": [0, 1]}),
        (["blocks.2.attn.hook_q", "blocks.0.attn.hook_q"], {"q": [0, 2]}),
        (["blocks.2.hook_mlp_out", "mlp_out"], {"mlp_out": [0, 1, 2]}),
        (["hook_resid_pre"], {"resid_pre": [0, 1]}),
    ],
    ids=str,
)
def test_sites_and_hook_names(given, want):
    """A full hook name carries its layer; the others take the layers that were asked for."""
    found = {g.site.name: g.layers.tolist() for g in grid(given, layers=[0, 1]).sites}
    assert found == want


def at(position, pair):
    """A position as DESIGN.md defines it, None where a pair has none."""
    n = len(pair.clean)
    if position == "last":
        return n - 1
    if isinstance(position, str):
        return pair.labels.get(position)
    return position % n if -n <= position < n else None


def test_patches_and_effects_lie_where_their_coordinates_say():
    g = grid(["mlp_out", "z", "resid_pre"], [4, "op", -2, "end"], [0, 2])
    cells = [  # (pair, site, layer, position, index) in the order of the flat array of effects
        (i, site, layer, p, index)
        for site, n in (("mlp_out", 0), ("z", 2), ("resid_pre", 0))
        for i in range(len(PAIRS))
        for layer in (0, 2)
        for p in (4, "op", -2, "end")
        for index in (range(n) if n else [None])
    ]
    assert g.n_effects == len(cells)
    found = {}
    for number, pair in enumerate(PAIRS):
        table, out = g.table(number, pair)
        assert table.row.tolist() == list(range(table.n_rows))
        for effect, *patch in zip(out, *table.columns(slice(None)), strict=True):
            assert effect not in found
            found[int(effect)] = tuple(int(x) for x in patch)
    for effect, (i, site, layer, p, index) in enumerate(cells):
        position = at(p, PAIRS[i])
        if position is None:
            assert effect not in found
            continue
        place, shifted = place_of(site, layer)
        edit = EDIT["whole" if index is None else "one"]
        assert found[effect] == (shifted, place, position, edit, index or 0)
        words = f"pair {i}, {site}, layer {layer}, position {p}" + (
            "" if index is None else f", index {index}"
        )
        assert g.describe(effect) == words


def test_the_cost_of_a_sweep_counts_the_cells_that_pairs_have():
    n_rows, flops = sweep_cost(grid(["mlp_out", "z"], [4, "op"], [0, 2]), PAIRS, SPEC)
    tables = [grid(["mlp_out", "z"], [4, "op"], [0, 2]).table(i, p)[0] for i, p in enumerate(PAIRS)]
    assert n_rows == sum(t.n_rows for t in tables) == (2 + 1) * 2 * (1 + 2)
    assert flops > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "mlp"}, "unknown site 'mlp': choose from resid_pre, "),
        ({"sites": "blocks.0.hook_nothing"}, "unknown site 'blocks.0.hook_nothing'"),
        ({"sites": []}, "no sites were given"),
        ({"sites": "resid_mid"}, "'resid_mid' does not exist in this model"),
        ({"sites": "blocks.3.mlp.hook_post"}, "layer 3 does not exist: this model has layers 0 to 2"),
        ({"layers": [3]}, "layer 3 does not exist: this model has layers 0 to 2"),
        ({"layers": [-1]}, "layer -1 does not exist"),
        ({"layers": [range(2, 5)]}, "layer 3 does not exist"),
        ({"layers": [1.5]}, "a layer must be a whole number, not 1.5"),
        ({"layers": [True]}, "a layer must be a whole number, not True"),
        ({"layers": "0-1"}, "layers must be 'all' or a list of numbers, not '0-1'"),
        ({"layers": []}, "no layers were given"),
        ({"positions": [5]}, "position 5 does not exist: the longest prompt has positions 0 to 4"),
        ({"positions": [-6]}, "position -6 does not exist"),
        (
            {"positions": "subject"},
            "no pair has a position labelled 'subject': the pairs' labels are end, op",
        ),
        ({"positions": [0.0]}, "a position must be a whole number or a label, not 0.0"),
        ({"positions": []}, "no positions were given"),
    ],
    ids=str,
)
def test_what_errors_say(options, message):
    with pytest.raises(DeltapatchError) as caught:
        grid(**options)
    assert message in str(caught.value)


def test_a_label_that_no_pair_has_where_none_has_any():
    bare = encode_pairs([PromptPair([1, 2], [1, 3], 4, 5)], None, SPEC.d_vocab)
    with pytest.raises(DeltapatchError, match="the pairs have no labels; or use all, last or numbers"):
        grid(positions="op", pairs=bare)
