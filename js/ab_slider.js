/** Two batches of pictures with a divider between them, or their difference. */

import { element, keepFromGraph, shadowHost } from "./dom.js";
import { SLIDER } from "./styles.js";

const STEP = 2;
const LARGE_STEP = 10;

/** Percent of the width below which a side is too narrow for its label. */
const LABEL_ROOM = 10;

export class ABSlider {
  /**
   * @param {{imageUrl: (image: object) => string, amplify: () => number}} page
   */
  constructor(page) {
    this.page = page;
    this.names = ["A", "B"];
    this.pairs = [];
    this.pair = 0;
    this.host = this.#build();
    this.#move(50);
    this.#view("slider");
    this.#name(this.names);
  }

  /**
   * @param {object[]} a pictures as ComfyUI names them: {filename, subfolder, type}
   * @param {object[]} b
   * @param {string[]} [names] what the pictures of each side are called
   */
  show(a, b, names) {
    this.#name(names ?? this.names);
    const length = Math.max(a.length, b.length);
    this.pairs = Array.from({ length }, (_, i) => [a[Math.min(i, a.length - 1)], b[Math.min(i, b.length - 1)]]);
    this.#showPair(Math.min(this.pair, length - 1));
  }

  /** Follow the node's amplification. */
  refresh() {
    this.pictures.style.setProperty("--amplify", this.page.amplify());
  }

  #build() {
    this.empty = element("p", { class: "soft", textContent: "Run the workflow to compare two images here." });
    this.imageA = element("img", { class: "a", alt: "", load: () => this.#fit() });
    this.imageB = element("img", { alt: "" });
    this.labelA = element("span", { class: "label left" });
    this.labelB = element("span", { class: "label right" });
    this.pictures = element(
      "div",
      { class: "pictures", tabIndex: 0, hidden: true },
      this.imageB,
      this.imageA,
      element("div", { class: "line" }),
      this.labelA,
      this.labelB,
    );
    this.#listen();
    const stage = element("div", { class: "stage" }, this.empty, this.pictures);
    const frame = element("div", { class: "frame" }, this.#buildBar(), stage);
    keepFromGraph(frame);
    return shadowHost(SLIDER, frame);
  }

  #buildBar() {
    const view = (name, textContent) =>
      element("button", { type: "button", textContent, "aria-pressed": "false", click: () => this.#view(name) });
    const step = (label, textContent, by) =>
      element("button", {
        type: "button",
        textContent,
        "aria-label": label,
        click: () => this.#showPair(this.pair + by),
      });
    this.views = { slider: view("slider", "Slider"), difference: view("difference", "Difference") };
    this.previous = step("Previous pair", "‹", -1);
    this.next = step("Next pair", "›", 1);
    this.count = element("span", { "aria-live": "polite" });
    this.stepper = element("span", { class: "pairs", hidden: true }, this.previous, this.count, this.next);
    return element("div", { class: "bar" }, this.views.slider, this.views.difference, this.stepper);
  }

  #listen() {
    const { pictures } = this;
    pictures.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      pictures.setPointerCapture(event.pointerId);
      this.#moveTo(event);
    });
    pictures.addEventListener("pointermove", (event) => {
      if (pictures.hasPointerCapture(event.pointerId)) this.#moveTo(event);
    });
    pictures.addEventListener("keydown", (event) => this.#onKey(event));
  }

  #onKey(event) {
    const target = this.#keyTarget(event);
    if (target === null || this.shown !== "slider") return;
    event.preventDefault();
    this.#move(target);
  }

  #keyTarget({ key, shiftKey }) {
    const step = shiftKey ? LARGE_STEP : STEP;
    const targets = {
      ArrowLeft: this.at - step,
      ArrowDown: this.at - step,
      ArrowRight: this.at + step,
      ArrowUp: this.at + step,
      PageDown: this.at - LARGE_STEP,
      PageUp: this.at + LARGE_STEP,
      Home: 0,
      End: 100,
    };
    return targets[key] ?? null;
  }

  #moveTo({ clientX }) {
    const box = this.pictures.getBoundingClientRect();
    if (this.shown === "slider" && box.width) this.#move((100 * (clientX - box.left)) / box.width);
  }

  /** Put the divider at so many percent from the left. */
  #move(percent) {
    this.at = Math.max(0, Math.min(100, percent));
    this.pictures.style.setProperty("--at", `${this.at}%`);
    this.labelA.hidden = this.at < LABEL_ROOM;
    this.labelB.hidden = this.at > 100 - LABEL_ROOM;
    this.#describe();
  }

  #view(name) {
    this.shown = name;
    this.pictures.classList.toggle("difference", name === "difference");
    for (const [key, button] of Object.entries(this.views)) button.setAttribute("aria-pressed", String(key === name));
    this.refresh();
    this.#describe();
  }

  #name(names) {
    this.names = names;
    [this.labelA.textContent, this.labelB.textContent] = names;
    this.#describe();
  }

  #describe() {
    const { pictures } = this;
    const [a, b] = this.names.map((name) => `image ${name}`);
    const sliding = this.shown !== "difference";
    pictures.setAttribute("role", sliding ? "slider" : "img");
    pictures.setAttribute("aria-label", sliding ? `Divider between ${a} and ${b}` : `Difference between ${a} and ${b}`);
    const at = Math.round(this.at);
    const values = {
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": at,
      "aria-valuetext": `${at} % ${a}`,
    };
    for (const [name, value] of Object.entries(values)) {
      if (sliding) pictures.setAttribute(name, value);
      else pictures.removeAttribute(name);
    }
  }

  #showPair(index) {
    const last = this.pairs.length - 1;
    this.pair = Math.max(0, Math.min(last, index));
    const [a, b] = this.pairs[this.pair] ?? [];
    this.empty.hidden = Boolean(a && b);
    this.pictures.hidden = !this.empty.hidden;
    if (!a || !b) return;
    this.imageA.src = this.page.imageUrl(a);
    this.imageB.src = this.page.imageUrl(b);
    this.stepper.hidden = last === 0;
    this.count.textContent = `Pair ${this.pair + 1} of ${last + 1}`;
    this.previous.disabled = this.pair === 0;
    this.next.disabled = this.pair === last;
  }

  #fit() {
    const { naturalWidth, naturalHeight } = this.imageA;
    this.pictures.style.setProperty("--ratio", naturalWidth / naturalHeight);
  }
}
