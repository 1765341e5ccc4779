"""Greedy accuracy of the demo's experts and fusion rules: `python -m deploy.demo.train.results`.

Uses the transformers loop of `gate.ensemble` in float32, not the server; the table of the served models comes
from `gate.evaluate`. Exact match of the whole answer, per domain, on the held-out prompts.
"""

import argparse
import json
from pathlib import Path

import torch

from gate import checkpoint
from gate.ensemble import Ensemble, Policy, gate_policy, roll_out
from gate.record import Prompt, fixed_policies, length_batches, read_prompts, responses, reward

DEMO = Path("deploy/demo")
EXPERTS = ("math", "text", "chat")
TOP_K = 32
MAX_TOKENS = 24
BATCH_SIZE = 128


def answer_batch(ensemble: Ensemble, prompts: list[Prompt], policies: list[Policy]) -> dict[str, list[float]]:
    """Rewards of every policy's greedy answers to one batch; the prompts are read once."""
    cursor = ensemble.prefill([prompt.tokens for prompt in prompts])
    generator = torch.Generator()
    rewards = {}
    for policy in policies:
        rollout = roll_out(
            ensemble, cursor.fork(1), policy, temperature=0.0, max_tokens=MAX_TOKENS, generator=generator
        )
        pairs = zip(responses(rollout), prompts, strict=True)
        rewards[policy.name] = [reward(ensemble, response, prompt.answer) for response, prompt in pairs]
    return rewards


def accuracies(ensemble: Ensemble, prompts: list[Prompt], policies: list[Policy]) -> dict[str, dict[str, float]]:
    """{policy: {domain: share of right answers}}, with per-prompt oracle routing between single experts."""
    singles = [policy.name for policy in policies if policy.name.startswith("expert:")]
    rights: dict[str, dict[str, list[float]]] = {}
    for batch in length_batches(prompts, BATCH_SIZE):
        rewards = answer_batch(ensemble, batch, policies)
        rewards["oracle routing"] = [max(each) for each in zip(*(rewards[s] for s in singles), strict=True)]
        for name, values in rewards.items():
            for prompt, value in zip(batch, values, strict=True):
                rights.setdefault(name, {}).setdefault(prompt.domain, []).append(value)
    return {
        name: {domain: round(sum(values) / len(values), 3) for domain, values in sorted(domains.items())}
        for name, domains in rights.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=Path, default=DEMO / "prompts/test.jsonl")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--gates", nargs="*", type=Path, default=[DEMO / "gate.pt"])
    parser.add_argument("--output", type=Path, default=DEMO / "train/results.json")
    arguments = parser.parse_args()
    ensemble = Ensemble({name: DEMO / "experts" / name for name in EXPERTS}, TOP_K)
    policies = fixed_policies(ensemble.names)
    for path in arguments.gates:
        gate = checkpoint.load(path)
        policies.append(gate_policy(path.stem, gate.contract.space, gate, gate.contract.state_size))
    prompts = read_prompts(arguments.prompts, ensemble, arguments.limit)
    table = accuracies(ensemble, prompts, policies)
    for name, row in table.items():
        print(f"{name:18}", *(f"{domain} {value:.3f}" for domain, value in row.items()))
    result = {"prompts": str(arguments.prompts), "questions": len(prompts), "accuracy": table}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
