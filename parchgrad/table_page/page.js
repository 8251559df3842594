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
  if (!Number.isInteger(log10) || log10 > -3) return [String(Number((10 ** log10).toPrecision(2)))];
  return ["10", element("sup", String(log10).replace("-", "−"))];
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
  const alike = chosen.alike.map(([other, value]) => `${table.classes[other].label} (${value.toFixed(3)})`).join("; ");
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
  markScrolling();
}

// Boxes with more than is seen say so: a phone shows no scroll bar.
function markScrolling() {
  for (const box of document.querySelectorAll(".scroll")) box.classList.toggle("slides", box.scrollWidth > box.clientWidth + 1);
}

// Which two classes meet at a place of a map: shown under the pointer's map, kept by a click.
function readOut(maps) {
  const line = maps.querySelector(".readout");
  let kept = line.textContent;
  line.hidden = false;
  for (const map of maps.querySelectorAll("[data-classes]")) {
    const meeting = (event) => {
      const box = map.getBoundingClientRect();
      const count = Number(map.dataset.classes);
      const place = (share) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
      const [row, column] = [place((event.clientY - box.top) / box.height), place((event.clientX - box.left) / box.width)];
      const label = (at) => `${table.classes[table.order[at]].label} (place ${at + 1})`;
      const value = event.target.querySelector("title");
      return value ? value.textContent : row === column ? label(row) : `${label(row)} – ${label(column)}`;
    };
    map.addEventListener("pointermove", (event) => { line.textContent = meeting(event); });
    map.addEventListener("pointerleave", () => { line.textContent = kept; });
    map.addEventListener("click", (event) => { line.textContent = kept = meeting(event); });
  }
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
document.querySelectorAll(".maps").forEach(readOut);
window.addEventListener("resize", markScrolling);
