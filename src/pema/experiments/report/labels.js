// Labels beside points: each where it covers no other label, no point and, if it can be, no error bar.

const DIRECTIONS = [[1, 0], [-1, 0], [0, -1], [0, 1], [1, -1], [1, 1], [-1, -1], [-1, 1]];
const DISTANCES = [10, 17, 26, 38, 52];

/**
 * Find a place for every label.
 *
 * `items` are {x, y, width, height}; `bars` are boxes that are better left free; `area` is the plot's box. Returns a
 * box for each item, or null where there is no room: better no label than an illegible one.
 */
function placeLabels(items, bars, area) {
  const taken = items.map(({ x, y }) => ({ left: x - 7, right: x + 7, top: y - 7, bottom: y + 7 }));
  const places = items.map(() => null);
  for (const avoided of [bars, []]) {
    items.forEach((item, index) => {
      if (places[index]) return;
      const box = candidates(item).find(
        (found) => inside(found, area) && !taken.some((other) => meet(found, other)) && !avoided.some((bar) => meet(found, bar)),
      );
      if (box) {
        places[index] = box;
        taken.push(box);
      }
    });
  }
  return places;
}

function* around({ x, y, width, height }) {
  for (const distance of DISTANCES) {
    for (const [right, down] of DIRECTIONS) {
      const reach = right && down ? distance * 0.75 : distance;
      const left = x + right * reach - (right < 0 ? width : right === 0 ? width / 2 : 0);
      const top = y + down * reach - (down < 0 ? height : down === 0 ? height / 2 : 0);
      yield { left, top, right: left + width, bottom: top + height, far: distance > DISTANCES[1] };
    }
  }
}

function candidates(item) {
  return [...around(item)];
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
