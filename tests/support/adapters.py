"""LoRA adapters with random weights, written by peft."""

from pathlib import Path


def write_adapter(model, directory: Path, *, seed: int, rank: int, targets=None, **config):
    """Write an adapter of a transformers model, which is changed by it; return the model with the adapter merged in."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # Scales about one half: answers change, and logits stay as large as models' are.
    alpha = max(1, round(rank**0.5 / 2 if config.get("use_rslora") else rank / 2))
    chosen = {"lora_alpha": alpha, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | config
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, **chosen))
    adapted.save_pretrained(directory)
    return adapted.merge_and_unload().eval()
