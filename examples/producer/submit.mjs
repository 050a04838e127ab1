// Hand a batch in from Node with nothing installed: Celery's message (protocol 2) is JSON in a Redis list.
//
//   REDIS_URL=redis://:PASSWORD@HOST:PORT/0 TOKEN=lk-… KEY=nightly-2026-11-23 node submit.mjs
//
// The job is accepted once GET /v1/jobs?idempotency_key=KEY finds it. Until then send the same message again.

import { randomUUID } from "node:crypto";
import { createConnection } from "node:net";

const questions = ["Why is the sky dark at night?", "Who lights the lamps?"];
const kwargs = {
  kind: "batch",
  spec: {
    endpoint: "/v1/chat/completions",
    requests: questions.map((content) => ({ model: "echo", messages: [{ role: "user", content }] })),
  },
  idempotency_key: process.env.KEY,
};

const id = randomUUID();
const embed = { callbacks: null, errbacks: null, chain: null, chord: null };
const message = {
  body: Buffer.from(JSON.stringify([[], kwargs, embed])).toString("base64"),
  "content-encoding": "utf-8",
  "content-type": "application/json",
  headers: { lang: "js", task: "lamplighter.submit", id, root_id: id, lamplighter_token: process.env.TOKEN },
  properties: {
    body_encoding: "base64",
    correlation_id: id,
    delivery_info: { exchange: "", routing_key: "submit" },
    delivery_mode: 2,
    delivery_tag: randomUUID(),
  },
};

const url = new URL(process.env.REDIS_URL);
const commands = [["LPUSH", "submit", JSON.stringify(message)]];
if (url.password) {
  const user = url.username ? [decodeURIComponent(url.username)] : [];
  commands.unshift(["AUTH", ...user, decodeURIComponent(url.password)]);
}
const encode = (words) =>
  `*${words.length}\r\n` + words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join("");

const socket = createConnection({ host: url.hostname, port: Number(url.port || 6379) });
let answers = "";
socket.on("data", (data) => {
  answers += data;
  const lines = answers.split("\r\n").slice(0, -1);
  const error = lines.find((line) => line.startsWith("-"));
  if (error || lines.length === commands.length) {
    if (error) console.error(error);
    process.exitCode = error ? 1 : 0;
    socket.end();
  }
});
socket.on("error", (error) => {
  console.error(error.message);
  process.exitCode = 1;
});
socket.write(commands.map(encode).join(""));
