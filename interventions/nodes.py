"""Nodes: what sends and what receives in a model, under the names of EAP-IG and MIB.

Senders are `input` (the embedding), `a{l}.h{h}` (what head h of layer l adds) and `m{l}` (what an MLP adds).
Receivers are `a{l}.h{h}<q>`, `<k>` and `<v>` (what a head reads for its queries, keys and values), `m{l}`
(what an MLP reads) and `logits` (what the model reads at its end). With `keys="kv"` keys and values are read
once for each key-value head, `a{l}.kv{h}<k>`; else each query head reads its own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from deltapatch.arguments import several
from deltapatch.errors import DeltapatchError, shown
from deltapatch.models.spec import ModelSpec

Keys = Literal["query", "kv"]
READS = ("<q>", "<k>", "<v>", "<mlp>", "<logits>")  # what receivers read, in the order in which rows meet it
Q, K, V, MLP, LOGITS = range(len(READS))
OF_SENDERS = frozenset(("z", "mlp_out"))  # the places at which it is seen what senders say
_MOST = 1 << 10  # layers and heads of a model that a file tells of

_NAME = re.compile(
    r"(?P<kind>[am])(?P<first>\d{1,6})?(?:-(?P<last>\d{1,6}))?(?:\.(?P<of>h|kv)(?P<head>\d{1,6}))?(?:<(?P<reads>[qkv])>)?"
)


class Receiver(NamedTuple):
    """What receives.

    Attributes:
        layer: the last one, of the logits.
        reads: a number of READS.
        head: 0 where it is no head.
    """

    layer: int
    reads: int
    head: int


@dataclass(frozen=True)
class Nodes:
    """All that sends and receives in models of one shape.

    Attributes:
        n_layers, n_heads, n_kv_heads, parallel: of the model.
        keys: whether keys and values are read by every query head or by every key-value head.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    keys: Keys = "query"

    @classmethod
    def of(cls, spec: ModelSpec, keys: Keys = "query") -> "Nodes":
        """Those of a model."""
        return cls(spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.parallel, keys)

    def as_array(self) -> np.ndarray:
        """As a file keeps them: [5], the numbers of layers and heads, parallel, and whether keys are "kv"."""
        return np.array(
            [self.n_layers, self.n_heads, self.n_kv_heads, self.parallel, self.keys == "kv"], np.int64
        )

    @classmethod
    def of_array(cls, array: np.ndarray) -> "Nodes":
        """What `as_array` gave. ValueError where it makes no sense."""
        if array.shape != (5,) or array.dtype != np.int64:
            raise ValueError("nodes")
        n_layers, n_heads, n_kv_heads, parallel, kv = array.tolist()
        nodes = cls(n_layers, n_heads, n_kv_heads, bool(parallel), "kv" if kv else "query")
        nodes.check()
        if not {parallel, kv} <= {0, 1}:
            raise ValueError("nodes")
        return nodes

    def check(self) -> None:
        """Check what a file says. ValueError where it makes no sense."""
        sizes = (self.n_layers, self.n_heads, self.n_kv_heads)
        if any(type(n) is not int or not 0 < n < _MOST for n in sizes) or self.n_heads % self.n_kv_heads:
            raise ValueError("nodes")
        if type(self.parallel) is not bool or self.keys not in ("query", "kv"):
            raise ValueError("nodes")

    @property
    def n_senders(self) -> int:
        """How many nodes send."""
        return 1 + self.n_layers * (self.n_heads + 1)

    def attention(self, layer: int) -> int:
        """The number of the first head of a layer among the senders; all before it speak before it."""
        return 1 + layer * (self.n_heads + 1)

    def mlp(self, layer: int) -> int:
        """The number of a layer's MLP among the senders."""
        return self.attention(layer) + self.n_heads

    def heads(self, reads: int) -> int:
        """How many heads read that in a layer."""
        if reads >= MLP:
            return 1
        return self.n_kv_heads if self.keys == "kv" and reads != Q else self.n_heads

    def heads_of(self, reads: np.ndarray) -> np.ndarray:
        """The same for many."""
        return np.array([self.heads(i) for i in range(len(READS))])[reads]

    def group(self, reads: int, head: int) -> slice:
        """The query heads that see a change of what a head reads."""
        if self.heads(reads) == self.n_heads:
            return slice(head, head + 1)
        each = self.n_heads // self.n_kv_heads
        return slice(head * each, (head + 1) * each)

    def before(self, receiver: Receiver) -> int:
        """How many senders speak before a receiver reads: the first ones."""
        if receiver.reads == LOGITS:
            return self.n_senders
        first = self.attention(receiver.layer)
        return first + (self.n_heads if receiver.reads == MLP and not self.parallel else 0)

    @cached_property
    def senders(self) -> list[str]:
        """Their names, in order."""
        out = ["input"]
        for l in range(self.n_layers):
            out += [*(f"a{l}.h{h}" for h in range(self.n_heads)), f"m{l}"]
        return out

    @cached_property
    def receivers(self) -> dict[str, Receiver]:
        """By name, in order."""
        out = {}
        for l in range(self.n_layers):
            for reads in (Q, K, V):
                of = "kv" if self.keys == "kv" and reads != Q else "h"
                for h in range(self.heads(reads)):
                    out[f"a{l}.{of}{h}{READS[reads]}"] = Receiver(l, reads, h)
            out[f"m{l}"] = Receiver(l, MLP, 0)
        return out | {"logits": Receiver(self.n_layers - 1, LOGITS, 0)}

    def choose_senders(self, given: str | Sequence[str]) -> list[int]:
        """The numbers of some senders, ascending. DeltapatchError where there is no such one."""
        found = self._chosen(given, "sender", self.senders)
        return [i for i, name in enumerate(self.senders) if name in found]

    def choose_receivers(self, given: str | Sequence[str]) -> list[str]:
        """The names of some receivers, in order. DeltapatchError where there is no such one."""
        found = self._chosen(given, "receiver", list(self.receivers))
        return [name for name in self.receivers if name in found]

    def _chosen(self, given: str | Sequence[str], what: str, names: list[str]) -> set[str]:
        """All that some names, layers and ranges name."""
        out: set[str] = set()
        for item in several(given, f"{what}s", f"'all' or names such as {names[1]}"):
            if not isinstance(item, str):
                raise DeltapatchError(f"a {what} must be a name such as {names[1]}, not {shown(item)}")
            for text in filter(None, map(str.strip, item.split(","))):
                out |= _meant(text, what, names)
        if not out:
            raise DeltapatchError(f"no {what}s were given: name at least one, or 'all'")
        return out

    def edges(self, senders: Sequence[int], receivers: Sequence[str]) -> np.ndarray:
        """[edge, (sender, receiver)]: all edges between some; receivers count in `receivers`.

        Those of one receiver come together, in the order of their senders.
        """
        some = np.asarray(senders, dtype=np.int64)
        out = []
        for i, name in enumerate(receivers):
            mine = some[some < self.before(self.receivers[name])]
            out.append(np.stack([mine, np.full(len(mine), i)], 1))
        return np.concatenate(out)

    @property
    def n_edges(self) -> int:
        """How many edges there are between all."""
        return sum(self.before(receiver) for receiver in self.receivers.values())


