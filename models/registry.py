"""The architectures: adding one is a file beside this one and its entry here."""

from deltapatch.errors import DeltapatchError, shown
from deltapatch.models import gpt_neox, gptj, llama
from deltapatch.models.architecture import Architecture
from deltapatch.models.config import Config
from deltapatch.models.spec import ModelSpec

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a for a in (gpt_neox.ARCHITECTURE, gptj.ARCHITECTURE, llama.ARCHITECTURE)
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
        raise DeltapatchError(f"{config.where} {what}: supported are {', '.join(ARCHITECTURES)}")
    config.refuse_unsupported()
    return ARCHITECTURES[name], ARCHITECTURES[name].read_spec(config)
