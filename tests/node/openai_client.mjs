// Uses a Baton router through OpenAI's own package, as a Node user would: node openai_client.mjs URL MODEL.
// Every check is an assertion; the last line of output is JSON that says what was seen.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "what is 12+7?" }];
const tool = {
  type: "function",
  function: {
    name: "add",
    parameters: {
      type: "object",
      properties: { total: { enum: [19, 20] } },
      required: ["total"],
      additionalProperties: false,
      // The demo model would fill every gap that it may.
      "x-guidance": { whitespace_flexible: false },
    },
  },
};

async function models() {
  const ids = [];
  for await (const each of client.models.list()) ids.push(each.id);
  assert.deepEqual(ids, [model]);
  assert.equal((await client.models.retrieve(model)).id, model);
}

async function completions() {
  const whole = await client.completions.create({ model, prompt: "12+7=", max_tokens: 8, temperature: 0 });
  assert.equal(whole.choices[0].text, "19");
  const stream = await client.completions.create({
    model,
    prompt: "12+7=",
    max_tokens: 8,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage;
  for await (const event of stream) {
    text += event.choices[0]?.text ?? "";
    usage = event.usage ?? usage;
  }
  assert.equal(text, "19");
  assert.deepEqual(usage, whole.usage);
}

async function chats() {
  const whole = await client.chat.completions.create({ model, messages, temperature: 0, logprobs: true });
  const [choice] = whole.choices;
  assert.match(choice.message.content, /19/);
  assert.equal(choice.logprobs.content.length, whole.usage.completion_tokens);
  // The helper puts the chunks together and checks them on the way.
  const runner = client.chat.completions.stream({ model, messages, temperature: 0 });
  const deltas = [];
  runner.on("content", (delta) => deltas.push(delta));
  const streamed = await runner.finalChatCompletion();
  assert.equal(streamed.choices[0].message.content, choice.message.content);
  assert.equal(deltas.join(""), choice.message.content);
  return choice.message.content.trim();
}

async function tools() {
  const asked = {
    model,
    messages,
    tools: [tool],
    tool_choice: "required",
    parallel_tool_calls: false,
    max_tokens: 400,
    temperature: 0,
  };
  const whole = await client.chat.completions.create(asked);
  assert.equal(whole.choices[0].finish_reason, "tool_calls");
  const [call] = whole.choices[0].message.tool_calls;
  assert.equal(call.function.name, "add");
  const total = JSON.parse(call.function.arguments).total;
  const streamed = await client.chat.completions.stream(asked).finalChatCompletion();
  assert.equal(JSON.parse(streamed.choices[0].message.tool_calls[0].function.arguments).total, total);
  return total;
}

async function errors() {
  await assert.rejects(client.completions.create({ model, prompt: "x", temperature: -1 }), (error) => {
    assert(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    assert(error.requestID);
    return true;
  });
  await assert.rejects(client.completions.create({ model: "other", prompt: "x" }), OpenAI.NotFoundError);
  await assert.rejects(client.embeddings.create({ model, input: "x" }), { status: 501 });
}

async function hangUp() {
  const stream = await client.completions.create({
    model,
    prompt: "Once upon a time",
    max_tokens: 3000,
    stream: true,
    ignore_eos: true,
  });
  let seen = 0;
  for await (const _ of stream) if (++seen === 3) break;
  return seen;
}

await models();
await completions();
const said = await chats();
const total = await tools();
await errors();
const seen = await hangUp();
console.log(JSON.stringify({ said, total, seen }));
