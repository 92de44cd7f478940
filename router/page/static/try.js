// The prompt box: one streamed request to the OpenAI-compatible API of the same router.

import { byId, element, setText } from "./dom.js";
import { count, seconds } from "./format.js";

const LONG = `The lighthouse keeper wrote one line every evening. On the first page he noted the wind, the height of the
waves, and the ships that had passed. On the second page he noted what he had eaten, and whether the stove had smoked.
On the third page he began to write down what he remembered: the harbour where he was born, the smell of rope and tar,
the long table in his mother's kitchen, and the song that his sister sang when the boats came home. Years went by, and
the book grew heavy. One night a storm came up from the south, and no ship passed at all. He lit the lamp, sat down, and
began to write about`.replaceAll("\n", " ");

// Name, prompt as a completion, prompt as a chat message.
const EXAMPLES = [
  ["Story", "Once upon a time", "tell me a story"],
  ["Sum", "User: what is 12+7?\nBot:", "what is 12+7?"],
  ["Long", LONG, LONG],
];

export class Try {
  #abort = null;
  #onRequest;
  #model = "";
  #mode = byId("mode");

  /** `onRequest` is told the id that the router gave the request. */
  constructor(onRequest) {
    this.#onRequest = onRequest;
    byId("try").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#run();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("try").requestSubmit();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#abort?.abort();
    });
    byId("stop").addEventListener("click", () => this.#abort?.abort());
    byId("examples").append(...EXAMPLES.map(([label, completion, message]) => {
      const button = element("button", "example", label);
      button.type = "button";
      button.addEventListener("click", () => {
        byId("prompt").value = this.#mode.value === "chat" ? message : completion;
      });
      return button;
    }));
    byId("prompt").value = EXAMPLES[0][1];
  }

  /** What the router serves; chat is offered where its model has a template. */
  serves({ model, chat }) {
    this.#model = model;
    if (byId("mode-field").hidden === chat) byId("mode-field").hidden = !chat;
    if (!chat) this.#mode.value = "completion";
  }

  async #run() {
    if (this.#abort) return;
    this.#abort = new AbortController();
    const answer = new Answer(this.#onRequest);
    this.#setBusy(true);
    try {
      const response = await fetch(this.#mode.value === "chat" ? "/v1/chat/completions" : "/v1/completions", {
        method: "POST",
        headers: { "Content-Type": "application/json", ...(byId("key").value && { Authorization: `Bearer ${byId("key").value}` }) },
        body: JSON.stringify(this.#body()),
        signal: this.#abort.signal,
      });
      if (response.status === 401) byId("key-field").hidden = false;
      if (!response.ok) throw new Error(await messageOf(response));
      for await (const data of events(response.body)) answer.take(data);
      answer.end("Done");
    } catch (error) {
      if (error.name === "AbortError") answer.end("Stopped");
      else answer.fail(error.message);
    } finally {
      this.#abort = null;
      this.#setBusy(false);
    }
  }

  #body() {
    const prompt = byId("prompt").value;
    return {
      model: this.#model,
      ...(this.#mode.value === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  #setBusy(busy) {
    const stopHadFocus = document.activeElement === byId("stop");
    byId("run").disabled = busy;
    byId("stop").disabled = !busy;
    byId("answer").setAttribute("aria-busy", String(busy));
    if (stopHadFocus && !busy) byId("run").focus();
  }
}

/** What has come of one request so far, and how fast. */
class Answer {
  #startedAt = performance.now();
  #firstAt = 0;
  #lastAt = 0;
  #chunks = 0;
  #tokens = 0;
  #id = "";
  #onRequest;
  #text = byId("answer-text");

  constructor(onRequest) {
    this.#onRequest = onRequest;
    this.#text.textContent = "";
    this.#text.className = "text";
    for (const name of ["ttft", "speed", "tokens"]) setText(byId(`fact-${name}`), "–");
    setText(byId("try-said"), "");
  }

  take(event) {
    if (event.error) throw new Error(event.error.message);
    if (event.id && event.id !== this.#id) {
      this.#id = event.id;
      this.#onRequest(event.id);
    }
    const choice = event.choices?.[0];
    const text = choice?.text ?? choice?.delta?.content;
    if (typeof text === "string" && !(choice.delta?.role && !text)) this.#add(text);
    if (event.usage) this.#tokens = event.usage.completion_tokens;
    this.#showFacts();
  }

  end(said) {
    setText(byId("try-said"), `${said} after ${count(this.#tokens || this.#chunks)} tokens.`);
    this.#text.classList.add(said === "Stopped" ? "stopped" : "done");
  }

  fail(message) {
    this.#text.classList.add("error");
    this.#text.append(this.#text.textContent ? ` — ${message}` : message);
    setText(byId("try-said"), message);
  }

  #add(text) {
    this.#lastAt = performance.now();
    this.#firstAt ||= this.#lastAt;
    this.#chunks += 1;
    const box = byId("answer");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 8;
    this.#text.append(text);
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  #showFacts() {
    if (!this.#firstAt) return;
    const tokens = this.#tokens || this.#chunks;
    const elapsed = (this.#lastAt - this.#firstAt) / 1000;
    setText(byId("fact-ttft"), seconds((this.#firstAt - this.#startedAt) / 1000));
    setText(byId("fact-tokens"), count(tokens));
    if (tokens > 1 && elapsed > 0) setText(byId("fact-speed"), `${((tokens - 1) / elapsed).toFixed(1)} tok/s`);
  }
}

/** The JSON of each server-sent event of a body, up to [DONE]. */
async function* events(body) {
  let rest = "";
  for await (const piece of pieces(body.pipeThrough(new TextDecoderStream()))) {
    const lines = (rest + piece).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Not every browser lets a stream be iterated. */
async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) yield read.value;
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function messageOf(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}
