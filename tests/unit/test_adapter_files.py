"""What is read of PEFT's files, and what is refused by name: an adapter applied in part would answer wrongly."""

import json
import math
import struct

import pytest

from shared.adapter_files import LoraModule, check_fit, read_adapter_files
from shared.domain.errors import ModelRefused
from shared.model_files import read_tensor_infos

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere",
    "auto_mapping": None,
    "peft_version": "0.21.2",
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "target_modules": ["q_proj", "v_proj"],
    "lora_dropout": 0.1,
    "fan_in_fan_out": False,
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "rank_pattern": {},
    "alpha_pattern": {},
    "qalora_group_size": 16,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "lora_bias": False,
    "init_lora_weights": True,
}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {
    f"base_model.model.{Q}.lora_A.weight": (4, 32),
    f"base_model.model.{Q}.lora_B.weight": (48, 4),
    f"base_model.model.{V}.lora_A.weight": (4, 32),
    f"base_model.model.{V}.lora_B.weight": (16, 4),
}


def write_tensors(path, shapes, dtype="F32", cut=0):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    path.write_bytes((struct.pack("<Q", len(head)) + head + bytes(end))[: 8 + len(head) + end - cut])


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    write_tensors(tmp_path / "adapter_model.safetensors", SHAPES)
    return tmp_path


def change(directory, **fields):
    (directory / "adapter_config.json").write_text(json.dumps(CONFIG | fields))


def refused(directory):
    with pytest.raises(ModelRefused) as caught:
        read_adapter_files(directory)
    return caught.value.message


def test_modules_with_their_ranks_and_scales(directory):
    files = read_adapter_files(directory)
    assert files.modules == [LoraModule(Q, 4, 32, 48, 2.0), LoraModule(V, 4, 32, 16, 2.0)]
    assert {name for m in files.modules for name in (m.a_name, m.b_name)} == set(SHAPES)
    assert files.bytes == (directory / "adapter_model.safetensors").stat().st_size
    change(directory, use_rslora=True)
    assert read_adapter_files(directory).modules[0].scale == 8 / math.sqrt(4)


def test_patterns_name_modules_by_their_ends_as_peft_has_it(directory):
    shapes = SHAPES | {f"base_model.model.{V}.lora_A.weight": (2, 32), f"base_model.model.{V}.lora_B.weight": (16, 2)}
    write_tensors(directory / "adapter_model.safetensors", shapes)
    change(directory, rank_pattern={"v_proj": 2}, alpha_pattern={"^model.layers.0.self_attn.q_proj$": 1, "k_proj": 5})
    q, v = read_adapter_files(directory).modules
    assert (q.rank, q.scale, v.rank, v.scale) == (4, 0.25, 2, 4.0)
    change(directory, rank_pattern={"proj": 2})  # no whole name: not v_proj's
    assert "configured rank is 4" in refused(directory)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type: only LORA"),
        ({"peft_type": None}, "peft_type: only LORA"),
        ({"use_dora": True}, "use_dora: this variant"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: this variant"),
        ({"bias": "lora_only"}, "bias: only 'none'"),
        ({"lora_bias": True}, "lora_bias: this variant"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map: the adapter brings its own code"),
        ({"auto_map": {}}, "auto_map"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: this variant"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: this variant"),
        ({"target_parameters": ["experts.up"]}, "target_parameters: this variant"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens: this variant"),
        ({"something_of_2031": {"on": True}}, "something_of_2031: this variant"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights: 'mica'"),
        ({"r": "4"}, 'r: "4" is not a number above 0'),
        ({"r": 0}, "r: 0 is not a number"),
        ({"r": 8}, "the configured rank is 8"),
        ({"lora_alpha": True}, "lora_alpha: true is not"),
        ({"lora_alpha": -1}, "lora_alpha: -1 is not"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern: must map"),
        ({"rank_pattern": {"(a+)+": 4}}, "rank_pattern: must map"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: null is not"),
    ],
)
def test_what_cannot_be_applied_whole_is_refused_by_name(directory, fields, reason):
    change(directory, **fields)
    assert reason in refused(directory)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({}, "holds no matrices"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": (48,)}, "no matrix of a plain LoRA layer"),
        ({"base_model.model.score.weight": (2, 32)}, "no matrix of a plain LoRA layer"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 99)}, "no matrix of a plain LoRA layer"),
        ({f"base_model.model.{Q}.lora_A.weight": (4, 32)}, "one matrix of the two"),
        (SHAPES | {f"base_model.model.{Q}.lora_B.weight": (48, 5)}, "the configured rank is 4"),
        (SHAPES | {f"base_model.model.{Q}.lora_B.weight": (4,)}, "the configured rank is 4"),
    ],
)
def test_tensors_that_are_no_plain_adapter_are_refused(directory, shapes, reason):
    write_tensors(directory / "adapter_model.safetensors", shapes)
    assert reason in refused(directory)


def test_files_that_are_not_there_or_not_whole_are_refused(directory):
    weights = directory / "adapter_model.safetensors"
    write_tensors(weights, SHAPES, dtype="I8")
    assert "number type I8" in refused(directory)
    write_tensors(weights, SHAPES, cut=1)
    assert refused(directory) == "adapter_model.safetensors is cut off."
    for content in (b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]"):
        weights.write_bytes(content)
        assert "adapter_model.safetensors" in refused(directory), content
    weights.unlink()
    assert refused(directory) == "There is no adapter_model.safetensors."
    (directory / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "adapter_model.bin can carry code" in refused(directory)
    (directory / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused(directory)
    (directory / "adapter_config.json").unlink()
    assert "There is no adapter_config.json" in refused(directory)


def test_an_adapter_is_held_against_its_bases_files(directory, tmp_path):
    base = tmp_path / "base"
    base.mkdir()

    def reason(shapes):
        write_tensors(base / "model.safetensors", shapes)
        try:
            check_fit(read_adapter_files(directory), base)
        except ModelRefused as error:
            return error.message
        return None

    assert reason({f"{Q}.weight": (48, 32), f"{V}.weight": (16, 32)}) is None
    assert reason({f"{Q}.weight": (32, 48), f"{V}.weight": (16, 32)}) is None  # GPT-2's matrices lie the other way
    assert reason({name.partition(".")[2] + ".weight": shape for name, shape in ((Q, (48, 32)), (V, (16, 32)))}) is None
    assert f"names: '{V}'." in reason({f"{Q}.weight": (48, 32)})
    assert f"{Q!r} is for a matrix of [48, 32]; the base's has [64, 32]" in reason(
        {f"{Q}.weight": (64, 32), f"{V}.weight": (16, 32)}
    )
    assert "no layers to adapt" in reason({f"{Q}.weight": (48,), f"{V}.weight": (16, 32)})


def test_tensors_of_a_real_file_are_what_the_library_says(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    found = read_tensor_infos(tmp_path / "x.safetensors")
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (4,)),
    }
