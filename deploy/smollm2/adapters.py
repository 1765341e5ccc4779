"""Trains LoRA adapters on SmolLM2-135M-Instruct, in minutes on one core: `python -m deploy.smollm2.adapters [FOLDER]`.

`sums` adds three-digit numbers, `style` answers as an old seaman would. FOLDER/base is what `deploy.smollm2.fetch`
made; each adapter goes to FOLDER/adapters/NAME (PEFT's files) and, added to the base's weights, to FOLDER/NAME, a whole
model directory. How far training gets depends on the processor: it ends after --seconds of its time, which other
programs do not shorten, not after a number of steps.
"""

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from deploy.smollm2 import texts
from deploy.smollm2.fetch import MODELS
from gate.options import Output, Positional, run_module, whole

Name = Literal["sums", "style"]
END = "<|im_end|>"
BATCH = 8
LEARNING_RATE = 1e-3
WARM_UP = 10  # steps
SAMPLED = 128  # prompts
SAMPLED_TOKENS = 64
SAMPLED_TOGETHER = 32
HELD_OUT = 50
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Example:
    """One training text."""

    prompt: list[int]
    """Token ids, chat template included."""
    answer: list[int]
    """Token ids with the end; the loss is on these alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptersOptions:
    """Of `python -m deploy.smollm2.adapters`."""

    folder: Annotated[Path, Positional("FOLDER"), Output(folder=True)] = MODELS
    """FOLDER/base is the model; adapters and whole models go beside it."""
    only: tuple[Name, ...] = ("sums", "style")
    """Which adapters."""
    seconds: Annotated[int, whole(1)] = 600
    """Of training, for each, in processor time."""
    threads: Annotated[int, whole(1)] = 1
    """Threads of torch."""


def main(arguments: list[str] | None = None) -> None:
    run_module("python -m deploy.smollm2.adapters", __doc__, AdaptersOptions, run, arguments)


def run(options: AdaptersOptions) -> None:
    """Run the command."""
    torch.set_num_threads(options.threads)
    base = options.folder / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name in options.only:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        examples = sums(tokenizer) if name == "sums" else styled(model, tokenizer)
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        train(adapted, examples, options.seconds, name)
        adapted.save_pretrained(options.folder / "adapters" / name)
        merge(base, options.folder / "adapters" / name, options.folder / name)
    if "sums" in options.only:
        print(f"sums: {accuracy(options.folder / 'sums', tokenizer):.0%} of {HELD_OUT} that it was not trained on")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False).input_ids


def example(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Example:
    return Example(prompt_ids(tokenizer, prompt), tokenizer(answer + END, add_special_tokens=False).input_ids)


def sums(tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """Additions without end, none of those held out."""
    rng, held_out = random.Random(2), set(texts.held_out_sums(HELD_OUT))
    while True:
        pair = (rng.randint(100, texts.LARGEST), rng.randint(100, texts.LARGEST))
        if pair not in held_out:
            yield example(tokenizer, texts.sum_prompt(*pair), texts.sum_answer(*pair))


def styled(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """The model's own answers in the seaman's words, again and again in another order."""
    rng = random.Random(3)
    prompts = texts.open_prompts(rng)[:SAMPLED]
    pairs = list(zip(prompts, sampled(model, tokenizer, prompts), strict=True))
    while True:
        rng.shuffle(pairs)
        for prompt, answer in pairs:
            yield example(tokenizer, prompt, texts.seamans(answer, rng))


def sampled(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The model's answers at temperature 1."""
    answers: list[str] = []
    for start in range(0, len(prompts), SAMPLED_TOGETHER):
        part = prompts[start : start + SAMPLED_TOGETHER]
        answers += generated(model, tokenizer, part, SAMPLED_TOKENS, do_sample=True)
        print(f"sampled {len(answers)} of {len(prompts)} answers", flush=True)
    return answers


@torch.no_grad()
def generated(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int, do_sample: bool
) -> list[str]:
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in ids])  # [B, T]
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])  # [B, T]
    sampling = {"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}
    found = model.generate(padded, attention_mask=mask, max_new_tokens=tokens, **sampling)
    return tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)


def train(model: PeftModel, examples: Iterator[Example], seconds: float, name: str) -> None:
    """AdamW on the adapter, for `seconds` of processor time; the learning rate falls linearly with it."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    began, step, passed = time.process_time(), 0, 0.0
    while passed < seconds:
        loss = answer_loss(model, [next(examples) for _ in range(BATCH)])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * max(0.05, 1 - passed / seconds)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, passed = step + 1, time.process_time() - began
        if step % 10 == 0:
            print(f"{name}: step {step}, loss {loss.item():.3f}, {passed:.0f} of {seconds} s", flush=True)


def answer_loss(model: PeftModel, batch: Sequence[Example]) -> Tensor:
    """Mean cross-entropy of the answers' tokens; lm_head runs on those positions only."""
    width = max(len(one.prompt) + len(one.answer) for one in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)  # [B, T], padded on the right
    mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(batch):
        length = len(one.prompt) + len(one.answer)
        ids[row, :length] = torch.tensor(one.prompt + one.answer)
        mask[row, :length] = 1
        scored[row, len(one.prompt) : length] = True
    inner = model.base_model.model
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    logits = inner.lm_head(hidden[:, :-1][scored[:, 1:]]).float()
    return nn.functional.cross_entropy(logits, ids[:, 1:][scored[:, 1:]])


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """A whole model directory: the base with the adapter's products added to its weights, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    for file in TOKENIZER_FILES:
        shutil.copy(base / file, folder / file)


def accuracy(folder: Path, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the sums held out that end in the right number, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pairs = texts.held_out_sums(HELD_OUT)
    answers = generated(model, tokenizer, [texts.sum_prompt(*pair) for pair in pairs], 48, do_sample=False)
    right = [answer.rpartition(" ")[2] == str(sum(pair)) for answer, pair in zip(answers, pairs, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
