"use strict";
const plots = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const NARROW = 560, LEGEND_LINE = 17, MOST_LEGEND_LINES = 14; // px, px, and lines that a narrow plot grows by
const hidden = new Set();
const buttons = name => [...document.querySelectorAll(`[data-${name}]`)];
const views = buttons("view").map(button => button.dataset.view);
let chosenView = views[0];

// A plot with figures for the page's views follows them; any other choice has menus of its own, one a part of its name.
for (const plot of plots) {
  plot.follows = plot.views.length > 1 && plot.views.every(view => view.names.length === 1 && views.includes(view.names[0]));
  plot.menus = [];
  if (plot.follows || plot.views.length < 2) continue;
  const place = document.querySelector(`#panel-${CSS.escape(plot.id)} .menus`);
  plot.first.forEach((first, part) => {
    const names = [...new Set(plot.views.map(view => view.names[part]))];
    const menu = document.createElement("select");
    menu.setAttribute("aria-label", plot.title || plot.id);
    menu.append(...names.map(name => new Option(name)));
    menu.value = first;
    menu.hidden = names.length < 2;
    menu.addEventListener("change", () => draw(plot));
    place.append(menu);
    plot.menus.push(menu);
  });
}

function chosenFigure(plot) {
  const names = plot.follows ? [chosenView] : plot.menus.map(menu => menu.value);
  const exact = plot.views.find(view => names.every((name, part) => view.names[part] === name));
  const view = exact ?? plot.views.find(other => other.names[0] === names[0]) ?? plot.views[0];
  plot.menus.forEach((menu, part) => { menu.value = view.names[part]; }); // not every part goes with every other
  return view.figure;
}

// Arms that have a button above the plots need no legend, but in a saved picture.
const hasButtons = data => document.querySelector(".controls") !== null && data.some(trace => trace.meta?.arm !== undefined);

function themed({ data, layout }, isNarrow, ink, quiet, line, paper) {
  const axes = Object.keys(layout).filter(key => /^[xy]axis\d*$/.test(key));
  const looks = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line };
  const above = isNarrow ? { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 11 } } : {};
  return {
    ...layout, paper_bgcolor: paper, plot_bgcolor: paper, hovermode: layout.hovermode ?? "closest", showlegend: layout.showlegend ?? !hasButtons(data),
    margin: { l: isNarrow ? 46 : 60, r: 14, t: 28, b: 48, ...layout.margin }, hoverlabel: { align: "left" },
    font: { family: getComputedStyle(document.body).fontFamily, size: isNarrow ? 11 : 12.5, color: ink },
    legend: { ...layout.legend, ...above }, modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet, activecolor: ink },
    ...Object.fromEntries(axes.map(key => [key, { ...looks, ...layout[key] }])),
  };
}

function traces(figure) {
  return figure.data.map(trace => (hidden.has(trace.meta?.arm) ? { ...trace, visible: false } : trace));
}

function save(plot) {
  const figure = chosenFigure(plot), layout = themed(figure, false, "#1d2024", "#5c626a", "#e3e4e0", "#ffffff");
  const whole = { ...layout, showlegend: true, title: { text: plot.title }, margin: { l: 64, r: 24, t: 64, b: 56 }, ...(hasButtons(figure.data) && { legend: { orientation: "h", y: -0.22 } }) };
  Plotly.downloadImage({ data: traces(figure), layout: whole }, { format: "svg", filename: plot.id, width: 900, height: Math.max(480, plot.height + 140) });
}

function draw(plot) {
  const style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name).trim();
  const place = document.getElementById(`plot-${plot.id}`);
  plot.isNarrow = place.clientWidth < NARROW;
  const figure = chosenFigure(plot), layout = themed(figure, plot.isNarrow, colour("--ink"), colour("--quiet"), colour("--line"), "rgba(0,0,0,0)");
  const camera = { name: "Save as SVG", icon: Plotly.Icons.camera, click: () => save(plot) };
  const entries = figure.data.filter(trace => trace.showlegend !== false).length;
  const legendHeight = plot.isNarrow && layout.showlegend ? LEGEND_LINE * Math.min(entries, MOST_LEGEND_LINES) : 0;
  place.style.height = `${plot.height + legendHeight}px`; // beside a narrow plot there is no room for its legend
  Plotly.react(place, traces(figure), layout, {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d"], modeBarButtonsToAdd: [camera],
  });
}

function drawAll() {
  plots.forEach(draw);
}

for (const button of buttons("arm")) {
  button.addEventListener("click", () => {
    const arm = Number(button.dataset.arm);
    hidden.delete(arm) || hidden.add(arm);
    button.setAttribute("aria-pressed", String(!hidden.has(arm)));
    drawAll();
  });
}
for (const button of buttons("view")) {
  button.addEventListener("click", () => {
    chosenView = button.dataset.view;
    for (const other of buttons("view")) other.setAttribute("aria-pressed", String(other === button));
    drawAll();
  });
}

// Sorted by data-sort: numbers as numbers, words as words, and what has no value last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  table.tHead.addEventListener("click", event => {
    const head = event.target.closest("button")?.closest("th");
    if (!head) return;
    const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1, body = table.tBodies[0];
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    table.classList.add("sorted");
    const key = row => row.cells[head.cellIndex].dataset.sort;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const x = Number(a), y = Number(b);
      return way * (isNaN(x) || isNaN(y) ? a.localeCompare(b) : x === y ? 0 : x - y);
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  });
}

function shade(scroll) {
  scroll.parentElement.classList.toggle("more-right", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 2);
  scroll.parentElement.classList.toggle("more-below", scroll.scrollTop + scroll.clientHeight < scroll.scrollHeight - 2);
}
const resized = new ResizeObserver(entries => entries.forEach(entry => shade(entry.target)));
for (const scroll of document.querySelectorAll(".scroll")) {
  scroll.addEventListener("scroll", () => shade(scroll), { passive: true });
  resized.observe(scroll);
}

dark.addEventListener("change", drawAll);
// A plot that was folded away had no width, and one whose page was turned has another: both are drawn anew.
const turned = new ResizeObserver(() => plots.filter(p => p.isNarrow !== document.getElementById(`plot-${p.id}`).clientWidth < NARROW).forEach(draw));
plots.forEach(plot => turned.observe(document.getElementById(`plot-${plot.id}`)));
drawAll();
