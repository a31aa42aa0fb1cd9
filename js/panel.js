/** The panel of a quantize node: what it would do (Plan), and what it does and did (Run). */

import { element, keepFromGraph, shadowHost, uniqueId } from "./dom.js";
import { formatDecibels, formatSizes, pace } from "./format.js";
import { keyTarget } from "./histogram.js";
import { idleView, layerText, runningView, stoppedView, summaryView } from "./live_view.js";
import { planRequests } from "./plan_request.js";
import { needsView, planSentence, planView, refusalView, wiredView } from "./plan_view.js";
import { PANEL } from "./styles.js";

const DEBOUNCE = 250;
const SPOKEN_STEPS = 4;

export class Panel {
  /**
   * @param {object} node
   * @param {{rootGraph: () => object, fetchPlan: (request: object, signal: AbortSignal) => Promise<object>}} page
   */
  constructor(node, page) {
    this.node = node;
    this.page = page;
    this.tabs = { plan: tab("Plan"), run: tab("Run") };
    this.spoken = element("div", { class: "unseen", "aria-live": "polite" });
    this.host = this.#build();
    this.#choose("plan");
    this.tabs.run.panel.append(...idleView());
  }

  /** Ask for a new plan if anything that it depends on has changed. */
  refreshPlan() {
    const wanted = planRequests(this.node, this.page.rootGraph());
    const key = JSON.stringify(wanted);
    if (key === this.planKey) return;
    this.planKey = key;
    this.#cancelPlan();
    if (wanted.needs) {
      this.#fillPlan(needsView(wanted.needs));
      return;
    }
    this.tabs.plan.panel.classList.add("stale");
    this.timer = setTimeout(() => this.#fetchPlan(wanted), DEBOUNCE);
  }

  /** @param {import("./live_view.js").LiveState} state */
  showRunning(state) {
    if (!this.state) this.#choose("run");
    this.state = state;
    this.#fillRun(runningView(state));
    const step = Math.floor(SPOKEN_STEPS * pace(state).share);
    if (step !== this.spokenStep) this.#say(`${layerText(state)}, ${Math.floor(100 * pace(state).share)} percent`);
    this.spokenStep = step;
  }

  /** @param {object} summary the server's summary of a report */
  showSummary(summary) {
    this.#endRun();
    this.#choose("run");
    this.#fillRun(summaryView(summary));
    const sizes = formatSizes(summary.bytes_before, summary.bytes_after);
    this.#say(summary.layers ? `Quantized: ${sizes}, SQNR ${formatDecibels(summary.sqnr)}` : "Nothing was quantized");
  }

  /** The job, if one was running, ended early. `how`: "Cancelled" or "Failed". */
  showStopped(how) {
    if (!this.state) return;
    this.#fillRun(stoppedView(how, this.state));
    this.#endRun();
    this.#say(how);
  }

  remove() {
    this.#cancelPlan();
    this.removed = true;
  }

  #build() {
    const { plan, run } = this.tabs;
    const list = element("div", { role: "tablist", "aria-label": "Stochastic FP8" }, plan.button, run.button);
    for (const [name, { button }] of Object.entries(this.tabs)) {
      button.addEventListener("click", () => this.#choose(name));
    }
    list.addEventListener("keydown", (event) => this.#moveTab(event));
    const frame = element("div", { class: "frame" }, list, plan.panel, run.panel, this.spoken);
    keepFromGraph(frame);
    return shadowHost(PANEL, frame);
  }

  #moveTab(event) {
    const names = Object.keys(this.tabs);
    const target = keyTarget(event.key, names.indexOf(this.chosen), names.length - 1);
    if (target === null) return;
    event.preventDefault();
    this.#choose(names[(target + names.length) % names.length]);
    this.tabs[this.chosen].button.focus();
  }

  #choose(chosen) {
    this.chosen = chosen;
    for (const [name, { button, panel }] of Object.entries(this.tabs)) {
      button.setAttribute("aria-selected", String(name === chosen));
      button.tabIndex = name === chosen ? 0 : -1;
      panel.hidden = name !== chosen;
    }
  }

  #fillRun(children) {
    this.tabs.run.panel.replaceChildren(...children);
  }

  #endRun() {
    this.state = null;
    this.spokenStep = undefined;
  }

  #say(text) {
    this.spoken.textContent = text;
  }

  #cancelPlan() {
    clearTimeout(this.timer);
    this.aborter?.abort();
  }

  async #fetchPlan({ requests, wired }) {
    const aborter = (this.aborter = new AbortController());
    const answers = await Promise.all(requests.map((request) => this.#answer(request, aborter.signal)));
    if (aborter.signal.aborted || this.removed) return;
    this.#showPlan(answers, wired);
  }

  #showPlan(answers, wired) {
    const views = answers.flatMap(({ plan, refusal }) => (plan ? planView(plan) : refusalView(refusal)));
    this.#fillPlan(wired.length ? [...views, ...wiredView(wired)] : views);
    const sentences = answers.map(({ plan, refusal }) => (plan ? planSentence(plan) : refusal));
    if (this.chosen === "plan") this.#say(sentences.join(". "));
  }

  #fillPlan(children) {
    this.tabs.plan.panel.classList.remove("stale");
    this.tabs.plan.panel.replaceChildren(...children);
  }

  async #answer(request, signal) {
    try {
      return { plan: await this.page.fetchPlan(request, signal) };
    } catch (error) {
      return { refusal: error.message };
    }
  }
}

function tab(title) {
  const panelId = uniqueId("sfp8-panel");
  const button = element("button", {
    type: "button",
    role: "tab",
    id: uniqueId("sfp8-tab"),
    textContent: title,
    "aria-controls": panelId,
  });
  const panel = element("div", { role: "tabpanel", id: panelId, tabIndex: 0, "aria-labelledby": button.id });
  return { button, panel };
}
