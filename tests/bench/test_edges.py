"""The bench of all edges, on a tiny shape: every way gives the same effects before any speed is told."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config

from deltapatch.bench import edges, markdown
from deltapatch.interventions.nodes import Nodes


def tiny():
    return GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=61, n_positions=16,
                      bos_token_id=None, eos_token_id=None)  # fmt: skip


def test_all_ways_agree(monkeypatch):
    monkeypatch.setattr(edges, "BATCHES", (4,))
    torch.manual_seed(0)
    found = edges.measure(tiny(), 6, 3, 1)
    assert found["edges"] == Nodes(2, 2, 2, False).n_edges
    assert set(found["seconds"]) == {"deltapatch", *edges.WAYS}
    assert max(found["agreement"].values()) < 1e-3
    assert all(len(times) == 3 for times in found["seconds"].values())
    table = markdown.table({"kind": "edges", **found})
    assert len(table.splitlines()) == 2 + 1 + len(edges.WAYS)


def test_a_wrong_effect_tells_no_speed(monkeypatch):
    """What differs from float64 ends the measurement."""
    honest = edges.Plain.effects

    def off(self, some, way):
        found = honest(self, some, way)
        wrong = way == "prefix" and found.dtype == torch.float32
        return found + torch.linspace(0, 1, found.shape[-1]) if wrong else found

    monkeypatch.setattr(edges.Plain, "effects", off)
    with pytest.raises(SystemExit, match=r"prefix.*no speed is told"):
        edges.measure(tiny(), 6, 3, 1)
    assert np.isfinite(edges.product_rate(16, repeats=2))
