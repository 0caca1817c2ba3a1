// Classify: one picture and a person's own labels in, probabilities as bars out. There is no button to press:
// every change of picture, labels or prompt asks the service again, a moment after the last change.
import { classify, fetchPicture, itemPicture, search } from "./api.js";
import { $, announce, caption, h, icon, picture, problemCard } from "./dom.js";
import { language, percent, t } from "./i18n.js";
import { address, go } from "./router.js";

const FIRST_LABELS = {
  en: ["animal", "fruit", "flag", "face", "vehicle"],
  zh: ["动物", "水果", "旗", "脸", "车"],
};
const SAMPLES = ["cat face", "red apple", "fire engine", "guitar", "rose"];
const PAUSE_MS = 200;

let labels = null;
let file = null;
let result = null; // {rows, ms}
let timer = 0;
let running = null;
let index = null;
let fewest = 2; // a softmax over one label is always 100 %; a sigmoid is not
let source = null; // the File or item id the picture came from

export function setModel(model, loadedIndex) {
  index = loadedIndex;
  fewest = model?.scoring === "sigmoid" ? 1 : 2;
}

export async function showClassify(place) {
  labels = place.labels ?? labels ?? [...FIRST_LABELS[language()]];
  drawLabels();
  drawSamples();
  const wanted = place.picture ?? place.id;
  if (wanted === source && file) return ask();
  source = wanted;
  file = place.picture;
  result = null;
  drawPicture(file ? URL.createObjectURL(file) : null);
  if (place.id !== null && !file && index) {
    try {
      const fetched = await fetchPicture(itemPicture(index, place.id));
      if (source !== place.id) return;
      file = fetched;
      drawPicture(URL.createObjectURL(file));
    } catch (error) {
      $("classify-problem").replaceChildren(problemCard(error));
    }
  }
  ask();
}

export function redrawClassify(changed) {
  if (changed && labels && Object.values(FIRST_LABELS).some((first) => String(first) === String(labels))) {
    setLabels([...FIRST_LABELS[language()]]); // untouched examples follow the language, a person's labels never
  }
  if (!labels) return;
  drawLabels();
  drawSamples();
  drawBars();
}

function setLabels(next) {
  labels = next;
  drawLabels();
  go({ mode: "classify", id: typeof source === "number" ? source : null, labels }, { quiet: true });
  askSoon();
}

function addLabels(text) {
  const fresh = text.split(/[,，、;\n]/).map((label) => label.trim()).filter(Boolean);
  $("label").value = "";
  if (fresh.length) setLabels([...new Set([...labels, ...fresh])]);
}

function askSoon() {
  clearTimeout(timer);
  timer = setTimeout(ask, PAUSE_MS);
}

async function ask() {
  clearTimeout(timer);
  running?.abort();
  const mine = (running = new AbortController());
  $("classify-problem").replaceChildren();
  if (!file || labels.length < fewest) {
    result = null;
    return drawBars();
  }
  $("bars").setAttribute("aria-busy", "true");
  try {
    const { data, ms } = await classify(file, labels, $("template").value.trim(), mine.signal);
    if (mine.signal.aborted) return;
    result = { rows: [...data[0]].sort((a, b) => b.score - a.score), ms };
    drawBars();
    announce(t("classify.best", { label: result.rows[0].label, score: percent(result.rows[0].score) }));
  } catch (error) {
    if (mine.signal.aborted) return;
    result = null;
    drawBars();
    $("classify-problem").replaceChildren(problemCard(error, ask));
    if (error.offline) addEventListener("online", ask, { once: true, signal: mine.signal });
  }
  $("bars").removeAttribute("aria-busy");
}

function drawPicture(url) {
  const image = $("well-picture");
  image.hidden = !url;
  $("well").classList.toggle("full", Boolean(url));
  if (!url) return image.removeAttribute("src");
  image.onload = () => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < 200);
    URL.revokeObjectURL(url);
  };
  image.onerror = () => drawPicture(null);
  image.src = url;
}

function drawLabels() {
  $("chips").replaceChildren(...labels.map((label) => h("li", {}, label,
    h("button", {
      type: "button", "aria-label": t("classify.remove", { label }),
      onclick: () => {
        setLabels(labels.filter((other) => other !== label));
        $("label").focus();
      },
    }, icon("close")))));
  $("labels-clear").hidden = !labels.length;
}

function drawBars() {
  const rows = result?.rows ?? labels.map((label) => ({ label, score: null }));
  const best = Math.max(...rows.map((row) => row.score ?? 0), 1e-6);
  $("bars").replaceChildren(...rows.map((row, place) => h("li", {
    class: row.score === null ? "waiting" : place === 0 ? "first" : null, vars: { "--share": row.score ?? 0, "--of-best": (row.score ?? 0) / best },
  },
  h("span", { class: "name" }, row.label),
  h("b", {}, row.score === null ? "–" : percent(row.score)),
  h("span", {
    class: "track", role: "meter", "aria-label": row.label, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": ((row.score ?? 0) * 100).toFixed(2),
  }, h("i")))));
  const need = !file ? "classify.need.picture" : labels.length < fewest ? "classify.need.labels" : null;
  $("classify-summary").textContent = need ? t(need) : result ? t("took", { ms: result.ms }) : "";
}

/** A few pictures of the index to begin with, for those who have none at hand. */
async function drawSamples() {
  if (!index || $("samples").dataset.language === language()) return;
  $("samples").dataset.language = language();
  const found = await Promise.all(SAMPLES.map((text) => search({ text }, 1).catch(() => ({ data: [] }))));
  const hits = new Map(found.flatMap(({ data }) => data).map((hit) => [hit.id, hit]));
  $("samples").replaceChildren(...[...hits.values()].map((hit) => h("a", {
    href: address({ mode: "classify", id: hit.id }), "data-route": true, title: caption(hit.metadata),
    "aria-label": t("classify.sample", { name: caption(hit.metadata) }),
  }, picture(hit.image_url, caption(hit.metadata)))));
}

export function startClassify() {
  const input = $("label");
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return; // Enter that ends an input method's composition is not ours
    if (event.key === "Enter") {
      event.preventDefault();
      addLabels(input.value);
    } else if (event.key === "Backspace" && !input.value && labels.length) setLabels(labels.slice(0, -1));
  });
  input.addEventListener("input", (event) => {
    if (!event.isComposing && /[,，、;]/.test(input.value)) addLabels(input.value);
  });
  input.addEventListener("blur", () => addLabels(input.value));
  $("labels").addEventListener("click", (event) => event.target === event.currentTarget && input.focus());
  $("labels-clear").addEventListener("click", () => {
    setLabels([]);
    input.focus();
  });
  $("template").addEventListener("input", askSoon);
}
