"""`polylogit train`: a gate from the records of `polylogit record`, and, with `--refine-steps`, from its own samples,
made by the deployment that will serve it.

Arguments, files and the deployment; the learning itself is in `gate`.
"""

from __future__ import annotations

import copy
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from gate import checkpoint
from gate.contract import FORMAT_VERSION, Contract
from gate.evaluation.graders import Grader, load_grader
from gate.evaluation.prompts import Question, check_gradable, read_prompts
from gate.files import sha256_file
from gate.model import GateModel
from gate.training.dataset import Records, load
from gate.training.fit import Broadcast, TrainingError, fit, forward_microseconds, held_out, split
from gate.training.records import MANIFEST, Manifest, RecordError, read_manifest
from gate.training.refine import Refinement, refine
from server.config import Config
from server.errors import ConfigError
from server.launch.check import check
from server.logs import LogOptions
from server.training.log import TrainingLog
from server.training.options import RefineOptions, TrainOptions
from server.training.recorder import fingerprints, hidden_sizes, read_config, vocabulary_of
from server.training.refine import deployed_policy
from server.training.rollout import Texts

_VALIDATION_PROMPTS = 200
"""At most so many held-out prompts are answered to validate a refinement."""
_NOT_SETTINGS = ("output", "device")

Input = Literal["topk", "hidden"]


def train(options: TrainOptions, log_options: LogOptions) -> int:
    """Run the command; the exit code."""
    began = time.perf_counter()
    # Small tensors: threads beyond the cores that are free would wait for each other.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    config = read_config(options.config, log_options)
    check(msgspec.structs.replace(config, gate=None))
    samples = _samples(config, options.refine)
    inputs = _inputs(options.inputs)
    manifest, records = _load(config, options.records, hidden="hidden" in inputs)
    contract = _contract(config, options, inputs, manifest)
    device = _device(options.device)
    torch.manual_seed(options.seed)
    model = GateModel(contract).to(device)
    log = TrainingLog(options.output, _settings(options, len(records.rewards)))
    _fit(options, model, contract, records, log)
    if samples is not None:
        _refine(config, options, model, contract, samples, log)
    checkpoint.save(copy.deepcopy(model).cpu(), contract, options.output)
    log.finish()
    _describe(options.output, device, time.perf_counter() - began)
    return 0


def _fit(options: TrainOptions, model: GateModel, contract: Contract, records: Records, log: TrainingLog) -> None:
    """The first phase, unless it is done."""
    if log.progress.phase != "broadcast":
        model.load_state_dict(log.progress.start)
        return
    parts = split(records, seed=options.seed, share=options.validation, limit=options.responses)
    right = float(records.rewards[parts[0]].mean())
    device = next(model.parameters()).device
    sizes = f"{len(parts[0])} responses to train on ({100 * right:.0f}% right), {len(parts[1])} to validate on"
    log.console.print(f"{sizes}; on {device}", soft_wrap=True)
    settings = Broadcast(options.updates, options.batch_size, options.rate, options.negative_weight)
    first, began = log.progress.step, time.perf_counter()
    with log.bar("recorded responses", settings.updates) as report:
        fit(model, contract, records, parts, settings, log.progress, seed=options.seed, report=report)
    if updates := log.progress.step - first:
        each = (time.perf_counter() - began) / updates
        log.console.print(f"{updates} updates, {1e3 * each:.1f} ms each, on {device}", soft_wrap=True)


def _refine(
    config: Config,
    options: TrainOptions,
    model: GateModel,
    contract: Contract,
    samples: tuple[list[Question], Grader],
    log: TrainingLog,
) -> None:
    """The second phase, through the deployment."""
    if log.progress.phase == "broadcast":
        log.progress.enter("refine", model)
        log.save()
    questions, grader = samples
    held = [number for number, each in enumerate(questions) if held_out(each.id, options.seed, options.validation)]
    training = sorted(set(range(len(questions))) - set(held))
    if not training:
        raise TrainingError("--validation: no prompt is left to refine on")
    settings = Refinement(
        steps=options.refine.refine_steps,
        prompts=options.refine.refine_prompts,
        group=options.refine.group,
        learning_rate=options.refine.refine_rate,
        divergence_weight=options.refine.kl,
        temperature=options.refine.temperature,
    )
    with (
        deployed_policy(config, model, contract, questions, grader, max_tokens=options.refine.max_tokens) as policy,
        log.bar("own samples", settings.steps) as report,
    ):
        parts = (training, held[:_VALIDATION_PROMPTS])
        refine(model, contract, policy, parts, settings, log.progress, seed=options.seed, report=report)


