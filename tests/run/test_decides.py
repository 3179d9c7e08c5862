"""Which keys of a recipe decide a run's numbers."""

from xception_pl.recipe import schema
from xception_pl.run.decides import IDLE, what_decides

KEYS = [key.name for key in schema()]


def test_all_keys_decide_but_where_what_is_shown_and_how_images_are_kept() -> None:
    idle = {key for key in KEYS if key not in what_decides(dict.fromkeys(KEYS))}
    assert {key for key in idle if not key.startswith("run.")} == {
        "trainer.enable_progress_bar",
        "data.workers",
        "data.prefetch",
        "data.cache_dir",
        "data.cache_gb",
        "data.retry_seconds",
        "trainer.timeout_seconds",
    }
    assert {key for key in KEYS if key.startswith("run.")} <= idle


def test_each_idle_key_is_a_key() -> None:
    assert [start for start in IDLE if not any(key.startswith(start) for key in KEYS)] == []
