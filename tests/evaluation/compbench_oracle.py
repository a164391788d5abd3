"""T2I-CompBench(++) scores of one image, as plain loops: an independent oracle.

Sources.  [S] Karine-Huang/T2I-CompBench at 1b70949 (2026-05-07): BLIPvqa_eval/BLIP_vqa.py and
models/blip_vqa.py, UniDet_eval/{2D_spatial_eval,3D_spatial_eval,numeracy_eval}.py,
MLLM_eval/ShareGPT4V-CoT_eval/Share_eval.py, Readme.md.  [P] the papers of 2023 and 2025 (arXiv
2307.06350 v1, v3): only abstracts were at hand, their bodies are quoted from memory.  [I] the
maintainer's replies in issues 4 and 23.  Default: [S], since published numbers come from it; where a
reader could well have taken the other way, a keyword gives that other way.

attributes     Product of P(yes) = yes / (yes + no) over the prompt's noun phrases; "<phrase>?" each.
  a1 at most 8 phrases count (--np_num's default); no phrase at all gives 1.  [P] is silent.
  a2 [S] stores each P(yes), and the product, with 4 decimals: a by-product of its files, [P] just
     multiplies.  Taken: no rounding; rounded=True gives [S].  (The rest of [S] is float32.)
spatial_2d     Both found: .25 (score1 + score2) + .5 position.  One: .25 its score.  None: 0.  Then
               anything below .5 becomes 0, so one found object scores 0 ([S]; the zeroing is not in
               [P] as I recall it).
  b1 phrase: the first of on side of / next to / near / on the left of / on the right of / on the
     bottom of / on the top of / on top of that is a substring of `words`, in that order.  Only
     "on the top of" is then scored: "on top of", "on the side of" ([P]'s spelling) and anything
     else give position 0.  No prompt of the spatial files uses those.
  b2 name: exact label, after girl/boy/man/woman -> person for the wanted names (not for labels).
     First detection in the detector's order, which [I]4 says is the most confident one.
  b3 two names may become one ("a man next to a woman" -> person twice): the same box serves both,
     so position is 1 for the near words and 0 for a direction.  Taken as is.
  b4 directions: centre on the right side of the other, strictly further along that axis than across
     it; then 1 if IoU < .1, else .1 / IoU.  [P] has only the hard version (IoU below .1).  [S] taken.
  b5 near words: 1 if |dx| < 150 OR |dy| < 150 (either one, so a far object level with the other
     scores 1), else 150 / max(|dx|, |dy|).  [P]: "distance against a threshold".  [S] taken.
  b6 the 150 pixels: [S] detects on a copy whose short side is resized to 479, long side at most 480,
     so a square picture is about 480 wide whatever its size.  `detections` are taken as given:
     boxes must already be in that frame.  Boxes of a 1024 picture would give another score.
  b7 union of zero area: [S] divides by zero; IoU 0 here.  Detector score bar is .5, outside here.
spatial_3d     As 2D without the zeroing below .5, and the position from depth, larger = nearer (DPT):
               in front of: mean depth of 1 greater than of 2; behind, hidden: less.  IoU > .5 gives 1,
               0 < IoU < .5 gives IoU / .5, no overlap gives 0 ([I]23: threshold chosen empirically).
  c1 IoU of exactly .5 is in neither branch: 0.  Taken.  Equal depths: 0.
  c2 [S] indexes the depth map [x0:x1, y0:y1] although its rows are y, so it reads the box mirrored
     in the diagonal; [P] speaks of the objects' depth.  DEFAULT HERE IS [S]; swapped=False reads the
     box itself.  Corners are cut with int(); outside the map is ignored (negative corners, which
     [S] would wrap around, do not come from its detector); an empty region (nan) gives 0.
  c3 name: SUBSTRING of the label ("car" in "cart", "key" in "monkey"), unlike 2D; same person rule.
  c4 which box: [S] walks the detections until both names have been seen and keeps overwriting, so a
     name gets its LAST match up to that point; if only one name is present, its first match.
     [I]4's "most confident" would be first_match=True.  Default [S].
  c5 presence is tested in the labels joined by blanks, where a name of several words could straddle
     two labels and crash; here it must be within one label.
  c6 phrase: first of in front of / behind / hidden in `words`; 2D phrases are not looked for: 0.
  c7 depth is quantised to 8 bits and resized like the picture in [S]; here it is used as given.
numeracy       Per wanted object, weight 1 / n: half for presence, half more for the exact count.
  d1 first, in order, a detection is dropped if a kept one of the same label has IoU > .9 with it or
     is covered, or covers it, by more than .9 of the smaller area (widths + 1, inclusive pixels).
  d2 names (singular): girl/boy/man/woman -> person, ship -> boat, goldfish -> fish, painting ->
     picture, and "telivision" -> tv: misspelt, so television is NOT mapped.  Taken as is.
  d3 a name with no exact label renames every label containing it; that lasts for later names.
     With an exact label, labels merely containing it do not count.
  d4 two wanted names that become one ("one boy and two girls") each face the joint count.  Taken.
  d5 nothing wanted: [S] divides by zero; ValueError here.  Parsing of the prompt is outside (it
     knows a, an, one .. eight and the names of examples/dataset/new_objects.txt).
likert         Levels 1 .. 5 are 20, 40, 60, 80, 100 (non-spatial, complex; in [S] "action", "complex").
  e1 scale: [S] reports 0 .. 100; all other scores are 0 .. 1.  Taken: level / 5; scale=100 for [S].
  e2 an unreadable or unknown level leaves [S]'s full mark 100 (its `continue`).  ValueError here.
  e3 colour/shape/texture in [S] use 10, 20, 75, 100 and multiply over phrases: not asked for.
     Readme's own main metric is CLIPScore for non-spatial, 3-in-1 for complex; this one optional.
"""

