"""Tiny models with random weights and a real tokenizer, made where they are needed."""

from pathlib import Path

SHAPE = dict(
    vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, pad_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.1,
            attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)  # fmt: skip
KINDS = {
    "llama": ("LlamaConfig", SHAPE),
    "qwen3": ("Qwen3Config", SHAPE | {"head_dim": 8}),
    "mistral": ("MistralConfig", SHAPE | {"sliding_window": 6, "head_dim": 8}),
    "gemma2": ("Gemma2Config", SHAPE | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "gpt2": ("GPT2Config", GPT2),
}
"""Small shapes of decoders, by kind."""


def tiny_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def make_tiny_llama(directory: Path, **config) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(LlamaConfig(**(shape | config))).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def make_tiny(kind: str, directory: Path) -> Path:
    """Write a model of one of KINDS, with a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, shape = KINDS[kind]
    config = getattr(transformers, name)(**shape)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
