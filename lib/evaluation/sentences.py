"""The verdicts as plain sentences: what a page opens with, for a reader who knows no score.

They are made from the verdicts and their figures, so that words and figures cannot disagree.
"""

import re

from lib.evaluation.memorisation import UNTOLD

# What the categories of prompts are to a reader.
CATEGORY_TITLES = {
    "success": "What was taught",
    "near": "Close to it, but not asked for",
    "failure": "Nothing to do with it",
}
# What one wishes for their pictures.
WISHED = {"success": "should change", "near": "should stay as it was", "failure": "should stay as it was"}
# The questions of the verdicts in plain words.
QUESTIONS = {
    "learned": "Does it draw what was taught?",
    "neighbours kept": "Are prompts close to it left alone?",
    "contaminated": "Do unrelated prompts take it on?",
    "memorised": "Does it copy training pictures?",
    "collapsed": "Are its pictures of one prompt all alike?",
}
# How much of the concept other prompts take on: words for shares below these.
AMOUNTS = (("a little of it", 0.25), ("some of it", 0.6), ("most of it", 0.9))
# What a yes and a no say, and what cannot be told.
SENTENCES = {
    "learned": ("It learned {concept}.", "It did not learn {concept}.", "whether it learned {concept}"),
    "memorised": (
        "Some of its pictures are near-copies of training pictures.",
        "No copies of training pictures were found.",
        "whether it copies training pictures",
    ),
    "collapsed": (
        "Its pictures of one prompt have become too much alike.",
        "Its pictures stay varied.",
        "whether its pictures stay varied enough",
    ),
}
# Of prompts that did not ask for the concept: their category, what they are called, and the answer
# by which they are left alone.
OTHERS = {
    "neighbours kept": ("near", "prompts close to it", "yes"),
    "contaminated": ("failure", "unrelated prompts", "no"),
}


def concept_name(adapters):
    """«a holographic raincoat» of the adapters' captions, or "the concept" where they have no one
    caption. `adapters` are dicts as `runs.describe` gives them."""
    metadata = [adapter.get("metadata", {}) for adapter in adapters]
    captions = {known.get("caption") for known in metadata}
    caption = captions.pop() if len(captions) == 1 else None
    # run_folder.py writes «5 captions» for several.
    return f"«{caption}»" if caption and not re.fullmatch(r"\d+ captions", caption) else "the concept"


def plain_sentence(verdict, concept, summary=None):
    """A verdict as one sentence that needs no figures to be understood.

    `concept` names what was taught. With the verdict's own `summary` it is told too how much other
    prompts take on, as a share of what those gained that asked for it, and whether their pictures
    change at all; without it, the answer alone.
    """
    question, answer = verdict["question"], verdict["answer"]
    if question in OTHERS:
        return others_sentence(question, answer, summary)
    yes, no, untold = SENTENCES[question]
    found = {"yes": yes, "no": no, UNTOLD: f"Cannot be told: {untold}."}[answer]
    return found.format(concept=concept)


def others_sentence(question, answer, summary):
    """`plain_sentence` of the prompts that did not ask for the concept."""
    category, who, kept = OTHERS[question]
    if answer == UNTOLD:
        return f"Cannot be told: whether {who} take it on{pictures_clause(category, summary)}."
    who = who[0].upper() + who[1:]
    if answer == kept:
        return f"{who} do not take it on{pictures_clause(category, summary)}."
    totals = summary["categories"] if summary else {}
    gained = totals.get("success", {}).get("concept_similarity", dict(low=0))
    if not gained["low"] > 0:
        return f"{who} take it on."
    share = totals[category]["concept_similarity"]["mean"] / gained["mean"]
    much = next((words for words, below in AMOUNTS if share < below), "all of it")
    return f"{who} take on {much} ({share:.0%})."


def pictures_clause(category, summary):
    """Whether the pictures of a category change, in any direction, where that is certain."""
    moved = summary and summary["categories"][category].get("change")
    if not moved:
        return ""
    margin = summary["margins"]["change"]
    if moved["low"] > margin:
        return "; their pictures do change"
    return "; their pictures stay as they were" if moved["high"] < margin else ""


def difference_sentences(pairs):
    """What the comparisons of each two experiments found, counted: a sentence for each two, or one
    for all of more than three experiments."""
    found = {}
    for row in pairs:
        found.setdefault(f"{row['second']} beside {row['first']}", []).append(row["answer"])
    if len(found) > 3:
        found = {f"{len(found)} pairs of experiments": [row["answer"] for row in pairs]}
    sentences = []
    for who, answers in found.items():
        counts = ", ".join(
            f"{answer} in {answers.count(answer)}"
            for answer in ("higher", "lower", "equivalent", "undecided")
            if answer in answers
        )
        sentences.append(f"{who}: {counts} of {len(answers)} comparisons.")
    return sentences
