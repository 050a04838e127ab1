"""The first continuous-batching engine: transformers' own manager, behind our protocol.

It serves until the project's own engine replaces it; what it cannot do is refused by name and never ignored
(`services.worker.slices`).
"""

import logging
import queue
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from services.worker.engine.engine import DEFAULT_COMPLETION_TOKENS
from services.worker.engine.sampler import SeededSampler
from services.worker.engine.streaming import StreamedText
from services.worker.protocol import Delta, ModelSpec, Output, Request, RequestFault, Response

log = logging.getLogger(__name__)

PAGE_TOKENS = 32
KV_TOKENS = 32_768
BATCH_TOKENS = 512
"""Tokens of one forward pass; halved when memory runs out."""
MIN_BATCH_TOKENS = 32
MAX_SEQUENCES = 128
"""Sequences that the manager has at once; it serves them in their order, so an online one never queues behind more."""
POLL_SECONDS = 0.01
NO_EOS = -1


def kv_tokens(context_length: int | None) -> int:
    """Return how many tokens the KV cache holds: at least one sequence of full length."""
    return max(KV_TOKENS, context_length or 0)


def kv_bytes_per_token(config: dict[str, Any], width: int) -> int:
    """Return the KV cache's bytes a token, from a model's config.json; `width` is the number type's bytes."""
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    head_size = config.get("head_dim") or hidden // heads
    return int(2 * layers * (config.get("num_key_value_heads") or heads) * head_size * width)


@dataclass
class _Sequence:
    """One answer to be generated: `n` of them for each prompt of a request. `text` collects a streamed one's."""

    key: str
    prompt: list[int]
    limit: int
    seed: int
    text: StreamedText | None
    done: tuple[str, str, int] | None = None
    """(text, finish reason, tokens)"""


@dataclass
class _Running:
    """A request and its sequences."""

    request: Request
    prompt_tokens: int
    sequences: list[_Sequence] = field(default_factory=list)


