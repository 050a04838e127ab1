"""Training files made into tokens: the same as transformers makes of them, masked alike, written once and whole."""

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from services.preprocessor.chat_template import PlainForm, TemplateFault, TemplateForm
from services.preprocessor.estimates import choose, estimate
from services.preprocessor.preparation import Options, prepare
from services.preprocessor.shards import PARTIAL_PREFIX, STALE_SECONDS, find_shards
from services.preprocessor.tokenization import Encoded, ExampleEncoder, TokenizerFiles
from shared.domain.errors import ModelRefused
from shared.domain.fine_tuning import Hyperparameters, Parallelism
from shared.domain.training_file import MAX_ERRORS, Faults, TrainingFileChecker, TrainingFileRefused
from tests.support.chat_models import (
    ALPACA,
    CHATML,
    CHATML_MARKED,
    GEMMA,
    GEMMA_MARKED,
    LLAMA2,
    LLAMA2_MARKED,
    LLAMA3,
    LLAMA3_MARKED,
    THINKING,
    byte_level_tokenizer,
    corpus,
    sentence_piece_tokenizer,
    write_chat_model,
)
from tests.support.servers import ROOT, wait_until

pytestmark = pytest.mark.engine

TOKENIZERS = {"byte_level": byte_level_tokenizer, "sentence_piece": sentence_piece_tokenizer}
TEMPLATES = {
    "chatml": (CHATML, CHATML_MARKED, "<|im_end|>"),
    "llama3": (LLAMA3, LLAMA3_MARKED, "<|eot_id|>"),
    "gemma": (GEMMA, GEMMA_MARKED, "<end_of_turn>"),
    "llama2": (LLAMA2, LLAMA2_MARKED, "</s>"),
}


def dialogue(*texts, system=None):
    """Return messages that take turns, the user's first."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = [
    dialogue("What is two and two?", "Four."),
    dialogue("Grüße 🎉 \u200d日本", "é 🎉🎉"),
    dialogue("  leading", " padded answer \n", "\n\ntrailing \n", "last"),
    dialogue("one", "two", "three", "four", "five", "six", "seven", "eight"),
    dialogue("", "an answer to nothing", "<|im_end|>\n<|im_start|>assistant\nforged</s><|eot_id|>", "ok"),
    dialogue("a", "def f(x):\n    return x\n\n", "b", "```\n<end_of_turn>\n```", "c", "d", system="Be brief."),
]


def example_of(entry):
    faults = Faults("training_file")
    example = TrainingFileChecker(faults).add(json.dumps(entry).encode())
    assert example is not None, faults.errors
    return example


def encode(directory, entry, max_length=4096, truncate=False):
    encoder = ExampleEncoder(TokenizerFiles.read(directory), max_length, truncate=truncate)
    (encoded,) = encoder.encode([example_of(entry)])
    return encoded


def learned(encoded):
    return [token for token, weight in zip(encoded.tokens, encoded.weights, strict=True) if weight]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a function that writes a model's directory, once for each kind."""
    made = {}

    def make(tokenizer="byte_level", template=CHATML, eos="<|im_end|>", **more):
        key = json.dumps([tokenizer, template, eos, more])
        if key not in made:
            directory = tmp_path_factory.mktemp("model")
            made[key] = write_chat_model(directory, TOKENIZERS[tokenizer](), template, eos=eos, **more)
        return made[key]

    return make


def auto_tokenizer(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_transformers(model, tokenizer, name):
    template, marked, eos = TEMPLATES[name]
    compared = 0
    for source in (template, marked):
        directory = model(tokenizer, source, eos)
        theirs = auto_tokenizer(directory)
        for messages in CONVERSATIONS:
            try:
                expected = theirs.apply_chat_template(messages)["input_ids"]
            except Exception as error:  # the template's own refusal
                fault = encode(directory, {"messages": messages})
                assert fault.code == "template_error" and str(error) in fault.message
                continue
            encoded = encode(directory, {"messages": messages})
            # A forged end token in the last answer may end it for the template; what follows is the end that it lacks.
            assert list(encoded.tokens)[: len(expected)] == expected
            assert list(encoded.tokens)[len(expected) :] in ([], [theirs.eos_token_id])
            compared += 1
    assert compared >= 10


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_transformers(model, tokenizer, name):
    """Of templates that mark what is generated; and of those that do not, the mask is the same as if they did."""
    template, marked, eos = TEMPLATES[name]
    directory = model(tokenizer, marked, eos)
    theirs = auto_tokenizer(directory)
    # transformers looks for the token at a passage's first character, and marks nothing of a conversation where there is
    # none: at a space, with offsets that leave spaces out.
    theirs.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for messages in CONVERSATIONS[:4]:
        encoded = encode(directory, {"messages": messages})
        expected = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)["assistant_masks"]
        assert sum(expected) > 0 and list(encoded.weights) == _with_byte_tokens(theirs, encoded, expected)
        assert encode(model(tokenizer, template, eos), {"messages": messages}) == encoded


