// Looks at the live page in a real browser: node page.mjs CHROMIUM URL. Prints {check: "" or what went wrong} as JSON.

import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [executablePath, url] = process.argv.slice(2);
const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
const STAGES = ["queue", "reserve", "prefill", "transfer", "first_decode_step", "decode"];
const WORDS = "river stone lamp bird tree ocean garden window ladder copper willow hammer".split(" ");

/** A prompt that no cache knows. */
function freshPrompt(numWords = 120) {
  return Array.from({ length: numWords }, () => WORDS[Math.floor(Math.random() * WORDS.length)]).join(" ");
}

const checks = {
  async "it loads without an error, and shows both workers"(open) {
    const page = await open();
    await page.goto(url);
    await page.waitForSelector("#status[data-state=ready]");
    assert.deepEqual(await page.locator(".worker h3").allTextContents(), ["prefill-0", "decode-0"]);
    assert.deepEqual(await page.locator(".worker .state").allTextContents(), ["up", "up"]);
    assert.match(await page.locator(".worker .blocks").first().textContent(), /\d free/);
    assert.equal(await page.locator("#diagram .station").count(), 3);
    assert.equal(await page.locator("#model").textContent(), "demo");
  },

  async "a prompt streams in, and its row goes through every stage"(open) {
    const page = await open();
    await page.goto(url);
    await page.waitForSelector("#status[data-state=ready]");
    await endless(page);
    await page.evaluate(() => {
      window.additions = 0;
      const count = (records) => (window.additions += records.filter((record) => record.addedNodes.length).length);
      new MutationObserver(count).observe(document.getElementById("answer-text"), { childList: true });
    });
    await page.fill("#prompt", freshPrompt());
    await page.fill("#max-tokens", "40");
    await page.click("#run");
    await page.waitForSelector("#answer-text.done");
    assert.ok((await page.evaluate(() => window.additions)) > 5, "the answer came in few pieces");
    assert.equal(await page.locator("#fact-tokens").textContent(), "40");
    assert.match(await page.locator("#fact-ttft").textContent(), /^[\d.]+ m?s$/);
    assert.match(await page.locator("#fact-speed").textContent(), /^[\d.]+ tok\/s$/);
    const row = page.locator(".row[data-own=true]");
    await page.waitForSelector(".row[data-own=true][data-outcome=length]");
    const classes = await row.locator(".segment").evaluateAll((nodes) => nodes.map((node) => node.classList[1]));
    assert.deepEqual(classes, STAGES.map((stage) => `s-${stage}`));
    const widths = await row.locator(".segment").evaluateAll((nodes) => nodes.map((node) => node.getBoundingClientRect().width));
    assert.ok(widths.every((width) => width > 0), `widths ${widths}`);
    await row.locator("button").focus();
    await page.keyboard.press("Enter");
    assert.equal(await row.locator("button").getAttribute("aria-expanded"), "true");
    assert.ok(await row.locator(".details").isVisible());
    const details = await row.locator(".details").textContent();
    for (const label of ["prefill-0 → decode-0", "Transfer (exposed)", "40 tokens"]) assert.ok(details.includes(label), details);
  },

  async "Stop cancels both legs"(open) {
    const page = await open();
    await page.goto(url);
    await page.waitForSelector("#status[data-state=ready]");
    await endless(page);
    await page.fill("#prompt", freshPrompt());
    await page.fill("#max-tokens", "3000");
    await page.click("#run");
    await page.waitForSelector("#answer-text:not(:empty)");
    await page.waitForSelector(".row[data-own=true][data-outcome=running]");
    await page.click("#stop");
    await page.waitForSelector("#answer-text.stopped");
    await page.waitForSelector(".row[data-own=true][data-outcome=cancelled]");
    assert.ok(await page.locator("#run").isEnabled());
    await page.waitForFunction(() => [...document.querySelectorAll(".worker .load")].every((load) => load.textContent.startsWith("0 running · 0 waiting")));
  },

  async "an error is shown as the router words it"(open) {
    const page = await open({ expected: /400/ });
    await page.goto(url);
    await page.waitForSelector("#status[data-state=ready]");
    await page.fill("#max-tokens", "1000000");
    await page.press("#prompt", "Control+Enter");
    await page.waitForSelector("#answer-text.error");
    assert.match(await page.locator("#answer-text").textContent(), /max_tokens/);
  },

  async "a chat goes by the model's template"(open) {
    const page = await open();
    await page.goto(url);
    await page.waitForSelector("#status[data-state=ready]");
    await page.selectOption("#mode", "chat");
    await page.click("text=Sum");
    await page.fill("#temperature", "0");
    await page.click("#run");
    await page.waitForSelector("#answer-text.done");
    assert.match(await page.locator("#answer-text").textContent(), /19/);
  },

  async "a phone scrolls in one direction only"(open) {
    const page = await open({ viewport: { width: 390, height: 844 } });
    await page.goto(url);
    await page.waitForSelector(".row");
    await page.locator(".row button").first().click();
    assert.match(await page.locator("#diagram").getAttribute("viewBox"), /^0 0 360 /);
    for (const width of [390, 360]) {
      await page.setViewportSize({ width, height: 800 });
      assert.ok((await page.evaluate(() => document.documentElement.scrollWidth)) <= width);
    }
    await page.setViewportSize({ width: 1280, height: 900 });
    await page.waitForSelector('#diagram[viewBox^="0 0 1200 "]');
  },

  async "dark and light follow the system, and the choice of a visitor is kept"(open) {
    const brightness = (page) =>
      page.evaluate(() => Number(getComputedStyle(document.body).backgroundColor.match(/\d+/)[0]));
    const page = await open({ colorScheme: "light" });
    await page.goto(url);
    assert.ok((await brightness(page)) > 200);
    await page.emulateMedia({ colorScheme: "dark" });
    assert.ok((await brightness(page)) < 60);
    await page.click("#theme");
    assert.ok((await brightness(page)) > 200);
    await page.reload();
    assert.ok((await brightness(page)) > 200);
  },

  async "it comes back by itself, and says so meanwhile"(open) {
    const page = await open({ expected: /ERR_FAILED/ });
    await page.route("**/live", (route) => route.abort());
    await page.goto(url);
    await page.waitForSelector("#banner:not([hidden])");
    assert.equal(await page.locator("#status-text").textContent(), "Reconnecting");
    await page.unroute("**/live");
    await page.waitForSelector("#status[data-state=ready]");
    assert.ok(await page.locator("#banner").isHidden());
  },

  async "a dead worker, its replacement and what became of requests are marked"(open) {
    const page = await open();
    const frame = await (await fetch(`${url}/live/snapshot`)).json();
    const [prefill, decode] = frame.workers;
    frame.workers = [prefill, { ...decode, epoch: 7 }, { role: "decode", name: decode.name, epoch: 2, state: "gone", left_at: frame.router.now - 3 }];
    const [request] = frame.requests.filter(({ ended }) => ended !== null);
    const failed = { ...request.legs[0], failure: "prefill_failed" };
    frame.requests = [
      { ...request, key: "a", outcome: "failed", error: "UNAVAILABLE" },
      { ...request, key: "b", outcome: "cancelled" },
      { ...request, key: "c", attempts: 2, legs: [failed, request.legs[0]] },
      { ...request, key: "d", attempts: 2, legs: [{ ...failed, failure: "preempted" }, request.legs[0]] },
    ];
    const body = `event: frame\ndata: ${JSON.stringify(frame)}\n\n`;
    await page.route("**/live", (route) => route.fulfill({ contentType: "text/event-stream", body }));
    await page.goto(url);
    await page.waitForSelector(".worker[data-state=gone]");
    assert.match(await page.locator(".worker[data-state=gone] .state").textContent(), /^gone \d+ s ago$/);
    assert.match(await page.locator(".worker").nth(1).textContent(), /epoch 7joined/);
    assert.deepEqual(await page.locator(".row .marks").allTextContents(), ["failed", "cancelled", "retried", "preempted"]);
    assert.equal(await page.locator(".row .cut").count(), 2);
  },
};

