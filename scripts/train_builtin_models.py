"""Train the built-in models: small language models that do two-operand arithmetic, one per architecture.

    python scripts/train_builtin_models.py [--only NAME] [--steps N] [--out DIR]

One core is enough: about a quarter of an hour a model. Seeds are fixed. Each model folder gets the weights
and the tokenizer in Hugging Face format, a card (README.md) and metrics.json, written by this script.
"""

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from builtin_data import Prompts, batches, split_facts
from builtin_tokenizer import CONTEXT, build_tokenizer
from torch import nn
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from deltapatch.tasks.templates import OPERATORS

ACCURACIES = ("held_out_0_shot", "held_out_2_shot", "seen_0_shot")  # of the card and metrics.json


@dataclass(frozen=True)
class Recipe:
    """How the models are trained; the same for all three."""

    max_number: int = 200
    steps: int = 4500
    tokens_per_batch: int = 2048
    lr: float = 3e-3  # AdamW's: embeddings, norms and biases
    muon_lr: float = 4e-3  # the matrices of the blocks
    warmup: int = 200
    weight_decay: float = 0.3
    shots: tuple[float, ...] = (0.6, 0.2, 0.2)  # how often a batch has 0, 1, 2 exemplars
    operators: tuple[float, ...] = (0.32, 0.32, 0.18, 0.18)  # how often a prompt asks for +, -, *, /
    seed: int = 0
    # Then, at a tenth of the rates, the wrong numbers get a share: see `fit`.
    soft_steps: int = 500
    soft_share: float = 0.1


def gpt_neox(d_vocab: int) -> nn.Module:
    """A small GPT-NeoX, as Pythia: attention and MLP in parallel, each with its own norm; partial rotary."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=d_vocab,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            rotary_pct=0.25,
            max_position_embeddings=CONTEXT,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


def gptj(d_vocab: int) -> nn.Module:
    """A small GPT-J: attention and MLP in parallel behind one norm; interleaved rotary; an output bias."""
    return GPTJForCausalLM(
        GPTJConfig(
            vocab_size=d_vocab,
            n_embd=128,
            n_layer=4,
            n_head=4,
            n_inner=512,
            rotary_dim=16,
            n_positions=CONTEXT,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


def llama(d_vocab: int) -> nn.Module:
    """A small LLaMA: RMSNorm, gated MLP, two key-value heads for four heads, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=d_vocab,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=344,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation="eager",
        )
    )


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt-neox-arithmetic": gpt_neox,
    "gptj-arithmetic": gptj,
    "llama-arithmetic": llama,
}


