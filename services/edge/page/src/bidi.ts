// Characters that change the order in which text around them is shown: what is read is not what is run ("Trojan
// Source"). Pure.

const BIDI_CONTROLS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** `text` with them shown by their numbers, as in `[U+202E]`. */
export function visible(text: string): string {
  return text.replace(BIDI_CONTROLS, (found) => `[U+${numbered(found).toUpperCase()}]`);
}

/** `json` with them escaped, as in `\u202e`: in strings, and nothing else of JSON can hold them, it says the same. */
export function escaped(json: string): string {
  return json.replace(BIDI_CONTROLS, (found) => `\\u${numbered(found)}`);
}

const numbered = (found: string) => found.charCodeAt(0).toString(16).padStart(4, "0");
