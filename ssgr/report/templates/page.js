"use strict";
// Everything shown comes from JSON in this page and reaches it as text: nothing here parses HTML or evaluates code.
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const element = (name, className, text) => {
    const out = document.createElement(name);
    if (className) out.className = className;
    if (text !== undefined) out.textContent = text;
    return out;
  };
  const content = (id) => JSON.parse(document.getElementById(id).textContent);

  // Theme: as the system says, or as chosen here.
  const root = document.documentElement;
  const themes = ["system", "light", "dark"];
  const names = { system: "as the system", light: "light", dark: "dark" };
  let theme = "system";
  const useTheme = (next) => {
    theme = next;
    if (theme === "system") root.removeAttribute("data-theme");
    else root.setAttribute("data-theme", theme);
    $("#theme").textContent = `Theme: ${names[theme]}`;
    redraw();
  };
  $("#theme").addEventListener("click", () => useTheme(themes[(themes.indexOf(theme) + 1) % themes.length]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());

  // Figures: drawn when they are scrolled to.
  const drawn = new Map(); // by the element: what Vega made of it
  const drawing = new Map(); // by the element: the drawing that was asked for last
  const kept = new Map(); // by name: which rows a filter left, if there is one
  const config = () => {
    const style = getComputedStyle(root);
    const [ink, muted, line, accent] = ["ink", "muted", "line", "accent"].map((name) => style.getPropertyValue(`--${name}`).trim());
    const colours = [1, 2, 3, 4, 5, 6, 7, 8].map((i) => style.getPropertyValue(`--c${i}`).trim());
    const text = { labelColor: ink, titleColor: muted, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
    return {
      background: null, font: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", view: { stroke: null },
      axis: { ...text, gridColor: line, domainColor: muted, tickColor: muted }, legend: { ...text, symbolBaseFillColor: muted, symbolBaseStrokeColor: muted }, header: { ...text, labelFontWeight: 600 },
      mark: { color: accent, aria: false }, // the table of its data is what a screen reader reads
       bar: { color: accent }, rule: { color: muted }, text: { color: ink }, point: { color: accent },
      tick: { color: accent }, range: { category: colours },
    };
  };
  // On a phone the labels of rows stand above their marks, not beside them.
  const narrow = (spec) => {
    for (const part of [spec, ...spec.layer ?? []]) {
      const y = part.encoding?.y;
      if (y?.field !== "label") continue;
      y.axis = { ...y.axis, labelAlign: "left", labelPadding: 0, labelOffset: spec.height.step < 20 ? -22 : -15, ticks: false, domain: false, labelLimit: 300 };
    }
    spec.height = { step: spec.height.step < 20 ? 26 : 38 };
  };
  const paint = async (figure) => {
    const name = figure.dataset.figure;
    const data = content(`data-${name}`);
    const rows = kept.has(name) ? data.rows.filter(kept.get(name)) : data.rows;
    const place = $(".chart", figure);
    // On a phone a legend is a list, and a label that is too long for it ends in an ellipsis.
    const listed = (key, value) => key === "legend" && value ? { ...value, columns: 1, labelLimit: place.clientWidth - 85 } : value;
    const fitted = place.clientWidth < 500 ? JSON.parse(JSON.stringify(data.spec), listed) : data.spec;
    const spec = { ...fitted, datasets: { rows } };
    if (spec.columns && spec.usermeta?.beside) { // panels: as many and as wide as there is room for
      const room = place.clientWidth;
      const longest = 6.5 * Math.max(0, ...rows.map((row) => String(row[spec.facet.field]).length)); // pixels of a heading
      const columns = Math.min(4, Math.max(1, Math.floor(room / Math.max(spec.usermeta.beside + 150, longest + 60))));
      const width = Math.max(110, Math.min(320, Math.floor(room / columns) - spec.usermeta.beside));
      Object.assign(spec, { columns, spec: { ...spec.spec, width } });
    } else if (spec.columns && place.clientWidth < 500) spec.columns = 1;
    if (spec.height?.step && place.clientWidth < 500) narrow(spec);
    drawn.get(figure)?.finalize();
    drawn.set(figure, await vegaEmbed(place, spec, {
      ast: true, logLevel: 1 /* errors */, renderer: "svg", actions: false, defaultStyle: false, config: config(), tooltip: { disableDefaultStyle: true },
    }));
    figure.dataset.drawn = "yes";
  };
  // One at a time in each figure, and of those that wait only the last: what was asked for last is what stays.
  const draw = (figure) => {
    delete figure.dataset.drawn;
    const go = () => drawing.get(figure) === next && paint(figure);
    const next = Promise.resolve(drawing.get(figure)).then(go, go);
    drawing.set(figure, next);
    return next;
  };
  const redraw = () => { for (const figure of drawing.keys()) draw(figure); };
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "200px" });
  $$(".figure").forEach((figure) => seen.observe(figure));
  addEventListener("beforeprint", () => $$(".figure").filter((figure) => !drawing.has(figure)).forEach(draw));
  window.ssgr = { drawn, draw };

  const quoted = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const csv = (data) => [data.columns, ...data.rows.map((row) => data.columns.map((name) => row[name]))]
    .map((line) => line.map(quoted).join(",") + "\n").join("");
  const save = (url, file) => {
    const link = element("a");
    link.href = url;
    link.download = file;
    link.click();
  };
  for (const button of $$("[data-save]")) {
    const figure = button.closest(".figure");
    const what = button.dataset.save;
    button.setAttribute("aria-label", `Save “${$("h4", figure).textContent}” as ${what.toUpperCase()}`);
    button.addEventListener("click", async () => {
      const file = `${figure.dataset.figure}.${what}`;
      if (what === "csv") {
        save(URL.createObjectURL(new Blob([csv(content(`data-${figure.dataset.figure}`))], { type: "text/csv" })), file);
        return;
      }
      while (!figure.dataset.drawn) await (drawing.get(figure) ?? draw(figure));
      save(await drawn.get(figure).view.toImageURL(what, what === "png" ? 3 : 1), file);
    });
  }

  // The data of a figure as a table, made when it is opened.
  const MOST = 400;
  for (const details of $$("details.data")) {
    details.addEventListener("toggle", () => {
      if (!details.open || $("table", details)) return;
      const figure = details.closest(".figure");
      const data = content(`data-${figure.dataset.figure}`);
      const scroll = element("div", "scroll");
      scroll.tabIndex = 0;
      scroll.setAttribute("role", "region");
      scroll.setAttribute("aria-label", `Data of ${$("h4", figure).textContent}`);
      const table = element("table");
      const head = table.createTHead().insertRow();
      for (const name of data.columns) {
        const cell = element("th", "", name);
        cell.scope = "col";
        head.append(cell);
      }
      const body = table.createTBody();
      for (const row of data.rows.slice(0, MOST)) {
        const line = body.insertRow();
        for (const name of data.columns) line.insertCell().textContent = row[name] ?? "";
      }
      scroll.append(table);
      if (data.rows.length > MOST) scroll.append(element("p", "left-out", `${data.rows.length - MOST} more rows are in the CSV.`));
      details.append(scroll);
    });
  }

  // Leaderboards: sorted by a column, filtered by text and by field.
  for (const board of $$("[data-board]")) {
    const body = $("tbody", board);
    const rows = [...body.rows];
    const heads = $$("thead th", board);
    const fields = JSON.parse($(".names", board).textContent);
    const value = (row, i) => row.cells[i].dataset.value;
    const number = (text) => { // of a sparsity, such as 30 % or 2:4, its zeros
      const pattern = /^(\d+):(\d+)$/.exec(text);
      return pattern ? 100 * (1 - pattern[1] / pattern[2]) : Number(text.replace(/ %$/, ""));
    };
    const order = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const [x, y] = [number(a), number(b)];
      return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
    };
    heads.forEach((head, i) => $("button", head).addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sorted = [...rows].sort((one, other) => {
        const [a, b] = [value(one, i), value(other, i)];
        return a === "" || b === "" ? order(a, b) : (down ? -1 : 1) * order(a, b);
      });
      body.append(...sorted);
    }));
    const form = $("form", board);
    const filter = () => {
      const text = form.elements.text.value.trim().toLowerCase();
      const chosen = fields.map((name) => $(`select[name="${CSS.escape(name)}"]`, form)?.value ?? "");
      const labels = new Set();
      let count = 0;
      for (const row of rows) {
        const dense = row.classList.contains("dense");
        const fits = (dense || chosen.every((want, i) => want === "" || value(row, i) === want))
          && (text === "" || row.textContent.toLowerCase().includes(text));
        row.hidden = !fits;
        if (fits) {
          count += 1;
          labels.add(row.dataset.label);
        }
      }
      $(".count", board).textContent = `${count} of ${rows.length} rows`;
      for (const figure of $$(".figure", board.parentElement)) {
        const name = figure.dataset.figure;
        if (!/^(leaderboard|differences)_/.test(name)) continue;
        kept.set(name, (row) => labels.has(row.label));
        if (drawing.has(figure)) draw(figure);
      }
    };
    for (const kind of ["input", "change"]) form.addEventListener(kind, filter);
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  // The reader of traces: a problem at a time, each answer as text.
  const put = (parent, part) => {
    const text = element("pre", "text");
    text.dir = "auto";
    text.append(part.head);
    parent.append(text);
    if (!part.left_out) return;
    parent.append(element("span", "left-out", `${part.left_out.toLocaleString("en")} characters are left out here`));
    const tail = element("pre", "text", part.tail);
    tail.dir = "auto";
    parent.append(tail);
  };
  const VERDICTS = { right: "✓ right", wrong: "✗ wrong", no_answer: "∅ no answer", grader_failed: "? the grader failed" };
  const card = (answer, models, several) => {
    const out = element("article", "answer");
    out.append(element("h4", "", models[answer.model] + (several ? `, attempt ${answer.attempt + 1}` : "")));
    out.append(element("span", `verdict ${answer.verdict}`, VERDICTS[answer.verdict]));
    if (answer.cut) out.append(element("span", "verdict cut", `⇥ cut at ${answer.tokens.toLocaleString("en")} tokens`));
    if (answer.looping) out.append(element("span", "verdict cut", "↻ looping"));
    out.append(element("p", "meta", `${answer.tokens.toLocaleString("en")} tokens, ${answer.thinking.toLocaleString("en")} of them thinking; `
      + `answer read: ${answer.answer.head || "none"}`));
    if (answer.think.head) {
      const details = element("details");
      details.append(element("summary", "", answer.closed ? "Thinking" : "Thinking, never closed"));
      put(details, answer.think);
      out.append(details);
    }
    put(out, answer.text);
    return out;
  };
  const reader = (section) => {
    const data = content(section.dataset.traces);
    const [which, choice] = [$("[name=which]", section), $("[name=problem]", section)];
    const attempt = $("[name=attempt]", section);
    const [previous, next] = [$("[name=previous]", section), $("[name=next]", section)];
    const place = $(".problem", section);
    const some = (problem, dense, verdict) => problem.answers.some((a) => (a.model === 0) === dense && (a.verdict === "right") === verdict);
    const wanted = {
      all: () => true,
      lost: (p) => some(p, true, true) && some(p, false, false),
      gained: (p) => some(p, true, false) && some(p, false, true),
      cut: (p) => p.answers.some((a) => a.cut),
    };
    const show = () => {
      place.replaceChildren();
      previous.disabled = choice.selectedIndex <= 0;
      next.disabled = choice.selectedIndex >= choice.options.length - 1;
      const problem = data.problems[Number(choice.value)];
      if (choice.value === "" || !problem) {
        place.append(element("p", "absent", "No problem in this page is like that."));
        return;
      }
      const question = element("dl", "question");
      for (const [name, part] of [["Question", problem.question], ["Right answer", problem.gold]]) {
        question.append(element("dt", "", name));
        const dd = element("dd");
        put(dd, part);
        question.append(dd);
      }
      const answers = element("div", "answers");
      const wanted = problem.answers.filter((answer) => attempt.value === "all" || answer.attempt === Number(attempt.value));
      answers.append(...wanted.map((answer) => card(answer, data.models, data.attempts > 1)));
      place.append(question, answers);
    };
    const list = () => {
      choice.replaceChildren();
      data.problems.forEach((problem, i) => {
        if (!wanted[which.value](problem)) return;
        const right = problem.answers.filter((answer) => answer.model > 0 && answer.verdict === "right").length;
        const all = problem.answers.filter((answer) => answer.model > 0).length;
        const level = problem.level === null ? "" : `, level ${problem.level}`;
        const option = element("option", "", `${problem.id.slice(0, 60)}${level}: ${right} of ${all} pruned answers right`);
        option.value = i;
        choice.append(option);
      });
      show();
    };
    for (let i = 0; i < data.attempts; i += 1) attempt.append(new Option(`attempt ${i + 1}`, i));
    if (data.attempts > 1) attempt.append(new Option("all", "all"));
    attempt.addEventListener("change", show);
    which.addEventListener("change", list);
    choice.addEventListener("change", show);
    previous.addEventListener("click", () => { choice.selectedIndex -= 1; show(); });
    next.addEventListener("click", () => { choice.selectedIndex += 1; show(); });
    list();
    section.dataset.ready = "yes";
  };
  const reached = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        reached.unobserve(entry.target);
        reader(entry.target);
      }
    }
  }, { rootMargin: "200px" });
  $$("[data-traces]").filter((section) => $(".problem", section)).forEach((section) => reached.observe(section));
})();
