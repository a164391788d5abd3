"""T2I-CompBench's formulas once more, from their published description alone, as plain loops over dictionaries.

Written before the product's formulas and importing none of them. Source: Huang et al. 2023 and 2025 (T2I-CompBench
and T2I-CompBench++, sections on evaluation metrics) and the scoring scripts' documented constants. A detection is
{"label", "score", "box": [x0, y0, x1, y1]}, in the detector's order, in pixels of the frame that the detector sees.
"""

from __future__ import annotations

PEOPLE = {"girl", "boy", "man", "woman"}


def attributes(answers):
    """Product of P(yes) over the noun phrases, each rounded to four digits; none asked means nothing was wrong."""
    result = 1.0
    for p in answers:
        result = result * float(f"{p:.4f}")
    return float(f"{result:.4f}")


def iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = (w if w > 0 else 0) * (h if h > 0 else 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def flat_relation(words, first, second):
    """How well the first object stands as `words` says to the second, 0 to 1 (2D)."""
    (fx, fy), (sx, sy) = centre(first), centre(second)
    right, down = sx - fx, sy - fy  # from the first object to the second
    if words in ("next to", "on side of", "near"):
        if abs(right) < 150 or abs(down) < 150:
            return 1.0
        return 150 / max(abs(right), abs(down))
    sideways = abs(right) > abs(down)
    upright = abs(down) > abs(right)
    holds = {
        "on the right of": right < 0 and sideways,
        "on the left of": right > 0 and sideways,
        "on the bottom of": down < 0 and upright,
        "on the top of": down > 0 and upright,
    }.get(words, False)
    if not holds:
        return 0.0
    shared = iou(first, second)
    return 1.0 if shared < 0.1 else 0.1 / shared


def as_person(name):
    return "person" if name in PEOPLE else name


def spatial_2d(words, first_name, second_name, detections):
    first = next((d for d in detections if d["label"] == as_person(first_name)), None)
    second = next((d for d in detections if d["label"] == as_person(second_name)), None)
    if first and second:
        score = 0.25 * first["score"] + 0.25 * second["score"] + flat_relation(words, first["box"], second["box"]) / 2
    elif first or second:
        score = 0.25 * (first or second)["score"]
    else:
        score = 0.0
    return 0.0 if score < 0.5 else score


def mean_depth(depth, box):
    # The authors' script takes x as the depth map's first axis.
    total = count = 0
    for row in depth[int(box[0]) : int(box[2])]:
        for value in row[int(box[1]) : int(box[3])]:
            total += value
            count += 1
    return total / count if count else None


def deep_relation(words, first, second, depth):
    """3D: nearer is a greater value of the map; boxes must overlap, fully credited above an overlap of one half."""
    a, b = mean_depth(depth, first), mean_depth(depth, second)
    shared = iou(first, second)
    if a is None or b is None or shared <= 0 or shared == 0.5:
        return 0.0
    nearer = a > b
    farther = a < b
    if (words == "in front of" and nearer) or (words in ("behind", "hidden") and farther):
        return 1.0 if shared > 0.5 else shared / 0.5
    return 0.0


def spatial_3d(words, first_name, second_name, detections, depth):
    one, two = as_person(first_name), as_person(second_name)
    everything = " ".join(d["label"] for d in detections)
    if one in everything and two in everything:
        first = second = None
        for d in detections:
            if one in d["label"]:
                first = d
            if two in d["label"]:
                second = d
            if first is not None and second is not None:
                break
        if first is None or second is None:
            return None  # a name across two labels, where the script has no answer
        seen = 0.25 * first["score"] + 0.25 * second["score"]
        return seen + deep_relation(words, first["box"], second["box"], depth) / 2
    for name in (one, two):
        if name in everything:
            for d in detections:
                if name in d["label"]:
                    return 0.25 * d["score"]
            return None
    return 0.0


def same_object(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(0, w) * max(0, h)
    size_a = (a[2] - a[0] + 1) * (a[3] - a[1] + 1)
    size_b = (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
    return shared / (size_a + size_b - shared) > 0.9 or shared / size_a > 0.9 or shared / size_b > 0.9


OTHER_NAMES = {"boy": "person", "girl": "person", "man": "person", "woman": "person", "ship": "boat"}
OTHER_NAMES |= {"telivision": "tv", "goldfish": "fish", "painting": "picture"}


def numeracy(wanted, detections):
    """`wanted`: [(name, number)]. Half of each object's share for being there, half for the right number."""
    labels, boxes = [], []
    for d in detections:
        doubled = False
        for label, box in zip(labels, boxes, strict=True):
            if label == d["label"] and same_object(d["box"], box):
                doubled = True
        if not doubled:
            labels.append(d["label"])
            boxes.append(d["box"])
    score = 0.0
    for name, number in wanted:
        name = OTHER_NAMES.get(name, name)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        if name in labels:
            score += 0.5 / len(wanted)
            if labels.count(name) == number:
                score += 0.5 / len(wanted)
    return score


def likert(level):
    """A grade of 1 to 5 as a share of the best."""
    return {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.8, 5: 1.0}[level]
