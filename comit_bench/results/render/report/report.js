"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  document.documentElement.classList.add("js");

  /** An element; texts only ever become text. */
  function make(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (name in element && name !== "role") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const parsed = new Map();
  function data(name) {
    if (!parsed.has(name)) {
      const block = byId("data-" + name);
      parsed.set(name, block ? JSON.parse(block.textContent) : null);
    }
    return parsed.get(name);
  }

  // ------------------------------------------------------------------ light and dark
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // ------------------------------------------------------------------ sorting
  function sortBy(button) {
    const head = button.closest("th");
    const table = head.closest("table");
    const body = table.tBodies[0];
    const index = Array.from(head.parentNode.children).indexOf(head);
    const text = button.dataset.text === "1";
    const first = text || button.dataset.up === "0" ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const before = head.getAttribute("aria-sort");
    const now = before === first ? other : first;
    all("th[aria-sort]", table).forEach((one) => one.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", now);
    const sign = now === "ascending" ? 1 : -1;
    const keyed = Array.from(body.rows, (row) => {
      const cell = row.cells[index];
      const key = text ? cell.textContent : cell.dataset.v === undefined ? null : Number(cell.dataset.v);
      return [key, row];
    });
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return sign * (text ? a.localeCompare(b) : a - b);
    });
    body.append(...keyed.map(([, row]) => row));
  }
  all("button.sort").forEach((button) => button.addEventListener("click", () => sortBy(button)));

  // ------------------------------------------------------------------ filtering
  const nameFilter = byId("f-name");
  const taskFilter = byId("f-task");
  const kindFilters = all("#filters input[data-kind]");
  function filter() {
    const words = nameFilter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    const kinds = new Set(kindFilters.filter((box) => box.checked).map((box) => box.dataset.kind));
    const wanted = (row) => {
      const label = row.cells[0].textContent.toLowerCase();
      return kinds.has(row.dataset.kind) && (!words.length || words.some((word) => label.includes(word)));
    };
    const seen = new Set();
    for (const row of all("table.scores tbody tr")) {
      row.hidden = !wanted(row);
      if (!row.hidden && row.dataset.kind !== "published") seen.add(row.cells[0].textContent);
    }
    for (const section of all(".task-section")) {
      const rows = all("tbody tr", section);
      const chosen = !taskFilter.value || section.id === taskFilter.value;
      section.hidden = !chosen || rows.every((row) => row.hidden);
    }
    byId("overview").hidden = Boolean(taskFilter.value);
    const published = byId("published");
    if (published) published.hidden = all(".task-section", published).every((one) => one.hidden);
    byId("f-count").textContent = seen.size + (seen.size === 1 ? " row" : " rows");
  }
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
  function revealTarget() {
    const target = location.hash.length > 1 && byId(decodeURIComponent(location.hash.slice(1)));
    if (target && target.closest("#scores") && target.hidden) {
      byId("filters").reset();
      filter();
      target.scrollIntoView();
    }
  }
  window.addEventListener("hashchange", revealTarget);
  all(".card a").forEach((link) => link.addEventListener("click", () => setTimeout(revealTarget)));

  // ------------------------------------------------------------------ numbers: arrow keys, hints, drawer
  all("table.scores").forEach((table) => {
    const first = table.querySelector("button.cell");
    if (first) first.tabIndex = 0;
    table.addEventListener("keydown", (event) => {
      const cell = event.target.closest("button.cell");
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!cell || !step) return;
      event.preventDefault();
      const rows = Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
      let [row, column] = [rows.indexOf(cell.closest("tr")), cell.closest("td").cellIndex];
      for (;;) {
        [row, column] = [row + step[0], column + step[1]];
        if (!rows[row] || !rows[row].cells[column]) return;
        const next = rows[row].cells[column].querySelector("button.cell");
        if (next) {
          focusCell(table, next);
          return;
        }
      }
    });
    table.addEventListener("focusin", (event) => {
      const cell = event.target.closest("button.cell");
      if (cell) focusCell(table, cell);
    });
  });
  function focusCell(table, cell) {
    all('button.cell[tabindex="0"]', table).forEach((one) => { one.tabIndex = -1; });
    cell.tabIndex = 0;
    if (document.activeElement !== cell) cell.focus();
  }

  const whole = (value) => Math.abs(value) >= 100 ? value.toFixed(1) : Math.abs(value) >= 1 ? value.toFixed(2) : value.toFixed(4);
  const unitOf = (metric) => metric.unit ? " " + metric.unit : "";
  function behind(cell) {
    const record = data("records")[Number(cell.dataset.r)];
    return [record, record.metrics[cell.dataset.m]];
  }
  function factsOf(record, metric) {
    const facts = [["mean", whole(metric.value) + unitOf(metric)]];
    if (metric.interval) facts.push(["95 % interval", metric.interval.map(whole).join(" to ") + unitOf(metric)]);
    if (metric.std !== null) facts.push(["spread over seeds", "± " + whole(metric.std) + unitOf(metric)]);
    if (metric.stderr !== null) facts.push(["standard error", whole(metric.stderr) + unitOf(metric)]);
    if (metric.per_seed.length > 1) facts.push(["by seed", metric.per_seed.map(whole).join(", ")]);
    if (metric.n) facts.push(["n", metric.n.toLocaleString("en")]);
    if (metric.chance !== null) facts.push(["chance", whole(metric.chance) + unitOf(metric)]);
    facts.push(["direction", metric.higher_is_better ? "higher is better" : "lower is better"]);
    if (metric.unranked) facts.push(["ranking", "rows must not be ranked by this metric"]);
    return facts;
  }

  const tip = byId("tip");
  let tipped = null;
  function showTip(cell) {
    const [record, metric] = behind(cell);
    const lines = [whole(metric.value) + unitOf(metric) + (metric.std === null ? "" : " ± " + whole(metric.std) + " over " + metric.per_seed.length + " seeds")];
    if (metric.interval) lines.push("95 % interval " + metric.interval.map(whole).join(" to "));
    lines.push((metric.n ? "n = " + metric.n.toLocaleString("en") : "published") + (metric.chance === null ? "" : ", chance " + whole(metric.chance)));
    lines.push("protocol " + record.digest.slice(7, 15) + ", " + record.task);
    tip.replaceChildren(...lines.map((line) => make("div", { textContent: line })));
    tip.hidden = false;
    tipped = cell;
    cell.setAttribute("aria-describedby", "tip");
    const box = cell.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.right - tip.offsetWidth), innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.left = left + "px";
    tip.style.top = (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
  }
  function hideTip() {
    tip.hidden = true;
    if (tipped) tipped.removeAttribute("aria-describedby");
    tipped = null;
  }
  const scores = byId("scores");
  scores.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("button.cell");
    if (cell) showTip(cell);
    else hideTip();
  });
  scores.addEventListener("mouseleave", hideTip);
  scores.addEventListener("focusin", (event) => {
    if (event.target.matches("button.cell:focus-visible")) showTip(event.target);
  });
  scores.addEventListener("focusout", hideTip);
  window.addEventListener("scroll", () => {
    if (tipped && tipped === document.activeElement) showTip(tipped);
    else hideTip();
  }, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  const drawer = byId("drawer");
  const pairs = (entries) => make("dl", { className: "pairs" }, ...entries.map(([key, value]) =>
    make("div", {}, make("dt", { textContent: key }), make("dd", { textContent: value }))));
  function openDrawer(cell) {
    hideTip();
    const [record, metric] = behind(cell);
    byId("drawer-title").textContent = record.name + " · " + record.task + " · " + cell.dataset.m;
    const body = byId("drawer-body");
    const add = (title, ...nodes) => body.append(make("h3", { textContent: title }), ...nodes);
    body.replaceChildren(
      make("p", { className: "fine", textContent: record.title + (record.origin === "paper" ? " · a published number, not measured here" : "") }),
      make("p", { className: "value", textContent: cell.textContent.replace(/ \(.*$/, "") + unitOf(metric) }),
      pairs(factsOf(record, metric).slice(1)),
    );
    if (record.incomplete.length) add("Incomplete", pairs(record.incomplete.map((why, i) => [String(i + 1), why])));
    add("Protocol of the column", pairs(record.protocol));
    if (record.side.length) add("Protocol of the tokenizer", pairs([["weights", record.weights], ...record.side]));
    const origin = [["digest of the protocol", record.digest], ["made", record.created], ["origin", record.origin]];
    if (record.counts) origin.push(["samples", "train " + record.counts.train + ", early stop " + record.counts.early_stop + ", report " + record.counts.report + ", broken " + record.counts.broken]);
    if (record.origin !== "paper") origin.push(["seeds", record.seeds.join(", ")]);
    for (const [stage, seconds] of Object.entries(record.timings)) origin.push(["seconds, " + stage, String(seconds)]);
    add("Record", pairs(origin));
    if (record.notes.length) add("Notes", make("div", {}, ...record.notes.map((note) => make("p", { className: "fine", textContent: note }))));
    if (record.environment) add("Environment", pairs(record.environment.filter(([, value]) => value !== "None")));
    if (record.command) add("Made by", make("pre", { textContent: record.command }));
    drawer.showModal();
    drawer.scrollTop = 0;
  }
  scores.addEventListener("click", (event) => {
    const cell = event.target.closest("button.cell");
    if (cell) openDrawer(cell);
  });
  byId("drawer-close").addEventListener("click", () => drawer.close());
  drawer.addEventListener("click", (event) => { if (event.target === drawer) drawer.close(); });

  // ------------------------------------------------------------------ differences
  const grid = byId("d-grid");
  function drawGrid() {
    const tests = data("tests")[byId("d-task").value] || [];
    const names = [];
    const found = new Map();
    for (const test of tests) {
      for (const name of [test.a, test.b]) if (!names.includes(name)) names.push(name);
      found.set(test.a + "\n" + test.b, [test.sign, test]);
      found.set(test.b + "\n" + test.a, [-test.sign, test]);
    }
    const wins = (name) => names.reduce((sum, other) => sum + (found.get(name + "\n" + other) || [0])[0], 0);
    names.sort((a, b) => wins(b) - wins(a));
    const word = tests.length && !tests[0].ranked ? ["higher", "lower"] : ["better", "worse"];
    const head = make("tr", {}, make("td"), ...names.map((name, i) => make("th", { scope: "col", title: name, textContent: String(i + 1) })));
    const rows = names.map((name, i) => make("tr", {}, make("th", { scope: "row", textContent: name + "  " + (i + 1) }),
      ...names.map((other) => {
        const [sign, test] = found.get(name + "\n" + other) || [0, null];
        if (!test) return make("td");
        const said = sign > 0 ? word[0] : sign < 0 ? word[1] : "not told apart";
        const button = make("button", {
          type: "button", className: sign > 0 ? "win" : sign < 0 ? "lose" : "", textContent: sign > 0 ? "+" : sign < 0 ? "−" : "=",
          title: test.text, "aria-label": name + " against " + other + ": " + said, "aria-pressed": "false",
        });
        button.addEventListener("click", () => {
          all('button[aria-pressed="true"]', grid).forEach((one) => one.setAttribute("aria-pressed", "false"));
          button.setAttribute("aria-pressed", "true");
          byId("d-text").textContent = test.text;
        });
        return make("td", {}, button);
      })));
    grid.replaceChildren(make("table", { className: "grid-table" },
      make("caption", { className: "sr", textContent: "Row against column" }), make("thead", {}, head), make("tbody", {}, ...rows)));
    byId("d-text").textContent = "+ the row is significantly " + word[0] + " than the column, − " + word[1] + ", = they cannot be told apart.";
  }
  function startGrid() {
    const tasks = Object.keys(data("tests"));
    byId("d-task").append(...tasks.map((task) => make("option", { value: task, textContent: task })));
    if (tasks.length) drawGrid();
    else grid.replaceChildren(make("p", { className: "meta", textContent: "Nothing could be tested: a test needs two measured rows with outcomes on one task." }));
    byId("d-task").addEventListener("change", drawGrid);
  }

  // ------------------------------------------------------------------ samples
  const stage = byId("s-stage");
  let view = null;
  let samples = [];
  let shown = [];
  let at = 0;
  const choice = (id) => Number(byId(id).value);
  const metricNow = () => view.metrics[choice("s-metric")];
  const valueOf = (sample, row) => sample.values[choice("s-metric")][row];
  const isRight = (sample, row) => valueOf(sample, row) > 0.5;
  const fill = (id, texts, selected) => byId(id).replaceChildren(...texts.map((text, i) =>
    make("option", { value: String(i), textContent: text, selected: i === selected })));

  function openTask() {
    ({ view, samples } = data("samples-" + byId("s-task").value));
    const names = view.rows.map((row) => row.label);
    fill("s-metric", view.metrics.map((metric) => metric.name), 0);
    const b = view.rows.findIndex((row, i) => i > 0 && row.kind !== "reference");
    fill("s-a", names, 0);
    fill("s-b", names, b > 0 ? b : Math.min(1, names.length - 1));
    openMetric();
  }
  const RIGHT = [["all", "all images"], ["ab", "A right, B wrong"], ["ba", "B right, A wrong"], ["both", "both right"], ["neither", "both wrong"], ["none", "everybody wrong"]];
  const BETTER = [["all", "all images"], ["ab", "A better than B"], ["ba", "B better than A"]];
  function openMetric() {
    const before = byId("s-show").value || "all";
    const options = metricNow().binary ? RIGHT : BETTER;
    byId("s-show").replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text, selected: value === before })));
    choose();
  }
  function choose() {
    const [a, b, how] = [choice("s-a"), choice("s-b"), byId("s-show").value];
    const metric = metricNow();
    const sign = metric.up ? 1 : -1;
    const gap = (sample) => sign * ((valueOf(sample, a) ?? NaN) - (valueOf(sample, b) ?? NaN));
    const text = byId("s-text").value.trim().toLowerCase();
    const keep = {
      all: () => true,
      ab: (s) => metric.binary ? isRight(s, a) && valueOf(s, b) !== null && !isRight(s, b) : gap(s) > 0,
      ba: (s) => metric.binary ? isRight(s, b) && valueOf(s, a) !== null && !isRight(s, a) : gap(s) < 0,
      both: (s) => isRight(s, a) && isRight(s, b),
      neither: (s) => valueOf(s, a) !== null && valueOf(s, b) !== null && !isRight(s, a) && !isRight(s, b),
      none: (s) => view.rows.every((row, i) => row.kind === "reference" || !isRight(s, i)),
    }[how];
    shown = samples.filter((s) => keep(s) && (!text || (s.id + " " + (s.truth || "")).toLowerCase().includes(text)));
    if (!metric.binary && how === "ab") shown.sort((x, y) => gap(y) - gap(x));
    if (!metric.binary && how === "ba") shown.sort((x, y) => gap(x) - gap(y));
    at = 0;
    const n = view.total.toLocaleString("en");
    const wins = { ab: metric.wins[a][b], ba: metric.wins[b][a] };
    let told = shown.length + " of the " + samples.length + " images shown here.";
    if (wins[how] !== undefined) told += " Of all " + n + " images: " + wins[how].toLocaleString("en") + ".";
    else if (how === "both") told += " Of all " + n + " images: " + (metric.right[a] - metric.wins[a][b]).toLocaleString("en") + ".";
    else if (how === "all") told += " " + n + " were scored; on " + wins.ab.toLocaleString("en") + (metric.binary ? " A is right and B wrong, on " : " A is better than B, on ") + wins.ba.toLocaleString("en") + " the other way round.";
    byId("s-count").textContent = told;
    drawStrip();
    drawSample();
  }
  function drawStrip() {
    byId("s-strip").replaceChildren(...shown.map((sample, i) => {
      const inside = sample.image ? make("img", { src: sample.image, alt: "", loading: "lazy", width: 48, height: 48 }) : make("span", { className: "word", textContent: sample.truth || sample.id });
      const button = make("button", { type: "button", tabIndex: i ? -1 : 0, "aria-label": "Image " + (i + 1) + ": " + (sample.truth || sample.id) }, inside);
      button.addEventListener("click", () => { at = i; drawSample(); });
      return button;
    }));
  }
  function drawSample() {
    const sample = shown[at];
    byId("s-prev").disabled = at <= 0;
    byId("s-next").disabled = at >= shown.length - 1;
    byId("s-place").textContent = shown.length ? at + 1 + " / " + shown.length : "none";
    all("button", byId("s-strip")).forEach((one, i) => {
      one.setAttribute("aria-current", i === at ? "true" : "false");
      one.tabIndex = i === at ? 0 : -1;
    });
    const body = byId("s-table").tBodies[0];
    const images = byId("s-images");
    if (!sample) {
      images.replaceChildren(make("div", { className: "no-image", textContent: "No image among those shown here." }));
      byId("s-truth").textContent = byId("s-id").textContent = byId("s-note").textContent = "";
      body.replaceChildren();
      return;
    }
    const told = sample.truth || "image";
    const picture = (source, alt) => {
      const image = make("img", { alt });
      image.addEventListener("load", () => image.classList.toggle("big", image.naturalWidth > 96));
      image.src = source;
      return image;
    };
    images.replaceChildren(...(sample.image
      ? [picture(sample.image, "Sample " + sample.id + ": " + told), ...(sample.mask ? [picture(sample.mask, "Mask of the salient object")] : [])]
      : [make("div", { className: "no-image", textContent: view.why || "This image is not at hand." })]));
    byId("s-note").textContent = sample.image
      ? "As tokenizers see it: " + view.seen + (view.others.length ? "; others declare " + view.others.join(" and ") : "") + (sample.mask ? ". Right: the object's mask." : "")
      : "";
    byId("s-truth").textContent = sample.truth ? "Truth: " + sample.truth : "";
    byId("s-id").textContent = sample.id;
    const metric = metricNow();
    const answered = Boolean(sample.answers);
    byId("s-table").tHead.replaceChildren(make("tr", {}, ...["tokenizer", ...(answered ? ["answer"] : []), metric.name + unitOf(metric)].map((text) => make("th", { scope: "col", textContent: text }))));
    const [a, b] = [choice("s-a"), choice("s-b")];
    body.replaceChildren(...view.rows.map((row, i) => {
      const letter = i === a ? "A" : i === b ? "B" : "";
      const value = valueOf(sample, i);
      const seeds = view.seeds[i];
      let verdict;
      if (value === null) verdict = make("td", { className: "verdict-cell", textContent: "–" });
      else if (metric.binary) {
        const right = Math.round(value * seeds);
        verdict = make("td", { className: "verdict-cell " + (isRight(sample, i) ? "right" : "wrong"), textContent: (isRight(sample, i) ? "✓ right" : "✗ wrong") + (seeds > 1 && right > 0 && right < seeds ? ", " + right + " of " + seeds + " seeds" : "") });
      } else verdict = make("td", { className: "verdict-cell", textContent: (value * metric.scale).toFixed(metric.decimals) });
      const said = answered ? make("td", { textContent: (sample.answers[i] || []).map(([text, times]) => text + (seeds > 1 && times < seeds ? " (" + times + " of " + seeds + ")" : "")).join(", ") || "–" }) : null;
      return make("tr", { className: letter ? "chosen" : "" }, make("th", { scope: "row" }, row.label, letter ? make("span", { className: "letter", textContent: letter }) : null), said, verdict);
    }));
  }
  function move(step, event) {
    const next = Math.min(Math.max(at + step, 0), shown.length - 1);
    event.preventDefault();
    if (next === at || next < 0) return;
    at = next;
    drawSample();
    const strip = byId("s-strip");
    const current = strip.children[at];
    if (strip.contains(document.activeElement)) current.focus();
    else strip.scrollTo({ top: current.offsetTop - strip.offsetTop - 60, left: current.offsetLeft - strip.offsetLeft - 120 });
  }
  function startSamples() {
    openTask();
    byId("s-task").addEventListener("change", openTask);
    byId("s-metric").addEventListener("change", openMetric);
    for (const id of ["s-a", "s-b", "s-show"]) byId(id).addEventListener("change", choose);
    byId("s-text").addEventListener("input", choose);
    byId("s-prev").addEventListener("click", (event) => move(-1, event));
    byId("s-next").addEventListener("click", (event) => move(1, event));
    const steps = { ArrowLeft: -1, k: -1, ArrowRight: 1, j: 1, Home: -1e9, End: 1e9 };
    byId("samples").addEventListener("keydown", (event) => {
      if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key in steps) move(steps[event.key], event);
    });
  }

  /** Starts a part when it comes near, so that the page is there at once. */
  function whenNear(section, start) {
    if (!section) return;
    const watch = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        watch.disconnect();
        start();
      }
    }, { rootMargin: "600px" });
    watch.observe(section);
  }
  whenNear(byId("differences"), startGrid);
  if (stage) whenNear(byId("samples"), startSamples);

  // ------------------------------------------------------------------ copying
  all(".copier").forEach((button) => button.addEventListener("click", async () => {
    const text = button.parentNode.querySelector("pre");
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
})();
