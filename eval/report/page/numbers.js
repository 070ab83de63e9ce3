// Numbers as a reader wants them: three digits, the unit beside, and a sign where one is meant.
const digits = (value, precision = 3) => {
  if (value === null || !Number.isFinite(value)) return "none";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) return value.toExponential(precision - 1);
  return String(Number(value.toPrecision(precision)));
};
const percent = (share, precision = 3) => `${digits(100 * share, precision)} %`;
const signed = (value) => (value > 0 ? `+${digits(value)}` : digits(value).replace("-", "−"));
const binary = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = bytes > 0 ? Math.min(units.length - 1, Math.floor(Math.log2(bytes) / 10)) : 0;
  return `${digits(bytes / 2 ** (10 * power))} ${units[power]}`;
};
const seconds = (value) => {
  if (value <= 0) return "0 s";
  const [factor, unit] = value < 1e-3 ? [1e6, "µs"] : value < 1 ? [1e3, "ms"] : [1, "s"];
  return `${digits(value * factor)} ${unit}`;
};
const interval = ([mean, low, high], show = digits) => `${show(mean)} [${show(low)}, ${show(high)}]`;
const tokens = (count) => (count >= 1024 && count % 1024 === 0 ? `${count / 1024}k` : String(count));
