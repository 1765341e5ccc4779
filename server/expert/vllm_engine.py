"""The vLLM adapter: one `EngineCore` in this process, stepped by hand. With `rendezvous`
and `grammar`, all that the project knows of vLLM.

Tested with vLLM 0.32.0 and refuses any other version: it reaches for the scheduler and the model runner of the same
process, which vLLM does not promise to keep.

vLLM and torch read the environment when they are imported: `server.expert.settle` prepares it first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from server import VLLM_VERSION
from server.config import ExpertConfig, parse_size
from server.errors import EngineError
from server.expert.engine import Exchange, Int32, Rows
from server.expert.grammar import Grammar, GrammarBackend
from server.expert.rendezvous import SLOT, Rendezvous, V1Rendezvous, V2Rendezvous
from server.wire.expert import Add, Load, Ready

_EMPTY = np.zeros(0, np.int32)
_MAX_WORDS = 200
"""Characters of an error message that are passed on."""


class VllmEngine:
    """A vLLM engine behind `server.expert.engine.Engine`.

    `model`: the model's directory. `meeting`: a file, not there yet, at which the engines of a tensor-parallel expert's
    ranks find each other. `max_sequences`: the most that run at once. `want_hidden`: whether rows carry the last hidden
    state. `end_tokens`: ids that end a text under a grammar. Raises EngineError for another vLLM version, and whatever
    vLLM raises while loading.
    """

    def __init__(
        self,
        expert: ExpertConfig,
        model: str,
        *,
        meeting: Path,
        max_sequences: int,
        want_hidden: bool,
        end_tokens: Sequence[int],
    ) -> None:
        if vllm.__version__.split("+")[0] != VLLM_VERSION:
            raise EngineError(f"vLLM {vllm.__version__} is installed; this adapter supports {VLLM_VERSION}")
        config = _engine_args(expert, model, max_sequences).create_engine_config()
        rendezvous_class = V2Rendezvous if config.use_v2_model_runner else V1Rendezvous
        config.model_config.logits_processors = [rendezvous_class]
        executor = partial(_RankExecutor, meeting) if expert.tensor_parallel_size > 1 else Executor.get_class(config)
        self._core = EngineCore(config, executor, log_stats=False)
        self._scheduler: Any = self._core.scheduler
        runner = _model_runner(self._core)
        self._rendezvous = _find_rendezvous(runner)
        self._rendezvous.attach(self._decide)
        self._hidden: torch.Tensor | None = None
        if want_hidden:
            _capture_hidden(runner.model, self._keep_hidden)
        _install_grammars(self._core, Path(model) / "tokenizer.json", end_tokens)
        self._grammars: dict[int, Grammar] = {}
        self._refused: dict[int, str] = {}
        self._names: dict[int, str] = {}
        self._requests: dict[int, Any] = {}
        self._prefilling: set[int] = set()
        self._added = 0
        self._exchange: Exchange | None = None
        self._preemptions = 0
        self._scores: list[tuple[int, npt.NDArray[np.float32]]] = []
        self._cached: dict[int, int] = {}
        self.info = describe(config)

    def add(self, add: Add) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max(1, self.info.max_model_len - len(add.tokens)),
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=0 if add.score else None,
            extra_args={SLOT: add.slot},
            structured_outputs=None if add.grammar is None else StructuredOutputsParams(grammar=add.grammar),
        )
        self._submit(add.sequence, add.slot, add.tokens, params, add.priority, add.generated)

    def _submit(
        self,
        sequence: int,
        slot: int,
        tokens: list[int],
        params: SamplingParams,
        priority: int,
        generated: int = 0,
    ) -> None:
        self._added += 1
        name = f"{sequence}-{self._added}"
        wire = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=tokens,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=priority,
        )
        request, wave = self._core.preprocess_add_request(wire)
        self._names[slot] = name
        self._requests[slot] = request
        self._prefilling.add(slot)
        if request.structured_output_request is None or self._follow(slot, request, tokens[len(tokens) - generated :]):
            self._core.add_request(request, wave)

    def _follow(self, slot: int, request: Any, generated: list[int]) -> bool:
        """Have the grammar of a request know what was generated; whether it can be followed from there."""
        grammar = request.structured_output_request.grammar
        if isinstance(grammar, Exception):
            self._refuse(slot, str(grammar))
            return False
        grammar.accept_tokens(request.request_id, generated)
        self._grammars[slot] = grammar
        return not self._look_at_grammar(slot)

    def _look_at_grammar(self, slot: int) -> bool:
        """Whether the grammar in `slot` has failed; then it is noted."""
        if not (error := self._grammars[slot].error):
            return False
        del self._grammars[slot]
        self._refuse(slot, error)
        return True

    def _refuse(self, slot: int, error: str) -> None:
        words = error.partition("\n<state>")[0][:_MAX_WORDS]
        self._refused[_sequence_of(self._names[slot])] = f"the grammar cannot be followed: {words}"

    def drop(self, slots: Sequence[int]) -> None:
        known = [slot for slot in slots if slot in self._names]
        self._prefilling.difference_update(known)
        for slot in known:
            self._grammars.pop(slot, None)
            self._preemptions += self._requests.pop(slot).num_preemptions
        self._core.abort_requests([self._names.pop(slot) for slot in known])

    def busy(self) -> bool:
        return bool(self._names)

    def step(self, exchange: Exchange) -> None:
        self._exchange = exchange
        outputs, _ = self._core.step()
        for group in outputs.values():
            for output in group.outputs:
                self._note(output)
        for slot in list(self._grammars):
            self._look_at_grammar(slot)
        if self._exchange is not None:
            self._exchange = None
            exchange(Rows(_EMPTY, _EMPTY, torch.zeros(0, self.info.vocab_size), None))

    def _decide(self, slots: Int32, positions: Int32, logits: torch.Tensor) -> Int32:
        """Called by the sampler in the middle of a step with every logits row, unfinished prefills among them."""
        exchange, self._exchange = self._exchange, None
        tokens = np.zeros(len(slots), np.int32)
        if exchange is None:
            raise EngineError("vLLM sampled twice in one step")
        due = np.fromiter((self._is_due(slot) for slot in slots.tolist()), bool, len(slots))
        if self._prefilling:
            self._count_cached(slots[due].tolist())
        if due.all():
            return exchange(Rows(slots, positions, logits, self._hidden))
        index = torch.from_numpy(np.flatnonzero(due)).to(logits.device)
        hidden = None if self._hidden is None else self._hidden[index]
        tokens[due] = exchange(Rows(slots[due], positions[due], logits[index], hidden))
        return tokens

    def _is_due(self, slot: int) -> bool:
        """Whether this step completes the sequence's prefill (or decodes): its row is a sampling position."""
        request = self._requests.get(slot)
        return request is not None and request.num_computed_tokens >= request.num_tokens

    def _count_cached(self, slots: list[int]) -> None:
        """Note the prefix-cache hits of the prefills that this step completes."""
        for slot in self._prefilling.intersection(slots):
            self._prefilling.discard(slot)
            request = self._requests[slot]
            if request.prefill_stats is not None:
                self._cached[_sequence_of(request.request_id)] = request.prefill_stats.num_cached_tokens

    def _keep_hidden(self, hidden: torch.Tensor) -> None:
        self._hidden = hidden

    def _note(self, output: Any) -> None:
        """Keep what a step's output says beside the token: the prompt's log-probabilities."""
        if output.new_prompt_logprobs_tensors is not None:
            logprobs = output.new_prompt_logprobs_tensors.logprobs[:, 0].float().cpu().numpy()
            self._scores.append((_sequence_of(output.request_id), logprobs))

    def load(self) -> Load:
        preemptions = self._preemptions + sum(request.num_preemptions for request in self._requests.values())
        return Load(self._scheduler.get_kv_cache_usage(), len(self._scheduler.running), preemptions)

    def scores(self) -> list[tuple[int, npt.NDArray[np.float32]]]:
        scores, self._scores = self._scores, []
        return scores

    def refused(self) -> list[tuple[int, str]]:
        refused, self._refused = self._refused, {}
        return list(refused.items())

    def cached_tokens(self) -> dict[int, int]:
        cached, self._cached = self._cached, {}
        return cached

    def bare_steps(self, sequences: int, prompt_tokens: int, tokens: int) -> list[float]:
        self._rendezvous.detach()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        for slot in range(sequences):
            prompt = [(7 * slot + index) % self.info.vocab_size for index in range(prompt_tokens)]
            self._submit(slot, slot, prompt, params, 0)
        seconds = []
        while self._scheduler.has_unfinished_requests():
            started = time.perf_counter()
            self._core.step()
            seconds.append(time.perf_counter() - started)
        self._names.clear()
        self._requests.clear()
        self._prefilling.clear()
        self._core.step()  # lets the runner forget the finished requests
        self._rendezvous.attach(self._decide)
        return seconds

    def close(self) -> None:
        self._core.shutdown()


