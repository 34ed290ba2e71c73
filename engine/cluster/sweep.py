"""Sweeps on a Ray cluster: its workers carry the passes of one plan out, this process keeps what they find.

Only this process, the driver, touches the run folder. So the cluster needs no shared file system for it, and
a run survives what the runs of one process survive. The driver loads no model: the first worker plans.
"""

import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from deltapatch.engine.cluster.team import Team
from deltapatch.engine.cluster.worker import Report, Request
from deltapatch.engine.options import EdgeOptions, Options, ScreenOptions, SweepOptions
from deltapatch.engine.progress import progress_bar
from deltapatch.errors import DeltapatchError
from deltapatch.interventions.given import Intervention, checked
from deltapatch.interventions.pairs_file import Pairs, as_pairs
from deltapatch.results.checkpoint import unfinished
from deltapatch.results.edge_effects import EdgeEffects
from deltapatch.results.effects import Effects
from deltapatch.results.folder import RUN, check_output
from deltapatch.results.measured import Found
from deltapatch.results.merge import join
from deltapatch.results.outcome import Outcome


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which workers carry passes out.

    Attributes:
        address: of the cluster, as `ray.init` takes it: "auto", "host:port" or "local". By default the one
            that this process is connected to, that RAY_ADDRESS names or that runs on this machine; else one
            is started here until the end.
        cpus: make workers of so many CPUs each. By default each is one GPU.
        loading: other arguments of `load_model`.
        names: what errors call each pair; its line in a file, else "pair 0" and so on by default.
        told: is called with what the first worker says of the model and the sweep.
    """

    address: str | None = None
    cpus: int | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] | None = None
    told: Callable[[Report], object] = lambda report: None


def ray_sweep(
    model: str | PathLike[str], pairs: Pairs, cluster: Cluster | None = None, **options: Any
) -> Effects:
    """`sweep`, with its passes spread over the workers of a Ray cluster; the bytes are those of one process.

    Every machine must have the same deltapatch, torch and kind of device, and must see the model: a path on a
    shared file system, or a hub id. A worker that differs is left out, with a warning. A pass whose worker is
    lost is carried out by another one.

    Args:
        model: a folder or hub id, as `load_model` takes it.
        pairs: prompt pairs, as `sweep` takes them.
        cluster: the workers.
        options: of `sweep`; `out`, which only this process needs to see, is needed. With `resume`, `out` may
            hold a run of the same sweep that was cut off, on Ray or not; not a finished one.

    Raises:
        DeltapatchError: bad input, Ray is not installed, the cluster cannot be reached or has no such
            workers, or a pass fails again and again.
    """
    asked = SweepOptions(**options)
    _check_unscreened(asked, "sweep")
    found = _spread(model, pairs, cluster or Cluster(), asked, None)
    assert isinstance(found, Effects)
    return found


def ray_sweep_edges(
    model: str | PathLike[str], pairs: Pairs, cluster: Cluster | None = None, **options: Any
) -> EdgeEffects:
    """`sweep_edges`, spread likewise. Raises what `ray_sweep` raises."""
    asked = EdgeOptions(**options)
    _check_unscreened(asked, "sweep_edges")
    found = _spread(model, pairs, cluster or Cluster(), asked, None)
    assert isinstance(found, EdgeEffects)
    return found


def _check_unscreened(asked: ScreenOptions, function: str) -> None:
    """Raise DeltapatchError where a screen is asked for, which `function` can do."""
    if asked.screen is not None:
        raise DeltapatchError(
            f"a screened sweep is not spread over a cluster: leave out screen, or use {function}"
        )


def ray_run(
    model: str | PathLike[str],
    pairs: Pairs,
    interventions: Intervention | Sequence[Intervention],
    cluster: Cluster | None = None,
    **options: Any,
) -> Outcome:
    """`run`, spread likewise. Raises what `ray_sweep` raises."""
    found = _spread(model, pairs, cluster or Cluster(), Options(**options), checked(interventions))
    assert isinstance(found, Outcome)
    return found


def _spread(
    model: str | PathLike[str],
    pairs: Pairs,
    cluster: Cluster,
    options: Options,
    interventions: list[Intervention] | None,
) -> Found:
    if options.out is None or options.shard is not None:
        raise DeltapatchError("a run on Ray needs an output folder (out), and takes no shard")
    pairs, own = as_pairs(pairs)
    path, cpus = Path(options.out), cluster.cpus
    reader = "load_outcome" if interventions is not None else "load_effects"
    reader = "load_edges" if isinstance(options, EdgeOptions) else reader
    finished = f"run {path} is finished already: {reader} reads it"
    if (path / RUN).is_file():
        raise DeltapatchError(finished)
    if not options.resume:
        check_output(path)
    loading = dict(cluster.loading)
    loading["device"] = _device(loading.get("device", "auto"), cpus)
    if loading.get("adapter") is not None:
        loading["adapter"] = _everywhere(loading["adapter"])
    names = cluster.names or own
    request = Request(_everywhere(model), loading, pairs, names, options, interventions, cpus)
    with _connected(cluster.address) as ray:
        size, share = _room(ray, cpus)
        resources: dict[str, float] = {"num_gpus": 1, "num_cpus": 1} if cpus is None else {"num_cpus": cpus}
        with (
            unfinished(path, options.resume) as run,
            closing(Team(ray, request, resources, size, run.state)) as team,
        ):
            if run.finished:
                raise DeltapatchError(finished)
            first, report = team.first()
            cluster.told(report)
            for text in report.warnings:
                warnings.warn(text, stacklevel=3)
            if run.manifest is None:
                manifest, encoded, given = team.ask(first.plan.remote(share))
                run.begin(replace(manifest, meta=manifest.meta | {"model": str(model)}), encoded, given)
            assert run.manifest is not None
            team.ask(first.adopt.remote(run.manifest, str(path)))
            row_layers = team.ask(first.row_layers.remote())
            if len(row_layers) != run.manifest.n_passes:
                raise DeltapatchError(f"cannot resume {path}: its plan is damaged; remove it and run again")
            missing = run.missing(len(row_layers))
            with progress_bar("patching", sum(row_layers), options.progress) as tick:
                tick(sum(row_layers) - sum(row_layers[number] for number in missing))
                for number, found in team.carry_out(missing, row_layers, run.manifest, str(path), tick):
                    run.keep(number, found)
            return join(run)


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module ray, connected to a cluster; until the end, unless it was before.

    Raises:
        DeltapatchError: Ray is not installed, or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise DeltapatchError(
            "a sweep on Ray needs Ray, which is not installed: pip install 'deltapatch[ray]'"
        ) from error
    _check_reachable(address)
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", here):
            raise DeltapatchError(f"this process is connected to another Ray cluster already, at {here}")
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
        where = f"at {address}" if address else "on this machine"
        raise DeltapatchError(
            f"the Ray cluster {where} cannot be used ({str(error).strip().splitlines()[0]}): "
            "see that it has the same version of Ray and, where it wants a token, set RAY_AUTH_MODE=token"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Knock at a cluster's door: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\s/]+?)\]?:(\d{1,5})", address or "")
    if found is None:
        if address in (None, "auto", "local"):
            return
        raise DeltapatchError(f"Ray address {address!r} means nothing: give host:port, auto or local")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DeltapatchError(
            f"there is no Ray cluster at {address} ({why}): start one with `ray start`"
        ) from error


def _room(ray: Any, cpus: int | None) -> tuple[int, int]:
    """How many workers the cluster has room for, and how many share a machine at most.

    Raises:
        DeltapatchError: none.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind, size = ("GPU", 1) if cpus is None else ("CPU", cpus)
    rooms = [int(machine.get(kind, 0)) // size for machine in machines]
    if sum(rooms):
        return sum(rooms), max(rooms)
    if cpus is None:
        raise DeltapatchError(
            "the Ray cluster has no GPUs: for workers on CPUs, say how many each may use (--ray-cpus N)"
        )
    most = max((int(machine.get("CPU", 0)) for machine in machines), default=0)
    raise DeltapatchError(f"no machine of the Ray cluster has {cpus} CPUs: the largest has {most}")


def _device(device: object, cpus: int | None) -> str:
    """Of each worker. DeltapatchError where it is not what the workers have."""
    kind = "cuda" if cpus is None else "cpu"
    if str(device) not in ("auto", kind):
        other = "leave out --ray-cpus" if cpus is not None else "give --ray-cpus N"
        raise DeltapatchError(
            f"device {str(device)!r} does not go with workers on {kind}: {other}, or the device"
        )
    return kind


def _everywhere(model: str | PathLike[str]) -> str:
    """A local folder by its whole path: workers have working folders of their own."""
    return str(Path(model).expanduser().resolve()) if Path(model).expanduser().exists() else str(model)
