"""The command line of a script: its options, and the comments of CONFIG as their help."""

import importlib
import re

import pytest
from conftest import ROOT

from lib.config import key_comments, parse_config

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

SOURCE = """
OTHER = dict(steps=1)  # not this
CONFIG = dict(
    # how it runs
    steps=4,  # of the optimizer
    rate=0.1,  # <- changed
    names=(
        "a",  # the first
        "b",
    ),  # in 100% of cases <- changed
    # where
    # it goes.
    folder=None,  # None: nowhere
)
"""


def test_comments_of_a_key_and_its_heading():
    assert key_comments(SOURCE) == dict(
        steps=("how it runs", "of the optimizer"),
        rate=("how it runs", ""),
        names=("how it runs", "the first in 100% of cases"),
        folder=("where it goes", "None: nowhere"),
    )
    assert key_comments("") == key_comments("CONFIG = 3\n") == {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_comment_of_every_key(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        parse_config(module.CONFIG, module.__doc__, getattr(module, "DEMO", None), ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    comments = key_comments((ROOT / f"{script}.py").read_text())
    assert comments.keys() == module.CONFIG.keys()
    assert [key for key, (_, comment) in comments.items() if not comment] == []
    for key, (heading, comment) in comments.items():
        option = "--" + key.replace("_", "-")
        # argparse breaks long words at hyphens.
        entry = re.escape(f"{comment} (default: {module.CONFIG[key]!r})".strip()).replace(r"\-", r"\-\s?")
        assert re.search(rf"{option}\b.*?{entry}", printed), key
        assert heading is None or " ".join(heading.split()) in printed