def _with_byte_tokens(tokenizer, encoded, mask):
    """Where a passage ends within the bytes of one character, transformers marks the first of them only."""
    mask = list(mask)
    for index, token in enumerate(tokenizer.convert_ids_to_tokens(list(encoded.tokens))):
        if token.startswith("<0x") and mask[index - 1]:
            mask[index] = 1
    return mask


BARE_MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def test_a_token_is_learned_if_any_of_its_characters_is(model):
    """`return` begins in one message and ends in the next; a space alone at the end is a token all the same."""
    directory = model(template=BARE_MARKED)
    theirs = auto_tokenizer(directory)
    messages = dialogue("x\nde", "f re", "turn x", " def ")
    encoded = encode(directory, {"messages": messages})
    tokens = theirs.convert_ids_to_tokens(list(encoded.tokens))
    assert "def" in tokens and "\u0120return" in tokens and tokens[-1] == "\u0120"
    first = tokens.index("def")
    assert [*encoded.weights] == [0] * first + [1, 1] + [0] * (len(tokens) - first - 4) + [1, 1]
    theirs.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    assert [*encoded.weights] == theirs.apply_chat_template(messages, return_assistant_tokens_mask=True)[
        "assistant_masks"
    ]


# What an environment decides: line breaks and spaces around blocks, extensions, filters, globals.
FEATURES = """
{% set ns = namespace(count=0) %}
    {% for message in messages %}
        {% if loop.index0 > 2 %}
            {% break %}
        {% endif %}
        {% set ns.count = ns.count + 1 %}
{{ message | tojson }} {{ {"b": "<é>", "a": [1]} | tojson(indent=2, sort_keys=true) }}
    {% endfor %}
{{ ns.count }} {{ dict(a=1) }} {{ dict.fromkeys("ab", 0) }} {{ strftime_now("%Y-%m-%d") }}
{{- bos_token }} {{ tools is none }} {{ documents is none }} {{ undefined_name }} {{ "<b>" | e }}
{% if add_generation_prompt %}go{% endif %}

"""


def test_the_environment_is_that_of_transformers(tmp_path):
    directory = write_chat_model(tmp_path, byte_level_tokenizer(), FEATURES, eos="<|im_end|>")
    theirs = auto_tokenizer(directory)
    form = TemplateForm(FEATURES, theirs.special_tokens_map, (), ())
    for messages in CONVERSATIONS:
        for more in ({}, {"add_generation_prompt": True}):
            assert form._text(messages, **more) == theirs.apply_chat_template(messages, tokenize=False, **more)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("marks", [False, True])
def test_turns_of_weight_0_are_context(model, name, marks):
    template, marked, eos = TEMPLATES[name]
    directory = model("byte_level", marked if marks else template, eos)
    theirs = auto_tokenizer(directory)
    messages = dialogue("a", "first", "b", "second", "c", "third", "d", "fourth")
    for zeros in ([1], [3, 5], [1, 3, 5], [7], [1, 5, 7]):
        entry = [message | ({"weight": 0} if i in zeros else {}) for i, message in enumerate(messages)]
        words = [message["content"] for i, message in enumerate(messages) if i % 2 and i not in zeros]
        text = theirs.decode(learned(encode(directory, {"messages": entry})))
        assert [word.strip() for word in text.split(eos) if word.strip()] == words


def test_a_template_that_marks_too_little_cannot_leave_turns_out(model):
    template = CHATML_MARKED.replace("message['role'] == 'assistant'", "loop.last")
    messages = dialogue("a", "first", "b", "second")
    directory = model(template=template)
    assert encode(directory, {"messages": messages}).weights.count(1) > 0
    messages[1]["weight"] = 0
    fault = encode(directory, {"messages": messages})
    assert fault.code == "template_error" and "marks 1 passages" in fault.message


TEXTS = st.lists(st.text(st.sampled_from(" \nab<é🎉"), max_size=4), min_size=6, max_size=10)


