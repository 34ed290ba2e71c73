"""What the program around has switched on in PyTorch, kept away from all that is computed here.

Autocast, default dtypes and devices, inference mode and the precision of float32 products change what the
same operations give, without a word. Effects are what they are promised to be, whatever is switched on.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from deltapatch.errors import DeltapatchError

_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
# Names of tensors that a weight is computed from, and how to make it one of its own.
_COMPUTED = {
    r"(^|\.)parametrizations\.": "torch.nn.utils.parametrize.remove_parametrizations(module, name)",
    r"_(orig|mask)$": "torch.nn.utils.prune.remove(module, name)",
    r"weight_[guv]$": "torch.nn.utils.remove_weight_norm(module)",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Their hooks note what passes by, move tensors between devices, or wait for a trace.
_HARMLESS = ("transformers.", "accelerate.", "nnsight.")


class _OfTheProcess:
    """Settings that threads share: the first that computes here changes them, the last puts them back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: tuple[torch.dtype, list[str]] = (torch.float32, [])

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.get_default_dtype(), [kind.fp32_precision for kind in _PRODUCTS]
                self._set(torch.float32, ["ieee"] * len(_PRODUCTS))
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(*self._before)

    @staticmethod
    def _set(dtype: torch.dtype, precisions: list[str]) -> None:
        torch.set_default_dtype(dtype)
        for kind, precision in zip(_PRODUCTS, precisions, strict=True):
            kind.fp32_precision = precision


_of_the_process = _OfTheProcess()


@contextmanager
def undisturbed(device: torch.device | None = None) -> Iterator[None]:
    """Until the end PyTorch computes as it does when nothing is switched on; then all is as it was.

    Products of float32 keep all their bits, tensors are made on the CPU and in float32 unless told, nothing
    is cast on the way, and no gradients are noted. A function that this decorates runs so as a whole.

    Args:
        device: a GPU to be the current one.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # threads that help have none
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if device is not None and device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        _of_the_process.enter()
        stack.callback(_of_the_process.leave)
        yield


class Shared:
    """A module whose weights a model uses where they are, as they were when it was taken.

    Args:
        module: of transformers, perhaps compiled.
        kind: what a sentence calls it.

    Raises:
        DeltapatchError: see `check`; also a module that computes its weights from other tensors.
    """

    def __init__(self, module: Any, kind: str) -> None:
        self.module, self.kind = module, kind
        self.state: dict[str, Tensor] = self._state()
        for name in self.state:
            for ends, remedy in _COMPUTED.items():
                if re.search(ends, name):
                    raise DeltapatchError(
                        f"{kind} computes a weight from others (it has a tensor {name!r}): make it a plain "
                        f"weight first, by {remedy}"
                    )
        self.check()

    def check(self) -> None:
        """See that the module still computes with these weights, and with nothing else.

        Raises:
            DeltapatchError: it has hooks or a forward of its own, or holds other tensors than it did.
        """
        for name, part in self.module.named_modules():
            at = f"{name or 'the model'} ({type(part).__name__})"
            for hook in (hook for hooks in _HOOKS for hook in getattr(part, hooks).values()):
                if not _is_harmless(hook):
                    raise DeltapatchError(
                        f"{self.kind}: {at} has a forward hook ({_called(hook)}), and deltapatch computes "
                        "with the weights alone: remove the hook first"
                    )
            own = vars(part).get("forward")
            if own is not None and not hasattr(part, "_orig_mod") and not _is_harmless(own):
                raise DeltapatchError(
                    f"{self.kind}: {at} has a forward of its own ({_called(own)}) in place of that of its "
                    "class, and deltapatch computes with the weights alone: remove it first"
                )
        now = self._state()
        if now.keys() != self.state.keys() or any(
            tensor.data_ptr() != self.state[name].data_ptr() for name, tensor in now.items()
        ):
            raise DeltapatchError(
                f"{self.kind} holds other tensors than when it was given to from_transformers (what is "
                "changed in place is seen, what is replaced is not): call from_transformers again"
            )

    def _state(self) -> dict[str, Tensor]:
        state = self.module.state_dict()
        return {name.replace("_orig_mod.", ""): tensor.detach() for name, tensor in state.items()}


def _is_harmless(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a partial
    return str(getattr(function, "__module__", "")).startswith(_HARMLESS)


def _called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
