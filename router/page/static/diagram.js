// The flow router → prefill → transfer → decode, with the live numbers on it; wide or tall, as there is room.

import { arrange, setAttribute, setText, svg } from "./dom.js";
import { bytesPerSecond, count, percent, percentiles, plural, rate } from "./format.js";
import { lastSeen } from "./stages.js";

// A link moves for as long as its last activity is no older than this.
const LINGER_S = 0.9;

const WIDE = {
  box: [1200, 200],
  width: 248,
  height: 132,
  stations: { router: [1, 1], prefill: [376, 1], decode: [951, 1] },
  rows: { label: 18, value: 230, first: 97, step: 21 },
  number: [18, 68, "start"],
  links: {
    prompt: "M249 70H376",
    transfer: "M624 70H951",
    local: "M190 133V149Q190 159 200 159H1000Q1010 159 1010 149V133",
    tokens: "M1075 133V179Q1075 195 1059 195H141Q125 195 125 179V133",
  },
  notes: { prompt: [312, 56, "middle"], local: [600, 151, "middle"], tokens: [600, 187, "middle"] },
  pipe: { x: 787, anchor: "middle", title: 18, number: 53, rows: [94, 113] },
};

const TALL = {
  box: [360, 444],
  width: 308,
  height: 98,
  stations: { router: [26, 1], prefill: [26, 133], decode: [26, 345] },
  rows: { label: 16, value: 292, first: 62, step: 22 },
  number: [292, 35, "end"],
  links: {
    prompt: "M100 99V133",
    transfer: "M100 231V345",
    local: "M26 60H18Q8 60 8 70V384Q8 394 18 394H26",
    tokens: "M334 394H342Q352 394 352 384V70Q352 60 342 60H334",
  },
  notes: { prompt: [114, 120, "start"] },
  pipe: { x: 122, anchor: "start", title: 252, number: 283, rows: [305, 325] },
};

const STATIONS = {
  router: { title: "Router", rows: [["Queued", "Requests that wait for workers"], ["TTFT", "Time to first token"]] },
  prefill: { title: "Prefill", rows: [["Now", "Requests in prefill"], ["Waiting", "Prompt tokens that are not computed yet"]] },
  decode: { title: "Decode", rows: [["Batch", "Sequences that run"], ["ITL", "Inter-token latency"]] },
};

export class Diagram {
  #root;
  #texts = new Map();
  #links = new Map();
  #last = null;

