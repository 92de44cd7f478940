// One request: its line, its bar of stages, and its numbers, which a tap or Enter opens and hovering shows.

import { element, setAttribute, setText } from "./dom.js";
import { count, plural, seconds } from "./format.js";
import { STAGES } from "./stages.js";

const FAILURES = {
  preempted: "preempted: the pool ran dry, recomputed",
  reserve_failed: "the reservation failed",
  prefill_failed: "the prefill or the transfer failed",
  decode_lost: "the decode worker died",
  lease_lost: "the lease was lost",
  decode_failed: "decoding failed",
};

export class Row {
  #request = null;
  #bar = element("span", "bar");
  #segments = [];
  #cuts = [];
  #parts = {};
  #details = element("div", "details");

  constructor(key) {
    this.node = element("li", "row");
    const button = element("button", "line");
    button.type = "button";
    this.#details.id = `details-${key}`;
    this.#details.hidden = true;
    button.setAttribute("aria-controls", this.#details.id);
    button.setAttribute("aria-expanded", "false");
    for (const name of ["id", "marks", "tokens", "time"]) this.#parts[name] = element("span", name);
    const { id, marks, tokens, time } = this.#parts;
    button.append(id, this.#bar, marks, tokens, time);
    button.addEventListener("click", () => {
      this.#details.hidden = !this.#details.hidden;
      button.setAttribute("aria-expanded", String(!this.#details.hidden));
      this.#fillDetails();
    });
    this.node.append(button, this.#details);
  }

  get isRunning() {
    return this.#request.ended === null;
  }

  /** Seconds from arrival to the end, or to now. */
  length(now) {
    const { ended, arrived_at: arrivedAt } = this.#request;
    return Math.max(ended ?? now - arrivedAt, 0.000001);
  }

  update(request, isOwn) {
    this.#request = request;
    const last = request.legs.at(-1);
    setAttribute(this.node, "data-outcome", request.outcome);
    setAttribute(this.node, "data-own", String(isOwn));
    setText(this.#parts.id, isOwn ? "yours" : request.id.replace(/^(chat)?cmpl-/, ""));
    this.#parts.id.title = request.id;
    setText(this.#parts.tokens, tokensOf(request));
    this.#parts.tokens.title = "Prompt tokens (of which cached) → generated tokens";
    this.#updateMarks(request, last);
    this.#updateSegments(request);
    if (!this.#details.hidden) this.#fillDetails();
  }

  /** Draws the bar for a moment of the router's clock; `scale` seconds are its whole width. */
  paint(now, scale) {
    const length = this.length(now);
    this.#segments.forEach(({ node, start, end }) => {
      const stop = end ?? length;
      node.style.left = `${(start / scale) * 100}%`;
      node.style.width = `${(Math.max(stop - start, 0) / scale) * 100}%`;
    });
    this.#cuts.forEach(({ node, at }) => {
      node.style.left = `${(at / scale) * 100}%`;
    });
    setText(this.#parts.time, seconds(length));
  }

  /** There is room for one mark, the gravest; the others are in its title. */
  #updateMarks(request, last) {
    const marks = [];
    if (last.decode && last.prefill === last.decode) marks.push(["local", "local", "The decode worker prefilled it"]);
    if (request.attempts > 1) {
      const reasons = request.legs.map((leg) => FAILURES[leg.failure] ?? leg.failure).filter(Boolean);
      const preempted = request.legs.some((leg) => leg.failure === "preempted");
      marks.push(["again", preempted ? "preempted" : "retried", reasons.join("; ")]);
    }
    if (request.outcome === "cancelled") marks.push(["cancelled", "cancelled", "The client went away"]);
    if (request.outcome === "failed") marks.push(["failed", "failed", request.error]);
    const [kind, label] = marks.at(-1) ?? ["", ""];
    setAttribute(this.#parts.marks, "title", marks.map((mark) => `${mark[1]}: ${mark[2]}`).join("\n"));
    if (this.#parts.marks.textContent === label) return;
    this.#parts.marks.replaceChildren(...(label ? [element("span", `chip chip-${kind}`, label)] : []));
  }

  #updateSegments(request) {
    const spans = request.legs.flatMap((leg) => leg.spans);
    while (this.#segments.length < spans.length) {
      const node = element("i");
      this.#bar.append(node);
      this.#segments.push({ node });
    }
    this.#segments.forEach((segment, index) => {
      const [stage, start, length] = spans[index] ?? ["", 0, 0];
      const isOpen = request.ended === null && index === spans.length - 1;
      Object.assign(segment, { start, end: isOpen ? null : start + length });
      setAttribute(segment.node, "class", `segment s-${stage}`);
      setAttribute(segment.node, "title", stage && `${STAGES.get(stage)}: ${isOpen ? "now" : seconds(length)}`);
    });
    const failed = request.legs.filter((leg) => leg.failure && leg.spans.length);
    while (this.#cuts.length < failed.length) {
      const node = element("i", "cut");
      this.#bar.append(node);
      this.#cuts.push({ node });
    }
    failed.forEach((leg, index) => {
      const [, start, length] = leg.spans.at(-1);
      this.#cuts[index].at = start + length;
      this.#cuts[index].node.title = FAILURES[leg.failure] ?? leg.failure;
    });
  }

  #fillDetails() {
    const request = this.#request;
    const facts = element("dl", "facts");
    const decodeS = request.ended === null ? null : request.ended - (request.first_token ?? request.ended);
    const speed = decodeS ? `${((request.generated_tokens - request.choices) / decodeS).toFixed(1)} tok/s` : "–";
    for (const [term, value] of [
      ["Request", request.id],
      ["Workers", routeOf(request.legs.at(-1)) || "–"],
      ["Outcome", request.error ? `${request.outcome} (${request.error})` : request.outcome],
      ["First token", request.first_token === null ? "–" : seconds(request.first_token)],
      ["Speed after it", speed],
      ["Prompt", `${plural(request.prompt_tokens, "token")}, ${count(request.cached_tokens ?? 0)} cached`],
      ["Generated", plural(request.generated_tokens, "token") + (request.choices > 1 ? ` in ${request.choices} choices` : "")],
    ]) {
      const entry = element("div");
      entry.append(element("dt", "", term), element("dd", "", value));
      facts.append(entry);
    }
    this.#details.replaceChildren(facts, ...request.legs.map((leg, index) => this.#legDetails(leg, index)));
  }

  #legDetails(leg, index) {
    const request = this.#request;
    const list = element("ul", "stages");
    leg.spans.forEach(([stage, start, length], position) => {
      const isOpen = request.ended === null && leg === request.legs.at(-1) && position === leg.spans.length - 1;
      const item = element("li");
      item.append(
        element("span", `swatch s-${stage}`),
        element("span", "stage", STAGES.get(stage)),
        element("span", "at", `from ${seconds(start)}`),
        element("span", "took", isOpen ? "now" : seconds(length)),
      );
      list.append(item);
    });
    const wrapper = element("div", "leg");
    if (request.legs.length > 1) {
      const number = request.attempts - request.legs.length + index + 1;
      const why = leg.failure ? `: ${FAILURES[leg.failure] ?? leg.failure}` : "";
      wrapper.append(element("p", "attempt", `Attempt ${number}, ${routeOf(leg) || "not placed"}${why}`));
    }
    wrapper.append(list);
    return wrapper;
  }
}

function routeOf(leg) {
  if (!leg.decode) return "";
  return leg.prefill === leg.decode ? leg.decode : `${leg.prefill} → ${leg.decode}`;
}

function tokensOf(request) {
  const cached = request.cached_tokens ? ` (${count(request.cached_tokens)})` : "";
  return `${count(request.prompt_tokens)}${cached} → ${count(request.generated_tokens)}`;
}
