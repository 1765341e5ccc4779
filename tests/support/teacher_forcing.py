"""Served distributions along given texts: each prefix is a prompt of its own, asked for one token and everything known
about it."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from server.launch.local import LocalDeployment
from server.policy import Policy
from tests.support import demo
from tests.support.oracle.huggingface import Reference
from tests.support.sequences import greedy

_BATCH = 512


class Texts:
    """Prompts of the demo with their right answers.

    `prefixes`: the token ids before each position of an answer, N of them; `logprobs` float64[N, E, V]: the experts'
    full distributions there, from transformers.
    """

    def __init__(self, reference: Reference, prompts: int) -> None:
        lines = (demo.DEMO / "prompts" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        self.prefixes: list[list[int]] = []
        found = []
        for line in lines[:: max(1, len(lines) // prompts)][:prompts]:
            example = json.loads(line)
            prompt = reference.encode(example["messages"])
            answer = reference.tokenizer.encode(example["answer"], add_special_tokens=False)
            text = prompt + answer
            self.prefixes += [text[:end] for end in range(len(prompt), len(text) + 1)]
            found.append(reference.logprobs(text)[:, len(prompt) - 1 :].transpose(0, 1))
        self.logprobs = torch.cat(found)


def served(deployment: LocalDeployment, texts: Texts, policy: Policy) -> Tensor:
    """Probabilities float64[N, V] that the deployment reports after each prefix."""
    probabilities = torch.zeros(len(texts.prefixes), demo.VOCABULARY, dtype=torch.float64)
    for start in range(0, len(texts.prefixes), _BATCH):
        prefixes = texts.prefixes[start : start + _BATCH]
        requests = [greedy([prefix] * 3, policy, 1, top_logprobs=demo.VOCABULARY) for prefix in prefixes]
        results = deployment.generate(requests)
        for row, request in enumerate(requests, start):
            ids, logprobs = zip(*results[request.id].details[0].top, strict=True)
            probabilities[row, list(ids)] = torch.tensor(logprobs, dtype=torch.float64).exp()
    return probabilities
