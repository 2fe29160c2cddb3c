// Draws the curves of a run. The data is in the page (a report) or comes from the agent that served it (live).
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const NO_PLOT = new Set(["optwatch.run_state", "optwatch.rank_up", "optwatch.step", "optwatch.last_step_timestamp", "optwatch.last_sample_timestamp", "optwatch.last_event_timestamp"]); // in the head of the page
  const LINES = 8; // more lines in one plot cannot be told apart
  const PALETTE = 8;
  const SECONDS = [1, 2, 5, 10, 15, 30, ...[1, 2, 5, 10, 15, 30].map((n) => 60 * n), ...[1, 2, 3, 6, 12, 24, 48, 96, 168].map((n) => 3600 * n)]; // between ticks
  const POLL_MS = 2000;
  const WINDOW_S = 15; // asked for again at each poll, since the newest buckets were not full yet
  const metrics = Object.assign({}, ...Object.values(data.families));
  const plots = new Map(); // metric -> {chart, box, keys, curves}
  let curves = new Map(); // metric and labels -> curve
  let run = data.run || "";
  let silent = 0; // Unix time since when the agent does not answer; 0: it does

  // ---- numbers as text -------------------------------------------------------------------------------------------
  const scaled = (value, factor, names) => {
    let i = 0;
    while (Math.abs(value) >= factor && i < names.length - 1) { value /= factor; i += 1; }
    return `${+value.toPrecision(4)} ${names[i]}`.trim();
  };
  const show = (value, metric, whole = false) => { // whole: of a counter the number, not its increase
    if (value === null || value === undefined) return "–";
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "+Inf" : "-Inf";
    const { unit, instrument } = metrics[metric] || { unit: "", instrument: "gauge" };
    const rate = instrument === "counter" && !whole ? "/s" : "";
    if (metric.endsWith("timestamp")) return new Date(value * 1000).toLocaleTimeString("en-GB");
    if (unit === "By") return scaled(value, 1000, ["B", "kB", "MB", "GB", "TB"]) + rate;
    if (unit === "1") return `${+(100 * value).toPrecision(3)} %`;
    if (unit === "s" && rate) return `${+(100 * value).toPrecision(3)} % of the time`;
    if (unit === "s") return value < 1 ? scaled(value * 1e6, 1000, ["µs", "ms"]) : `${+value.toPrecision(4)} s`;
    const suffix = { W: " W", J: " J", Cel: " °C" }[unit] || "";
    const small = value !== 0 && Math.abs(value) < 1e-3;
    if (Math.abs(value) >= 1e6 && Math.abs(value) < 1e15) return scaled(value, 1000, ["", "k", "M", "G", "T"]) + suffix + rate;
    const text = small || Math.abs(value) >= 1e6 ? value.toExponential(2) : `${+value.toPrecision(rate ? 3 : 5)}`;
    return text + suffix + rate;
  };
  const last = (list) => { for (let i = list.length - 1; i >= 0; i -= 1) if (list[i] !== null) return list[i]; return null; };
  const ODD = { NaN: NaN, "+Inf": Infinity, "-Inf": -Infinity };
  const newestOf = (curve) => (curve.odd ? ODD[curve.odd] : last(curve.mean));

  // ---- the data ---------------------------------------------------------------------------------------------------
  const keyOf = (curve) => JSON.stringify([curve.metric, curve.labels]);
  const take = (list) => {
    for (const curve of list) {
      const old = curves.get(keyOf(curve));
      if (!old) { curves.set(keyOf(curve), curve); continue; }
      let keep = old.time.findIndex((time) => time >= curve.time[0]);
      if (keep < 0) keep = old.time.length;
      for (const column of ["time", "mean", "low", "high"]) old[column] = old[column].slice(0, keep).concat(curve[column]);
      for (const fact of ["seconds", "total", "odd"]) old[fact] = curve[fact];
    }
  };
  const chosen = (metric) => [...curves.values()].filter((curve) => curve.metric === metric
    && (!by("rank").value || curve.labels.rank === undefined || curve.labels.rank === by("rank").value)
    && (!by("group").value || curve.labels.group === undefined || curve.labels.group === by("group").value));
  // Series that ended before the run's newest values, such as those of a format that is no longer used, are history.
  let horizon = 0; // Unix time
  const look = () => {
    const all = [...curves.values()];
    const end = Math.max(...all.map((curve) => curve.time[curve.time.length - 1]));
    horizon = end - 5 - Math.max(...all.map((curve) => curve.seconds));
  };
  const current = (metric, wanted = {}) => {
    return [...curves.values()].filter((curve) => curve.metric === metric && curve.time[curve.time.length - 1] >= horizon && Object.entries(wanted).every(([name, value]) => curve.labels[name] === value)
      && (!by("rank").value || curve.labels.rank === undefined || curve.labels.rank === by("rank").value));
  };
  const nowest = (metric, wanted) => current(metric, wanted).map(newestOf).filter((value) => value !== null);
  const totals = (metric, wanted) => current(metric, wanted).map((curve) => curve.total ?? 0);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const largest = (values) => (values.length ? Math.max(...values) : null);

  // ---- one plot ---------------------------------------------------------------------------------------------------
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const nameOf = (curve, shared) => Object.entries(curve.labels)
    .filter(([name, value]) => shared[name] !== value).map(([, value]) => value).join(" · ");
  const sharedLabels = (list) => Object.fromEntries(Object.entries(list[0].labels)
    .filter(([name, value]) => list.every((curve) => curve.labels[name] === value)));

  const keysOf = (list, metric, shared, at) => list.map((curve, i) => {
    const item = document.createElement("li");
    const swatch = document.createElement("i");
    swatch.style.background = `var(--c${i % PALETTE})`;
    const value = at === null ? newestOf(curve) : curve.mean[at(curve)];
    if (Number.isNaN(value)) item.className = "bad";
    const counted = at === null && curve.total !== null;
    const text = counted && curve.total === 0 ? "0" : show(value, metric);
    item.append(swatch, `${nameOf(curve, shared)} ${counted && curve.total ? `${show(curve.total, metric, true)} in all, ` : ""}${text}`);
    return item;
  });

  const clock = (chart, ticks) => {
    const span = chart.scales.x.max - chart.scales.x.min;
    return ticks.map((tick) => {
      const iso = new Date((tick - 60 * new Date(tick * 1000).getTimezoneOffset()) * 1000).toISOString();
      return span > 172800 ? iso.slice(5, 16).replace("T", " ") : iso.slice(11, span < 600 ? 19 : 16);
    });
  };

  const extent = (chart, low, high) => {
    if (low === null) return [0, 1];
    if (low !== high) return uPlot.rangeNum(low, high, 0.1, true);
    return low === 0 ? [0, 1] : [Math.min(0, 2 * low), Math.max(0, 2 * low)];
  };

  const options = (metric, list, width) => {
    const series = [{}];
    const bands = [];
    list.forEach((curve, i) => {
      const stroke = () => color(`--c${i % PALETTE}`);
      series.push({ stroke, width: 1.5, spanGaps: false, points: { show: false } });
      if (list.length > 3) return; // more than three bands would hide each other
      const edge = { stroke: "transparent", width: 0, points: { show: false } };
      series.push(edge, { ...edge });
      bands.push({ series: [series.length - 1, series.length - 2], fill: () => `${color(`--c${i % PALETTE}`)}33` });
    });
    const axis = { stroke: () => color("--soft"), grid: { stroke: () => color("--line"), width: 1 }, ticks: { show: false } };
    return {
      width, height: 190, series, bands, scales: { y: { range: extent } }, legend: { show: false }, cursor: { sync: { key: "all" }, points: { size: 6 } },
      axes: [{ ...axis, size: 30, space: 70, values: clock, incrs: SECONDS }, { ...axis, size: 74, values: (_, ticks) => ticks.map((tick) => show(tick, metric)) }],
      hooks: { setCursor: [(chart) => mark(metric, chart)] },
    };
  };

  const columns = (list) => {
    const range = Number(by("range").value);
    const newest = Math.max(...list.map((curve) => curve.time[curve.time.length - 1]));
    const tables = list.map((curve) => {
      const from = range ? curve.time.findIndex((time) => time >= newest - range) : 0;
      const part = (name) => curve[name].slice(from);
      return list.length > 3 ? [part("time"), part("mean")] : [part("time"), part("mean"), part("low"), part("high")];
    });
    return uPlot.join(tables);
  };

  const mark = (metric, chart) => {
    const plot = plots.get(metric);
    if (!plot || chart !== plot.chart) return;
    const time = chart.cursor.idx === null || chart.cursor.idx === undefined ? null : chart.data[0][chart.cursor.idx];
    const at = time === null ? null : (curve) => {
      const found = curve.time.findIndex((one) => one > time);
      return (found < 0 ? curve.time.length : found) - 1;
    };
    plot.keys.replaceChildren(...keysOf(plot.curves, metric, plot.shared, at));
  };

  const draw = (metric) => {
    const plot = plots.get(metric);
    const all = chosen(metric);
    plot.figure.hidden = all.length === 0;
    if (!all.length || !plot.seen) return;
    const list = all.slice(0, LINES);
    const signature = JSON.stringify(list.map(keyOf));
    plot.shared = sharedLabels(all);
    plot.curves = list;
    plot.note.textContent = all.length > LINES ? `${LINES} of ${all.length} lines; choose a rank or a group for the others` : "";
    if (plot.chart && plot.signature === signature) {
      plot.chart.setData(columns(list));
    } else {
      if (plot.chart) plot.chart.destroy();
      plot.chart = new uPlot(options(metric, list, plot.box.clientWidth), columns(list), plot.box);
      plot.signature = signature;
    }
    mark(metric, plot.chart);
  };

  const step = (metric, event) => {
    const plot = plots.get(metric);
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !plot.chart) return;
    event.preventDefault();
    const times = plot.chart.data[0];
    const from = plot.chart.cursor.idx ?? times.length - 1;
    const index = Math.min(times.length - 1, Math.max(0, from + move));
    plot.chart.setCursor({ left: plot.chart.valToPos(times[index], "x"), top: 20 });
  };

  // ---- the page ---------------------------------------------------------------------------------------------------
  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    const plot = plots.get(entry.target.dataset.metric);
    plot.seen = entry.isIntersecting;
    if (plot.seen) draw(entry.target.dataset.metric);
  }), { rootMargin: "300px" });

  const build = () => {
    for (const [family, specs] of Object.entries(data.families)) {
      const section = element("details", "", { id: family.replace(/\W+/g, "-"), open: "" });
      const summary = element("summary");
      summary.append(element("h2", family));
      const grid = element("div", "", { class: "grid" });
      section.append(summary, grid);
      for (const [metric, spec] of Object.entries(specs)) {
        if (spec.instrument === "info" || NO_PLOT.has(metric)) continue;
        const figure = element("figure", "", { "data-metric": metric });
        const caption = element("figcaption");
        const title = metric.replace("optwatch.", "") + (spec.instrument === "counter" ? ", rate" : "");
        caption.append(element("h3", title), element("p", spec.brief));
        const box = element("div", "", { class: "plot", tabindex: "0", role: "img", "aria-label": `${title}: ${spec.brief}. Left and right arrows move through time.` });
        const keys = element("ul", "", { class: "keys" });
        const note = element("p", "", { class: "note" });
        box.addEventListener("keydown", (event) => step(metric, event));
        figure.append(caption, box, keys, note);
        grid.append(figure);
        plots.set(metric, { figure, box, keys, note, chart: null, curves: [], shared: {}, seen: false });
        seen.observe(figure);
      }
      by("families").append(section);
      by("jumps").append(element("a", family, { href: `#${section.id}` }));
    }
  };

  const fill = (select, values, all) => {
    const before = select.value;
    const wanted = [["", all], ...values.map((value) => [value, value])];
    if (select.options.length === wanted.length && wanted.every(([value], i) => select.options[i].value === value)) return;
    select.replaceChildren(...wanted.map(([value, text]) => new Option(text, value)));
    if (values.includes(before)) select.value = before;
  };
  const values = (label) => [...new Set([...curves.values()].map((curve) => curve.labels[label]).filter((one) => one !== undefined))]
    .sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));

  const card = (title, text, bad = false) => {
    const box = element("div");
    box.append(element("dt", title), element("dd", text, bad ? { class: "bad" } : {}));
    return box;
  };
  const bytes = (value) => show(value, "optwatch.optimizer.state");
  const cards = () => {
    const found = nowest("optwatch.optimizer.state");
    const asked = nowest("optwatch.optimizer.state_expected");
    const wrong = asked.length > 0 && sum(found) !== sum(asked);
    const sick = sum(totals("optwatch.nonfinite_elements"));
    const [steps] = current("optwatch.step");
    const n = steps ? steps.mean.length : 0;
    const back = Math.max(0, n - 31);
    const speed = n > 1 ? (steps.mean[n - 1] - steps.mean[back]) / (steps.time[n - 1] - steps.time[back]) : null;
    const [loss] = nowest("optwatch.loss");
    const memory = nowest("optwatch.host_memory.rss");
    const used = nowest("optwatch.device.memory.used");
    const error = largest(nowest("optwatch.update_quantization_error.ratio"));
    by("cards").replaceChildren(
      card("Step", show(largest(nowest("optwatch.step")), "optwatch.step")),
      card("Newest step at", show(largest(nowest("optwatch.last_step_timestamp")), "optwatch.last_step_timestamp")),
      card("Steps a second", speed === null ? "–" : `${+speed.toPrecision(3)}`),
      card("Loss", show(loss, "optwatch.loss"), loss !== undefined && !Number.isFinite(loss)),
      card("Optimizer state", found.length ? `${bytes(sum(found))}${wrong ? `, ${bytes(sum(asked))} asked for` : asked.length ? ", as asked for" : ""}` : "–", wrong),
      card("Update error, worst group", show(error, "optwatch.update_quantization_error.ratio"), Number.isNaN(error)),
      card("Non-finite gradients", current("optwatch.nonfinite_elements").length ? `${sick}` : "–", sick > 0),
      ...(used.length ? [card("GPU memory", bytes(sum(used)))] : []),
      card("Host memory", memory.length ? bytes(sum(memory)) : "–"),
      card("Watching, of the time", show(largest(nowest("optwatch.overhead")), "optwatch.update_quantization_error.ratio")),
    );
    const states = ["failed", "lost", "running", "finished"];
    const state = states.find((name) => nowest("optwatch.run_state", { state: name }).some((value) => value > 0.5)) || "unknown";
    const gone = silent ? ` – the agent has not answered for ${Math.round(Date.now() / 1000 - silent)} s, values are old` : "";
    by("state").textContent = `${state}${gone}`;
    by("state").className = gone || state === "lost" || state === "failed" ? "bad" : "good";
  };

  // ---- the newest values as tables: what the terminal view shows ------------------------------------------------------
  const unique = (list) => [...new Set(list)];
  const pairs = (metrics_, label) => unique(metrics_.flatMap((metric) => current(metric))
    .filter((curve) => curve.labels[label] !== undefined).map((curve) => JSON.stringify([curve.labels.optimizer, curve.labels[label]])))
    .map((text) => JSON.parse(text));
  const titled = (list, [optimizer, name]) => (unique(list.map(([one]) => one)).length > 1 ? `${optimizer} · ${name}` : name);
  const short = (dtype) => ({ float32: "fp32", bfloat16: "bf16", float16: "fp16" }[dtype] || dtype);
  const norm = (metric, wanted) => { // over ranks, of one copy where several hold the same
    const squares = current(metric, wanted).map((curve) => newestOf(curve) ** 2
      / (largest(nowest("optwatch.replicas", { rank: curve.labels.rank, optimizer: curve.labels.optimizer })) || 1));
    return squares.length ? Math.sqrt(sum(squares)) : null;
  };
  const stateRows = () => {
    const slots = pairs(["optwatch.optimizer.state_expected", "optwatch.optimizer.state"], "slot");
    return slots.map(([optimizer, slot]) => {
      const found = current("optwatch.optimizer.state", { optimizer, slot }).filter((curve) => newestOf(curve) > 0);
      const actual = sum(found.map(newestOf));
      const asked = nowest("optwatch.optimizer.state_expected", { optimizer, slot });
      const full = slot === "step" ? actual : 4 * sum(nowest("optwatch.parameters", { optimizer }));
      const dtypes = unique(found.sort((a, b) => newestOf(b) - newestOf(a)).map((curve) => short(curve.labels.dtype)));
      const error = largest(nowest("optwatch.quantization_error.ratio", { optimizer, slot }));
      return {
        bad: asked.length > 0 && actual !== sum(asked),
        cells: [titled(slots, [optimizer, slot]), dtypes.join(" + "), bytes(actual), asked.length ? bytes(sum(asked)) : "–", full ? bytes(full) : "–",
          full ? show(1 - actual / full, "optwatch.quantization_error.ratio") : "–", show(error, "optwatch.quantization_error.ratio")],
      };
    });
  };
  const groupRows = (slots) => {
    const groups = pairs(["optwatch.gradient.norm", "optwatch.update_quantization_error.ratio"], "group");
    return groups.map(([optimizer, group]) => {
      const ratios = ["optwatch.update_to_parameter.ratio", "optwatch.update_quantization_error.ratio"];
      const numbers = [norm("optwatch.gradient.norm", { optimizer, group }), ...slots.map((slot) => norm("optwatch.moment.norm", { optimizer, group, slot }))];
      const rest = ratios.map((metric) => largest(nowest(metric, { optimizer, group })));
      return {
        bad: [...numbers, ...rest].some((value) => Number.isNaN(value)),
        cells: [titled(groups, [optimizer, group]), ...numbers.map((value) => show(value === null || !Number.isFinite(value) ? value : +value.toPrecision(3), "optwatch.gradient.norm")), ...rest.map((value, i) => show(value, ratios[i]))],
      };
    });
  };
  const table = (id, title, head, rows) => {
    const box = by(id);
    box.hidden = rows.length === 0;
    const line = (cells, tag, bad) => {
      const made = element("tr", "", bad ? { class: "bad" } : {});
      made.append(...cells.map((cell, i) => element(i ? tag : "th", cell, { scope: tag === "th" ? "col" : i ? "" : "row" })));
      return made;
    };
    const top = element("thead");
    top.append(line(head, "th", false));
    const body = element("tbody");
    body.append(...rows.map(({ cells, bad }) => line(cells, "td", bad)));
    const made = element("table");
    made.append(element("caption", title), top, body);
    box.replaceChildren(made);
  };
  const tables = () => {
    const slots = unique(current("optwatch.moment.norm").map((curve) => curve.labels.slot));
    table("state-now", "State", ["", "stored as", "bytes", "asked for", "in fp32", "saved", "error"], stateRows());
    table("groups-now", "Norms, by group of tensors", ["", "gradient", ...slots, "update / weight", "update error"], groupRows(slots));
  };

  const refresh = () => {
    look();
    by("run").textContent = run;
    fill(by("rank"), values("rank"), "all");
    fill(by("group"), values("group"), "all");
    cards();
    tables();
    for (const metric of plots.keys()) draw(metric);
    for (const section of by("families").children) {
      section.hidden = [...section.querySelectorAll("figure")].every((figure) => figure.hidden);
      by("jumps").querySelector(`[href="#${section.id}"]`).hidden = section.hidden;
    }
  };

  // ---- following an agent -----------------------------------------------------------------------------------------
  const ask = async (path) => {
    const response = await fetch(path, { cache: "no-store" });
    if (!response.ok) throw new Error(`${path} answered ${response.status}`);
    return response.json();
  };
  const newest = () => Math.max(0, ...[...curves.values()].map((curve) => curve.time[curve.time.length - 1]));
  const follow = async () => {
    try {
      const { runs } = await ask("api/runs");
      const wanted = by("runs").value || runs[0] || "";
      fill(by("runs"), runs, "newest");
      if (wanted !== run) { run = wanted; curves = new Map(); }
      if (run) {
        const since = curves.size ? newest() - WINDOW_S : 0;
        const answer = await ask(`api/history?run=${encodeURIComponent(run)}&since=${since}`);
        if (answer.run === run) take(answer.curves);
      }
      silent = 0;
    } catch (error) {
      silent = silent || Date.now() / 1000;
    }
    refresh();
    setTimeout(follow, POLL_MS);
  };

  // ---- start ------------------------------------------------------------------------------------------------------
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => {
    document.documentElement.dataset.theme = by("theme").value || (dark.matches ? "dark" : "light");
    for (const plot of plots.values()) if (plot.chart) plot.chart.redraw(false);
  };
  build();
  by("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["rank", "group", "range"]) by(id).addEventListener("change", refresh);
  by("theme").addEventListener("change", theme);
  dark.addEventListener("change", theme);
  addEventListener("resize", () => { for (const plot of plots.values()) if (plot.chart) plot.chart.setSize({ width: plot.box.clientWidth, height: 190 }); });
  theme();
  if (data.live) {
    by("runs-label").hidden = false;
    follow();
  } else {
    take(data.curves);
    refresh();
  }
})();
