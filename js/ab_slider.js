/** The slider of Compare Images (A/B): two images with a divider between them, or their difference. */

import { element, isolateEvents, shadowHost } from "./dom.js";
import { formatDecibels } from "./numbers.js";
import { SLIDER } from "./styles.js";
import { t } from "./words.js";

/** Percent of the width that an arrow key moves the divider. */
const STEP = 2;

/** The same with Shift, and for Page Up and Page Down. */
const LARGE_STEP = 10;

/** Percent of the width: a narrower side has no label. */
const LABEL_MIN_WIDTH = 10;

export class ABSlider {
  /**
   * @param {{imageUrl: (image: object) => string, amplify: () => number}} page amplify: factor of the difference view
   */
  constructor(page) {
    this.page = page;
    this.names = ["A", "B"];
    this.pairs = [];
    this.scores = [];
    this.pair = 0;
    this.host = this.#build();
    this.#setPosition(50);
    this.#setView("slider");
    this.#setNames(this.names);
  }

  /**
   * Show batches in pairs. The last image of the shorter batch is repeated.
   * @param {object[]} a images as ComfyUI reports them: {filename, subfolder, type}
   * @param {object[]} b
   * @param {string[]} [names] labels of A and B
   * @param {[number|null, number][]} [scores] PSNR in dB (null for infinite) and SSIM of each pair
   */
  show(a, b, names, scores) {
    this.#setNames(names ?? this.names);
    this.scores = scores ?? [];
    const length = Math.max(a.length, b.length);
    this.pairs = Array.from({ length }, (_, i) => [a[Math.min(i, a.length - 1)], b[Math.min(i, b.length - 1)]]);
    this.#showPair(Math.min(this.pair, length - 1));
  }

  /**
   * Show why the node failed, in place of the images.
   * @param {string} message
   */
  showError(message) {
    this.empty.className = "error";
    this.empty.setAttribute("role", "alert");
    this.empty.textContent = message;
    this.empty.hidden = false;
    this.pictures.hidden = true;
  }

  /** Read the amplification from the node again. */
  refresh() {
    this.pictures.style.setProperty("--amplify", this.page.amplify());
  }

  #build() {
    this.empty = element("p", { class: "muted", textContent: t("sliderIdle") });
    this.imageA = element("img", { class: "a", alt: "", load: () => this.#setAspectRatio() });
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
    this.#addListeners();
    const stage = element("div", { class: "stage" }, this.empty, this.pictures);
    const frame = element("div", { class: "frame" }, this.#buildBar(), stage);
    isolateEvents(frame);
    return shadowHost(SLIDER, frame);
  }

  #buildBar() {
    const viewButton = (name, textContent) =>
      element("button", { type: "button", textContent, "aria-pressed": "false", click: () => this.#setView(name) });
    const pairButton = (label, textContent, by) =>
      element("button", {
        type: "button",
        textContent,
        "aria-label": label,
        click: () => this.#showPair(this.pair + by),
      });
    this.viewButtons = {
      slider: viewButton("slider", t("sliderView")),
      difference: viewButton("difference", t("sliderDifferenceView")),
    };
    this.previous = pairButton(t("sliderPrevious"), "‹", -1);
    this.next = pairButton(t("sliderNext"), "›", 1);
    this.count = element("span", { "aria-live": "polite" });
    this.pairBar = element("span", { class: "pairs", hidden: true }, this.previous, this.count, this.next);
    this.score = element("span", { class: "score" });
    const { slider, difference } = this.viewButtons;
    return element("div", { class: "bar" }, slider, difference, this.score, this.pairBar);
  }

  #addListeners() {
    const { pictures } = this;
    pictures.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      pictures.setPointerCapture(event.pointerId);
      this.#followPointer(event);
    });
    pictures.addEventListener("pointermove", (event) => {
      if (pictures.hasPointerCapture(event.pointerId)) this.#followPointer(event);
    });
    pictures.addEventListener("keydown", (event) => this.#onKey(event));
  }

  #onKey(event) {
    const position = this.#positionForKey(event);
    if (position === null || this.view !== "slider") return;
    event.preventDefault();
    this.#setPosition(position);
  }

  #positionForKey({ key, shiftKey }) {
    const step = shiftKey ? LARGE_STEP : STEP;
    const positions = {
      ArrowLeft: this.position - step,
      ArrowDown: this.position - step,
      ArrowRight: this.position + step,
      ArrowUp: this.position + step,
      PageDown: this.position - LARGE_STEP,
      PageUp: this.position + LARGE_STEP,
      Home: 0,
      End: 100,
    };
    return positions[key] ?? null;
  }

  #followPointer({ clientX }) {
    const box = this.pictures.getBoundingClientRect();
    if (this.view === "slider" && box.width) this.#setPosition((100 * (clientX - box.left)) / box.width);
  }

  /** Move the divider. 0 is the left edge, 100 the right edge. */
  #setPosition(percent) {
    this.position = Math.max(0, Math.min(100, percent));
    this.pictures.style.setProperty("--at", `${this.position}%`);
    this.labelA.hidden = this.position < LABEL_MIN_WIDTH;
    this.labelB.hidden = this.position > 100 - LABEL_MIN_WIDTH;
    this.#describe();
  }

  #setView(name) {
    this.view = name;
    this.pictures.classList.toggle("difference", name === "difference");
    for (const [key, button] of Object.entries(this.viewButtons)) {
      button.setAttribute("aria-pressed", String(key === name));
    }
    this.refresh();
    this.#describe();
  }

  #setNames(names) {
    this.names = names;
    [this.labelA.textContent, this.labelB.textContent] = names;
    this.#describe();
  }

  #describe() {
    const { pictures } = this;
    const [a, b] = this.names.map((name) => t("sliderImage", { name }));
    const hasDivider = this.view !== "difference";
    pictures.setAttribute("role", hasDivider ? "slider" : "img");
    pictures.setAttribute("aria-label", hasDivider ? t("sliderDivider", { a, b }) : t("sliderDifference", { a, b }));
    const at = Math.round(this.position);
    const values = {
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": at,
      "aria-valuetext": t("sliderPosition", { percent: at, a }),
    };
    for (const [name, value] of Object.entries(values)) {
      if (hasDivider) pictures.setAttribute(name, value);
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
    this.pairBar.hidden = last === 0;
    this.count.textContent = t("sliderPair", { number: this.pair + 1, total: last + 1 });
    this.#showScores(this.scores[this.pair]);
    this.previous.disabled = this.pair === 0;
    this.next.disabled = this.pair === last;
  }

  #showScores(scores) {
    this.score.hidden = !scores;
    if (!scores) return;
    const [psnr, ssim] = scores;
    this.score.textContent = t("sliderScores", { psnr: formatDecibels(psnr), ssim: ssim.toFixed(4) });
  }

  #setAspectRatio() {
    const { naturalWidth, naturalHeight } = this.imageA;
    this.pictures.style.setProperty("--ratio", naturalWidth / naturalHeight);
  }
}