def _samples(config: Config, options: RefineOptions) -> tuple[list[Question], Grader] | None:
    """What a refinement samples for: prompts and their grader; None without one."""
    if not options.refine_steps:
        if options.prompts is not None or options.grader is not None:
            raise ConfigError("--prompts and --grader are for --refine-steps; the records have their own")
        return None
    if options.prompts is None or options.grader is None:
        raise ConfigError("--refine-steps needs --prompts and --grader")
    questions, grader = read_prompts(options.prompts), load_grader(options.grader)
    check_gradable(questions, grader)
    texts = Texts(config)
    for question in questions:
        texts.check(question, [])
    return questions, grader


def _load(config: Config, directory: Path, *, hidden: bool) -> tuple[Manifest, Records]:
    """Raises RecordError if the records are not of this deployment's experts."""
    manifest = read_manifest(directory)
    pairs: list[tuple[str, object, object]] = [
        ("experts", manifest.experts, config.expert_names),
        ("the vocabulary", manifest.vocabulary_hash[:12], vocabulary_of(config)[:12]),
    ]
    for what, recorded, here in pairs:
        if recorded != here:
            raise RecordError(f"{directory}: {what} in the records: {recorded}, in the deployment: {here}")
    for name, recorded, here in zip(config.expert_names, manifest.models, fingerprints(config), strict=True):
        if recorded != here:
            what = "weights, dtype, template or system prompt"
            raise RecordError(f"{directory}: expert {name} has changed since the recording ({what})")
    return load(directory, hidden=hidden)


def _inputs(text: str) -> list[Input]:
    names = text.split(",")
    inputs: list[Input] = [name for name in ("topk", "hidden") if name in names]
    if sorted(inputs) != sorted(names):
        raise ConfigError(f"--inputs: {text!r} is not topk, hidden, or topk,hidden")
    return inputs


def _contract(config: Config, options: TrainOptions, inputs: list[Input], manifest: Manifest) -> Contract:
    hidden = "hidden" in inputs
    return Contract(
        format_version=FORMAT_VERSION,
        experts=config.expert_names,
        vocabulary_hash=manifest.vocabulary_hash,
        top_k=manifest.top_k,
        space=options.space,
        inputs=inputs,
        hidden_sizes=hidden_sizes(config) if hidden else [],
        projected_size=options.projected_size if hidden else 0,
        state_size=options.state_size,
    )


def _device(name: str | None) -> torch.device:
    """The one asked for, else a GPU if there is one. Raises ConfigError."""
    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {chosen}: {str(error).splitlines()[0]}") from None


def _settings(options: TrainOptions, responses: int) -> dict[str, Any]:
    """All that decides what is trained, for telling whether an interrupted training is this one."""
    values = asdict(options)
    values |= values.pop("refine")
    given = {key: value for key, value in values.items() if key not in _NOT_SETTINGS}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    if options.refine.prompts is not None:
        settings["prompts"] = sha256_file(options.refine.prompts)  # their text counts, not where it is
    recorded = {"recorded": sha256_file(options.records / MANIFEST), "recorded_responses": responses}
    return settings | recorded


def _describe(path: Path, device: torch.device, seconds: float) -> None:
    """Print what the gate is and costs: on one core, as in the coordinator, and on the GPU that trained it, if any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gate = checkpoint.load(path)
    parameters = sum(parameter.numel() for parameter in gate.module.parameters())
    times = f"{_forward_times(gate)} (one core)"
    torch.set_num_threads(threads)
    if device.type != "cpu":
        times += f", {_forward_times(checkpoint.load(path, str(device)))} ({device})"
    print(f"{path}: {parameters} parameters, {times}, trained in {seconds:.0f} s")


def _forward_times(gate: checkpoint.Checkpoint) -> str:
    return ", ".join(f"{forward_microseconds(gate, rows):.0f} us a forward at B={rows}" for rows in (1, 32))
