"""One rank's data error, for the ranks that only notice that it is gone."""

import torch.distributed as dist

from xception_pl.data.errors import DataError

_KEY = "xception_pl/data_error"


def tell_others(error: DataError) -> None:
    """Leave the sentence where the other ranks find it."""
    if dist.is_available() and dist.is_initialized():
        dist.distributed_c10d._get_default_store().set(_KEY, str(error))


def told_by_others() -> DataError | None:
    """The sentence that another rank left, if the store still answers: it ends with rank 0, which holds it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    store = dist.distributed_c10d._get_default_store()
    try:
        return DataError(store.get(_KEY).decode()) if store.check([_KEY]) else None
    except dist.DistError:
        return None
