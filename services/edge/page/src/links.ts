// Where a link in an answer may lead, and what its reader has to know before they follow it. Pure.

import { visible } from "./bidi.ts";

const SCHEMES = new Set(["https:", "http:", "mailto:"]);

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
