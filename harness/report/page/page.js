"use strict";
// The page reads without this: it sorts and filters tables, and opens numbers and runs in a panel.
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// --- sorting ---------------------------------------------------------------------------------------------------------------

function sortKey(cell) {
  const text = cell.dataset.v ?? cell.textContent.trim();
  return { number: parseFloat(text.replace(/,/g, "")), text }; // the mean in front of "81.50 ± 0.20 (3)"
}

const collator = new Intl.Collator(undefined, { numeric: true });

function compare(a, b) {
  const noA = Number.isNaN(a.number), noB = Number.isNaN(b.number);
  if (noA !== noB) return noA ? 1 : -1;
  return noA ? collator.compare(a.text, b.text) : a.number - b.number;
}

function sortTable(table, place, header) {
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of $$("thead th", table)) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: sortKey(row.cells[place]) }));
  const missing = (key) => key.text === "–" || key.text.startsWith("– ") || key.text.startsWith("undefined");
  rows.sort((a, b) => missing(a.key) - missing(b.key) || (ascending ? 1 : -1) * compare(a.key, b.key));
  body.append(...rows.map(({ row }) => row));
}

function makeSortable(table) {
  $$("thead th", table).forEach((header, place) => {
    const button = make("button", { type: "button", className: "sort" }, ...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sortTable(table, place, header));
  });
}

// --- filtering -------------------------------------------------------------------------------------------------------------

function parseFilter(text, names) {
  return text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const parts = /^([^=<>]+)([=<>])(.*)$/.exec(word);
    const place = parts ? names.indexOf(parts[1]) : -1;
    return place < 0 ? { word } : { place, sign: parts[2], value: parts[3] };
  });
}

function holds(row, test) {
  if (test.word !== undefined) return row.textContent.toLowerCase().includes(test.word);
  const text = row.cells[test.place].textContent.trim().toLowerCase();
  if (test.sign === "=") return text === test.value || (test.value !== "" && Number(text) === Number(test.value));
  return test.sign === ">" ? Number(text) > Number(test.value) : Number(text) < Number(test.value);
}

function makeFilter(table, input, output) {
  const rows = [...table.tBodies[0].rows];
  const names = $$("thead th", table).map((header) => header.textContent.trim().toLowerCase());
  const apply = () => {
    const tests = parseFilter(input.value, names);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !tests.every((test) => holds(row, test));
      shown += row.hidden ? 0 : 1;
    }
    output.textContent = `${shown} of ${rows.length} runs`;
  };
  let waiting = 0;
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, rows.length > 1000 ? 200 : 0);
  });
  apply();
}

// --- what is packed --------------------------------------------------------------------------------------------------------

async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const kept = new Map();
function unpackOnce(selector) {
  if (!kept.has(selector)) {
    const element = $(selector);
    kept.set(selector, element ? unpack(element) : Promise.resolve(null));
  }
  return kept.get(selector);
}

const fragments = new Map();
async function fragment(number) {
  if (!fragments.has(number)) {
    const block = $$("script.packed").findLast((element) => Number(element.dataset.first) <= number);
    const first = Number(block.dataset.first);
    (await unpackOnce(`script.packed[data-first="${first}"]`)).forEach((text, place) => fragments.set(first + place, text));
  }
  const holder = make("template", { innerHTML: fragments.get(number) }); // escaped where it was rendered
  return holder.content.firstElementChild;
}

// --- the panel -------------------------------------------------------------------------------------------------------------

const panel = $("#panel"), title = $("#panel-title"), body = $("#panel-body");

function show(heading, ...children) {
  title.textContent = heading;
  body.replaceChildren(...children);
  if (!panel.open) panel.showModal();
  title.focus();
  body.scrollTop = panel.scrollTop = 0;
}

function showBusy(work) {
  work().catch((error) => show("This cannot be opened", make("p", {}, `${error}`)));
}

async function openRun(number, back) {
  const article = await fragment(number);
  const heading = $("h3", article);
  const name = heading.textContent;
  article.removeAttribute("aria-labelledby");
  heading.remove();
  const children = [article];
  if (back) {
    const button = make("button", { type: "button" }, `‹ ${back.length} runs`);
    button.addEventListener("click", () => showBusy(() => openRuns(back)));
    children.unshift(make("p", {}, button));
  }
  show(name, ...children);
  const place = $("[data-samples]", article);
  if (place) await fillSamples(place, number);
}

