"""Trains a small causal language model on the standard library's docstrings, in half a minute on two cores.

It is for the demo: a base that knows the words but was not taught to answer, on a machine that reaches no model hub.
Run it as `python -m examples.demo.train_small_model DIRECTORY`.
"""

import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.demo.docstrings import HELD_BACK, Docstring, collect

VOCABULARY = 2048
CONTEXT = 512
BATCH_ROWS, ROW_TOKENS = 8, 96
SECONDS = 30.0
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def train_tokenizer(docstrings: list[Docstring]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCABULARY entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in docstrings), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train(directory: Path, seconds: float = SECONDS) -> None:
    """Train for `seconds` and save the model where `lamplighter models add` can take it."""
    torch.manual_seed(0)
    docstrings = collect()[HELD_BACK:]
    tokenizer = train_tokenizer(docstrings)
    texts = [f"{d.text}<|end|>" for d in docstrings]
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    started, step, loss = time.monotonic(), 0, torch.tensor(0.0)
    while (elapsed := time.monotonic() - started) < seconds:
        for group in optimizer.param_groups:  # linear decay by the clock: the run ends when its time is over
            group["lr"] = 3e-3 * max(0.05, 1 - elapsed / seconds)
        starts = torch.randint(len(stream) - ROW_TOKENS - 1, (BATCH_ROWS,))
        rows = torch.stack([stream[s : s + ROW_TOKENS] for s in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    print(f"trained on {len(docstrings)} docstrings: {step} steps, loss {loss.item():.2f}")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
