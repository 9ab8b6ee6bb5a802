"use strict";
// Fills the charts and the strip from the data of the page; the slider moves over the plans.
// Whatever came from outside (names of modules, paths) is only ever set as text.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const told = page.data;
  const find = (id) => document.getElementById(id);
  const hash = () => new URLSearchParams(location.hash.slice(1));
  const views = {};
  let at = told.chosen;

  const inUnits = (value, size, digits) =>
    (value / size).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  function bytes(n) {
    if (n >= 2 ** 30 - 2 ** 20 / 20) return `${inUnits(n, 2 ** 30, 2)} GiB`;
    if (n >= 2 ** 20 - 2 ** 10 / 20) return `${inUnits(n, 2 ** 20, 1)} MiB`;
    return n >= 1024 ? `${inUnits(n, 1024, 1)} KiB` : `${n} B`;
  }
  const seconds = (s) => (s >= 1 ? `${s.toFixed(2)} s` : `${(s * 1e3).toPrecision(3)} ms`);
  const percent = (part) => `${(100 * part).toFixed(1)} %`;

  // ---- tables; columns come as differences from row to row
  function sums(column) {
    let total = 0;
    return column.map((difference) => (total += difference));
  }
  function timelineRows(choice) {
    const { memory, time } = page.axes;
    const columns = choice.sizes.map(sums);
    const rows = sums(choice.at_ns).map((ns, i) => {
      const row = { t: ns / 1e9 / time.size, total: 0 };
      row.phase = told.texts[choice.phase[i]];
      row.owner = told.texts[choice.at[i]];
      told.categories.forEach((name, k) => {
        row[name] = columns[k][i] / memory.size;
        row.total += row[name];
      });
      return row;
    });
    rows.push({ ...rows[rows.length - 1], t: choice.end_ns / 1e9 / time.size });
    return rows;
  }
  function phaseRows(choice) {
    const size = 1e9 * page.axes.time.size;
    return choice.phases.map(([phase, start, end]) => ({ phase, start: start / size, end: end / size }));
  }
  function markRows(choice, rows, withBudget) {
    const peak = rows.reduce((most, row) => (row.total > most.total ? row : most));
    const marks = [{ kind: "peak", t: peak.t, total: peak.total }];
    if (withBudget && choice.budget <= page.axes.top_bytes * 1.1) {
      const total = choice.budget / page.axes.memory.size;
      marks.push({ kind: "budget", t: 0, total, label: bytes(choice.budget) });
    }
    return marks;
  }
  function timelineTables(choice, withBudget) {
    const timeline = timelineRows(choice);
    return { timeline, phases: phaseRows(choice), marks: markRows(choice, timeline, withBudget) };
  }

  // ---- charts
  const isDark = () => document.documentElement.dataset.theme === "dark";
  // Vega-Lite forgets that the datum of a Voronoi cell wraps the row, where a tooltip is text.
  function patch(spec) {
    for (const mark of spec.marks.filter((each) => (each.name || "").endsWith("_voronoi"))) {
      const tooltip = mark.encode.update.tooltip;
      tooltip.signal = tooltip.signal.replace(/(?<!\.)datum\["/g, 'datum.datum["');
    }
    return spec;
  }
  async function draw(id, spec, tables) {
    const options = { ast: true, actions: false, patch, renderer: "svg", config: isDark() ? page.dark : page.light };
    options.tooltip = { theme: isDark() ? "dark" : "light" };
    if (views[id]) views[id].finalize();
    views[id] = (await vegaEmbed(find(id), { ...spec, datasets: tables }, options)).view;
  }
  async function fill(id, tables) {
    const view = views[id];
    if (!view) return;
    for (const [name, rows] of Object.entries(tables)) view.data(name, rows);
    await view.resize().runAsync();
  }
  async function drawAll() {
    const jobs = [];
    if (told.choices) {
      jobs.push(draw("plain", page.timeline, timelineTables(told.plain, false)));
      jobs.push(draw("planned", page.timeline, timelineTables(told.choices[at], true)));
      const tables = { plans: page.plans, hand: page.hand, here: [page.plans[at]] };
      jobs.push(draw("frontier", page.frontier, tables));
    }
    if (told.losses.length) {
      const rows = told.losses.map(([step, loss, took]) => ({ step, loss, seconds: took }));
      jobs.push(draw("losses", page.losses, { losses: rows }));
    }
    await Promise.all(jobs);
    document.documentElement.dataset.drawn = "yes";
  }

  // ---- text
  function how(choice) {
    const rows = `${choice.rows} row${choice.rows === 1 ? "" : "s"}`;
    const parts = choice.steps > 1 ? `${choice.steps} micro-batches of at most ${rows}` : `all ${rows} at once`;
    const share = percent(choice.recompute_s / choice.seconds);
    const again = choice.recomputes ? `${choice.recomputes} tensor${choice.recomputes === 1 ? "" : "s"} recomputed, ${share} of the step` : "nothing recomputed";
    return `${parts}, ${again}`;
  }
  function caption(choice) {
    const notes = [`peak ${bytes(choice.peak)} (ring) at ${choice.owner}`];
    if (choice.recomputes) notes.push(`at most ${(100 * choice.gap).toFixed(2)} % of a step from the best plan of this kind`);
    if (choice.two_pass) notes.push("second of two passes; the first keeps no activations and is not drawn");
    if (choice.first_step) notes.push("the first step, in which the optimizer's state is born");
    return notes.join("; ") + ".";
  }
  function legend() {
    const colours = (isDark() ? page.dark : page.light).range.category;
    find("legend").replaceChildren(
      ...told.categories.map((name, i) => {
        const item = document.createElement("li");
        const square = document.createElement("i");
        square.style.background = colours[i];
        item.append(square, name);
        return item;
      })
    );
  }

  // ---- strip
  let open = null; // the name of the block whose ops are shown
  function shortName(name) {
    return name.split(" … ").map((path) => path.split(".").pop()).join("…");
  }
  function strip(choice) {
    const graph = told.graphs[choice.rows];
    find("strip").replaceChildren(
      ...graph.blocks.map((block, i) => {
        const [name, start, stop] = block;
        const share = choice.shares[i];
        const saved = graph.saved.slice(start, stop).reduce((sum, size) => sum + size, 0);
        const button = document.createElement("button");
        const label = document.createElement("span");
        const kept = document.createElement("i");
        const again = document.createElement("i");
        button.type = "button";
        label.textContent = shortName(name);
        kept.className = "kept";
        again.className = "again";
        kept.style.flexGrow = 1 - share;
        again.style.flexGrow = share;
        kept.style.flexBasis = again.style.flexBasis = "0";
        button.title = `${name}: ${percent(share)} of ${bytes(saved)} recomputed`;
        button.classList.toggle("none", saved === 0);
        button.classList.toggle("on", name === open);
        button.append(label, kept, again);
        const show = () => {
          open = name;
          for (const other of find("strip").children) other.classList.toggle("on", other === button);
          ops(choice, graph, block, share, saved);
        };
        for (const kind of ["pointerenter", "focus", "click"]) button.addEventListener(kind, show);
        return button;
      })
    );
    const index = Math.max(0, graph.blocks.findIndex(([name]) => name === open));
    const block = graph.blocks[index];
    const saved = graph.saved.slice(block[1], block[2]).reduce((sum, size) => sum + size, 0);
    if (open !== null) ops(choice, graph, block, choice.shares[index], saved);
  }
  function ops(choice, graph, [name, start, stop], share, saved) {
    const title = document.createElement("h3");
    title.textContent = `${name}: ${percent(share)} of ${bytes(saved)} recomputed`;
    title.style.width = "100%";
    const chips = [];
    let silent = 0;
    for (let op = start; op < stop; op++) {
      const letter = choice.letters[op];
      if (letter === ".") {
        silent++;
        continue;
      }
      const chip = document.createElement("span");
      const text = told.texts[graph.ops[op]];
      const label = (text.startsWith(name + ".") ? text.slice(name.length + 1) : text)
        .replace("aten.", "").replace(".default", "");
      const size = graph.saved[op] ? bytes(graph.saved[op]) : "on the way";
      chip.className = letter === "k" ? "kept" : "again";
      const partly = letter === "p" ? " · partly" : "";
      chip.textContent = `${label} · ${size}${partly}`;
      chip.title = `${text}: ${size}, ${letter === "k" ? "kept" : "recomputed"}${partly}`;
      chips.push(chip);
    }
    const rest = document.createElement("span");
    rest.textContent = silent ? `and ${silent} ops of which nothing is saved` : "";
    find("ops").replaceChildren(title, ...chips, rest);
  }

  // ---- slider
  function tell() {
    const choice = told.choices[at];
    const own = at === told.chosen ? " ★" : "";
    find("amount").textContent = `${bytes(choice.budget)}${own}`;
    const slower = choice.seconds / told.plain.seconds - 1;
    const cost = Math.abs(slower) < 0.0005 ? "as long as plain" : `${slower < 0 ? "−" : "+"}${percent(Math.abs(slower))} over plain`;
    find("effect").textContent = `${seconds(choice.seconds)} a step, ${cost}: ${how(choice)}`;
    find("planned-caption").textContent = caption(choice);
    find("planned-title").textContent = `Planned: ${bytes(choice.peak)}${own}`;
    strip(choice);
  }
  function move(index) {
    at = Math.min(Math.max(index, 0), told.choices.length - 1);
    find("budget").value = at;
    tell();
    fill("planned", timelineTables(told.choices[at], true));
    fill("frontier", { here: [page.plans[at]] });
  }
  function fromHash() {
    const wanted = hash();
    const theme = wanted.get("theme");
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
    if (told.choices && /^\d+$/.test(wanted.get("budget") || "")) at = Math.min(+wanted.get("budget"), told.choices.length - 1);
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
  function repaint() {
    if (told.choices) legend();
    drawAll();
  }
  dark.addEventListener("change", () => {
    document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
    repaint();
  });
  find("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    repaint();
  });
  fromHash();
  if (told.choices) {
    const slider = find("budget");
    slider.max = told.choices.length - 1;
    slider.value = at;
    slider.addEventListener("input", () => move(+slider.value));
    addEventListener("hashchange", () => {
      fromHash();
      move(at);
    });
    find("plain-title").textContent = `Plain: ${bytes(told.plain.peak)}`;
    find("plain-caption").textContent = `${caption(told.plain)} It takes ${how(told.plain)}.`;
    open = told.graphs[told.choices[at].rows].blocks[Math.min(1, told.graphs[told.choices[at].rows].blocks.length - 1)][0];
    tell();
  }
  repaint();
})();
