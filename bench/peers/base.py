"""What a peer is: the small protocol that a comparison speaks, and what most peers share of it."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import numpy as np

from deltapatch.bench.sides.cells import Cells
from deltapatch.bench.sides.workload import Workload
from deltapatch.models.spec import ModelSpec

SITES = ("mlp_out", "attn_out", "z", "mlp_post")  # what the sweeps of a comparison patch


class Peer:
    """One way of patching.

    A comparison calls `missing` and `lacks` first; then `prepare` once; then, as often as it likes, `start`
    and after it `measure` for one of the `batches` after the other. `start` and `measure` are what is timed.

    Attributes:
        name: what options, tables and results call it.
        what: a few words on how it works.
        package: what has to be installed beside transformers; empty where nothing has.
        extra: deltapatch's extra that installs it.
        precision: of its arithmetic; decides how well it must agree with the oracle.
        difference_form: whether rounding is relative to the effect, not to the activation.
        exact: False for approximations, which are ranked but not asked to agree.
        sites: what it can patch.
        architectures: of which models.
        joint: whether it can patch several places at once.
        batched: whether it has a choice of how many rows it puts into a forward.
        batch: how many, where it has.
    """

    name: str
    what: str
    package: str = ""
    extra: str = ""
    precision: str = "fp32"
    difference_form: bool = False
    exact: bool = True
    sites: tuple[str, ...] = SITES
    architectures: tuple[str, ...] = ("gpt_neox", "gptj", "llama")
    joint: bool = True
    batched: bool = False
    batch: int = 64

    work: Workload
    spec: ModelSpec
    modules: ClassVar[tuple[str, ...]] = ("torch", "transformers")  # whose import time a user waits for

    def missing(self) -> str | None:
        """Why it cannot run here; None where it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install 'deltapatch[{self.extra}]', or --isolate"
        return None

    def lacks(self, architecture: str, site: str, patches: int) -> str | None:
        """What it cannot patch, in a few words; None where it can."""
        if architecture not in self.architectures:
            return f"no {architecture}"
        if site not in self.sites:
            return f"no {site}"
        return "no joint patches" if patches > 1 and not self.joint else None

    def prepare(self, work: Workload, spec: ModelSpec) -> None:
        """Load the model."""
        raise NotImplementedError

    def start(self, site: str) -> None:
        """The runs that no intervention is part of: what is patched in, and what effects are relative to."""

    def batches(self, cells: Cells) -> list[np.ndarray]:
        """The cells, by number, as they are best carried out together; in order of time to come."""
        return [np.array([i]) for i in range(len(cells))]

    def measure(self, cells: Cells) -> np.ndarray:
        """What the metric needs of these cells, one of `batches`: changes from the base run, [n, column]."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        """Of what it runs on."""
        found = {}
        for name in ("torch", "transformers", self.extra):
            try:
                if name:
                    found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        return found


def in_layer_order(cells: Cells) -> np.ndarray:
    """[n], the numbers of the cells: by their first layer, then position, then pair."""
    return np.lexsort((cells.pair, cells.first_position, cells.first_layer))


def chunks(order: np.ndarray, keys: np.ndarray | None, size: int) -> list[np.ndarray]:
    """Cut `order` into pieces of at most `size`, and where `keys` (of the ordered cells) change."""
    ends: Any = [] if keys is None else np.flatnonzero(np.diff(keys)) + 1
    return [
        part[i : i + size] for part in np.split(order, ends) for i in range(0, len(part), size) if len(part)
    ]