FLAT = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
DEEP = ("in front of", "behind", "hidden")
# phrase: axis, and the sign of (centre of 1 - centre of 2) it asks for
DIRECTIONS = {
    "on the left of": (0, -1),
    "on the right of": (0, 1),
    "on the top of": (1, -1),
    "on the bottom of": (1, 1),
}
RENAMED = {"ship": "boat", "telivision": "tv", "goldfish": "fish", "painting": "picture"}


def attributes(answers, rounded=False):
    total = 1.0
    for answer in answers[:8]:
        total *= round(answer, 4) if rounded else answer
    return round(total, 4) if rounded else total


def _overlap(a, b):
    wide = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    return wide * high / both if both else 0.0


def _phrase(words, known):
    for phrase in known:
        if phrase in words:
            return phrase
    return None


def _person(name):
    return "person" if name in ("girl", "boy", "man", "woman") else name


def _position_2d(phrase, a, b):
    gap = [(a[axis] + a[axis + 2]) / 2 - (b[axis] + b[axis + 2]) / 2 for axis in (0, 1)]
    if phrase in ("on side of", "next to", "near"):
        if abs(gap[0]) < 150 or abs(gap[1]) < 150:
            return 1.0
        return 150 / max(abs(gap[0]), abs(gap[1]))
    if phrase in DIRECTIONS:
        axis, sign = DIRECTIONS[phrase]
        if gap[axis] * sign > 0 and abs(gap[axis]) > abs(gap[1 - axis]):
            iou = _overlap(a, b)
            return 1.0 if iou < 0.1 else 0.1 / iou
    return 0.0


def spatial_2d(words, first_name, second_name, detections):
    phrase = _phrase(words, FLAT)
    found = []
    for name in (_person(first_name), _person(second_name)):
        matches = [detection for detection in detections if detection["label"] == name]
        found.append(matches[0] if matches else None)
    score = sum((0.25 * match["score"] for match in found if match is not None), 0.0)
    if found[0] is not None and found[1] is not None:
        score += _position_2d(phrase, found[0]["box"], found[1]["box"]) / 2
    return score if score >= 0.5 else 0.0


def _mean_depth(depth, box, swapped):
    """Mean of the map over the box; None if nothing of it lies inside."""
    x0, y0, x1, y1 = [max(0, int(edge)) for edge in box]
    if swapped:
        x0, y0, x1, y1 = y0, x0, y1, x1
    values = [value for row in depth[y0:y1] for value in row[x0:x1]]
    return sum(values) / len(values) if values else None


def _position_3d(phrase, a, b, depth, swapped):
    if phrase is None:
        return 0.0
    first, second = _mean_depth(depth, a, swapped), _mean_depth(depth, b, swapped)
    if first is None or second is None or first == second:
        return 0.0
    if (first > second) != (phrase == "in front of"):
        return 0.0
    iou = _overlap(a, b)
    if iou == 0.5:
        return 0.0
    return 1.0 if iou > 0.5 else iou / 0.5


def spatial_3d(words, first_name, second_name, detections, depth, swapped=True, first_match=False):
    phrase = _phrase(words, DEEP)
    hits = []
    for name in (_person(first_name), _person(second_name)):
        hits.append([place for place, detection in enumerate(detections) if name in detection["label"]])
    if not hits[0] or not hits[1]:
        return sum((0.25 * detections[places[0]]["score"] for places in hits if places), 0.0)
    stop = max(hits[0][0], hits[1][0])  # where both names have been seen
    chosen = []
    for places in hits:
        chosen.append(detections[places[0] if first_match else max(p for p in places if p <= stop)])
    score = 0.25 * chosen[0]["score"] + 0.25 * chosen[1]["score"]
    return score + _position_3d(phrase, chosen[0]["box"], chosen[1]["box"], depth, swapped) / 2


