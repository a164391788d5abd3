"""GenEval's verdict on one image, as plain loops: an independent oracle.

Sources.  [S] evaluation/evaluate_images.py of djghosh13/geneval at af4902f (2025-03-03, newest
stored); [P] arXiv 2310.11513 (only its abstract and contents were at hand; what is said of its body
is from memory and marked so); [M] prompts/evaluation_metadata.jsonl (553 entries).  Where they
differ [S] is taken, since published GenEval numbers come from running it.

Rules
 R1 Threshold: a box counts if its score is strictly above .3, or .9 when tag is "counting" [S; P].
 R2 Cap: the 16 best boxes of each class stay, by score, best first [S].  The cap is applied after
    the threshold and BEFORE the overlap suppression.
 R3 Overlap: greedily, best first, a box stays if its IoU with every kept box of its class is
    strictly below max_overlap; at exactly 1.0 (default) nothing is compared, twins stay [S].  IoU
    takes boxes as inclusive pixel ranges (width = x1 - x0 + 1); two empty boxes give 0.
 R4 include clauses are all required (AND), in order [S].  A clause looks only at the `count` best
    kept boxes of its class; fewer than that fails it.  More than `count` is no failure: only
    `exclude` can forbid extras (in [M] just the counting tag has it: count n, exclude n + 1).
 R5 colour: at least `count` of those `count` boxes must be classified so, that is, all of them; a
    lower scored box of the right colour does not help [S, "CHANGED" note].
 R6 position [relation, i]: looked at only if the clause passed so far (count, colour).  Fails if
    clause i failed for any reason; else EVERY chosen box must hold the relation to EVERY chosen
    box of clause i [S].  i counts include clauses from 0 and must point to an earlier one.
 R7 exclude: the image fails as soon as any clause finds >= count kept boxes of its class (OR);
    count is over all kept boxes after R1-R3, not the chosen ones [S].
 R8 no early exit: later clauses are still read after a failure; only the reason text, not the
    verdict, depends on it [S].

Relations of a to b (R9, [S]).  Per axis: gap = centre a - centre b; slack = margin * (size a + size
b); reach = max(|gap| - slack, 0) with gap's sign.  If both reaches are below 1e-3: none.  Otherwise
each reach is divided by the length of the RAW gap vector; x < -.5 left of, x > .5 right of, y < -.5
above, y > .5 below (y grows downwards), all strict.  Two relations can hold at once.  The reach is
cut by the slack but the length is not, so near the threshold angle is stricter than 30 degrees.

Ambiguous spots, and what is taken here
 A1 [P] (from memory) states only the per-axis test |gap| > .1 (size a + size b); the further ">.5 of
    the direction" test and the 1e-3 floor are in [S] alone.  Taken: [S].
 A2 "threshold .3": >= or >?  Strictly greater, [S].  (It compares float32 scores; this uses doubles,
    so a float32 .3 handed over as a double, .30000001, would pass here but not there.)
 A3 Order of boxes with equal scores: an ascending numpy sort, reversed, so for up to 16 boxes of a
    class the LATER box comes first; beyond that numpy promises nothing.  Taken: later first.  It
    matters only if tied boxes differ in place or colour: keep such ties out of comparisons.
 A4 Cap before NMS (R2): [P] is silent.  Taken: [S].
 A5 max_overlap above 1: [S] then compares and everything passes; below: strict.  Taken as is.
 A6 position pointing to a later clause: [S] would raise IndexError; so does this.
 A7 A class named by two include clauses: both pick the same best boxes (no box is used up), [S].
 A8 Margin relative to the image, or to the boxes?  To the boxes' summed sizes, [S] (and [P]).
 A9 A missing 'tag' raises KeyError as in [S].
"""

NORMAL, COUNTING, CAP = 0.3, 0.9, 16


def relations(a, b, margin=0.1):
    """Which of 'left of', 'right of', 'above', 'below' hold for box a relative to box b (R9)."""
    gaps, reaches = [], []
    for axis in (0, 1):
        a_low, a_high, b_low, b_high = a[axis], a[axis + 2], b[axis], b[axis + 2]
        gap = (a_low + a_high) / 2 - (b_low + b_high) / 2
        reach = abs(gap) - margin * (abs(a_high - a_low) + abs(b_high - b_low))
        if reach < 0:
            reach = 0.0
        gaps.append(gap)
        reaches.append(reach if gap > 0 else -reach)
    if abs(reaches[0]) < 1e-3 and abs(reaches[1]) < 1e-3:
        return set()
    length = (gaps[0] ** 2 + gaps[1] ** 2) ** 0.5
    found = set()
    for reach, lower, higher in ((reaches[0], "left of", "right of"), (reaches[1], "above", "below")):
        if reach / length < -0.5:
            found.add(lower)
        if reach / length > 0.5:
            found.add(higher)
    return found