def logits_at(model: Any, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[prompt, question, vocab]: the logits at some positions only."""
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[:, positions]
    return model.get_output_embeddings()(hidden)


@torch.no_grad()
def accuracy(
    model: Any, prompts: Prompts, table: dict[str, np.ndarray], shots: int, exemplars: dict[str, np.ndarray]
) -> dict[str, list[list[int]]]:
    """operator -> for each template [correct, asked], by argmax over the whole vocabulary, in float32."""
    rng = random.Random(0)
    found: dict[str, list[list[int]]] = {}
    for symbol, asked in table.items():
        found[symbol] = []
        for template in range(6):
            pick = [[rng.randrange(len(exemplars[symbol])) for _ in range(shots)] for _ in asked]
            shown = exemplars[symbol][np.array(pick, dtype=np.int64).reshape(len(asked), shots)]
            tokens, ends = prompts.fill(symbol, template, np.concatenate([shown, asked[:, None]], axis=1))
            right = 0
            for part, numbers in zip(
                np.array_split(tokens, 1 + len(tokens) // 256),
                np.array_split(asked, 1 + len(tokens) // 256),
                strict=True,
            ):
                logits = logits_at(model, torch.from_numpy(part), torch.from_numpy(ends[-1:]))[:, 0]
                right += int((logits.argmax(-1).numpy() == prompts.spaced[numbers[:, 2]]).sum())
            found[symbol].append([right, len(asked)])
    return found


def sample(table: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """At most n facts of each operator."""
    rng = np.random.default_rng(0)
    return {s: t if len(t) <= n else t[np.sort(rng.permutation(len(t))[:n])] for s, t in table.items()}


def percent(found: dict[str, list[list[int]]]) -> dict[str, float]:
    """operator -> accuracy in percent over all templates."""
    return {s: round(100 * sum(r for r, _ in f) / sum(n for _, n in f), 2) for s, f in found.items()}


def make_optimizers(
    model: Any, recipe: Any, muon: Callable[..., torch.optim.Optimizer]
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; norms and biases without weight decay."""
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    groups: dict[str, list[nn.Parameter]] = {"blocks": [], "ends": [], "vectors": []}
    for p in model.parameters():
        groups["vectors" if p.ndim != 2 else "ends" if id(p) in ends else "blocks"].append(p)
    adamw = torch.optim.AdamW(
        [
            {"params": groups["ends"], "weight_decay": recipe.weight_decay},
            {"params": groups["vectors"], "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    return [adamw, muon(groups["blocks"], lr=recipe.muon_lr, weight_decay=recipe.weight_decay)]


def descend(
    model: Any,
    optimizers: list[torch.optim.Optimizer],
    rates: list[list[float]],
    pace: float,
    logits: torch.Tensor,
    targets: torch.Tensor,
    common: torch.Tensor,
    share: float,
) -> float:
    """One step of training, and its loss.

    The target of an answer is itself, but for a share that all answers have in common. Without it a model
    becomes so sure that wrong answers have probabilities of 1e-10 and less. Relative changes of those, which
    the paper's indirect effect is made of, then say little.

    Args:
        rates: the learning rates of the optimizers' groups, of which `pace` is taken.
        logits, targets: [answer, vocab] and [answer].
        common: the tokens that get the share.
    """
    for optimizer, initial in zip(optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * pace
    loss = nn.functional.cross_entropy(logits.float(), targets)
    if share:
        spread = -logits.float().log_softmax(-1)[:, common].mean()
        loss = (1 - share) * loss + share * spread
    model.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


def fit(
    model: Any,
    prompts: Prompts,
    recipe: Recipe,
    share: float,
    facts: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    save: Callable[[], None],
) -> float:
    """Train a model as the recipe says, and return its final loss, averaged over a hundred batches."""
    seen, held = facts
    optimizers = make_optimizers(model, recipe, partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"))
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    numbers = torch.from_numpy(prompts.spaced[1:])
    data = batches(prompts, seen, recipe.tokens_per_batch, recipe.shots, recipe.operators, recipe.seed)
    begin, running = time.perf_counter(), 0.0
    for step in range(1, recipe.steps + 1):
        pace = min(1.0, step / recipe.warmup) * (0.51 + 0.49 * math.cos(math.pi * step / recipe.steps))
        tokens, ends, answers = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = logits_at(model, tokens, ends)
        flat, targets = logits.flatten(0, 1), answers.flatten()
        loss = descend(model, optimizers, rates, pace, flat, targets, numbers, share)
        running += (loss - running) / min(step, 100)
        if step % 500 == 0:
            model.eval()
            now = percent(accuracy(model, prompts, sample(held, 200), 0, seen))
            model.train()
            seconds = time.perf_counter() - begin
            print(f"step {step} loss {running:.4f} held out {now} {seconds:.0f} s", flush=True)
        if step % 1000 == 0:
            save()
    return running


def train(name: str, recipe: Recipe, folder: Path) -> None:
    """Train one model and write its folder."""
    print(name, flush=True)
    begin = time.perf_counter()
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer(recipe.max_number, bos=name.startswith("llama"))
    model: Any = MODELS[name](len(tokenizer))
    prompts = Prompts(tokenizer, recipe.max_number)
    facts = split_facts(recipe.max_number)
    part = folder.with_name(folder.name + ".part")  # the latest weights, should training be cut short

    def save() -> None:
        write(model, tokenizer, part)

    fit(model, prompts, recipe, 0.0, facts, save)
    soften(model, prompts, recipe, facts, save)
    minutes = (time.perf_counter() - begin) / 60
    finish(name, model, tokenizer, prompts, recipe, facts, minutes, folder)
    shutil.rmtree(part, ignore_errors=True)


def soften(
    model: Any,
    prompts: Prompts,
    recipe: Recipe,
    facts: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    save: Callable[[], None],
) -> None:
    """The second phase of training: the wrong numbers get a share."""
    second = replace(
        recipe,
        steps=recipe.soft_steps,
        lr=recipe.lr / 10,
        muon_lr=recipe.muon_lr / 10,
        warmup=min(50, recipe.warmup),
        seed=recipe.seed + 1,
    )
    fit(model, prompts, second, recipe.soft_share, facts, save)


def finish(
    name: str,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Prompts,
    recipe: Recipe,
    facts: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    minutes: float,
    folder: Path,
) -> None:
    """Measure a trained model and write its folder: weights, tokenizer, metrics and card."""
    model.eval()
    metrics = measure(model, prompts, *facts) | {
        "recipe": asdict(recipe),
        "minutes": round(minutes, 1),
        "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": shape(model),
    }
    write(model, tokenizer, folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "README.md").write_text(card(name, metrics))
    print(name, {key: percent(metrics[key]) for key in ACCURACIES}, f"{minutes:.1f} minutes", flush=True)


def shape(model: Any) -> str:
    """The sizes that matter, in words."""
    c = model.config
    return f"{c.num_hidden_layers} layers, {c.hidden_size} wide, {c.num_attention_heads} heads"


def machine() -> str:
    """The processor and the versions that trained the model."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().split("\n") if x.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return f"one core of {cpu}, torch {torch.__version__}, transformers {transformers.__version__}"


def measure(
    model: Any, prompts: Prompts, seen: dict[str, np.ndarray], held: dict[str, np.ndarray]
) -> dict[str, Any]:
    """All accuracies of the card. Exemplars are always facts of the training set."""
    return {
        "held_out_0_shot": accuracy(model, prompts, held, 0, seen),
        "held_out_2_shot": accuracy(model, prompts, sample(held, 300), 2, seen),
        "seen_0_shot": accuracy(model, prompts, sample(seen, 1000), 0, seen),
        "facts": {s: {"seen": len(seen[s]), "held_out": len(held[s])} for s in OPERATORS},
    }


def write(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights and tokenizer in Hugging Face format."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The name that transformers 4 knows too.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2) + "\n")


def card(name: str, metrics: dict[str, Any]) -> str:
    """The model card: all figures come from the metrics."""
    template = Path(__file__).with_name("model_card.md").read_text()
    shown = {key: percent(metrics[key]) for key in ACCURACIES}
    rows, by_template = [], []
    for s in OPERATORS:
        figures = [*(f"{shown[key][s]:.2f}" for key in ACCURACIES), *map(str, metrics["facts"][s].values())]
        rows.append(f"| {s} | {' | '.join(figures)} |")
        cells = [f"{100 * right / asked:.2f}" for right, asked in metrics["held_out_0_shot"][s]]
        by_template.append(f"| {s} | {' | '.join(cells)} |")
    return template.format(
        **metrics["recipe"],
        **{key: metrics[key] for key in ("parameters", "shape", "minutes", "machine")},
        name=name,
        block=MODELS[name].__doc__.split("\n")[0],
        table="\n".join(rows),
        headings=" | ".join(t.format(x="x", y="y") for t in OPERATORS["+"].templates),
        by_template="\n".join(by_template),
        bos=" A prompt begins with <|endoftext|>." if name.startswith("llama") else "",
    )


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(MODELS), help="train this model only")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of the first phase")
    parser.add_argument("--max-number", type=int, default=Recipe.max_number, help="the largest number")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "models" / "builtin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    soft_steps = min(args.steps, Recipe.soft_steps)
    recipe = Recipe(steps=args.steps, soft_steps=soft_steps, max_number=args.max_number)
    for name in [args.only] if args.only else MODELS:
        train(name, recipe, args.out / name)


if __name__ == "__main__":
    main()
