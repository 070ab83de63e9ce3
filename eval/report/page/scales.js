// Scales: functions from a quantity to a place, with the ticks that a reader can name.
const steps = (low, high, wanted) => {
  const raw = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((each) => each * power >= raw) * power;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, place) => (first + place) * step);
};

const linear = (low, high, from, to, wanted = 5) => {
  const scale = (value) => from + ((value - low) / (high - low)) * (to - from);
  return Object.assign(scale, { ticks: steps(low, high, wanted) });
};

// Decades, with their halves and fifths where there is room. `zero`, where it is given, stands for 0 and less.
const logarithmic = (low, high, from, to, { wanted = 6, zero = null } = {}) => {
  const place = (value) => from + (Math.log(value / low) / Math.log(high / low)) * (to - from);
  const scale = (value) => place(zero !== null ? Math.max(value, zero) : value);
  const of = (factors) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
      for (const factor of factors) found.push(factor * 10 ** power);
    return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001 && (zero === null || tick > zero * 1.5));
  };
  const choices = [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(of);
  const ticks = choices.find((each) => each.length <= wanted) ?? choices.at(-1).filter((_, index) => index % 2 === 0);
  return Object.assign(scale, { ticks: zero === null ? ticks : [0, ...ticks] });
};

const doubling = (values, from, to) => {
  const low = Math.min(...values);
  const high = Math.max(...values);
  return Object.assign(logarithmic(low, high * (low === high ? 2 : 1), from, to), {
    ticks: unique(values).sort((a, b) => a - b),
  });
};

// Quality, so that up is better whatever the score: scores between 0 and 1 on all of it, others on what they span;
// divergences over several decades by their logarithm, where the full cache's 0 has a place of its own at the edge.
const quality = (rows, bottom, top) => {
  const ends = rows.flatMap((row) => row.score.slice(0, 3));
  const lower = rows.some((row) => row.lower);
  if (!lower && ends.every((end) => end >= 0 && end <= 1)) return linear(-0.03, 1.03, bottom, top);
  const least = Math.min(...ends);
  const most = Math.max(...ends);
  const positive = rows.map((row) => row.score[0]).filter((mean) => mean > 0);
  if (lower && positive.length && Math.max(...positive) > 8 * Math.min(...positive)) {
    const floor = Math.min(...positive) / 2.5;
    const exact = rows.some((row) => row.score[0] <= 0);
    return logarithmic(exact ? floor / 1.3 : floor, Math.max(most, ...positive) * 1.2, top, bottom, {
      zero: exact ? floor : null,
    });
  }
  const room = 0.06 * (most - least || Math.abs(most) || 1);
  return lower ? linear(least - room, most + room, top, bottom) : linear(least - room, most + room, bottom, top);
};
