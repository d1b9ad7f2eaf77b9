// The test set: source, references and every method's output, a few examples at a time, searchable.

const PAGE = 5;

for (const [key, experiment] of Object.entries(DATA)) {
  const { examples, methods } = experiment;
  const section = document.getElementById(`${key}-samples`);
  const count = methods[0].output.length;
  const texts = Array.from({ length: count }, (_, n) =>
    [...(examples?.[n].flat() ?? []), ...methods.map(({ output }) => output[n])].join("\n").toLowerCase(),
  );
  const bases = [
    ...(examples ? [["the reference text", (n) => examples[n][1][0]]] : []),
    ...methods.map(({ label, output }) => [label, (n) => output[n]]),
    ["nothing", null],
  ];
  // Without reference texts, the reference method's outputs are the base.
  const state = { page: 0, base: examples ? 0 : (experiment.reference ?? 0), matches: [], pattern: "" };

  const search = element("input", { type: "search", id: `${key}-search`, autocomplete: "off" });
  const list = element("div", { class: "samples" });
  const status = element("span", { role: "status" });
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
        "The sources and reference texts are not part of these results (some data must not be redistributed), so only outputs are shown.",
      );
  section.append(
    ...[notice].filter(Boolean),
    element(
      "p",
      { class: "muted", title: first },
      "One run of each method: its first seed. The outputs of other seeds are in the results folder.",
    ),
    element(
      "div",
      { class: "controls" },
      element("span", { class: "choice" }, element("label", { for: search.id }, "Search all texts"), search),
      choice(
        "Mark differences from",
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
      status,
    ),
    list,
  );
  search.addEventListener("input", () => find(search.value));
  states[key].listeners.push(show);
  find("");

  function find(query) {
    const pattern = query.toLowerCase();
    state.pattern = pattern;
    state.matches = texts.flatMap((text, n) => (text.includes(pattern) ? [n] : []));
    turn(0);
  }

  function turn(page) {
    state.page = Math.max(0, Math.min(page, Math.ceil(state.matches.length / PAGE) - 1));
    show();
  }

  function show() {
    const pages = Math.max(1, Math.ceil(state.matches.length / PAGE));
    const matching = state.matches.length === count ? `${count} examples` : `${state.matches.length} of ${count} examples`;
    status.textContent = `Page ${state.page + 1} of ${pages}, ${matching}`;
    for (const [name, step] of [
      ["First", -1],
      ["Previous", -1],
      ["Next", 1],
      ["Last", 1],
    ]) {
      // A disabled button would lose the focus, and the keyboard could not return to it.
      const over = state.page + step < 0 || state.page + step >= pages;
      buttons[name].setAttribute("aria-disabled", over);
    }
    list.replaceChildren(...state.matches.slice(state.page * PAGE, (state.page + 1) * PAGE).map(sample));
    if (!state.matches.length) list.append(element("p", { class: "muted" }, "No text matches."));
  }

  /** Fold further references, unless the search is for one of them. */
  function folded(references) {
    const open = state.pattern !== "" && references.some((text) => text.toLowerCase().includes(state.pattern));
    const title = `${references.length} further reference${references.length === 1 ? "" : "s"}`;
    const texts = references.map((text) => element("p", { dir: "auto" }, text));
    return element("details", { class: "further", open }, element("summary", {}, title), ...texts);
  }

  function sample(n) {
    const [name, base] = bases[state.base];
    const rows = (
      examples
        ? [
            ["Source", [examples[n][0]]],
            ["Reference", examples[n][1]],
          ]
        : []
    ).map(([title, [text, ...further]]) =>
      element(
        "div",
        { class: "given" },
        element("dt", {}, title),
        element("dd", { dir: "auto" }, text, further.length ? folded(further) : null),
      ),
    );
    methods.forEach(({ label, output }, method) => {
      if (states[key].hidden.has(method)) return;
      const swatch = element("span", { class: `swatch series-${method % SERIES}` });
      const text = base && name !== label ? marked(base(n), output[n]) : [output[n]];
      const content = output[n].trim() ? text : [element("span", { class: "muted" }, "(empty)")];
      rows.push(element("div", {}, element("dt", {}, swatch, label), element("dd", { dir: "auto" }, ...content)));
    });
    const title = element("p", { id: `${key}-sample-${n}` }, `Example ${n + 1}`);
    return element("section", { class: "sample", "aria-labelledby": title.id }, title, element("dl", {}, ...rows));
  }
}
