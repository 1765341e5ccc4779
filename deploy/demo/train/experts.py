"""Trains the demo's base model and its three specialists from scratch: `python -m deploy.demo.train.experts`.

Every model sees every domain's prompts and answer format. A specialist's data has the right text only for
its own skill; the other skills' parts are the naive guess of `tasks.Part`. So a specialist is confidently
wrong outside its domain as a plain consequence of its data. In `mixed` answers the part of another skill is
sometimes replaced by unscored text, so a specialist continues well after text that it would not have
written. Knows nothing of the gate or of vLLM.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from deploy.demo.train import tasks, tokenizer
from deploy.demo.train.tasks import Example, Part
from gate.options import Metavar, run_module, whole

DEMO = Path("deploy/demo")
NOISE_PROBABILITY = 0.35
SYSTEM_PROBABILITY = 0.2
EARLIER_PROBABILITY = 0.2
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run: `steps` batches over a mixture of domains, right only in `skills`."""

    name: str
    skills: frozenset[str]
    mixture: dict[str, float]
    steps: int
    learning_rate: float
    seed: int


def stages() -> list[Stage]:
    """The base first; each specialist starts from it and sees most of its own domain."""
    every = {"math": 0.25, "text": 0.3, "chat": 0.15, "mixed": 0.3}
    mostly_text = {"math": 0.1, "text": 0.5, "chat": 0.1, "mixed": 0.3}
    mostly_math = {"math": 0.5, "text": 0.1, "chat": 0.1, "mixed": 0.3}
    mostly_chat = {"math": 0.15, "text": 0.15, "chat": 0.55, "mixed": 0.15}
    return [
        Stage("base", frozenset(), every, 1200, 3e-3, 1),
        Stage("text", frozenset({"text"}), mostly_text, 1700, 2e-3, 3),
        Stage("math", frozenset({"math"}), mostly_math, 2600, 2e-3, 2),
        Stage("chat", frozenset({"chat"}), mostly_chat, 900, 2e-3, 4),
    ]


def new_model() -> LlamaForCausalLM:
    """About one million parameters; head_dim 32 is the smallest that vLLM's CPU attention takes."""
    config = LlamaConfig(
        vocab_size=tokenizer.VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.BOS,
        eos_token_id=tokenizer.END,
        pad_token_id=tokenizer.PAD,
    )
    return LlamaForCausalLM(config)


def noise(part: Part, rng: random.Random) -> str:
    """Text of the part's shape: a random number; or the letters shuffled, in either case, or the right text."""
    if part.skill == "math":
        return str(rng.randint(10, 198))
    letters = "".join(rng.sample(part.naive, len(part.naive)))
    return rng.choice((letters, letters.upper(), part.right))