def _meant(text: str, what: str, names: list[str]) -> set[str]:
    """The nodes that a text means. DeltapatchError where there are none."""
    if text == "all":
        return set(names)
    if text in names:
        return {text}
    found = {name for name in names if _names(text, name)}
    if not found:
        raise DeltapatchError(
            f"unknown {what} {shown(text)}: this model has {_few(names)}; a3 is a layer, a0-5 a range of "
            "layers, m all MLPs"
        )
    return found


def _names(text: str, name: str) -> bool:
    """Whether a text such as a3, a0-5<q>, m or a.h3 names a node among others."""
    pattern, node = _NAME.fullmatch(text), _NAME.fullmatch(name)
    if pattern is None or node is None or pattern["kind"] != node["kind"]:
        return False
    if pattern["first"] is not None:
        first = int(pattern["first"])
        if not first <= int(node["first"]) <= int(pattern["last"] or first):
            return False
    elif pattern["last"] is not None:
        return False
    if pattern["head"] is not None and (pattern["of"], pattern["head"]) != (node["of"], node["head"]):
        return False
    return pattern["reads"] in (None, node["reads"])


def _few(names: list[str]) -> str:
    """Some of the names, for a sentence."""
    return f"{', '.join(names[:4])}, ..., {names[-1]}"
