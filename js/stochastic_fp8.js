/** The extension: adds panels and sliders to the nodes, and passes on the server's messages. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { ABSlider } from "./ab_slider.js";
import { chainCallback } from "./dom.js";
import { Panel } from "./panel.js";
import { PLANNED_NODES } from "./plan_request.js";
import { nodeByExecutionId } from "./trace.js";

const SLIDER_NODE = "StochasticFP8ImageCompare";
const PANEL_SIZE = { width: 380, height: 260 };
/** Pixels that the canvas leaves free above and below an element, within the widget's height. */
const MARGIN = 10;
const SLIDER_SIZE = { width: 340, height: 300 };

/** @type {Map<object, Panel>} node -> its panel; nodes that are removed leave it */
const panels = new Map();

const rootGraph = () => app.rootGraph ?? app.graph;

app.registerExtension({
  name: "stochastic_fp8",

  setup() {
    api.addEventListener("stochastic_fp8.live", ({ detail }) => showMessage(detail));
    api.addEventListener("execution_interrupted", () => stopAll("Cancelled"));
    api.addEventListener("execution_error", () => stopAll("Failed"));
    api.addEventListener("graphChanged", refreshPlans);
  },

  nodeCreated(node) {
    if (PLANNED_NODES.includes(node.comfyClass)) addPanel(node);
    if (node.comfyClass === SLIDER_NODE) addSlider(node);
  },

  async afterConfigureGraph() {
    refreshPlans();
    await restoreMessages();
  },
});

function addPanel(node) {
  const panel = new Panel(node, { rootGraph, fetchPlan });
  panels.set(node, panel);
  const refresh = () => queueMicrotask(() => panels.has(node) && node.graph && panel.refreshPlan());
  for (const widget of node.widgets) chainCallback(widget, "callback", refresh);
  addElement(node, "stochastic_fp8_panel", panel.host, PANEL_SIZE);
  chainCallback(node, "onConnectionsChange", refresh);
  chainCallback(node, "onAdded", refresh);
  chainCallback(node, "onExecuted", (output) => {
    const summary = output?.stochastic_fp8?.[0];
    if (summary) panel.showSummary(summary);
  });
  chainCallback(node, "onRemoved", () => {
    panels.delete(node);
    panel.remove();
  });
}

function addSlider(node) {
  const amplify = node.widgets?.find(({ name }) => name === "amplify");
  const slider = new ABSlider({ imageUrl, amplify: () => amplify?.value ?? 8 });
  addElement(node, "stochastic_fp8_slider", slider.host, SLIDER_SIZE);
  if (amplify) chainCallback(amplify, "callback", () => slider.refresh());
  chainCallback(node, "onExecuted", (output) => {
    if (output?.a_images && output?.b_images) slider.show(output.a_images, output.b_images, output.names);
  });
}

/** Add an element as the last widget of a node. It is not saved in the workflow or the prompt. */
function addElement(node, name, host, { width, height }) {
  host.classList.add(name);
  host.style.minHeight = `${height}px`;
  const widget = node.addDOMWidget(name, name, host, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height + 2 * MARGIN,
  });
  widget.serialize = false;
  const [minWidth, minHeight] = node.computeSize();
  node.setSize([Math.max(width, minWidth), Math.max(minHeight, node.size[1])]);
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
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function refreshPlans() {
  for (const [node, panel] of panels) if (node.graph) panel.refreshPlan();
}

function stopAll(outcome) {
  for (const panel of panels.values()) panel.showStopped(outcome);
}

/** Show a message of the server about a job. Messages about other workflows are ignored. */
function showMessage(message) {
  const root = rootGraph();
  if (message.workflow && root.id && message.workflow !== root.id) return;
  const panel = panels.get(nodeByExecutionId(root, message.node));
  if (!panel) return;
  if (message.summary) panel.showSummary(message.summary);
  else panel.showRunning(message);
}

/** Show the last messages of running jobs, after the page or the workflow was opened in the middle of one. */
async function restoreMessages() {
  if (!panels.size) return;
  const answer = await api.fetchApi("/stochastic_fp8/live");
  if (answer.ok) (await answer.json()).forEach(showMessage);
}
