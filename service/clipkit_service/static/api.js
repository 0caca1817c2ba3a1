// The service's REST calls that the page needs, and nothing else: each returns {data, ms}, or throws an
// ApiError that carries the problem+json the service sent (title, detail, code) or `offline`.
export class ApiError extends Error {
  constructor(message, { title = "", code = "", status = 0, offline = false } = {}) {
    super(message);
    Object.assign(this, { title, code, status, offline });
  }
}

async function call(path, options = {}) {
  const start = performance.now();
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message, { offline: true });
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const detail = body.detail ?? response.statusText;
    throw new ApiError(typeof detail === "string" ? detail : JSON.stringify(detail), {
      title: body.title, code: body.code ?? response.statusText, status: response.status,
    });
  }
  return { data: body.data ?? body, ms: Math.round(performance.now() - start) };
}

function form(fields) {
  const data = new FormData();
  for (const [name, value] of fields) data.append(name, value);
  return data;
}

/** query: {text}, {id} or {picture: File} */
export function search(query, k, signal) {
  if (query.picture) {
    return call("/v1/search/image", { method: "POST", body: form([["file", query.picture], ["k", k]]), signal });
  }
  return call("/v1/search", {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify({ query, k }),
  });
}

export function classify(picture, labels, template, signal) {
  const fields = [["file", picture], ...labels.map((label) => ["labels", label])];
  if (template) fields.push(["templates", template]);
  return call("/v1/classify", { method: "POST", body: form(fields), signal });
}

/** A picture of the index as a file, to send it back for classifying. */
export async function fetchPicture(url) {
  const response = await fetch(url);
  if (!response.ok) throw new ApiError(response.statusText, { status: response.status });
  return new File([await response.blob()], "picture", { type: response.headers.get("Content-Type") ?? "" });
}

/** The model and the index behind the page: {model, index}, each null where the service has none. */
export async function about() {
  const [models, indexes] = await Promise.all([call("/v1/models"), call("/v1/indexes")]);
  return { model: models.data[0] ?? null, index: indexes.data[0] ?? null };
}

export const itemPicture = (index, id) => `/v1/indexes/${encodeURIComponent(index.name)}/items/${id}/image`;
