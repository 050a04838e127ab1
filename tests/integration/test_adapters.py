"""LoRA adapters through the whole stack: registered over HTTP, called online and in batches beside their base."""

import json
import shutil
import subprocess
import time

import httpx
import openai
import pytest

from tests.support.adapters import write_adapter
from tests.support.batches import chat_line, read_lines, rows, submit, wait_for
from tests.support.servers import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def adapters(scratch, tiny_llama):
    """Two adapters of the tiny model, of different ranks and targets."""
    from transformers import AutoModelForCausalLM

    made = {"lora-a": {"rank": 4, "targets": ["q_proj", "v_proj"]}, "lora-b": {"rank": 32, "targets": "all-linear"}}
    for seed, (name, fields) in enumerate(made.items()):
        write_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), scratch / name, seed=seed, **fields)
    return {name: scratch / name for name in made}


@pytest.fixture(scope="module")
def http(stack, admin_key):
    with httpx.Client(base_url=stack.url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=60) as client:
        yield client


def add(http, name, source, **fields):
    return http.post("/v1/models", json={"name": name, "source": str(source), **fields})


@pytest.fixture(scope="module")
def tiny(http, tiny_llama, adapters):
    """The base and its two adapters, registered for everybody."""
    assert add(http, "tiny", tiny_llama).status_code == 200
    for name, source in adapters.items():
        answer = add(http, name, source, base="tiny").json()
        assert (answer["kind"], answer["base"], answer["dtype"]) == ("adapter", "tiny", "float32"), answer
    yield "tiny"
    for name in (*adapters, "tiny"):
        assert http.delete(f"/v1/models/{name}").status_code == 200


def ask(sdk, model, content="good evening", **more):
    call = {"max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": content}]} | more
    return sdk.chat.completions.create(model=model, extra_body={"ignore_eos": True}, **call)


def text(sdk, model, **more):
    return ask(sdk, model, **more).choices[0].message.content


def loads(http):
    time.sleep(2.5)  # two heartbeats
    return sum(worker["model_loads"] for worker in http.get("/v1/workers").json()["data"])


