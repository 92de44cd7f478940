// Streams an answer: node generate.mjs "Once upon a time"
// BATON_TARGET is the router (127.0.0.1:50051), BATON_API_KEY a key where it asks for one, and BATON_TLS_CA the file of its
// authority where it speaks TLS.
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import { call, connect, metadata } from "./baton.mjs";

const prompt = process.argv[2] ?? "Once upon a time";
const rootCertificate = process.env.BATON_TLS_CA && readFileSync(process.env.BATON_TLS_CA);
const client = connect(process.env.BATON_TARGET ?? "127.0.0.1:50051", { rootCertificate });

const model = await call(client, "GetModelInfo", {});
console.log(`${model.name}: at most ${model.max_model_len} tokens, prompt and answer together`);

const request = {
  text: prompt,
  // What is not set takes the model's default. A seed is a string, since it has 64 bits.
  sampling: { max_tokens: 48, temperature: 0.8, seed: "7" },
};
// After the deadline the call ends with DEADLINE_EXCEEDED, and the router releases what it held.
const stream = client.Generate(request, metadata(), { deadline: Date.now() + 60_000 });
// Ctrl-C ends the request at the router too.
process.on("SIGINT", () => stream.cancel());

try {
  for await (const message of stream) {
    for (const choice of message.choices) process.stdout.write(choice.text);
    if (message.usage) {
      const { prompt_tokens, cached_tokens, completion_tokens } = message.usage;
      const { prefill_s, decode_s, prefill_worker, decode_worker } = message.timings;
      console.log(`\n${prompt_tokens} prompt tokens (${cached_tokens} cached), ${completion_tokens} generated`);
      console.log(`prefill ${(prefill_s * 1e3).toFixed(1)} ms on ${prefill_worker || decode_worker}`);
      console.log(`decode ${(decode_s * 1e3).toFixed(1)} ms on ${decode_worker}`);
    }
  }
} catch (error) {
  console.error(`\n${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}