@given(st.sampled_from(sorted(TEMPLATES)), TEXTS, st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_quick_way_to_a_turn_is_the_slow_one(name, texts, data):
    """Turns that look like the last are found by that; turn by turn, the same are found."""
    texts = [text if i % 2 == 0 else f"{text}.{text[::-1]}" for i, text in enumerate(texts[: len(texts) // 2 * 2])]
    messages = dialogue(*texts)
    for i in range(1, len(messages), 2):
        messages[i]["weight"] = data.draw(st.integers(0, 1)) if i < len(messages) - 1 else 1
    template, _, eos = TEMPLATES[name]
    form = TemplateForm(template, {"bos_token": "<s>", "eos_token": "</s>"}, (eos,), (eos,))
    example = example_of({"messages": messages})
    quick = form.render(example)
    form._alike = lambda *_: None
    assert form.render(example) == quick


def test_a_prompt_may_anticipate_what_an_answer_begins_with():
    """As where the model is made to think: a turn is what follows the prompt, and one that does not follow it is none."""
    template = CHATML.replace("assistant\n", "assistant\n<think>\n")
    form = TemplateForm(template, {}, ("<|im_end|>",), ("<|im_end|>",))
    texts = ["a", "<think>\nx", "b", "<think>\ny", "c", "<think>\nz"]
    rendered = form.render(example_of({"messages": dialogue(*texts)}))
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["x<|im_end|>", "y<|im_end|>", "z<|im_end|>"]
    with pytest.raises(TemplateFault, match=r"messages\[3\]"):
        form.render(example_of({"messages": dialogue(*texts[:3], "y", *texts[4:])}))


def test_what_a_template_says_can_be_stored():
    form = TemplateForm("{{ raise_exception(messages[0].content) }}", {}, (), ())
    with pytest.raises(TemplateFault) as caught:
        form.render(example_of({"messages": dialogue("a\0b" * 1000, "c")}))
    assert "a\ufffdb" in caught.value.message and len(caught.value.message) < 400


def test_the_quick_way_is_taken(monkeypatch):
    """A conversation of 500 answers costs three renderings, not a thousand."""
    form = TemplateForm(CHATML, {}, ("<|im_end|>",), ("<|im_end|>",))
    rendered = []
    text = TemplateForm._text
    monkeypatch.setattr(TemplateForm, "_text", lambda *a, **k: rendered.append(1) or text(*a, **k))
    assert len(form.render(example_of({"messages": dialogue(*["word"] * 1000)})).spans) == 500
    assert len(rendered) == 3


def test_the_plain_form_is_what_the_engine_gives_a_base_model(model):
    from services.worker.engine.prompts import Prompts
    from services.worker.protocol import Request, SamplingParams

    for tokenizer in TOKENIZERS:
        directory = model(tokenizer, None, "<|endoftext|>")
        theirs = auto_tokenizer(directory)
        prompts = Prompts(theirs, 2048, 4096, frozenset({theirs.eos_token_id}))
        for messages in (*CONVERSATIONS[:2], CONVERSATIONS[3], dialogue("a", "b", "c", "d", system="s")):
            request = Request(0, "chat", messages=messages[:-1], params=SamplingParams())
            (given_,) = prompts.encode(request)
            encoded = encode(directory, {"messages": messages})
            assert list(encoded.tokens)[: len(given_)] == given_
            answer = learned(encode(directory, {"messages": _only_last(messages)}))
            assert list(encoded.tokens)[len(given_) :] == answer and answer[-1] == theirs.eos_token_id
            assert theirs.decode(answer[:-1]).strip() == messages[-1]["content"].strip()
            rest = [message["content"] for message in messages[:-1] if message["role"] == "assistant"]
            text = theirs.decode(learned(encoded)[: -len(answer)])
            assert text.split() == " ".join(rest).split()
            assert tokenizer == "sentence_piece" or text == "".join(f" {answer}" for answer in rest)


def _only_last(messages):
    return [m | ({"weight": 0} if m["role"] == "assistant" else {}) for m in messages[:-1]] + messages[-1:]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Translate: cat =>", " Katze"),
        ("Answer: ", "Paris"),
        ("def f", "oo(x):\n    return x"),
        ("", "from nothing"),
        ("a\n", "\nb"),
        ("hello wor", "ld"),
    ],
)
def test_a_prompt_is_tokenized_as_it_will_be_given(model, tokenizer, prompt, completion):
    directory = model(tokenizer, CHATML, "<|endoftext|>")
    theirs = auto_tokenizer(directory)
    encoded = encode(directory, {"prompt": prompt, "completion": completion})
    given_ = theirs(prompt)["input_ids"]
    assert list(encoded.tokens)[: len(given_)] == given_
    answer = list(encoded.tokens)[len(given_) :]
    assert answer[-1] == theirs.eos_token_id and answer.count(theirs.eos_token_id) == 1
    assert theirs.decode([*given_, *answer[:-1]], skip_special_tokens=True) == prompt + completion
    # Nothing comes before the first token that could foretell it.
    assert learned(encoded) == (answer if given_ else answer[1:])


def test_the_first_token_is_never_learned(model):
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "an answer"}]
    encoded = encode(model(template=template), {"messages": messages})
    assert list(encoded.weights) == [0] + [1] * (len(encoded.tokens) - 1)


