"""How near the planned order is to a perfect shuffle, on the layout of ImageNet-1k sorted by class: the worst case.

    python scripts/shuffle_quality.py

Row groups have 100 rows, as `datasets` writes them for images. For each window: the distinct classes of a batch of
256 (a perfect shuffle's are best), the row groups and rows in play (read from for the first time and not yet for the
last), their bytes at 110 kB an image, and the milliseconds that planning a batch takes: one at 90 % of the epoch asked
for first, as a resume does, and the mean of consecutive ones.
"""

import time

import numpy as np

from xception_pl.data.plan import EpochPlan

IMAGES, CLASSES, ROWS, BATCH, BYTES = 1_281_167, 1000, 100, 256, 110_000


def main() -> None:
    rows = np.append(np.full(IMAGES // ROWS, ROWS), IMAGES % ROWS)
    classes = np.arange(IMAGES) * CLASSES // IMAGES
    perfect = np.random.default_rng(0).permutation(IMAGES)[: 500 * BATCH].reshape(-1, BATCH)
    print(f"perfect shuffle: {distinct(classes[perfect]):.0f} classes a batch")
    print("| window | classes a batch | row groups in play | rows in play | GB in play | late batch ms | batch ms |")
    print("|---|---|---|---|---|---|---|")
    for window in (1024, 4096, 16384, 65536, 262144):
        plan = EpochPlan(rows, seed=0, epoch=0, global_batch=BATCH, window=window)
        start = time.perf_counter()
        plan.batch(9 * plan.steps // 10)
        late = time.perf_counter() - start
        start = time.perf_counter()
        for step in range(200):
            plan.batch(step)
        mean = (time.perf_counter() - start) / 200
        order = plan.order()
        play = in_play(order // ROWS, len(rows))
        print(
            f"| {window} | {distinct(classes[order[::10]]):.0f} | {play:.0f} | {play * ROWS:.0f} | "
            f"{play * ROWS * BYTES / 1e9:.1f} | {1e3 * late:.1f} | {1e3 * mean:.2f} |"
        )


def distinct(classes: np.ndarray) -> float:
    """Mean number of distinct classes of (steps, batch) labels."""
    return float(np.mean([len(np.unique(batch)) for batch in classes]))


def in_play(groups: np.ndarray, count: int) -> float:
    """Mean number of row groups between their first and last use, for (steps, batch) groups."""
    steps = np.repeat(np.arange(len(groups)), groups.shape[1])
    first, last = np.full(count, len(groups)), np.full(count, -1)
    np.minimum.at(first, groups.ravel(), steps)
    np.maximum.at(last, groups.ravel(), steps)
    return float((last - first + 1)[last >= 0].sum() / len(groups))


if __name__ == "__main__":
    main()