class ContinuousEngine:
    """Serves one causal language model."""

    def __init__(self, model: Any, tokenizer: Any, spec: ModelSpec) -> None:
        self._model, self._tokenizer, self._spec = model, tokenizer, spec
        config = model.config.get_text_config()
        self._vocabulary: int = config.vocab_size
        self._context = int(spec.context_length or getattr(config, "max_position_embeddings", None) or 2048)
        self._eos = _eos_ids(model, tokenizer)
        self._running: dict[int, _Running] = {}
        self._queue: deque[tuple[_Running, _Sequence]] = deque()
        self._given: dict[str, tuple[_Running, _Sequence]] = {}
        self._batch_tokens = BATCH_TOKENS
        self._refused: list[Response] = []
        self._tokens = 0
        self._kv_tokens = kv_tokens(spec.context_length)
        self._kv_bytes = kv_bytes_per_token(config.to_dict(), model.dtype.itemsize) * self._kv_tokens
        self._manager = self._start_manager()

    def _start_manager(self) -> Any:
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=NO_EOS, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=-(-self._kv_tokens // PAGE_TOKENS),
                max_batch_tokens=self._batch_tokens,
                # Prompts of different tenants must never share blocks, and the manager knows no tenants.
                allow_block_sharing=False,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        processors = manager.logit_processor
        processors.logits_processor.append(SeededSampler())
        processors.tensors_required += 1
        processors.do_processing = True
        processors._retrieve_processors_kwargs()  # noqa: SLF001  # there is no public way to add a processor
        manager.start()
        return manager

    @property
    def weight_bytes(self) -> int:
        return int(self._kv_bytes + sum(p.numel() * p.element_size() for p in self._model.parameters()))

    @property
    def progress(self) -> int:
        # Forward passes of the manager's own thread: they stop when it hangs, though our loop goes on.
        return int(getattr(self._manager, "current_batch", 0))

    @property
    def tokens(self) -> int:
        return self._tokens

    def add(self, request: Request) -> None:
        prompts = self._encode(request)
        limit = request.params.max_tokens
        if limit is None and request.task == "complete":
            limit = DEFAULT_COMPLETION_TOKENS
        fault = self._fault(request, prompts, limit or 1)
        if fault is not None:
            self._refused.append(Response(request.id, fault=fault))
            return
        running = self._running[request.id] = _Running(request, sum(map(len, prompts)))
        for index in range(len(prompts) * request.params.n):
            prompt = prompts[index // request.params.n]
            text = StreamedText(self._text, request.params.stop) if request.is_streamed else None
            seed = request.params.seed + index
            running.sequences.append(
                _Sequence(f"{request.id}:{index}", prompt, limit or self._context - len(prompt), seed, text)
            )
        waiting = [(running, sequence) for sequence in running.sequences]
        if request.is_online:
            # Before every batch; among themselves online requests keep their order, as `_first_offline` shows.
            for position, entry in enumerate(waiting, self._first_offline()):
                self._queue.insert(position, entry)
        else:
            self._queue.extend(waiting)

    def _first_offline(self) -> int:
        """Return the place in the queue where the requests of batches begin."""
        places = (place for place, (running, _) in enumerate(self._queue) if not running.request.is_online)
        return next(places, len(self._queue))

    def _feed(self) -> None:
        """Hand the manager sequences from the queue, as many as it may have at once."""
        while self._queue and len(self._given) < MAX_SEQUENCES:
            running, sequence = self._queue.popleft()
            self._given[sequence.key] = (running, sequence)
            self._submit(running.request, sequence)

    def _submit(self, request: Request, sequence: _Sequence) -> None:
        params = request.params
        sampling: dict[str, Any] = {"temperature": float(params.temperature), "seed": sequence.seed}
        sampling |= {"top_p": float(params.top_p), "top_k": params.top_k, "min_p": float(params.min_p)}
        if params.min_tokens and self._eos:
            sampling |= {"min_length": len(sequence.prompt) + params.min_tokens, "eos": tuple(self._eos)}
        self._manager.add_request(
            sequence.prompt,
            request_id=sequence.key,
            max_new_tokens=sequence.limit,
            eos_token_id=NO_EOS if params.ignore_eos or not self._eos else self._eos,
            streaming=request.is_streamed,
            **sampling,
        )

    def _encode(self, request: Request) -> list[list[int]]:
        if request.messages is None:
            return [p if isinstance(p, list) else self._tokenizer(p)["input_ids"] for p in request.prompts]
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
            return [self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        # A base model has no chat template: give it the plainest form that people give such models.
        lines = [f"{message['role']}: {message['content']}\n" for message in request.messages]
        return [self._tokenizer("".join(lines) + "assistant:")["input_ids"]]

    def _fault(self, request: Request, prompts: list[list[int]], limit: int) -> RequestFault | None:
        param = "prompt" if request.messages is None else "messages"
        if request.task == "embed":
            return RequestFault("This model makes no embeddings.", 400, "model", "model_not_supported")
        longest = max(map(len, prompts))
        if longest + limit > self._context:
            message = f"The prompt has {longest} tokens and {limit} may follow; the context is {self._context}."
            return RequestFault(message, 400, param, "context_length_exceeded")
        if any(token >= self._vocabulary for prompt in prompts for token in prompt):
            return RequestFault("A token id is beyond the model's vocabulary.", 400, param, "invalid_value")
        if not all(prompts):
            return RequestFault("The prompt has no tokens.", 400, param, "invalid_value")
        return None

    def abort(self, request_id: int) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            self._queue = deque(entry for entry in self._queue if entry[0] is not running)
            for sequence in running.sequences:
                if self._given.pop(sequence.key, None) is not None:
                    self._manager.cancel_request(sequence.key)

    def wait_seconds(self) -> float | None:
        if self._refused:
            return 0.0
        return POLL_SECONDS if self._running else None

    def step(self) -> Output:
        """Collect what the manager's thread has generated. Raises RuntimeError when that thread died."""
        output = Output(self._refused)
        self._refused = []
        self._feed()
        while (generated := self._next_generated()) is not None:
            entry = self._given.get(generated.request_id)
            if generated.error is not None:
                self._recover(generated.error)
                break
            if entry is not None:  # None: aborted
                self._take(*entry, generated, output)
        if self._running and not self._manager.is_running():
            self._recover("the generation thread ended")
        return output

    def _next_generated(self) -> Any:
        try:
            return self._manager.output_router.output_queue.get_nowait()
        except queue.Empty:
            return None

    def _take(self, running: _Running, sequence: _Sequence, generated: Any, output: Output) -> None:
        """Note what a sequence has become, and answer its request when that was the last one."""
        request_id, tokens = running.request.id, list(generated.generated_tokens)
        if not generated.is_finished():
            if sequence.text is not None and (piece := sequence.text.grow(tokens)):
                output.deltas.append(Delta(request_id, running.sequences.index(sequence), piece))
            return
        del self._given[sequence.key]
        sequence.done = self._decode(running.request, tokens)
        if sequence.text is not None and (piece := sequence.text.finish(sequence.done[0])):
            output.deltas.append(Delta(request_id, running.sequences.index(sequence), piece))
        self._tokens += len(tokens)
        if all(other.done for other in running.sequences):
            output.responses.append(self._respond(running))

    def _recover(self, error: str) -> None:
        """Start again with half the batch when memory ran out; raises RuntimeError for every other end.

        A CUDA error poisons the whole process: it ends, and its requests are tried again in a fresh one.
        """
        self._manager.stop(block=True, timeout=10, hard_stop=True)
        cause = self._manager.background_thread_status.fatal_error
        if not is_out_of_memory(cause) or self._batch_tokens <= MIN_BATCH_TOKENS:
            raise RuntimeError(f"generation failed: {cause or error}")
        self._batch_tokens //= 2
        log.warning("out of memory: smaller batches from now on", extra={"batch_tokens": self._batch_tokens})
        self._manager = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._manager = self._start_manager()
        # A sequence's random stream is its own, so that it draws the same tokens again; deltas go on where they were.
        self._queue.extendleft(reversed(self._given.values()))
        self._given.clear()

    def _decode(self, request: Request, tokens: list[int]) -> tuple[str, str, int]:
        """Return (text, finish reason, number of tokens) of one finished sequence."""
        ended = bool(tokens) and tokens[-1] in self._eos and not request.params.ignore_eos
        text = self._text(tokens[:-1] if ended else tokens)
        cuts = [position for stop in request.params.stop if (position := text.find(stop)) >= 0]
        if cuts:
            return text[: min(cuts)], "stop", len(tokens)
        return text, "stop" if ended else "length", len(tokens)

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _respond(self, running: _Running) -> Response:
        del self._running[running.request.id]
        answers = [sequence.done for sequence in running.sequences if sequence.done]
        return Response(
            running.request.id,
            choices=[(text, reason) for text, reason, _ in answers],
            prompt_tokens=running.prompt_tokens,
            completion_tokens=sum(count for _, _, count in answers),
        )

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10, hard_stop=True)
        self._manager = self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on a GPU or (as torch says it there) on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return []
    return list(configured) if isinstance(configured, list | tuple) else [configured]
