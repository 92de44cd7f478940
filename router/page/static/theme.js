// Loaded before the first paint, so that a chosen theme never flashes; everything else is in modules.
"use strict";

const themes = ["auto", "light", "dark"];

function storedTheme() {
  try {
    const stored = localStorage.getItem("baton-theme");
    return themes.includes(stored) ? stored : "auto";
  } catch {
    return "auto";
  }
}

function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function show(button, theme) {
  button.textContent = { auto: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[theme];
  button.setAttribute("aria-label", `Theme: ${theme}`);
}

applyTheme(storedTheme());
document.addEventListener("DOMContentLoaded", () => {
  const button = document.getElementById("theme");
  let theme = storedTheme();
  show(button, theme);
  button.addEventListener("click", () => {
    theme = themes[(themes.indexOf(theme) + 1) % themes.length];
    show(button, theme);
    applyTheme(theme);
    try {
      localStorage.setItem("baton-theme", theme);
    } catch {
      // Storage may be forbidden; the choice then lasts as long as the page.
    }
  });
});
