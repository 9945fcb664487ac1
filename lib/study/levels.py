"""The level of the training images among themselves, for evaluations that lack it.

A study is judged from scores alone, by a margin that is a share of the way to the training images (concept_scale.py).
Evaluations from before that scale lack its upper end, which needs the training images and the encoder that scored, but
no generated image.
"""

from pathlib import Path

from lib.evaluation.metrics.concept_scale import MARGIN, training_level
from lib.evaluation.metrics.scores import Run, load_scorers
from lib.files import write_json
from lib.study.files import LEVELS, read_levels, read_record


def write_levels(folder, data_dir):
    """Write training_level.json into a study's `folder` if some of its evaluations have neither the scale nor a level
    there: the level of each one's training images, of those in `data_dir`."""
    path = Path(folder) / LEVELS
    known = read_levels(path) if path.is_file() else {}
    places = sorted(place.parent for place in Path(folder).glob("seed*/*/metrics.json"))
    records = [read_record(place) for place in places if place.name != "comparison"]
    records = [record for record in records if "concept_scale" not in record["summary"]]
    if all(record["run"] in known for record in records):
        return
    config = (
        dict(similarity_model="clip", similarity_revision=None) | records[0]["config"] | dict(data_dir=str(data_dir))
    )
    runs = [Run(record["run"], None, record["adapter"], [], []) for record in records]
    scorers = load_scorers(config, [], runs, "cpu")
    levels = {}
    for run in runs:
        if scorers.training and scorers.training.is_of(run.adapter):
            level = training_level(scorers.training, run.adapter)
            levels[run.name] = {key: round(value, 6) if value is not None else None for key, value in level.items()}
        else:
            print(f"note: {run.name} was trained on other images than {data_dir}; its concept is not judged")
    encoder = scorers.record(config)["similarity"]
    write_json(
        path, dict(command="python study.py, with the training images", encoder=encoder, share=MARGIN, runs=levels)
    )
