// Differences between two texts, word by word: the longest common subsequence of their words.

const segmenter = new Intl.Segmenter("en", { granularity: "word" });

function wordsOf(text) {
  return [...segmenter.segment(text)].map(({ segment }) => segment).filter((segment) => segment.trim());
}

/** Say of a text's words whether the base has them too, in order: [kind, word], kind "same", "new" or "missing". */
function compareWords(base, text) {
  const [a, b] = [wordsOf(base), wordsOf(text)];
  const columns = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * columns);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const down = longest[(i + 1) * columns + j];
      const right = longest[i * columns + j + 1];
      longest[i * columns + j] = a[i] === b[j] ? longest[(i + 1) * columns + j + 1] + 1 : Math.max(down, right);
    }
  }
  const found = [];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      found.push(["same", b[j]]);
      i += 1;
      j += 1;
    } else if (i < a.length && (j === b.length || longest[(i + 1) * columns + j] >= longest[i * columns + j + 1])) {
      found.push(["missing", a[i]]);
      i += 1;
    } else {
      found.push(["new", b[j]]);
      j += 1;
    }
  }
  return found;
}

/** Write a text with what differs from the base marked; its spaces stay as they are. */
function marked(base, text) {
  const nodes = [];
  let at = 0;
  let missing = [];
  const flush = () => {
    if (missing.length) nodes.push(element("del", { title: `missing: ${missing.join(" ")}` }, `${missing.join(" ")} `));
    missing = [];
  };
  for (const [kind, word] of compareWords(base, text)) {
    if (kind === "missing") {
      missing.push(word);
      continue;
    }
    const start = text.indexOf(word, at);
    nodes.push(text.slice(at, start));
    flush();
    nodes.push(kind === "new" ? element("mark", {}, word) : word);
    at = start + word.length;
  }
  nodes.push(text.slice(at));
  flush();
  return nodes;
}
