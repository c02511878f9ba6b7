// Where a link in an answer may lead, and what its reader has to know before they follow it. Pure.

const SCHEMES = new Set(["https:", "http:", "mailto:"]);

// They change the order in which text around them is shown: what is read is not what is run ("Trojan Source").
const BIDI_CONTROLS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** A link that may be followed: its address, and the host to show beside its text where that names another one. */
export interface Target {
  readonly href: string;
  readonly host: string | null;
}

/** Where a link leads whose text is `text`; null for an address that is no absolute http, https or mailto address. */
export function target(address: string, text: string): Target | null {
  const url = parsed(address);
  if (!url || !SCHEMES.has(url.protocol)) return null;
  const host = url.protocol === "mailto:" ? url.pathname.slice(url.pathname.lastIndexOf("@") + 1) : url.host;
  const isHonest = !url.username && !url.password;
  const named = hostNamed(text);
  return { href: url.href, host: named === null || (named === host && isHonest) ? null : host };
}

/** The host that a text claims to lead to, as a browser writes it; null where it looks like no address. */
function hostNamed(text: string): string | null {
  const plain = visible(text.normalize("NFKC").replace(/[\u200b-\u200d\u2060\ufeff\u00ad]/g, "")).trim();
  const scheme = /[a-z][a-z0-9+.-]*:\/\/[^\s/?#]*/i.exec(plain)?.[0];
  if (scheme) return parsed(scheme)?.host ?? scheme;
  const mail = /^[^\s@/]+@([^\s@/]+\.[^\s@/]+)$/.exec(plain)?.[1];
  const bare = mail ?? /^(?:www\.\S+|[^\s/@:]+\.\p{L}{2,})(?=[/:?#]|$)/u.exec(plain)?.[0];
  return bare ? (parsed(`https://${bare}`)?.host ?? bare) : null;
}

function parsed(address: string): URL | null {
  try {
    return new URL(address);
  } catch {
    return null; // no absolute address
  }
}

/** `text` with the characters that reorder it shown by their numbers, as in `[U+202E]`. */
export function visible(text: string): string {
  const number = (found: string): string => found.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
  return text.replace(BIDI_CONTROLS, (found) => `[U+${number(found)}]`);
}
