"""From a folder of pictures to batches."""
