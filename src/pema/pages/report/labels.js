// Labels next to points: each covers no other label, no point and, if possible, no error bar.

const DIRECTIONS = [
  [1, 0],
  [-1, 0],
  [0, -1],
  [0, 1],
  [1, -1],
  [1, 1],
  [-1, -1],
  [-1, 1],
];
const DISTANCES = [10, 17, 26, 38, 52];

/**
 * Find a box for every label, nearer to its own point than to any other.
 *
 * `items` are {x, y, width, height}; `bars` are boxes to keep free if possible; `area` is the plot's box. Returns a
 * box for each item, or null if there is no space: no label is better than an illegible one.
 */
function placeLabels(items, bars, area) {
  const taken = items.map(({ x, y }) => ({ left: x - 7, right: x + 7, top: y - 7, bottom: y + 7 }));
  const places = items.map(() => null);
  const clear = (box) => inside(box, area) && !taken.some((other) => meet(box, other));
  const plain = (box, item) => items.every((other) => other === item || away(box, other) > away(box, item));
  const wishes = [(box, item) => plain(box, item) && !bars.some((bar) => meet(box, bar)), plain];
  for (const wish of wishes) {
    items.forEach((item, index) => {
      if (places[index]) return;
      const box = around(item).find((candidate) => clear(candidate) && wish(candidate, item));
      if (!box) return;
      places[index] = box;
      taken.push(box);
    });
  }
  return places;
}

function around({ x, y, width, height }) {
  return DISTANCES.flatMap((distance) =>
    DIRECTIONS.map(([right, down]) => {
      const reach = right && down ? distance * 0.75 : distance;
      const left = x + right * reach - (right < 0 ? width : right === 0 ? width / 2 : 0);
      const top = y + down * reach - (down < 0 ? height : down === 0 ? height / 2 : 0);
      return { left, top, right: left + width, bottom: top + height, far: distance > DISTANCES[1] };
    }),
  );
}

/** Distance of a box from a point. */
function away(box, { x, y }) {
  return Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
}

function meet(a, b) {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

function inside(box, area) {
  return box.left >= area.left && box.right <= area.right && box.top >= area.top && box.bottom <= area.bottom;
}

/** Push labels at the ends of lines apart: sorted by height, at least `gap` between neighbours, within the area. */
function spreadEnds(ends, gap, top, bottom) {
  const sorted = [...ends].sort((a, b) => a.y - b.y);
  let last = top - gap;
  for (const end of sorted) {
    end.place = Math.max(end.y, last + gap);
    last = end.place;
  }
  let next = bottom + gap;
  for (const end of sorted.reverse()) {
    end.place = Math.min(end.place, next - gap);
    next = end.place;
  }
}
