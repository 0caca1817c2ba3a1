// Small helpers that build what is seen. Strings become text nodes, never markup: captions, labels and error
// details come from data, and data must not be able to add an element to the page.
import { language, t } from "./i18n.js";

export const $ = (id) => document.getElementById(id);

/** h("a", {class, href, onclick, vars: {"--p": 0.5}}, "text", node…) → element. null and false are left out. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A picture in a square. Small ones (icons, emoji) float on the tile with air around them, photos fill it. */
export function picture(url, name, className = "frame") {
  const frame = h("span", { class: className });
  const instead = () => frame.replaceChildren(h("span", { class: "instead" }, name));
  if (!url) instead();
  else {
    const image = h("img", { src: url, alt: "", draggable: "false", decoding: "async", onerror: instead });
    image.addEventListener("load", () => {
      if (Math.max(image.naturalWidth, image.naturalHeight) < 200) image.classList.add("small");
      image.classList.add("ready");
    });
    frame.append(image);
  }
  return frame;
}

/** What to call an item: its name in the page's language where the metadata has one. */
export function caption(metadata) {
  const own = language() === "zh" ? metadata?.name_zh : null;
  return String(own || metadata?.name || metadata?.caption || metadata?.image_path || t("untitled"));
}

export function announce(text) {
  $("live").textContent = text;
}

/** A card that says what went wrong in the service's own words, and offers to try again. */
export function problemCard(error, retry) {
  const title = error.offline ? t("offline.title") : error.title || t("error.title");
  const detail = error.offline ? t("offline.detail") : error.message;
  announce(`${title}. ${detail}`);
  return h("div", { class: "problem" },
    icon(error.offline ? "offline" : "alert"),
    h("h2", {}, title),
    h("p", {}, detail),
    error.status ? h("p", { class: "code" }, t("error.code", { status: error.status, code: error.code })) : null,
    retry ? h("button", { class: "more", type: "button", onclick: retry }, t("error.retry")) : null);
}
