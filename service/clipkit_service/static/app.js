// Where the page starts: it joins the address bar, the two modes, the keyboard, the theme and the language.
// Nothing is drawn here; search.js and classify.js draw, router.js says what.
import { about } from "./api.js";
import { redrawClassify, setModel, showClassify, startClassify } from "./classify.js";
import { $, announce } from "./dom.js";
import { count, language, t, translatePage } from "./i18n.js";
import { acceptPictures, choosePicture } from "./pictures.js";
import { address, go, onPlace, place } from "./router.js";
import { redrawSearch, setIndex, showSearch, startSearch } from "./search.js";

let service = null; // {model, index}, null until the service has answered

function show() {
  const here = place();
  const searching = here.mode === "search";
  document.body.dataset.mode = here.mode;
  $("search").hidden = !searching;
  $("classify").hidden = searching;
  $("mode-search").setAttribute("aria-current", searching ? "page" : "false");
  $("mode-classify").setAttribute("aria-current", searching ? "false" : "page");
  if (searching) $("mode-search").setAttribute("href", address(here)); // coming back finds the same search
  if (searching) showSearch(here);
  else showClassify(here);
}

function store(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    announce(""); // storage is blocked: the choice lasts as long as the page
  }
}

function translate() {
  translatePage();
  $("language").textContent = t("language");
  $("language").setAttribute("aria-label", t("language.label"));
  $("theme").setAttribute("aria-label", t("theme"));
  $("theme").title = t("theme");
  const model = service?.model && t("about", { model: service.model.id, dim: service.model.dim });
  const size = service?.index && count("about", service.index.ntotal);
  $("about").textContent = [model, size].filter(Boolean).join(" · ");
}

function toggleLanguage() {
  document.documentElement.lang = language() === "zh" ? "en" : "zh-CN";
  store("clipkit.language", document.documentElement.lang);
  translate();
  redrawSearch();
  redrawClassify(true);
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  store("clipkit.theme", root.dataset.theme);
}

function onKey(event) {
  const typing = event.target.matches("input, textarea, select");
  if (event.isComposing || event.metaKey || event.ctrlKey || event.altKey) return;
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $(place().mode === "search" ? "query" : "label").focus();
  } else if (event.key === "Escape") {
    if (place().mode === "search") {
      if (location.search || history.state?.picture) go({});
      $("query").value = "";
      $("query").focus();
    } else if (typing && event.target.value) event.target.value = "";
    else go({ mode: "classify" });
  }
}

async function start() {
  startSearch();
  startClassify();
  onPlace(show);
  translate();
  acceptPictures((picture) => {
    const { mode, labels } = place();
    go({ mode, labels, picture });
  }, () => t(`drop.${place().mode}`));
  $("choose").addEventListener("click", choosePicture);
  $("well").addEventListener("click", choosePicture);
  $("language").addEventListener("click", toggleLanguage);
  $("theme").addEventListener("click", toggleTheme);
  addEventListener("keydown", onKey);
  try {
    service = await about();
    setIndex(service.index);
    setModel(service.model, service.index);
  } catch {
    service = null; // the first search will say what is wrong, in the place where it is looked for
  }
  translate();
  show();
  if (matchMedia("(pointer: fine)").matches && place().mode === "search" && !location.search) $("query").focus();
}

start();
