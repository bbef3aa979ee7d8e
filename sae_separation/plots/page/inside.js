if (document.getElementById("inside-run")) {
  const MOST_ROWS = 500;
  const find = (id) => document.getElementById(id);
  const make = (tag, content = [], set = {}) => element(tag, set, ...[content].flat());
  const percent = (value) => `${(100 * value).toPrecision(2)} %`;
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));

  // A table whose heads sort it. columns: {title, value(row), cell(row)?, wide?}; open(row): what stands under a row, or null
  const listed = (section, columns, state, rows, open = () => null) => {
    const table = section.querySelector(".frame").firstChild, head = make("tr"), body = make("tbody");
    columns.forEach((column, at) => {
      const button = make("button", column.title, {type: "button"});
      const th = make("th", button, {scope: "col"});
      if (state.by === at) th.ariaSort = state.sign > 0 ? "ascending" : "descending";
      button.addEventListener("click", () => {
        state.sign = state.by === at ? -state.sign : 1;
        state.by = at;
        state.show();
        table.tHead.rows[0].cells[at].querySelector("button").focus();
      });
      head.append(th);
    });
    if (state.by !== undefined) {
      const value = columns[state.by].value;
      rows = [...rows].sort((a, b) => state.sign * compare(value(a), value(b)));
    }
    for (const row of rows.slice(0, MOST_ROWS)) {
      const tr = make("tr", columns.map((column, at) => {
        const cell = make(at ? "td" : "th", column.cell ? column.cell(row) : String(column.value(row)), {className: column.wide ? "wide" : ""});
        cell.dataset.title = column.title;
        return cell;
      }));
      body.append(tr);
      const more = open(row);
      if (more) body.append(make("tr", make("td", more, {colSpan: columns.length}), {className: "more"}));
    }
    table.replaceChildren(make("thead", head), body);
    const status = section.querySelector("[role=status]");
    const beyond = rows.length > MOST_ROWS ? `; the first ${MOST_ROWS} are shown` : "";
    if (status) status.textContent = `${rows.length} of ${state.total}${beyond}`;
  };

  const context = ([domain, at, tokens, values], most) => make("p", [make("small", domain), ...tokens.map((token, i) => {
    const span = make(i === at ? "b" : "span", token, {title: `activation ${values[i] || 0}`});
    if (values[i] > 0) span.style.background = `rgba(230, 159, 0, ${0.15 + 0.85 * values[i] / most})`;
    return span;
  })], {className: "context"});

  const features = {open: new Set()};
  features.load = (page) => {
    Object.assign(features, {rows: page.features || [], by: undefined, open: new Set()});
    features.total = features.rows.length;
    for (const row of features.rows) {
      row.text = row.contexts.map(([, , tokens]) => tokens.join("")).join(" ").toLowerCase();
      row.top = [...new Set(row.contexts.map(([, at, tokens]) => tokens[at]))].slice(0, 5).join(" ");
    }
    find("features").hidden = !features.total;
    features.show();
  };
  features.toggle = (number) => {
    if (!features.open.delete(number)) features.open.add(number);
    features.show();
    document.querySelector(`#features [data-feature="${number}"]`).focus();
  };
  features.go = (number) => {
    find("feature-search").value = "";
    features.open.delete(number);
    features.toggle(number);
    document.querySelector(`#features [data-feature="${number}"]`).scrollIntoView({block: "center"});
  };
  features.about = (row) => {
    const most = Math.max(...row.contexts.flatMap(([, , , values]) => values));
    const near = row.neighbours.flatMap(([number, cosine]) => {
      const there = features.rows.some((other) => other.feature === number);
      const link = there ? make("button", String(number), {type: "button", className: "link"}) : String(number);
      if (there) link.addEventListener("click", () => features.go(number));
      return [link, ` (${cosine}) `];
    });
    const cells = Object.entries(row.cells).map(([by, n]) => `${by.replaceAll("_", " ")}, ${n} features or more`);
    const by = Object.entries(row.changes.by_format).map(([name, [forget, retain]]) => `${name} ${forget} forget, ${retain} retain`);
    return [
      ...row.contexts.map((one) => context(one, most)),
      make("p", ["Neighbours (cosine): ", ...near]),
      make("p", `Clamped by cells of ${cells.join("; ") || "no ranking"}. Best cell: ${row.in_cell ? "yes" : "no"}.`),
      make("p", `Alone it changes ${row.changes.n} answers: ${by.join("; ")}.`),
      make("ul", row.changes.examples.map(([name, question, without, now, right]) =>
        make("li", `${name}: ${question} ${without} → ${now} (right: ${right})`))),
    ];
  };
  features.show = () => {
    const wanted = find("feature-search").value.trim().toLowerCase();
    const rows = features.rows.filter((row) => !wanted || String(row.feature) === wanted || row.text.includes(wanted));
    const number = (row) => {
      const open = features.open.has(row.feature);
      const button = make("button", String(row.feature), {type: "button", className: "link", ariaExpanded: String(open)});
      button.dataset.feature = row.feature;
      button.addEventListener("click", () => features.toggle(row.feature));
      return button;
    };
    listed(find("features"), [
      {title: "feature", value: (row) => row.feature, cell: number},
      {title: "top tokens", value: (row) => row.top.trim(), wide: true},
      {title: "forget", value: (row) => row.forget, cell: (row) => percent(row.forget)},
      {title: "retain", value: (row) => row.retain, cell: (row) => percent(row.retain)},
      {title: "affinity", value: (row) => row.affinity},
      {title: "mean value", value: (row) => row.mean},
      {title: "best cell", value: (row) => row.in_cell ? "yes" : "no"},
      {title: "answers changed", value: (row) => row.changes.n},
    ], features, rows, (row) => features.open.has(row.feature) ? features.about(row) : null);
  };

  const questions = {};
  const choices = (select, names) => {
    const before = select.value;
    select.replaceChildren(make("option", "all", {value: ""}), ...names.map((name) => make("option", name, {value: name})));
    select.value = names.includes(before) ? before : "";
  };
  questions.load = (page, texts) => {
    const formats = (page.columns || []).slice(4);
    questions.by = undefined;
    questions.rows = (page.rows || []).flatMap(([number, half, ...answers]) => answers.flatMap((told, i) => {
      const [subject, question, right] = texts[number];
      if (told === null || !formats[i]) return [];
      const [without, now] = (told === true ? [true, true] : told).map((said) => said === true ? right : said);
      return [{subject, question, right, half, format: formats[i], without, now}];
    }));
    questions.total = questions.rows.length;
    choices(find("question-subject"), [...new Set(questions.rows.map((row) => row.subject))]);
    choices(find("question-format"), formats);
    find("questions").hidden = !questions.total;
    questions.show();
  };
  questions.kinds = {
    all: () => true,
    changed: (row) => row.without !== row.now,
    lost: (row) => row.without === row.right && row.now !== row.right,
    wrong: (row) => row.now !== row.right,
  };
  questions.show = () => {
    const subject = find("question-subject").value, format = find("question-format").value;
    const wanted = find("question-search").value.trim().toLowerCase();
    const rows = questions.rows.filter((row) => questions.kinds[find("question-kind").value](row)
      && (!subject || row.subject === subject) && (!format || row.format === format)
      && `${row.question} ${row.right} ${row.without} ${row.now}`.toLowerCase().includes(wanted));
    const mark = (said, row) => `${said === row.right ? "✓" : "✗"} ${said}`;
    listed(find("questions"), [
      {title: "question", value: (row) => row.question, wide: true},
      {title: "subject", value: (row) => row.subject},
      {title: "format", value: (row) => row.format},
      {title: "right answer", value: (row) => row.right},
      {title: "LM", value: (row) => row.without, cell: (row) => mark(row.without, row)},
      {title: "with the cell", value: (row) => row.now, cell: (row) => mark(row.now, row)},
      {title: "half", value: (row) => row.half},
    ], questions, rows);
  };

  const prompts = {};
  prompts.load = (page) => {
    prompts.by = undefined;
    prompts.rows = page.prompts || [];
    find("prompts").hidden = !prompts.rows.length;
    prompts.show();
  };
  prompts.show = () => {
    const now = (row) => row.with === row.without ? "the same" : make("ins", row.with);
    listed(find("prompts"), [
      {title: "prompt", value: (row) => row.prompt, wide: true},
      {title: "text", value: (row) => row.domain},
      {title: "LM", value: (row) => row.without, wide: true},
      {title: "with the cell", value: (row) => row.with, cell: now, wide: true},
    ], prompts, prompts.rows);
  };

  const unpacked = (packed) => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
  };
  for (const frame of document.querySelectorAll("#inside .frame")) frame.append(make("table"));
  const load = async () => {
    const chosen = find("inside-run").selectedOptions[0];
    if (!chosen) return;
    const [page, texts] = await Promise.all([unpacked(chosen.dataset.packed), unpacked(find("inside-run").dataset.texts)]);
    if (chosen === find("inside-run").selectedOptions[0]) [features, questions, prompts].forEach((part) => part.load(page, texts));
  };
  find("inside-run").addEventListener("change", load);
  find("feature-search").addEventListener("input", features.show);
  for (const id of ["question-subject", "question-format", "question-kind"]) find(id).addEventListener("change", questions.show);
  find("question-search").addEventListener("input", questions.show);
  load();
}
