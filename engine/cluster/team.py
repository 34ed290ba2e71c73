"""The workers of a sweep on a Ray cluster: hired, given passes, and replaced when they are lost.

A pass that is lost with its worker, or that fails for a reason of the machine (no memory, a broken GPU), is
carried out again by another worker. A DeltapatchError is a reason of the sweep: it would come again anywhere.
"""

import platform
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltapatch.engine.cluster.worker import Report, Request, Worker
from deltapatch.errors import DeltapatchError
from deltapatch.results.manifest import Manifest
from deltapatch.results.measured import PassEffects

_TRIES = 3  # of a pass, and of the first worker
_PATIENCE = 30.0  # seconds without room in the cluster after which that is said
_WATCH = 1.0  # seconds from one look at the progress of workers to the next


@dataclass(eq=False)
class _Member:
    actor: Any
    where: str = ""  # its machine and process; "" until it is there
    fits: bool = False  # whether it has taken over the plan
    number: int | None = None  # the pass that it carries out
    shown: int = 0  # what the bar shows of it
    asked: Any = None  # the reference of a question about its progress


class Team:
    """The workers.

    Args:
        ray: the module, connected.
        request: what they are to do.
        resources: of a worker, as `ray.remote` takes them.
        size: the most workers at once.
        state: says what is kept when no worker can go on.
    """

    def __init__(
        self,
        ray: Any,
        request: Request,
        resources: dict[str, float],
        size: int,
        state: Callable[[], str],
    ) -> None:
        self._ray, self._size, self._state = ray, size, state
        self._request = ray.put(request)
        self._kind = ray.remote(
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
            concurrency_groups={"watch": 1},
            **resources,
        )(Worker)
        self._members: list[_Member] = []
        self._waiting: dict[Any, _Member] = {}  # reference -> who will answer it
        self._lost: Counter[int] = Counter()  # pass -> how often

    def close(self) -> None:
        """Send all away."""
        for member in list(self._members):
            self._dismiss(member)

    def first(self) -> tuple[Any, Report]:
        """A first worker that has loaded the model and checked the sweep, and its report.

        Raises:
            DeltapatchError: something is wrong with them, or no worker starts.
        """
        for _ in range(_TRIES):
            member = self._hire()
            try:
                self._await(member)
                report: Report = self._ray.get(member.actor.start.remote(self._request))
            except self._ray.exceptions.RayError as error:
                self._dismiss(member)
                if mistake := _mistake(error, member):
                    raise mistake from error
                why = _why(error)
            else:
                return member.actor, report
        raise DeltapatchError(f"no Ray worker starts: {why}")

    def ask(self, reference: Any) -> Any:
        """What the first worker answers. DeltapatchError where something is wrong, or it is lost."""
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            member = self._members[0]
            raise _mistake(error, member) or DeltapatchError(
                f"Ray worker {member.where} failed ({_why(error)}): run the sweep again"
            ) from error

    def carry_out(
        self,
        numbers: Sequence[int],
        row_layers: Sequence[int],
        manifest: Manifest,
        folder: str,
        tick: Callable[[int], None],
    ) -> Iterator[tuple[int, PassEffects]]:
        """Carry passes out: each with what it finds, in the order in which they are done.

        Args:
            numbers: of the passes.
            row_layers: of every pass of the plan, what it adds to the progress bar.
            manifest: the plan, which the first worker has taken over.
            folder: where it lies, for messages.
            tick: advances the progress bar; it goes back where a pass was lost.

        Raises:
            DeltapatchError: what passes find is not finite, a pass is lost again and again, or no worker is
                left.
        """
        todo = deque(numbers)
        plan = self._ray.put(manifest)
        for member in list(self._members):
            member.fits = True
            self._give(member, todo)
        while todo or any(m.number is not None for m in self._members):
            while len(self._members) < min(self._size, self._busy() + len(todo)):
                self._hire()
            ready, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=_WATCH)
            if not ready:
                self._watch(tick)
                continue
            member = self._waiting.pop(ready[0])
            try:
                answer = self._ray.get(ready[0])
            except self._ray.exceptions.RayError as error:
                self._failed(member, error, todo, tick)
                continue
            if not member.where:
                member.where = answer
                self._waiting[member.actor.join.remote(self._request, plan, folder)] = member
                continue
            if member.fits:
                assert member.number is not None
                tick(row_layers[member.number] - member.shown)
                yield member.number, answer
            member.fits = True
            self._give(member, todo)

    def _busy(self) -> int:
        return sum(m.number is not None for m in self._members)

    def _hire(self) -> _Member:
        member = _Member(self._kind.remote())
        self._members.append(member)
        self._waiting[member.actor.where.remote()] = member
        return member

    def _dismiss(self, member: _Member) -> None:
        self._members.remove(member)
        self._waiting = {ref: m for ref, m in self._waiting.items() if m is not member}
        self._ray.kill(member.actor)

    def _await(self, member: _Member) -> None:
        """Wait until a worker is there, and say so where it takes long."""
        (reference,) = self._waiting
        if not self._ray.wait([reference], timeout=_PATIENCE)[0]:
            warnings.warn("the Ray cluster has no room for a worker yet: waiting", stacklevel=3)
        member.where = self._ray.get(reference)
        del self._waiting[reference]

    def _give(self, member: _Member, todo: deque[int]) -> None:
        """The next pass, if there is one; else the worker is sent away."""
        member.number, member.shown, member.asked = None, 0, None
        if not todo:
            self._dismiss(member)
            return
        member.number = todo.popleft()
        self._waiting[member.actor.carry_out.remote(member.number)] = member

    def _watch(self, tick: Callable[[int], None]) -> None:
        """Show the progress inside passes."""
        for member in self._members:
            if member.number is None:
                continue
            if member.asked is None:
                member.asked = member.actor.progress.options(concurrency_group="watch").remote()
            elif self._ray.wait([member.asked], timeout=0)[0]:
                try:
                    done = self._ray.get(member.asked)
                except self._ray.exceptions.RayError:
                    continue  # its pass fails as well
                tick(done - member.shown)
                member.shown, member.asked = done, None

    def _failed(
        self, member: _Member, error: Exception, todo: deque[int], tick: Callable[[int], None]
    ) -> None:
        """Send a worker away that was lost or does not fit; its pass is to be done again."""
        number, why = member.number, _why(error)
        self._dismiss(member)
        if number is None:
            self._size -= 1
            who = f"Ray worker {member.where}" if member.where else "a Ray worker"
            if not self._size:
                raise DeltapatchError(
                    f"{who} does not start ({why}), and no other is left; {self._state()}"
                ) from error
            warnings.warn(f"{who} is left out: {why}", stacklevel=3)
            return
        if mistake := _mistake(error, member):
            raise mistake from error
        tick(-member.shown)
        self._lost[number] += 1
        if self._lost[number] == _TRIES:
            raise DeltapatchError(
                f"pass {number} failed on {_TRIES} Ray workers, the last time on {member.where} ({why}); "
                f"where memory is short, a smaller memory budget helps; {self._state()}"
            ) from error
        warnings.warn(f"Ray worker {member.where} failed ({why}): pass {number} is done again", stacklevel=3)
        todo.appendleft(number)


def _mistake(error: Exception, member: _Member) -> DeltapatchError | None:
    """The DeltapatchError that a worker raised, with its machine where that is another one."""
    cause = getattr(error, "cause", None)
    if not isinstance(cause, DeltapatchError):
        return None
    here = member.where.startswith(f"{platform.node()} ")
    return DeltapatchError(str(cause) if here else f"on Ray worker {member.where}: {cause}")


def _why(error: Exception) -> str:
    """The reason of a failure, in a few words."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DeltapatchError):
        text = str(cause)
    elif isinstance(cause, Exception):
        text = f"{type(cause).__name__}: {cause}".split("\n")[0]
    else:  # Ray's own words, which end with what happened
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        text = lines[-1].split(" Worker exit type")[0] if lines else type(error).__name__
    return text[:300].rstrip(".")
