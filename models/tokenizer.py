"""The tokenizer that comes with a model."""

from pathlib import Path
from typing import Any

from deltapatch.errors import DeltapatchError
from deltapatch.models.folder import TOKENIZER_FILES, read_json
from deltapatch.models.header import check_file

# Of the files of a tokenizer, those that make one: others only add to it.
_MAKE_ONE = set(TOKENIZER_FILES) - {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja"}


def load_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer in a model's folder, or None where there is none.

    Raises:
        DeltapatchError: a file of it is broken.
    """
    if not any((folder / file).is_file() for file in _MAKE_ONE):
        return None
    for file in TOKENIZER_FILES:
        check_file(folder / file)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a broken file surfaces as whatever its parser raises
        for file in TOKENIZER_FILES:
            if file.endswith(".json") and (folder / file).exists():
                read_json(folder / file)  # says what is wrong, and where
        reason = str(error).strip().split("\n")[0]
        # Of what is JSON and makes no sense, the tokenizers library tells the line of this file.
        at = folder / "tokenizer.json" if " at line " in reason else folder
        raise DeltapatchError(f"the tokenizer in {at} cannot be loaded: {reason}") from error
