"""GenEval's decision rules once more, from their published description alone, as plain loops over dictionaries.

Written before the product's rules and importing none of them. Sources: Ghosh, Hajishirzi, Schmidt 2023 (arXiv
2310.11513, section 3 and appendix) and the thresholds that the project documents. A detection is
{"class", "score", "box": [x0, y0, x1, y1], "color"}; `color` is what the colour classifier answers for it.
"""

from __future__ import annotations


def area(box):
    # The benchmark counts pixels, both ends included.
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def overlap(a, b):
    shared = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    both = area(a) + area(b) - shared
    return shared / both if both else 0


def kept(detections, name, threshold, limit=16, max_overlap=1.0):
    """Detections of one class, most confident first: above the threshold, at most `limit`, then suppression."""
    mine = [(d["score"], place, d) for place, d in enumerate(detections) if d["class"] == name]
    mine.sort(key=lambda row: (row[0], row[1]))
    best_first = [d for score, _, d in reversed(mine) if score > threshold][:limit]
    if max_overlap == 1:
        return best_first
    chosen = []
    for candidate in best_first:
        if all(overlap(other["box"], candidate["box"]) < max_overlap for other in chosen):
            chosen.append(candidate)
    return chosen


def relations(a, b, margin=0.1):
    """Where A lies relative to B, by the offset of the centres less `margin` times the summed sizes, axis by axis."""
    ax, ay = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
    bx, by = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    offset = [ax - bx, ay - by]
    sizes = [abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1])]
    left_over = []
    for o, size in zip(offset, sizes, strict=True):
        rest = abs(o) - margin * size
        rest = rest if rest > 0 else 0.0
        left_over.append(rest if o > 0 else -rest if o < 0 else 0.0)
    if abs(left_over[0]) < 1e-3 and abs(left_over[1]) < 1e-3:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = left_over[0] / length, left_over[1] / length
    found = set()
    if dx < -0.5:
        found.add("left of")
    if dx > 0.5:
        found.add("right of")
    if dy < -0.5:
        found.add("above")
    if dy > 0.5:
        found.add("below")
    return found


def verdict(detections, metadata, max_overlap=1.0):
    """True when every `include` clause holds and no `exclude` clause does."""
    threshold = 0.9 if metadata["tag"] == "counting" else 0.3
    right = True
    groups = []
    for clause in metadata.get("include", []):
        wanted = clause["count"]
        candidates = kept(detections, clause["class"], threshold, max_overlap=max_overlap)[:wanted]
        good = len(candidates) == wanted
        if good and "color" in clause:
            of_that_color = 0
            for d in candidates:
                if d["color"] == clause["color"]:
                    of_that_color += 1
            good = of_that_color >= wanted
        if good and "position" in clause:
            relation, target = clause["position"]
            if groups[target] is None:
                good = False
            else:
                for d in candidates:
                    for other in groups[target]:
                        if relation not in relations(d["box"], other["box"]):
                            good = False
        groups.append(candidates if good else None)
        if not good:
            right = False
    for clause in metadata.get("exclude", []):
        if len(kept(detections, clause["class"], threshold, max_overlap=max_overlap)) >= clause["count"]:
            right = False
    return right
