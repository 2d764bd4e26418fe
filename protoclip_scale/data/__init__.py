"""From files to batches: block readers, the plan, the spool, decoding, augmentation, tokens."""
