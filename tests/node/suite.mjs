// OpenAI's SDK for Node, unmodified, against a running stack: OPENAI_BASE_URL and OPENAI_API_KEY say which.
// Prints a line of JSON with what it saw; the test that runs it judges.

import OpenAI, { toFile } from "openai";

const client = new OpenAI();
const messages = [{ role: "user", content: "one two three" }];
const seen = {};

await calls();
await models();
await filesAndBatches();
await cancelling();
await refusals();
console.log(JSON.stringify(seen));

async function calls() {
  const chat = await client.chat.completions.create({ model: "echo", messages, max_tokens: 2 });
  seen.chat = [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.total_tokens];

  seen.streamed = [];
  const stream = await client.chat.completions.create({
    model: "echo", messages, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    if (chunk.choices[0]?.delta.content) seen.streamed.push(chunk.choices[0].delta.content);
    if (chunk.usage) seen.usage = chunk.usage.completion_tokens;
  }

  const completion = await client.completions.create({ model: "echo", prompt: ["a b", "c"] });
  seen.completions = completion.choices.map((choice) => choice.text);

  seen.streamedCompletion = { text: ["", ""], reasons: ["", ""] };
  for await (const chunk of await client.completions.create({ model: "echo", prompt: ["a b", "c"], stream: true })) {
    for (const choice of chunk.choices) {
      seen.streamedCompletion.text[choice.index] += choice.text;
      if (choice.finish_reason) seen.streamedCompletion.reasons[choice.index] = choice.finish_reason;
    }
  }

  // By itself the SDK asks for base64 and decodes it.
  const embed = (options) => client.embeddings.create({ model: "echo", input: ["hello", "world"], ...options });
  const vectors = async (options) => (await embed(options)).data.map((entry) => entry.embedding);
  const decode = (text) => Array.from(new Float32Array(Uint8Array.from(Buffer.from(text, "base64")).buffer));
  const float = await vectors({ encoding_format: "float" });
  const base64 = await vectors({ encoding_format: "base64" });
  seen.embeddings = [float.map((vector) => vector.length), typeof base64[0]];
  const single = (vector) => vector.map(Math.fround);
  const texts = [await vectors({}), base64.map(decode)].map((each) => JSON.stringify(each.map(single)));
  seen.embeddingsAgree = texts.every((text) => text === JSON.stringify(float.map(single)));
}

async function models() {
  seen.models = [];
  for await (const model of client.models.list()) seen.models.push(model.id);
  const model = await client.models.retrieve("echo");
  seen.model = [model.id, model.object, model.owned_by];
}

function input(count, options = {}) {
  const line = (i) => JSON.stringify({
    custom_id: `line-${i}`, method: "POST", url: "/v1/chat/completions", body: { model: "echo", messages, ...options },
  });
  return Array.from({ length: count }, (_, i) => line(i)).join("\n");
}

async function upload(content) {
  return client.files.create({ file: await toFile(Buffer.from(content), "in.jsonl"), purpose: "batch" });
}

async function submit(file, metadata) {
  const options = { endpoint: "/v1/chat/completions", completion_window: "24h", metadata };
  return client.batches.create({ input_file_id: file.id, ...options });
}

async function ended(batch) {
  while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}

async function lines(fileId) {
  const text = await (await client.files.content(fileId)).text();
  return text.trim().split("\n").map((line) => JSON.parse(line));
}

// Pages of one: the SDK asks for the next ones by itself.
async function listed(list, wanted) {
  const ids = [];
  for await (const entry of list) {
    ids.push(entry.id);
    if (wanted.every((id) => ids.includes(id))) break;
  }
  return wanted.map((id) => ids.filter((each) => each === id).length);
}

async function filesAndBatches() {
  const content = input(5);
  const [file, other] = [await upload(content), await upload(content)];
  seen.file = [file.bytes === Buffer.byteLength(content), file.purpose, file.status];
  const retrieved = await client.files.retrieve(file.id);
  seen.retrieved = [retrieved.id === file.id, retrieved.filename, retrieved.created_at === file.created_at];
  seen.content = (await (await client.files.content(file.id)).text()) === content;
  seen.filesListed = await listed(client.files.list({ purpose: "batch", limit: 1 }), [file.id, other.id]);

  const batch = await ended(await submit(file, { from: "node" }));
  seen.batch = [batch.status, batch.request_counts, batch.metadata.from, batch.error_file_id];
  const output = await lines(batch.output_file_id);
  seen.output = output.map((line) => [line.custom_id, line.response.body.choices[0].message.content]);
  const wrong = await ended(await submit(await upload(input(2, { temperature: 9 }))));
  seen.wrong = [wrong.status, wrong.request_counts.failed, wrong.output_file_id];
  seen.errors = (await lines(wrong.error_file_id)).map((line) => [line.custom_id, line.response.status_code]);
  seen.batchesListed = await listed(client.batches.list({ limit: 1 }), [wrong.id, batch.id]);

  seen.deleted = (await client.files.delete(file.id)).deleted;
  seen.gone = await refusal(() => client.files.retrieve(file.id));
}

async function cancelling() {
  const batch = await submit(await upload(input(50, { delay_ms: 30000 })));
  seen.cancelling = (await client.batches.cancel(batch.id)).status;
  const cancelled = await ended(batch);
  seen.cancelled = [cancelled.status, cancelled.cancelled_at >= cancelled.created_at];
  seen.cancelledAgain = await refusal(() => client.batches.cancel(batch.id));
}

// What an error is, as a program would tell it.
async function refusal(call) {
  try {
    await call();
  } catch (error) {
    const isNamed = typeof error.requestID === "string" && error.requestID.startsWith("req_");
    return [error instanceof OpenAI.APIError && error.constructor.name, error.status, error.code, error.param, isNamed];
  }
  return null;
}

async function refusals() {
  const stranger = new OpenAI({ apiKey: "lk-0-wrong" });
  const chat = (options) => client.chat.completions.create({ model: "echo", messages, ...options });
  seen.unauthorized = await refusal(() => stranger.models.list());
  seen.noModel = await refusal(() => chat({ model: "nobody" }));
  seen.noBatch = await refusal(() => client.batches.retrieve("batch_" + "0".repeat(32)));
  seen.badRequest = await refusal(() => chat({ temperature: 9 }));
  seen.badStream = await refusal(() => chat({ stream: true, top_p: 0 }));
  seen.badBatch = await refusal(() => submit({ id: "file-none" }));
}