def fault(response, status, param, code=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and code in (None, error["code"]), error
    return error["message"]


def test_adapters_answer_beside_their_base_which_is_loaded_once(http, sdk, tiny):
    base = text(sdk, tiny)
    before = loads(http)
    online = {model: text(sdk, model) for model in (tiny, "lora-a", "lora-b")}
    assert online[tiny] == base and len(set(online.values())) == 3
    batches = {
        model: submit(
            sdk, [chat_line(f"{i}", f"line {i}", model=model, max_tokens=12, temperature=0) for i in range(20)]
        )
        for model in online
    }
    lines = {}
    for model, batch in batches.items():
        done = wait_for(sdk, batch.id, seconds=120)
        assert done.request_counts.completed == 20, done
        lines[model] = {
            name: row["response"]["body"]["choices"][0]["message"]["content"]
            for name, row in read_lines(sdk, done.output_file_id).items()
        }
        assert {row["response"]["body"]["model"] for row in read_lines(sdk, done.output_file_id).values()} == {model}
    for one, other in ((tiny, "lora-a"), (tiny, "lora-b"), ("lora-a", "lora-b")):
        assert sum(lines[one][name] != lines[other][name] for name in lines[one]) > 15
    # What a line of a batch says is what an online call says.
    for model in online:
        answer = sdk.chat.completions.create(
            model=model, max_tokens=12, temperature=0, messages=[{"role": "user", "content": "line 7"}]
        )
        assert answer.choices[0].message.content == lines[model]["7"]
    assert loads(http) == before, "the base was loaded once more"
    models = {name for worker in http.get("/v1/workers").json()["data"] for name in worker["models"]}
    assert "tiny" in models and not {"lora-a", "lora-b"} & models


def test_streams_and_token_usage_of_an_adapter(sdk, tiny):
    whole = ask(sdk, "lora-a")
    chunks = list(ask(sdk, "lora-a", stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert {chunk.model for chunk in chunks} == {"lora-a"}


def test_a_tenants_adapter_is_its_own(http, stack, sdk, tiny, adapters):
    keys = {}
    for tenant in ("lora-owner", "lora-other"):
        assert http.post("/v1/tenants", json={"id": tenant}).status_code in (200, 409)
        keys[tenant] = http.post("/v1/keys", json={"tenant": tenant, "scopes": ["write"]}).json()["key"]
    assert add(http, "mine", adapters["lora-b"], base="tiny", tenant="lora-owner").json()["owned_by"] == "lora-owner"
    owner, other = (openai.OpenAI(base_url=f"{stack.url}/v1", api_key=key, max_retries=0) for key in keys.values())
    with owner, other:
        assert text(owner, "mine") == text(sdk, "lora-b") != text(sdk, tiny)
        assert "mine" in {model.id for model in owner.models.list()}
        for stranger in (other, sdk):
            assert "mine" not in {model.id for model in stranger.models.list()}
            for attempt in (lambda s=stranger: s.models.retrieve("mine"), lambda s=stranger: text(s, "mine")):
                with pytest.raises(openai.NotFoundError) as caught:
                    attempt()
                assert caught.value.code == "model_not_found"
        failed = wait_for(other, submit(other, [chat_line("a", model="mine")]).id)
        assert failed.request_counts.failed == 1
        (line,) = read_lines(other, failed.error_file_id).values()
        assert line["response"]["status_code"] == 404
    # Its base is the shared one: neither may that go, nor another take its name for this tenant.
    assert "mine" in fault(http.delete("/v1/models/tiny"), 409, "model", "in_use")
    assert "mine" in fault(add(http, "tiny", adapters["lora-a"], base="tiny", tenant="lora-owner"), 409, "name")
    fault(add(http, "x", adapters["lora-a"], base="tiny", tenant="nobody"), 404, "tenant")
    fault(http.delete("/v1/models/lora-a", params={"tenant": "lora-owner"}), 404, "model")
    fault(http.delete("/v1/models/mine"), 404, "model")
    assert http.delete("/v1/models/mine", params={"tenant": "lora-owner"}).status_code == 200


def test_a_base_with_adapters_stays(http, sdk, tiny):
    message = fault(http.delete("/v1/models/tiny"), 409, "model", "in_use")
    assert "lora-a, lora-b" in message and "tiny" in {model.id for model in sdk.models.list()}


def change(directory, target, **fields):
    shutil.copytree(directory, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | fields))
    return target


def test_what_cannot_be_served_is_refused_when_it_is_registered(http, tiny, tiny_llama, adapters, scratch, tmp_path):
    good = adapters["lora-a"]

    def refused(source, param="source", code="model_refused", **fields):
        return fault(add(http, "refused", source, **{"base": "tiny"} | fields), 400, param, code)

    assert "adapter_config.json" in refused(tiny_llama)
    assert "name its base" in fault(add(http, "refused", good), 400, "source", "model_refused")
    for field, value in {
        "peft_type": "IA3", "use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "auto_map": {"a": "b.c"},
        "init_lora_weights": "pissa", "lora_alpha": "much", "rank_pattern": {"q_proj": 7},
    }.items():  # fmt: skip
        message = refused(change(good, tmp_path / field, **{field: value}))
        assert message.startswith(field) or field == "rank_pattern" and "configured rank is 7" in message, message
    pickled = change(good, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "can carry code" in refused(pickled)
    cut = change(good, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes()[:-4])
    assert "cut off" in refused(cut)
    assert "no directory" in refused(tmp_path / "nowhere")

    import transformers

    from tests.support.models import make_tiny_llama

    wide = make_tiny_llama(tmp_path / "wide", hidden_size=64)
    write_adapter(transformers.LlamaForCausalLM.from_pretrained(wide), tmp_path / "of-wide", seed=1, rank=4)
    assert "for a matrix of [64, 64]; the base's has [32, 32]" in refused(tmp_path / "of-wide")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    write_adapter(gpt2, tmp_path / "of-gpt2", seed=1, rank=4)
    assert "target_modules: the base has no layers" in refused(tmp_path / "of-gpt2")

    assert "does not exist" in refused(good, "base", "model_not_found", base="nothing-of-the-kind")
    assert "'lora-b' is of the kind 'adapter'" in refused(good, "base", base="lora-b")
    assert "'echo' is of the kind 'echo'" in refused(good, "base", base="echo")
    assert "number type" in refused(good, "dtype", "invalid_value", dtype="bfloat16")
    refused(good, "base", "invalid_value", base="../tiny")
    refused(good, "tenant", "invalid_value", tenant="No Tenant")
    assert http.get("/v1/models/refused").status_code == 404


def test_an_adapter_whose_files_are_damaged_later_fails_its_own_requests(http, sdk, tiny, adapters, scratch):
    """Truncated, gone, or replaced by another model's after it was registered: a 400 that says so, and nothing else."""
    later = shutil.copytree(adapters["lora-a"], scratch / "lora-later")
    assert add(http, "later", later, base="tiny").status_code == 200
    weights = later / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    try:
        with pytest.raises(openai.BadRequestError) as caught:
            text(sdk, "later")
        assert caught.value.code == "model_refused" and "cut off" in caught.value.message
        lines = [chat_line(f"{i}", model="later", max_tokens=4) for i in range(3)]
        done = wait_for(sdk, submit(sdk, lines).id)
        assert done.request_counts.failed == 3
        for line in read_lines(sdk, done.error_file_id).values():
            assert line["response"]["status_code"] == 400
            assert line["response"]["body"]["error"]["code"] == "model_refused"
        assert text(sdk, tiny) and text(sdk, "lora-a") != text(sdk, tiny)
        weights.unlink()
        with pytest.raises(openai.BadRequestError, match="There is no adapter_model.safetensors"):
            text(sdk, "later")
        weights.write_bytes(whole)  # and once it is whole again, it serves
        assert text(sdk, "later") == text(sdk, "lora-a")
    finally:
        assert http.delete("/v1/models/later").status_code == 200


def test_the_command_line_registers_an_adapter(http, stack, admin_key, sdk, tiny, adapters):
    environment = {"LAMPLIGHTER_URL": stack.url, "LAMPLIGHTER_API_KEY": admin_key, "PATH": "/usr/bin:/bin"}

    def lamplighter(*arguments):
        command = [ROOT / ".venv/bin/lamplighter", "models", "add", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    added = lamplighter("by-hand", str(adapters["lora-b"]), "--base", "tiny")
    assert added.returncode == 0 and added.stdout == "by-hand (adapter, float32)\n", added
    try:
        assert text(sdk, "by-hand") == text(sdk, "lora-b")
    finally:
        assert http.delete("/v1/models/by-hand").status_code == 200
    wrong = lamplighter("by-hand", str(adapters["lora-b"]), "--base", "nothing")
    assert wrong.returncode == 1 and "'nothing' does not exist" in wrong.stderr


def test_a_slice_for_an_adapter_goes_where_its_base_is_warm(database):
    """The dispatcher asks for the model that has to be loaded, which for an adapter is its base: the tenant's own first."""
    from shared.db import slices

    engine = database.engine("migration")
    with engine.begin() as connection:
        for tenant in ("acme", "other"):
            connection.exec_driver_sql(f"INSERT INTO tenant (tenant_id, name) VALUES ('{tenant}', '')")
        for tenant, name, base in (("system", "lora", "big"), ("acme", "lora", "small")):
            connection.exec_driver_sql(
                f"INSERT INTO model (tenant_id, name, kind, base, source, dtype)"
                f" VALUES ('{tenant}', '{name}', 'adapter', '{base}', '/x', 'float32')"
            )
        for number, (tenant, model) in enumerate((t, m) for t in ("acme", "other") for m in ("lora", "big")):
            job = f"00000000-0000-0000-0000-{number:012}"
            connection.exec_driver_sql(
                f"INSERT INTO job (tenant_id, job_id, kind, state, created_on, endpoint, spec)"
                f" VALUES ('{tenant}', '{job}', 'batch', 'queued', current_date, '/v1/completions', '{{}}')"
            )
            connection.exec_driver_sql(
                f"INSERT INTO slice (tenant_id, job_id, created_on, lo, hi, state, priority, model, estimated_tokens)"
                f" VALUES ('{tenant}', '{job}', current_date, 0, 1, 'queued', 5, '{model}', 1)"
            )
    with database.engine("scheduler").begin() as connection:
        found = [(each.tenant_id, each.model) for each in slices.candidates(connection, 8)]
    assert found == [("acme", "small"), ("acme", "big"), ("other", "big"), ("other", "big")]
    assert {name for (name,) in rows(engine, "SELECT model FROM slice")} == {"lora", "big"}
