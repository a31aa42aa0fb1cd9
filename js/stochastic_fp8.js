/** The extension: adds panels and sliders to the nodes, and passes on the server's messages. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ABSlider } from "./ab_slider.js";
import { chainCallback } from "./dom.js";
import { Panel } from "./panel.js";
import { PLANNED_NODES } from "./plan_request.js";
import { addElement, mountLate, setColours } from "./renderers.js";
import { ResultBox } from "./result_box.js";
import { restoreView, sortTemplates } from "./templates.js";
import { locatorId, nodeByExecutionId } from "./trace.js";
import { setLanguage, t } from "./words.js";

const SLIDER_NODE = "StochasticFP8ImageCompare";
const PANEL_SIZE = { width: 380, height: 240 };
const SLIDER_SIZE = { width: 340, height: 300 };

/** Pixels of a text box on a tall node: the panel gets the rest. */
const MOST_TEXT = 80;

/** Node type -> the size of the box with its result. */
const RESULT_NODES = {
  StochasticFP8Save: { width: 300, height: 64 },
  StochasticFP8SaveCalibration: { width: 300, height: 46 },
  StochasticFP8Inspect: { width: 340, height: 64 },
};

/** The size of the box with the error of a node that has no other view. */
const ERROR_SIZE = { width: 240, height: 60 };

const OUR_NODES = "StochasticFP8";

/** The folder of the pack, from the address of this file: .../extensions/<folder>/stochastic_fp8.js. */
const PACK = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

/** Milliseconds between two questions to the server about jobs of which this page gets no messages. */
const POLL = 1000;

/** Milliseconds of a job whose end is announced. */
const LONG_JOB = 30_000;

/** @type {Map<object, Panel>} node -> its panel; nodes that are removed leave it */
const panels = new Map();

/**
 * Node -> its element, and how to show what it reports; nodes that are removed leave it.
 * @type {Map<object, {host: HTMLElement, show: (output: object) => void, fail: (message: string) => void}>}
 */
const views = new Map();

/** @type {Map<object, () => void>} node -> how to remove the box with its error */
const errorBoxes = new Map();

/** @type {{node: object, since: number}|null} our node that runs, and when it began in milliseconds */
let running = null;

let lastMessage = 0;
let pollTimer = 0;

const rootGraph = () => app.rootGraph ?? app.graph;

app.registerExtension({
  name: "stochastic_fp8",

  init() {
    sortTemplates(api, PACK);
    setLanguage(app.extensionManager.setting.get("Comfy.Locale"));
  },

  setup() {
    setColours();
    api.addEventListener("execution_start", removeErrorBoxes);
    api.addEventListener("stochastic_fp8.live", ({ detail }) => hear(detail));
    api.addEventListener("executing", ({ detail }) => announceEnd(detail));
    api.addEventListener("execution_interrupted", () => stopAll("cancelled"));
    api.addEventListener("execution_error", ({ detail }) => showError(detail));
    api.addEventListener("execution_cached", ({ detail }) => showCached(detail));
    api.addEventListener("graphChanged", () => {
      replaceOldElements();
      refreshPlans();
    });
  },

  nodeCreated(node) {
    if (PLANNED_NODES.includes(node.comfyClass)) addPanel(node);
    if (node.comfyClass === SLIDER_NODE) addSlider(node);
    if (RESULT_NODES[node.comfyClass]) addResultBox(node, RESULT_NODES[node.comfyClass]);
  },

  async afterConfigureGraph() {
    restoreView(app);
    replaceOldElements();
    showOutputs(app.nodeOutputs);
    refreshPlans();
    await restoreMessages();
  },

  /** ComfyUI brings back the outputs of a workflow when its tab is shown again. */
  onNodeOutputsUpdated: showOutputs,
});

