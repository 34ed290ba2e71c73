"""A tiny random model whose tokenizer knows every word of the study, and settings of a small study."""

from pathlib import Path

import torch

from deltapatch.study.settings import Settings

# Few pairs and few draws: what is tested is that everything is there and right, not what it says.
SMALL = Settings(per_template=2, shots=1, draws=40, joint_pairs=3, checked=8)
NAMES = ("factual", "shots")


def make_model(folder: Path, seed: int, n_layers: int = 2) -> Path:
    """A GPT-NeoX with a tokenizer that leaves numbers to 120 whole, as a folder."""
    from tasks_tokenizers import byte_level
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    numbers = [f"{space}{n}" for space in ("", "Ġ") for n in range(121)]
    tokenizer = byte_level(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s", numbers)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=192,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
