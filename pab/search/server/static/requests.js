// Requests to the server, repeated while it is busy.

const PATIENCE = 5; // attempts per request

export class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function ask(path, options = {}) {
  for (let attempt = 1; ; attempt += 1) {
    const response = await fetch(path, options);
    if (response.ok) return response;
    if (response.status === 401) location.assign(`/login${location.search}`);
    if (response.status === 429 && attempt < PATIENCE) {
      document.dispatchEvent(new Event("busy"));
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000 * attempt));
      options.signal?.throwIfAborted();
      continue;
    }
    const answer = await response.json().catch(() => ({}));
    throw new Refusal(response.status, answer.error ?? `The server answered ${response.status}.`);
  }
}

export async function askSearch(body, file, signal) {
  if (!file) {
    const headers = { "Content-Type": "application/json" };
    return (await ask("/api/search", { method: "POST", headers, body: JSON.stringify(body), signal })).json();
  }
  const form = new FormData();
  form.set("query", JSON.stringify({ ...body, image: null }));
  form.set("image", file);
  return (await ask("/api/search", { method: "POST", body: form, signal })).json();
}