function addPanel(node) {
  const panel = new Panel(node, { rootGraph, fetchPlan, redraw });
  panels.set(node, panel);
  const refresh = () => queueMicrotask(() => panels.has(node) && node.graph && panel.refreshPlan());
  for (const widget of node.widgets) {
    chainCallback(widget, "callback", refresh);
    if (widget.element) widget.options.getMaxHeight = () => MOST_TEXT;
  }
  const show = (output) => {
    const summary = output?.stochastic_fp8?.[0];
    if (!summary) return;
    panel.showSummary(summary, output.stochastic_fp8_files);
  };
  addView(
    node,
    "stochastic_fp8_panel",
    { host: panel.host, show, fail: (message) => panel.showError(message) },
    PANEL_SIZE,
  );
  chainCallback(node, "onConnectionsChange", refresh);
  chainCallback(node, "onAdded", refresh);
  chainCallback(node, "onRemoved", () => {
    panels.delete(node);
    panel.remove();
  });
}

function addSlider(node) {
  const amplify = node.widgets?.find(({ name }) => name === "amplify");
  const slider = new ABSlider({ imageUrl, amplify: () => amplify?.value ?? 8 });
  const show = (output) => {
    if (!output?.a_images || !output?.b_images) return;
    slider.show(output.a_images, output.b_images, output.names, output.scores);
  };
  const fail = (message) => slider.showError(message);
  addView(node, "stochastic_fp8_slider", { host: slider.host, show, fail }, SLIDER_SIZE);
  if (amplify) chainCallback(amplify, "callback", () => slider.refresh());
}

function addResultBox(node, size) {
  const box = new ResultBox();
  const show = (output) => box.show(output?.stochastic_fp8_files, output?.text);
  addView(node, "stochastic_fp8_result", { host: box.host, show, fail: (message) => box.showError(message) }, size);
}

/** Show an error on a node that has no view, until something runs again. */
function addErrorBox(node, message) {
  const box = new ResultBox();
  box.showError(message);
  const size = [...node.size];
  const widget = addElement(node, "stochastic_fp8_error", box.host, ERROR_SIZE);
  setTimeout(() => errorBoxes.has(node) && mountLate(node, box.host));
  errorBoxes.set(node, () => {
    errorBoxes.delete(node);
    box.host.remove();
    node.removeWidget(widget);
    node.setSize(size);
  });
  chainCallback(node, "onRemoved", () => errorBoxes.delete(node));
}

function removeErrorBoxes() {
  for (const remove of errorBoxes.values()) remove();
}

/** Add the element of a view to a node. It shows what the node reports. */
function addView(node, name, view, size) {
  views.set(node, view);
  addElement(node, name, view.host, size);
  chainCallback(node, "onExecuted", view.show);
  chainCallback(node, "onRemoved", () => views.delete(node));
}

function redraw() {
  app.canvas.setDirty(true, true);
}

