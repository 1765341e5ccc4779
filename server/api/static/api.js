// The server as this page sees it: the deployment, its health, and streamed chat completions. Paths are relative, so the
// page also works behind a path prefix.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export async function readiness() {
  let response;
  try {
    response = await fetch("health/ready", { cache: "no-store" });
  } catch {
    return { state: "down", text: "not reachable" };
  }
  if (response.ok) return { state: "ready", text: "ready" };
  const message = (await failure(response)).message;
  return { state: "loading", text: message.includes("shutting down") ? "shutting down" : "loading" };
}

export async function deployment(key) {
  const response = await request("playground/deployment", { headers: authorization(key), cache: "no-store" });
  return response.json();
}

// Yields the chunks of a streamed chat completion. Throws ApiError for an error response, an error event, or a stream
// that ends too early; and AbortError when `signal` says so.
export async function* chat(body, key, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...authorization(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, response.status);
    yield chunk;
  }
  throw new ApiError("the connection was lost before the answer was complete", response.status);
}

function authorization(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached", 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  try {
    return new ApiError((await response.json()).error.message, response.status);
  } catch {
    return new ApiError(`the server answered ${response.status}`, response.status);
  }
}

// The data of server-sent events; comments (keep-alive) are left out.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice(6);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the connection was lost before the answer was complete", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}
