"""What commands say of a screened sweep when it is done."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltapatch.results.screened import Screened
    from deltapatch.results.screened_edges import ScreenedEdges
    from deltapatch.results.screened_outcome import ScreenedOutcome


def of_screen(found: "Screened | ScreenedOutcome | ScreenedEdges") -> str:
    """What a screened sweep says of itself, in words."""
    from deltapatch.analysis.calibration import calibration

    verdict = "" if found.verdict is None else f"\n{found.verdict}"
    return f"{found}\n{calibration(found)}\n{found.missed(confidence=found.confidence)}{verdict}"


def screen_as_json(found: "Screened | ScreenedOutcome | ScreenedEdges") -> dict[str, Any]:
    """The same for programs."""
    from deltapatch.analysis.calibration import calibration

    columns = {name: column.tolist() for name, column in calibration(found).columns.items()}
    missed = found.missed(confidence=found.confidence)
    said = {"verified": len(found.verified), "missed": asdict(missed), "calibration": columns}
    return said if found.goal is None else said | {"recall": missed.recall, "reached": found.reached}