function imageUrl({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

async function fetchPlan(request, signal) {
  const answer = await api.fetchApi("/stochastic_fp8/plan", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  const body = await answer.json();
  if (body.error) throw new Error(body.error);
  return body;
}

function refreshPlans() {
  for (const [node, panel] of panels) if (node.graph) panel.refreshPlan();
}

function stopAll(outcome) {
  running = null;
  for (const panel of panels.values()) panel.showStopped(outcome);
}

/**
 * Put the elements of nodes in place of those of earlier nodes with the same ids. Undo makes all nodes anew, and
 * Nodes 2.0 then keeps the elements that it has mounted.
 */
function replaceOldElements() {
  for (const box of document.querySelectorAll("[data-node-id]")) {
    const host = views.get(app.canvas?.graph?.getNodeById(box.dataset.nodeId))?.host;
    const shown = host && box.querySelector(`.${host.className}`);
    if (shown && shown !== host) shown.replaceWith(host);
  }
}

/**
 * Show what nodes reported before, as ComfyUI does with its own previews.
 * @param {Object<string, object>} outputs by locator id
 */
function showOutputs(outputs) {
  for (const [node, { show }] of views) {
    const output = node.graph && outputs?.[locatorId(node)];
    if (output) show(output);
  }
}

/** Show the numbers of nodes that ComfyUI does not run again: it reports those of output nodes only. */
async function showCached({ nodes, prompt_id: prompt }) {
  const root = rootGraph();
  const cached = nodes.map((id) => [id, nodeByExecutionId(root, id)]).filter(([, node]) => panels.has(node));
  if (!cached.length) return;
  const summaries = await fetchSummaries(prompt);
  for (const [id, node] of cached) {
    if (!summaries[id] || !views.has(node)) continue;
    const output = { ...app.nodeOutputs[locatorId(node)], stochastic_fp8: [summaries[id]] };
    app.nodeOutputs[locatorId(node)] = output;
    views.get(node).show(output);
  }
}

/** Show why a node failed. All other jobs have ended too. */
function showError({ node_id: id, node_type: type, exception_message: message }) {
  const node = nodeByExecutionId(rootGraph(), id);
  if (node?.comfyClass === type && type.startsWith(OUR_NODES)) {
    if (views.has(node)) views.get(node).fail(message.trim());
    else addErrorBox(node, message.trim());
  }
  stopAll("failed");
}

/**
 * Announce the end of a long job: ComfyUI goes on to the next node, or ends with null.
 * @param {string|null} id the node that begins to run
 */
function announceEnd(id) {
  const ended = running;
  const node = id && nodeByExecutionId(rootGraph(), id);
  running = node?.comfyClass?.startsWith(OUR_NODES) ? { node, since: Date.now() } : null;
  if (!ended || Date.now() - ended.since < LONG_JOB) return;
  const summary = t("runFinished", { title: ended.node.title });
  app.extensionManager.toast.add({ severity: "success", summary, life: 5000 });
}

/** A message about a job that this page has queued. */
function hear(message) {
  lastMessage = Date.now();
  showMessage(message);
}

/** Show a message of the server about a job. Messages about other workflows are ignored. */
function showMessage(message) {
  const root = rootGraph();
  if (message.workflow && root.id && message.workflow !== root.id) return;
  const panel = panels.get(nodeByExecutionId(root, message.node));
  if (!panel) return;
  if (message.summary) panel.showSummary(message.summary);
  else panel.showRunning(message);
  clearTimeout(pollTimer);
  pollTimer = setTimeout(poll, POLL);
}

/**
 * Ask for news of running jobs while no messages come. ComfyUI sends them only to the page that queued the job, which
 * may be in another tab of the browser.
 */
async function poll() {
  const followed = [...panels.values()].filter((panel) => panel.runState);
  if (!followed.length) return;
  if (Date.now() - lastMessage > POLL) {
    const messages = await restoreMessages();
    if (messages) await Promise.all(followed.map((panel) => showEnd(panel, messages)));
  }
  clearTimeout(pollTimer);
  pollTimer = setTimeout(poll, POLL);
}

/** Show how a panel's job ended, once the server no longer reports on it. */
async function showEnd(panel, messages) {
  const state = panel.runState;
  if (!state || messages.some(({ node, prompt }) => node === state.node && prompt === state.prompt)) return;
  const summary = (await fetchSummaries(state.prompt))[state.node];
  if (panel.runState !== state) return;
  if (summary) panel.showSummary(summary);
  else panel.showStopped("ended");
}

/**
 * Show the last messages of running jobs, after the page or the workflow was opened in the middle of one.
 * @returns {Promise<object[]|null>} the messages; null if the server does not answer
 */
async function restoreMessages() {
  if (!panels.size) return [];
  const answer = await askServer("/stochastic_fp8/live");
  if (!answer?.ok) return null;
  const messages = await answer.json();
  messages.forEach(showMessage);
  return messages;
}

async function fetchSummaries(prompt) {
  const answer = await askServer(`/stochastic_fp8/summaries?${new URLSearchParams({ prompt })}`);
  return answer?.ok ? await answer.json() : {};
}

/** The server's response; null while it cannot be reached. */
function askServer(route) {
  return api.fetchApi(route).catch(() => null);
}
