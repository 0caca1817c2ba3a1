// Runs before the first paint (a classic script in the head): the chosen theme and language are on <html>
// before anything is drawn, so that a dark page never flashes white. Everything else waits for app.js.
(() => {
  const stored = (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null; // storage is blocked: the browser's own preferences hold
    }
  };
  const root = document.documentElement;
  const theme = stored("clipkit.theme");
  if (theme === "light" || theme === "dark") root.dataset.theme = theme;
  const language = stored("clipkit.language") ?? navigator.language ?? "en";
  root.lang = language.toLowerCase().startsWith("zh") ? "zh-CN" : "en";
})();
