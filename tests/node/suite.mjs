// OpenAI's SDK for Node, unmodified, against a running stack: OPENAI_BASE_URL and OPENAI_API_KEY say which.
// Prints a line of JSON with what it saw; the test that runs it judges.

import OpenAI, { toFile } from "openai";

const client = new OpenAI();
const messages = [{ role: "user", content: "one two three" }];
const seen = {};

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

const embedding = await client.embeddings.create({ model: "echo", input: ["hello", "world"] });
seen.embeddings = embedding.data.map((entry) => entry.embedding.length);

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);
seen.model = (await client.models.retrieve("echo")).object;

const line = (i) => JSON.stringify({
  custom_id: `line-${i}`, method: "POST", url: "/v1/chat/completions", body: { model: "echo", messages },
});
const content = Array.from({ length: 5 }, (_, i) => line(i)).join("\n");
const file = await client.files.create({ file: await toFile(Buffer.from(content), "in.jsonl"), purpose: "batch" });
seen.file = [file.bytes === Buffer.byteLength(content), file.purpose];
let batch = await client.batches.create({
  input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h", metadata: { from: "node" },
});
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  await new Promise((resolve) => setTimeout(resolve, 200));
  batch = await client.batches.retrieve(batch.id);
}
seen.batch = [batch.status, batch.request_counts.completed, batch.metadata.from];
const output = await (await client.files.content(batch.output_file_id)).text();
seen.output = output.trim().split("\n").map((text) => JSON.parse(text).custom_id);
seen.deleted = (await client.files.delete(file.id)).deleted;

try {
  await client.chat.completions.create({ model: "nobody", messages });
} catch (error) {
  seen.error = [error.constructor.name, error.status, error.code];
}
console.log(JSON.stringify(seen));
