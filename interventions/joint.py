"""Joint patches of some parts: sets of them in every pair, as arrays and never as objects.

A part is a patch that is asked for in all pairs. What each part is in each pair is worked out once; a set of
parts is then a matter of indices.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from deltapatch.arguments import position, several, whole
from deltapatch.errors import DeltapatchError, shown
from deltapatch.interventions.given import Intervention, Listed, Patch, listed_interventions
from deltapatch.interventions.pairs import EncodedPair
from deltapatch.interventions.parts import Part, names_of
from deltapatch.interventions.roles import Roles, check_everywhere
from deltapatch.interventions.sites import find_site
from deltapatch.interventions.table import COLUMNS, TOGETHER, PatchTable
from deltapatch.models.spec import ModelSpec


def checked_parts(parts: object) -> list[Patch]:
    """Parts, given as patches or as (site, layer, position, index).

    Raises:
        DeltapatchError: they are something else, there are fewer than two, or one says who sees it.
    """
    found: list[Patch] = []
    for given in several(parts, "parts", "a list of Patch or of (site, layer, position, index)"):
        if isinstance(given, Part):
            given = astuple(given)
        if isinstance(given, tuple | list) and 3 <= len(given) <= 4:
            given = Patch(*given)
        if not isinstance(given, Patch):
            raise DeltapatchError(
                f"part {len(found)} must be a Patch or (site, layer, position, index), not {shown(given)}"
            )
        if given.into is not None:
            raise DeltapatchError(f"part {len(found)} says `into`, but what is joined is seen by all")
        found.append(given)
    if len(found) < 2:
        raise DeltapatchError(f"{len(found)} part(s) were given, and joining takes at least two")
    return found


@dataclass(frozen=True)
class Joint:
    """Parts in every pair, and joint patches of them.

    Attributes:
        parts: as they were asked for.
        alone: one row for each part of each pair that has it, pair by pair.
        row: [pair, part], which row that is; -1 where the pair does not have the part.
    """

    parts: tuple[Part, ...]
    alone: Listed
    row: np.ndarray

    @classmethod
    def of(
        cls, parts: Sequence[Patch], pairs: Sequence[EncodedPair], spec: ModelSpec, roles: Roles
    ) -> "Joint":
        """Parts as of `checked_parts`, in some pairs.

        Warns:
            where a pair does not have a part.

        Raises:
            DeltapatchError: a part is nowhere, or a pair has none; two parts patch one activation; prompts
                do not line up, and a part is at all positions together; as of `listed_interventions`.
        """
        told = [_told(part, number) for number, part in enumerate(parts)]
        if any(part.position == TOGETHER for part in told):
            check_everywhere(pairs, "parts at all positions together")
        row, single = np.full((len(pairs), len(parts)), -1), list[Intervention]()
        for i, pair in enumerate(pairs):
            for j, part in enumerate(parts):
                places = _places(told[j].position, pair, roles if part.add is None else roles.adding)
                if places:
                    row[i, j] = len(single)
                    single.append(Intervention(i, [replace(part, position=at) for at in places]))
        _check_there(row >= 0, told)
        try:
            alone = listed_interventions(single, pairs, spec, roles)
        except DeltapatchError as error:  # which counts interventions
            named = re.match(r"intervention (\d+)(.*)", str(error))
            if named is None:
                raise
            which = int(np.nonzero(row == int(named[1]))[1][0])
            raise DeltapatchError(f"part {which}{named[2]}") from None
        _check_apart(alone, row, told)
        return cls(tuple(told), alone, row)

    def listed(
        self,
        sets: np.ndarray,
        labels: Mapping[str, np.ndarray],
        *,
        pairs: Sequence[int] | None = None,
        complete: bool = False,
    ) -> Listed:
        """Joint patches of each set in each pair; none where a pair has no part of the set.

        Args:
            sets: [set, part], bool: which parts each joins.
            labels: name -> [set], what is said of each.
            pairs: in which; all by default.
            complete: leave out a set in a pair that does not have all of its parts.
        """
        of_set, of_part = np.nonzero(sets)  # [member]
        row = self.row[:, of_part]  # [pair, member]
        there = row >= 0
        if complete:
            pair, member = np.nonzero(~there)
            lost = np.zeros((len(row), len(sets)), dtype=bool)
            lost[pair, of_set[member]] = True
            there &= ~lost[:, of_set]
        if pairs is not None:
            there[np.setdiff1d(np.arange(len(row)), pairs)] = False
        pair, member = np.nonzero(there)
        kept, joint = np.unique(pair * len(sets) + of_set[member], return_inverse=True)
        if not len(kept):
            raise DeltapatchError("no pair has the parts that are to be joined: nothing is to be patched")
        own = self.alone.table_of_all
        begin = np.searchsorted(own.row, np.arange(own.n_rows + 1))
        size = np.diff(begin)[row[there]]  # patches of each member
        patch = np.repeat(begin[row[there]] - (np.cumsum(size) - size), size) + np.arange(size.sum())
        table = PatchTable(len(kept), kept // len(sets), np.repeat(joint, size), *own.columns(patch))
        own_labels = {name: np.asarray(label)[kept % len(sets)] for name, label in labels.items()}
        return Listed(table, self.alone.vectors, own_labels, parts=self.parts)


def _told(part: Patch, number: int) -> Part:
    where = f"part {number}"
    site, _ = find_site(part.site)
    layer = whole(part.layer, f"{where}: a layer must be a whole number")
    at = position(part.position, f"{where}: a position must be a whole number or a label")
    index = None if part.index is None else whole(part.index, f"{where}: an index must be a whole number")
    return Part(site.name, layer, -1 if at == "last" else at, index)


def _places(at: int | str, pair: EncodedPair, roles: Roles) -> Sequence[int]:
    """Where in a pair's clean prompt a part is: one position, all that "together" joins, or none."""
    if at == TOGETHER:
        return range(roles.first(pair), len(pair.clean))
    place = pair.resolve(at)
    return () if place is None or roles.place(pair, at) is None else (place,)


