"""The table of metrics, from which every file, table, chart, comparison and verdict is made.

A new metric is an entry of METRICS, a scorer in a file beside this one and, where it is compared or judged, a
margin in the CONFIG of inference.py. Whatever reads METRICS skips a metric that an older metrics.json lacks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from lib.evaluation.metrics.clip_scores import text_embeddings
from lib.evaluation.metrics.lpips_distances import change, lpips_distances, variety
from lib.evaluation.metrics.memorisation import AS_NEAR
from lib.evaluation.metrics.similarity import concept_similarity, nearest_training
from lib.evaluation.prompts import CATEGORIES, UNTAUGHT
from lib.evaluation.statistics import UNCLEAR

# What a metric's figures are: LoRA minus base, from the base image to the LoRA image, or a share of LPIPS's ceiling.
DIFFERENCE, DISTANCE, SHARE = "difference", "distance", "share"


@dataclass(frozen=True)
class Question:
    """A question that a report answers with yes, no or unclear."""

    name: str
    asks: str  # in plain words
    wanted: str  # the answer of a good adapter
    says: dict  # {answer: a sentence}; may hold {concept}, {way}, {pick_up}, {images} and {bound}, see words.py
    # Of an adapter whose training images are unknown: its name, and what it says; both may hold {data_dir}.
    of_others: tuple = ("", {})
    category: str = "success"  # whose prompts it is about
    # The figures; may hold {interval}, {way}, {margin}, {bound}, {change} and {training}, see verdicts.py.
    text: str = ""
    ends: dict = field(default_factory=dict)  # {answer: what follows `text`}; may hold {training}
    bar: str = ""  # label of its interval as a bar; may hold {training}
    inverted: bool = False  # whether the first claim of Metric.tested makes a no


@dataclass(frozen=True)
class Metric:
    """A metric: how it is measured, what it is called and where it appears."""

    name: str  # in sentences
    short: str  # heads columns
    explained: str  # a sentence below tables
    kind: str  # DIFFERENCE, DISTANCE or SHARE
    # (ImageSet, adapter) -> values [n], or None where they cannot be measured. With several `columns` of
    # metrics.csv, a tuple of them.
    scorer: Callable = None
    columns: tuple = ()  # by default the metric's key
    of_adapter: bool = False  # whether scores of base images depend on the adapter
    # In place of a scorer: (runs, {key: effects measured so far}, base_pairs) -> [runs, prompts, seeds] or None
    effect: Callable = None
    unchanged: float = 0.0  # its value where the adapter does nothing
    most: float = math.inf  # the largest effect that is possible
    margin: str = None  # the key of inference.py's CONFIG; without one it is neither compared nor judged
    shown: tuple = tuple(CATEGORIES)  # categories in tables of several experiments; () keeps it out of all tables
    compared: tuple = ()  # categories in which two experiments are compared
    swept: dict = field(default_factory=dict)  # {categories: title of their chart over steps or scales}
    # {category: (claim, counterclaim)}, each (side, margins): ("below", -1) claims that the mean lies below
    # `unchanged` by more than one margin. Where both hold, the counterclaim wins.
    tested: dict = field(default_factory=dict)
    questions: tuple = ()  # about its tested categories

    @property
    def signed(self):
        """Whether its figures are written with a sign."""
        return self.kind == DIFFERENCE


# ---- scorers: of an ImageSet (scores.py) and an adapter as `describe` returns it ------------


def clip_score(images, adapter):
    """Cosine of each image and its prompt."""
    if not images.clip:
        return None
    return (images.clip_embeddings * text_embeddings(images.prompts, images.clip)).sum(axis=1)


def lpips(images, adapter):
    """Distance of each image to the base image from the same noise."""
    return lpips_distances(images.base, images.images, images.device) if images.base else None


def concept(images, adapter):
    """Mean cosine of each image to the training images."""
    return concept_similarity(images.embeddings, images.training.embeddings) if images.training else None


def clip_image_similarity(images, adapter):
    """Mean cosine of each image to the training images by CLIP, where another encoder measures the concept."""
    if not images.training or images.training.clip_embeddings is None:
        return None
    return concept_similarity(images.clip_embeddings, images.training.clip_embeddings)


def subject(images, adapter):
    """Mean cosine of each image to the subjects of the training images alone, where these have masks."""
    if not images.training or images.training.subjects is None:
        return None
    return concept_similarity(images.embeddings, images.training.subjects)


def nearest(images, adapter):
    """Highest cosine of each image to one that the adapter was trained on, and that image's name."""
    training = images.training
    if not training:
        return None
    trained = training.trained_on(adapter)
    similarity, index = nearest_training(images.embeddings, training.embeddings[trained], training.mirrored[trained])
    return similarity, [training.names[trained[place]] for place in index]


