"""The report of a study: every table and figure with its caption, as Markdown, and every number, as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deltapatch.results.folder import environment
from deltapatch.study.exhibit import FIGURES, TABLES, Exhibit
from deltapatch.study.found import Found
from deltapatch.study.subject import Subject, write_text

REPORT, NUMBERS = "report.md", "study.json"


@dataclass
class Section:
    """Exhibits that belong together, and where their files lie.

    Attributes:
        folder: of its files, relative to the study's.
        found: the experiment, where it is one.
        reasons: what could not be shown, and why.
    """

    title: str
    folder: str
    exhibits: list[Exhibit] = field(default_factory=list)
    found: Found | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def write_report(
    subject: Subject, summary: Section, sections: Sequence[Section], failures: Mapping[str, str]
) -> None:
    """Write report.md and study.json into the subject's folder; the exhibits' files are there already."""
    subject.folder.mkdir(parents=True, exist_ok=True)
    parts = [_head(subject, [s.found for s in sections if s.found], failures), *_section(summary)]
    for section in sections:
        parts += _section(section)
    write_text(subject.folder / REPORT, "\n\n".join(part for part in parts if part) + "\n")
    numbers = {
        "format": "deltapatch study",
        "model": subject.model.name,
        "revision": subject.model.revision,
        "adapter": subject.adapter,
        "fingerprint": subject.model.fingerprint(),
        "spec": asdict(subject.model.spec),
        "device": str(subject.model.device),
        "versions": environment()["versions"],
        "settings": asdict(subject.settings),
        "layer": subject.layer,
        "failures": dict(failures),
        "summary": _numbers(summary),
        "sections": {section.folder: _numbers(section) for section in sections},
    }
    text = json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"
    write_text(subject.folder / NUMBERS, text)


def _head(subject: Subject, founds: Sequence[Found], failures: Mapping[str, str]) -> str:
    spec, settings = subject.model.spec, subject.settings
    versions = environment()["versions"]
    n_pairs, n = sum(len(found.made.pairs) for found in founds), len(founds)
    lines = [
        f"# {subject.title}: what makes it answer",
        f"{spec.n_layers} layers, d_model {spec.d_model}, {spec.n_heads} heads, {spec.d_mlp} hidden neurons "
        "a layer. Protocol of Stolfo, Belinkov and Sachan (2023): clean activations are patched into the "
        f"corrupted prompt, each exactly. {n_pairs:,} prompt pairs of {n} experiment{'' if n == 1 else 's'}, "
        f"seed {settings.seed}, deltapatch {versions['deltapatch']}, PyTorch {versions['torch']}. Every "
        f"number is in [{NUMBERS}]({NUMBERS}).",
    ]
    if subject.paper is not None:
        lines.append(f"This is {subject.paper.name} of the paper: what it reports stands beside ours.")
    if failures:
        reasons = [f"- `{name}`: {why}" for name, why in failures.items()]
        lines.append("## Not done\n\nExperiments that this model cannot do:\n\n" + "\n".join(reasons))
    return "\n\n".join(lines)


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title}"]
    if section.found is not None:
        parts.append(_pairs(section.found))
    for exhibit in section.exhibits:
        parts.append(f"### {exhibit.title}")
        where = f"{section.folder}/" if section.folder else ""
        if exhibit.drawn:
            parts.append(f"![{exhibit.title}]({where}{FIGURES}/{exhibit.name}.png)")
        if exhibit.table is not None:
            parts.append(exhibit.markdown().rstrip("\n"))
        rest = ""
        if exhibit.table is not None and len(exhibit.table) > exhibit.shown:
            file = f"{where}{TABLES}/{exhibit.name}.csv"
            rest = f" The first {exhibit.shown} of {len(exhibit.table):,} rows; [all of them]({file})."
        parts.append(exhibit.caption + rest)
    if section.reasons:
        lines = [f"- {name}: {why}" for name, why in section.reasons.items()]
        parts.append("### Not shown\n\n" + "\n".join(lines))
    if section.found is not None:
        commands = "\n".join(section.found.commands())
        parts.append(f"The same pairs and runs alone:\n\n```bash\n{commands}\n```")
    return parts


def _pairs(found: Found) -> str:
    pair = found.made.pairs[0]
    example = f"`{_line(pair.clean)}` → `{_line(pair.clean_answer)}`"
    other = f"`{_line(pair.corrupted)}` → `{_line(pair.corrupted_answer)}`"
    lines = [
        f"{len(found.made.pairs)} pairs (`{found.experiment.name}`), for example {example} and {other}.",
        *found.made.dropped.lines(),
    ]
    low = found.made.right.mean() < 0.5
    if low:
        lines.append(
            f"The model answers {found.made.right.mean():.0%} of the prompts right: effects say how it goes "
            "wrong as much as how it goes right; --correct-only keeps what it can answer."
        )
    return " ".join(lines)


def _line(text: Any) -> str:
    """A prompt on one line, as code."""
    return str(text).replace("\n", "⏎").replace("`", "'")


def _numbers(section: Section) -> dict[str, Any]:
    out: dict[str, Any] = {"title": section.title}
    if section.found is not None:
        made = section.found.made
        out |= {
            "pairs": len(made.pairs),
            "answers": made.answers,
            "dropped": dict(sorted(made.dropped.reasons.items())),
            "notes": made.dropped.notes,
            "commands": section.found.commands(),
        }
    out["exhibits"] = {exhibit.name: exhibit.numbers() for exhibit in section.exhibits}
    return out | ({"not_shown": section.reasons} if section.reasons else {})


def clear(folder: Path) -> None:
    """Remove the tables and figures of an earlier report: it may have had some that this one has not."""
    for kind, endings in ((TABLES, (".csv", ".md")), (FIGURES, (".png", ".pdf"))):
        for path in (folder / kind).glob("*"):
            if path.suffix in endings:
                path.unlink()
