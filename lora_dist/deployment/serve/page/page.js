// Sends each dropped or chosen image to the JSON endpoint, and shows the predictions as bars.
"use strict";

const drop = document.getElementById("drop");
const choose = document.getElementById("choose");
const results = document.getElementById("results");
document.getElementById("here").textContent = location.href.replace(/[?#].*$/, "");

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  // File and class names are untrusted: set them as text, never as markup.
  made.textContent = text;
  return made;
}

function bar({ label, score }, chosen) {
  const row = element("li", chosen ? "chosen" : "");
  const track = element("div", "track");
  const filled = element("div", "bar");
  filled.style.width = `${100 * score}%`;
  track.append(filled);
  row.append(element("span", "label", label), element("span", "score", `${(100 * score).toFixed(1)}%`), track);
  row.title = label;
  return row;
}

function query() {
  // The choice is on the page only if there are several adapters.
  const adapter = document.getElementById("adapter")?.value;
  return new URLSearchParams({ top_k: document.body.dataset.topK, ...(adapter === undefined ? {} : { adapter }) });
}

async function classify(file, chosen) {
  const form = new FormData();
  form.append("files", file, file.name.replace(/[/\\]/g, "_"));
  const response = await fetch(`predict?${chosen}`, { method: "POST", body: form });
  const content = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(typeof content.detail === "string" ? content.detail : `the server answered ${response.status}`);
  }
  return content.predictions[0];
}

async function heatMap(file, chosen) {
  const form = new FormData();
  form.append("file", file, file.name.replace(/[/\\]/g, "_"));
  const response = await fetch(`explain?${chosen}`, { method: "POST", body: form });
  if (!response.ok) {
    const content = await response.json().catch(() => ({}));
    throw new Error(typeof content.detail === "string" ? content.detail : `the server answered ${response.status}`);
  }
  return URL.createObjectURL(await response.blob());
}

// A click on a picture shows what speaks for its class, or for the label with the highest score, and the next click the
// picture again.
function explainOnClick(picture, label, file, chosen, details) {
  const shown = { image: URL.createObjectURL(file), map: null };
  const button = element("button", "explain");
  button.type = "button";
  button.title = `Show what speaks for ${label}`;
  button.setAttribute("aria-pressed", "false");
  picture.onload = null;
  picture.replaceWith(button);
  button.append(picture);
  button.addEventListener("click", async () => {
    const explained = button.getAttribute("aria-pressed") === "true";
    try {
      shown.map ??= await heatMap(file, chosen);
      picture.src = explained ? shown.image : shown.map;
      button.setAttribute("aria-pressed", String(!explained));
    } catch (error) {
      details.append(element("p", "error", error.message));
    }
  });
}

// Of several labels, those above their thresholds come first; of one class, the most likely one.
function bars({ labels, top_k }) {
  const chosen = labels ?? top_k.slice(0, 1);
  const names = new Set(chosen.map(({ label }) => label));
  const others = top_k.filter(({ label }) => !names.has(label));
  return [...chosen.map((entry) => bar(entry, true)), ...others.map((entry) => bar(entry, false))];
}

async function show(file) {
  const card = element("li", "result");
  const picture = element("img", "");
  const details = element("div", "");
  picture.alt = "";
  picture.src = URL.createObjectURL(file);
  picture.onload = () => URL.revokeObjectURL(picture.src);
  // An empty box instead of the browser's icon for a damaged image.
  picture.onerror = () => picture.removeAttribute("src");
  const adapter = document.getElementById("adapter")?.value;
  details.append(element("h2", "", adapter === undefined ? file.name : `${file.name} (${adapter})`));
  card.append(picture, details);
  results.prepend(card);
  try {
    const list = element("ol", "bars");
    const chosen = query();
    const prediction = await classify(file, chosen);
    if (prediction.labels?.length === 0) {
      details.append(element("p", "none", "None of the labels"));
    } else if (prediction.label !== undefined && prediction.label !== prediction.top_k[0].label) {
      details.append(element("p", "unknown", prediction.label));
    }
    list.append(...bars(prediction));
    details.append(list);
    if (document.body.dataset.explains === "yes") {
      explainOnClick(picture, prediction.top_k[0].label, file, chosen, details);
    }
  } catch (error) {
    details.append(element("p", "error", error.message));
  }
}

choose.addEventListener("change", () => {
  [...choose.files].forEach(show);
  choose.value = "";
});
// On the whole window: the browser would open an image dropped outside the box, in place of the page.
window.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
window.addEventListener("dragleave", () => drop.classList.remove("over"));
window.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  [...event.dataTransfer.files].forEach(show);
});
