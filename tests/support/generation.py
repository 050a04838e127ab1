"""Tiny models of every shape that the generation engine serves, engines around them, and what transformers says."""

import torch
import transformers

from services.worker.engine.decoding import build_decoder
from services.worker.engine.generation import GenerationEngine
from services.worker.engine.prompts import Prompts
from services.worker.engine.scheduler import SchedulerConfig
from services.worker.protocol import Request, Response, SamplingParams

VOCABULARY = 512
CONTEXT = 192
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
SHAPES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    # Neither heads nor rows of whole vectors: computed by the kernels in torch, on every machine.
    "llama-narrow": lambda: transformers.LlamaConfig(
        **COMMON | {"hidden_size": 40, "intermediate_size": 42, "num_attention_heads": 5, "num_key_value_heads": 5}
    ),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, head_dim=32),
    "mistral-window": lambda: transformers.MistralConfig(**COMMON, sliding_window=12),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, n_positions=256),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=12),
    # Experts, to each of which only some rows of a step go.
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "phi3": lambda: transformers.Phi3Config(**COMMON, pad_token_id=0),
}
NEAR_TIE = 1e-4
"""Two best logits closer than this may change places: a difference there is none."""


class NumberTokenizer:
    """Tokens as numbers: what is compared is what the model draws."""

    chat_template = None

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def trained_tokenizer(texts: list[str], vocabulary: int):
    """Return a byte-level BPE tokenizer, `<eos>` its token 0, trained on texts: its tokens are of several bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_model(name: str, dtype: torch.dtype = torch.float32):
    """Return the model of a shape with the same random weights each time."""
    torch.manual_seed(7)
    config = SHAPES[name]()
    # Random weights draw the same token again and again; larger ones make the choice change with the input.
    config.initializer_range = 0.2
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def make_engine(
    model, *, blocks: int = 400, eos: frozenset[int] = frozenset(), plans_ahead: bool = False, **config
) -> GenerationEngine:
    """Return an engine that takes the model apart; `config` are fields of its scheduler's."""
    decoder = build_decoder(model, CONTEXT, blocks)
    prompts = Prompts(NumberTokenizer(), VOCABULARY, CONTEXT, eos)
    scheduling = SchedulerConfig(**config) if config else None
    return GenerationEngine(decoder, prompts, blocks, scheduling, plans_ahead=plans_ahead)


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Return prompts of 3 to 43 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (3 + 5 * (i % 9),), generator=generator).tolist() for i in range(count)]


def requests(texts: list[list[int]], **params) -> list[Request]:
    chosen = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True} | params
    return [
        Request(i, "complete", prompts=[text], params=SamplingParams(**{"seed": 1000 + i} | chosen))
        for i, text in enumerate(texts)
    ]


def run(engine: GenerationEngine, wanted: list[Request]) -> dict[int, Response]:
    """Answer the requests; the engine is idle before and after, and its books add up."""
    for request in wanted:
        engine.add(request)
    answers = {}
    while engine.wait_seconds() is not None:
        answers |= {response.id: response for response in engine.step().responses}
    engine.check_integrity()
    assert engine.pool.in_use == 0
    return answers


def tokens(response: Response) -> list[int]:
    return [int(token) for token in response.choices[0][0].split()]


@torch.inference_mode()
def generate(model, text: list[int], count: int) -> list[int]:
    """Return what transformers' `generate()` says to one prompt alone, greedily."""
    out = model.generate(torch.tensor([text]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(text) :].tolist()


@torch.inference_mode()
def logits_after(model, text: list[int], answer: list[int]) -> torch.Tensor:
    """Return the logits from which each token of an answer is drawn, float32 [len(answer), vocabulary]."""
    return model(torch.tensor([text + answer])).logits[0, len(text) - 1 : -1].float()


def is_tie(model, text: list[int], wanted: list[int], found: list[int]) -> bool:
    """Whether two answers part where transformers' two best logits are all but equal."""
    place = next(i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b)
    best = logits_after(model, text, wanted[: place + 1])[-1].topk(2).values
    return bool(best[0] - best[1] < NEAR_TIE)
