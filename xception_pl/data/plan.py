"""Which image is read when: a pure function of the data's layout, seed, epoch and step. No I/O, no torch.

The order is data. An epoch's order is one sequence of global batches; who reads a batch (ranks, accumulated
micro-batches, loader workers) only cuts it into contiguous slices, so the sequence does not depend on them, any
batch is found without replaying those before it, and (epoch, step) is the whole state of a reader.

Random access to images is dear where they lie in Parquet: the unit of reading is the row group. So the order is made in
two steps. The row groups are permuted and laid end to end; the images within a window of that sequence are permuted.
To let ranks read different bytes, the global batch is cut into *lanes*: lane l fills positions [l·B/L, (l+1)·B/L)
of every batch and owns the l-th part of the sequence. A rank's slice of the batch is a range of lanes, so
ranks share no row group other than those at a lane's ends.

A lane permutes block after block of its part. An epoch begins with blocks of one row group, or a few, that grow: the first
batch then waits for some dozen row groups to be fetched instead of for the whole window.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

_MAX_LANES = 128
_LANE_BATCH = 4  # images that a lane gives to a batch at least: each lane costs the first batch a row group
_GROUPS_A_LANE = 2  # row groups a lane mixes at any time: fewer, and neighbours in a shard would share batches
_FIRST_GROUPS = 32  # row groups that an epoch's first batch mixes at least, over all lanes
_EPOCH_KEY, _BLOCK_KEY = 0, 1  # separate random streams


class EpochPlan:
    """The order of one epoch's training images.

    Args:
        rows: images of each row group, in the order of the source; row ids count them from 0.
        seed: of the run.
        epoch: from 0.
        global_batch: images an optimiser step.
        window: images among which the order is random.

    An epoch has `steps = images // global_batch` steps. The `dropped = images % global_batch` images that do not fill a
    batch are left out, other ones in every epoch.

    Raises:
        ValueError: when there are fewer images than one global batch needs.
    """

    def __init__(
        self, rows: Sequence[int] | Ids, *, seed: int, epoch: int, global_batch: int, window: int = 65536
    ) -> None:
        self.rows = np.asarray(rows, dtype=np.int64)
        self.images = int(self.rows.sum())
        self.seed, self.epoch, self.global_batch = seed, epoch, global_batch
        self.steps = self.images // global_batch
        if not self.steps:
            raise ValueError(
                f"The training split has {self.images} images, fewer than one global batch of {global_batch}: "
                "lower data.global_batch."
            )
        self.dropped = self.images - self.steps * global_batch
        self.lanes = lanes(self.rows, global_batch, window)
        self.lane_batch = global_batch // self.lanes
        self.lane_images = self.steps * self.lane_batch
        self.block = max(1, min(self.lane_images, window // self.lanes))

        order = np.random.default_rng((seed, epoch, _EPOCH_KEY)).permutation(len(self.rows))
        self._first_id = np.cumsum(self.rows) - self.rows
        self._group_order = order
        self._group_first_id = self._first_id[order]
        self._group_end = np.cumsum(self.rows[order])  # in the laid-out sequence
        self._blocks: OrderedDict[tuple[int, int], Ids] = OrderedDict()
        self._edges: dict[int, Ids] = {}

    def batch(self, step: int) -> Ids:
        """Row ids of global batch `step`, shape (global_batch,); costs the same at any step."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps} steps")
        return np.concatenate([self._lane_batch(lane, step) for lane in range(self.lanes)])

    def micro_batch(self, step: int, rank: int, world: int, part: int = 0, parts: int = 1) -> Ids:
        """Row ids that `rank` of `world` reads as accumulated batch `part` of `parts`: a slice of `batch(step)`.

        Only the lanes that the slice meets are worked out.
        """
        size = per_device_batch(self.global_batch, world, parts)
        start = (rank * parts + part) * size
        first, last = start // self.lane_batch, (start + size - 1) // self.lane_batch
        ids = np.concatenate([self._lane_batch(lane, step) for lane in range(first, last + 1)])
        return ids[start - first * self.lane_batch :][:size]

    def order(self) -> Ids:
        """The whole epoch, shape (steps, global_batch)."""
        by_lane = [self._span(lane, 0, self.lane_images) for lane in range(self.lanes)]
        return np.stack(by_lane).reshape(self.lanes, self.steps, -1).swapaxes(0, 1).reshape(self.steps, -1)

    def groups_needed(self, start_step: int, rank: int, world: int, ranks: int = 1) -> tuple[Ids, Ids]:
        """Row groups that ranks [rank, rank + ranks) of `world` read from `start_step` on, for a reader ahead of them.

        Returns the groups in the order of first need, and the step before which each must be there.
        """
        size = self.global_batch // world
        first, last = rank * size // self.lane_batch, ((rank + ranks) * size - 1) // self.lane_batch
        start = start_step * self.lane_batch
        by_lane = [self._span(lane, start, self.lane_images) for lane in range(first, last + 1)]
        ids = np.stack(by_lane).reshape(len(by_lane), -1, self.lane_batch).swapaxes(0, 1).ravel()
        groups = np.searchsorted(self._first_id, ids, side="right") - 1
        first_use = np.full(len(self.rows), -1)
        first_use[groups[::-1]] = np.arange(len(groups))[::-1]  # of several writes the last stays: the first use
        needed = np.flatnonzero(first_use >= 0)
        needed = needed[np.argsort(first_use[needed])]
        return needed, start_step + first_use[needed] // (len(by_lane) * self.lane_batch)

    def _lane_batch(self, lane: int, step: int) -> Ids:
        return self._span(lane, step * self.lane_batch, (step + 1) * self.lane_batch)

    def _span(self, lane: int, start: int, stop: int) -> Ids:
        """Row ids at the positions [start, stop) of a lane."""
        parts = []
        while start < stop:
            block = self._block_of(lane, start)
            begin, end = self._block_bounds(lane, block)
            parts.append(self._block_ids(lane, block)[start - begin : min(stop, end) - begin])
            start = min(stop, end)
        return np.concatenate(parts)

    def _ends(self, lane: int) -> Ids:
        """Where the blocks of a lane end, in its own positions.

        Full blocks begin at another place in each lane, so that they do not all turn to new row groups at once. Before
        them lie growing ones, cut at the first row groups' ends.
        """
        if lane not in self._edges:
            full = max(1, self.block * (lane + 1) // self.lanes)
            growing: list[int] = []
            if (self.lanes, self.block) != (1, self.lane_images):
                mean, offset = self.images / len(self.rows), lane * self.lane_images
                fewest = -(-_FIRST_GROUPS // self.lanes)
                held = int(np.searchsorted(self._group_end, offset, side="right")) + fewest - 1
                end, size = int(self._group_end[min(held, len(self.rows) - 1)]) - offset, fewest * mean
                while end < full:
                    growing.append(end)
                    end, size = end + int(size), 2 * size
            ends = np.concatenate([growing, np.arange(full, self.lane_images, self.block), [self.lane_images]])
            self._edges[lane] = ends.astype(np.int64)
        return self._edges[lane]

    def _block_of(self, lane: int, position: int) -> int:
        return int(np.searchsorted(self._ends(lane), position, side="right"))

    def _block_bounds(self, lane: int, block: int) -> tuple[int, int]:
        ends = self._ends(lane)
        return int(ends[block - 1]) if block else 0, int(ends[block])

    def _block_ids(self, lane: int, block: int) -> Ids:
        """The permuted row ids of a block, kept for the batches to come."""
        ids = self._blocks.get((lane, block))
        if ids is None:
            begin, end = self._block_bounds(lane, block)
            positions = lane * self.lane_images + np.arange(begin, end)
            group = np.searchsorted(self._group_end, positions, side="right")
            within = positions - (self._group_end[group] - self.rows[self._group_order[group]])
            rng = np.random.default_rng((self.seed, self.epoch, _BLOCK_KEY, lane, block))
            ids = rng.permutation(self._group_first_id[group] + within)
            self._blocks[lane, block] = ids
            if len(self._blocks) > 2 * self.lanes:
                self._blocks.popitem(last=False)
        return ids


def lanes(rows: Ids, global_batch: int, window: int) -> int:
    """How many lanes the global batch has: a divisor of it, and one lane when the window holds the data.

    A function of data, batch and window alone: the world must not change the order.
    """
    images, groups = int(rows.sum()), len(rows)
    if window >= images:
        return 1
    mixed = window * groups // images  # row groups in the window
    most = max(1, min(_MAX_LANES, global_batch // _LANE_BATCH, mixed // _GROUPS_A_LANE, groups // (2 * _GROUPS_A_LANE)))
    return max(n for n in range(1, most + 1) if global_batch % n == 0)


def per_device_batch(global_batch: int, world: int, accumulate: int = 1) -> int:
    """Images a device and micro-batch.

    Raises:
        ValueError: when the global batch does not divide; quotes all numbers.
    """
    parts = world * accumulate
    if parts < 1 or global_batch < parts or global_batch % parts:
        down = max(parts, global_batch // parts * parts)
        near = f"{down}" if down >= global_batch else f"{down} or {down + parts}"
        raise ValueError(
            f"data.global_batch {global_batch} does not divide by {world} device{'s' * (world != 1)} × {accumulate} "
            f"accumulated batch{'es' * (accumulate != 1)} = {parts}: the nearest that does is {near}."
        )
    return global_batch // parts


class EvalPlan:
    """Evaluation in the order of the source, each image once, every rank with the same number of steps.

    Rank r owns a contiguous range of rows, lengths differing by one at most; where it has no row left, a batch is
    filled with a repeated row and marked not valid.
    """

    def __init__(self, images: int, *, batch: int, rank: int = 0, world: int = 1) -> None:
        self.images, self.batch_size = images, batch
        self.start, self.stop = rank * images // world, (rank + 1) * images // world
        longest = -(-images // world)
        self.steps = -(-longest // batch)

    def batch(self, step: int) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Row ids and their validity, both of shape (batch,)."""
        ids = self.start + step * self.batch_size + np.arange(self.batch_size)
        valid = ids < self.stop
        return np.where(valid, ids, max(0, self.stop - 1)), valid


def image_seeds(seed: int, epoch: int, ids: Ids) -> Ids:
    """A random seed an image, shape of `ids`, in [0, 2⁶³): a function of (seed, epoch, row id), not of how batches are
    cut.
    """
    key = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):  # SplitMix64's finaliser on distinct odd steps; it wraps by design
        z = key + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    seeds: Ids = (z >> np.uint64(1)).astype(np.int64)
    return seeds
