"""Names of an evaluation's files, and of its folder below a run."""

RANKS, METRICS_FILE, CALIBRATION = "ranks.parquet", "metrics.json", "calibration.json"
UNKNOWN = "unknown.parquet"  # the best entities of mentions that have no gold in the kb
CALIBRATED_ON = "validation"
KB_HASH, PROTOCOL = b"kb_sha256", b"protocol"  # in the schema's metadata of ranks.parquet


def evaluation_name(split: str, model: str, below: str = "") -> str:
    """Where metrics.json and ranks.parquet of a model on a split lie, below the run; `below`: `Run.below`."""
    return f"{below}evaluate/{split}/{model}"
