/** Style sheets for shadow roots. Colours come from ComfyUI's theme. */

const BASE = `
:host {
  --line: color-mix(in srgb, var(--fg-color, #fff) 18%, transparent);
  --muted: color-mix(in srgb, var(--fg-color, #fff) 78%, var(--comfy-menu-bg, #353535));
  --accent: color-mix(in srgb, #2f80ed 60%, var(--fg-color, #fff));
  --highlight: color-mix(in srgb, #e09000 60%, var(--fg-color, #fff));
  --error: color-mix(in srgb, #e02010 55%, var(--fg-color, #fff));
  display: block; position: relative; box-sizing: border-box; width: 100%; height: 100%;
  color: var(--fg-color, #fff); font: 12px/1.4 Inter, system-ui, sans-serif; text-align: left;
}
* { box-sizing: border-box; margin: 0; padding: 0; }
.frame {
  position: absolute; inset: 0; display: flex; flex-direction: column; overflow: hidden;
  background: var(--comfy-menu-bg, #353535); border: 1px solid var(--line); border-radius: 6px;
}
button { font: inherit; color: inherit; background: none; border: 0; cursor: pointer; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; border-radius: 3px; }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
[hidden] { display: none !important; }
.muted { color: var(--muted); }
.error { color: var(--error); overflow-wrap: anywhere; }
.hint { color: var(--muted); border-left: 2px solid var(--highlight); padding-left: 8px; overflow-wrap: anywhere; }
.name { font: 12px/1.4 ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
`;

export const PANEL = `${BASE}
.elsewhere summary { color: var(--muted); cursor: pointer; }
[role=tablist] { display: flex; flex: none; border-bottom: 1px solid var(--line); }
[role=tab] { padding: 4px 12px; color: var(--muted); border-bottom: 2px solid transparent; }
[role=tab][aria-selected=true] { color: inherit; border-color: var(--accent); }
[role=tabpanel] { flex: 1; min-height: 0; overflow: auto; scrollbar-width: thin; padding: 8px 10px; }
[role=tabpanel], .views { display: grid; grid-template-columns: minmax(0, 1fr); gap: 8px; align-content: start; grid-auto-rows: max-content; }
.headline { font-size: 14px; font-weight: 600; }
.stale { opacity: .55; }
.views.stale { opacity: .75; }
.ellipsis { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 2px 8px 2px 0; vertical-align: top; text-align: left; font-weight: normal; }
thead th { color: var(--muted); }
tbody tr:not(.names) > * { border-top: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td button { text-align: left; padding-left: 1.2em; position: relative; }
td button::before { content: "▸"; position: absolute; left: 0; color: var(--muted); }
td button[aria-expanded=true]::before { content: "▾"; }
.names ul { list-style: none; padding: 0 0 4px 1.1em; }
.hits { display: flex; flex-wrap: wrap; gap: 4px; list-style: none; }
.hits li { border: 1px solid var(--line); border-radius: 9px; padding: 0 7px; }
.hits .yours { border-color: var(--accent); }
.notes { padding-left: 1.2em; color: var(--muted); }
.track { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; }
.fill { height: 100%; width: 0; background: var(--accent); }
.facts { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 4px 12px; }
.facts dt { color: var(--muted); }
.facts dd { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars { position: relative; display: flex; align-items: flex-end; gap: 1px; height: 52px; margin-top: 4px; border-bottom: 1px solid var(--line); }
.bars > div { flex: 1; height: 100%; display: flex; align-items: flex-end; }
.bars > div::before { content: ""; width: 100%; height: var(--height); background: var(--accent); }
.bars > .zero { position: absolute; left: calc(50% - 1px); width: 3px; }
.bars > .zero::before { background: currentColor; }
.bars > .beyond::before { background: var(--error); }
.bars:is(:hover, :focus-visible) > .current::before { background: var(--highlight); }
.axis { display: flex; justify-content: space-between; color: var(--muted); }
.advice { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 10px; }
.advice button { border: 1px solid var(--accent); border-radius: 4px; padding: 1px 8px; }
.advice button:hover { background: var(--line); }
.worst { list-style: none; display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 1px 10px; }
.worst li { display: contents; }
`;

export const RESULT = `${BASE}
.content { flex: 1; min-height: 0; overflow: hidden auto; scrollbar-width: thin; padding: 6px 10px; display: grid; gap: 4px; align-content: start; }
.text { white-space: pre-line; overflow-wrap: anywhere; }
`;

export const SLIDER = `${BASE}
.bar { flex: none; display: flex; flex-wrap: wrap; align-items: center; gap: 4px; padding: 4px 6px; border-bottom: 1px solid var(--line); }
.bar button { padding: 2px 8px; border-radius: 4px; color: var(--muted); }
.bar button[aria-pressed=true] { color: inherit; background: var(--line); }
.bar button:disabled { opacity: .4; cursor: default; }
.score { margin-left: auto; color: var(--muted); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; font-variant-numeric: tabular-nums; }
.pairs { margin-left: auto; display: flex; align-items: center; gap: 2px; white-space: nowrap; }
.stage { flex: 1; min-height: 0; display: grid; place-items: center; container-type: size; padding: 0; }
.stage > p { padding: 10px; text-align: center; }
.pictures {
  position: relative; overflow: hidden; touch-action: none; user-select: none; cursor: ew-resize;
  aspect-ratio: var(--ratio, 1); width: min(100cqw, 100cqh * var(--ratio, 1));
}
.pictures.difference { cursor: default; isolation: isolate; filter: brightness(var(--amplify, 8)); }
img { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.a { clip-path: inset(0 calc(100% - var(--at)) 0 0); }
.difference .a { clip-path: none; mix-blend-mode: difference; }
.line {
  position: absolute; inset: 0 auto 0 var(--at); width: 2px; margin-left: -1px; background: #fff;
  box-shadow: 0 0 0 1px rgb(0 0 0 / .5); pointer-events: none;
}
.line::after {
  content: ""; position: absolute; top: 50%; left: 50%; width: 18px; height: 18px; translate: -50% -50%;
  border-radius: 50%; background: #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / .5);
}
.label {
  position: absolute; top: 6px; padding: 0 6px; border-radius: 3px; color: #fff; background: rgb(0 0 0 / .65);
  pointer-events: none; max-width: calc(min(45%, var(--room)) - 24px);
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
}
.label.left { left: 6px; --room: var(--at); }
.label.right { right: 6px; --room: 100% - var(--at); }
.difference .line, .difference .label { display: none; }
`;
