import { Lost } from "./refused.ts";

/** The bytes of a response as they come. Aborts `attempt`, which the response belongs to, after `silenceMs` of none. */
export async function* pieces(
  response: Response,
  attempt: AbortController,
  silenceMs: number,
): AsyncGenerator<Uint8Array, void> {
  const reader = response.body?.getReader(); // not every browser can iterate over a body
  while (reader) {
    // Only while waiting: it is no silence of the server's when the reader takes its time.
    const timer = setTimeout(() => attempt.abort(new Lost("The server fell silent.", silenceMs)), silenceMs);
    try {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      yield value;
    } catch (error) {
      throw attempt.signal.aborted ? attempt.signal.reason : error;
    } finally {
      clearTimeout(timer);
    }
  }
}