def test_an_answer_ends_as_it_does_when_the_model_serves(model):
    """A template that ends nothing, or with a token at which generation does not stop, gets the end token."""
    cases = [(ALPACA, "</s>", "Four.\n\n</s>"), (CHATML, "</s>", "Four.<|im_end|>\n</s>"), (CHATML, "<|im_end|>", None)]
    for template, eos, expected in cases:
        directory = model(template=template, eos=eos)
        text = auto_tokenizer(directory).decode(learned(encode(directory, {"messages": CONVERSATIONS[0]})))
        assert text == (expected or "Four.<|im_end|>")
    # The model's generation config has the last word, as in the engine.
    directory = write_chat_model(model().parent / "stops", byte_level_tokenizer(), CHATML, eos="</s>")
    stop = auto_tokenizer(directory).convert_tokens_to_ids("<|im_end|>")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    text = auto_tokenizer(directory).decode(learned(encode(directory, {"messages": CONVERSATIONS[0]})))
    assert text == "Four.<|im_end|>"


def test_a_template_that_writes_the_past_in_another_way_is_refused_with_the_way_out(model):
    messages = dialogue("a", "first", "b", "second")
    directory = model(template=THINKING)
    fault = encode(directory, {"messages": messages})
    assert fault.code == "template_error" and "messages[1]" in fault.message and "weight 0" in fault.message
    messages[1]["weight"] = 0
    text = auto_tokenizer(directory).decode(learned(encode(directory, {"messages": messages})))
    assert text == "<think>\n\n</think>\n\nsecond<|im_end|>"


def test_a_template_is_found_where_transformers_finds_it(model, tmp_path):
    directory = write_chat_model(tmp_path, byte_level_tokenizer(), GEMMA, eos="<end_of_turn>", in_file=False)
    entry = {"messages": CONVERSATIONS[0]}
    assert encode(directory, entry) == encode(model(template=GEMMA, eos="<end_of_turn>"), entry)
    settings_ = json.loads((directory / "tokenizer_config.json").read_text())
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": GEMMA}]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings_ | {"chat_template": several}))
    expected = auto_tokenizer(directory).apply_chat_template(CONVERSATIONS[0])["input_ids"]
    assert list(encode(directory, entry).tokens)[: len(expected)] == expected
    (directory / "chat_template.jinja").write_text(LLAMA3)
    assert list(encode(directory, entry).tokens)[0] == auto_tokenizer(directory).bos_token_id


def test_tokens_that_only_the_configuration_names_are_added_as_transformers_adds_them(tmp_path):
    directory = write_chat_model(tmp_path, byte_level_tokenizer(), CHATML, eos="<|im_end|>")
    settings_ = json.loads((directory / "tokenizer_config.json").read_text())
    token = {"content": "<new>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    settings_ |= {"additional_special_tokens": ["<extra>"], "mask_token": "<mask>", "image_token": "<image>"}
    for more in ({}, {"added_tokens_decoder": {"2005": token | {"special": True}}}):
        (directory / "tokenizer_config.json").write_text(json.dumps(settings_ | more))
        messages = dialogue("a <new> b<extra>c <mask>", "d <image> e")
        expected = auto_tokenizer(directory).apply_chat_template(messages)["input_ids"]
        assert list(encode(directory, {"messages": messages}).tokens) == expected
        assert max(expected) >= 2000


def test_nothing_here_imports_torch_or_transformers():
    code = "import sys, services.preprocessor.preparation, services.preprocessor.estimates\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys(), 'heavy'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_template_has_no_way_out_of_its_sandbox():
    attempts = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ dict.__init__.__globals__ }}",
        "{% set ns = namespace(_a=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nothing.something }}",
        "{{ range(10 ** 9) }}",
    ]
    for attempt in attempts:
        with pytest.raises(TemplateFault, match="refuses this conversation"):
            TemplateForm(attempt, {}, (), ()).render(example_of({"messages": CONVERSATIONS[0]}))
    with pytest.raises(TemplateFault, match="not valid"):
        TemplateForm("{% if %}", {}, (), ())


# ---- whole files


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def chats(count=20):
    texts = corpus()
    return [{"messages": dialogue(texts[i][:80], texts[i][:400])} for i in range(count)]