class _RankExecutor(ExecutorWithExternalLauncher):
    """One rank of several. They meet at a file, as those of vLLM's own executor do: at an address one would listen."""

    def __init__(self, meeting: Path, config: Any) -> None:
        self._meeting = meeting
        super().__init__(config)

    def _distributed_args(self) -> tuple[str, int, int]:
        _, rank, local_rank = super()._distributed_args()
        return f"file://{self._meeting}", rank, local_rank


def _engine_args(expert: ExpertConfig, model: str, max_sequences: int) -> EngineArgs:
    """`expert` in vLLM's words. What `engine_args` says wins, but for what the rendezvous depends on."""
    ranks = expert.tensor_parallel_size
    chosen: dict[str, Any] = {"max_num_seqs": max_sequences, "dtype": expert.dtype, "seed": 0}
    chosen |= {"enforce_eager": True, "block_size": 32} if expert.device == "cpu" else {}
    if expert.max_model_len is not None:
        chosen["max_model_len"] = expert.max_model_len
    if expert.max_num_batched_tokens is not None:
        chosen["max_num_batched_tokens"] = expert.max_num_batched_tokens
    if expert.kv_cache_memory is not None:
        chosen["kv_cache_memory_bytes"] = parse_size(expert.kv_cache_memory)
    required: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}
    required |= {
        "model": model,
        "tensor_parallel_size": ranks,
        "scheduling_policy": "priority",
        "async_scheduling": False,
        "enable_chunked_prefill": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    return EngineArgs(**(chosen | expert.engine_args | required))


def _model_runner(core: EngineCore) -> Any:
    driver: Any = core.model_executor.driver_worker
    return getattr(driver, "worker", driver).model_runner


def _find_rendezvous(runner: Any) -> Rendezvous:
    """The instance that vLLM made from the class it was given."""
    if hasattr(runner, "input_batch"):
        candidates = list(runner.input_batch.logitsprocs.all)
    else:
        candidates = list(runner.sampler.logits_processors)
    found = [candidate for candidate in candidates if isinstance(candidate, Rendezvous)]
    if len(found) != 1:
        raise EngineError("vLLM did not load the rendezvous logits processor")
    return found[0]


def _install_grammars(core: EngineCore, tokenizer: Path, end_tokens: Sequence[int]) -> None:
    """Have vLLM take its grammars from ours, compiled while a request is added: ranks must not differ in when."""
    manager: Any = core.structured_output_manager
    vocabulary = manager.vllm_config.model_config.get_vocab_size()
    manager.backend = GrammarBackend(tokenizer, vocabulary, end_tokens)
    manager._use_async_grammar_compilation = False


def _capture_hidden(model: torch.nn.Module, keep: Any) -> None:
    """Call `keep` with what enters the LM head in each step: the last hidden state of every sampled row [B, H]."""
    heads = [module for module in model.modules() if type(module).__name__ == "LogitsProcessor"]
    if not heads:
        raise EngineError("this model has no LogitsProcessor layer: a gate on hidden states cannot be served")

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[1] if len(args) > 1 else kwargs["hidden_states"])

    heads[0].register_forward_pre_hook(hook, with_kwargs=True)


def describe(config: Any) -> Ready:
    """What an engine is, of its `VllmConfig` once it is loaded."""
    cache, block_size = config.cache_config, config.cache_config.block_size
    blocks = (cache.num_gpu_blocks - 1) * block_size
    return Ready(
        # Where layers of several kinds share the blocks, a token takes one of each: vLLM counts what that leaves.
        kv_tokens=blocks if cache.kv_cache_size_tokens is None else min(blocks, cache.kv_cache_size_tokens),
        block_size=block_size,
        max_model_len=config.model_config.max_model_len,
        vocab_size=config.model_config.get_vocab_size(),
        hidden_size=config.model_config.get_hidden_size(),
        version=vllm.__version__,
    )


def _sequence_of(request_id: str) -> int:
    """Request ids are "<sequence>-<count>", since a sequence may be added several times."""
    return int(request_id.split("-", 1)[0])
