"use strict";
// Shows the chosen class: its strongest channels from the data in the page, and its photographs, if there are any.
const table = JSON.parse(document.getElementById("table").textContent);
const choice = document.getElementById("choice");
const sections = [...document.querySelectorAll(".pictures")];

function element(name, text, className) {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// p from its logarithm to base 10, as the rest of the page writes it.
function power(log10) {
  if (log10 === null) return ["p missing"];
  if (log10 === "0") return ["0"];
  if (log10 > -3) return [String(Number((10 ** log10).toPrecision(1)))];
  return ["10", element("sup", log10.toFixed(0).replace("-", "−"))];
}

function layerRow(name, flat, owned) {
  const row = document.createElement("tr");
  const head = element("th", name);
  head.scope = "row";
  row.append(head, element("td", owned));
  for (let i = 0; i < flat.length; i += 4) {
    const [channel, log10, classes, selected] = flat.slice(i, i + 4);
    const cell = element("td", channel, !selected ? "off" : classes === 1 ? "own" : "");
    const small = element("small", "");
    small.append(...power(log10), ` (${classes})`);
    cell.append(small);
    row.append(cell);
  }
  return row;
}

function show(row) {
  const chosen = table.classes[row];
  const owned = chosen.owned.reduce((sum, number) => sum + number, 0);
  const alike = chosen.alike.map(([other, value]) => `${table.classes[other].label} (${value.toFixed(2)})`).join("; ");
  document.getElementById("summary").textContent =
    `Class ${chosen.index}${chosen.id ? ` (${chosen.id})` : ""}: ${chosen.label}. ${chosen.images.toLocaleString("en")} images, owns ${owned.toLocaleString("en")} channels.` +
    (alike ? ` Most similar, with the Jaccard index: ${alike}.` : "");
  const head = document.createElement("tr");
  head.append(element("th", "layer"), element("th", "owned"));
  const ranks = Math.max(...chosen.strongest.map((flat) => flat.length / 4));
  for (let rank = 1; rank <= ranks; rank++) head.append(element("th", rank));
  document.querySelector("#strongest thead").replaceChildren(head);
  document.querySelector("#strongest tbody").replaceChildren(
    ...table.layers.map((name, i) => layerRow(name, chosen.strongest[i], chosen.owned[i])));
  for (const section of sections) section.hidden = section.dataset.row !== String(row);
  const none = document.getElementById("no-pictures");
  if (none) none.hidden = sections.some((section) => !section.hidden);
}

table.classes.forEach((chosen, row) => {
  const option = element("option", `${chosen.index}  ${chosen.label}`);
  option.value = row;
  choice.append(option);
});
choice.value = sections.length ? sections[0].dataset.row : 0;
choice.addEventListener("change", () => show(Number(choice.value)));
document.getElementById("chooser").hidden = false;
show(Number(choice.value));
