// Formats of tokens and numbers.

const MARKS = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥" };

/** The visible form of a token: marks for spaces and line breaks, codes for invisible characters, names in a frame. */
function tokenElement(surface) {
  if (typeof surface === "object") return element("span", { class: "name" }, surface.name);
  const node = element("bdi", { dir: "auto", class: "piece" });
  let plain = "";
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  for (const character of surface) {
    if (!/[\p{C}\p{Z}]/u.test(character)) {
      // An accent without its letter is drawn on a dotted circle.
      plain += !plain && /\p{M}/u.test(character) ? "◌" + character : character;
      continue;
    }
    flush();
    const code = `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    node.append(element("span", { class: MARKS[character] ? "blank" : "name" }, MARKS[character] ?? code));
  }
  flush();
  return node;
}

/** The form of a token for screen readers. */
function spoken(surface) {
  if (typeof surface === "object") return surface.name;
  return surface.trim() || (surface.includes("\n") ? "line break" : "space");
}

/** A probability with about three digits; the exact number is the element's value. */
function percent(p) {
  let text = `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)} %`;
  if (p === 0) text = "0";
  else if (p < 1e-4) text = p.toExponential(1).replace("-", "−");
  else if (p >= 0.9995 && p < 1) text = "> 99.9 %";
  return element("data", { value: p, class: "number" }, text);
}

/** A weight with three decimals. */
const weightText = (weight) => weight.toFixed(3);

/** A symbol with a subscript, as in the equations. */
const symbol = (letter, subscript) => element("span", { class: "symbol" }, letter, element("sub", {}, subscript));
