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
_ENCODER = dict(vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=256, initializer_range=0.3, pad_token_id=0)  # fmt: skip
TRUNKS = {
    "bert": ("BertModel", "BertConfig", _ENCODER),
    "roberta": ("RobertaModel", "RobertaConfig", _ENCODER),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        _ENCODER | {"bos_token_id": 0, "eos_token_id": 0, "cls_token_id": 0, "sep_token_id": 0},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SHAPE | {"head_dim": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        dict(vocab_size=260, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
             decoder_start_token_id=0, pad_token_id=0, eos_token_id=0),
    ),
}  # fmt: skip
"""Small shapes of what several tasks can share, by kind: class, its configuration's class, and the shape."""


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


def make_trunk(kind: str, directory: Path) -> Path:
    """Write a model of one of TRUNKS without dropout, with a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    name, config_name, shape = TRUNKS[kind]
    config = getattr(transformers, config_name)(**shape)
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "embedding_dropout", "mlp_dropout"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    getattr(transformers, name)(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
