// The lines of a log, as bytes bring them. Pure.

export type Bytes = Uint8Array<ArrayBuffer>;

/** The parts of a body as they come. */
export async function* parts(body: ReadableStream<Bytes>): AsyncGenerator<Bytes, void> {
  const reader = body.getReader();
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
  } finally {
    await reader.cancel(); // nothing, where it was read to its end
  }
}

/** The lines of these bytes, each as soon as it is whole. Throws where the last one is not. */
export async function* lines(bytes: AsyncIterable<Bytes>): AsyncGenerator<string, void> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const part of bytes) {
    const whole = (rest + decoder.decode(part, { stream: true })).split("\n");
    rest = whole.pop()!;
    yield* whole;
  }
  if (rest) throw new Error("The last line is not whole.");
}

/** `json` on several lines. Its words stay as they are written: a number too large for us is not changed. */
export function indented(json: string): string {
  let depth = 0;
  const broken = () => `\n${"  ".repeat(depth)}`;
  return json.replace(/"(?:[^"\\]|\\.)*"|[{[]\s*[}\]]|[^\S ]|[ ]|[{}[\],:]/g, (token) => {
    if (token.length > 1) return token;
    if (token === "{" || token === "[") return (depth += 1), token + broken();
    if (token === "}" || token === "]") return (depth -= 1), broken() + token;
    if (token === ",") return token + broken();
    if (token === ":") return ": ";
    return "";
  });
}
