"""What hooks add where they change a vector in part: along a direction, or by a feature."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deltapatch.bench.sides.cells import ALONG
from deltapatch.bench.sides.workload import Workload

# Of what is there and what the source has, [row, d_model], and features, [row]: what is added, as the first.
Change = Callable[[Tensor, Tensor, Tensor], Tensor]


def change_of(site: str, work: Workload, dtype: torch.dtype) -> Change:
    """What is added at one of EDITS, by its definition."""
    return _along(work, dtype) if site == ALONG else _feature(work, dtype)


def _along(work: Workload, dtype: torch.dtype) -> Change:
    """The part along the direction becomes the source's."""
    direction = torch.tensor(work.direction, dtype=dtype, device=work.device)
    return lambda here, theirs, _: ((theirs - here) @ direction)[:, None] * direction


def _feature(work: Workload, dtype: torch.dtype) -> Change:
    """A feature becomes the source's, of a standard autoencoder; of its encoder nothing else is computed."""
    from safetensors.torch import load_file

    w = {
        name: tensor.to(work.device, dtype)
        for name, tensor in load_file(Path(work.autoencoder) / "sae_weights.safetensors").items()
    }
    columns = w["W_enc"].T.contiguous()  # [feature, d_model]

    def said(x: Tensor, feature: Tensor) -> Tensor:
        return torch.relu(((x - w["b_dec"]) * columns[feature]).sum(-1) + w["b_enc"][feature])  # [row]

    def change(here: Tensor, theirs: Tensor, feature: Tensor) -> Tensor:
        return (said(theirs, feature) - said(here, feature))[:, None] * w["W_dec"][feature]

    return change
