"""Examples, tokenizers, packing and loading: from files to batches."""