def _pixels(box):
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _iou(a, b):
    shared = _pixels([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    either = _pixels(a) + _pixels(b) - shared
    return shared / either if either else 0.0


def kept_boxes(detections, tag, max_overlap=1.0):
    """{class: detections that count, best first} (R1-R3)."""
    bar = COUNTING if tag == "counting" else NORMAL
    groups = {}
    for place, detection in enumerate(detections):
        if detection["score"] > bar:
            groups.setdefault(detection["class"], []).append((detection["score"], place, detection))
    kept = {}
    for name, group in groups.items():
        group.sort(key=lambda entry: (-entry[0], -entry[1]))
        chosen = []
        for _, _, detection in group[:CAP]:
            clear = True
            if max_overlap != 1:
                for earlier in chosen:
                    if not _iou(earlier["box"], detection["box"]) < max_overlap:
                        clear = False
            if clear:
                chosen.append(detection)
        kept[name] = chosen
    return kept


def verdict(detections, metadata, max_overlap=1.0):
    """True if the image answers its prompt (R4-R8)."""
    kept = kept_boxes(detections, metadata["tag"], max_overlap)
    correct = True
    answered = []  # per include clause: its chosen boxes, or None if it failed
    for clause in metadata.get("include", []):
        chosen = kept.get(clause["class"], [])[: clause["count"]]
        good = len(chosen) >= clause["count"]
        if good and "color" in clause:
            right = 0
            for detection in chosen:
                if detection["color"] == clause["color"]:
                    right += 1
            good = right >= clause["count"]
        if good and "position" in clause:
            wanted, target = clause["position"]
            if answered[target] is None:
                good = False
            else:
                for detection in chosen:
                    for other in answered[target]:
                        if wanted not in relations(detection["box"], other["box"]):
                            good = False
        answered.append(chosen if good else None)
        correct = correct and good
    for clause in metadata.get("exclude", []):
        if len(kept.get(clause["class"], [])) >= clause["count"]:
            correct = False
    return correct


def _self_check():
    # 10 x 10 boxes, slack 2 an axis.  Gap (-100, 0): reach -98 of 100.
    here = [100, 100, 110, 110]
    assert relations([0, 100, 10, 110], here) == {"left of"}
    assert relations([200, 100, 210, 110], here) == {"right of"}
    assert relations([100, 0, 110, 10], here) == {"above"}
    assert relations([100, 200, 110, 210], here) == {"below"}
    assert relations([0, 0, 10, 10], here) == {"left of", "above"}  # 98 / 141.4 = .693 twice
    assert relations(here, here) == set()
    assert relations([102, 100, 112, 110], here) == set()  # gap 2 = slack
    assert relations([103.9, 100, 113.9, 110], here) == set()  # reach 1.9 of 3.9 = .487
    assert relations([104.1, 100, 114.1, 110], here) == {"right of"}  # 2.1 of 4.1 = .512
    assert relations([103.9, 100, 113.9, 110], here, margin=0.0) == {"right of"}
    assert relations([200, 150, 210, 160], here) == {"right of"}  # 48 / 111.8 = .429 down

    def det(name, score, box, color="red"):
        return {"class": name, "score": score, "box": box, "color": color}

    one = {"tag": "single_object", "include": [{"class": "cow", "count": 1}]}
    assert verdict([det("cow", 0.31, here)], one)
    assert not verdict([det("cow", 0.3, here)], one)
    assert not verdict([det("dog", 0.99, here)], one)
    assert verdict([det("cow", 0.9, here), det("cow", 0.8, here)], one)  # extras are fine

    two = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}]}
    near, far = [101, 100, 111, 110], [300, 300, 340, 340]  # IoU(here, near) = 110 / 132 = .833
    cows = [det("cow", 0.95, here), det("cow", 0.94, far)]
    assert verdict(cows, two)
    assert not verdict(cows[:1], two)
    assert verdict([*cows, det("cow", 0.9, near)], two)  # .9 is not above .9
    assert not verdict([*cows, det("cow", 0.93, near)], two)
    assert verdict([*cows, det("cow", 0.93, near)], two, max_overlap=0.83)
    assert not verdict([*cows, det("cow", 0.93, near)], two, max_overlap=0.84)
    assert not verdict([*cows, det("cow", 0.93, here)], two)  # twins stay at 1.0
    crowd = [det("cow", 0.99 - i / 1000, [i * 50, 0, i * 50 + 10, 10]) for i in range(20)]
    many = {"tag": "counting", "include": [], "exclude": [{"class": "cow", "count": 17}]}
    assert verdict(crowd, many)  # only 16 are ever counted
    stacked = [det("cow", 0.99 - i / 1000, here) for i in range(16)] + [det("cow", 0.92, far)]
    assert not verdict(stacked, {**two, "exclude": []}, max_overlap=0.5)  # 17th fell to the cap first

    red = {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}]}
    assert verdict([det("cow", 0.9, here, "red"), det("cow", 0.8, far, "blue")], red)
    assert not verdict([det("cow", 0.8, here, "red"), det("cow", 0.9, far, "blue")], red)

    place = {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    }
    dog = det("dog", 0.5, [300, 100, 310, 110])
    assert verdict([det("cow", 0.5, here), dog], place)
    assert not verdict([dog], place)
    assert not verdict([det("cow", 0.9, [600, 100, 610, 110]), det("cow", 0.5, here), dog], place)
    place["include"][0]["count"] = 2
    assert not verdict([det("cow", 0.9, [600, 100, 610, 110]), det("cow", 0.5, here), dog], place)
    assert verdict([det("cow", 0.9, [0, 100, 10, 110]), det("cow", 0.5, here), dog], place)
    print("OK")


if __name__ == "__main__":
    _self_check()
