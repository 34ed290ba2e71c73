"""The model as users and the engine hold it: a spec, weights by layer, a tokenizer, plain logits."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deltapatch import markup
from deltapatch.errors import DeltapatchError
from deltapatch.models.forward import block, contexts, readout
from deltapatch.models.model_weights import ModelWeights, PassWeights
from deltapatch.models.spec import ModelSpec
from deltapatch.models.surroundings import undisturbed
from deltapatch.models.weights import EndWeights, LayerWeights, cast


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: the path, hub id or name that it was loaded by.
        again: makes such a model again; None where nothing can.
        revision: of the hub, that was asked for.
        commit: of the hub, the one that it is.
    """

    name: str
    again: Callable[[], "Model"] | None = None
    revision: str | None = None
    commit: str | None = None


class Model:
    """A decoder-only model. Made by `load_model` and `from_transformers`.

    Args:
        weights: of its layers, or of the first of them.
        origin: where it came from.
        find_tokenizer: gives its tokenizer, when that is first asked for.
        spec, n_bytes: of a stand-in, which has more layers than weights.

    Attributes:
        spec: shapes and kinds.
        name: the path, hub id or name that it was loaded by.
        device: where the engine computes.
        dtype: what the weights are stored in (of a mixed checkpoint, its matrices).
        stream: whether layers are read from the file in every pass, rather than kept.
        n_bytes: of all weights, as they are stored.
        revision: of the hub, that was asked for; commit, the one that it is.
    """

    def __init__(
        self,
        weights: ModelWeights,
        origin: Origin,
        *,
        find_tokenizer: Callable[[], Any] = lambda: None,
        spec: ModelSpec | None = None,
        n_bytes: int | None = None,
    ) -> None:
        checkpoint = weights.checkpoint
        self.spec: ModelSpec = spec or checkpoint.spec
        self.name, self.revision, self.commit = origin.name, origin.revision, origin.commit
        self.device, self.dtype, self.stream = checkpoint.device, checkpoint.dtype, weights.stream
        self.n_bytes = checkpoint.n_bytes if n_bytes is None else n_bytes
        self._weights, self._origin, self._find_tokenizer = weights, origin, find_tokenizer

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"Model({self.title!r}, {s.architecture}, {s.n_layers} layers, d_model {s.d_model}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}{', streamed' if self.stream else ''})"
        )

    def _repr_html_(self) -> str:
        s = self.spec
        rows = [
            ("architecture", s.architecture),
            ("layers", s.n_layers),
            ("d_model", s.d_model),
            (
                "heads",
                s.n_heads if s.n_heads == s.n_kv_heads else f"{s.n_heads}, keys and values {s.n_kv_heads}",
            ),
            ("neurons of an MLP", s.d_mlp),
            ("vocabulary", s.d_vocab),
            ("context", s.context),
            ("weights", f"{self.n_bytes / 1e6:,.1f} MB, {str(self.dtype).removeprefix('torch.')}"),
            ("device", f"{self.device}{', streamed' if self.stream else ''}"),
        ]
        return markup.table(self.title, rows)

    def __copy__(self) -> "Model":
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made again from where the model came from: files are read again."""
        if self._origin.again is None:
            raise DeltapatchError(
                f"{self!r} cannot be pickled or copied: only models of load_model and from_transformers can"
            )
        return _made_again, (self._origin, self._origin.again, self.spec.n_layers)

    @property
    def title(self) -> str:
        """Its name, with its revision where one was asked for."""
        return self.name if self.revision is None else f"{self.name} at {self.revision}"

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are in memory of their own: none where they are pages of a mapped file."""
        return self.n_bytes if self._weights.checkpoint.makes_tensors and not self.stream else 0

    @property
    def holds_what_it_reads(self) -> bool:
        """Whether streamed layers take memory of their own while they are used."""
        return self.stream and self._weights.checkpoint.makes_tensors

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the model, loaded when first asked for, or None."""
        return self._find_tokenizer()

    def reading(self) -> AbstractContextManager[PassWeights]:
        """One pass over the weights: all layers in order, and then the ends.

        Those of a streamed model are read ahead by a thread, and the caller drops them when it is done. Its
        ends come without an embedding that nothing else is tied to.

        Raises:
            DeltapatchError: streamed weights hold NaN or infinity; a module that is shared with the program
                has got hooks or other weights.
        """
        return self._weights.reading(self.spec.n_layers)

    def read_some(self, n_bytes: int) -> int:
        """Read about so much of a streamed model, to see how fast that is: how many bytes it was."""
        return self._weights.read_some(n_bytes)

    def first_layers(self, n: int) -> "Model":
        """The same model, sharing its weights, with only the first of its layers."""
        part = self.__copy__()
        part.spec = replace(self.spec, n_layers=min(n, self.spec.n_layers))
        return part

    @undisturbed()
    def layer(self, index: int, dtype: torch.dtype | None = torch.float32) -> LayerWeights:
        """The weights of one block on the model's device.

        Tensors that are stored in that dtype are shared, others are converted for the caller to drop; without
        a dtype all are shared. With `stream` they are read from the file now.

        Raises:
            IndexError: there is no such layer.
            DeltapatchError: streamed weights hold NaN or infinity.
        """
        if not 0 <= index < self.spec.n_layers:
            raise IndexError(f"layer {index} of a model with {self.spec.n_layers} layers")
        return cast(self._weights.layer(index), self.device, dtype)

    @undisturbed()
    def ends(self, dtype: torch.dtype | None = torch.float32) -> EndWeights:
        """Embedding, final norm and unembedding on the model's device, shared as those of `layer`."""
        return cast(self._weights.ends(), self.device, dtype)

    @undisturbed()
    def embed(
        self, token_ids: Tensor, dtype: torch.dtype = torch.float32, *, positions: Tensor | None = None
    ) -> Tensor:
        """resid_pre of layer 0, [..., d_model], for token ids [...]: only the chosen rows are converted.

        Without their positions, [...], what learned ones would add is left out.
        """
        x = self._weights.embeddings(token_ids).to(device=self.device, dtype=dtype)
        if self.spec.embedding_scale != 1:
            scale = torch.tensor(self.spec.embedding_scale, dtype=torch.float64)
            if self.spec.round_embedding_scale:
                # transformers keeps it in a buffer, of float32 at most, and takes it in the weights' dtype.
                scale = scale.to(self.dtype if self.dtype.itemsize < 4 else torch.float32)
            x = x * scale.item()
        if self.spec.learned_positions and positions is not None:
            x = x + self._weights.positions(positions).to(device=self.device, dtype=dtype)
        return x

    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits of one prompt at every position.

        Args:
            token_ids: a list of ints or a 1-d tensor.

        Returns:
            [T, d_vocab], float32, or float64 for a model that is stored in float64.

        Raises:
            DeltapatchError: the prompt is empty, not a list of whole numbers, or out of the vocabulary.
        """
        ids = self.check_tokens(token_ids)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        with undisturbed(self.device):
            x = self.embed(ids, dtype, positions=torch.arange(len(ids)))[None]  # [1, T, d_model]
            with self.reading() as read:
                for l, context in enumerate(contexts(self.spec, len(ids), dtype, self.device)):
                    x = block(x, cast(read.layer(l), self.device, dtype), context).resid_post
                return readout(x[0], read.ends(), self.spec)

    def check_tokens(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """The prompt as int64 [T] on the model's device; one beyond the context is allowed, with a warning.

        Raises:
            DeltapatchError: the prompt is empty, not a list of whole numbers, or out of the vocabulary.
        """
        try:
            ids = token_ids if isinstance(token_ids, Tensor) else torch.as_tensor(token_ids, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DeltapatchError("token_ids must be a list of ints or a 1-d tensor of them") from error
        if ids.ndim == 1 and not len(ids):
            raise DeltapatchError("the prompt is empty: it has no tokens")
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DeltapatchError("token_ids must be a list of ints or a 1-d tensor of them")
        ids = ids.long()
        outside = ids[(ids < 0) | (ids >= self.spec.d_vocab)]
        if len(outside):
            raise DeltapatchError(
                f"token {int(outside[0])} is out of range: the vocabulary has {self.spec.d_vocab} tokens"
            )
        if len(ids) > self.spec.context and self.spec.learned_positions:
            raise DeltapatchError(
                f"a prompt of {len(ids)} tokens is too long: the model knows {self.spec.context} positions"
            )
        if len(ids) > self.spec.context:
            warnings.warn(
                f"a prompt of {len(ids)} tokens exceeds the {self.spec.context} that the model was made for",
                stacklevel=3,
            )
        return ids.to(self.device)

    @undisturbed()
    def fingerprint(self) -> str:
        """32 hex digits that tell models apart: a hash of every byte (see `Checkpoint.fingerprint`).

        Weights of a file that were changed in memory since they were read count as they are now.

        Raises:
            DeltapatchError: the file has changed since the model was loaded.
        """
        return self._weights.fingerprint()

    def fingerprint_later(self) -> Callable[[], str | None]:
        """Gives the fingerprint of what the model is now, once it is asked for: until then nothing is hashed.

        None where that cannot be known then: the weights are in memory only, or the file has changed. The
        weights in memory are not held.
        """
        checkpoint = self._weights.checkpoint
        if not checkpoint.in_file or self._weights.edited:
            return lambda: None

        def found() -> str | None:
            try:
                return checkpoint.fingerprint()
            except (DeltapatchError, OSError):
                return None

        return found


def _made_again(origin: Origin, again: Callable[[], Model], n_layers: int) -> Model:
    """A model that was pickled or copied."""
    made = again()
    return Model(made._weights, origin, find_tokenizer=made._find_tokenizer).first_layers(n_layers)
