"""pyvene: one call of an IntervenableModel for each intervention, base and source."""

import contextlib
import io
from typing import Any

import numpy as np
import torch

from deltapatch.bench.peers.base import SITES
from deltapatch.bench.peers.hooks import Hooks
from deltapatch.bench.sides.cells import ALONG, Cells

COMPONENTS = {
    "mlp_out": ("mlp_output", "pos"),
    "attn_out": ("attention_output", "pos"),
    "z": ("head_attention_value_output", "h.pos"),
    "mlp_post": ("mlp_activation", "pos"),
    ALONG: ("block_output", "pos"),
}


class PyveneLoop(Hooks):
    """Each call runs the source prompt, then the base prompt with what it took from it."""

    name = "pyvene"
    what = "pyvene, one call each"
    package = extra = "pyvene"
    architectures = ("gpt_neox", "llama")  # those of its model card that deltapatch reads
    joint = False
    sites = (*SITES, ALONG)
    modules = ("torch", "transformers", "pyvene")

    wrapped: dict[tuple[str, int], Any]

    def lacks(self, architecture: str, site: str, patches: int) -> str | None:
        """Its MLP activation is the gate's branch alone, where there is a gate."""
        if architecture == "llama" and site == "mlp_post":
            return "no mlp_post behind a gate"
        return super().lacks(architecture, site, patches)

    def start(self, site: str) -> None:
        """The base runs, with hooks; models that were wrapped before are wrapped again."""
        super().start(site)
        self.wrapped = {}

    def intervenable(self, model: Any, site: str, layer: int) -> Any:
        """The model, wrapped for one layer."""
        with contextlib.redirect_stdout(io.StringIO()):  # it says on import what else could be installed
            import pyvene
        if (site, layer) not in self.wrapped:
            component, unit = COMPONENTS[site]
            kind, rank = pyvene.VanillaIntervention, None
            if site == ALONG:
                kind, rank = pyvene.LowRankRotatedSpaceIntervention, 1
            config = pyvene.IntervenableConfig(
                [pyvene.RepresentationConfig(layer, component, unit, 1, low_rank_dimension=rank)],
                intervention_types=kind,
            )
            self.wrapped[site, layer] = pyvene.IntervenableModel(config, model)
            if site == ALONG:
                self._fix(self.wrapped[site, layer])
        return self.wrapped[site, layer]

    def _fix(self, wrapped: Any) -> None:
        """Give its rotation our direction, as a plain weight: it is not to be trained."""
        (intervention,) = wrapped.interventions.values()
        layer = intervention.rotate_layer
        torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
        layer.weight.data.copy_(torch.tensor(self.work.direction)[:, None])

    def where(self, cells: Cells) -> dict[str, Any]:
        """Units and subspaces of cells of one layer, as pyvene wants them: [intervention][row][unit]."""
        positions = [[int(p)] for p in cells.position[:, 0]]
        indices = [[int(i)] for i in cells.index[:, 0]]
        units = [[indices, positions]] if cells.site == "z" else [positions]
        subspaces = {"subspaces": [indices]} if cells.site == "mlp_post" else {}
        return {"unit_locations": {"sources->base": (units, units)}, **subspaces}

    @torch.no_grad()
    def measure(self, cells: Cells) -> np.ndarray:
        """One cell."""
        pair = torch.from_numpy(cells.pair)
        model = self.intervenable(self.model, cells.site, int(cells.layer[0, 0]))
        ids = {"input_ids": self.corrupted[pair]}, [{"input_ids": self.clean[pair]}]
        out = model(*ids, **self.where(cells))[1]
        found = out.logits[:, -1].float().log_softmax(-1).gather(1, self.answers[pair])
        if self.work.metric == "logit_diff":
            found = found[:, :1] - found[:, 1:]
        return (found - self.base[pair]).double().cpu().numpy()