def _check_there(there: np.ndarray, parts: Sequence[Part]) -> None:
    """Say which parts pairs do not have. DeltapatchError where no pair has one, or a pair has none."""
    names = names_of(parts)
    for part in np.flatnonzero(~there.any(0)).tolist()[:1]:
        raise DeltapatchError(f"part {names[part]} does not exist in any pair: there is no such position")
    for pair in np.flatnonzero(~there.any(1)).tolist()[:1]:
        raise DeltapatchError(f"pair {pair} has none of the parts: leave it out, or ask for other positions")
    lost = np.flatnonzero(~there.all(0)).tolist()
    if lost:
        said = ", ".join(f"{names[part]} in {int((~there[:, part]).sum())}" for part in lost[:3])
        more = f" and {len(lost) - 3} parts more" if len(lost) > 3 else ""
        warnings.warn(f"of {len(there)} pairs some do not have every part: {said}{more}", stacklevel=3)


def _check_apart(alone: Listed, row: np.ndarray, parts: Sequence[Part]) -> None:
    """Raise DeltapatchError where two parts patch one activation in a pair."""
    table = alone.table_of_all
    keys = np.stack([table.pair[table.row], *(getattr(table, name) for name in COLUMNS)], 1)
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which.ravel()] != np.arange(len(keys)))
    if len(again):
        one, other = int(first[which.ravel()[again[0]]]), int(again[0])
        pair, names = int(table.pair[table.row[one]]), names_of(parts)
        a, b = (names[int(np.flatnonzero(row[pair] == table.row[at])[0])] for at in (one, other))
        raise DeltapatchError(
            f"parts {a} and {b} are the same activation in pair {pair}: give each activation once"
        )
