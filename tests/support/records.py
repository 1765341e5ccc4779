"""Made-up records of two experts, and a directory of them."""

import numpy as np

from gate.training import records
from gate.training.records import Manifest, RecordWriter, Response

MANIFEST = Manifest(
    format_version=records.FORMAT_VERSION,
    experts=["math", "text"],
    models=["aa", "bb"],
    vocabulary_hash="ab" * 32,
    vocabulary_size=20,
    top_k=4,
    hidden_sizes=[3, 5],
    prompts="cd" * 32,
    grader="exact",
    sources=["math", "uniform"],
    settings={"seed": 0, "temperature": 1.0},
)


def response(task, length=3):
    rng = np.random.default_rng(task)
    return Response(
        task=task,
        prompt=task // 2,
        prompt_id=f"p{task // 2}",
        source=task % 2,
        temperature=1.0,
        reward=float(task % 2),
        tokens=rng.integers(20, size=length).astype(np.int32),
        topk_ids=rng.integers(20, size=(length, 2, 4)).astype(np.int32),
        topk_logprobs=-rng.exponential(size=(length, 2, 4)).astype(np.float32),
        hidden=[rng.normal(size=(length, size)).astype(np.float32) for size in (3, 5)],
        token_logprobs=-rng.exponential(size=(length, 2)).astype(np.float32),
    )


def written(directory, tasks, manifest=MANIFEST):
    writer = RecordWriter(directory, manifest)
    for task in tasks:
        writer.add(response(task))
    writer.close()
