// Numbers in words.

export const number = (value: number) => value.toLocaleString("en");

/** 1 → "1 event", 2000 → "2,000 events". */
export function count(value: number, what: string): string {
  return `${number(value)} ${what}${value === 1 ? "" : "s"}`;
}