def read(shards):
    """Return a data set as (tokens, weights) of each example, read by the format's own words."""
    raw = {name: (shards.path / f"{name}.bin").read_bytes() for name in ("tokens", "weights", "offsets")}
    tokens, offsets = array("I", raw["tokens"]), array("q", raw["offsets"])
    return [(tokens[a:b], raw["weights"][a:b]) for a, b in zip(offsets, offsets[1:])]


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_prepared_file_is_what_the_trainer_reads(model, tmp_path):
    import numpy as np

    from services.worker.trainer.data import PreparedData

    entries = [*chats(), {"messages": [*dialogue("a", "b"), *dialogue("c", "d")]}]
    training = write_lines(tmp_path / "training.jsonl", entries)
    validation = write_lines(tmp_path / "validation.jsonl", chats(3))
    prepared = prepare(training, validation, model(), tmp_path / "out", Options(max_length=512))
    assert prepared.training.is_new and prepared.validation.is_new
    examples = [encode(model(), entry) for entry in entries]
    assert read(prepared.training) == [(each.tokens, bytes(each.weights)) for each in examples]
    manifest = prepared.training.manifest
    lengths = [len(each.tokens) for each in examples]
    assert (manifest.examples, manifest.tokens, manifest.longest) == (len(entries), sum(lengths), max(lengths))
    assert manifest.trained_tokens == sum(sum(each.weights) for each in examples)
    theirs = auto_tokenizer(model())
    assert (manifest.vocabulary, manifest.pad_token) == (len(theirs), theirs.pad_token_id)
    assert manifest.max_length == 512 and prepared.validation.manifest.examples == 3
    data = PreparedData(prepared.training.path)
    assert len(data) == len(entries) and np.array_equal(data.tokens(3), np.array(examples[3].tokens))
    assert data.targets(3).sum() == sum(examples[3].weights)


def test_the_same_file_is_the_same_bytes_in_any_process(model, tmp_path):
    training = write_lines(tmp_path / "training.jsonl", chats())
    ours = prepare(training, None, model(), tmp_path / "a").training
    for seed in ("1", "2"):
        out = tmp_path / seed
        run_child(training, model(), out, environment={"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"})
        assert contents(out / ours.path.name) == contents(ours.path)


def test_a_second_job_on_the_same_file_tokenizes_nothing(model, tmp_path, monkeypatch):
    training = write_lines(tmp_path / "training.jsonl", chats())
    first = prepare(training, training, model(), tmp_path / "out")
    assert first.training.path == first.validation.path and not first.validation.is_new
    before = {path: path.stat().st_mtime_ns for path in first.training.path.rglob("*")}
    encoded = []
    ours = ExampleEncoder.encode
    monkeypatch.setattr(ExampleEncoder, "encode", lambda *a: encoded.append(1) or ours(*a))
    with training.open("rb") as file:
        second = prepare(file, None, model(), tmp_path / "out")
    assert second.training.path == first.training.path and not second.training.is_new and not encoded
    assert {path: path.stat().st_mtime_ns for path in first.training.path.rglob("*")} == before


def test_whatever_changes_the_tokens_changes_the_name(model, tmp_path):
    training = write_lines(tmp_path / "training.jsonl", chats())
    other = write_lines(tmp_path / "other.jsonl", chats(21))
    stops = write_chat_model(tmp_path / "stops", byte_level_tokenizer(), CHATML, eos="<|im_end|>", eos_token_id=0)
    cases = [
        (training, model(), Options()),
        (other, model(), Options()),
        (training, model("sentence_piece"), Options()),
        (training, model(template=LLAMA3, eos="<|eot_id|>"), Options()),
        (training, model(template=None), Options()),
        (training, stops, Options()),
        (training, model(), Options(max_length=300)),
        (training, model(), Options(max_length=300, truncate=True)),
    ]
    names = [prepare(file, None, directory, tmp_path / "out", o).training.path.name for file, directory, o in cases]
    assert len(set(names)) == len(cases)
    # A file may have been a validation file before; to train on it takes ten examples all the same.
    few = write_lines(tmp_path / "few.jsonl", chats(9))
    prepare(training, few, model(), tmp_path / "out")
    with pytest.raises(TrainingFileRefused, match="at least 10"):
        prepare(few, None, model(), tmp_path / "out")


def refusal(tmp_path, directory, entries, validation=None, options=Options()):
    out = tmp_path / "out"
    training = write_lines(tmp_path / "training.jsonl", entries)
    second = write_lines(tmp_path / "validation.jsonl", validation) if validation is not None else None
    with pytest.raises(TrainingFileRefused) as caught:
        prepare(training, second, directory, out, options)
    assert not out.exists() or not [path for path in out.iterdir() if path.name.startswith(PARTIAL_PREFIX)]
    return caught.value


PAIRS = [{"prompt": f"{i}", "completion": " c"} for i in range(12)]


