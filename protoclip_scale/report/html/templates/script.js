"use strict";
// Light or dark, and what charts are drawn over. Without scripts the page follows the system and shows samples.
const root = document.documentElement;
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
document.getElementById("theme").addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; });
const choices = document.querySelectorAll("button[data-axis]");
for (const choice of choices) {
  choice.addEventListener("click", () => {
    document.body.dataset.axis = choice.dataset.axis;
    for (const each of choices) each.setAttribute("aria-pressed", String(each === choice));
  });
}
