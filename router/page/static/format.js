// Numbers with their units, each in a width that changes as little as possible.

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return grouped.format(value);
}

/** [number, unit] of a value by factors of 1000. */
function scaled(value, units) {
  let index = 0;
  while (value >= 999.5 && index < units.length - 1) {
    value /= 1000;
    index += 1;
  }
  return [digits(value), units[index]];
}

/** About three digits, without trailing noise. */
function digits(value) {
  if (value >= 99.5 || Number.isInteger(value)) return grouped.format(value);
  return value.toFixed(value >= 9.95 ? 1 : 2);
}

export function rate(perSecond) {
  return [perSecond >= 99.5 || !perSecond ? grouped.format(perSecond) : perSecond.toFixed(1), "tok/s"];
}

export function bytesPerSecond(value) {
  return scaled(value, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"]);
}

export function seconds(value) {
  if (value < 0.0000005) return "0 ms";
  if (value < 0.00995) return `${(value * 1000).toFixed(value < 0.000995 ? 2 : 1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  if (value < 59.95) return `${value.toFixed(value < 9.995 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function percentiles(values) {
  return values ? `${seconds(values.p50_s)} · p99 ${seconds(values.p99_s)}` : "–";
}

export function percent(share) {
  return share > 0 && share < 0.01 ? `${(share * 100).toFixed(1)} %` : `${Math.round(share * 100)} %`;
}

export function age(value) {
  if (value < 60) return `${Math.max(Math.round(value), 0)} s`;
  if (value < 3600) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

/** "1 request", "2 requests". */
export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}