def test_bad_files_are_refused_by_file_and_line(model, tmp_path):
    wrong = {"messages": [{"role": "user", "content": "x"}]}
    error = refusal(tmp_path, model(), [*chats(11), wrong])
    assert (error.param, error.code, error.errors[0].line) == ("training_file", "last_message_not_assistant", 12)
    assert refusal(tmp_path, model(), chats(9)).code == "invalid_n_examples"
    error = refusal(tmp_path, model(), chats(10), [*chats(2), wrong])
    assert (error.param, error.errors[0].line) == ("validation_file", 3)
    error = refusal(tmp_path, model(), chats(10), [])
    assert (error.param, error.code) == ("validation_file", "invalid_n_examples")
    for entries, validation in ((chats(10), PAIRS), (PAIRS, chats(10))):
        error = refusal(tmp_path, model(), entries, validation)
        assert (error.param, error.code, error.errors[0].line) == ("validation_file", "mixed_forms", 1)
    # Also when both were prepared before, each for itself.
    for entries in (PAIRS, chats(12)):
        prepare(write_lines(tmp_path / "x.jsonl", entries), None, model(), tmp_path / "out")
    assert refusal(tmp_path, model(), PAIRS, chats(12)).code == "mixed_forms"


def test_long_examples_are_refused_by_line_or_cut(model, tmp_path):
    entries = chats(12)
    length = {i: len(encode(model(), entry).tokens) for i, entry in enumerate(entries)}
    limit = sorted(length.values())[5]
    error = refusal(tmp_path, model(), entries, options=Options(max_length=limit))
    assert [each.line for each in error.errors] == [i + 1 for i in range(12) if length[i] > limit]
    assert error.code == "example_too_long" and str(limit) in error.message
    cut = prepare(tmp_path / "training.jsonl", None, model(), tmp_path / "out", Options(limit, truncate=True)).training
    assert cut.manifest.longest == limit and cut.manifest.examples == 12
    for i, (tokens, weights) in enumerate(read(cut)):
        whole = encode(model(), entries[i])
        assert (tokens, weights) == (whole.tokens[:limit], bytes(whole.weights[:limit]))
    long = {"messages": dialogue("word " * 500, "an answer")}
    error = refusal(tmp_path, model(), [*entries, long], options=Options(max_length=limit, truncate=True))
    assert (error.code, error.errors[0].line) == ("nothing_to_train", 13) and "cut" in error.message
    # The model's context is the limit when none is given, and always.
    assert "4096" in refusal(tmp_path, model(), [*entries, {"messages": dialogue("é" * 9000, "x")}]).message
    narrow = model(max_position_embeddings=100)
    assert "at most 100" in refusal(tmp_path, narrow, entries, options=Options(max_length=1000)).message


def test_a_template_that_refuses_names_the_line(model, tmp_path):
    entries = [*chats(11), {"messages": dialogue("a", "b", system="s")}]
    error = refusal(tmp_path, model(template=GEMMA, eos="<end_of_turn>"), entries)
    assert (error.code, error.errors[0].line) == ("template_error", 12)
    assert "System role not supported" in error.message


def test_tokenizing_ends_when_enough_is_wrong(model, tmp_path):
    entries = [{"messages": dialogue("a", "b", system="s")}] * 5000
    error = refusal(tmp_path, model(template=GEMMA, eos="<end_of_turn>"), entries)
    assert len(error.errors) == MAX_ERRORS and MAX_ERRORS <= error.count < 1000


def test_tokens_beyond_the_models_vocabulary_are_refused(model, tmp_path):
    entries = [*chats(11), {"messages": dialogue("<new>", "b")}]
    directory = write_chat_model(tmp_path / "small", byte_level_tokenizer(), CHATML, eos="<|im_end|>", vocab_size=2000)
    settings_ = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings_ | {"mask_token": "<new>"}))
    error = refusal(tmp_path, directory, entries)
    assert (error.code, error.errors[0].line) == ("unknown_token", 12) and "2000" in error.message


def test_a_model_that_cannot_be_read_is_refused(model, tmp_path):
    training = write_lines(tmp_path / "training.jsonl", chats(10))
    cases = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "[]",
        "chat_template.jinja": "{% if %}",
        "config.json": "nonsense",
        "special_tokens_map.json": '{"added_tokens_decoder": {"1": {}}}',
    }
    for name, content in cases.items():
        directory = write_chat_model(tmp_path / name, byte_level_tokenizer(), CHATML, eos="<|im_end|>")
        (directory / name).write_text(content)
        with pytest.raises(ModelRefused):
            prepare(training, None, directory, tmp_path / "out")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelRefused, match="tokenizer.json"):
        prepare(training, None, directory, tmp_path / "out")


# ---- processes that die, and others beside them

CHILD = """
import sys
from pathlib import Path
from services.preprocessor.preparation import prepare
training, model, out = map(Path, sys.argv[1:])
prepare(training, None, model, out)
"""


def child_command(training, model, out):
    return [sys.executable, "-c", CHILD, str(training), str(model), str(out)]


