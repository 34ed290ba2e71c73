"""All peers by name. Their modules load when they are asked for, and what they run on when they start."""

from importlib import import_module

from deltapatch.bench.peers.base import Peer
from deltapatch.bench.peers.ours import PREFIX, Ours
from deltapatch.errors import DeltapatchError

# name -> where its class is; the order is that of tables
PEERS = {
    "paper": "paper.Paper",
    "hooks": "hooks.Hooks",
    "tlens-patching": "tlens_patching.TLensPatching",
    "tlens-hooks": "tlens_hooks.TLensHooks",
    "nnsight": "nnsight_loop.NNsightLoop",
    "nnsight-invokes": "nnsight_invokes.NNsightInvokes",
    "pyvene": "pyvene_loop.PyveneLoop",
    "pyvene-batched": "pyvene_batched.PyveneBatched",
    "sae-lens": "saelens_hooks.SaeLensHooks",
    "hooks-batched": "hooks_batched.HooksBatched",
    "hooks-layer": "hooks_layer.HooksLayer",
    "hooks-prefix": "hooks_prefix.HooksPrefix",
    "attribution": "attribution.Attribution",
    "tlens-attribution": "tlens_attribution.TLensAttribution",
    "deltapatch-screen": "screen.Screen",
    "deltapatch-verified": "screen.Verified",
}

# Those that estimate; no exact side is compared with them.
ESTIMATES = ("attribution", "tlens-attribution", "deltapatch-screen", "deltapatch-verified")

# Those that carry out edits alone, which `deltapatch bench compare` has none of.
ONLY_EDITS = ("sae-lens",)


def ours() -> list[str]:
    """deltapatch in each of its precisions but the oracle's."""
    from deltapatch.kernels.product import PRECISIONS

    return [f"{PREFIX}{name}" for name in PRECISIONS if name != "fp64"]


def make_peer(name: str) -> Peer:
    """The peer of that name.

    Raises:
        DeltapatchError: there is none.
    """
    if name.startswith(PREFIX):
        from deltapatch.kernels.product import PRECISIONS

        precision = name.removeprefix(PREFIX)
        if precision in PRECISIONS:
            return Ours(precision)
    if name not in PEERS:
        raise DeltapatchError(f"unknown peer {name!r}: choose from {', '.join([*PEERS, *ours()])}")
    module, kind = PEERS[name].split(".")
    peer: Peer = getattr(import_module(f"deltapatch.bench.peers.{module}"), kind)()
    return peer