/** Lets the model go on past its end, so that a request lasts as long as the check needs it. */
async function endless(page) {
  await page.route("**/v1/completions", (route) => {
    const body = { ...route.request().postDataJSON(), ignore_eos: true };
    return route.continue({ postData: JSON.stringify(body) });
  });
}

/** Runs one check in a context of its own; whatever the browser complains of fails it. */
async function run(browser, check) {
  const contexts = [];
  const complaints = [];
  const open = async ({ expected = /^$/, ...options } = {}) => {
    const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
    contexts.push(context);
    const page = await context.newPage();
    page.setDefaultTimeout(10_000);
    const complain = (text) => expected.test(text) || complaints.push(text);
    page.on("console", (message) => ["error", "warning"].includes(message.type()) && complain(message.text()));
    page.on("pageerror", (error) => complain(error.message));
    return page;
  };
  try {
    await check(open);
    assert.deepEqual(complaints, []);
    return "";
  } catch (error) {
    return `${error.stack}\n${complaints.join("\n")}`;
  } finally {
    await Promise.all(contexts.map((context) => context.close()));
  }
}

const browser = await chromium.launch({ executablePath, args: FLAGS });
try {
  const outcomes = {};
  for (const [name, check] of Object.entries(checks)) outcomes[name] = await run(browser, check);
  console.log(JSON.stringify(outcomes));
} finally {
  await browser.close();
}
