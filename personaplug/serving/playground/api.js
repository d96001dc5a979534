// Requests to the server's routes. All of them go to the server that sent this page.

const KEY = "personaplug-key";

/** An error reply of the server, with its HTTP status. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Send a request and return the JSON of the reply. */
export async function call(method, path, body) {
  return (await send(method, path, body)).json();
}

/** Send a request and return the reply; an ApiError if its status is not 2xx. */
export async function send(method, path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (!reply.ok) throw new ApiError(await messageOf(reply), reply.status);
  return reply;
}

/** Return the path of a user's route. */
export function userPath(user, ...parts) {
  return ["v1", "users", user, ...parts].map(encodeURIComponent).join("/");
}

/** Return a path with the model whose plug the server is to use. */
export function withModel(path, model) {
  return `${path}${path.includes("?") ? "&" : "?"}model=${encodeURIComponent(model)}`;
}

/** Yield the JSON objects of a stream of server-sent events. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data && data !== "[DONE]") yield checked(JSON.parse(data));
    }
  }
}

function checked(event) {
  if (event.error) throw new ApiError(event.error.message, 500);
  return event;
}

async function messageOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answered with the status ${reply.status}.`;
  }
}
