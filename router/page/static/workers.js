// A card for each worker: what it does, how full its KV pool is, and for a while those that are gone.

import { arrange, element, setAttribute, setText } from "./dom.js";
import { age, count, percent, plural } from "./format.js";

const PARTS = ["used", "cached", "free"];

export class Workers {
  #list;
  #cards = new Map();

  constructor(list) {
    this.#list = list;
  }

  /** `now` is the router's clock. */
  update(workers, now) {
    const lost = new Set(workers.filter((worker) => worker.state === "gone").map((worker) => worker.name));
    const wanted = new Map(workers.map((worker) => [`${worker.name}/${worker.epoch}`, worker]));
    for (const key of this.#cards.keys()) {
      if (!wanted.has(key)) this.#cards.delete(key);
    }
    for (const [key, worker] of wanted) {
      if (!this.#cards.has(key)) this.#cards.set(key, new Card());
      this.#cards.get(key).update(worker, now, lost.has(worker.name));
    }
    arrange(this.#list, [...wanted.keys()].map((key) => this.#cards.get(key).node));
  }
}

class Card {
  constructor() {
    this.node = element("li", "card worker");
    const head = element("div", "head");
    this.name = element("h3");
    this.epoch = element("span", "epoch");
    this.state = element("span", "state");
    head.append(element("span", "mark"), this.name, this.epoch, this.state);
    this.pool = element("div", "pool");
    this.pool.setAttribute("role", "meter");
    this.pool.setAttribute("aria-valuemin", "0");
    this.parts = PARTS.map((part) => element("span", part));
    this.pool.append(...this.parts);
    this.blocks = element("p", "blocks");
    this.counts = PARTS.map((part) => element("span", `of-${part}`));
    this.blocks.append(...this.counts);
    this.load = element("p", "load");
    this.doing = element("span");
    this.hits = element("span", "hits");
    this.load.append(this.doing, this.hits);
    this.node.append(head, this.load, this.pool, this.blocks);
  }

  update(worker, now, isReplacement) {
    setAttribute(this.node, "data-role", worker.role);
    setAttribute(this.node, "data-state", worker.state);
    setText(this.name, worker.name);
    setText(this.epoch, `epoch ${worker.epoch}`);
    setText(this.state, stateOf(worker, now, isReplacement));
    if (worker.state === "gone") {
      setText(this.doing, "Its requests went to other workers, or ended.");
      setText(this.hits, "");
      this.pool.hidden = this.blocks.hidden = true;
      return;
    }
    this.#updateLoad(worker);
    this.#updatePool(worker.blocks, worker.block_tokens);
  }

  #updateLoad(worker) {
    const queued = worker.queued_tokens ? ` · ${count(worker.queued_tokens)} tok queued` : "";
    setText(this.doing, `${count(worker.running)} running · ${count(worker.waiting)} waiting${queued}`);
    setText(this.hits, worker.prefix_hit_share === null ? "" : `prefix hits ${percent(worker.prefix_hit_share)}`);
    this.hits.title = "Prompt tokens that it had cached, of those that it was given to prefill";
  }

  #updatePool({ total, used, cached }, blockTokens) {
    const amounts = { used, cached, free: Math.max(total - used - cached, 0) };
    PARTS.forEach((part, index) => {
      this.parts[index].style.width = `${total ? (amounts[part] / total) * 100 : 0}%`;
      this.parts[index].hidden = !amounts[part];
      setText(this.counts[index], `${index ? "" : "KV "}${count(amounts[part])} ${part}`);
    });
    setAttribute(this.pool, "aria-label", "KV blocks in use");
    setAttribute(this.pool, "aria-valuemax", String(total));
    setAttribute(this.pool, "aria-valuenow", String(used));
    setAttribute(this.pool, "aria-valuetext", `${used} used, ${cached} cached, ${amounts.free} free of ${total}`);
    setAttribute(this.pool, "title", `${plural(total, "KV block")} of ${blockTokens} tokens, ${percent(total ? used / total : 0)} in use`);
  }
}

function stateOf(worker, now, isReplacement) {
  if (worker.state === "gone") return `gone ${age(now - worker.left_at)} ago`;
  if (worker.state === "up" && isReplacement) return `joined ${age(now - worker.joined_at)} ago`;
  return worker.state;
}
