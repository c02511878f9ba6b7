// The title of a conversation that nobody has named, as the server makes it. Pure.

const CHARS_MAX = 80;
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}]/u;
const JOINERS = "\u200c\u200d"; // of Persian words, and of emoji: format characters that one can see
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/; // as Python has them
const NEWLINE = /\r\n|[\n-\r\x1c-\x1e\x85\u2028\u2029]/;

/** Made from what was said: its first line that has anything to show, on one line and bounded. */
export function derived(content: string): string {
  for (const line of content.split(NEWLINE)) {
    const shown = [...line].filter((char) => SPACES.test(char) || JOINERS.includes(char) || !INVISIBLE.test(char));
    const words = shown.join("").split(SPACES).filter(Boolean).join(" ");
    const title = [...words.replace(/^[\u200c\u200d]+|[\u200c\u200d]+$/g, "")];
    if (title.length > CHARS_MAX) {
      return `${title.slice(0, CHARS_MAX - 1).join("").replace(/[ \u200c\u200d]+$/, "")}…`;
    }
    if (title.length) return title.join("");
  }
  return "";
}
