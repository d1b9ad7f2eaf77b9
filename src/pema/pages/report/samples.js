// The test set: source, reference and every method's output, a few examples at a time, searchable.

const PAGE = 5;

for (const [key, experiment] of Object.entries(DATA)) {
  const { examples, methods } = experiment;
  const section = document.getElementById(`${key}-samples`);
  const count = methods[0].output.length;
  const texts = Array.from({ length: count }, (_, n) =>
    [...(examples?.[n] ?? []), ...methods.map(({ output }) => output[n])].join("\n").toLowerCase(),
  );
  const bases = [
    ...(examples ? [["the reference text", (n) => examples[n][1]]] : []),
    ...methods.map(({ label, output }) => [label, (n) => output[n]]),
    ["nothing", null],
  ];
  // Without reference texts, what the comparison is with stands in for them.
  const state = { page: 0, base: examples ? 0 : (experiment.reference ?? 0), found: [] };

  const search = element("input", { type: "search", id: `${key}-search`, autocomplete: "off" });
  const list = element("div", { class: "samples" });
  const said = element("span", { role: "status" });
  const first = Array.from(new Set(methods.map(({ run }) => run))).join(", ");
  const buttons = Object.fromEntries(
    [
      ["First", () => 0],
      ["Previous", () => state.page - 1],
      ["Next", () => state.page + 1],
      ["Last", () => Infinity],
    ].map(([name, to]) => [
      name,
      element("button", { class: "button", type: "button", onclick: () => turn(to()) }, name),
    ]),
  );
  const missing = element("input", {
    type: "checkbox",
    onchange: () => list.classList.toggle("show-missing", missing.checked),
  });

  const notice = examples
    ? null
    : element(
        "p",
        { class: "note" },
        "The sources and reference texts are not part of these results (some data may not be passed on), so the outputs stand alone here.",
      );
  section.append(
    ...[notice].filter(Boolean),
    element(
      "p",
      { class: "muted", title: first },
      "One run of each method: its first seed. The other seeds' outputs lie beside the results.",
    ),
    element(
      "div",
      { class: "controls" },
      element("span", { class: "choice" }, element("label", { for: search.id }, "Search all texts"), search),
      choice(
        "Mark what differs from",
        bases.map(([name]) => name),
        state,
        "base",
        show,
      ),
      element("label", { class: "choice check" }, missing, " show missing words"),
    ),
    element(
      "div",
      { class: "pager", role: "group", "aria-label": "Pages of samples" },
      ...Object.values(buttons),
      said,
    ),
    list,
  );
  search.addEventListener("input", () => find(search.value));
  states[key].listeners.push(show);
  find("");

  function find(query) {
    const wanted = query.toLowerCase();
    state.found = texts.flatMap((text, n) => (text.includes(wanted) ? [n] : []));
    turn(0);
  }

  function turn(page) {
    state.page = Math.max(0, Math.min(page, Math.ceil(state.found.length / PAGE) - 1));
    show();
  }

  function show() {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    const matching = state.found.length === count ? `${count} examples` : `${state.found.length} of ${count} examples`;
    said.textContent = `Page ${state.page + 1} of ${pages}, ${matching}`;
    for (const [name, step] of [
      ["First", -1],
      ["Previous", -1],
      ["Next", 1],
      ["Last", 1],
    ]) {
      // A button that has the focus keeps it: to a disabled one the keyboard could not come back.
      const over = state.page + step < 0 || state.page + step >= pages;
      buttons[name].setAttribute("aria-disabled", over);
    }
    list.replaceChildren(...state.found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(sample));
    if (!state.found.length) list.append(element("p", { class: "muted" }, "No text matches."));
  }

  function sample(n) {
    const [name, base] = bases[state.base];
    const rows = (
      examples
        ? [
            ["Source", examples[n][0]],
            ["Reference", examples[n][1]],
          ]
        : []
    ).map(([title, text]) =>
      element("div", { class: "given" }, element("dt", {}, title), element("dd", { dir: "auto" }, text)),
    );
    methods.forEach(({ label, output }, method) => {
      if (states[key].hidden.has(method)) return;
      const swatch = element("span", { class: `swatch series-${method % SERIES}` });
      const text = base && name !== label ? marked(base(n), output[n]) : [output[n]];
      const shown = output[n].trim() ? text : [element("span", { class: "muted" }, "(empty)")];
      rows.push(element("div", {}, element("dt", {}, swatch, label), element("dd", { dir: "auto" }, ...shown)));
    });
    const title = element("p", { id: `${key}-sample-${n}` }, `Example ${n + 1}`);
    return element("section", { class: "sample", "aria-labelledby": title.id }, title, element("dl", {}, ...rows));
  }
}
