"""Models that look at pictures for a suite: detectors, colour classifier, question answering, depth, judges.

Every scorer has a `name` that goes into the results: what it is, and, where it is not the very checkpoint that the
suite's authors ran, what it stands in for. transformers is imported when a scorer loads, not before.
"""
