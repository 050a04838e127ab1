"""The first continuous-batching engine: transformers' own manager, behind our protocol.

It serves until the project's own engine replaces it; what it cannot do is refused by name and never ignored
(`services.worker.slices`).
"""

import queue
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from services.worker.engine.engine import DEFAULT_COMPLETION_TOKENS
from services.worker.engine.sampler import SeededSampler
from services.worker.protocol import ModelSpec, Request, RequestFault, Response

PAGE_TOKENS = 32
KV_TOKENS = 32_768
BATCH_TOKENS = 512
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
class _Running:
    """A request and its sequences: `n` for each prompt. `done` holds (text, finish reason, tokens) by sequence."""

    request: Request
    prompt_tokens: int
    sequences: list[str]
    done: dict[str, tuple[str, str, int]] = field(default_factory=dict)


class ContinuousEngine:
    """Serves one causal language model."""

    def __init__(self, model: Any, tokenizer: Any, spec: ModelSpec) -> None:
        self._model, self._tokenizer, self._spec = model, tokenizer, spec
        config = model.config.get_text_config()
        self._vocabulary: int = config.vocab_size
        self._context = int(spec.context_length or getattr(config, "max_position_embeddings", None) or 2048)
        self._eos = _eos_ids(model, tokenizer)
        self._running: dict[int, _Running] = {}
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
                max_batch_tokens=BATCH_TOKENS,
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
        count = len(prompts) * request.params.n
        sequences = [f"{request.id}:{index}" for index in range(count)]
        self._running[request.id] = _Running(request, sum(map(len, prompts)), sequences)
        for index, sequence in enumerate(sequences):
            prompt = prompts[index // request.params.n]
            self._submit(sequence, prompt, limit or self._context - len(prompt), request, index)

    def _submit(self, sequence: str, prompt: list[int], limit: int, request: Request, index: int) -> None:
        params = request.params
        sampling: dict[str, Any] = {"temperature": float(params.temperature), "seed": params.seed + index}
        sampling |= {"top_p": float(params.top_p), "top_k": params.top_k, "min_p": float(params.min_p)}
        if params.min_tokens and self._eos:
            sampling |= {"min_length": len(prompt) + params.min_tokens, "eos": tuple(self._eos)}
        eos = NO_EOS if params.ignore_eos or not self._eos else self._eos
        self._manager.add_request(prompt, request_id=sequence, max_new_tokens=limit, eos_token_id=eos, **sampling)

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
            for sequence in running.sequences:
                if sequence not in running.done:
                    self._manager.cancel_request(sequence)

    def wait_seconds(self) -> float | None:
        if self._refused:
            return 0.0
        return POLL_SECONDS if self._running else None

    def step(self) -> list[Response]:
        """Collect what the manager's thread has finished. Raises RuntimeError when that thread died."""
        responses, self._refused = self._refused, []
        while (output := self._next_output()) is not None:
            running = self._running.get(int(output.request_id.partition(":")[0]))
            if running is None:  # aborted
                continue
            if output.error is not None:
                raise RuntimeError(f"generation failed: {output.error}")
            running.done[output.request_id] = self._decode(running.request, output.generated_tokens)
            self._tokens += len(output.generated_tokens)
            if len(running.done) == len(running.sequences):
                responses.append(self._respond(running))
        if self._running and not self._manager.is_running():
            # A CUDA error poisons the whole process: it ends, its requests are tried again in a fresh one.
            raise RuntimeError(f"the generation thread died: {self._manager.background_thread_status.fatal_error}")
        return responses

    def _next_output(self) -> Any:
        try:
            return self._manager.output_router.output_queue.get_nowait()
        except queue.Empty:
            return None

    def _decode(self, request: Request, tokens: list[int]) -> tuple[str, str, int]:
        """Return (text, finish reason, number of tokens) of one finished sequence."""
        ended = bool(tokens) and tokens[-1] in self._eos and not request.params.ignore_eos
        text: str = self._tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        cuts = [position for stop in request.params.stop if (position := text.find(stop)) >= 0]
        if cuts:
            return text[: min(cuts)], "stop", len(tokens)
        return text, "stop" if ended else "length", len(tokens)

    def _respond(self, running: _Running) -> Response:
        del self._running[running.request.id]
        answers = [running.done[sequence] for sequence in running.sequences]
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


def _eos_ids(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return []
    return list(configured) if isinstance(configured, list | tuple) else [configured]
