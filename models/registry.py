"""The architectures: adding one is a file beside this one and its entry here."""

from difflib import get_close_matches

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models import (
    gemma,
    gpt2,
    gpt_neox,
    gptj,
    granite,
    llama,
    mistral,
    olmo,
    phi3,
    qwen,
    smollm3,
    stablelm,
)
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.spec import ModelSpec

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        gpt_neox.ARCHITECTURE,
        gptj.ARCHITECTURE,
        llama.ARCHITECTURE,
        gpt2.ARCHITECTURE,
        qwen.QWEN2,
        qwen.QWEN3,
        mistral.ARCHITECTURE,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        gemma.GEMMA3_OF_TWO,
        olmo.OLMO2,
        olmo.OLMO3,
        phi3.ARCHITECTURE,
        granite.ARCHITECTURE,
        smollm3.ARCHITECTURE,
        stablelm.ARCHITECTURE,
    )
}


def read_config(config: Config) -> tuple[Architecture, ModelSpec]:
    """The architecture and the spec of a config.json.

    Raises:
        DeltapatchError: an architecture or an option that is not supported, or a broken field.
    """
    name = config.find("model_type", null=True)
    if str(name) not in ARCHITECTURES:
        what = (
            "names no 'model_type'"
            if name is None
            else f"is of model_type {shown(name)}, which is not supported"
        )
        near = get_close_matches(str(name), ARCHITECTURES, n=1, cutoff=0.5)
        nearest = f" ({near[0]} is the nearest)" if near else ""
        raise DeltapatchError(f"{config.where} {what}: supported are {', '.join(ARCHITECTURES)}{nearest}")
    config.refuse_unsupported()
    architecture = ARCHITECTURES[name]
    spec = architecture.read_spec(config)
    config.refuse_unread(name, architecture.ignored)
    return architecture, spec