# ---- the table -----------------------------------------------------------------------------

MOVED, STAYED = ("above", 0), ("below", 1)  # beyond 0, or by less than the margin


def kept(category):
    """The question whether prompts that do not ask for the concept stay free of it."""
    who = category.plain[0].upper() + category.plain[1:]
    return Question(
        name=f"{category.name} kept",
        asks=f"Are {category.noun} left alone?",
        wanted="yes",
        says={
            "yes": f"{who} do not pick it up{{images}}.",
            "no": f"{who} {{pick_up}}.",
            UNCLEAR: f"Unclear: do {category.plain} pick it up?{{images}}",
        },
        category=category.name,
        text=f"On {category.noun} the similarity to {{training}} changed by {{interval}}{{way}} (negligible "
        "below {margin:g}){change}. ",
        ends={
            "no": "They move toward {training}.",
            "yes": "If they move toward {training} at all, it is by less than the margin.",
        },
        bar=f"gain in similarity to {{training}}, {category.plain}",
        inverted=True,
    )


LEARNED = Question(
    name="learned",
    asks="Does it generate the concept?",
    wanted="yes",
    says={
        "yes": "It learned {concept}{way}.",
        "no": "It did not learn {concept}{way}.",
        UNCLEAR: "Unclear: did it learn {concept}?",
    },
    of_others=(
        "similar to the images in {data_dir}",
        {
            "yes": "It generates what the images in {data_dir} show{way}.",
            "no": "It does not generate what the images in {data_dir} show{way}.",
            UNCLEAR: "Unclear: does it generate what the images in {data_dir} show?",
        },
    ),
    bar=f"gain in similarity to {{training}}, {CATEGORIES['success'].plain}",
)
COLLAPSED = Question(
    name="collapsed",
    asks="Do its images of one prompt all look alike?",
    wanted="no",
    says={
        "yes": "Its images of one prompt have become too similar.",
        "no": "Its images stay varied.",
        UNCLEAR: "Unclear: do its images stay varied enough?",
    },
    text="Images of one success prompt vary over the seeds {interval} times as much as the base model's (collapsed "
    "below {bound:g}). ",
    ends={"yes": "They lost more variety than the margin.", "no": "They stay varied."},
    bar="variety over the seeds, as a share of the base model's",
)
# Answered by memorisation.py, not by a metric.
MEMORISED = Question(
    name="memorised",
    asks="Does it copy training images?",
    wanted="no",
    says={
        "yes": "Some of its images are nearer to training images than chance allows.",
        "no": "No copying of training images was found{bound}.",
        UNCLEAR: "Unclear: does it copy training images?{bound}",
    },
    bar=f"share of images {AS_NEAR}, up to its upper bound",
)

