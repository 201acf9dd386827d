"""Real text as bytes: sources in three splits, and batches that are functions of (seed, step)."""

from experiments.data.batches import batch_at, validation_batches
from experiments.data.cache import cache_folder
from experiments.data.text import Text, is_read, load_text

__all__ = ["Text", "batch_at", "cache_folder", "is_read", "load_text", "validation_batches"]
