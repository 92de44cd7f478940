"""The few shapes that queries have. `$__rate_interval` is Grafana's; `$model` and `$worker` are variables."""

from __future__ import annotations

MODEL = 'model=~"$model"'
PREFILL = f'role="prefill", {MODEL}, worker=~"$worker"'
DECODE = f'role="decode", {MODEL}, worker=~"$worker"'


def rate(counter: str, where: str, *, by: str = "model") -> str:
    """Increase per second, summed up to the labels `by`."""
    return f"sum by ({by}) (rate({counter}{{{where}}}[$__rate_interval]))"


def quantile(q: float, histogram: str, where: str, *, by: str = "") -> str:
    """Quantile of what a histogram saw lately."""
    labels = ", ".join(filter(None, (by, "le")))
    return f"histogram_quantile({q:g}, {rate(f'{histogram}_bucket', where, by=labels)})"


def mean(histogram: str, where: str, *, by: str = "model") -> str:
    """Mean of what a histogram saw lately; NaN where it saw nothing."""
    return f"{rate(f'{histogram}_sum', where, by=by)} / {rate(f'{histogram}_count', where, by=by)}"


def buckets(histogram: str, where: str) -> str:
    """What a heatmap takes."""
    return f"sum by (le) (increase({histogram}_bucket{{{where}}}[$__rate_interval]))"


def share(part: str, where_part: str, whole: str, where: str, *, by: str = "model") -> str:
    """Ratio of two rates; 0 where the whole is 0."""
    below = rate(whole, where, by=by)
    return f"{rate(part, where_part, by=by)} / ({below} > 0) or {below} * 0"
