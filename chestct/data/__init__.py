"""From files to batches: decode, manifest, groups, splits, store, DataModule."""
