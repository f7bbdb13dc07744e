"""The setting that a misspelt or foreign name means; messages as a whole are in test_schema."""

from chestct.config.explain import OTHER_NAMES, suggest


def test_names_that_others_give_a_setting_lead_to_it():
    for known, others in OTHER_NAMES.items():
        assert all(suggest(other) in (known, f"{known}.{other}") for other in others), known
    named = {name for others in OTHER_NAMES.values() for name in others}
    assert named >= {"learning_rate", "gpus", "epochs", "path", "optimizer", "gradient_clip_val"}
    assert suggest("trainer.logger") == ""
