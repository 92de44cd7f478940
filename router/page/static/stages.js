// The stages of a request, in order: their names in the data, and what people read.

export const STAGES = new Map([
  ["queue", "Queue"],
  ["reserve", "Reserve"],
  ["prefill", "Prefill"],
  ["transfer", "Transfer (exposed)"],
  ["first_decode_step", "First decode step"],
  ["decode", "Decode"],
]);

/** The last moment, in seconds of the router's clock, at which any request was in a stage. */
export function lastSeen(requests, now, wanted) {
  let last = -Infinity;
  for (const request of requests) {
    request.legs.forEach((leg, index) => {
      const isOpen = request.ended === null && index === request.legs.length - 1;
      leg.spans.forEach(([stage, start, length], position) => {
        if (!wanted(stage, leg)) return;
        const open = isOpen && position === leg.spans.length - 1;
        last = Math.max(last, open ? now : request.arrived_at + start + length);
      });
    });
  }
  return last;
}
