// Drives Chromium for browser.py: reads one call a line from stdin as JSON, answers each with one line on stdout.
// { target: "page" | "mouse" | "keyboard" | "locator" | "log", selector, name, args } -> { result } | { error }

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const [nodeModules, executablePath, host] = process.argv.slice(2);
const { chromium } = createRequire(`${nodeModules}/`)("playwright-core");
const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];

const log = { errors: [], blocked: [] };
const browser = await chromium.launch({ executablePath, args: FLAGS });
const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
const page = await context.newPage();
page.setDefaultTimeout(20_000);
page.on("pageerror", (error) => log.errors.push(String(error.stack)));
page.on("console", (message) => {
  if (message.type() === "error") log.errors.push(`${message.text()}\n    at ${message.location().url}`);
});
await context.route("**", (route) => {
  const { hostname, href } = new URL(route.request().url());
  if (hostname === host) return route.fallback();
  log.blocked.push(href);
  return route.abort();
});

const targets = {
  page: () => page,
  mouse: () => page.mouse,
  keyboard: () => page.keyboard,
  locator: (selector) => page.locator(selector),
  log: () => ({ take: () => Object.fromEntries(Object.entries(log).map(([name, list]) => [name, list.splice(0)])) }),
};

async function answer({ target, selector, name, args }) {
  try {
    const result = await targets[target](selector)[name](...args);
    return JSON.stringify({ result: isPlain(result) ? (result ?? null) : null });
  } catch (error) {
    return JSON.stringify({ error: error.message });
  }
}

/** Whether a result is data, not one of playwright's own objects. */
function isPlain(result) {
  return result === null || typeof result !== "object" || Array.isArray(result) || result.constructor === Object;
}

for await (const line of createInterface({ input: process.stdin })) {
  process.stdout.write(`${await answer(JSON.parse(line))}\n`);
}
await browser.close();
