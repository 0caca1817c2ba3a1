// Search: one query (words, an item, or a picture) in, a grid of pictures with their similarities out.
// The grid is a list of links, so that every result has an address; arrows move a single tab stop through it.
import { itemPicture, search } from "./api.js";
import { $, announce, caption, h, icon, picture, problemCard } from "./dom.js";
import { count, language, t } from "./i18n.js";
import { address, go } from "./router.js";

const PAGE = 24;
const MOST = 240;
const EMOJI = {
  en: ["woman firefighter: dark skin tone", "fruit", "flag", "cat with heart-eyes", "red apple", "police car"],
  zh: ["女消防员: 较深肤色", "旗", "花痴的猫", "红苹果", "警车", "猫"],
};
// English in both languages: most pretrained models know no other.
const GENERAL = ["a dog playing in the grass", "sunset over the sea", "people around a table", "a red car",
  "flowers", "a street at night"];

let shown = null; // {query, k, found, ms}: what is on the screen, drawn again when the language changes
let running = null; // AbortController of the request in flight: only the latest query may draw
const known = new Map(); // item id → metadata of every result seen, to name the item of ?id=
let index = null;

export function setIndex(loaded) {
  index = loaded;
  if (!index) $("search-problem").replaceChildren(problemCard({ title: t("noindex.title"), message: t("noindex.detail") }));
}

const sameQuery = (a, b) => a && b && a.text === b.text && a.id === b.id && a.picture === b.picture;

/** Show the results for a place, or the start screen when it asks for nothing. */
export async function showSearch({ q, id, picture: file }) {
  const query = file ? { picture: file } : id !== null ? { id } : q ? { text: q } : null;
  $("query").value = q && query?.text ? q : "";
  drawChip(query);
  if (!query) return drawStart();
  if (shown && sameQuery(shown.query, query) && !running) return drawResults();
  await run(query, PAGE);
}

export function redrawSearch() {
  if (shown && document.body.dataset.stage === "results") {
    drawChip(shown.query);
    drawResults();
  } else drawExamples();
}

async function run(query, k) {
  running?.abort();
  const mine = (running = new AbortController());
  const again = sameQuery(shown?.query, query);
  document.body.dataset.stage = "results";
  $("search-problem").replaceChildren();
  if (!again) drawWaiting();
  $("results").setAttribute("aria-busy", "true");
  try {
    // An item is its own nearest neighbour: ask for one more, and leave it out.
    const { data, ms } = await search(query, query.id === undefined ? k : k + 1, mine.signal);
    if (mine.signal.aborted) return;
    for (const hit of data) known.set(hit.id, hit.metadata);
    shown = { query, k, ms, found: data.filter((hit) => hit.id !== query.id).slice(0, k) };
    running = null;
    drawChip(query);
    drawResults();
    announce(shown.found.length ? count("count", shown.found.length) : t("none.title"));
  } catch (error) {
    if (mine.signal.aborted) return;
    running = shown = null;
    clearResults();
    $("search-problem").replaceChildren(problemCard(error, () => run(query, k)));
    if (error.offline) addEventListener("online", () => run(query, k), { once: true, signal: mine.signal });
  } finally {
    if (running === mine || running === null) $("results").removeAttribute("aria-busy");
  }
}

function clearResults() {
  $("results").replaceChildren();
  $("summary").hidden = $("more").hidden = true;
}

function drawStart() {
  running?.abort();
  running = shown = null;
  document.body.dataset.stage = "start";
  clearResults();
  if (index) $("search-problem").replaceChildren();
  drawExamples();
}

function drawWaiting() {
  announce(t("searching"));
  $("summary").hidden = false;
  $("summary").replaceChildren(t("searching"));
  $("more").hidden = true;
  const bones = Array.from({ length: 12 }, () =>
    h("li", { class: "bone" }, h("span", { class: "frame" }), h("span", { class: "line" }), h("span", { class: "line short" })));
  $("results").replaceChildren(...bones);
}

const nameOf = (id) => (known.has(id) ? caption(known.get(id)) : t("like.item", { id }));

/** The query as a chip in the field, when it is a picture: with its face, and a way to remove it. */
function drawChip(query) {
  const chip = $("query-chip");
  const url = query?.picture ? URL.createObjectURL(query.picture) : query?.id !== undefined && index ? itemPicture(index, query.id) : null;
  chip.hidden = !query || query.text !== undefined;
  $("clear").hidden = !query;
  $("query").placeholder = t(chip.hidden ? "search.placeholder" : "search.again");
  if (chip.hidden) return chip.replaceChildren();
  const name = query.picture ? t("picture") : nameOf(query.id);
  chip.replaceChildren(picture(url, "", "face"), h("span", {}, name));
  if (query.picture) chip.querySelector("img").addEventListener("load", () => URL.revokeObjectURL(url));
}

