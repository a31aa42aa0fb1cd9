import { TRANSLATIONS } from "./translations.js";

/**
 * The texts of the panels, the slider and the result boxes. English is the source; `make locales` makes the others from
 * locales/*.po, with the same keys.
 * A text has {names} of values. Where the number {count} matters, there are two texts: for one, and for all others.
 */

/** Language of the page (Comfy.Locale, or its part before a hyphen) -> key -> text or [text for one, text for others]. */
export const WORDS = {
  en: {
    // both tabs of the panel
    plan: "Plan",
    run: "Run",
    layers: ["{count} layer", "{count} layers"],
    tensors: ["{count} tensor", "{count} tensors"],

    // the plan
    planResult: "Result and reason",
    planTensors: "Tensors",
    planSize: "Size",
    planQuantized: "Quantized",
    planKept: "Kept: {reason}",
    planPattern: "{pattern} (your pattern)",
    planPreset: "{pattern} (preset {preset})",
    planUnknownFamily: "unknown family",
    planMoreNames: ["and {count} more name", "and {count} more names"],
    planElsewhere: "In other ComfyUI versions",
    planLinked: "The plan leaves out linked inputs: {names}",
    planPatterns: "Patterns and how many tensors they match",
    planSpoken: "Plan for {source}: {quantized} quantized, {kept} kept, {before} to {after}",

    // what is missing for a plan or a run
    hintConnect: "Connect a loader node to {input} to see the plan.",
    hintConnectAny: "{title} names no model file. Connect a loader node to see the plan.",
    hintMuted: "{title} is muted. Connect a loader node to {input} to see the plan.",
    hintChooseFile: "Choose a file in {title} to see the plan.",
    hintChooseFileHere: "Choose a file in this node to see the plan.",
    hintNoInput: "This node has no input named {input}.",
    hintMeasured:
      "The plan of layers measured needs a calibration file. Connect Load Calibration to see it, or press Run.",
    problemCalibrated:
      "Rounding calibrated needs a calibration: connect a calibration node or Load Calibration to the input calibration.",

    // a run
    runIdle: "Numbers appear here when this node runs.",
    runQuantizing: "Quantizing",
    runStarting: "Quantizing …",
    runLayer: "Layer {number} of {total}",
    runFinishing: "Finishing …",
    runDone: "Done",
    runSpeed: "Speed",
    runTimeLeft: "Time left",
    runQualitySoFar: "SQNR so far",
    runSpokenProgress: "{layer}, {percent} percent",
    runCancelled: "Cancelled",
    runFailed: "Failed",
    runEnded: "Ended",
    runCancelledAfter: "Cancelled after {done} of {total} layers",
    runFailedAfter: "Failed after {done} of {total} layers",
    runEndedAfter: "Ended after {done} of {total} layers",
    runSpokenFailure: "Failed: {message}",
    runFinished: "{title}: done",

    // its result
    resultNothing: "Nothing was quantized.",
    resultSpoken: "Quantized: {sizes}, SQNR {sqnr}",
    resultCounts: "{layers} to {format}, {rounding}; {tensors} kept",
    resultSqnr: "SQNR",
    resultSqnrOfWeights: "SQNR of weights",
    resultBias: "Bias",
    resultSaturated: "Saturated",
    resultFlushed: "Flushed to 0",
    resultOutputError: "Predicted output error (median)",
    resultWithNearest: "With nearest",
    resultCalibrated:
      "Calibrated rounding lowers the error of the layer outputs. The SQNR of the weights can be lower as a result.",
    resultLowestSqnr: "Lowest SQNR",
    resultLargestOutputError: "Largest predicted output error",
    resultNearestCloser: "Nearest would be about {decibels} closer to the original weights.",
    resultUseNearest: "Use nearest",
    resultNearestSet: "Rounding is set to nearest. Run again.",
    resultSteps: "Error in steps of the FP8 grid",
    resultStepsBelow: "below {edge}: {share}",
    resultStepsAbove: "above {edge}: {share}",
    resultStepsBetween: "{low} to {high}: {share}",
    resultStepsZero: "at 0: {share}",

    // the boxes of nodes that write or check files
    box: "Result",
    boxIdle: "The result appears here when this node runs.",
    boxFile: "{size} in {folder}",

    // the slider
    sliderIdle: "Run the workflow to compare the two images here.",
    sliderView: "Slider",
    sliderDifferenceView: "Difference",
    sliderPrevious: "Previous pair",
    sliderNext: "Next pair",
    sliderPair: "Pair {number} of {total}",
    sliderImage: "image {name}",
    sliderDivider: "Divider between {a} and {b}",
    sliderDifference: "Difference between {a} and {b}",
    sliderPosition: "{percent} % {a}",
    sliderScores: "PSNR {psnr}, SSIM {ssim}",
  },
  ...TRANSLATIONS,
};

let words = WORDS.en;

/**
 * Choose the language of all later texts.
 * @param {string|undefined} locale such as "zh" or "zh-TW"; English if there is no such language
 */
export function setLanguage(locale) {
  const name = locale ?? "en";
  words = WORDS[name] ?? WORDS[name.split("-")[0]] ?? WORDS.en;
}

/**
 * A text in the language of the page; in English where that language lacks it.
 * @param {keyof typeof WORDS.en} key
 * @param {Object<string, string|number>} [values] numbers get separators between thousands
 * @returns {string}
 */
export function t(key, values = {}) {
  const known = words[key] ?? WORDS.en[key];
  const text = Array.isArray(known) ? known[values.count === 1 ? 0 : 1] : known;
  return text.replace(/\{(\w+)\}/g, (_, name) => written(values[name]));
}

function written(value) {
  return typeof value === "number" ? value.toLocaleString("en") : value;
}
