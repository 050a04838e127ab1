"""The generation engine: many requests at once on one causal model, joining and leaving at every step (ADR 0007)."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from services.worker.engine.adapters import Adapter, route
from services.worker.engine.blocks import BlockPool
from services.worker.engine.decoder import Decoder, is_out_of_memory
from services.worker.engine.engine import DEFAULT_COMPLETION_TOKENS
from services.worker.engine.grammar import Constraint, SchemaRefused
from services.worker.engine.kernels.kernels import BLOCK_TOKENS, Layout, Span, plan_layout
from services.worker.engine.kernels.transfer import to_device
from services.worker.engine.prompts import Prompts
from services.worker.engine.sampling import Draw, draw, needs_tokens
from services.worker.engine.scheduler import Chunk, Scheduler, SchedulerConfig
from services.worker.engine.sequence import Sequence
from services.worker.engine.statistics import StepClock
from services.worker.engine.streaming import StreamedText
from services.worker.protocol import Delta, EngineStatistics, Output, Request, RequestFault, Response, TokenLogprob

log = logging.getLogger(__name__)

FEWEST_STEP_TOKENS = 32


@dataclass
class _Running:
    """A request and its sequences: `n` for each prompt."""

    request: Request
    prompt_tokens: int
    adapter: Adapter | None
    sequences: list[Sequence] = field(default_factory=list)


class GenerationEngine:
    """Serves one causal language model.

    plans_ahead: Tell the device a step before the tokens of the one before it are known here, so that a GPU has
        something to do meanwhile. Answers are the same; a sequence that ends otherwise than by its length is computed
        once in vain.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Prompts,
        blocks: int,
        config: SchedulerConfig | None = None,
        *,
        plans_ahead: bool = False,
    ) -> None:
        self._decoder, self._prompts, self.plans_ahead = decoder, prompts, plans_ahead
        self.pool = BlockPool(blocks, BLOCK_TOKENS)
        self.scheduler = Scheduler(self.pool, config or SchedulerConfig())
        self._running: dict[int, _Running] = {}
        self._adapters: dict[str, Adapter] = {}
        self._refused: list[Response] = []
        self._draw: Draw | None = None
        """What was drawn and not read."""
        self._steps = 0
        self._tokens = 0
        self._aborts = 0
        self._clock = StepClock()

    @property
    def weight_bytes(self) -> int:
        adapters = sum(adapter.bytes for adapter in self._adapters.values())
        return self._decoder.weight_bytes + self._decoder.pool_bytes + adapters

    @property
    def progress(self) -> int:
        return self._steps

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def statistics(self) -> EngineStatistics:
        scheduler, pool = self.scheduler, self.pool
        return EngineStatistics(
            tokens=self._tokens,
            prompt_tokens_computed=scheduler.prompt_tokens_computed,
            prompt_tokens_cached=scheduler.prompt_tokens_cached,
            steps=scheduler.steps,
            sequences=scheduler.sequences,
            places=scheduler.steps * scheduler.config.most_sequences,
            part_seconds=self._clock.part_seconds,
            preemptions=scheduler.preemptions,
            aborts=self._aborts,
            evictions=pool.evictions,
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            blocks=pool.blocks,
            blocks_in_use=pool.in_use,
            blocks_cached=pool.cached,
            kv_bytes=self._decoder.pool_bytes,
        )

    def wait_seconds(self) -> float | None:
        return 0.0 if self._refused or self._running else None

    def add(self, request: Request) -> None:
        prompts = self._prompts.encode(request)
        limit = request.params.max_tokens
        if limit is None and request.task == "complete":
            limit = DEFAULT_COMPLETION_TOKENS
        fault = self._prompts.fault(request, prompts, limit or 1)
        constraints: list[Constraint | None] = [None for _ in range(len(prompts) * request.params.n)]
        if fault is None and request.params.schema is not None:
            try:
                constraints = [*self._prompts.grammars.constraints(request.params.schema, len(constraints))]
            except SchemaRefused as error:
                fault = RequestFault(f"The schema cannot be followed: {error}", 400, "response_format", "invalid_value")
        if fault is not None:
            self._refused.append(Response(request.id, fault=fault))
            return
        adapter = self._adapters[request.adapter] if request.adapter else None
        running = self._running[request.id] = _Running(request, sum(map(len, prompts)), adapter)
        for index in range(len(prompts) * request.params.n):
            prompt = prompts[index // request.params.n]
            sequence = self._sequence(request, index, prompt, limit or self._prompts.context - len(prompt))
            if adapter is not None:  # what it computes of a prompt is nobody else's
                sequence.namespace = f"{adapter.digest}/{request.namespace}"
            sequence.constraint = constraints[index]
            running.sequences.append(sequence)
            self.scheduler.add(sequence)

    def _sequence(self, request: Request, index: int, prompt: list[int], limit: int) -> Sequence:
        is_read = request.is_streamed or request.params.stop
        return Sequence(
            request_id=request.id,
            index=index,
            tokens=list(prompt),
            prompt_tokens=len(prompt),
            limit=limit,
            seed=request.params.seed + index,
            params=request.params,
            eos=self._prompts.eos,
            namespace=request.namespace,
            is_online=request.is_online,
            text=StreamedText(self._prompts.decode, request.params.stop) if is_read else None,
        )

    def load_adapter(self, directory: str) -> Adapter:
        """Return an adapter of this model, from its files; raises ModelRefused. For any thread."""
        return self._decoder.read_adapter(Path(directory))

    def attach(self, directory: str, adapter: Adapter) -> None:
        """Serve requests for the adapter of `directory` from now on."""
        self._adapters[directory] = adapter

    def detach(self, directory: str) -> None:
        """Forget an adapter that no request uses."""
        del self._adapters[directory]

    def uses(self, directory: str) -> bool:
        """Whether a request for an adapter is unanswered."""
        return any(running.request.adapter == directory for running in self._running.values())

    def abort(self, request_id: int) -> Response | None:
        running = self._running.pop(request_id, None)
        if running is None:
            return None
        self._aborts += 1
        self.scheduler.remove(request_id)
        generated = sum(sequence.generated for sequence in running.sequences)
        return Response(request_id, prompt_tokens=running.prompt_tokens, completion_tokens=generated, is_aborted=True)

    def step(self) -> Output:
        """Have computed what the scheduler chose; take in the tokens of the step before, or already its own."""
        output, self._refused = Output(self._refused), []
        self._steps += 1
        self._clock.start()
        chunks = self.scheduler.schedule()
        self._clock.charge("schedule")
        drawn = self._launch(chunks) if chunks else None
        self._deliver(output)
        if drawn is None:
            return output
        self.scheduler.computed(chunks)
        for row, sequence in enumerate(drawn.sequences):
            sequence.pending = row if sequence.is_running else None  # what was delivered just now may have ended it
        self._draw = drawn
        self._clock.charge("schedule")
        if not self.plans_ahead or any(needs_tokens(sequence) for sequence in drawn.sequences):
            self._deliver(output)
        return output

    @torch.inference_mode()
    def _launch(self, chunks: list[Chunk]) -> Draw | None:
        """Tell the device to compute the chunks and to draw what follows those that end their sequences.

        None when memory ran out, and less is tried next. A CUDA error poisons the whole process: it ends, and its
        requests are tried again in a fresh one.
        """
        layout, known, rows = plan_step(chunks)
        if self._adapters:
            layout.adapters = route((self._running[chunk.sequence.request_id].adapter, chunk.count) for chunk in chunks)
        try:
            tokens = self._with_pending(known, chunks)
            self._clock.charge("prepare")
            logits = self._decoder.forward(tokens, layout, rows)
            self._clock.charge("forward")
            return draw(logits, [chunk.sequence for chunk in chunks if chunk.is_last])
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            smaller = self.scheduler.config.smaller()
            if not is_out_of_memory(error) or smaller.step_tokens < FEWEST_STEP_TOKENS:
                raise
            log.warning("out of memory: smaller steps from now on", extra={"step_tokens": smaller.step_tokens})
            self.scheduler.config = smaller
            self._decoder.free_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None
        finally:
            self._clock.charge("sample")

    def _with_pending(self, known: list[int], chunks: list[Chunk]) -> torch.Tensor:
        """Return a step's tokens on the device, those that only the device knows taken from where it drew them."""
        device = self._decoder.device
        tokens = to_device(known, device, torch.long)
        places: list[int] = []
        sources: list[int] = []
        row = -1
        for chunk in chunks:
            row += chunk.count
            if chunk.sequence.pending is not None:
                places.append(row)
                sources.append(chunk.sequence.pending)
        if self._draw is not None and places:
            tokens[to_device(places, device)] = self._draw.tokens[to_device(sources, device)]
        return tokens

    def _deliver(self, output: Output) -> None:
        """Give what was drawn to the sequences that still want it."""
        if self._draw is None:
            return
        drawn, self._draw = self._draw, None
        tokens = drawn.read()
        self._clock.charge("sample")
        for row, (sequence, token) in enumerate(zip(drawn.sequences, tokens, strict=True)):
            if sequence.pending is None:  # its request was given up meanwhile, or just now with another choice
                continue
            sequence.pending = None
            if (logprob := drawn.logprob(row, token)) is not None:
                sequence.logprobs.append(logprob)
            self._take(sequence, token, output)
        self._clock.charge("deliver")

    def _take(self, sequence: Sequence, token: int, output: Output) -> None:
        """Give a sequence its next token; answer its request when that was the last one of all."""
        sequence.append(token)
        self._tokens += 1
        if sequence.constraint is not None and sequence.constraint.error is not None:
            message = f"The schema cannot be followed any further: {sequence.constraint.error}"
            self.abort(sequence.request_id)
            fault = RequestFault(message, 400, "response_format", "invalid_value")
            output.responses.append(Response(sequence.request_id, fault=fault))
            return
        if sequence.text is not None and not sequence.has_end_token:
            self._send(sequence, sequence.text.grow(sequence.answer, may_stop=sequence.may_stop), output)
            if sequence.text.is_stopped:
                sequence.finish_reason = "stop"
        if sequence.finish_reason is None:
            return
        self.scheduler.finish(sequence)
        running = self._running[sequence.request_id]
        if sequence.text is not None:
            self._send(sequence, sequence.text.finish(self._final_text(sequence)), output)
        if all(other.finish_reason for other in running.sequences):
            output.responses.append(self._respond(running))

    def _send(self, sequence: Sequence, piece: str, output: Output) -> None:
        if not self._running[sequence.request_id].request.is_streamed:
            return
        logprobs = self._logprobs(sequence, sequence.sent_logprobs) if piece or sequence.finish_reason else []
        if piece or logprobs:
            sequence.sent_logprobs += len(logprobs)
            output.deltas.append(Delta(sequence.request_id, sequence.index, piece, logprobs))

    def _final_text(self, sequence: Sequence) -> str:
        if sequence.text is not None and sequence.text.is_stopped:
            return sequence.text.stopped_text
        answer = sequence.answer
        return self._prompts.decode(answer[:-1] if sequence.has_end_token else answer)

    def _respond(self, running: _Running) -> Response:
        del self._running[running.request.id]
        return Response(
            running.request.id,
            choices=[(self._final_text(s), s.finish_reason or "length") for s in running.sequences],
            logprobs=[self._logprobs(s) for s in running.sequences if running.request.params.logprobs is not None],
            prompt_tokens=running.prompt_tokens,
            completion_tokens=sum(sequence.generated for sequence in running.sequences),
            # The choices of a prompt share it: it is counted once.
            cached_tokens=sum(s.cached_tokens for s in running.sequences[:: running.request.params.n]),
        )

    def _logprobs(self, sequence: Sequence, first: int = 0) -> list[TokenLogprob]:
        """Return those of the tokens of its text, from number `first` on."""

        def named(token: int, value: float, top: list[TokenLogprob]) -> TokenLogprob:
            return TokenLogprob(self._prompts.token_text(token), value, top, self._prompts.token_bytes(token))

        drawn = sequence.logprobs[first : len(sequence.logprobs) - sequence.has_end_token]
        return [
            named(each.token, each.logprob, [named(token, value, []) for token, value in each.top]) for each in drawn
        ]

    def check_integrity(self) -> None:
        """Raise AssertionError when the books of blocks do not add up."""
        self.scheduler.check_integrity()

    def close(self) -> None:
        self._adapters.clear()
        self._draw = None
        del self._decoder
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def plan_step(chunks: list[Chunk]) -> tuple[Layout, list[int], list[int]]:
    """Return the layout of a step, its tokens (0 for pending ones), and the rows from which a token is drawn."""
    spans: list[Span] = []
    tokens: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        spans.append(Span(chunk.sequence.blocks, chunk.start, len(tokens), chunk.count))
        tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] or [0]
        if chunk.is_last:
            rows.append(len(tokens) - 1)
    return plan_layout(spans), tokens, rows