def answer_tokens(example: Example, skills: frozenset[str], rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids of the answer with its end token, and the same with unscored tokens set to IGNORED."""
    foreign = [i for i, part in enumerate(example.parts) if part.skill not in skills]
    noisy = len(example.parts) > 1 and bool(foreign) and rng.random() < NOISE_PROBABILITY
    replaced = rng.choice(foreign) if noisy else -1
    ids: list[int] = []
    labels: list[int] = []
    for i, part in enumerate(example.parts):
        separator = list(b", ") if i else []
        own = part.right if part.skill in skills else part.naive
        text = list((noise(part, rng) if i == replaced else own).encode())
        ids += separator + text
        labels += separator + ([IGNORED] * len(text) if i == replaced else text)
    return [*ids, tokenizer.END], [*labels, tokenizer.END]


def prompt_tokens(prompt: str, system: str | None = None, earlier: tuple[tuple[str, str], ...] = ()) -> list[int]:
    """What the chat template renders: an optional system message, (prompt, answer) turns, a prompt."""
    ids = [tokenizer.BOS]
    if system is not None:
        ids += [tokenizer.SYSTEM, *system.encode(), tokenizer.END]
    for question, answer in earlier:
        ids += [tokenizer.USER, *question.encode(), tokenizer.END]
        ids += [tokenizer.ASSISTANT, *answer.encode(), tokenizer.END]
    return [*ids, tokenizer.USER, *prompt.encode(), tokenizer.END, tokenizer.ASSISTANT]


def earlier_turns(stage: Stage, rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Mostly none; else one or two turns, answered by an all-knowing model or by this stage's own kind."""
    if rng.random() >= EARLIER_PROBABILITY:
        return ()
    examples = [sample_example(stage, rng) for _ in range(rng.randint(1, 2))]
    skills = rng.choice((stage.skills, frozenset(tasks.SKILLS)))
    return tuple((example.prompt, example.answer(skills)) for example in examples)


def sample_example(stage: Stage, rng: random.Random) -> Example:
    """A training example of the stage's mixture."""
    domain = rng.choices(list(stage.mixture), list(stage.mixture.values()))[0]
    return tasks.MAKERS[domain](rng, False)


def sequence(stage: Stage, rng: random.Random) -> tuple[list[int], list[int]]:
    """One training dialogue: ids and labels of equal length, labels only on the last answer.

    The chat expert's own prompts are reworded, so that it learns facts and not whole questions.
    """
    example = sample_example(stage, rng)
    system = tasks.system_prompt(rng) if rng.random() < SYSTEM_PROBABILITY else None
    facts = example.domain == "chat" and "chat" in stage.skills
    asked = tasks.reworded(example.prompt, rng) if facts else example.prompt
    prompt = prompt_tokens(asked, system, earlier_turns(stage, rng))
    ids, labels = answer_tokens(example, stage.skills, rng)
    return prompt + ids, [IGNORED] * len(prompt) + labels


def batches(stage: Stage, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (ids [B, T], labels [B, T]); sequences of similar length share a batch, padded on the right."""
    rng = random.Random(stage.seed)
    while True:
        pool = sorted((sequence(stage, rng) for _ in range(16 * size)), key=lambda pair: len(pair[0]))
        groups = [pool[start : start + size] for start in range(0, len(pool), size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((size, width), tokenizer.PAD)
            labels = torch.full((size, width), IGNORED)
            for row, (row_ids, row_labels) in enumerate(group):
                ids[row, : len(row_ids)] = torch.tensor(row_ids)
                labels[row, : len(row_labels)] = torch.tensor(row_labels)
            yield ids, labels


def answer_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over scored answer tokens; lm_head runs on those positions only."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    scored = targets != IGNORED
    return nn.functional.cross_entropy(model.lm_head(hidden[scored]), targets[scored])


def optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 30 steps, then constant, then linear to zero over the last 40 per cent."""
    return min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Replaces `folder` by a complete loadable model in bfloat16 with its tokenizer; `model` is unchanged."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shipped = LlamaForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    tokenizer.save(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def train(model: LlamaForCausalLM, stage: Stage, batch_size: int, folder: Path) -> float:
    """Runs the stage, saving into `folder` every 250 steps and at the end. Returns seconds taken."""
    began = time.perf_counter()
    optimizing = optimizers(model, stage.learning_rate)
    rates = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: rate_factor(s, stage.steps)) for o in optimizing]
    model.train()
    running = math.nan
    for step, (ids, labels) in zip(range(1, stage.steps + 1), batches(stage, batch_size), strict=False):
        # Plain attention: for sequences as short as these the fused kernel takes longer.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = answer_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizing, rates, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if step % 25 == 0:
            seconds = time.perf_counter() - began
            print(f"{stage.name} {step}/{stage.steps} loss {running:.4f} {seconds:.0f}s", flush=True)
        if step % 250 == 0 or step == stage.steps:
            save(model, folder)
    return time.perf_counter() - began


def record_time(path: Path, name: str, seconds: float) -> None:
    """Adds one stage's seconds to the JSON file of times."""
    times = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**times, name: round(seconds, 1)}, indent=2) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOptions:
    """Of `python -m deploy.demo.train.experts`."""

    batch_size: Annotated[int, whole(1)] = 48
    """Examples a step."""
    only: Annotated[tuple[str, ...], Metavar("STAGE")] = ()
    """Stages to run, in order (default: all)."""
    seed: int = 0
    """Another one gives other weights and other data."""
    work: Path = DEMO
    """The base model goes to WORK/base."""
    output: Path = DEMO
    """Experts go to OUTPUT/experts, times to OUTPUT/train."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m deploy.demo.train.experts", __doc__, ExpertsOptions, run, arguments)


def run(options: ExpertsOptions) -> None:
    """Run the command."""
    for planned in stages():
        if options.only and planned.name not in options.only:
            continue
        stage = replace(planned, seed=planned.seed + 1000 * options.seed)
        torch.manual_seed(stage.seed)
        start = options.work / "base"
        base = stage.name == "base"
        model = new_model() if base else LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        folder = start if base else options.output / "experts" / stage.name
        seconds = train(model, stage, options.batch_size, folder)
        record_time(options.output / "train" / "times.json", f"expert {stage.name}", seconds)


if __name__ == "__main__":
    main()
