import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { afterEach, test } from "node:test";
import { WORDS, setLanguage, t } from "../../js/words.js";

const JS = new URL("../../js/", import.meta.url);
const SOURCES = readdirSync(JS)
  .filter((name) => name.endsWith(".js") && !["words.js", "translations.js"].includes(name))
  .map((name) => readFileSync(new URL(name, JS), "utf8"));

const texts = (entry) => [entry].flat();
const names = (entry) => [...new Set(texts(entry).flatMap((text) => text.match(/\{\w+\}/g) ?? []))].sort();

afterEach(() => setLanguage("en"));

for (const [language, words] of Object.entries(WORDS)) {
  test(`${language} has the keys of English, with the same values`, () => {
    assert.deepEqual(Object.keys(words).sort(), Object.keys(WORDS.en).sort());
    for (const [key, entry] of Object.entries(words)) assert.deepEqual(names(entry), names(WORDS.en[key]), key);
  });
}

test("every text is used, and every text used is in the table", () => {
  const used = new Set(SOURCES.flatMap((source) => [...source.matchAll(/"([a-z]+[A-Za-z]*)"/g)].map(([, key]) => key)));
  assert.deepEqual(
    Object.keys(WORDS.en).filter((key) => !used.has(key)),
    [],
  );
  const asked = SOURCES.flatMap((source) => [...source.matchAll(/\bt\(\s*"(\w+)"/g)].map(([, key]) => key));
  assert.deepEqual(
    asked.filter((key) => !(key in WORDS.en)),
    [],
  );
});

test("values and numbers", () => {
  assert.equal(t("layers", { count: 1 }), "1 layer");
  assert.equal(t("layers", { count: 12_000 }), "12,000 layers");
  assert.equal(t("boxFile", { size: "$& {folder}", folder: "output" }), "$& {folder} in output");
});

test("the language of the page, the language without its region, and English", () => {
  WORDS.xx = { plan: "XX" };
  try {
    for (const locale of ["xx", "xx-YY"]) {
      setLanguage(locale);
      assert.deepEqual([t("plan"), t("run")], ["XX", "Run"]);
    }
    for (const locale of ["de", undefined]) {
      setLanguage(locale);
      assert.equal(t("plan"), "Plan");
    }
  } finally {
    delete WORDS.xx;
  }
});
