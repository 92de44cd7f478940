// Follows the router's frames and passes each to the parts of the page; comes back by itself when the router does.

import { Diagram } from "./diagram.js";
import { byId, setAttribute, setText } from "./dom.js";
import { Requests } from "./requests.js";
import { Try } from "./try.js";
import { Workers } from "./workers.js";

const RETRY_MS = 1000;
// The router sends something at least every 10 s.
const SILENCE_MS = 25_000;

class Page {
  #source = null;
  #retry = 0;
  #silence = 0;
  #frame = null;
  #receivedAt = 0;
  #requests = new Requests();
  #diagram = new Diagram(byId("diagram"));
  #workers = new Workers(byId("workers"));
  #try = new Try((requestId) => this.#requests.markOwn(requestId));

  start() {
    this.#connect();
    // A hidden page costs the router nothing.
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#disconnect() : this.#connect()));
    setInterval(() => this.#frame && this.#source && this.#workers.update(this.#frame.workers, this.#now()), 1000);
  }

  #connect() {
    this.#disconnect();
    this.#source = new EventSource("/live");
    this.#source.addEventListener("frame", (event) => this.#take(JSON.parse(event.data)));
    this.#source.addEventListener("heartbeat", () => this.#alive());
    this.#source.addEventListener("error", () => this.#lost());
    this.#alive();
  }

  #disconnect() {
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#retry);
    clearTimeout(this.#silence);
  }

  #alive() {
    clearTimeout(this.#silence);
    this.#silence = setTimeout(() => this.#lost(), SILENCE_MS);
  }

  #lost() {
    this.#disconnect();
    this.#show("lost", "Reconnecting");
    this.#banner("The router cannot be reached. What you see is how it was; the page comes back by itself.");
    this.#retry = setTimeout(() => this.#connect(), RETRY_MS);
  }

  #take(frame) {
    const previous = this.#frame?.router.boot;
    this.#frame = frame;
    this.#receivedAt = performance.now();
    this.#alive();
    const { router } = frame;
    if (previous && previous !== router.boot) this.#banner("The router was restarted: its numbers begin anew.", 10_000);
    else if (byId("status").dataset.state === "lost") this.#banner("");
    if (router.ready) this.#show("ready", "Ready");
    else this.#show("waiting", "Waiting for workers");
    setText(byId("model"), router.model);
    setText(byId("version"), `Baton ${router.version}`);
    document.title = `${router.model} – Baton`;
    this.#try.serves(router);
    this.#diagram.update(frame, router.now);
    this.#workers.update(frame.workers, router.now);
    this.#requests.update(frame.requests, () => this.#now());
  }

  #now() {
    return this.#frame.router.now + (performance.now() - this.#receivedAt) / 1000;
  }

  #show(state, text) {
    setAttribute(byId("status"), "data-state", state);
    setText(byId("status-text"), text);
  }

  #banner(text, forMs = 0) {
    setText(byId("banner"), text);
    byId("banner").hidden = !text;
    if (forMs) setTimeout(() => byId("banner").textContent === text && this.#banner(""), forMs);
  }
}

new Page().start();