def _same_thing(a, b):
    wide = max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    high = max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    area_a, area_b = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    shared = wide * high
    return shared / (area_a + area_b - shared) > 0.9 or shared / area_a > 0.9 or shared / area_b > 0.9


def numeracy(wanted, detections):
    if not wanted:
        raise ValueError("no object is asked for")
    kept = []
    for detection in detections:
        if not any(d["label"] == detection["label"] and _same_thing(d["box"], detection["box"]) for d in kept):
            kept.append(detection)
    labels = [detection["label"] for detection in kept]
    score = 0.0
    for name, number in wanted:
        name = _person(name)
        name = RENAMED.get(name, name)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        if name in labels:
            score += 0.5 / len(wanted)
            if labels.count(name) == number:
                score += 0.5 / len(wanted)
    return score


def likert(level, scale=1.0):
    if level not in (1, 2, 3, 4, 5):
        raise ValueError(f"not a level: {level!r}")
    return level / 5 * scale


def _self_check():
    def det(label, score, *box):
        return {"label": label, "score": score, "box": list(box)}

    def same(a, b):
        assert abs(a - b) < 1e-9, (a, b)

    same(attributes([0.5, 0.8]), 0.4)
    same(attributes([]), 1.0)
    same(attributes([0.33333, 0.9], rounded=True), 0.3)
    # centres (50, 50) and (250, 50)
    cat, dog = det("cat", 0.8, 0, 0, 100, 100), det("dog", 0.6, 200, 0, 300, 100)
    same(spatial_2d("on the left of", "cat", "dog", [cat, dog]), 0.35 + 0.5)
    same(spatial_2d("on the right of", "cat", "dog", [cat, dog]), 0.0)  # .35 < .5
    same(spatial_2d("on the left of", "cat", "cow", [cat, dog]), 0.0)
    same(spatial_2d("next to", "cat", "dog", [cat, dog]), 0.85)  # dy = 0 is enough
    low = det("dog", 0.6, 300, 200, 400, 300)  # centre (350, 250): gaps 300, 200
    same(spatial_2d("near", "cat", "dog", [cat, low]), 0.35 + 0.25)
    lap = det("dog", 0.6, 60, 0, 160, 100)  # IoU 40 / 160 = .25
    same(spatial_2d("on the left of", "cat", "dog", [cat, lap]), 0.35 + 0.2)
    same(spatial_2d("on top of", "cat", "dog", [det("cat", 1.0, 0, 0, 9, 9), det("dog", 1.0, 0, 90, 9, 99)]), 0.5)
    same(
        spatial_2d("on the top of", "man", "dog", [det("person", 1.0, 0, 0, 9, 9), det("dog", 1.0, 0, 90, 9, 99)]), 1.0
    )
    # rows 0-1 near (.9), rows 2-3 far (.1); the boxes lie one above the other, no overlap, then IoU 1/3
    depth = [[0.9] * 4, [0.9] * 4, [0.1] * 4, [0.1] * 4]
    up, down = det("cat", 0.8, 0, 0, 4, 2), det("dog", 0.4, 0, 2, 4, 4)
    same(spatial_3d("in front of", "cat", "dog", [up, down], depth, swapped=False), 0.3)
    down = det("dog", 0.4, 0, 1, 4, 3)  # mean .5; shared 4 of 12
    same(spatial_3d("in front of", "cat", "dog", [up, down], depth, swapped=False), 0.3 + 1 / 3)
    same(spatial_3d("behind", "cat", "dog", [up, down], depth, swapped=False), 0.3)
    same(spatial_3d("hidden by", "dog", "cat", [up, down], depth, swapped=False), 0.3 + 1 / 3)
    same(spatial_3d("in front of", "cat", "dog", [up, down], depth), 0.3)  # mirrored: both regions .5
    same(spatial_3d("in front of", "cat", "cow", [up, down], depth), 0.2)
    twice = [up, det("cat", 0.4, 0, 0, 4, 2), down]
    same(spatial_3d("behind", "cat", "dog", twice, depth), 0.1 + 0.1)
    same(spatial_3d("behind", "cat", "dog", twice, depth, first_match=True), 0.2 + 0.1)
    two = [det("car", 0.9, 0, 0, 99, 99), det("car", 0.8, 1, 1, 98, 98), det("car", 0.7, 200, 0, 299, 99)]
    same(numeracy([("car", 2)], two), 1.0)
    same(numeracy([("car", 3)], two), 0.5)
    same(numeracy([("car", 2), ("boy", 1)], two), 0.5)
    same(numeracy([("boat", 1)], [det("watercraft, boat", 0.9, 0, 0, 9, 9)]), 1.0)
    same(numeracy([("boy", 1), ("girl", 2)], [det("person", 0.9, 20 * i, 0, 20 * i + 9, 9) for i in range(3)]), 0.5)
    same(likert(4), 0.8)
    same(likert(5, scale=100), 100)
    print("OK")


if __name__ == "__main__":
    _self_check()
