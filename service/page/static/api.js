// Asking the service: one function a kind of request, one error for all that can go wrong.

export class Problem extends Error {
  // `code`: one of the service's, or `unreachable`, `unreadable`; `retryAfter`: seconds, where the service said so.
  constructor(code, message, status = 0, retryAfter = null) {
    super(message);
    Object.assign(this, { code, status, retryAfter });
  }
}

// What can be shown of whatever was thrown. What is none of ours is a fault of the answer or of this page: its words are
// for the console.
export function asProblem(error) {
  if (typeof error.code === "string") return error;
  console.error(error);
  return new Problem("unreadable", "The answer is not what this page understands.");
}

export const isAbort = (error) => error?.name === "AbortError";

// `key`: a function that gives the caller's key, or null.
export function createApi(key) {
  const lanes = new Map();

  // Of two requests on one lane the newer stands: the older's connection is closed, and the service drops it.
  function onLane(lane) {
    const own = new AbortController();
    if (lane) {
      lanes.get(lane)?.abort();
      lanes.set(lane, own);
    }
    return own;
  }

  // `as: "blob"`: the answer's bytes as they came, JSON or not.
  async function ask(path, init, { accept = "application/json", as, signal, lane } = {}) {
    const own = onLane(lane);
    const ends = AbortSignal.any([own.signal, signal].filter(Boolean));
    const headers = { Accept: accept };
    if (key()) headers.Authorization = `Bearer ${key()}`;
    let response;
    try {
      response = await fetch(path, { ...init, headers, signal: ends });
    } catch (error) {
      if (isAbort(error)) throw error;
      throw new Problem("unreachable", "The service does not answer. Is it running, and is this its address?");
    }
    try {
      if (!response.ok) throw await problemOf(response);
      return await (accept === "application/json" && as !== "blob" ? response.json() : response.blob());
    } catch (error) {
      if (isAbort(error) || error instanceof Problem) throw error;
      throw new Problem("unreadable", "The answer broke off, or is not what this page understands.", response.status);
    } finally {
      if (lane && lanes.get(lane) === own) lanes.delete(lane);
    }
  }

  return {
    get: (path, options) => ask(path, { method: "GET" }, options),
    // `image`: a file; `fields`: options, of which empty ones are left out.
    post(path, image, fields = {}, options = {}) {
      const form = new FormData();
      form.append("image", image, image.name ?? "image");
      for (const [name, one] of Object.entries(fields)) if (one !== undefined && one !== null && one !== "") form.append(name, one);
      return ask(path, { method: "POST", body: form }, options);
    },
  };
}

async function problemOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  let error = null;
  try {
    error = (await response.json()).error;
  } catch (failure) {
    if (isAbort(failure)) throw failure; // superseded while its error arrived
  }
  if (error?.code) return new Problem(error.code, error.message, response.status, retryAfter);
  return new Problem("unreadable", `The answer is ${response.status}, without a reason.`, response.status, retryAfter);
}

// The path of a model's resource: `path(["models", name, "class-graph"])`, with the version where one is chosen.
export function path(parts, version) {
  const query = version ? `?version=${encodeURIComponent(version)}` : "";
  return `${parts.map((part) => encodeURIComponent(part)).join("/")}${query}`;
}
