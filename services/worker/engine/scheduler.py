"""Decides what a step computes: who joins, which tokens of whom, and who gives way when blocks run out. No tensors."""

from collections import deque
from dataclasses import dataclass, replace

from services.worker.engine.blocks import BlockPool, block_hashes
from services.worker.engine.sequence import Sequence


@dataclass(frozen=True)
class SchedulerConfig:
    """`step_tokens`: tokens of one pass. `online_step_tokens`: the same while somebody waits for an answer's start.

    `fewest_prompt_tokens` are for prompts, however many sequences generate.
    """

    step_tokens: int = 512
    online_step_tokens: int = 128
    fewest_prompt_tokens: int = 64
    most_sequences: int = 256

    def smaller(self) -> "SchedulerConfig":
        """Return the same with steps of half the tokens."""
        half = self.step_tokens // 2
        return replace(self, step_tokens=half, online_step_tokens=min(self.online_step_tokens, half))

    def __post_init__(self) -> None:
        if not 1 <= self.online_step_tokens <= self.step_tokens:
            raise ValueError("online_step_tokens is between 1 and step_tokens")


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a sequence, from `start` on; with the last of them comes its next token (`is_last`)."""

    sequence: Sequence
    start: int
    count: int
    is_last: bool


class Scheduler:
    """Sequences wait, run, and may be put back: preempted ones keep their tokens and compute their cache again."""

    def __init__(self, pool: BlockPool, config: SchedulerConfig) -> None:
        self.config = config
        self._pool = pool
        self._waiting: deque[Sequence] = deque()
        self._waiting_online: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens_computed = 0
        self.prompt_tokens_cached = 0
        """Prompt tokens that were not computed, as others had computed them before."""
        self.steps = 0
        self.sequences = 0
        """How many took part in a step, summed over all steps."""

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting or self._waiting_online)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._waiting_online)

    def add(self, sequence: Sequence) -> None:
        self._queue_of(sequence).append(sequence)

    def remove(self, request_id: int) -> None:
        """Forget a request's sequences, wherever they are; their blocks are free at once."""
        for queue in (self.running, self._waiting, self._waiting_online):
            for sequence in [s for s in queue if s.request_id == request_id]:
                self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, also one that was put back and then turned out to have its last token."""
        sequence.pending = None
        if sequence.is_running:
            self._let_go(sequence)
        else:
            self._queue_of(sequence).remove(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.is_running = False
        self._pool.release(sequence.blocks)
        sequence.blocks = []

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        return self._waiting_online if sequence.is_online else self._waiting

    def schedule(self) -> list[Chunk]:
        """Return what the next step computes: a token for all that generate, then as much of prompts as fits."""
        chunks: list[Chunk] = []
        preemptions = self.preemptions
        # generate, but for those of whose pending token is known that it is the last
        for sequence in [s for s in self.running if s.missing == 1 and s.drawn < s.limit]:
            if sequence.is_running and self._grow(sequence, 1):
                chunks.append(self._chunk(sequence, 1))  # noqa: PERF401  # both conditions change as others give way
        # prompts, those that somebody waits for first
        budget = max(self._budget() - len(chunks), self.config.fewest_prompt_tokens)
        for sequence in sorted((s for s in self.running if s.missing > 1), key=lambda s: not s.is_online):
            if sequence.is_running:
                budget -= self._prefill(sequence, budget, chunks)
        for queue in (self._waiting_online, self._waiting):
            if self.preemptions == preemptions:  # whoever gave way in this step does not come back in it
                budget = self._admit(queue, budget, chunks)
        return [chunk for chunk in chunks if chunk.sequence.is_running]

    def _budget(self) -> int:
        """A long step would make whoever waits for a first token wait: so steps are short while there is one."""
        starting = any(s.is_online and s.missing > 1 for s in self.running) or self._waiting_online
        return self.config.online_step_tokens if starting else self.config.step_tokens

    def _prefill(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add a chunk of a prompt; return how many tokens it has."""
        count = min(sequence.missing, budget)
        if count <= 0 or not self._grow(sequence, count):
            return 0
        chunks.append(self._chunk(sequence, count))
        return count

    def _admit(self, queue: deque[Sequence], budget: int, chunks: list[Chunk]) -> int:
        """Let sequences join in their order while there is room; return what is left of the budget."""
        passed_over: list[Sequence] = []
        in_progress = {h for s in self.running for h in s.hashes[s.computed // self._pool.block_tokens :]}
        while queue and budget > 0 and len(passed_over) < self.config.most_sequences:
            sequence = queue.popleft()
            if not self._make_room(sequence):
                queue.appendleft(sequence)
                break
            if self._is_being_computed(sequence, in_progress):
                passed_over.append(sequence)  # another one computes its prefix just now: it joins when that is done
                continue
            if not self._join(sequence):
                queue.appendleft(sequence)
                break
            budget -= self._prefill(sequence, budget, chunks)
            in_progress |= set(sequence.hashes[sequence.computed // self._pool.block_tokens :])
        queue.extendleft(reversed(passed_over))
        return budget

    def _make_room(self, sequence: Sequence) -> bool:
        """Whether one more may run; for an online one, the last of a batch gives way."""
        if len(self.running) < self.config.most_sequences:
            return True
        return sequence.is_online and self._preempt_for(sequence)

    def _is_being_computed(self, sequence: Sequence, in_progress: set[bytes]) -> bool:
        hashes = self._prefix_hashes(sequence)
        known = len(self._pool.match(hashes))
        return known < len(hashes) and hashes[known] in in_progress

    def _prefix_hashes(self, sequence: Sequence) -> list[bytes]:
        """Return hashes of the full blocks that may be taken from the cache: at least one token is left to compute."""
        size = self._pool.block_tokens
        if len(sequence.hashes) < len(sequence.tokens) // size:
            sequence.hashes = block_hashes(sequence.tokens, size, sequence.namespace, sequence.hashes)
        return sequence.hashes[: (len(sequence.tokens) - 1) // size]

    def _join(self, sequence: Sequence) -> bool:
        """Let a sequence run, with what the cache has of its prefix; False when there is no room for its prompt."""
        shared = self._pool.match(self._prefix_hashes(sequence))
        needed = -(-len(sequence.tokens) // self._pool.block_tokens) - len(shared)
        while needed > self._pool.available_beside(shared):
            if not sequence.is_online or not self._preempt_for(sequence):
                return False
        self._pool.hold(shared)
        sequence.blocks = list(shared)
        sequence.computed = len(shared) * self._pool.block_tokens
        if not sequence.is_admitted:
            sequence.is_admitted = True
            sequence.cached_tokens = sequence.computed
            self.prompt_tokens_cached += sequence.cached_tokens
        self.running.append(sequence)
        sequence.is_running = True
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Give a running sequence blocks for `count` more tokens; others, or at last it itself, give way for them."""
        needed = -(-(sequence.computed + count) // self._pool.block_tokens) - len(sequence.blocks)
        while not self._pool.can_allocate(needed):
            if not self._preempt_for(sequence):
                self._preempt(sequence)
                return False
        sequence.blocks += self._pool.allocate(needed)
        return True

    def _preempt_for(self, sequence: Sequence) -> bool:
        """Put back the sequence that matters least beside this one; False when none matters less."""
        victim = self._victim(sequence)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """A batch's gives way to an online one, and a younger one to an older: so the oldest always goes on."""
        batch = [other for other in self.running if not other.is_online and other is not sequence]
        if sequence.is_online and batch:
            return batch[-1]
        if not sequence.is_running:
            return None
        younger = self.running[self.running.index(sequence) + 1 :]
        same = [other for other in younger if other.is_online == sequence.is_online]
        return same[-1] if same else None

    def _preempt(self, sequence: Sequence) -> None:
        self._let_go(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self._queue_of(sequence).appendleft(sequence)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        return Chunk(sequence, sequence.computed, count, is_last=count == sequence.missing)

    def computed(self, chunks: list[Chunk]) -> None:
        """Note that these were computed: their full blocks can be found by others from now on.

        Not those of sequences that ended meanwhile: they hold no blocks any more.
        """
        size = self._pool.block_tokens
        self.steps += 1
        self.sequences += len(chunks)
        for chunk in chunks:
            sequence = chunk.sequence
            if not sequence.is_running:
                continue
            sequence.computed = chunk.start + chunk.count
            self.prompt_tokens_computed += max(0, min(sequence.computed, sequence.prompt_tokens) - chunk.start)
            first, last = chunk.start // size, sequence.computed // size
            if last > first:
                sequence.hashes = block_hashes(sequence.tokens, size, sequence.namespace, sequence.hashes)
                for number in range(first, last):
                    self._pool.remember(sequence.blocks[number], sequence.hashes[number])

    def check_integrity(self) -> None:
        """Raise AssertionError when blocks are lost or held twice; called when idle."""
        self._pool.check_integrity([sequence.blocks for sequence in self.running])
