"""Train the study models: small language models that do every task of the study, one with a digit tokenizer.

    python scripts/train_study_models.py [--only NAME] [--steps N] [--out DIR]

One core is enough. Seeds are fixed. Each model folder gets the weights and the tokenizer in Hugging Face
format, a card (README.md) and metrics.json with the accuracy on each task's held-out questions.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from builtin_tokenizer import build_tokenizer
from muon import Muon
from study_data import Kind, Lists, Pool, all_kinds, batches, collate, numerals_to, words_of, words_to
from train_builtin_models import descend, gpt_neox, llama, machine, make_optimizers, shape, write
from transformers import PreTrainedTokenizerFast

CONTEXT = 128  # two exemplars of the longest question in digits
# A quarter, the family's usual share, leaves heads of 32 dimensions too few to tell neighbours apart by.
HALF_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Recipe:
    """How a study model is trained."""

    max_number: int = 200
    samples: int = 4000  # questions of each kind that is too large to list
    recall_steps: int = 2_500
    steps: int = 8_000
    tokens_per_batch: int = 2048
    lr: float = 3e-3
    muon_lr: float = 4e-3
    warmup: int = 200
    weight_decay: float = 0.3
    shots: tuple[float, ...] = (0.6, 0.2, 0.2)  # how often a prompt has 0, 1 and 2 exemplars
    tasks: dict[str, float] = field(
        default_factory=lambda: {
            "numerals": 0.42,
            "words": 0.15,
            "choices": 0.06,
            "retrieval": 0.06,
            "retrieval, words": 0.03,
            "three operands": 0.22,
            "facts": 0.03,
            "lists": 0.02,
            "lists, words": 0.01,
        }
    )
    # First, until the lists are learnt: retrieval alone teaches little until all of its steps are there.
    recall: dict[str, float] = field(
        default_factory=lambda: {
            "lists": 0.65,
            "lists, words": 0.2,
            "retrieval": 0.1,
            "retrieval, words": 0.05,
        }
    )
    lists: int = 40_000
    soft_steps: int = 600
    soft_share: float = 0.1  # see `train_builtin_models.descend`
    seed: int = 0
    measured: int = 300  # held-out questions of each kind that the card's accuracy is of


@dataclass(frozen=True)
class Subject:
    """One study model: its kind of transformer and of tokenizer."""

    build: Callable[[int], Any]
    sizes: dict[str, Any]
    digits: bool

    def model(self, d_vocab: int) -> Any:
        """A fresh model: that of `train_builtin_models` with the sizes changed."""
        config = self.build(d_vocab).config
        for name, value in {
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": True,
            **self.sizes,
        }.items():
            setattr(config, name, value)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


SUBJECTS = {
    "gpt-neox-study": Subject(gpt_neox, {"rope_parameters": HALF_ROTARY}, digits=False),
    "llama-digits-study": Subject(llama, {"intermediate_size": 416}, digits=True),
}


def read(model: Any, tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """[read, vocab]: the logits at some places only."""
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden[where[0], where[1]])


def pool_weights(of: Sequence[str], tasks: dict[str, float]) -> np.ndarray:
    """[pool], how often a prompt is of it: a task's share goes to its pools in equal parts.

    Args:
        of: [pool], the task of each.
        tasks: their shares; a task that is not there has none.
    """
    weights = np.array([tasks.get(task, 0.0) / of.count(task) for task in of])
    return weights / weights.sum()


@torch.no_grad()
def accuracy(
    model: Any, tokenizer: PreTrainedTokenizerFast, kinds: Sequence[Kind], shots: int, most: int
) -> dict[str, dict[str, list[int]]]:
    """task -> operator, shape or relation -> [right, asked]: all tokens of the answer by argmax.

    Held-out questions, at most so many of each kind; of kinds that hold out none, those that were learnt.
    Exemplars are always learnt ones.
    """
    found: dict[str, dict[str, list[int]]] = {}
    bos = tokenizer("")["input_ids"]
    for kind in kinds:
        rng = np.random.default_rng(0)
        side = kind.held or kind.seen
        asked = [side[i] for i in rng.permutation(len(side))[:most].tolist()]
        pool = Pool(tokenizer, asked)
        shown = Pool(tokenizer, [kind.seen[i] for i in rng.integers(len(kind.seen), size=64).tolist()])
        tally = found.setdefault(kind.task, {}).setdefault(kind.name, [0, 0])
        prompts = []
        for i in range(len(pool)):
            before, _ = shown.prompt(rng.integers(len(shown), size=shots), bos)
            ids, wanted = pool.prompt(np.array([i]), [])
            ids, wanted = ids[:-1], wanted[:-1]  # the newline ends the answer, and is no part of it
            prompts.append((np.concatenate([before, ids]), np.concatenate([before < 0, wanted])))
        prompts = [prompt for prompt in prompts if len(prompt[0]) <= CONTEXT]
        for start in range(0, len(prompts), 128):
            part = prompts[start : start + 128]
            tokens, where, targets = collate(part, CONTEXT)
            wrong = (read(model, tokens, where).argmax(-1) != targets).numpy()
            bad = np.bincount(where[0].numpy(), weights=wrong, minlength=len(part))
            tally[0] += int((bad == 0).sum())
            tally[1] += len(part)
    return found


def percent(found: dict[str, dict[str, list[int]]]) -> dict[str, float]:
    """task -> accuracy in percent over all its kinds."""
    return {
        task: round(100 * sum(r for r, _ in by.values()) / max(1, sum(n for _, n in by.values())), 2)
        for task, by in found.items()
    }


@dataclass(frozen=True)
class Lesson:
    """What a model learns from.

    Attributes:
        kinds: of questions.
        pools: those of the kinds, and lists.
        tasks: [pool].
    """

    tokenizer: PreTrainedTokenizerFast
    kinds: list[Kind]
    pools: list[Pool | Lists]
    tasks: list[str]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast, kinds: list[Kind], recipe: Recipe) -> "Lesson":
        """The questions of the kinds in tokens, and the lists."""
        pools: list[Pool | Lists] = [Pool(tokenizer, kind.seen) for kind in kinds]
        writings = {"lists": numerals_to(recipe.max_number), "lists, words": words_to(recipe.max_number)}
        pools += [Lists(tokenizer, known, recipe.lists, recipe.seed) for known in writings.values()]
        return Lesson(tokenizer, kinds, pools, [*(kind.task for kind in kinds), *writings])


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        steps, tasks: how long, and the tasks' shares.
        pace, last: of the rates, at the beginning and at the end.
        soft_share: see `train_builtin_models.descend`.
    """

    steps: int
    tasks: dict[str, float]
    pace: float
    last: float
    soft_share: float = 0.0


