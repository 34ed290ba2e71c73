"""What the probes of a run see: how far each row of a pass moves the residual stream, or a feature of it."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from deltapatch.engine.wavefront.layout import Layout
from deltapatch.engine.wavefront.prompts import Prompts
from deltapatch.engine.wavefront.reads import RowReads
from deltapatch.engine.wavefront.rows import Rows
from deltapatch.kernels.device import upload
from deltapatch.results.probe import Probe

_NUMBERS = 1 << 22  # of rows that are looked at together


class Probed:
    """Collects it, layer by layer.

    Args:
        probes: by name, checked.
        prompts, rows: of the pass.
        like: says in which dtype and where.

    Attributes:
        values: name -> [row]; 0 of rows that have not come to it.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        prompts: Prompts,
        rows: Rows,
        like: Tensor,
    ) -> None:
        self.rows, self.base = rows, prompts.shapes.base
        self.values = {name: like.new_zeros(len(rows.pair)) for name in probes}
        self._at: dict[int, list[tuple[Probe, np.ndarray]]] = {}  # layer -> probe, [row] its position
        for probe in probes.values():
            places = np.array([probe.place(pair, prompts.roles) for pair in prompts.pairs], dtype=np.int64)
            self._at.setdefault(probe.layer, []).append((probe, places[rows.pair]))

    def look(self, l: int, packed: Layout | RowReads, out: Tensor, x: Tensor) -> None:
        """Take in what the rows in flight after a layer are there.

        Args:
            packed: says how they are packed in `out`, [token, d_model].
            x: [base token, d_model], the base runs after the layer.
        """
        for probe, position in self._at.get(l, []):
            after = self.rows.before(l + 1)
            ids = after[self.rows.start[after] <= position[after]]
            if isinstance(packed, Layout):
                line = packed.token[ids] + (position[ids] - self.rows.start[ids]) * packed.stride[ids]
            else:
                line = packed.place[packed.first[ids]]  # the end of the prompt
            of_base = self.base[self.rows.pair[ids]] + position[ids]
            step = max(
                1, _NUMBERS // max(out.shape[1], 0 if probe.feature is None else probe.feature[0].d_sae)
            )
            for some in (slice(a, a + step) for a in range(0, len(ids), step)):
                at, own, to = (upload(some_of[some], out.device) for some_of in (line, of_base, ids))
                self.values[probe.name][to] = probe.read(out[at], x[own])

    def numbers(self) -> dict[str, np.ndarray]:
        """name -> [row]."""
        return {name: values.cpu().numpy() for name, values in self.values.items()}
