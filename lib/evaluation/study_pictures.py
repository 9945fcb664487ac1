"""The study in pictures: one sheet a training seed, arms across, drawn from what an evaluation left."""

from lib.evaluation.prompts import CATEGORIES, first_of_each
from lib.evaluation.results import open_picture, picture_paths
from lib.evaluation.study_words import arm_name
from lib.files import write_bytes
from lib.pictures import strip, webp

SHOWN = 3  # prompts of each category
SIDE = 128  # pixels of a picture


def write_strip(path, folders, prompts, sampling_seed):
    """Write the WebP `path`: the base model's pictures and each arm's of the first prompts of each
    category, of one sampling seed. `folders` is {arm: folder of its evaluation}.

    Returns False, and writes nothing, where some of the pictures are gone.
    """
    chosen = first_of_each(prompts, dict.fromkeys(CATEGORIES, SHOWN))
    columns = {"base model": (next(iter(folders.values())), "base")}
    columns |= {arm_name(arm): (folder, "lora") for arm, folder in folders.items()}
    paths = {}
    for title, (folder, kind) in columns.items():
        every = picture_paths(folder, prompts, [sampling_seed], [kind])
        paths[title] = [every[index] for index in chosen]
    if not all(place.is_file() for column in paths.values() for place in column):
        return False
    pictures = {title: [open_picture(place) for place in found] for title, found in paths.items()}
    titles = [prompts[index][1] for index in chosen]
    write_bytes(path, webp(strip(pictures, titles, SIDE), quality=80))
    return True
