"""The models that ship with the package: small, trained on arithmetic, or on all tasks of the study."""

from pathlib import Path

from deltapatch.errors import DeltapatchError

BUILTIN = "builtin:"  # begins the name by which `load_model` finds one of them

# The folder of each in builtin/, and the architecture that names it for short.
ARITHMETIC_MODELS = {
    "gpt-neox-arithmetic": "gpt_neox",
    "gptj-arithmetic": "gptj",
    "llama-arithmetic": "llama",
}
STUDY_MODELS = ("gpt-neox-study", "llama-digits-study")
BUILTIN_MODELS = (*ARITHMETIC_MODELS, *STUDY_MODELS)
AUTOENCODERS = ("gpt-neox-arithmetic-features",)  # of the residual stream of a model of that name


def builtin_autoencoder_path(name: str) -> Path:
    """The folder of a built-in sparse autoencoder, as SAELens has it.

    Raises:
        DeltapatchError: there is none of this name.
    """
    if name not in AUTOENCODERS:
        raise DeltapatchError(
            f"There is no built-in autoencoder {name!r}; there is {', '.join(AUTOENCODERS)}."
        )
    return Path(__file__).parent / "builtin" / name


def builtin_model_path(name: str = "gpt-neox-arithmetic") -> Path:
    """The folder of a built-in model, in Hugging Face format. Its README.md says what it can do.

    Args:
        name: one of BUILTIN_MODELS, or the architecture of an arithmetic one ("gpt_neox", "gptj", "llama").

    Raises:
        DeltapatchError: no built-in model has this name, or its files are not installed.
    """
    full = {short: long for long, short in ARITHMETIC_MODELS.items()}.get(name, name)
    if full not in BUILTIN_MODELS:
        raise DeltapatchError(
            f"There is no built-in model {name!r}; the built-in models are {', '.join(BUILTIN_MODELS)}."
        )
    folder = Path(__file__).parent / "builtin" / full
    if not (folder / "model.safetensors").is_file():
        raise DeltapatchError(
            f"The built-in model {full!r} is not at {folder}; install deltapatch again, or train it with "
            f"scripts/train_{'study' if full in STUDY_MODELS else 'builtin'}_models.py --only {full}."
        )
    return folder
