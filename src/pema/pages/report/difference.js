// Differences between two texts, word by word: the longest common subsequence of their words.

const segmenter = new Intl.Segmenter("en", { granularity: "word" });

function wordsOf(text) {
  return [...segmenter.segment(text)].map(({ segment }) => segment).filter((segment) => segment.trim());
}

/** Compare the words of a text with those of the base, in order: [kind, word], kind "same", "new" or "missing". */
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
  const parts = [];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      parts.push(["same", b[j]]);
      i += 1;
      j += 1;
    } else if (i < a.length && (j === b.length || longest[(i + 1) * columns + j] >= longest[i * columns + j + 1])) {
      parts.push(["missing", a[i]]);
      i += 1;
    } else {
      parts.push(["new", b[j]]);
      j += 1;
    }
  }
  return parts;
}

/** Mark the differences of a text from the base: new words, and missing words between the words of the text. */
function marked(base, text) {
  const nodes = [];
  let [inBase, inText] = [0, 0];
  for (const [kind, words] of joined(compareWords(base, text))) {
    if (kind !== "new") inBase = base.indexOf(words[0], inBase);
    const gap = text.slice(inText).match(/^\s*/)[0];
    nodes.push(gap);
    inText += gap.length;
    if (kind === "missing") {
      const end = after(base, inBase, words);
      const lacking = base.slice(inBase, end);
      const lead = gap || inText === 0 ? "" : " ";
      nodes.push(element("del", { title: `missing: ${lacking}` }, `${lead}${lacking} `));
      inBase = end;
      continue;
    }
    const end = after(text, inText, words);
    const part = text.slice(inText, end);
    nodes.push(kind === "new" ? element("mark", {}, part) : part);
    inText = end;
    if (kind === "same") inBase = after(base, inBase, words);
  }
  nodes.push(text.slice(inText));
  return nodes;
}

/** Groups of neighbours of the same kind. */
function joined(compared) {
  const groups = [];
  for (const [kind, word] of compared) {
    if (groups.at(-1)?.[0] === kind) groups.at(-1)[1].push(word);
    else groups.push([kind, [word]]);
  }
  return groups;
}

/** Ends of the consecutive words of a text. */
function after(text, start, words) {
  return words.reduce((at, word) => text.indexOf(word, at) + word.length, start);
}