def fit(
    model: Any, lesson: Lesson, recipe: Recipe, phase: Phase, seed: int, save: Callable[[], None]
) -> None:
    """Train for one phase."""
    optimizers = make_optimizers(model, recipe, Muon)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    answers = [_answers(pool) for pool in lesson.pools if isinstance(pool, Pool)]
    common = torch.from_numpy(np.unique(np.concatenate(answers)))
    data = batches(
        lesson.pools,
        pool_weights(lesson.tasks, phase.tasks),
        lesson.tokenizer("")["input_ids"],
        recipe.tokens_per_batch,
        recipe.shots,
        CONTEXT,
        seed,
    )
    begin, running, warmup = time.perf_counter(), 0.0, min(recipe.warmup, max(1, phase.steps // 4))
    for step in range(1, phase.steps + 1):
        fall = 0.5 + 0.5 * math.cos(math.pi * step / phase.steps)
        pace = min(1.0, step / warmup) * (phase.last + (phase.pace - phase.last) * fall)
        tokens, where, targets = next(data)
        logits = read(model, tokens, where)
        loss = descend(model, optimizers, rates, pace, logits, targets, common, phase.soft_share)
        running += (loss - running) / min(step, 100)
        if step % 500 == 0:
            model.eval()
            shown = percent(accuracy(model, lesson.tokenizer, lesson.kinds, 0, 20))
            model.train()
            seconds = time.perf_counter() - begin
            print(f"step {step} loss {running:.4f} held out {shown} {seconds:.0f} s", flush=True)
        if step % 1000 == 0:
            save()


def train(name: str, recipe: Recipe, folder: Path) -> None:
    """Train one study model and write its folder."""
    print(name, flush=True)
    begin = time.process_time()
    torch.manual_seed(recipe.seed)
    subject = SUBJECTS[name]
    kinds = all_kinds(recipe.max_number, recipe.samples, recipe.seed)
    bos, words = name.startswith("llama"), words_of(kinds)
    tokenizer = build_tokenizer(recipe.max_number, bos, words, subject.digits, CONTEXT)
    model = subject.model(len(tokenizer))
    lesson = Lesson.of(tokenizer, kinds, recipe)
    part = folder.with_name(folder.name + ".part")  # the latest weights, should training be cut short

    def save() -> None:
        write(model, tokenizer, part)

    phases = (
        Phase(recipe.recall_steps, recipe.recall, 1.0, 1.0),
        Phase(recipe.steps, recipe.tasks, 1.0, 0.02),
        Phase(recipe.soft_steps, recipe.tasks, 0.1, 0.002, recipe.soft_share),
    )
    for i, phase in enumerate(phases):
        fit(model, lesson, recipe, phase, recipe.seed + i, save)
    minutes = (time.process_time() - begin) / 60
    model.eval()
    metrics = {
        "held_out_0_shot": accuracy(model, tokenizer, kinds, 0, recipe.measured),
        "held_out_2_shot": accuracy(model, tokenizer, kinds, 2, recipe.measured // 3),
        "recipe": asdict(recipe),
        "minutes": round(minutes, 1),
        "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": shape(model),
        "digits": subject.digits,
    }
    write(model, tokenizer, folder)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "README.md").write_text(card(name, metrics))
    shutil.rmtree(part, ignore_errors=True)
    print(name, percent(metrics["held_out_0_shot"]), f"{minutes:.1f} minutes", flush=True)


def card(name: str, metrics: dict[str, Any]) -> str:
    """The model card: all figures come from the metrics."""
    zero, two = (percent(metrics[f"held_out_{n}_shot"]) for n in (0, 2))
    rows = [f"| {task} | {zero[task]:.2f} | {two[task]:.2f} |" for task in zero]
    detail = [
        f"| {task} | {kind} | {right} of {asked} |"
        for task, by in metrics["held_out_0_shot"].items()
        for kind, (right, asked) in by.items()
    ]
    numbers = "every digit is one token" if metrics["digits"] else "every number is one token"
    return (
        Path(__file__)
        .with_name("study_card.md")
        .read_text()
        .format(
            name=name,
            numbers=numbers,
            table="\n".join(rows),
            detail="\n".join(detail),
            **metrics["recipe"],
            **{key: metrics[key] for key in ("parameters", "shape", "minutes", "machine")},
        )
    )


def _answers(pool: Pool) -> np.ndarray:
    """The tokens that begin answers, but for a space of its own."""
    return np.unique(pool.tokens[pool.start[1:] - 2])


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(SUBJECTS), help="train this model only")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="steps of the main phase")
    parser.add_argument("--max-number", type=int, default=Recipe.max_number, help="the largest number")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "models" / "builtin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    recipe = Recipe(
        recall_steps=min(args.steps, Recipe.recall_steps),
        steps=args.steps,
        soft_steps=min(args.steps, Recipe.soft_steps),
        max_number=args.max_number,
    )
    for name in [args.only] if args.only else SUBJECTS:
        train(name, recipe, args.out / name)


if __name__ == "__main__":
    main()
