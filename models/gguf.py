"""GGUF files into model folders: transformers reads and dequantises them, with the gguf package's help."""

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
            read_config(Config(config.to_dict(), str(path)))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, **given
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