METRICS = {
    "lpips": Metric(
        name="LPIPS",
        short="LPIPS",
        explained="LPIPS: distance between base and LoRA image from the same noise.",
        kind=DISTANCE,
        scorer=lpips,
    ),
    "clip": Metric(
        name="CLIP score",
        short="CLIP",
        explained="CLIP: cosine of image and prompt.",
        kind=DIFFERENCE,
        scorer=clip_score,
        most=2.0,  # of a difference of cosines
        margin="clip_margin",
        compared=("success",),
        swept={("success",): "Prompt match: CLIP score, LoRA minus base"},
        tested={"success": (("above", -1), ("below", -1))},
    ),
    "concept_similarity": Metric(
        name="concept similarity",
        short="Concept",
        explained="Concept: mean cosine to the training images.",
        kind=DIFFERENCE,
        scorer=concept,
        most=2.0,
        margin="concept_margin",
        compared=("success", "near", "unrelated"),
        swept={
            ("success",): "Concept gained: similarity to the training images",
            ("near", "unrelated"): "Bleeding: similarity of other prompts to the training images",
        },
        tested=dict.fromkeys(CATEGORIES, (MOVED, STAYED)),
        questions=(LEARNED, *map(kept, UNTAUGHT)),
    ),
    "clip_image_similarity": Metric(
        name="CLIP image similarity",
        short="CLIP image",
        explained="CLIP image: mean cosine to the training images by CLIP, in place of the encoder of Concept; not judged.",
        kind=DIFFERENCE,
        scorer=clip_image_similarity,
    ),
    "subject_similarity": Metric(
        name="subject similarity",
        short="Subject",
        explained="Subject: mean cosine to the subjects of the training images alone, with one colour outside their "
        "masks; not judged.",
        kind=DIFFERENCE,
        scorer=subject,
    ),
    "change": Metric(
        name="change",
        short="Change",
        explained="Change: LPIPS as a share of its ceiling, the LPIPS between base images of one prompt at different "
        "seeds.",
        kind=SHARE,
        effect=change,
        most=1.0,  # another image of the same prompt
        margin="change_margin",
        compared=("near", "unrelated"),
        swept={("near", "unrelated"): "Change of other prompts in any direction"},
    ),
    "variety": Metric(
        name="variety",
        short="Variety",
        explained="Variety: LPIPS between LoRA images of one prompt at different seeds, as a share of the same ceiling.",
        kind=SHARE,
        effect=variety,
        unchanged=1.0,
        most=1.0,  # one image for every seed
        margin="variety_margin",
        shown=("success",),
        compared=("success",),
        swept={("success",): "Variety over the seeds (base model: 1)"},
        tested={"success": (("below", -1), ("above", -1))},
        questions=(COLLAPSED,),
    ),
    "nearest_similarity": Metric(
        name="similarity to the nearest training image",
        short="Nearest image",
        explained="Nearest image: highest cosine to a training image.",
        kind=DIFFERENCE,
        scorer=nearest,
        columns=("nearest_similarity", "nearest_picture"),
        of_adapter=True,
        shown=(),
        swept={("success",): "Nearest image: similarity to one training image, LoRA minus base"},
    ),
}


# ---- what is read from it ------------------------------------------------------------------


def metric_name(key):
    """What a metric is called in sentences; its key if the table lacks it."""
    return METRICS[key].name if key in METRICS else key


def margins_of(config, scale):
    """{metric: margin} of inference.py's CONFIG, and `copies`, the margin of memorisation.

    The margin of the concept is that of its `scale` (concept_scale.py). Where that is unknown there is none, so that
    nothing is judged by it.
    """
    margins = {key: config[metric.margin] for key, metric in METRICS.items() if metric.margin}
    margins |= dict(concept_similarity=scale and scale["margin"], copies=config["copy_margin"])
    return {key: margin for key, margin in margins.items() if margin is not None}


def measures(where):
    """[(metric, category)] that are `compared` or `swept`, category by category."""
    found = []
    for category in CATEGORIES:
        for key, metric in METRICS.items():
            listed = metric.compared if where == "compared" else sum(metric.swept, ())
            found += [(key, category)] if category in listed else []
    return found


def questions():
    """{name: Question}, in the order of reports."""
    found = [question for metric in METRICS.values() for question in metric.questions]
    return {question.name: question for question in (*found, MEMORISED)}
