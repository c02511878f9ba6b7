// What this device keeps. Storage can be forbidden or full: then nothing is kept, and that is all.

export function recall(storage: "local" | "session", key: string): string | null {
  try {
    return of(storage).getItem(`tapeline.${key}`);
  } catch {
    return null;
  }
}

/** Keeps `value`; an empty one is forgotten. */
export function keep(storage: "local" | "session", key: string, value: string): void {
  try {
    if (value) of(storage).setItem(`tapeline.${key}`, value);
    else of(storage).removeItem(`tapeline.${key}`);
  } catch {
    // Not kept.
  }
}

const of = (storage: "local" | "session") => (storage === "local" ? localStorage : sessionStorage);
