"""Rows from patches: where each starts and enters, which patches matter, and how rows are ordered."""

import numpy as np
import pytest
from engine_tiny import build
from hypothesis import given, settings
from hypothesis import strategies as st

import deltapatch
from deltapatch.engine.options import Options
from deltapatch.engine.question import ask
from deltapatch.engine.wavefront.rows import ATTENTION, END, MIDDLE, make_rows
from deltapatch.interventions.sites import PLACES, SITES
from deltapatch.interventions.table import PLACE, PatchTable, place_of

SPECS = {v: deltapatch.from_transformers(build(v)).spec for v in ("neox-parallel", "llama-grouped")}


def stage(place, parallel):
    """Which part of the block a patch at a place is seen by first."""
    if place in ("q", "k", "v", "pattern", "z"):
        return ATTENTION
    if not parallel and place in ("attn_out", "resid_mid"):
        return MIDDLE  # the MLP reads it
    return END


def is_read(layer, place, position, last, n_layers):
    """Whether the read-out at `last` can see a patch: later positions see nothing of it, and in the last
    layer only its keys and values reach other positions."""
    if position > last:
        return False
    return layer < n_layers - 1 or place in ("k", "v") or position == last


@st.composite
def tables(draw, n_layers):
    length = np.sort(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    pair, patches = [], []
    for row in range(draw(st.integers(1, 12))):
        pair.append(draw(st.integers(0, len(length) - 1)))
        for _ in range(draw(st.integers(1, 3))):
            site = draw(st.sampled_from(sorted(SITES)))
            place, layer = place_of(site, draw(st.integers(0, n_layers - 1)))
            position = draw(st.integers(0, length[pair[-1]]))  # one behind the read-out, too
            patches.append((row, layer, place, position, draw(st.integers(0, 1)), draw(st.integers(0, 3))))
    columns = np.array(patches, dtype=np.int64).T
    return PatchTable(len(pair), np.array(pair), *columns), length


@pytest.mark.parametrize("source", ["counterpart", "noise", "zero"])
def test_rows_begin_where_the_source_differs(source):
    """Patches before it are no work, unless the row adds vectors; what they do is exactly nothing."""
    model = deltapatch.from_transformers(build("llama-grouped"))
    pair = deltapatch.PromptPair([3, 1, 4, 1, 5], [3, 1, 4, 2, 5], 6, 7)
    add = np.ones(model.spec.d_model)
    patch = deltapatch.Patch
    asked = [
        deltapatch.Intervention(0, patches)
        for patches in (
            [patch("mlp_out", 0, 1)],
            [patch("mlp_out", 0, 1), patch("z", 1, 3, 0)],
            [patch("z", 1, 3, 0)],
            [patch("resid_post", 0, 1, add=add), patch("mlp_out", 1, 1)],
            [patch("resid_post", 0, 1, add=add)],
        )
    ]
    options = {"source": source, "progress": False, "noise_sample": 0, "precision": "fp64"}
    question = ask(model, [pair], Options(source=source), asked)
    tokens, _ = question.interventions.row_sizes(0, question.pairs[0], question.runs[0])
    assert tokens.tolist() == ([4, 4, 2, 4, 4] if source == "zero" else [0, 2, 2, 4, 4])
    effects = deltapatch.run(model, [pair], asked, **options).values("kl")
    swept = deltapatch.sweep(model, [pair], sites="mlp_out", **options).values("kl")[0]
    if source != "zero":
        assert effects[0] == 0
        assert effects[1] == effects[2] > 0
        assert (swept[:, :3] == 0).all()
    assert (swept[:-1, 3] > 0).all()  # what it does in the last layer is not read
    assert effects[3] != effects[4]  # the swap takes back what had been added before it


@pytest.mark.parametrize("variant", SPECS)
def test_rows_of_any_interventions(variant):
    spec = SPECS[variant]

    @settings(max_examples=150, deadline=None)
    @given(tables(spec.n_layers))
    def check(case):
        table, length = case
        rows = make_rows(table, length, spec)
        patches = list(
            zip(table.row, table.layer, table.place, table.position, table.edit, table.index, strict=True)
        )
        kept = []
        for row in range(table.n_rows):
            pair = table.pair[row]
            mine = [
                p
                for p in patches
                if p[0] == row and is_read(p[1], PLACES[p[2]], p[3], length[pair] - 1, spec.n_layers)
            ]
            id_ = rows.id_of[row]
            if not mine:
                assert id_ == -1
                continue
            assert rows.pair[id_] == pair
            assert rows.start[id_] == min(p[3] for p in mine)
            entry = min((p[1], stage(PLACES[p[2]], spec.parallel)) for p in mine)
            assert (rows.layer[id_], rows.stage[id_]) == entry
            kept += [(layer, place, id_, *rest) for _, layer, place, *rest in mine]

        ids = rows.id_of[rows.id_of >= 0]
        assert sorted(ids) == list(range(len(rows.pair)))
        order = list(zip(length[rows.pair], rows.start, rows.pair, strict=True))
        assert order == sorted(order)
        p = rows.patches
        found = list(zip(p.layer, p.place, p.row, p.position, p.edit, p.index, strict=True))
        assert [f[:3] for f in found] == sorted(f[:3] for f in found)
        assert sorted(found) == sorted(kept)

        for layer in range(-1, spec.n_layers):
            inside = [rows.entering(layer, s) for s in (ATTENTION, MIDDLE, END)]
            before = rows.before(layer)
            assert sorted([*before, *np.concatenate(inside)]) == rows.before(layer + 1).tolist()
        assert len(rows.before(spec.n_layers)) == len(rows.pair)

    check()


def test_what_enters_a_layer_is_what_left_the_one_before():
    assert place_of("resid_pre", 0) == (PLACE["resid_post"], -1)
    assert place_of("resid_pre.dim", 2) == place_of("resid_post.dim", 1)
    assert place_of("mlp_post", 2) == (PLACE["mlp_post"], 2)
