"""How long a run will take: the FLOPs, numbers and bytes of its plan over the rates of this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltapatch.engine.audit import Audit
from deltapatch.engine.passes import at_work
from deltapatch.engine.planning.costs import layer_parameters
from deltapatch.engine.planning.plan import Plan, plan
from deltapatch.engine.planning.rates import Rates, measure
from deltapatch.engine.question import Question
from deltapatch.engine.wavefront.layout import how_many_blocks
from deltapatch.engine.wavefront.pool import shared
from deltapatch.kernels.product import PRECISIONS, Precision
from deltapatch.kernels.readout_tail import worth_a_tail
from deltapatch.models.spec import ModelSpec

# Operations of a block in a layer, and of a pass in a layer, whatever their sizes.
_CALLS, _CALLS_OF_PASS = 200, 800
# Numbers worked through, for each of a token's d_model, n_heads x keys and read-out entries, in units of what
# the activation of a hidden neuron takes.
_NORMS, _SCORES, _ENTRIES = 4.0, 2.0, 0.5
# What runs by itself, from the cache, in a measurement is slower beside all the rest.
BESIDE_OTHERS = 0.85
_EXPANDED = 0.15  # of a read-out that is expanded, what is left (readout_tail.py)
_ROWS_MADE = 1e6  # interventions a second that tables are made of, cut and put together again


@dataclass(frozen=True)
class Forecast:
    """A plan and what it will take.

    Attributes:
        plan: rows, passes, FLOPs, memory.
        precision: that the run is expected to take.
        seconds: by what they are spent on; None where nothing was measured.
    """

    plan: Plan
    precision: str
    seconds: dict[str, float] | None

    @property
    def total(self) -> float | None:
        """Seconds in all."""
        return None if self.seconds is None else sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For people and programs."""
        found: dict[str, Any] = {**self.plan.as_dict(), "precision": self.precision}
        if self.seconds is not None:
            parts = {name: round(s, 3) for name, s in self.seconds.items()}
            found |= {"predicted_seconds": round(sum(self.seconds.values()), 3), "seconds_by_part": parts}
        return found


def forecast(question: Question, timed: bool = True) -> Forecast:
    """What a sweep or run will do, and how long it will take.

    Args:
        question: what is asked.
        timed: see how fast this machine is, for a second or so.

    Raises:
        DeltapatchError: the memory budget has no room for one intervention.
    """
    return forecasts([question], timed)[0]


def forecasts(questions: Sequence[Question], timed: bool = True) -> list[Forecast]:
    """The same for several questions about one model: its rates are measured once for each precision."""
    known: dict[str, Rates] = {}
    out = []
    with at_work(questions[0]) as pool:
        for question in questions:
            audit = Audit(question, pool)
            precision = question.precision or audit.expected()
            found = plan(question, precision, pool.count)
            spent = None
            if timed:
                if precision.name not in known:
                    known[precision.name] = measure(question, precision, pool)
                spent = seconds(question, found, precision, known[precision.name], audit, pool.count)
            out.append(Forecast(found, precision.name, spent))
    return out


def seconds(
    question: Question, plan: Plan, precision: Precision, rates: Rates, audit: Audit, threads: int
) -> dict[str, float]:
    """What a run spends its time on.

    Args:
        question, plan: the run.
        precision: that it takes.
        rates: of this machine.
        audit: of the run.
        threads: that share the blocks.
    """
    spec, model, n_passes = question.model.spec, question.model, len(plan.passes)
    layer, n_layers = layer_parameters(spec), spec.n_layers
    keys = max(run.length for run in question.runs)
    beside = numbers_beside(spec, keys)
    base, reads = (sum(getattr(used, name) for used in plan.passes) for name in ("base_tokens", "reads"))
    row_reads = sum(used.row_reads for used in plan.passes)
    flying = float(plan.in_flight.sum())
    # A pass has as many blocks in each layer as its share of the rows makes, and one for its prompts.
    tokens = int(flying / max(1, n_layers) / n_passes)
    in_blocks = shared(how_many_blocks(tokens, question.backend.block_tokens), threads)
    blocks = how_many_blocks(tokens, question.backend.block_tokens, threads if in_blocks else 1) + 1
    calls = n_passes * n_layers * (blocks * _CALLS + _CALLS_OF_PASS)

    runs = (1 + question.n_sources) * base * n_layers
    unpatched = runs * (2 * layer / rates.exact + beside / rates.numbers)
    rows = flying * (2 * layer / rates.products + beside / rates.numbers)
    entries = spec.d_vocab * spec.d_model
    share = _EXPANDED if _expands(question, precision, row_reads, reads) else 1.0
    of_a_read = 2 * entries / rates.read_out + _ENTRIES * spec.d_vocab / rates.numbers
    read_out = row_reads * share * of_a_read + reads * 4 * of_a_read
    converted = model.dtype != precision.base or precision is not precision.exact
    weights = n_passes * n_layers * layer / rates.weights if converted else 0.0
    found = {
        "unpatched runs": unpatched,
        "rows": rows,
        "read-out": read_out,
        "weights": weights,
        # Blocks that go side by side share them; else one thread makes them all.
        "calls": calls / rates.calls * (max(1.0, threads / blocks) if in_blocks else threads),
        "tables": plan.rows / _ROWS_MADE,
    }
    for name in audit.expects() if audit.sample else []:
        again = audit.takes() / rates.exact / (1 if PRECISIONS[name].base.itemsize == 8 else 2)
        found["noise floor"] = found.get("noise floor", 0.0) + again
    found = {name: spent / BESIDE_OTHERS for name, spent in found.items()}
    if model.stream:  # what is computed meanwhile hides some of it
        reading = n_passes * model.n_bytes / rates.file
        found["waiting for the file"] = max(reading - sum(found.values()), reading / max(1, n_layers))
    return found


def numbers_beside(spec: ModelSpec, keys: int) -> float:
    """Numbers of a token in a layer that are worked through beside products, with so many keys."""
    return spec.d_mlp + _NORMS * spec.d_model + _SCORES * spec.n_heads * keys


def _expands(question: Question, precision: Precision, row_reads: int, reads: int) -> bool:
    spec, per_read = question.model.spec, row_reads // max(1, reads)
    return question.backend.expands and worth_a_tail(
        per_read, spec.d_vocab, spec.d_model, precision, question.measured
    )
