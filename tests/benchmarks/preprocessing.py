"""Preprocessing of training files: examples checked a second, text tokenized a second on one core, memory for a gigabyte.

`python -m tests.benchmarks.preprocessing [--short]` prints the three rows; `bench_finetune` adds them to its table. Every
figure is measured in a process of its own, and includes reading the file, rendering, masks and writing.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.benchmarks.table import Table
from tests.support.chat_models import CHATML, LLAMA3, SPECIAL, write_chat_model
from tests.support.servers import ROOT

GIGABYTE = 1_000_000_000
PIECE_CHARACTERS = 800
SHAPE = {"vocab_size": 200_000, "max_position_embeddings": 32_768}
MIB = 1 << 20
# Llama 3's pre-tokenizer; Qwen's differs in how many digits go together. Most models of today have one of the two.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHILD = """
import json, sys, time
from pathlib import Path
from services.preprocessor.preparation import prepare
from services.preprocessor.validation import validate
from shared.domain.training_file import Faults

what, training, model, out = sys.argv[1], *map(Path, sys.argv[2:])
started, processor = time.perf_counter(), time.process_time()
if what == "validate":
    with training.open("rb", buffering=1 << 20) as file:
        validate(file, Faults("training_file"), 10)
else:
    prepare(training, None, model, out)
took, used = time.perf_counter() - started, time.process_time() - processor
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": took, "processor_seconds": used, "peak_bytes": peak * 1024}))
"""


@cache
def texts() -> list[str]:
    """Return pieces of real text, each once: the source of Python's own library, code and prose, some 10 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces = []
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        content = path.read_text(encoding="utf-8", errors="ignore")
        pieces += [content[at : at + PIECE_CHARACTERS] for at in range(0, len(content), PIECE_CHARACTERS)]
    return [piece for piece in pieces if len(piece) == PIECE_CHARACTERS and piece[200:].strip()]


def single_turns() -> Iterator[dict]:
    """Yield what most files hold: an instruction, a question and an answer."""
    for text in texts():
        yield _chat(("system", "You are a careful assistant."), ("user", text[:200]), ("assistant", text[200:] + "."))


def conversations(turns: int = 8) -> Iterator[dict]:
    """Yield conversations of eight questions and answers."""
    pieces = texts()
    for at in range(0, len(pieces) - turns, turns):
        messages = []
        for text in pieces[at : at + turns]:
            messages += [("user", text[:200]), ("assistant", text[200:] + ".")]
        yield _chat(*messages)


def _chat(*messages: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def write_lines(path: Path, examples: Iterator[dict], least_bytes: int = 0) -> tuple[int, int]:
    """Write a file of these examples, again and again up to a size; return examples and bytes of their contents."""
    lines = [json.dumps(example, ensure_ascii=False).encode() + b"\n" for example in examples]
    content = sum(len(m["content"].encode()) for line in lines for m in json.loads(line)["messages"])
    repeats = max(1, -(-least_bytes // sum(map(len, lines))))
    with path.open("wb") as file:
        for _ in range(repeats):
            file.writelines(lines)
    return len(lines) * repeats, content * repeats


def train_tokenizer(vocabulary: int) -> str:
    """Return the tokenizer.json of a byte-level BPE as Llama 3 and Qwen have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts()[::3], trainer)
    return tokenizer.to_str()


def run_child(what: str, training: Path, model: Path, out: Path) -> dict:
    command = [sys.executable, "-c", CHILD, what, str(training), str(model), str(out)]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def bench_preprocessing(table: Table, *, short: bool) -> None:
    """Add the rows `finetune-4a` to `finetune-4c`."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tokenizer = train_tokenizer(8_000 if short else 32_000)
        single = root / "single.jsonl"
        _bench_validation(table, root, short)
        written = {single: write_lines(single, single_turns())}
        written[root / "turns.jsonl"] = write_lines(root / "turns.jsonl", conversations())
        _bench_tokenization(table, root, tokenizer, written)
        _bench_memory(table, root, tokenizer, short)


def _bench_validation(table: Table, root: Path, short: bool) -> None:
    training = root / "checked.jsonl"
    examples, _ = write_lines(training, single_turns(), 50_000_000 if short else 250_000_000)
    rates = [examples / run_child("validate", training, root, root)["seconds"] for _ in range(3)]
    size = training.stat().st_size
    training.unlink()
    what = f"training file checked, one core: {examples} examples, {size / 1e6:.0f} MB, best of {len(rates)}"
    table.add("finetune-4a", what, max(rates), "examples/s", "≥ 50000", max(rates) >= 50_000, rates)


def _bench_tokenization(table: Table, root: Path, tokenizer: str, written: dict[Path, tuple[int, int]]) -> None:
    """Text once, never seen before by its process, so that no cache of the tokenizer is warm."""
    samples, rates = [], {}
    for round_number in range(3):
        for template, eos in ((CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>")):
            model = write_chat_model(root / eos, tokenizer, template, eos=eos, **SHAPE)
            for training, (_, content_bytes) in written.items():
                took = run_child("prepare", training, model, root / f"{eos}-{training.stem}-{round_number}")
                rate = content_bytes / 1e6 / took["processor_seconds"]
                rates.setdefault(f"{eos} {training.stem}", []).append(rate)
                samples.append({"template": eos, "file": training.stem, "mb_per_second": rate, **took})
    best = {name: max(values) for name, values in rates.items()}
    worst = min(best.values())
    named = ", ".join(f"{name} {rate:.2f}" for name, rate in best.items())
    what = f"contents tokenized with their masks, one core, the worst of best-of-3s: {named}"
    table.add("finetune-4b", what, worst, "MB/s", "≥ 2", worst >= 2, samples)


def _bench_memory(table: Table, root: Path, tokenizer: str, short: bool) -> None:
    training = root / "gigabyte.jsonl"
    examples, _ = write_lines(training, single_turns(), GIGABYTE // 25 if short else GIGABYTE)
    model = write_chat_model(root / "model", tokenizer, CHATML, eos="<|im_end|>", **SHAPE)
    took = run_child("prepare", training, model, root / "out")
    size = training.stat().st_size
    what = f"peak memory of preparing {size / 1e6:.0f} MB, {examples} examples, in {took['seconds']:.0f} s"
    table.add("finetune-4c", what, took["peak_bytes"] / MIB, "MiB", "≤ 300 MB", took["peak_bytes"] <= 300e6, [took])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="40 MB in place of a gigabyte, and a smaller vocabulary")
    options = parser.parse_args()
    table = Table("preprocessing")
    bench_preprocessing(table, short=options.short)
    table.write()
    table.show()
    return 0 if table.holds else 1


if __name__ == "__main__":
    sys.exit(main())
