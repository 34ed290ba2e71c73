"""GGUF files into model folders: transformers reads and dequantises them, with the gguf package's help.

transformers leaves out some of what a file says, and takes its defaults instead. What changes the result is
put right here, or refused by name: nothing that a file says is passed over in silence.
"""

import contextlib
import io
import json
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.config import Config
from deltapatch.models.registry import read_config

# In config.json: what the folder was made of. Names that begin like this are nobody's options.
RECORD = "_converted_from"


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, by its name and its first bytes."""
    path = Path(path)
    if path.suffix.lower() != ".gguf" or not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise DeltapatchError(f"{path} is called .gguf and is no GGUF file")
    return True


def write_gguf(path: Path, out: Path) -> None:
    """Write config, weights and tokenizer of a GGUF file as transformers would save them.

    Quantised values are dequantised, all to float32, and config.json says so.

    Args:
        path: the file; of a model in several files the first is not enough, and refused by gguf.
        out: an empty folder.

    Raises:
        DeltapatchError: the gguf package is missing, or the file is broken or not of a supported model.
    """
    if find_spec("gguf") is None:
        raise DeltapatchError(f"{path}: reading GGUF needs the package gguf: pip install 'deltapatch[gguf]'")
    import torch
    import transformers
    from safetensors.torch import save_file

    given: dict[str, Any] = {"gguf_file": path.name}
    try:
        with _silent():
            config = transformers.AutoConfig.from_pretrained(path.parent, **given)
            complete(config, path)
            read_config(Config(config.to_dict(), str(path)))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, config=config, **given
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **given)
            config.save_pretrained(out)
            tokenizer.save_pretrained(out)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        state = {name: t.contiguous() for name, t in model.state_dict().items() if name not in tied}
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    except DeltapatchError:
        raise
    except Exception as error:  # whatever a broken file leads gguf and transformers to
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DeltapatchError(f"{path} cannot be converted: {reason}") from error
    file = out / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields[RECORD] = f"{path.name}, dequantised from {', '.join(_kinds(path))}"
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")


# What transformers takes from a file, whatever the family, or what changes no number; heads' values are as
# wide as their keys in all of ours, and `vocab_size` is seen in the embedding.
_READ = {
    "context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "rope.freq_base", "rope.dimension_count",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "use_parallel_residual",
}  # fmt: skip
# llama.cpp's rule: the largest of these families divide scores by the root of d_model / heads.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}  # and how many layers these have
_INSTEAD = "convert the model that it was made of instead"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def complete(config: Any, path: Path) -> None:
    """Put right what transformers leaves out of a config.

    Raises:
        DeltapatchError: the file says something that changes its result, and that is not known.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    name = str(reader.fields["general.architecture"].contents())
    said = {
        key[len(name) + 1 :]: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(f"{name}.")
    }
    kind = config.model_type
    _complete_shape(config, kind, said)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in said and hasattr(config, key):
            setattr(config, key, said.pop(key))
    _complete_rotary(config, kind, said, {t.name: t.data for t in reader.tensors}, path)
    unknown = sorted(key for key in said if key not in _READ)
    if unknown:
        raise DeltapatchError(
            f"{path} says {name}.{unknown[0]} ({said[unknown[0]]}), which may change what it computes and is "
            f"not known here: {_INSTEAD}"
        )


def _complete_shape(config: Any, kind: str, said: dict[str, Any]) -> None:
    """Sizes that transformers takes from its defaults."""
    width = said.pop("attention.key_length", None)
    if said.pop("attention.value_length", width) not in (width, None):
        raise DeltapatchError("its heads' values are not as wide as their keys, as in no family of ours")
    if width is not None and hasattr(config, "head_dim"):
        config.head_dim = width
    if kind in _SCALED_BY_WIDTH:
        wide = config.num_hidden_layers == _SCALED_BY_WIDTH[kind]
        heads = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = heads if wide else config.head_dim
    if kind == "gpt2":
        config.n_inner, config.n_positions = said.get("feed_forward_length"), said["context_length"]
        for stray in ("feed_forward_length", "n_ctx"):
            config.__dict__.pop(stray, None)
    pad = getattr(config, "pad_token_id", None)
    if pad is not None and pad >= config.vocab_size:
        config.pad_token_id = None


def _complete_rotary(
    config: Any, kind: str, said: dict[str, Any], tensors: dict[str, Any], path: Path
) -> None:
    """Rotary scaling, which files tell by keys or by a tensor of factors."""
    scaling = said.pop("rope.scaling.type", "none")
    factor = said.pop("rope.scaling.factor", None)
    own: dict[str, Any] = {}
    if scaling == "linear" and factor is not None:
        own = {"rope_type": "linear", "factor": float(factor)}
    elif scaling != "none":
        raise DeltapatchError(
            f"{path} has {scaling} rotary scaling, which files of its kind do not tell in full: {_INSTEAD}"
        )
    factors = tensors.get("rope_freqs.weight")
    other = next((name for name in tensors if name.startswith("rope_factors")), None)
    if other is not None:
        raise DeltapatchError(
            f"{path} has the tensor {other}, which does not tell its rotary scaling in full: {_INSTEAD}"
        )
    if factors is not None:
        own = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
        theta = config.rope_parameters["rope_theta"]
        if kind != "llama" or not _are_llama3(factors, float(theta), own):
            raise DeltapatchError(
                f"{path} scales its rotary frequencies by factors that are not those of LLaMA 3: {_INSTEAD}"
            )
    if own:
        # Of models with two kinds of layers the scaling is that of the global ones.
        known = config.rope_parameters
        known = known.get("full_attention", known)
        known.update(own)


def _are_llama3(factors: Any, theta: float, scaling: dict[str, Any]) -> bool:
    """Whether frequencies are divided as LLaMA 3 does; factors: [d_head / 2]."""
    import math

    import numpy as np

    n, original = len(factors), scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi * theta ** (np.arange(n) / n)
    low, high = (scaling[name] for name in ("low_freq_factor", "high_freq_factor"))
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return bool(np.allclose(1 / ((1 - smooth) / scaling["factor"] + smooth), factors, rtol=1e-4))


def _kinds(path: Path) -> list[str]:
    """The types of a file's tensors, the most common first."""
    from gguf import GGUFReader

    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors)
    return [kind for kind, _ in kinds.most_common()]


@contextlib.contextmanager
def _silent():  # type: ignore[no-untyped-def]
    """Without the progress bars and remarks of others, which go wherever stderr does."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
