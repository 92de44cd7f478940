// What a Node program sees of the gRPC API: runs every scenario against the router in BATON_TARGET and prints what it
// saw as one JSON object. Started by tests/cluster/test_grpc_clients.py.
import grpc from "@grpc/grpc-js";
import { call, connect, metadata } from "./baton.mjs";

const client = connect(process.env.BATON_TARGET);
const status = (error) => ({ code: grpc.status[error.code], details: error.details });
const greedy = { temperature: 0, ignore_eos: true };

/** Every message of a stream, or the error that ended it. */
async function collect(request, options = {}, headers = metadata()) {
  const messages = [];
  try {
    for await (const message of client.Generate(request, headers, options)) messages.push(message);
    return { messages };
  } catch (error) {
    return { messages, error: status(error) };
  }
}

async function refused(request) {
  return (await collect(request)).error;
}

async function streaming() {
  const { messages } = await collect({ text: "Once upon a time", sampling: { ...greedy, max_tokens: 12, n: 2, seed: "18446744073709551615", logprobs: 2, echo: true } });
  const last = messages.at(-1);
  const deltas = messages.flatMap((message) => message.choices);
  return {
    num_messages: messages.length,
    request_ids: [...new Set(messages.map((message) => message.request_id))],
    prompt: messages[0].prompt,
    texts: [0, 1].map((index) => deltas.filter((delta) => delta.index === index).map((delta) => delta.text).join("")),
    token_ids: [0, 1].map((index) => deltas.filter((delta) => delta.index === index).flatMap((delta) => delta.token_ids)),
    num_top: deltas[0].logprobs[0].top.length,
    finish_reasons: deltas.map((delta) => delta.finish_reason).filter((reason) => reason !== "FINISH_REASON_UNSPECIFIED"),
    early_usage: messages.slice(0, -1).map((message) => message.usage),
    usage: last.usage,
    timings: last.timings,
  };
}

async function cancelling() {
  const stream = client.Generate({ request_id: "node-cancelled", text: "Once upon a time", sampling: { ...greedy, max_tokens: 2000 } }, metadata());
  let received = 0;
  try {
    for await (const message of stream) {
      received += message.choices.length;
      if (received >= 2) stream.cancel();
    }
  } catch (error) {
    return { received, error: status(error) };
  }
  return { received };
}

async function deadline() {
  const request = { text: "Once upon a time", sampling: { ...greedy, max_tokens: 3000 } };
  return (await collect(request, { deadline: Date.now() + 250 })).error;
}

async function trailers() {
  const stream = client.Generate({ text: "Hi", sampling: { max_tokens: 1, top_p: 7 } }, metadata());
  const seen = new Promise((resolve) => stream.on("status", resolve));
  stream.on("error", () => {});
  stream.resume();
  const { code, details } = await seen;
  return { code: grpc.status[code], details };
}

const results = {
  streaming: await streaming(),
  by_token_ids: (await collect({ token_ids: { ids: [5, 6, 7] }, sampling: { max_tokens: 1 } })).messages.at(-1).usage,
  cancelling: await cancelling(),
  deadline: await deadline(),
  no_prompt: await refused({ sampling: { max_tokens: 1 } }),
  bad_temperature: await refused({ text: "Hi", sampling: { temperature: -1 } }),
  too_many_choices: await refused({ text: "Hi", sampling: { n: 99 } }),
  other_model: await refused({ text: "Hi", model: "gpt-5" }),
  unknown_token: await refused({ token_ids: { ids: [4000000000] } }),
  trailers: await trailers(),
  model: await call(client, "GetModelInfo", {}),
  tokens: await call(client, "Tokenize", { text: "Once upon a time", add_special_tokens: false }),
  cluster: await call(client, "GetClusterStatus", {}),
};
results.text = await call(client, "Detokenize", { token_ids: results.tokens.token_ids });
client.close();
console.log(JSON.stringify(results));
