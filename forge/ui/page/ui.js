"use strict";

const at = (id) => document.getElementById(id);
const page = document.body.dataset;

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children);
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setStatus(node, status) {
  setText(node, status);
  node.dataset.status = status.replaceAll(" ", "-");
}

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)}s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)}h ${String(Math.floor(seconds % 3600 / 60)).padStart(2, "0")}m`;
  return `${Math.floor(seconds / 86400)}d ${String(Math.floor(seconds % 86400 / 3600)).padStart(2, "0")}h`;
}

/* A stream of changes. It is closed while the page is not seen, and opened again where it was left. */
function follow(address, take) {
  let source = null;
  const open = () => {
    if (source !== null || document.hidden) return;
    source = new EventSource(address());
    source.onopen = () => setText(at("link"), "");
    source.onmessage = (event) => take(JSON.parse(event.data), event.lastEventId);
    source.onerror = () => {
      setText(at("link"), "The server does not answer; what is shown may be old.");
      if (source !== null && source.readyState === EventSource.CLOSED) {  // refused: it is not tried again by itself
        close();
        setTimeout(open, 5000);
      }
    };
  };
  const close = () => {
    if (source !== null) source.close();
    source = null;
  };
  document.addEventListener("visibilitychange", () => document.hidden ? close() : open());
  addEventListener("pagehide", close);
  addEventListener("pageshow", open);
  open();
  return { restart: () => { close(); open(); }, close };
}

/* The list of runs. */

function startList() {
  const body = at("runs").tBodies[0], rows = new Map(), first = Number(page.first);
  const num = at("runs").tHead.rows[0].cells.length - 3;
  let version = page.version, order = [], limit = first, isDue = false;

  const index = (row) => {
    const [name, status] = row.cells;
    row.words = `${name.querySelector("a").textContent} ${name.querySelector(".about").textContent}`.toLowerCase();
    row.status = status.firstChild.dataset.status;
    return sorter.index(row);
  };
  const showAge = (cell) => setText(cell, `${duration(Math.max(0, Date.now() / 1000 - Number(cell.dataset.time)))} ago`);
  const showAges = () => body.querySelectorAll(".when").forEach(showAge);
  const arrange = () => {  // only some rows are in the page: laying out thousands takes seconds
    isDue = false;
    sorter.sort(order);
    const words = at("text").value.toLowerCase().split(/\s+/), status = at("status").value;
    const found = order.filter((row) => (!status || row.status === status) && words.every((word) => row.words.includes(word)));
    const shown = found.slice(0, limit);
    if (shown.length !== body.rows.length || shown.some((row, i) => row !== body.rows[i])) {
      const focused = document.activeElement;
      body.replaceChildren(...shown);
      if (body.contains(focused)) focused.focus();
    }
    const all = `${order.length.toLocaleString("en")} run${order.length === 1 ? "" : "s"}`;
    setText(at("count"), found.length === order.length ? all : `${found.length.toLocaleString("en")} of ${all}`);
    at("none").hidden = found.length > 0;
    at("more").hidden = found.length <= limit;
    setText(at("more"), `Show ${Math.min(first, found.length - limit)} more of ${(found.length - limit).toLocaleString("en")}`);
    showAges();
  };
  const filter = () => {
    const query = new URLSearchParams();
    if (at("text").value) query.set("q", at("text").value);
    if (at("status").value) query.set("state", at("status").value);
    if (sorter.text()) query.set("sort", sorter.text());
    history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
    limit = first;
    arrange();
  };
  const sorter = makeSorter(at("runs"), at("sort"), () => {
    order.forEach(sorter.index);
    filter();
  });
  const more = () => {
    limit += first;
    arrange();
  };
  const add = (key) => {
    const cells = Array.from({ length: num }, (_, i) => make("td", { class: `number c${i}` }));
    const name = make("th", { scope: "row", class: "name" }, make("a", { href: `/runs/${key}` }),
      make("span", { class: "about" }), make("span", { class: "problem" }));
    const row = make("tr", { "data-key": key }, name, make("td", {}, make("span", { class: "pill" })), ...cells,
      make("td", { class: "number when" }));
    rows.set(key, row);
    order.unshift(row);
    return row;
  };
  const take = (key, texts) => {
    if (texts === null) {
      order = order.filter((row) => row !== rows.get(key));
      rows.delete(key);
      isDue = true;
      return;
    }
    const isNew = !rows.has(key);
    const row = isNew ? add(key) : rows.get(key);
    const [name, status, updated, about, problem, ...cells] = texts;
    const [link, tags, why] = row.cells[0].children;
    const before = isNew ? "" : `${row.words} ${row.status}`;
    setText(link, name);
    setText(tags, about);
    setText(why, problem);
    setStatus(row.cells[1].firstChild, status);
    cells.forEach((text, i) => setText(row.cells[2 + i], text));
    const when = row.cells[row.cells.length - 1];
    when.dataset.time = updated;
    showAge(when);
    isDue = index(row) || isDue;
    isDue ||= before !== `${row.words} ${row.status}`;
  };

  const query = new URLSearchParams(location.search);
  sorter.read(query.get("sort") || "");
  order = [...body.rows, ...at("rest").content.children];
  for (const row of order) {
    rows.set(row.dataset.key, row);
    index(row);
  }
  at("text").value = query.get("q") || "";
  at("status").value = query.get("state") || "";
  arrange();
  at("text").addEventListener("input", filter);
  at("status").addEventListener("change", filter);
  at("filter").addEventListener("submit", (event) => event.preventDefault());
  at("more").addEventListener("click", more);
  new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && more()).observe(at("more"));
  setInterval(showAges, 10000);
  follow(() => `/events?since=${version}`, (body, id) => {
    if (body.reload) location.reload();
    version = id || version;
    if (body.note !== undefined) {
      setText(at("note"), body.note);
      at("note").hidden = !body.note;
    }
    const runs = body.state?.runs || {};
    for (const key in runs) take(key, runs[key]);
    at("unread")?.remove();
    if (isDue) arrange();
  });
}

/* One run. */

const MAX_LOG_CHARS = 400000;
const sections = {};

function keyed(section, key, create) {
  const known = sections[section] ||= new Map();
  if (!known.has(key)) known.set(key, create());
  return known.get(key);
}

function forget(section, key, ...others) {
  for (const name of [section, ...others]) {
    sections[name]?.get(key)?.remove();
    sections[name]?.delete(key);
  }
}

function addTo(id, node) {
  at(id).append(node);
  at(id).closest("section")?.removeAttribute("hidden");
  return node;
}

function keepAtEnd(node, change) {
  const isAtEnd = node.scrollTop + node.clientHeight >= node.scrollHeight - 8;
  change();
  if (isAtEnd) node.scrollTop = node.scrollHeight;
}

function takeFact(id, key, texts) {
  const [name, text] = keyed(id, key, () => {
    const pair = [addTo(id, make("dt", {})), addTo(id, make("dd", {}))];
    return Object.assign(pair, { remove: () => pair.forEach((node) => node.remove()) });
  });
  setText(name, texts[0]);
  setText(text, texts[1]);
}

function takeRow(id, key, texts, classes) {
  const row = keyed(id, key, () => addTo(`${id}-body`, make("tr", {}, ...texts.map((_, i) => make("td", { class: classes[i] || "" })))));
  texts.forEach((text, i) => {
    const cell = row.cells[i];
    if (id === "trials" && i === 0) {
      if (!cell.firstChild) cell.append(make("a", { href: `${page.path}/trials/${key}` }));
      setText(cell.firstChild, text);
      row.classList.toggle("chosen", text.startsWith("*"));
    } else if (id === "trials" && i === 1) {
      if (!cell.firstChild) cell.append(make("span", { class: "pill" }));
      setStatus(cell.firstChild, text);
    } else setText(cell, text);
  });
}

const takers = {
  status: (key, [status]) => {
    setStatus(at("status"), status);
    if (at("stop")) {
      at("stop").hidden = status !== "running";
      if (status !== "running") at("stop").disabled = false;
    }
  },
  problem: (key, [text]) => setText(keyed("problem", key, () => addTo("problem", make("p", { class: "card fail" }))), text),
  tiles: (key, [value, note]) => {
    const tile = keyed("tiles", key, () => addTo("tiles", make("div", { class: "card" },
      make("span", { class: "soft" }, key), make("b", {}), make("span", { class: "soft" }))));
    setText(tile.children[1], value);
    setText(tile.children[2], note);
  },
  time: (key, [share, seconds]) => {
    const part = keyed("parts", key, () => addTo("bar", make("i", { "data-part": key })));
    part.style.width = `${share}%`;
    const line = keyed("time", key, () => addTo("time", make("span", {}, make("i", { "data-part": key }), make("span", {}))));
    setText(line.lastChild, `${key} ${share} % · ${duration(Number(seconds))}`);
    at("bar").setAttribute("aria-label", [...at("time").children].map((one) => one.textContent).join(", "));
  },
  goodput: (key, texts) => takeFact("goodput", key, texts),
  cost: (key, texts) => takeFact("cost", key, texts),
  results: (key, texts) => takeFact("results", key, texts),
  changes: (key, texts) => takeRow("changes", key, texts, ["number", "", "", "number", "text"]),
  alerts: (key, texts) => {
    takeRow("alerts", key, texts, ["date", "whole", "text", "text"]);
    at("alerts").hidden = false;
    at("no-alerts").hidden = true;
  },
  trials: (key, texts) => takeRow("trials", key, texts, ["number", "", "number", "number", "text", "number"]),
  events: (key, [text]) => keepAtEnd(at("events"), () => setText(keyed("events", key, () => addTo("events", make("p", {}))), text)),
};

function takeState(state) {
  for (const section in state) {
    for (const key in state[section]) {
      const texts = state[section][key];
      if (texts === null) forget(section, key, ...(section === "time" ? ["parts"] : []));
      else takers[section]?.(key, texts);
    }
  }
}

function takePoints(points) {
  for (const figure in points) {
    const chart = at(figure);
    if (!chart?.data) continue;
    const x = [], y = [], traces = [];
    for (const name in points[figure]) {
      const trace = chart.data.findIndex((one) => one.name === name);
      if (trace < 0) return draw();
      traces.push(trace);
      x.push(points[figure][name][0]);
      y.push(points[figure][name][1]);
    }
    const extended = Object.keys(points[figure]).length && Plotly.extendTraces(chart, { x, y }, traces);
    if (extended && (chart.numAdded = (chart.numAdded || 0) + 1) > 600) draw();  // means over steps replace the single ones
  }
}

let drawing = null, isDue = false, plotly = null;

/* plotly.js is large: the rest of the page does not wait for it. */
function loadPlotly() {
  plotly ||= new Promise((resolve, reject) => {
    const script = make("script", { src: page.plotly });
    script.onload = resolve;
    script.onerror = () => {
      plotly = null;
      reject(new Error("plotly.js cannot be loaded"));
    };
    document.head.append(script);
  });
  return plotly;
}

function draw() {
  isDue = true;
  drawing ||= drawAll().finally(() => setTimeout(() => {
    drawing = null;
    if (isDue) draw();
  }, 3000));
}

async function drawAll() {
  isDue = false;
  const [response] = await Promise.all([fetch(`${page.path}/figures`), loadPlotly()]).catch(() => [null]);
  if (!response?.ok) return;
  for (const figure of await response.json()) {
    const card = keyed("figures", figure.key, () => addTo("figures", make("section", { class: "card" },
      make("h2", {}, figure.title), make("p", { class: "soft" }), make("div", { role: "img", "aria-label": figure.title },
      make("div", { class: "chart", id: figure.key, "aria-hidden": "true" })))));
    setText(card.children[1], figure.note);
    const chart = card.children[2].firstChild;
    chart.hidden = !figure.spec;
    if (!figure.spec) continue;
    chart.style.height = `${figure.spec.layout.height}px`;
    chart.numAdded = 0;
    await Plotly.react(chart, figure.spec.data, figure.spec.layout, { responsive: true, displayModeBar: false });
  }
  at("js-plotly-tester")?.setAttribute("aria-hidden", "true");  // it measures texts
}

async function stopRun() {
  at("stop").disabled = true;
  const headers = { "X-Forge-Csrf": document.querySelector("meta[name=csrf]").content };
  const answer = await fetch(`${page.path}/stop`, { method: "POST", headers }).catch(() => null);
  const text = answer ? await answer.text() : "The server does not answer.";
  takers.problem("stop", [text]);
  if (!answer?.ok) at("stop").disabled = false;
}

function startRun() {
  for (const id of ["changes", "alerts", "trials"]) at(id)?.tBodies[0].setAttribute("id", `${id}-body`);
  const stream = follow(() => {
    const log = at("log").value;
    return `${page.path}/events${log ? `?log=${encodeURIComponent(log)}` : ""}`;
  }, (body) => {
    if (body.first) {  // everything is sent again
      for (const section in sections) {
        if (section === "figures") continue;
        for (const key of [...sections[section].keys()]) {
          if (section === "parts" || body.state?.[section]?.[key] || (section === "problem" && key === "stop")) continue;
          forget(section, key);
        }
      }
      at("tail").replaceChildren();
      at("tiles").removeAttribute("aria-busy");
    }
    if (body.gone) {
      takers.problem("gone", [body.gone]);
      if (at("stop")) at("stop").hidden = true;
      stream.close();
      return;
    }
    if (body.state) takeState(body.state);
    if (body.draw) draw();
    if (body.points) takePoints(body.points);
    if (body.log) {
      keepAtEnd(at("tail"), () => {
        at("tail").append(body.log);
        while (at("tail").textContent.length > MAX_LOG_CHARS && at("tail").childNodes.length > 1) at("tail").firstChild.remove();
      });
    }
  });
  at("log").addEventListener("change", () => {
    at("tail").hidden = !at("log").value;
    stream.restart();
  });
  at("stop")?.addEventListener("click", () => at("ask").showModal());
  at("ask")?.addEventListener("close", () => {
    if (at("ask").returnValue === "stop") stopRun();
    at("ask").returnValue = "";
  });
}

/* The page that asks for the token; a link that forge ui prints has it after #, which no server is sent. */

function startLogin() {
  const use = () => {
    if (location.hash.length < 2) return;
    at("token").value = location.hash.slice(1);
    history.replaceState(null, "", location.pathname);
    at("login").requestSubmit();
  };
  addEventListener("hashchange", use);
  use();
}

({ list: startList, run: startRun, login: startLogin })[page.page]();