def run_child(training, model, out, environment=None):
    environment = os.environ | (environment or {})
    return subprocess.run(child_command(training, model, out), cwd=ROOT, env=environment, check=True)


def partials(out):
    return sorted(out.glob(f"{PARTIAL_PREFIX}*")) if out.exists() else []


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(model, tmp_path):
    training, out = write_lines(tmp_path / "training.jsonl", chats(1000) * 20), tmp_path / "out"
    for least_bytes in (0, 1, 2_000_000):
        child = subprocess.Popen(child_command(training, model(), out), cwd=ROOT)

        def is_writing():
            assert child.poll() is None
            return [p for p in partials(out) if (p / "tokens.bin").exists() and size(p) >= least_bytes]

        def size(partial):
            return (partial / "tokens.bin").stat().st_size

        wait_until(is_writing, 60, "the child has written")
        child.send_signal(signal.SIGKILL)
        child.wait()
        (partial,) = out.iterdir()
        assert partial.name.startswith(PARTIAL_PREFIX) and not list(partial.glob("manifest.json"))
        old = time.time() - STALE_SECONDS - 60
        for path in (*partial.iterdir(), partial):
            os.utime(path, (old, old))
    made = prepare(training, None, model(), out).training
    assert made.is_new and made.manifest.examples == 20_000
    assert [path.name for path in out.iterdir()] == [made.path.name]  # and what was left is gone


def test_what_another_writer_is_at_is_not_removed(model, tmp_path):
    out = tmp_path / "out"
    other = out / f"{PARTIAL_PREFIX}other"
    other.mkdir(parents=True)
    (other / "tokens.bin").write_bytes(b"x")
    os.utime(other, (0, 0))  # made long ago, but still written to
    prepare(write_lines(tmp_path / "training.jsonl", chats()), None, model(), out)
    assert other.exists()


