/** The panel on a quantize node, with two tabs: Plan (what a run would do) and Run (progress and results). */

import { element, indexForKey, isolateEvents, shadowHost, uniqueId } from "./dom.js";
import { formatDecibels, formatSizes } from "./numbers.js";
import { planRequests } from "./plan_request.js";
import { errorView, hintView, linkedView, planSentence, planView, problemList } from "./plan_view.js";
import { savedFiles } from "./result_box.js";
import { idleView, layerText, outcomeText, progress, runningView, stoppedView, summaryView } from "./run_view.js";
import { PANEL } from "./styles.js";
import { isLinked } from "./trace.js";
import { t } from "./words.js";

/** Milliseconds without a change before a plan is requested. */
const DEBOUNCE = 250;

/** How often a screen reader announces the progress of one run. */
const ANNOUNCEMENTS = 4;

export class Panel {
  /**
   * @param {object} node
   * @param {{rootGraph: () => object, fetchPlan: (request: object, signal: AbortSignal) => Promise<object>,
   *   redraw: () => void}} page
   */
  constructor(node, page) {
    this.node = node;
    this.page = page;
    this.tabs = { plan: createTab(t("plan")), run: createTab(t("run")) };
    this.liveRegion = element("div", { class: "visually-hidden", "aria-live": "polite" });
    this.host = this.#build();
    this.#selectTab("plan");
    this.tabs.run.panel.append(...idleView());
  }

  /** Request a new plan if the file or a choice has changed. */
  refreshPlan() {
    const request = planRequests(this.node, this.page.rootGraph());
    const key = JSON.stringify(request);
    if (key === this.planKey) return;
    this.planKey = key;
    this.#cancelPlan();
    if (request.hint) {
      this.#fillPlan(hintView(request.hint));
      return;
    }
    this.tabs.plan.panel.classList.add("stale");
    this.timer = setTimeout(() => this.#fetchPlan(request), DEBOUNCE);
  }

  /** @param {import("./run_view.js").RunState} state */
  showRunning(state) {
    if (!this.runState) this.#selectTab("run");
    this.runState = state;
    this.#fillRun(runningView(state));
    const { share } = progress(state);
    const announcement = Math.floor(ANNOUNCEMENTS * share);
    if (announcement !== this.lastAnnouncement) {
      this.#announce(t("runSpokenProgress", { layer: layerText(state), percent: Math.floor(100 * share) }));
    }
    this.lastAnnouncement = announcement;
  }

  /**
   * @param {import("./run_view.js").Summary} summary
   * @param {import("./result_box.js").SavedFile[]} [files] that the node wrote
   */
  showSummary(summary, files = []) {
    this.#endRun();
    this.#selectTab("run");
    this.#fillRun([...savedFiles(files), ...summaryView(summary, this.#nearestSetter())]);
    const sizes = formatSizes(summary.bytes_before, summary.bytes_after);
    const text = t("resultSpoken", { sizes, sqnr: formatDecibels(summary.sqnr) });
    this.#announce(summary.layers ? text : t("resultNothing"));
  }

  /**
   * Show that a job ended early. Does nothing if none was running.
   * @param {"cancelled"|"failed"|"ended"} outcome "ended" where it is not known which
   */
  showStopped(outcome) {
    if (!this.runState) return;
    this.#fillRun(stoppedView(outcomeText(outcome, this.runState)));
    this.#endRun();
    this.#announce(outcomeText(outcome));
  }

  /**
   * Show why the node failed.
   * @param {string} message
   */
  showError(message) {
    this.#fillRun([...stoppedView(outcomeText("failed", this.runState)), ...errorView(message)]);
    this.#endRun();
    this.#selectTab("run");
    this.#announce(t("runSpokenFailure", { message }));
  }

  /** Cancel pending requests. */
  remove() {
    this.#cancelPlan();
    this.removed = true;
  }

  #build() {
    const { plan, run } = this.tabs;
    const tabList = element("div", { role: "tablist", "aria-label": "Stochastic FP8" }, plan.button, run.button);
    for (const [name, { button }] of Object.entries(this.tabs)) {
      button.addEventListener("click", () => this.#selectTab(name));
    }
    tabList.addEventListener("keydown", (event) => this.#onTabKey(event));
    const frame = element("div", { class: "frame" }, tabList, plan.panel, run.panel, this.liveRegion);
    isolateEvents(frame);
    return shadowHost(PANEL, frame);
  }

  #onTabKey(event) {
    const names = Object.keys(this.tabs);
    const index = indexForKey(event.key, names.indexOf(this.selected), names.length - 1);
    if (index === null) return;
    event.preventDefault();
    this.#selectTab(names[(index + names.length) % names.length]);
    this.tabs[this.selected].button.focus();
  }

  #selectTab(selected) {
    this.selected = selected;
    for (const [name, { button, panel }] of Object.entries(this.tabs)) {
      button.setAttribute("aria-selected", String(name === selected));
      button.tabIndex = name === selected ? 0 : -1;
      panel.hidden = name !== selected;
    }
  }

  /** Sets the node's rounding to nearest; null where the node has no such choice. */
  #nearestSetter() {
    const widget = this.node.widgets?.find(({ name }) => name === "rounding");
    if (!widget || isLinked(this.node, "rounding")) return null;
    return () => {
      widget.value = "nearest";
      widget.callback?.("nearest");
      this.page.redraw();
    };
  }

  #fillRun(children) {
    this.tabs.run.panel.replaceChildren(...children);
  }

  #endRun() {
    this.runState = null;
    this.lastAnnouncement = undefined;
  }

  #announce(text) {
    this.liveRegion.textContent = text;
  }

  #cancelPlan() {
    clearTimeout(this.timer);
    this.abortController?.abort();
  }

  async #fetchPlan({ requests, linked, problems }) {
    const { signal } = (this.abortController = new AbortController());
    const answers = await Promise.all(requests.map((request) => this.#answer(request, signal)));
    if (signal.aborted || this.removed) return;
    const unmatched = answers.find(({ plan }) => plan?.unmatched)?.plan.unmatched;
    if (unmatched) this.#showUnmatched(unmatched);
    else this.#showPlan(answers, linked, problems);
  }

  /** Keep the last plan below a quiet line about patterns that match nothing: one may be half typed. */
  #showUnmatched(text) {
    this.#fillPlan([
      element("p", { class: "hint", textContent: text }),
      element("div", { class: "stale views" }, ...(this.lastPlan ?? [])),
    ]);
  }

  #showPlan(answers, linked, problems) {
    const views = [
      ...problemList(problems),
      ...answers.flatMap(({ plan, error }) => (plan ? planView(plan) : errorView(error))),
      ...(linked.length ? linkedView(linked) : []),
    ];
    if (answers.some(({ plan }) => plan)) this.lastPlan = views;
    this.#fillPlan(views);
    const sentences = answers.map(({ plan, error }) => (plan ? planSentence(plan) : error));
    if (this.selected === "plan") this.#announce(sentences.join(". "));
  }

  #fillPlan(children) {
    this.tabs.plan.panel.classList.remove("stale");
    this.tabs.plan.panel.replaceChildren(...children);
  }

  async #answer(request, signal) {
    try {
      return { plan: await this.page.fetchPlan(request, signal) };
    } catch (error) {
      return { error: error.message };
    }
  }
}

function createTab(title) {
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
