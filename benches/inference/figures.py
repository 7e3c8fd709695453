"""The table of figures: ours beside the others, the ratio, and whether what must be reached is reached."""
import os
import statistics
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "side-by-side"))

from lab import summary  # noqa: E402


class Figures:
    def __init__(self):
        self.rows, self.also = [], {}

    def compare(self, figure, text, unit, ours, beside, against, reach, higher=False):
        """Bounded by a ratio to somebody measured in the same rounds. Where the rounds pair up, the ratio is that of the medians."""
        others = {name: summary(values, 3) for name, values in beside.items()}
        own, other = statistics.median(ours), others[against]["median"]
        # Below nothing there is no ratio: then whatever we add is measured against one microsecond.
        ratio = own / max(other, 1e-9) if other and other > 0 else None
        met = None if ratio is None else (ratio >= reach if higher else ratio <= reach)
        self.add(figure, text, unit, summary(ours, 3), others, met, against=against, ratio=ratio and round(ratio, 3), reach=reach, bound="ratio")

    def limit(self, figure, text, unit, ours, beside, reach):
        """Bounded by a value: all of ours stay below it."""
        own = summary(ours, 3)
        self.add(figure, text, unit, own, beside, own["max"] is not None and own["max"] <= reach, reach=reach, bound="value")

    def add(self, figure, text, unit, ours, beside, met, **more):
        self.rows.append({"figure": figure, "text": text, "unit": unit, "ours": ours, "beside": beside, **more, "reach_met": met})
        # What has a limit is judged by its worst.
        words = f"{ours['max' if more.get('bound') == 'value' else 'median']} {unit}"
        ratio = f", {more['ratio']} × {more['against']}" if more.get("ratio") is not None else ""
        verdict = {True: "reached", False: "MISSED", None: "no bound"}[met]
        print(f"bench:   {text}: {words}{ratio} (reach {more.get('reach')}): {verdict}", file=sys.stderr, flush=True)