function drawResults() {
  const { query, found, ms, k } = shown;
  document.body.dataset.stage = "results";
  const what = query.text !== undefined ? t("for", { query: query.text })
    : query.picture ? t("like.picture") : t("like", { query: nameOf(query.id) });
  $("summary").hidden = false;
  $("summary").replaceChildren(h("strong", {}, count("count", found.length)), ` ${what} `, h("span", { class: "took" }, t("took", { ms })));
  $("more").hidden = found.length < k || k >= MOST;
  $("search-problem").replaceChildren();
  if (!found.length) {
    $("search-problem").replaceChildren(problemCard({ title: t("none.title"), message: t("none.detail") }));
  }
  const best = Math.max(...found.map((hit) => hit.similarity), 1e-6);
  $("results").replaceChildren(...found.map((hit, place) => tile(hit, place, best)));
}

function tile(hit, place, best) {
  const name = caption(hit.metadata);
  const score = hit.similarity.toFixed(2);
  const share = Math.min(1, Math.max(0, hit.similarity / best)); // against the best hit: cosines of one model live in a narrow band
  return h("li", { vars: { "--place": Math.min(place, 24) } },
    h("a", {
      class: "tile", href: address({ id: hit.id }), "data-route": true, tabindex: place ? "-1" : "0", title: name,
      "aria-label": t("tile", { rank: place + 1, name, score }),
    },
    picture(hit.image_url, name),
    h("span", { class: "name" }, name),
    h("span", { class: "score", vars: { "--share": share } }, h("i"), h("b", {}, score))));
}

/** The start screen's examples: each shows the first pictures that it would find. */
async function drawExamples() {
  const box = $("examples");
  if (!index) return box.replaceChildren();
  const spoken = language();
  let first;
  try {
    first = (await search({ text: EMOJI[spoken][0] }, 4)).data;
  } catch {
    first = []; // the examples are a welcome, not the service's health: a search will tell
  }
  const isEmoji = first.some((hit) => hit.metadata?.emoji);
  const words = isEmoji ? EMOJI[spoken] : GENERAL;
  const cards = words.map((text) => h("a", { class: "example", href: address({ q: text }), "data-route": true },
    h("span", { class: "strip" }, ...Array.from({ length: 4 }, () => h("span", { class: "frame" }))),
    h("span", { class: "name" }, text, icon("arrow"))));
  box.replaceChildren(...cards);
  await Promise.all(cards.map(async (card, i) => {
    const hits = isEmoji && i === 0 ? first : (await search({ text: words[i] }, 4).catch(() => ({ data: [] }))).data;
    if (hits.length) card.firstChild.replaceChildren(...hits.map((hit) => picture(hit.image_url, caption(hit.metadata))));
  }));
}

function moveFocus(event) {
  const tiles = [...$("results").querySelectorAll(".tile")];
  const here = tiles.indexOf(document.activeElement);
  if (here < 0) return;
  const columns = tiles.filter((node) => node.offsetTop === tiles[0].offsetTop).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -here, End: tiles.length - 1 - here }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (event.key === "ArrowUp" && here < columns) return $("query").focus();
  focusTile(tiles, Math.min(tiles.length - 1, Math.max(0, here + step)));
}

function focusTile(tiles, target) {
  tiles.forEach((node, i) => (node.tabIndex = i === target ? 0 : -1));
  tiles[target]?.focus();
}

export function startSearch() {
  $("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("query").value.trim();
    if (text) go({ q: text });
  });
  $("query").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" || event.isComposing) return;
    event.preventDefault();
    focusTile([...$("results").querySelectorAll(".tile")], 0);
  });
  $("results").addEventListener("keydown", moveFocus);
  $("query").addEventListener("input", () => ($("clear").hidden = !$("query").value && !shown));
  $("clear").addEventListener("click", () => {
    go({});
    $("query").focus();
  });
  $("more").addEventListener("click", async () => {
    const before = shown.found.length;
    await run(shown.query, Math.min(MOST, shown.k + PAGE));
    focusTile([...$("results").querySelectorAll(".tile")], before);
  });
}
