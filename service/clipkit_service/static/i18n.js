// Every word on the page, in English and Chinese. `t(key, values)` is the only way text reaches the screen;
// markup names its keys in data-t (text), data-t-label (aria-label and tooltip) and data-t-placeholder.
const WORDS = {
  en: {
    title: "clipkit — find pictures with words",
    skip: "Skip to the results", home: "clipkit, start page", modes: "What to do", clear: "Clear",
    "mode.search": "Search", "mode.classify": "Classify",
    language: "中文", "language.label": "切换到中文", theme: "Switch between light and dark",
    "search.headline": "Find pictures with words",
    "search.lead": "Describe what you are looking for, or drop a picture to find others like it.",
    "search.label": "Describe the picture you are looking for", "search.placeholder": "Describe a picture…",
    "search.again": "…or describe something else", "search.choose": "Search with a picture", "search.submit": "Search",
    examples: "Examples", results: "Results", more: "Show more",
    "count.one": "{n} result", "count.other": "{n} results", took: "{ms} ms",
    for: "for “{query}”", like: "like “{query}”", "like.picture": "like your picture", "like.item": "item {id}",
    tile: "{rank}. {name}, similarity {score}. Open similar pictures", untitled: "untitled picture",
    searching: "Searching…", "none.title": "Nothing found", "none.detail": "The index has no picture for this query.",
    "classify.headline": "Ask what a picture shows",
    "classify.lead": "Give the model a picture and your own labels. It needs no training for them.",
    "classify.choose": "Choose a picture to classify", "classify.drop": "Drop a picture here",
    "classify.or": "paste it, or click to choose", "classify.samples": "Pictures to try",
    "classify.sample": "Classify {name}", "classify.labels": "Labels", "classify.clear": "Clear all",
    "classify.add": "Type a label, then Enter", "classify.remove": "Remove {label}",
    "classify.template": "Prompt", "classify.result": "Probabilities",
    "classify.need.picture": "Choose a picture to see the probabilities.",
    "classify.need.labels": "Add at least two labels to compare.",
    "classify.best": "Most likely {label}, {score}", "drop.search": "Drop to find similar pictures",
    "drop.classify": "Drop to classify this picture", picture: "Your picture",
    "error.title": "That did not work", "error.retry": "Try again", "error.code": "Error {status} · {code}",
    "offline.title": "The service cannot be reached",
    "offline.detail": "Check that it is running and that you are connected. This page tries again when the connection is back.",
    about: "{model} · {dim} dimensions", "about.one": "{n} picture", "about.other": "{n} pictures",
    "noindex.title": "No index is loaded", "noindex.detail": "Start the service with --index to search. Classifying works without one.",
    keys: "/ to search · arrows to move · Enter for similar · Esc to clear",
  },
  zh: {
    title: "clipkit — 用文字找图片",
    skip: "跳到结果", home: "clipkit 首页", modes: "功能", clear: "清除",
    "mode.search": "搜索", "mode.classify": "分类",
    language: "EN", "language.label": "Switch to English", theme: "切换浅色与深色",
    "search.headline": "用文字，找到图片",
    "search.lead": "描述你想找的画面，或拖入一张图片，找到与它相似的图片。",
    "search.label": "描述你想找的图片", "search.placeholder": "描述一张图片……",
    "search.again": "……或换一个描述", "search.choose": "用图片搜索", "search.submit": "搜索",
    examples: "示例", results: "搜索结果", more: "显示更多",
    "count.one": "{n} 个结果", "count.other": "{n} 个结果", took: "{ms} 毫秒",
    for: "“{query}”", like: "与“{query}”相似", "like.picture": "与你的图片相似", "like.item": "编号 {id}",
    tile: "第 {rank} 个：{name}，相似度 {score}。打开相似图片", untitled: "无标题图片",
    searching: "正在搜索……", "none.title": "没有找到", "none.detail": "索引中没有符合这个查询的图片。",
    "classify.headline": "问问图里是什么",
    "classify.lead": "给模型一张图片和你自己的标签，无需为此训练。",
    "classify.choose": "选择要分类的图片", "classify.drop": "把图片拖到这里",
    "classify.or": "也可以粘贴，或点击选择", "classify.samples": "可以试试这些图片",
    "classify.sample": "分类：{name}", "classify.labels": "标签", "classify.clear": "全部清除",
    "classify.add": "输入标签，按回车添加", "classify.remove": "移除 {label}",
    "classify.template": "提示词", "classify.result": "概率",
    "classify.need.picture": "选择一张图片即可看到概率。",
    "classify.need.labels": "请至少添加两个标签进行比较。",
    "classify.best": "最可能是 {label}，{score}", "drop.search": "松开即可查找相似图片",
    "drop.classify": "松开即可分类这张图片", picture: "你的图片",
    "error.title": "出错了", "error.retry": "重试", "error.code": "错误 {status} · {code}",
    "offline.title": "无法连接到服务",
    "offline.detail": "请确认服务正在运行、网络已连接。连接恢复后页面会自动重试。",
    about: "{model} · {dim} 维", "about.one": "{n} 张图片", "about.other": "{n} 张图片",
    "noindex.title": "没有加载索引", "noindex.detail": "启动服务时加上 --index 才能搜索；分类不需要索引。",
    keys: "/ 搜索 · 方向键移动 · 回车看相似 · Esc 清除",
  },
};

export const language = () => (document.documentElement.lang.startsWith("zh") ? "zh" : "en");

export function t(key, values = {}) {
  const text = WORDS[language()][key] ?? WORDS.en[key];
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** The form of `key` for n things: `key.one` or `key.other`. */
export function count(key, n) {
  const form = new Intl.PluralRules(language()).select(n) === "one" ? "one" : "other";
  return t(`${key}.${form}`, { n: new Intl.NumberFormat(language()).format(n) });
}

export const percent = (share) =>
  new Intl.NumberFormat(language(), { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(share);

export function translatePage() {
  document.title = t("title");
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-placeholder]")) node.placeholder = t(node.dataset.tPlaceholder);
  for (const node of document.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    if (node.matches("button:not(.well)")) node.title = t(node.dataset.tLabel);
  }
}