async function openRuns(numbers) {
  if (numbers.length === 1) return openRun(numbers[0]);
  const source = $("#list");
  const table = make("table", { className: source.className.replace("sortable", "") }, make("caption", {}, "The runs behind it"), source.tHead.cloneNode(true), make("tbody"));
  for (const button of $$("button.sort", table)) button.replaceWith(...button.childNodes);
  for (const header of $$("th", table)) header.removeAttribute("aria-sort");
  const commands = [];
  for (const number of numbers) {
    const row = document.getElementById(`r${number}`).cloneNode(true);
    row.removeAttribute("id");
    row.hidden = false;
    $("a", row).dataset.back = numbers.join(" ");
    table.tBodies[0].append(row);
    commands.push($(".command", await fragment(number))?.textContent ?? "");
  }
  const scroll = make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "The runs behind it" }, table);
  const again = make("pre", { className: "command", tabIndex: 0 }, commands.filter(Boolean).join("\n"));
  return show(`${numbers.length} runs`, scroll, make("h4", {}, "Make them again"), again);
}

// --- samples ---------------------------------------------------------------------------------------------------------------

const STEP = 50;

function picture(images, set, id, label) {
  const url = images?.[set]?.[id];
  return url ? [make("img", { src: url, alt: `${label}, test image`, className: "thumbnail" })] : [];
}

async function fillSamples(place, number) {
  const [samples, images] = await Promise.all([unpackOnce("#packed-samples"), unpackOnce("#packed-images")]);
  const run = samples?.runs[number];
  if (!run) return;
  const { ids, labels, classes } = samples.sets[run.s];
  const all = ids.map((_, at) => at);
  const wrong = (at) => run.p[at] !== labels[at];
  all.sort((a, b) => wrong(b) - wrong(a) || run.c[b] - run.c[a]);
  const choices = { mistakes: wrong, right: (at) => !wrong(at), all: () => true };
  const select = make("select", { id: "which" });
  for (const name of Object.keys(choices)) {
    const count = all.filter(choices[name]).length;
    select.append(make("option", { value: name }, `${name} (${count})`));
  }
  const tbody = make("tbody"), more = make("button", { type: "button" }, "Show more");
  const header = ["image", "sample", "class", "predicted", "confidence"].map((name) => make("th", { scope: "col" }, name));
  const table = make("table", { className: "samples" }, make("caption", {}, "Test samples, the most confident first"), make("thead", {}, make("tr", {}, ...header)), tbody);
  let chosen = [];
  const add = () => {
    const from = tbody.rows.length;
    for (const at of chosen.slice(from, from + STEP)) {
      const label = classes[labels[at]];
      const mark = wrong(at) ? "wrong: " : "";
      tbody.append(make("tr", { className: wrong(at) ? "mistake" : "" },
        make("td", {}, ...picture(images, run.s, ids[at], label)), make("th", { scope: "row" }, ids[at]),
        make("td", { className: "words" }, label), make("td", { className: "words" }, mark + classes[run.p[at]]), make("td", {}, `${run.c[at]}%`)));
    }
    more.hidden = tbody.rows.length >= chosen.length;
  };
  const choose = () => {
    chosen = all.filter(choices[select.value]);
    tbody.replaceChildren();
    add();
  };
  select.addEventListener("change", choose);
  more.addEventListener("click", add);
  const scroll = make("div", { className: "scroll", tabIndex: 0, role: "region", ariaLabel: "Test samples" }, table);
  place.replaceChildren(make("h4", {}, "Samples"), make("p", {}, make("label", { htmlFor: "which" }, "Show "), select), scroll, more);
  choose();
}

async function fillThumbnails() {
  const images = await unpackOnce("#packed-images");
  for (const table of $$("table.hardest")) {
    for (const cell of $$("[data-id]", table)) {
      cell.prepend(...picture(images, table.dataset.set, cell.dataset.id, cell.nextElementSibling.textContent));
    }
  }
}

// --- start -----------------------------------------------------------------------------------------------------------------

function runNumber(link) {
  const found = /^#d(\d+)$/.exec(link);
  return found ? Number(found[1]) : null;
}

for (const article of $$("#details > article")) fragments.set(runNumber(`#${article.id}`), article.outerHTML);
$("#details")?.remove();
$('nav a[href="#details"]')?.parentElement.remove();
$$("table.sortable").forEach(makeSortable);
$(".controls").hidden = false;
makeFilter($("#list"), $("#filter"), $("#shown"));
$("#close").addEventListener("click", () => panel.close());
panel.addEventListener("click", (event) => {
  if (event.target === panel) panel.close(); // outside of it
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const numbers = (text) => text.split(" ").map(Number);
  const number = runNumber(link.getAttribute("href") ?? "");
  if (number === null && !link.dataset.r) return;
  event.preventDefault();
  const back = link.dataset.back ? numbers(link.dataset.back) : undefined;
  showBusy(() => (number === null ? openRuns(numbers(link.dataset.r)) : openRun(number, back)));
});
if ($("#packed-images")) showBusy(fillThumbnails);
if (runNumber(location.hash) !== null) showBusy(() => openRun(runNumber(location.hash)));
