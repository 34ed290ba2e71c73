"""The exhibits by name: adding one is one function and one entry of EXHIBITS."""

from collections.abc import Callable, Iterator

from deltapatch.study import accuracy, components, mechanism, neurons
from deltapatch.study.exhibit import Exhibit
from deltapatch.study.found import Found

EXHIBITS: dict[str, Callable[[Found], Iterator[Exhibit]]] = {
    "accuracy": accuracy.accuracy,
    "heatmaps": components.heatmaps,
    "operator-heatmaps": components.operator_heatmaps,
    "curves": components.curves,
    "importance": components.importance,
    "magnitudes": components.sizes,
    "predictions": components.predictions,
    "heads": neurons.heads,
    "coordinates": neurons.coordinates,
    "neurons": neurons.neurons,
    "operator-overlap": neurons.operator_overlap,
    "mechanism": mechanism.mechanism,
    "oracle": accuracy.oracle,
}
