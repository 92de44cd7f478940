// Recent requests as stage timelines: one row each, those that run grow as time goes by.

import { arrange, byId, element } from "./dom.js";
import { seconds } from "./format.js";
import { Row } from "./row.js";
import { STAGES } from "./stages.js";

const FEW = 12;
const MIN_SCALE_S = 0.1;
const DIVISIONS = 4;
const MAX_OWN = 40;

export class Requests {
  #rows = new Map();
  #shown = [];
  #scale = MIN_SCALE_S;
  #fit = false;
  #all = false;
  #own = [];
  #clock = () => 0;
  #frame = null;
  #animation = 0;
  #still = matchMedia("(prefers-reduced-motion: reduce)");

  constructor() {
    byId("legend").append(...[...STAGES].map(([stage, label]) => {
      const item = element("li");
      item.append(element("span", `swatch s-${stage}`), label);
      return item;
    }));
    byId("scale").addEventListener("change", (event) => {
      this.#fit = event.target.value === "fit";
      this.#render();
    });
    byId("more").addEventListener("click", () => {
      this.#all = !this.#all;
      this.#render();
    });
  }

  /** `clock` gives the router's clock at any later moment. */
  update(requests, clock) {
    this.#frame = requests;
    this.#clock = clock;
    this.#render();
  }

  /** Marks the rows of requests that this page has sent. */
  markOwn(requestId) {
    this.#own = [requestId, ...this.#own].slice(0, MAX_OWN);
    if (this.#frame) this.#render();
  }

  #render() {
    const requests = this.#all ? this.#frame : this.#frame.slice(0, FEW);
    const keys = new Set(requests.map((request) => request.key));
    for (const key of this.#rows.keys()) {
      if (!keys.has(key)) this.#rows.delete(key);
    }
    this.#shown = requests.map((request) => {
      if (!this.#rows.has(request.key)) this.#rows.set(request.key, new Row(request.key));
      const row = this.#rows.get(request.key);
      row.update(request, this.#own.some((ownId) => isOwn(ownId, request.id)));
      return row;
    });
    arrange(byId("rows"), this.#shown.map((row) => row.node));
    byId("no-rows").hidden = this.#frame.length > 0;
    byId("more").hidden = this.#frame.length <= FEW;
    byId("more").textContent = this.#all ? "Show fewer" : `Show all ${this.#frame.length}`;
    this.#paint();
  }

  #paint() {
    const now = this.#clock();
    this.#rescale(Math.max(MIN_SCALE_S, ...this.#shown.map((row) => row.length(now))));
    for (const row of this.#shown) row.paint(now, this.#fit ? row.length(now) : this.#scale);
    this.#animate();
  }

  /** Paints what runs until nothing does. */
  #animate() {
    cancelAnimationFrame(this.#animation);
    const running = this.#shown.filter((row) => row.isRunning);
    if (!running.length || this.#still.matches) return;
    this.#animation = requestAnimationFrame(() => {
      const now = this.#clock();
      if (Math.max(...running.map((row) => row.length(now))) > this.#scale) {
        this.#paint();
        return;
      }
      for (const row of running) row.paint(now, this.#fit ? row.length(now) : this.#scale);
      this.#animate();
    });
  }

  #rescale(longest) {
    const scale = roundUp(longest);
    const ticks = byId("axis").firstElementChild;
    byId("axis").hidden = this.#fit || !this.#shown.length;
    if (scale === this.#scale && ticks.childElementCount) return;
    this.#scale = scale;
    ticks.replaceChildren(
      ...Array.from({ length: DIVISIONS + 1 }, (_, index) =>
        element("span", "", index ? seconds((scale * index) / DIVISIONS) : "0")),
    );
  }
}

/** One call may be several requests, which the router tells apart by what it adds to the id. */
function isOwn(ownId, requestId) {
  return ownId === requestId || requestId.startsWith(`${ownId}-`);
}

/** The next of 1, 2, 4, 6, 8 times a power of ten. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 4, 6, 8, 10].find((step) => step * power >= value * 0.999);
}
