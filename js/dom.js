/** Small helpers for elements, events and callbacks. */

let lastId = 0;

/**
 * Create an element. A function becomes an event listener; `class`, `role`, `for` and names with a dash become
 * attributes; all other entries become properties.
 * @param {string} tag
 * @param {Object<string, any>} properties
 * @param {...(Node|string|null|false)} children null and false are skipped
 * @returns {HTMLElement}
 */
export function element(tag, properties = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") created.addEventListener(name, value);
    else if (name.includes("-") || ["class", "role", "for"].includes(name)) created.setAttribute(name, value);
    else created[name] = value;
  }
  created.append(...children.filter((child) => child !== null && child !== false));
  return created;
}

/**
 * An element id that is unique on the page.
 * @param {string} prefix
 * @returns {string}
 */
export function uniqueId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/**
 * A host element with a shadow root, which isolates styles in both directions.
 * @param {string} css
 * @param {...Node} children
 * @returns {HTMLElement}
 */
export function shadowHost(css, ...children) {
  const host = element("div");
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(css);
  const root = host.attachShadow({ mode: "open" });
  root.adoptedStyleSheets = [sheet];
  root.append(...children);
  return host;
}

/**
 * Stop events in an element from moving, scrolling or editing the graph below it.
 * @param {HTMLElement} target
 */
export function isolateEvents(target) {
  const stop = (event) => event.stopPropagation();
  for (const name of ["pointerdown", "mousedown", "dblclick", "contextmenu", "wheel"]) {
    target.addEventListener(name, (event) => isForElement(event) && stop(event), { passive: true });
  }
  target.addEventListener("keydown", (event) => !event.ctrlKey && !event.metaKey && stop(event));
  // Nodes 2.0 zooms with every turn of the wheel that is not over an element with this attribute.
  target.addEventListener("pointerover", (event) => {
    target.getRootNode().host.dataset.captureWheel = String(canScroll(event));
  });
}

/** The middle button pans the graph; a wheel turn that scrolls nothing zooms it. */
function isForElement(event) {
  return event.type === "wheel" ? canScroll(event) : event.button !== 1;
}

function canScroll(event) {
  if (event.ctrlKey) return false;
  const path = event.composedPath();
  return path
    .slice(
      0,
      path.findIndex((part) => part.shadowRoot),
    )
    .some(isScrollable);
}

function isScrollable(part) {
  return part.scrollHeight > part.clientHeight + 1 && getComputedStyle(part).overflowY === "auto";
}

/**
 * The index that a key selects in a row of items.
 * @param {string} key
 * @param {number} current
 * @param {number} last
 * @returns {number|null} may be one below 0 or above `last`; null for other keys
 */
export function indexForKey(key, current, last) {
  switch (key) {
    case "ArrowLeft":
    case "ArrowDown":
      return current - 1;
    case "ArrowRight":
    case "ArrowUp":
      return current + 1;
    case "Home":
      return 0;
    case "End":
      return last;
    default:
      return null;
  }
}

/**
 * Call `added` after an object's own callback, with the same arguments.
 * @param {object} target a node or a widget
 * @param {string} name of the callback, such as onRemoved
 * @param {Function} added
 */
export function chainCallback(target, name, added) {
  const original = target[name];
  target[name] = function (...args) {
    const result = original?.apply(this, args);
    added.apply(this, args);
    return result;
  };
}