  constructor(root) {
    this.#root = root;
    const wide = matchMedia("(min-width: 1000px)");
    wide.addEventListener("change", () => this.#draw(wide.matches ? WIDE : TALL));
    this.#draw(wide.matches ? WIDE : TALL);
  }

  /** `now` is the router's clock. */
  update(frame, now) {
    this.#last = [frame, now];
    const { flow, requests } = frame;
    const stages = flow.stages;
    const decoding = (stages.decode ?? 0) + (stages.first_decode_step ?? 0);
    this.#number("router", count(flow.running), "running");
    this.#row("router", 0, count(flow.queued));
    this.#row("router", 1, percentiles(flow.ttft));
    this.#number("prefill", ...rate(flow.prefilled_per_s));
    this.#row("prefill", 0, plural(stages.prefill ?? 0, "request"));
    this.#row("prefill", 1, `${count(flow.prefill_queued_tokens)} tok`);
    this.#number("transfer", ...bytesPerSecond(flow.transferred_bytes_per_s));
    const last = flow.last_transfer;
    this.#set("transfer-0", last ? `last at ${bytesPerSecond(last.bytes_per_s).join(" ")} over ${last.transport}` : "nothing sent yet");
    this.#set("transfer-1", flow.exposed_transfer ? `exposed ${percentiles(flow.exposed_transfer)}` : "");
    this.#number("decode", ...rate(flow.generated_per_s));
    this.#row("decode", 0, count(Math.max(flow.decode_batch, decoding)));
    this.#row("decode", 1, percentiles(flow.inter_token));
    this.#set("note-local", `short or cached prompts stay with decode${flow.local_share === null ? "" : `: ${percent(flow.local_share)}`}`);

    const active = (wanted) => lastSeen(requests, now, wanted) > now - LINGER_S;
    this.#move("prompt", active((stage, leg) => stage === "prefill" && leg.prefill !== leg.decode));
    this.#move("transfer", active((stage) => stage === "transfer"));
    this.#move("local", active((stage, leg) => stage === "prefill" && leg.prefill === leg.decode));
    this.#move("tokens", active((stage) => stage === "decode" || stage === "first_decode_step"));
  }

  #draw(layout) {
    this.#texts.clear();
    this.#links.clear();
    this.#root.setAttribute("viewBox", `0 0 ${layout.box[0]} ${layout.box[1]}`);
    const links = Object.entries(layout.links).map(([name, path]) => this.#link(name, path, layout.notes[name]));
    const stations = Object.keys(STATIONS).map((name) => this.#station(name, layout));
    arrange(this.#root, [...links, this.#pipe(layout.pipe), ...stations]);
    if (this.#last) this.update(...this.#last);
  }

  #link(name, path, note) {
    const group = svg("g", { class: `link link-${name}` });
    group.append(svg("path", { class: "rail", d: path }), svg("path", { class: "motion", d: path }));
    if (note) {
      const text = { prompt: "prompt", local: "", tokens: "tokens to clients" }[name];
      const label = svg("text", { class: "note", x: note[0], y: note[1], "text-anchor": note[2] }, text);
      this.#texts.set(`note-${name}`, label);
      group.append(label);
    }
    this.#links.set(name, group);
    return group;
  }

  #pipe({ x, anchor, title, number, rows }) {
    const group = svg("g", { class: "pipe", "text-anchor": anchor });
    group.append(svg("text", { class: "name", x, y: title }, "Transfer"), this.#numberText("transfer", x, number, anchor));
    rows.forEach((y, index) => {
      const line = svg("text", { class: "value", x, y });
      this.#texts.set(`transfer-${index}`, line);
      group.append(line);
    });
    return group;
  }

  #station(name, layout) {
    const [x, y] = layout.stations[name];
    const group = svg("g", { class: `station station-${name}`, transform: `translate(${x} ${y})` });
    group.append(
      svg("rect", { class: "box", width: layout.width, height: layout.height, rx: 12 }),
      svg("circle", { class: "mark", cx: layout.rows.label + 5, cy: 25, r: 5 }),
      svg("text", { class: "name", x: layout.rows.label + 18, y: 30 }, STATIONS[name].title),
      this.#numberText(name, ...layout.number),
    );
    STATIONS[name].rows.forEach(([label, meaning], index) => {
      const rowY = layout.rows.first + index * layout.rows.step;
      const value = svg("text", { class: "value", x: layout.rows.value, y: rowY, "text-anchor": "end" }, "–");
      this.#texts.set(`${name}-${index}`, value);
      const term = svg("text", { class: "label", x: layout.rows.label, y: rowY }, label);
      term.append(svg("title", {}, meaning));
      group.append(term, value);
    });
    return group;
  }

  #numberText(name, x, y, anchor) {
    const text = svg("text", { class: "number", x, y, "text-anchor": anchor });
    const value = svg("tspan", {}, "–");
    const unit = svg("tspan", { class: "unit", dx: 5 });
    text.append(value, unit);
    this.#texts.set(`${name}-number`, value);
    this.#texts.set(`${name}-unit`, unit);
    return text;
  }

  #number(name, value, unit) {
    this.#set(`${name}-number`, value);
    this.#set(`${name}-unit`, unit);
  }

  #row(name, index, value) {
    this.#set(`${name}-${index}`, value);
  }

  #set(name, text) {
    const node = this.#texts.get(name);
    if (node) setText(node, text);
  }

  #move(name, isActive) {
    setAttribute(this.#links.get(name), "data-active", String(isActive));
  }
}