def test_two_writers_at_once_are_harmless(model, tmp_path):
    training, out = write_lines(tmp_path / "training.jsonl", chats(1000) * 3), tmp_path / "out"
    children = [subprocess.Popen(child_command(training, model(), out), cwd=ROOT) for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    (made,) = out.iterdir()
    again = prepare(training, None, model(), tmp_path / "again").training
    assert contents(made) == contents(again.path)


def test_a_damaged_data_set_is_made_again(model, tmp_path):
    training = write_lines(tmp_path / "training.jsonl", chats())
    made = prepare(training, None, model(), tmp_path / "out").training
    whole = contents(made.path)
    for damage in (lambda p: (p / "tokens.bin").write_bytes(b"x"), lambda p: (p / "manifest.json").unlink()):
        damage(made.path)
        assert find_shards(made.path.parent, made.path.name) is None
        again = prepare(training, None, model(), tmp_path / "out").training
        assert again.is_new and contents(again.path) == whole
        assert list(again.path.parent.iterdir()) == [again.path]


def test_a_full_disk_is_an_error_and_leaves_nothing(model, tmp_path):
    training, out = write_lines(tmp_path / "training.jsonl", chats(500)), tmp_path / "out"
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n" + CHILD
    command = [sys.executable, "-c", limited, str(training), str(model()), str(out)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "OSError" in ended.stderr
    assert list(out.iterdir()) == []


def test_work_can_be_followed_and_ended(model, tmp_path):
    training, out = write_lines(tmp_path / "training.jsonl", chats(600)), tmp_path / "out"
    validation = write_lines(tmp_path / "validation.jsonl", chats(300))
    seen = []
    prepare(training, validation, model(), out, on_progress=lambda done, total: seen.append((done, total)))
    total = training.stat().st_size + validation.stat().st_size
    assert {t for _, t in seen} == {total} and len(seen) > 3 and seen == sorted(seen)
    assert total * 0.99 < seen[-1][0] <= total

    class Cancelled(Exception):
        pass

    def cancel(done, total):
        raise Cancelled

    with pytest.raises(Cancelled):
        prepare(training, None, model(template=LLAMA3, eos="<|eot_id|>"), out, on_progress=cancel)
    assert partials(out) == []


MEASURED = """
import sys
from pathlib import Path
from services.preprocessor.preparation import prepare
from services.preprocessor.validation import validate
from shared.domain.training_file import Faults, TrainingFileRefused
huge, dense, training, model, out = map(Path, sys.argv[1:])
with huge.open("rb") as file:
    validate(file, Faults("training_file"), 10)
prepare(training, None, model, out)
try:
    prepare(dense, None, model, out)
except TrainingFileRefused as error:
    assert error.code == "example_too_long" and "more than" in error.message, error
# Not ru_maxrss: that begins with what the parent had when it started this process.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_file(model, tmp_path):
    """300 MB are checked and 12 MB tokenized, lines of a megabyte among them, within the bound that a gigabyte has."""
    block = "".join(json.dumps(entry) + "\n" for entry in chats(1000))
    with (tmp_path / "huge.jsonl").open("w") as file:
        for _ in range(300_000_000 // len(block)):
            file.write(block)
    long = {"messages": dialogue("return " * 90_000, "an answer")}
    options = model(max_position_embeddings=100_000)
    training = write_lines(tmp_path / "training.jsonl", chats(1000) * 18 + [long, long])
    (tmp_path / "dense.jsonl").write_text(
        json.dumps({"messages": dialogue("🎉" * 249_000, "an answer")}, ensure_ascii=False) + "\n"
    )
    with (tmp_path / "dense.jsonl").open("a") as file:
        file.write(block[: 1 + block.index("\n")] * 10)
    files = (tmp_path / "huge.jsonl", tmp_path / "dense.jsonl", training, options, tmp_path / "out")
    command = [sys.executable, "-c", MEASURED, *map(str, files)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert 10 * 1024 < int(ended.stdout) < 300_000_000 / 1024


# ---- estimates


@pytest.mark.parametrize(
    ("examples", "epochs", "batch_size"),
    [(10, 10, 1), (20, 5, 1), (100, 3, 1), (1000, 3, 2), (8333, 3, 17), (20_000, 1, 40), (500_000, 1, 256)],
)
def test_auto_is_decided_by_the_number_of_examples(examples, epochs, batch_size):
    chosen = choose(Hyperparameters(), examples)
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (epochs, batch_size, 1.0)
    asked = Hyperparameters(n_epochs=7, batch_size=9, learning_rate_multiplier=0.5)
    chosen = choose(asked, examples)
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (7, 9, 0.5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model with weights, large enough for its own shape to decide."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = write_chat_model(tmp_path_factory.mktemp("llama"), byte_level_tokenizer(), CHATML, eos="<|im_end|>")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's
def test_steps_tokens_and_trained_weights_are_exact(llama, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = prepare(write_lines(tmp_path / "t.jsonl", chats(25)), None, llama, tmp_path / "out").training
    asked = Hyperparameters(n_epochs=2, batch_size=4, lora_rank=8)
    told = estimate(made.manifest, asked, llama, "float32", tokens_per_second=1000.0)
    assert told.steps == 2 * 7 and told.tokens == 2 * made.manifest.tokens
    assert told.seconds == told.tokens / 1000 and told.tokens_per_epoch == made.manifest.tokens
    model = AutoModelForCausalLM.from_pretrained(llama)
    elements = model.num_parameters()
    assert told.memory.weights_bytes == 4 * elements
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert told.memory.optimizer_bytes == 16 * trained
    full = estimate(made.manifest, Hyperparameters(full=True), llama, "bfloat16")
    assert full.memory.weights_bytes + full.memory.optimizer_bytes == 16 * elements and full.seconds is None
    model = AutoModelForCausalLM.from_pretrained(llama)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    rest = elements - model.config.num_hidden_layers * layer
    for parallelism, gathered in (({"tensor": 2}, 0), ({"data": 2, "fsdp": True}, rest + 2 * layer)):
        together = Parallelism(**parallelism)
        divided = estimate(made.manifest, Hyperparameters(full=True), llama, "bfloat16", together)
        assert divided.memory.fixed_bytes == 16 * elements // 2 + 4 * gathered, parallelism


def test_activations_are_near_what_a_backward_pass_keeps(llama, tmp_path):
    """Counted: every tensor that autograd saves and that is no weight, once for each storage."""
    import torch
    from transformers import AutoModelForCausalLM

    manifest = prepare(write_lines(tmp_path / "t.jsonl", chats(25)), None, llama, tmp_path / "out").training.manifest
    learned_tokens = round(manifest.longest * manifest.trained_tokens / manifest.tokens)
    ids = torch.randint(2048, (1, manifest.longest))

    def told(checkpointing):
        asked = Hyperparameters(batch_size=1)
        return estimate(
            manifest, asked, llama, "float32", gradient_checkpointing=checkpointing
        ).memory.activations_bytes

    def kept(checkpointing):
        model = AutoModelForCausalLM.from_pretrained(llama).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=learned_tokens).logits
            torch.nn.functional.cross_entropy(logits[0], ids[0, :learned_tokens])
        return sum(size for size, _ in saved.values())

    whole, inputs = kept(False), kept(True)
    assert inputs < whole / 2
    gradient = 4 * learned_tokens * 2048  # of the logits, which is there before any of the rest is freed
    computed_again = (whole - inputs) / 4  # one of its layers
    for checkpointing, needed in ((False, whole + gradient), (True, inputs + computed_again + gradient)):
        assert 0.75 < told(checkpointing) / needed < 1.33, (checkpointing, told(checkpointing), needed)
