"""Records rollouts for gate training: `python -m gate.record`.

Responses come from each expert alone, from fused sampling (uniform, product, and a gate if given) and from
the reference answers; the whole response is rewarded 1 when its text equals the answer. Knows nothing of
gate internals or of training.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gate import checkpoint
from gate.dataset import Records
from gate.ensemble import Cursor, Ensemble, Policy, Rollout, constant_policy, gate_policy, roll_out


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompts file, with its token ids."""

    number: int
    domain: str
    tokens: list[int]
    answer: str


def read_prompts(path: Path, ensemble: Ensemble, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSON-lines file ({"domain", "messages", "answer"}), through the experts' template."""
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    rows = [json.loads(line) for line in lines]
    return [
        Prompt(number, row["domain"], ensemble.encode(row["messages"]), row["answer"])
        for number, row in enumerate(rows)
    ]


def length_batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts of similar length, to waste little on padding."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.tokens))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def fixed_policies(names: list[str]) -> list[Policy]:
    """Each expert alone, uniform in both spaces, and the product of experts."""
    count = len(names)
    singles = [
        constant_policy(f"expert:{name}", "logprob", [float(i == j) for j in range(count)])
        for i, name in enumerate(names)
    ]
    return [
        *singles,
        constant_policy("uniform-logprob", "logprob", [1 / count] * count),
        constant_policy("uniform-prob", "prob", [1 / count] * count),
        constant_policy("product", "logprob", [1.0] * count),
    ]


def responses(rollout: Rollout) -> list[list[int]]:
    """Token ids of each response, end token included, without padding."""
    pairs = zip(rollout.tokens.tolist(), rollout.lengths.tolist(), strict=True)
    return [tokens[:length] for tokens, length in pairs]


def reward(ensemble: Ensemble, response: list[int], answer: str) -> float:
    """1 for a finished response whose text equals the answer, else 0."""
    finished = response[-1] == ensemble.end
    return float(finished and ensemble.decode(response).strip() == answer.strip())


def to_records(ensemble: Ensemble, rollout: Rollout, prompts: list[Prompt], source: str) -> Records:
    """Flat records of a rollout whose rows answer `prompts`, one each."""
    steps = torch.arange(rollout.tokens.size(1)).unsqueeze(0)
    keep = steps < rollout.lengths.unsqueeze(1)  # [B, T]
    pairs = zip(responses(rollout), prompts, strict=True)
    return Records(
        experts=ensemble.names,
        vocabulary_size=ensemble.vocabulary_size,
        topk_logprobs=torch.stack([view.topk_logprobs for view in rollout.views], dim=1)[keep],
        topk_ids=torch.stack([view.topk_ids for view in rollout.views], dim=1)[keep],
        hidden=[
            torch.stack([view.hidden[i] for view in rollout.views], dim=1)[keep] for i in range(len(ensemble.names))
        ],
        tokens=rollout.tokens[keep],
        lengths=rollout.lengths,
        rewards=torch.tensor([reward(ensemble, response, prompt.answer) for response, prompt in pairs]),
        prompts=torch.tensor([prompt.number for prompt in prompts]),
        sources=[source] * len(prompts),
    )


def join(parts: list[Records]) -> Records:
    """One Records of many, in order."""
    return Records(
        experts=parts[0].experts,
        vocabulary_size=parts[0].vocabulary_size,
        topk_logprobs=torch.cat([part.topk_logprobs for part in parts]),
        topk_ids=torch.cat([part.topk_ids for part in parts]),
        hidden=[torch.cat(hidden) for hidden in zip(*(part.hidden for part in parts), strict=True)],
        tokens=torch.cat([part.tokens for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        rewards=torch.cat([part.rewards for part in parts]),
        prompts=torch.cat([part.prompts for part in parts]),
        sources=[source for part in parts for source in part.sources],
    )


def record_batch(
    ensemble: Ensemble,
    prompts: list[Prompt],
    policies: list[Policy],
    *,
    temperature: float,
    max_tokens: int,
    generator: torch.Generator,
) -> Records:
    """One response of every policy and the reference answer to each prompt."""
    cursor: Cursor = ensemble.prefill([prompt.tokens for prompt in prompts])
    parts = []
    for policy in policies:
        rollout = roll_out(
            ensemble,
            cursor.fork(1),
            policy,
            temperature=temperature,
            max_tokens=max_tokens,
            generator=generator,
        )
        parts.append(to_records(ensemble, rollout, prompts, policy.name))
    answers = [ensemble.encode_answer(prompt.answer) for prompt in prompts]
    scored = ensemble.score([prompt.tokens for prompt in prompts], answers)
    return join([*parts, to_records(ensemble, scored, prompts, "reference")])


def expert_folders(arguments: list[str]) -> dict[str, Path]:
    """`name=folder` arguments as a dictionary, in order. Raises ValueError for any other form."""
    pairs = [argument.partition("=") for argument in arguments]
    if not all(name and folder for name, _, folder in pairs):
        raise ValueError("experts are given as name=folder")
    return {name: Path(folder) for name, _, folder in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--gate", type=Path, help="also record this gate's samples")
    parser.add_argument("--limit", type=int, help="use only the first prompts")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    began = time.perf_counter()
    ensemble = Ensemble(expert_folders(arguments.experts), arguments.top_k)
    policies = fixed_policies(ensemble.names)
    if arguments.gate:
        gate = checkpoint.load(arguments.gate)
        policies.append(gate_policy("gate", gate.contract.space, gate, gate.contract.state_size))
    prompts = read_prompts(arguments.prompts, ensemble, arguments.limit)
    generator = torch.Generator().manual_seed(arguments.seed)
    parts = []
    for batch in length_batches(prompts, arguments.batch_size):
        parts.append(
            record_batch(
                ensemble,
                batch,
                policies,
                temperature=arguments.temperature,
                max_tokens=arguments.max_tokens,
                generator=generator,
            )
        )
        done = sum(len(part.lengths) for part in parts)
        print(f"{done} responses, {time.perf_counter() - began:.0f}s", flush=True)
    records = join(parts)
    records.save(arguments.output)
    print(f"{len(records.tokens)} tokens, mean reward {records.rewards.mean():.3f} -> {arguments.output}")


if __name__ == "__main__":
    main()
