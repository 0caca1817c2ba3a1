// Where the page is, kept in the URL: ?q=words, ?id=7 (pictures like item 7), ?mode=classify&labels=a,b.
// A dropped picture has no address; the history entry carries a key to it, so that Back finds it again.
const pictures = new Map();
let listener = () => {};

/** {mode, q, id, labels, picture} of the present address. */
export function place() {
  const params = new URLSearchParams(location.search);
  const id = params.get("id");
  return {
    mode: params.get("mode") === "classify" ? "classify" : "search",
    q: params.get("q") ?? "",
    id: id !== null && /^-?\d+$/.test(id) ? Number(id) : null,
    labels: params.get("labels")?.split(",").filter(Boolean) ?? null,
    picture: pictures.get(history.state?.picture) ?? null,
  };
}

export function address({ mode, q, id, labels } = {}) {
  const params = new URLSearchParams();
  if (mode === "classify") params.set("mode", mode);
  if (q) params.set("q", q);
  if (id !== null && id !== undefined) params.set("id", id);
  if (labels?.length) params.set("labels", labels.join(","));
  const text = params.toString();
  return text ? `/?${text}` : "/";
}

/** Go to a place: a new history entry, or the present one rewritten (`quiet`: nobody is told). */
export function go(target, { quiet = false } = {}) {
  if (quiet) {
    history.replaceState(history.state, "", address(target));
    return;
  }
  let state = null;
  if (target.picture) {
    state = { picture: `${Date.now()}-${pictures.size}` };
    pictures.set(state.picture, target.picture);
  }
  history.pushState(state, "", address(target));
  listener();
}

export function onPlace(callback) {
  listener = callback;
  addEventListener("popstate", callback);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-route]");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
    event.preventDefault();
    history.pushState(null, "", link.href);
    callback();
  });
}
