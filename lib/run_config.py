"""Compares the configurations of training runs, for resuming, replacing and comparing runs.

A configuration is what config.json or a checkpoint holds of train.py's CONFIG, as JSON.
"""

import json

# Keys of CONFIG that do not change what a run learns.
WITHOUT_EFFECT = (
    "output_dir",
    "run_name",
    "push_to_hub",
    "log_every",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "max_overflows",
    "preview_every",
    "preview_prompts",
    "preview_guidance_scale",
    "snapshot_every",
    "report_to",
    "wandb_project",
    "wandb_pictures",
)

# Keys added to CONFIG later, each with the value that reproduces earlier runs. The values are not read from CONFIG:
# users edit it, and an edited value would be attributed to the earlier runs too.
ADDED = {
    "truncate_captions": False,
    "stop_early": False,
    "optimizer": "bitsandbytes.optim.adamw.AdamW8bit",  # no key of CONFIG; see lib/training/optimizer.py
}


def with_added(config):
    """A configuration with the keys that CONFIG gained since it was written."""
    return json.loads(json.dumps(ADDED)) | config


def differences(then, now, ignored=WITHOUT_EFFECT):
    """{key: (value then, value now)} of two configurations, sorted by key, without the `ignored` keys."""
    then, now = with_added(then), with_added(now)
    keys = sorted((then.keys() | now.keys()) - set(ignored))
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}
